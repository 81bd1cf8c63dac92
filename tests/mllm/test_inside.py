"""What the methods inside the language model promise beyond what all do (`tests/conformance/test_mllm.py`)."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from keeprate import Budget, select
from keeprate.mllm import (
    BTP,
    DART,
    AttentionDebiasing,
    CoreMatching,
    FasterVLM,
    FastV,
    FiCoCo,
    Knee,
    MustDrop,
    PyramidDrop,
    Simignore,
    SparseVLM,
    TransPrune,
)
from keeprate.mllm.btp import manhattan, rebalance, top_up
from keeprate.mllm.dart import least_similar
from keeprate.mllm.debiasing import bars
from keeprate.mllm.ficoco import compress
from keeprate.mllm.mustdrop import merge_windows
from keeprate.mllm.sparsevlm import density_peaks, raters, recycle
from keeprate.mllm.staged import at_depth
from keeprate.mllm.transprune import transition

from ..conformance.multimodal import Models, inputs

quick = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**31 - 1)
DEPTH, PATCHES, IMAGE = 8, 36, 90  # decoder layers, visual tokens of a picture, their id


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flags(*shape: int, seed: int = 0) -> torch.Tensor:
    return rand(*shape, seed=seed) > 0


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=48,
        patch_size=8,
    )
    text = LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        head_dim=12,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=PATCHES)
    )
    for p in model.parameters():
        p.data.mul_(4 if p.dim() > 1 else 1)  # attention that is not flat
    return model.eval()


@pytest.fixture(scope="module")
def prompt() -> dict[str, torch.Tensor]:
    """Two samples with pictures and questions of their own."""
    g = torch.Generator().manual_seed(1)
    words = torch.randint(8, 80, (2, 6), generator=g)
    ids = torch.cat([torch.tensor([[1, 5]] * 2), torch.full((2, PATCHES), IMAGE), words], 1)
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 48, 48, generator=g)}


def run(method, model, prompt, **options):
    with torch.no_grad(), method(model, **options) as trace:
        return trace, model(**prompt)


def kept(trace) -> list[list[set[int]]]:
    """For every reduction, the visual tokens that each sample still has."""
    return [[{i for i in row.tolist() if i >= 0} for row in step] for step in trace.kept]


# --- where and how many -----------------------------------------------------------------------------------------------


@given(depth=st.integers(5, 80))
def test_layers_scale_with_the_depth(depth: int) -> None:
    layers = at_depth((3, 7, 11, 15), depth)
    assert len(layers) == 4 and layers[0] >= 1 and layers[-1] < depth
    assert all(a < b for a, b in pairwise(layers))
    assert depth != 32 or layers == (3, 7, 11, 15)


def test_a_model_with_too_few_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="deeper model; got 4"):
        at_depth((3, 7, 11, 15), 4)


def test_one_share_is_approached_with_equal_ratios_and_met(model, prompt) -> None:
    trace, _ = run(TransPrune(keep=1 / 8), model, prompt)
    assert [len(row) for step in kept(trace) for row in step] == [18, 18, 9, 9, 4, 4]  # 36 / 2, / 4, / 8
    trace, _ = run(TransPrune(keep=5), model, prompt)
    assert all(len(row) == 5 for row in kept(trace)[-1])


@pytest.mark.parametrize(
    "method",
    [
        SparseVLM(keep=(0.5, 0.25)),
        BTP(keep=(0.5, 0.25)),
        MustDrop(keep=(0.5,)),
        PyramidDrop(keep=(0.5, 0.25)),
        PyramidDrop(keep=(0.5, 0.25, 0.1, 0.1)),
    ],
)
def test_a_schedule_of_another_length_is_refused(method, model) -> None:
    with pytest.raises(ValueError, match="one entry each"):
        method.layers_at(DEPTH)


# --- Simignore --------------------------------------------------------------------------------------------------------


def visual(x: torch.Tensor, text: torch.Tensor, text_valid: torch.Tensor | None = None) -> SimpleNamespace:
    return SimpleNamespace(x=x, question=lambda: (text, text_valid))


@quick
@given(seed=seeds, k=st.integers(1, 20))
def test_simignore_is_the_walk_down_all_pairs(seed: int, k: int) -> None:
    x, text = rand(1, 20, 6, seed=seed), rand(1, 5, 6, seed=seed + 1)
    cosine = (unit(x) @ unit(text).transpose(1, 2))[0]
    walk: list[int] = []
    for pair in cosine.flatten().argsort(descending=True).tolist():
        if pair // 5 not in walk:
            walk.append(pair // 5)
    top = Simignore().score(visual(x, text))[0].argsort(descending=True)
    assert top[:k].tolist() == walk[:k]


def test_simignore_sees_directions_only_and_no_padding() -> None:
    x, text = rand(2, 9, 6), rand(2, 4, 6, seed=1)
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    score = Simignore().score(visual(x, text, valid))
    scaled = Simignore().score(visual(x * rand(2, 9, 1).exp(), text * 7, valid))
    torch.testing.assert_close(score, scaled)
    torch.testing.assert_close(score[1:], Simignore().score(visual(x[1:], text[1:, :2])))


# --- DART -------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, count=st.integers(3, 20))
def test_pivots_take_the_least_similar_in_turn(seed: int, count: int) -> None:
    cosine, there = rand(1, 4, 20, seed=seed), torch.tensor([[True, False, True, True]])
    start = torch.zeros(1, 20, dtype=torch.bool)
    start[0, [2, 7, 9]] = True
    got = least_similar(cosine, there, start, torch.tensor([count]))
    left, chosen, part = sorted(set(range(20)) - {2, 7, 9}), {2, 7, 9}, count - 3
    for number, pivot in enumerate((0, 2, 3)):
        take = sorted(left, key=lambda j: cosine[0, pivot, j].item())[: part // 3 + (number < part % 3)]
        chosen |= set(take)
        left = [j for j in left if j not in chosen]
    assert {*got[0].nonzero().flatten().tolist()} == chosen and len(chosen) == count


def test_no_clone_of_the_only_pivot_survives() -> None:
    x = rand(1, 30, 8)
    x[0, :20] = x[0, 0] * (1 + 0.1 * rand(20, 1).abs())
    start = torch.arange(30)[None] == 0
    cosine = unit(x[:, :1]) @ unit(x).transpose(1, 2)
    got = least_similar(cosine, torch.ones(1, 1, dtype=torch.bool), start, torch.tensor([11]))
    assert got[0].nonzero().flatten().tolist() == [0, *range(20, 30)]


def test_dart_keeps_its_pivots_and_the_exact_count(model, prompt) -> None:
    trace, _ = run(DART(keep=13), model, prompt)
    norms = trace.scores[0]
    for row, score in zip(kept(trace)[0], norms, strict=True):
        assert len(row) == 13 and {*score.topk(4).indices.tolist()} <= row


# --- SparseVLM --------------------------------------------------------------------------------------------------------


def test_raters_are_the_words_above_the_mean() -> None:
    x, text = rand(2, 10, 6), rand(2, 5, 6, seed=1)
    valid, text_valid = torch.arange(10) < torch.tensor([[10], [7]]), torch.arange(5) < torch.tensor([[5], [3]])
    got = raters(x, text, valid, text_valid)
    for i, (n, words) in enumerate(((10, 5), (7, 3))):
        m = (x[i, :n] @ text[i, :words].T).softmax(1).mean(0)
        assert got[i].tolist() == [*(m > m.mean()).tolist(), *[False] * (5 - words)]
    assert raters(x, text[:, :1].expand(-1, 5, -1), None, None).any(1).all()  # words all alike


@quick
@given(seed=seeds, n=st.integers(4, 24), k=st.integers(1, 4))
def test_density_peaks_are_those_of_dpc_knn(seed: int, n: int, k: int) -> None:
    x = rand(1, n, 5, seed=seed)
    centres, labels = select.dpc_knn(x, k, neighbours=k)
    padded = torch.cat([x, rand(1, 3, 5, seed=seed + 1)], 1)
    got = density_peaks(padded, torch.tensor([k]), torch.arange(n + 3)[None] < n)
    assert got[0, :n].tolist() == centres[0][labels[0]].tolist()


def test_recycling_keeps_the_sum_of_what_it_clusters() -> None:
    x, scores, keep = rand(2, 40, 6), rand(2, 40, seed=1), torch.arange(40) < torch.tensor([[8], [12]])
    valid = torch.arange(40) < torch.tensor([[40], [30]])
    joined = recycle(x, scores, keep, valid, tau=0.3, theta=0.1)
    slot, y = joined.slots(40), joined(x)
    for i, (first, n) in enumerate(((8, 40), (12, 30))):
        chosen = int(0.3 * (n - first)) + 1
        best = scores[i, first:n].topk(chosen).indices + first
        assert {*(slot[i] >= 0).nonzero().flatten().tolist()} == {*range(first), *best.tolist()}
        groups = {s.item() for s in slot[i, best]}
        assert len(groups) == int(0.1 * chosen) + 1 and groups.isdisjoint(slot[i, :first].tolist())
        total = sum(y[i, s] * (slot[i] == s).sum() for s in groups)
        torch.testing.assert_close(total, x[i, best].sum(0))
        torch.testing.assert_close(y[i, slot[i, :first]], x[i, :first])


def test_recycled_tokens_come_on_top(model, prompt) -> None:
    with_, without = (run(SparseVLM(keep=(18, 9, 4), tau=tau), model, prompt)[0].counts() for tau in (0.3, 0.0))
    assert without[0].tolist() == [36, 18, 9, 9, 4, 4, 4, 4]
    # 18 dropped: 6 recycled into 1; of the 19 then present 10: 4 into 1; of 10 6: 2 into 1
    assert with_[0].tolist() == [36, 19, 10, 10, 5, 5, 5, 5]


def test_the_rank_of_the_raters_attention_says_what_is_redundant(model, prompt) -> None:
    trace, _ = run(SparseVLM(rank=1.0, tau=0.0), model, prompt)
    assert all(1 <= len(row) <= 6 for step in kept(trace) for row in step)  # as many words as the question has, at most
    trace, _ = run(SparseVLM(rank=0.0), model, prompt)
    assert trace.kept == []


# --- TransPrune -------------------------------------------------------------------------------------------------------


def test_a_block_that_changes_nothing_moves_all_tokens_alike() -> None:
    x, real = rand(2, 9, 8), torch.arange(9) >= torch.tensor([[0], [3]])
    got = transition(x, x, real)
    torch.testing.assert_close(got, real / real.sum(1, keepdim=True).float())


def test_transition_is_the_formula_and_ignores_padding() -> None:
    x, y, real = rand(2, 9, 8), rand(2, 9, 8, seed=1), torch.arange(9) >= torch.tensor([[0], [3]])
    got = transition(x, y, real)
    for i, start in ((0, 0), (1, 3)):
        u, o = x[i, start:], y[i, start:]
        turn = torch.stack([1 - (a @ b) / (a.norm() * b.norm()) for a, b in zip(u, o, strict=True)]).softmax(0)
        torch.testing.assert_close(got[i, start:], turn * o.norm(dim=1) / u.norm(dim=1))
    torch.testing.assert_close(transition(x, 3 * y, real), 3 * got)


def test_transition_adds_up_over_the_layers_and_travels_with_the_tokens(model, prompt) -> None:
    blocks: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}

    def note(key):
        def hook(module, args, kwargs, output):
            given = args[0] if args else kwargs["hidden_states"]
            blocks[key] = given, output[0] if isinstance(output, tuple) else output

        return hook

    method = TransPrune(keep=(20, 10, 5), layers=(2, 4, 5), guidance=0.0)
    hooks = [
        getattr(layer, name).register_forward_hook(note((i, name)), with_kwargs=True)
        for i, layer in enumerate(model.model.language_model.layers)
        for name in ("self_attn", "mlp")
    ]
    trace, _ = run(method, model, prompt)
    for hook in hooks:
        hook.remove()
    alive = torch.arange(2, 2 + PATCHES).expand(2, -1)
    total, cuts = torch.zeros(2, PATCHES), iter(trace.kept)
    for layer in range(1, 5):
        for name in ("self_attn", "mlp"):
            moved = transition(*blocks[layer, name], torch.ones(blocks[layer, name][0].shape[:2], dtype=torch.bool))
            total = total.scatter_add(1, alive - 2, moved[:, 2 : 2 + alive.shape[1]])
        if layer + 1 in (2, 4, 5):
            now = next(cuts)
            score = torch.full_like(total, -1.0).scatter(1, alive - 2, total.gather(1, alive - 2))
            assert now.tolist() == score.topk(now.shape[1]).indices.sort(1).values.tolist()
            alive = now + 2


# --- CoreMatching -----------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, n=st.integers(2, 40))
def test_the_knee_is_the_point_farthest_from_the_chord(seed: int, n: int) -> None:
    scores = (rand(1, n, seed=seed).exp() * 10).round()
    padded = torch.cat([scores, torch.full((1, 4), float("-inf"))], 1)
    curve = scores[0].sort(descending=True).values.double()
    ends = torch.tensor([n - 1.0, (curve[-1] - curve[0]).item()]).double()
    points = torch.stack([torch.arange(n).double(), curve - curve[0]], 1)
    away = (points[:, 0] * ends[1] - points[:, 1] * ends[0]).abs() / ends.norm()
    got = Knee().counts(padded)
    if away.max() < 1e-6:
        assert got.item() == n
    else:
        tied = [i for i in range(n) if away[i] > away.max() - 1e-4]
        assert got.item() in {max(1, int((curve > curve[i]).sum())) for i in tied}
    assert 1 <= got.item() <= n


def test_coactivation_counts_shared_neurons() -> None:
    active = rand(2, 12, 30)
    t = SimpleNamespace(
        taps={(3, "mlp.down_proj"): (active, None)},
        layer=4,
        last=torch.tensor([11, 10]),
        visual=lambda x: x[:, 2:8],
    )
    got = CoreMatching().score(t)
    for i, last in enumerate((11, 10)):
        gamma = [{*row.nonzero().flatten().tolist()} for row in (active[i] > 0)]
        assert got[i].tolist() == [len(gamma[j] & gamma[last]) for j in range(2, 8)]


# --- FiCoCo -----------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, n=st.integers(3, 30), epsilon=st.sampled_from((0.5, 0.9, 0.998)))
def test_compress_is_the_formula(seed: int, n: int, epsilon: float) -> None:
    c, x, size = rand(1, n, n, seed=seed), rand(1, n, 4, seed=seed + 1), rand(1, n, seed=seed + 2).exp()
    keep = flags(1, n, seed=seed + 3)
    keep[0, 0], keep[0, 1] = True, False
    joined = compress(c, keep, torch.tensor([n]), size, epsilon)
    stays = keep[0].nonzero().flatten().tolist()
    above = max(1, min(len(stays), n - 1 - int(epsilon * (n - 1) + 1e-6)))
    total, mass = {j: size[0, j] * x[0, j] for j in stays}, {j: size[0, j].clone() for j in stays}
    for i in (~keep[0]).nonzero().flatten().tolist():
        targets = sorted(stays, key=lambda j: -c[0, i, j].item())[:above]
        for j, w in zip(targets, c[0, i, targets].softmax(0), strict=True):
            total[j] = total[j] + w * size[0, i] * x[0, i]
            mass[j] = mass[j] + w * size[0, i]
    torch.testing.assert_close(joined(x)[0], torch.stack([total[j] / mass[j] for j in stays]))
    torch.testing.assert_close(joined.sizes()[0], torch.stack([mass[j] for j in stays]))
    # nothing is lost: sizes add up, and so do the tokens they weigh
    torch.testing.assert_close(joined.sizes().sum(), size.sum())
    torch.testing.assert_close((joined(x) * joined.sizes()[..., None]).sum(1), (x * size[..., None]).sum(1))


def test_compress_of_a_batch_is_that_of_its_samples() -> None:
    n, valid = torch.tensor([20, 13]), torch.arange(20) < torch.tensor([[20], [13]])
    c, x, size = rand(2, 20, 20), rand(2, 20, 4, seed=1), rand(2, 20, seed=2).exp()
    keep = flags(2, 20, seed=3) & valid
    both = compress(c, keep, n, size, 0.8, valid)
    for i, k in enumerate((20, 13)):
        one = compress(c[i : i + 1, :k, :k], keep[i : i + 1, :k], n[i : i + 1], size[i : i + 1, :k], 0.8)
        assert both.rep[i, : one.m].tolist() == one.rep[0].tolist()
        torch.testing.assert_close(both(x)[i, : one.m], one(x[i : i + 1, :k])[0])


def test_ficoco_loses_evenly_and_no_token_for_good(model, prompt) -> None:
    trace, _ = run(FiCoCo(keep=0.25, layer=2), model, prompt)
    assert trace.counts()[0].tolist() == [36, 36, 32, 27, 23, 18, 14, 9]
    assert all((slot >= 0).all() for slot in trace.assignments)


# --- MustDrop ---------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, window=st.integers(2, 4), similarity=st.floats(-0.3, 0.6))
def test_windows_that_are_alike_become_one(seed: int, window: int, similarity: float) -> None:
    rows, cols = 5, 7
    place = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(rows), torch.arange(cols), indexing="ij"), -1)
    place = torch.cat([place.flatten(0, 2), torch.tensor([[-1, -1, -1]])])[None]
    n = place.shape[1]
    x, weight = rand(1, n, 3, seed=seed) + 0.7, rand(1, n, seed=seed + 1)
    got = merge_windows(x, place, weight, None, window, similarity)[0].tolist()
    groups: dict[tuple, list[int]] = {}
    for i, (view, row, col) in enumerate(place[0, :-1].tolist()):
        groups.setdefault((view, row // window, col // window), []).append(i)
    want = list(range(n))
    for members in groups.values():
        u = unit(x[0, members])
        pairs = (u @ u.T)[~torch.eye(len(members), dtype=torch.bool)]
        if len(members) > 1 and pairs.mean() >= similarity:
            for i in members:
                want[i] = max(members, key=lambda j: weight[0, j].item())
    assert got == want


def filter_inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = rand(1, 5, 12, seed=seed).softmax(-1)  # b t v
    return rows, rows.sum(1)


@quick
@given(seed=seeds, thr=st.floats(0.01, 0.3), ratio=st.floats(0.3, 3.0))
def test_one_threshold_is_the_filter_of_both_attentions(seed: int, thr: float, ratio: float) -> None:
    rows, total = filter_inputs(seed)
    step = SimpleNamespace(
        attention=SimpleNamespace(rows=lambda index: rows[:, None]),
        columns=lambda x: x,
        text_slot=None,
        text_valid=None,
        valid=None,
    )
    score = MustDrop(ratio=ratio).score(step)
    dropped = (total < thr * total.sum()) & (rows.amax(1) < thr * ratio)
    near = ((total / total.sum() - thr).abs() < 1e-6) | ((rows.amax(1) / ratio - thr).abs() < 1e-6)
    assert (((score < thr) == dropped) | near).all()


def test_the_key_set_outlives_every_stage(model, prompt) -> None:
    trace, _ = run(MustDrop(keep=(0.3, 0.2, 0.1, 0.05), key=0.2, window=1), model, prompt)
    bare, _ = run(MustDrop(keep=(0.3, 0.2, 0.1, 0.05), key=0.0, window=1), model, prompt)
    steps = kept(trace)
    for before, after in pairwise(steps):
        assert all(a <= b for a, b in zip(after, before, strict=True))
    # ceil(0.2 * 36) = 8 tokens are in the key set: more than the last stage leaves to attention
    assert all(len(row) == 1 for row in kept(bare)[-1]) and all(8 <= len(row) <= 9 for row in steps[-1])


def test_thresholds_of_nothing_drop_nothing(model, prompt) -> None:
    with torch.no_grad():
        dense = model(**prompt).logits
    trace, output = run(MustDrop(keep=Budget(threshold=0.0), window=1), model, prompt)
    assert trace.counts().min() == PATCHES
    torch.testing.assert_close(output.logits, dense)


def test_after_the_prompt_all_layers_cache_the_final_set(model, prompt) -> None:
    trace, output = run(MustDrop(keep=6), model, prompt)
    left = trace.counts()[:, -1]
    lengths = [layer.n for layer in output.past_key_values.layers]
    assert lengths == [int(left.max()) + prompt["input_ids"].shape[1] - PATCHES] * DEPTH


# --- BTP --------------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, count=st.integers(4, 15))
def test_what_is_missing_is_far_from_all_that_is_chosen(seed: int, count: int) -> None:
    x, chosen = rand(1, 15, 6, seed=seed), torch.zeros(1, 15, dtype=torch.bool)
    chosen[0, [1, 4, 11]] = True
    got = top_up(
        torch.cat([x, x[:, :2]], 1),
        torch.cat([chosen, chosen[:, 2:4]], 1),
        torch.tensor([count]),
        torch.arange(17)[None] < 15,
    )
    want, gap = [1, 4, 11], 1 - unit(x[0]) @ unit(x[0]).T
    while len(want) < count:
        want.append(max(set(range(15)) - {*want}, key=lambda j: gap[j, want].min().item()))
    assert got[0].nonzero().flatten().tolist() == sorted(want)


def test_where_no_part_has_a_token_the_most_isolated_one_is_the_first() -> None:
    """At 1 of 9 tokens, 0.9 of them are none."""
    x = rand(2, 9, 4)
    x[:, 1:] = 0.01 * x[:, 1:] + x[:, :1]
    x[0, 5], x[1, 7] = -x[0, 0], -x[1, 0]
    got = top_up(x, torch.zeros(2, 9, dtype=torch.bool), torch.tensor([1, 2]), None)
    assert got.sum(1).tolist() == [1, 2] and got[0, 5] and got[1, 7]
    some = torch.zeros(2, 9, dtype=torch.bool)
    some[1, 3] = True
    got = top_up(x, some, torch.tensor([1, 2]), torch.arange(9) < torch.tensor([[9], [8]]))
    assert got[0].nonzero().flatten().tolist() == [5] and got[1].nonzero().flatten().tolist() == [3, 7]


def test_btp_of_diversity_alone_is_farthest_points(model, prompt) -> None:
    method = BTP(attention=(0.0, 0.0, 0.0), diversity=(0.0, 0.0, 0.0), spatial=0.0, keep=(6, 4, 2), layers=(1, 2, 3, 5))
    same = BTP(attention=(0.0, 0.0, 0.0), diversity=(1.0, 1.0, 1.0), spatial=0.0, keep=(6, 4, 2), layers=(1, 2, 3, 5))
    assert kept(run(method, model, prompt)[0]) == kept(run(same, model, prompt)[0])


@quick
@given(seed=seeds, want=st.integers(1, 8), extra=st.floats(1.0, 2.5), early=st.integers(0, 20))
def test_early_candidates_come_first(seed: int, want: int, extra: float, early: int) -> None:
    scores = rand(1, 20, seed=seed)
    candidates = scores[0].argsort(descending=True)[: int(extra * want + 1e-6)].tolist()
    order = [j for j in candidates if j < early] + [j for j in candidates if j >= early]
    got = rebalance(scores, torch.tensor([want]), extra, torch.tensor([early]))
    assert got[0].nonzero().flatten().tolist() == sorted(order[:want])


def test_distances_on_the_grid() -> None:
    place = torch.tensor([[[0, 0, 0, 0], [0, 0, 2, 3], [0, 1, 0, 0], [1, 0, 0, 1]]])
    gap = manhattan(place)[0]
    assert gap[0, 1] == 5 and gap[0, 0] == 0
    assert gap[0, 2] > 5 and gap[0, 3] > 5 and gap[2, 3] > 5


def test_btp_cuts_exactly_and_leaves_no_visual_token(model, prompt) -> None:
    trace, _ = run(BTP(), model, prompt)
    assert trace.counts()[0].tolist() == [36, 18, 9, 3, 3, 0, 0, 0]
    trace, _ = run(BTP(leave=False, keep=4), model, prompt)
    assert trace.counts()[0, -1] == 4


def test_the_first_cut_covers_the_grid_whatever_the_image_shows(model, prompt) -> None:
    method = BTP(attention=(0.0, 0.9, 1.0), diversity=(0.0, 0.1, 0.0), spatial=1.0)
    a, b = (
        kept(run(method, model, prompt | {"pixel_values": x})[0])[0]
        for x in (prompt["pixel_values"], rand(2, 3, 48, 48))
    )
    assert a == b and a[0] == a[1] and len(a[0]) == 18 and 0 in a[0]
    # every token of the grid of 6 x 6 has a chosen one beside it
    assert all(min(abs(i // 6 - j // 6) + abs(i % 6 - j % 6) for j in a[0]) <= 1 for i in range(36))


# --- Attention Debiasing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [FastV(), SparseVLM(), BTP(), MustDrop(key=0.3, window=1)], ids=lambda base: base.name)
def test_a_slope_of_zero_is_the_base(base, model, prompt) -> None:
    plain, wrapped = (run(method, model, prompt)[0] for method in (base, AttentionDebiasing(base=base)))
    assert kept(plain) == kept(wrapped)


def letterboxed(width: int, height: int, side: int, seed: int = 0) -> torch.Tensor:
    """A picture [3, side, side] that was padded to a square in one colour, then resized."""
    picture = torch.full((3, side, side), -0.3)
    w, h = (2 * round(side / 2 * min(1, ratio)) for ratio in (width / height, height / width))
    x, y = (side - w) // 2, (side - h) // 2
    picture[:, y : y + h, x : x + w] = rand(3, h, w, seed=seed)
    return picture


@settings(max_examples=60, deadline=None)
@given(seed=seeds, long=st.integers(1, 6), short=st.integers(1, 6), wide=st.booleans())
def test_bars_are_what_a_square_was_padded_with(seed: int, long: int, short: int, wide: bool) -> None:
    size = sorted((long, short), reverse=wide)
    found = bars(letterboxed(*size, 24, seed)[None])[0]
    w, h = (2 * round(12 * min(1, a / b)) for a, b in (size, size[::-1]))
    rows, cols = (abs(2 * torch.arange(24) - 23) > x for x in (h, w))
    assert torch.equal(found, rows[:, None] | cols)


def test_a_picture_of_one_colour_has_no_bars() -> None:
    flat, half = torch.ones(1, 3, 8, 8), torch.cat([torch.ones(1, 3, 8, 4), rand(1, 3, 8, 4)], 3)
    assert not bars(flat).any()
    assert bars(half)[0].sum() == 32 and bars(half)[0, :, :4].all()


@pytest.mark.parametrize(("padding", "rows"), [(0.5, (1, 2, 3, 4)), (0.3, (2, 3))])
def test_padding_is_never_kept_and_the_budget_shrinks_to_the_rest(model, prompt, padding: float, rows) -> None:
    # 48 pixels, patches of 8: bars of 12 cover row 0 of the grid, and half of row 1
    pictures = torch.stack([letterboxed(2, 1, 48), prompt["pixel_values"][1]])
    inputs = prompt | {"pixel_values": pictures}
    shown = {6 * row + col for row in rows for col in range(6)}
    scores = run(FastV(), model, inputs)[0].scores[0]
    for base in (FastV(), SparseVLM(tau=0.0, keep=0.1)):
        wide, few = (run(AttentionDebiasing(base=base, padding=padding, keep=k), model, inputs)[0] for k in (0.95, 3))
        assert kept(wide)[-1][0] <= shown and kept(few)[-1][0] <= shown
        assert len(kept(wide)[0][0]) == len(shown) and len(kept(few)[-1][0]) == 3
        bare = run(type(base)(**(base.params() | {"keep": 0.95})), model, inputs)[0]
        assert kept(wide)[0][1] == kept(bare)[0][1]  # a picture without padding
    few = run(AttentionDebiasing(padding=padding, keep=3), model, inputs)[0]
    best = sorted(shown, key=lambda i: -scores[0, i].item())[:3]
    assert kept(few)[0][0] == set(best)
    plain = kept(run(FastV(keep=3), model, inputs)[0])[0]
    assert kept(few)[0][1] == plain[1] and not plain[0] <= shown  # FastV alone does keep some


def test_padding_loses_to_attention_that_is_exactly_zero() -> None:
    t = SimpleNamespace(valid=None, n=4, count=torch.tensor([4]))
    base = FastV()
    method = AttentionDebiasing(base=base, padding=0.5)
    object.__setattr__(method.base, "score", lambda t: torch.tensor([[0.4, 0.0, 0.6, 0.0]]))
    object.__setattr__(method, "_padded", lambda t: torch.tensor([[True, True, False, False]]))
    score = method.score(t)
    assert score[0].argsort(descending=True).tolist()[:2] == [2, 3] and score[0, :2].max() < 0 < 1e-30 - score[0].min()


def test_padding_is_refused_where_it_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="inside the language model"):
        AttentionDebiasing(base=FasterVLM(), padding=0.5)
    with pytest.raises(ValueError, match=r"padding must be a number in \[0, 1\]; got 2"):
        AttentionDebiasing(padding=2)


@pytest.mark.parametrize("checkpoint", ["llava", "llava-siglip", "llava_next", "internvl"])
def test_padding_is_found_in_every_view_and_for_every_beam(checkpoint: str, tmp_path) -> None:
    model, batch = Models(tmp_path)(checkpoint), inputs(checkpoint, (((2, 1.5),), ((1, 1.5), (1, 1))), (12, 16))
    half = batch["pixel_values"].shape[-2] // 2
    batch["pixel_values"][..., :half, :] = 0.1  # of every tile
    with torch.no_grad(), AttentionDebiasing(padding=0.5, keep=0.99)(model) as trace:
        model.generate(**batch, max_new_tokens=1, num_beams=2, do_sample=False, pad_token_id=0)
    row, number = trace.places[..., 2], torch.arange(trace.places.shape[1])
    shown = ((row < 0) | (row >= trace.grid[0] // 2)) & (number < trace.total[:, None])  # line ends are no padding
    assert len(row) == 4 and torch.equal(trace.mask(), shown)


def test_padding_is_refused_where_pictures_keep_their_shape(tmp_path) -> None:
    with (
        pytest.raises(ValueError, match="no meaning on qwen2_5_vl"),
        AttentionDebiasing(padding=0.5)(Models(tmp_path)("qwen2_5_vl")),
    ):
        pass
