"""The cache layer against a plain reference: dictionaries of tokens, head by head."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from keeprate.kv.cache import GROW, Absent, Flat, Growing, KVLayer
from keeprate_kernels import quantise_kv

B, G, D = 2, 3, 8


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs(m: int, seed: int = 0, b: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of m new tokens."""
    return rand(b, G, m, D, seed=seed), rand(b, G, m, D, seed=seed + 1000)


class Owner:
    """A session as the layer sees it."""

    running, reads_flat = True, False


def filled(n: int, seed: int = 0, b: int = B) -> KVLayer:
    layer = KVLayer()
    layer.owner = Owner()
    layer.update(*pairs(n, seed, b))
    return layer


def slots(layer: KVLayer, arrivals: list[list[list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots [b, g, k] of some arrival numbers for every sample and head, and which of them are no padding."""
    width = max(len(head) for sample in arrivals for head in sample)
    slot = torch.zeros(len(arrivals), G, width, dtype=torch.long)
    there = torch.zeros(len(arrivals), G, width, dtype=torch.bool)
    for i, sample in enumerate(arrivals):
        for h, head in enumerate(sample):
            for j, arrival in enumerate(head):
                at = layer.index[i, h] == arrival
                at = at if layer.valid is None else at & layer.valid[i, h]
                slot[i, h, j], there[i, h, j] = at.nonzero().item(), True
    return slot, there


@dataclass
class Reference:
    """What the layer promises, token by token: for every sample and head, arrival number -> (key, value)."""

    hot: list[list[dict[int, tuple[torch.Tensor, torch.Tensor]]]] = field(default_factory=list)
    cold: list[list[dict[int, tuple[torch.Tensor, torch.Tensor]]]] = field(default_factory=list)
    seen: int = 0

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.hot = self.hot or [[{} for _ in range(G)] for _ in keys]
        self.cold = self.cold or [[{} for _ in range(G)] for _ in keys]
        for i, sample in enumerate(self.hot):
            for h, head in enumerate(sample):
                head |= {self.seen + t: (keys[i, h, t], values[i, h, t]) for t in range(keys.shape[2])}
        self.seen += keys.shape[2]

    def keep(self, arrivals: list[list[list[int]]]) -> None:
        self.hot = [
            [{t: head[t] for t in sorted(stay)} for head, stay in zip(*two, strict=True)]
            for two in zip(self.hot, arrivals, strict=True)
        ]

    def pack(self, arrivals: list[list[list[int]]], bits: int) -> None:
        """In few bits with the statistics of exactly these tokens of this head; 0 bits = no keys."""
        for i, sample in enumerate(arrivals):
            for h, some in enumerate(sample):
                if not some:
                    continue
                keys, values = (torch.stack([self.hot[i][h][t][j] for t in some])[None, None] for j in (0, 1))
                if bits:
                    keys, values = (x.dequantise() for x in quantise_kv(keys, values, bits=bits))
                else:
                    keys = torch.zeros_like(keys)
                self.cold[i][h] |= {t: (keys[0, 0, j], values[0, 0, j]) for j, t in enumerate(some)}

    def pick(self, index: list[int]) -> None:
        self.hot, self.cold = ([list(map(dict, part[i])) for i in index] for part in (self.hot, self.cold))


def check(layer: KVLayer, expected: Reference) -> None:
    """Every head holds exactly the tokens of the reference, with their keys and values, and says so."""
    keys, values = layer.read()
    index, valid = layer.index, layer.valid
    b = len(expected.hot)
    assert keys.shape == values.shape == (b, G, layer.n, D) and index.shape == (b, G, layer.n)
    assert layer.batch == b and layer.get_seq_length() == expected.seen
    kept = layer.kept()
    for i in range(b):
        for h in range(G):
            there = torch.arange(layer.n) if valid is None else valid[i, h].nonzero()[:, 0]
            hot, cold = expected.hot[i][h], expected.cold[i][h]
            assert index[i, h, there].sort().values.tolist() == sorted(hot | cold)
            assert sorted(index[i, h, there[there < layer.n_cold]].tolist()) == sorted(cold)
            assert [t for t in kept[i, h].tolist() if t >= 0] == sorted(hot | cold)
            for slot in there.tolist():
                key, value = (hot | cold)[int(index[i, h, slot])]
                torch.testing.assert_close(keys[i, h, slot], key)
                torch.testing.assert_close(values[i, h, slot], value)
            assert int(layer.counts[i, h]) == len(hot) + len(cold) and int(layer.hot_counts[i, h]) == len(hot)
    for name, carried in layer.state.items():
        assert carried.view.shape[:3] == index.shape, name
    if "arrival" in layer.state:  # state travels with its token
        state = layer.state["arrival"].view
        old = torch.ones_like(state, dtype=torch.bool) if valid is None else valid
        old = old & (state > 0)
        assert torch.equal(state[old], index[old].float() + 1)


def some(rng: np.random.Generator, heads: list[list[dict]], share: float, even: bool) -> list[list[list[int]]]:
    """A random choice of every head's tokens, as many of each head or not."""
    least = min(len(head) for sample in heads for head in sample)
    return [
        [
            sorted(rng.permutation(sorted(head))[: max(1, int(share * (least if even else len(head))))].tolist())
            for head in sample
        ]
        for sample in heads
    ]


@pytest.mark.parametrize("seed", range(24))
def test_any_history_gives_what_the_reference_gives(seed):
    """Tokens come, go, are packed, and samples are picked, in random order."""
    rng = np.random.default_rng(seed)
    layer, expected = filled(9, seed), Reference()
    expected.append(*pairs(9, seed))
    layer.carry("arrival").copy_(layer.index + 1)
    for turn in range(8):
        act = rng.choice(["append", "keep", "ragged", "pack", "drop", "pick"])
        if act == "append":
            new = pairs(int(rng.integers(1, 5)), 10 * seed + turn, len(expected.hot))
            layer.update(*new)
            expected.append(*new)
        elif act in ("keep", "ragged"):
            chosen = some(rng, expected.hot, 0.7, act == "keep")
            slot, there = slots(layer, chosen)
            layer.keep(slot, None if act == "keep" else there)
            expected.keep(chosen)
        elif act == "pack":
            chosen, bits = some(rng, expected.hot, 0.6, bool(rng.integers(2))), int(rng.choice([0, 2, 4, 8]))
            rest = [
                [sorted(set(head) - set(stay)) for head, stay in zip(*two, strict=True)]
                for two in zip(expected.hot, chosen, strict=True)
            ]
            layer.keep(*slots(layer, chosen), (((*slots(layer, rest), bits)),))
            expected.pack(rest, bits)
            expected.keep(chosen)
        elif act == "drop":
            new = pairs(1, 10 * seed + turn, len(expected.hot))  # as at a decode step: one comes, one goes
            layer.update(*new)
            expected.append(*new)
            victim = [[int(rng.choice(sorted(head))) for head in sample] for sample in expected.hot]
            layer.drop(slots(layer, [[[t] for t in sample] for sample in victim])[0][..., 0])
            expected.keep(
                [
                    [sorted(set(head) - {t}) for head, t in zip(*two, strict=True)]
                    for two in zip(expected.hot, victim, strict=True)
                ]
            )
        else:
            index = rng.integers(len(expected.hot), size=int(rng.integers(1, 4))).tolist()
            layer.batch_select_indices(torch.tensor(index))
            expected.pick(index)
        check(layer, expected)


# --- growing ----------------------------------------------------------------------------------------------------------


def test_growing_copies_once_in_many_steps():
    x = rand(B, G, 5, D)
    store = Growing(x)
    assert store.view.data_ptr() == x.data_ptr() and store.nbytes == x.numel() * 4
    whole, places = x, set()
    for step in range(GROW + 1):
        new = rand(B, G, 1, D, seed=step + 1)
        store.append(new)
        whole = torch.cat([whole, new], 2)
        places.add(store.buffer.data_ptr())
        assert torch.equal(store.view, whole)
    assert len(places) == 1, "one buffer for the first 65 tokens"
    assert store.nbytes == B * G * (5 + 1 + GROW) * D * 4, "the head room is counted"
    assert torch.equal(x, rand(B, G, 5, D)), "what was given is not written to"


def test_growing_keeps_the_graph():
    x = rand(1, 1, 2, D).requires_grad_()
    store = Growing(x)
    new = rand(1, 1, 1, D, seed=1).requires_grad_()
    store.append(new)
    store.view.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and torch.equal(new.grad, torch.ones_like(new))


def test_growing_takes_and_replaces():
    x = rand(B, G, 6, D)
    store, slot = Growing(x.clone()), torch.randint(6, (B, G, 4), generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        store.take(slot), torch.stack([torch.stack([x[i, h, slot[i, h]] for h in range(G)]) for i in range(B)])
    )
    gone = torch.tensor([[0, 5, 2], [3, 1, 4]])  # 5 is the last one itself
    store.replace(gone)
    for i in range(B):
        for h in range(G):
            left = x[i, h].clone()
            left[gone[i, h]] = x[i, h, 5]
            assert torch.equal(store.view[i, h], left[:5])
    flags = Growing(torch.tensor([[[True, False, True]]]))
    flags.replace(torch.tensor([[0]]))
    assert flags.view.tolist() == [[[True, False]]]


# --- per-head storage -------------------------------------------------------------------------------------------------


def test_flat_storage_has_no_padding():
    counts = torch.tensor([[1, 4, 0], [2, 3, 5]])
    keys, values = rand(int(counts.sum()), D), rand(int(counts.sum()), D, seed=1)
    flat = Flat(keys, values, counts)
    assert flat.n == 5 and flat.offsets.tolist() == [0, 1, 5, 5, 7, 10, 15]
    assert flat.nbytes == 2 * 15 * D * 4
    padded = flat.padded()
    for store, full in zip((keys, values), padded, strict=True):
        assert full.shape == (B, G, 5, D)
        rows = store.split(counts.flatten().tolist())
        for row, head in zip(rows, full.flatten(0, 1), strict=True):
            assert torch.equal(head[: len(row)], row)


# --- bytes ------------------------------------------------------------------------------------------------------------


def storages(layer: KVLayer) -> int:
    """Bytes of all storages that hold keys and values, found by walking the layer, each counted once."""
    held = [x.buffer for x in layer.dense or ()] + ([layer.flat.keys, layer.flat.values] if layer.flat else [])
    for cold in layer.cold:
        for part in (cold.keys, cold.values):
            held += [getattr(part, name, None) for name in ("data", "low", "step", "scale", "like")]
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held if x is not None}
    found.pop(0, None)  # an empty storage has no address
    return sum(found.values())


@pytest.mark.parametrize("bits", [None, 0, 2, 4, 8])
@pytest.mark.parametrize("even", [True, False])
def test_nbytes_is_what_is_allocated(bits, even):
    n, rng = 40, np.random.default_rng(0)
    layer, expected = filled(n), Reference()
    expected.append(*pairs(n))
    assert layer.nbytes == storages(layer) == 2 * B * G * n * D * 4
    chosen = some(rng, expected.hot, 0.25, True)
    if not even:
        chosen[0][0], chosen[1][2] = chosen[0][0][:3], chosen[1][2][:6]
    rest = [[sorted(set(range(n)) - set(head)) for head in sample] for sample in chosen]
    slot, there = slots(layer, chosen)
    cold = () if bits is None else ((*slots(layer, rest), bits),)
    layer.keep(slot, None if even else there, cold)
    kept = sum(len(head) for sample in chosen for head in sample)
    exact = 2 * kept * D * 4
    wide = max(len(head) for sample in rest for head in sample)  # packed tokens are padded to the longest head
    per_head = {
        None: 0,
        0: wide * D * 4,  # values as they are, no keys
        **{w: wide * (2 * D * w // 8 + 2 * 4) + (2 + 1) * D * 4 for w in (2, 4, 8)},  # codes; low, step; scale
    }
    assert layer.nbytes == storages(layer) == exact + B * G * per_head[bits]
    layer.update(*pairs(1))
    assert layer.nbytes == storages(layer)


def test_bookkeeping_is_counted_apart():
    layer = filled(10)
    before = layer.nbytes
    assert layer.bookkeeping == 0
    layer.carry("sum")
    layer.extra["lengths"] = torch.zeros(B)
    layer.note_positions(torch.arange(10)[None])
    assert layer.bookkeeping == B * G * 10 * 4 + B * 4 + 10 * 4
    assert layer.nbytes == before


def test_absent_keys_read_as_zero_and_take_nothing():
    absent = Absent(torch.empty(B, G, 0, D), 7)
    assert absent.nbytes == 0 and torch.equal(absent.dequantise(torch.float16), torch.zeros(B, G, 7, D).half())


# --- masked runs, padding, positions ----------------------------------------------------------------------------------


def test_masked_runs_hide_instead_of_removing():
    layer = filled(6)
    layer.masked = True
    slot = torch.tensor([0, 2, 5]).expand(B, G, -1)
    layer.keep(slot)
    assert layer.n == 6 and layer.valid[0, 0].tolist() == [True, False, True, False, False, True]
    layer.update(*pairs(1))
    layer.drop(torch.full((B, G), 2))
    assert layer.valid[0, 0].tolist() == [True, False, False, False, False, True, True]
    assert layer.kept()[0, 0].tolist() == [0, 5, 6] and int(layer.counts[0, 0]) == 3
    keys, _ = layer.read()
    assert torch.equal(keys[:, :, :6], pairs(6)[0]), "nothing is removed"


def test_padding_is_marked_and_survives_shortening():
    layer = filled(5)
    layer.mark_padding(torch.ones(B, 5, dtype=torch.bool))
    assert layer.valid is None, "no padding, no mask"
    layer.mark_padding(torch.tensor([[True] * 5, [False, False, True, True, True]]))
    assert layer.counts.tolist() == [[5] * G, [3] * G]
    layer.keep(torch.tensor([0, 1, 4]).expand(B, G, -1))
    assert layer.kept()[:, 0].tolist() == [[0, 1, 4], [4, -1, -1]]
    layer.update(*pairs(1))
    layer.mark_padding(torch.tensor([[True], [True]]))
    assert layer.counts.tolist() == [[4] * G, [2] * G]


def test_positions_follow_their_tokens():
    layer = filled(5)
    layer.note_positions(torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]))
    layer.keep(torch.tensor([4, 1, 3]).expand(B, G, -1))
    assert layer.positions[:, 0].tolist() == [[4, 1, 3], [2, 0, 1]]
    layer.update(*pairs(1))
    layer.note_positions(torch.tensor([[5], [3]]))
    assert layer.positions[:, 1].tolist() == [[4, 1, 3, 5], [2, 0, 1, 3]]
    shared = filled(3)
    shared.note_positions(torch.tensor([[0, 1, 2]]))  # one row for all samples, then one each
    shared.update(*pairs(1))
    shared.note_positions(torch.tensor([[3], [9]]))
    assert shared.positions[:, 0].tolist() == [[0, 1, 2, 3], [0, 1, 2, 9]]


# --- several samples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("repeats", [1, 3])
def test_repeated_samples_go_on_as_their_original(b, repeats):
    """Also for one sample, whose arrival numbers might pass for shared ones."""
    layer, expected = filled(8, b=b), Reference()
    expected.append(*pairs(8, b=b))
    chosen = some(np.random.default_rng(0), expected.hot, 0.6, False)
    chosen[0][0] = chosen[0][0][:2]
    rest = [[sorted(set(range(8)) - set(head)) for head in sample] for sample in chosen]
    layer.keep(*slots(layer, chosen), ((*slots(layer, rest), 4),))
    expected.pack(rest, 4)
    expected.keep(chosen)
    layer.batch_repeat_interleave(repeats)
    expected.pick([i for i in range(b) for _ in range(repeats)])
    check(layer, expected)
    new = pairs(2, 7, b * repeats)
    layer.update(*new)
    expected.append(*new)
    check(layer, expected)


def test_reordering_takes_everything_along():
    layer = filled(5)
    layer.carry("sum").copy_(rand(B, G, 5))
    layer.extra = {"lengths": torch.tensor([5, 3]), "name": "x", "scalar": torch.tensor(2.0)}
    layer.mark_padding(torch.tensor([[True] * 5, [False, False, True, True, True]]))
    layer.note_positions(torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]))
    layer.reorder_cache(torch.tensor([1, 0]))
    keys, values = pairs(5)
    assert torch.equal(layer.read()[0], keys.flip(0)) and torch.equal(layer.read()[1], values.flip(0))
    assert torch.equal(layer.state["sum"].view, rand(B, G, 5).flip(0))
    assert layer.extra["lengths"].tolist() == [3, 5] and layer.extra["name"] == "x"
    assert layer.counts.tolist() == [[3] * G, [5] * G]
    assert layer.positions[0, 0].tolist() == [0, 0, 0, 1, 2]


# --- life cycle -------------------------------------------------------------------------------------------------------


def test_crop_of_an_untouched_cache():
    layer = filled(6)
    layer.note_positions(torch.arange(6)[None])
    layer.mark_padding(torch.tensor([[False] + [True] * 5, [True] * 6]))
    layer.crop(-2)
    assert layer.get_seq_length() == layer.n == 4 and torch.equal(layer.read()[0], pairs(6)[0][:, :, :4])
    layer.update(*pairs(3, 5))
    layer.note_positions(torch.arange(4, 7)[None])
    assert layer.index[0, 0].tolist() == list(range(7)) and layer.positions[0, 0].tolist() == list(range(7))
    assert layer.counts[:, 0].tolist() == [6, 7]
    layer.crop(0)
    assert layer.n == 7


@pytest.mark.parametrize("work", ["drop", "keep", "state", "extra"])
def test_crop_of_a_cache_at_work_is_refused(work):
    layer = filled(6)
    if work == "drop":
        layer.drop(torch.zeros(B, G, dtype=torch.long))
    elif work == "keep":
        layer.keep(torch.arange(6).expand(B, G, -1))
    elif work == "state":
        layer.carry("sum")
    else:
        layer.extra["lengths"] = torch.tensor([6, 6])
    with pytest.raises(ValueError, match="cannot be cropped"):
        layer.crop(-1)


@pytest.mark.parametrize("remove", [-7, 7])
def test_crop_of_more_than_there_is(remove):
    """As transformers' own layer: nothing is left, and nothing is counted twice."""
    layer = filled(6)
    try:
        layer.crop(remove)
    except ValueError:
        return
    assert layer.n == layer.get_seq_length() == 0


def test_reading_a_shortened_cache_needs_its_session():
    layer = filled(6)
    layer.keep(torch.arange(3).expand(B, G, -1))
    layer.owner = None
    with pytest.raises(ValueError, match=r"with. block"):
        layer.update(*pairs(1))
    layer.reset()
    keys, _ = layer.update(*pairs(2))
    assert layer.n == layer.get_seq_length() == 2 and torch.equal(keys, pairs(2)[0])


def test_probing_leaves_nothing_behind():
    layer = filled(4)
    layer.probing = True
    keys, values = layer.update(*pairs(2, 3))
    assert keys.shape[2] == values.shape[2] == 6 and torch.equal(keys[:, :, 4:], pairs(2, 3)[0])
    layer.probing = False
    assert layer.n == layer.get_seq_length() == 4


def test_flat_decode_steps_hand_over_only_the_new_tokens():
    layer = filled(6)
    slot = torch.arange(4).expand(B, G, -1)
    there = torch.ones(B, G, 4, dtype=torch.bool)
    there[0, 0, 2:] = False
    layer.keep(slot, there)
    layer.owner.reads_flat = True
    try:
        one, several = pairs(1, 3), pairs(2, 4)
        assert torch.equal(layer.update(*one)[0], one[0])
        keys, _ = layer.update(*several)
        assert keys.shape[2] == layer.n == 4 + 1 + 2
    finally:
        layer.owner.reads_flat = False
