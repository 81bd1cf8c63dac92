"""What every registered ViT method must pass, on every architecture it lists. Nothing here is written for one method.

Methods come from the registry; a new one is judged as soon as it is registered. The only tables below say what cannot
be read off a method: further settings worth running, and counts that the papers state differently from int(keep^i n).
"""

import ast
import math
from contextlib import nullcontext
from dataclasses import dataclass, fields

import pytest
import torch
from transformers import BertConfig, BertModel

import keeprate as kr
from keeprate import Budget, score, select
from keeprate.anatomy import anatomy
from keeprate.method import Method

from .checkpoints import CHECKPOINTS, DEPTH, GRID, PATCH, pixels

N = GRID[0] * GRID[1]
TABLE = kr.methods("vit").set_index("name")
METHODS = list(TABLE.index)

# settings beyond keep=0.6 that take another path through a method
VARIANTS = [
    ("ToMe", {"r": 9}),
    ("ToMe", {"r": (9, -1)}),
    ("ToMe", {"keep": 0.3, "metric": "features", "proportional": False}),
    ("TopK", {"keep": Budget(coverage=0.8)}),
    ("TopK", {"keep": (30, 20, 0.2)}),
    ("EViT", {"fuse": False}),
    ("ATC", {"linkage": "single", "proportional": False}),
    ("ATC", {"linkage": "complete", "layers": (1, 2, 3, 4)}),
    ("ATS", {"per_head": True, "ascending": False, "minimum": 3, "keep": 0.4}),
    ("KMedoids", {"weighted": False}),
    ("TokenPooling", {"weighted": False}),
    ("PiToMe", {"keep": 0.3, "layers": (2, 3)}),
    ("BAT", {"diversity": 0.5}),
    ("ZeroTPrune", {"similar": 0, "emphasise_cls": False}),
    ("Radial", {"norm": 1.0}),
]
# settings that ask for no reduction at all, beyond keep=1
IDENTITIES = {"ToMe": [{"r": 0}, {"r": (0, -1)}]}
STOCHASTIC = {"Random"}  # what the seed may change
BLIND = {"Random", "Radial"}  # methods that never look at the image: precision cannot change what they keep
# Share of the kept tokens on which bf16 must agree with fp32; 0.9 for the others. ATS samples, so a small change of
# one score moves every later ordinate; PiToMe gives tokens their roles alternately by rank, so one swap exchanges two;
# BAT clusters a few tokens around density peaks.
AGREEMENT = {"ATS": 0.75, "PiToMe": 0.85, "BAT": 0.85}


def bounds(method: Method, stage: int, before: int) -> tuple[int, int]:
    """(least, most) tokens that may be left by reduction `stage` of `before` tokens, as each paper states it."""
    keep = getattr(method, "keep", None)
    if method.name == "ToMe" and keep is None:
        r = (
            method.r
            if isinstance(method.r, int)
            else [2 * method.r[0], 4 * method.r[0] / 3, 2 * method.r[0] / 3, 0][stage - 1]
        )
        exact = before - min(int(r), before // 2)
    elif isinstance(keep, Budget) and keep.ragged:
        return 1, before
    elif method.name == "ATS":
        return 1, max(int(keep**stage * N + 1e-9), method.minimum)
    elif method.name == "EViT":
        k = math.ceil(keep * before - 1e-9)
        exact = before if k >= before else k + method.fuse
    elif method.name == "PiToMe":
        exact = before - int(before * (1 - keep) + 1e-9)
    elif isinstance(keep, tuple):
        exact = keep[stage - 1] if isinstance(keep[stage - 1], int) else int(keep[stage - 1] * N)
    else:
        exact = max(1, int(keep**stage * N + 1e-9))
    return min(exact, before), min(exact, before)


@dataclass(frozen=True)
class Case:
    """One method, in one setting, on one checkpoint."""

    method: Method
    checkpoint: str

    @property
    def id(self) -> str:
        return f"{self.method!r}-{self.checkpoint}"


def checkpoints_of(name: str) -> list[str]:
    listed = TABLE.loc[name, "architectures"].split(", ")
    return [c for c, row in CHECKPOINTS.items() if row[0] in listed]


PLAIN = [Case(kr.method(name, keep=0.6), c) for name in METHODS for c in checkpoints_of(name)]
CASES = PLAIN + [
    Case(kr.method(name, **params), c)
    for name, params in VARIANTS
    for c in ("deit", "siglip", "dinov2_with_registers")
    if c in checkpoints_of(name)
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
plain_case = pytest.mark.parametrize("case", PLAIN, ids=lambda c: c.id)
every_method = pytest.mark.parametrize("name", METHODS)


def close(found: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to rounding, relative to the largest entry."""
    error = (found - want).abs().max().item()
    assert error <= tolerance * max(1.0, want.abs().max().item()), error


def rows(kept: torch.Tensor) -> list[list[int]]:
    """Kept patches of every sample without padding and summaries."""
    return [[i for i in row if i >= 0] for row in kept.tolist()]


@torch.no_grad()
def run(method, model, x, **options):
    """(logits, trace) of one forward pass."""
    with method(model, **options) as trace:
        logits = model(x).logits
    return logits, trace


class Bench:
    """Results that several tests look at, computed once."""

    def __init__(self, zoo):
        self.zoo, self.x, self.held = zoo, pixels(3), {}

    def once(self, key, compute):
        if key not in self.held:
            self.held[key] = compute()
        return self.held[key]

    @torch.no_grad()
    def _logits(self, model, dtype):
        assert not model.training, "what all tests compare with must not depend on which of them comes first"
        return model(self.x.to(dtype)).logits

    def dense(self, checkpoint: str, dtype=torch.float32, attention="sdpa"):
        key = ("dense", checkpoint, dtype, attention)
        return self.once(key, lambda: self._logits(self.zoo(checkpoint, dtype, attention), dtype))

    def run(self, case: Case):
        return self.once(case, lambda: run(case.method, self.zoo(case.checkpoint), self.x))


@pytest.fixture(scope="module")
def bench(zoo):
    return Bench(zoo)


def state(model) -> dict:
    """Everything that a method could leave behind in a model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "attention": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "hooks": [len(getattr(m, h)) for m in model.modules() for h in hooks],
        "training": [m.training for m in model.modules()],
        "gradients": [p.requires_grad for p in model.parameters()],
    }


def assert_untouched(model, before: dict, x, logits) -> None:
    after = state(model)
    weights = after.pop("weights")
    assert after == {k: v for k, v in before.items() if k != "weights"}
    assert weights.keys() == before["weights"].keys()
    assert all(torch.equal(v, before["weights"][k]) for k, v in weights.items())
    with torch.no_grad():
        assert torch.equal(model(x).logits, logits)


# --- the suite covers what the table promises -------------------------------------------------------------------------


def test_every_listed_architecture_has_a_checkpoint():
    listed = {a for row in TABLE["architectures"] for a in row.split(", ")}
    assert listed == {row[0] for row in CHECKPOINTS.values()}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_checkpoints_are_what_they_claim(bench, checkpoint):
    body = anatomy(bench.zoo(checkpoint))
    assert body.name == CHECKPOINTS[checkpoint][0]
    assert body.depth == DEPTH and body.grid == GRID
    dense = bench.dense(checkpoint)
    assert dense.isfinite().all() and dense.std(0).mean() > 0.1  # samples differ: there is something to lose


# --- 1: no reduction is bit-identical ---------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_keeping_everything_is_bit_identical(bench, name, checkpoint):
    if checkpoint not in checkpoints_of(name):
        pytest.skip(f"{name} does not list {checkpoint}")
    for params in [{"keep": 1.0}, *IDENTITIES.get(name, [])]:
        method = kr.method(name, **params)
        for dtype, attention in ((torch.float32, "sdpa"), (torch.bfloat16, "sdpa"), (torch.float32, "eager")):
            model = bench.zoo(checkpoint, dtype, attention)
            logits, trace = run(method, model, bench.x.to(dtype))
            assert torch.equal(logits, bench.dense(checkpoint, dtype, attention)), (method, dtype, attention)
            assert all(rows(kept) == [list(range(N))] * 3 for kept in trace.kept)
        logits, _ = run(method, bench.zoo(checkpoint), bench.x, masked=True)
        assert torch.equal(logits, bench.dense(checkpoint)), (method, "masked")


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_keeping_everything_is_bit_identical_in_training(bench, checkpoint):
    """Dropout, drop path and LayerScale run in the same order, with the same random numbers; gradients are equal."""
    dense = bench.dense(checkpoint)
    model = bench.zoo(checkpoint).train()

    def step():
        torch.manual_seed(0)
        model.zero_grad()
        loss = model(bench.x, labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        return loss.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    try:
        loss, gradients = step()
        assert not torch.equal(loss, torch.nn.functional.cross_entropy(dense, torch.tensor([0, 1, 2])))
        for name in METHODS:
            if checkpoint in checkpoints_of(name):
                with kr.method(name, keep=1.0)(model):
                    again, same = step()
                assert torch.equal(again, loss), name
                for a, b in zip(same, gradients, strict=True):
                    assert (a is None and b is None) or torch.equal(a, b), name
    finally:
        model.zero_grad()
        model.eval()


# --- 2: the model is as before ----------------------------------------------------------------------------------------


@plain_case
def test_the_model_is_as_before(bench, case):
    model, x, dense = bench.zoo(case.checkpoint), bench.x, bench.dense(case.checkpoint)
    before = state(model)
    with case.method(model) as trace, torch.no_grad():
        model(x)
    assert trace.steps
    assert_untouched(model, before, x, dense)
    with pytest.raises(KeyError, match="mine"), case.method(model), torch.no_grad():
        model(x)
        raise KeyError("mine")
    assert_untouched(model, before, x, dense)
    nan = x.clone()
    nan[1, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"NaN.*\[1\]"), case.method(model), torch.no_grad():
        model(nan)
    assert_untouched(model, before, x, dense)
    # and it works again at once
    logits, _ = run(case.method, model, x)
    assert torch.equal(logits, bench.run(case)[0])


def test_an_exception_inside_a_block_leaves_the_model_as_before(bench):
    model = bench.zoo("dinov2")
    before = state(model)

    def fail(*_):
        raise KeyError("inside the third block")

    for method in (kr.vit.TopK(keep=0.5), kr.vit.ToMe(r=4)):
        handle = anatomy(model).layers[2].mlp.register_forward_hook(fail)
        with pytest.raises(KeyError, match="third block"), method(model), torch.no_grad():
            model(bench.x)
        handle.remove()
        assert_untouched(model, before, bench.x, bench.dense("dinov2"))


# --- 3, 4, 8: what is kept --------------------------------------------------------------------------------------------


@every_case
def test_kept_tokens_are_sorted_unique_nested_and_counted(bench, case):
    logits, trace = bench.run(case)
    assert logits.isfinite().all()
    assert not torch.equal(logits, bench.dense(case.checkpoint)), "nothing was reduced"
    assert trace.layers == sorted(set(trace.layers)) and len(trace.layers) == len(trace.kept) > 0
    present = [set(range(N))] * 3
    before = [N] * 3
    for stage, step in enumerate(trace.steps, 1):
        kept, count = rows(step.kept), (step.size > 0).sum(1).tolist()
        for i, own in enumerate(kept):
            assert own == sorted(set(own)), "sorted and unique"
            assert set(own) <= present[i], "a token that was gone came back"
            low, high = bounds(case.method, stage, before[i])
            assert low <= count[i] <= high, (stage, before[i], count[i], low, high)
            # a fused token stands for no patch; one of an earlier reduction may be kept
            assert 0 <= count[i] - len(own) <= (stage if getattr(case.method, "fuse", False) else 0)
        present, before = [set(own) for own in kept], count
    assert trace.counts()[:, -1].tolist() == before


@every_case
def test_sizes_follow_assignments_and_mergers_lose_nothing(bench, case):
    _, trace = bench.run(case)
    kind = TABLE.loc[case.method.name, "kind"]
    for step in trace.steps:
        m = step.kept.shape[1]
        assert step.assignment.shape == (3, N) and step.assignment.min() >= -1 and step.assignment.max() < m
        for i in range(3):
            members = step.assignment[i][step.assignment[i] >= 0]
            assert torch.equal(torch.bincount(members, minlength=m), step.size[i]), "sizes are the members' count"
            for slot, patch in enumerate(step.kept[i].tolist()):
                assert patch < 0 or step.assignment[i, patch] == slot, "a kept patch stands for itself"
        if kind == "merging" or getattr(case.method, "fuse", False):
            assert (step.size.sum(1) == N).all(), "sum(size) = n"
        elif kind in ("pruning", "baseline"):
            assert ((step.size == 1) == (step.kept >= 0)).all(), "dropping merges nothing"
        if step.score is not None:
            assert step.score.shape == (3, N)
            assert (step.score.isnan() | (step.score >= 0) | (TABLE.loc[case.method.name, "kind"] == "baseline")).all()


@every_case
@torch.no_grad()
def test_prefix_tokens_survive_unchanged(bench, case):
    """Up to and including the first reduction the class, distillation and register tokens equal the dense model's."""
    model = bench.zoo(case.checkpoint)
    body = anatomy(model)

    def inputs_of_norms(context):
        seen = []
        handles = [
            getattr(layer, name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            for layer in body.layers
            for name in (body.block.norm1, body.block.norm2)
        ]
        with context:
            model(bench.x)
        for handle in handles:
            handle.remove()
        return seen

    dense = bench.once(("norms", case.checkpoint), lambda: inputs_of_norms(nullcontext()))
    reduced = inputs_of_norms(case.method(model))
    assert len(dense) == len(reduced) == 2 * DEPTH
    _, trace = bench.run(case)
    first = next((i for i, (a, b) in enumerate(zip(dense, reduced, strict=True)) if a.shape != b.shape), None)
    assert first is not None, "nothing was reduced before the last MLP"
    for a, b in zip(dense[:first], reduced[:first], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(reduced[first][:, : body.prefix], dense[first][:, : body.prefix])
    assert reduced[-1].shape[1] == body.prefix + trace.kept[-1].shape[1], "the sequence is shorter for real"


@plain_case
@torch.no_grad()
def test_hidden_states_can_be_asked_for(bench, case):
    model = bench.zoo(case.checkpoint)
    with case.method(model) as trace:
        output = model(bench.x, output_hidden_states=True)
    prefix = anatomy(model).prefix
    assert torch.equal(output.logits, bench.run(case)[0])
    assert len(output.hidden_states) == DEPTH + 1
    lengths = [h.shape[1] - prefix for h in output.hidden_states]
    assert lengths == [N, *trace.counts().max(0).values.tolist()]


# --- 5, 6: reproducible, and one sample is none of another's business -------------------------------------------------


@every_case
def test_same_seed_same_result(bench, case):
    model = bench.zoo(case.checkpoint)
    logits, trace = bench.run(case)
    torch.manual_seed(123)  # the global generator must not matter
    again, retrace = run(case.method, model, bench.x)
    assert torch.equal(again, logits)
    assert all(torch.equal(a, b) for a, b in zip(trace.kept, retrace.kept, strict=True))
    other, _ = run(case.method, model, bench.x, seed=1)
    assert torch.equal(other, logits) == (case.method.name not in STOCHASTIC)


@every_case
def test_samples_do_not_see_each_other(bench, case):
    logits, trace = bench.run(case)
    x = bench.x.clone()
    x[1] = 3 * pixels(1, seed=9)[0]
    other, retrace = run(case.method, bench.zoo(case.checkpoint), x)
    assert not torch.equal(other[1], logits[1])
    close(other[[0, 2]], logits[[0, 2]])
    for a, b in zip(trace.kept, retrace.kept, strict=True):
        assert [rows(a)[i] for i in (0, 2)] == [rows(b)[i] for i in (0, 2)]


@plain_case
def test_batches_join_in_the_trace(bench, case):
    model = bench.zoo(case.checkpoint)
    logits, trace = bench.run(case)
    with case.method(model) as joined, torch.no_grad():
        whole = model(bench.x).logits
        one = model(bench.x[:1]).logits
    assert torch.equal(whole, logits) and one.shape == logits[:1].shape
    assert joined.batches == [3, 1] and joined.counts().shape == (4, DEPTH)
    for a, b in zip(trace.kept, joined.kept, strict=True):
        assert rows(b)[:3] == rows(a)
        if case.method.name not in STOCHASTIC:
            assert rows(b)[3] == rows(a)[0]
    if case.method.name not in STOCHASTIC:
        close(one, logits[:1])


# --- 7: masked equals physical ----------------------------------------------------------------------------------------


@every_case
def test_masked_execution_equals_physical_and_has_gradients(bench, case):
    logits, trace = bench.run(case)
    model, x = bench.zoo(case.checkpoint), bench.x.clone().requires_grad_()
    with case.method(model, masked=True) as masked:
        found = model(x).logits
    close(found.detach(), logits)
    for name in ("kept", "sizes", "assignments"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(trace, name), getattr(masked, name), strict=True)), name
    found.square().sum().backward()
    model.zero_grad()
    assert x.grad.isfinite().all() and (x.grad.flatten(1).abs().amax(1) > 0).all()


@plain_case
def test_physical_execution_trains_too(bench, case):
    model = bench.zoo(case.checkpoint).train()
    try:
        torch.manual_seed(0)
        with case.method(model) as trace:
            model(bench.x, labels=torch.tensor([0, 1, 2])).loss.backward()
        assert trace.kept[-1].shape[1] < N
        used = [p.grad for layer in anatomy(model).layers for p in layer.parameters() if p.grad is not None]
        assert used and all(g.isfinite().all() for g in used) and any(g.abs().max() > 0 for g in used)
    finally:
        model.zero_grad()
        model.eval()


# --- 9: precision and kernels -----------------------------------------------------------------------------------------


@plain_case
def test_bf16_keeps_what_fp32_keeps(bench, case):
    """The same weights and pixels, both exact in bf16; only activations round. Compared at the first reduction."""
    low = bench.zoo(case.checkpoint, torch.bfloat16)
    high = bench.once(("high", case.checkpoint), lambda: bench.zoo.exact(case.checkpoint))
    x = bench.x.bfloat16()
    logits, trace = run(case.method, low, x)
    _, exact = run(case.method, high, x.float())
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    found, want = rows(trace.kept[0]), rows(exact.kept[0])
    if case.method.name in BLIND:
        assert found == want
    overlap = [len(set(a) & set(b)) / max(len(a), len(b)) for a, b in zip(found, want, strict=True)]
    assert sum(overlap) / len(overlap) >= AGREEMENT.get(case.method.name, 0.9), overlap


@every_case
def test_eager_attention_keeps_the_same(bench, case):
    logits, trace = bench.run(case)
    found, retrace = run(case.method, bench.zoo(case.checkpoint, attention="eager"), bench.x)
    close(found, logits)
    assert all(torch.equal(a, b) for a, b in zip(trace.kept, retrace.kept, strict=True))


# --- other shapes -----------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("shape", [(6, 6), (6, 10), (4, 9)])
def test_other_image_sizes(bench, name, checkpoint, shape):
    if checkpoint not in checkpoints_of(name):
        pytest.skip(f"{name} does not list {checkpoint}")
    model, n = bench.zoo(checkpoint), shape[0] * shape[1]
    x = pixels(2, 5, (shape[0] * PATCH, shape[1] * PATCH))
    options = {} if checkpoint.startswith("dinov2") else {"interpolate_pos_encoding": True}
    dense = bench.once(("size", checkpoint, shape), lambda: model(x, **options).logits.detach())
    with kr.method(name, keep=1.0)(model), torch.no_grad():
        assert torch.equal(model(x, **options).logits, dense)
    with kr.method(name, keep=0.5)(model) as trace, torch.no_grad():
        assert not torch.equal(model(x, **options).logits, dense)
    assert trace.assignments[0].shape == (2, n)
    assert trace.kept[0].max() < n
    assert trace.grid == shape


def test_radial_is_centred_on_an_oblong_image(bench):
    with kr.vit.Radial(keep=0.3)(bench.zoo("dinov2")) as trace, torch.no_grad():
        bench.zoo("dinov2")(pixels(2, 5, (6 * PATCH, 10 * PATCH)))
    want = select.top_k(score.radial((6, 10))[None], 18)
    assert torch.equal(trace.kept[0], want.expand(2, -1))


@every_method
@pytest.mark.parametrize("checkpoint", ["deit", "siglip"])
@pytest.mark.parametrize("keep", [0.99, 0.03])
def test_budgets_at_the_edge(bench, name, checkpoint, keep):
    """One token too many, and hardly a token left; one image; every block from the second."""
    method = kr.method(name, keep=keep, layers=tuple(range(2, DEPTH + 1)))
    model, x = bench.zoo(checkpoint), bench.x[:1]
    logits, trace = run(method, model, x)
    assert logits.isfinite().all() and (trace.sizes[-1].sum(1) >= 1).all()
    masked, _ = run(method, model, x, masked=True)
    close(masked, logits)


@every_method
def test_reduction_in_the_first_block(bench, name):
    """Works, or says why it cannot: a method placed before the first attention may need it."""
    method, model = kr.method(name, keep=0.5, layers=(1,)), bench.zoo("vit")
    try:
        _, trace = run(method, model, bench.x)
    except ValueError as error:
        assert type(method).where == "before" and "layer 2" in str(error)
    else:
        assert trace.layers == [1] and trace.kept[0].shape[1] < N


@every_method
def test_wrapping_a_model_changes_nothing(bench, name):
    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    for checkpoint in ("dinov2", "clip"):
        case = Case(kr.method(name, keep=0.6), checkpoint)
        logits, _ = run(case.method, Wrapped(bench.zoo(checkpoint)), bench.x)
        assert torch.equal(logits, bench.run(case)[0]), checkpoint


@every_method
def test_a_bare_tower_is_a_model_too(bench, name):
    method = kr.method(name, keep=0.5)
    for checkpoint in ("vit", "siglip"):
        tower = anatomy(bench.zoo(checkpoint)).tower
        with method(tower) as trace, torch.no_grad():
            output = tower(bench.x).last_hidden_state
        assert output.shape[1] == anatomy(tower).prefix + trace.kept[-1].shape[1]


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", dict.fromkeys(c.method for c in CASES), ids=repr)
def test_repr_rebuilds_the_method(method):
    names = {**vars(kr.vit), "Budget": Budget, "inf": math.inf}
    again = eval(repr(method), names)
    assert again == method and type(again) is type(method) and hash(again) == hash(method)
    assert kr.method(method.name, **method.params()) == method
    with pytest.raises(AttributeError):
        method.keep = 0.1


# --- 12: bad arguments ------------------------------------------------------------------------------------------------


def refuse(bench, name: str, match: str, *given: str, checkpoint: str = "vit", **params) -> None:
    """The method says no, when it is built or when it meets the model; the message names what was given."""
    model = bench.zoo(checkpoint)
    before = state(model)
    with pytest.raises(ValueError, match=match) as error:
        run(kr.method(name, **params), model, bench.x)
    for text in given:
        assert text in str(error.value), (text, str(error.value))
    assert_untouched(model, before, bench.x, bench.dense(checkpoint))


@every_method
@pytest.mark.parametrize("keep", [0, 0.0, -0.1, 1.5, math.nan, math.inf, "a", True, -3])
def test_keep_outside_zero_to_one_is_refused(bench, name, keep):
    refuse(bench, name, r"keep must lie in \(0, 1\]", repr(keep), keep=keep)


@every_method
@pytest.mark.parametrize("layers", [(), (0,), (5,), (-1, 2), (3, 2), (2, 2), 2, "ab", (1.5,), (2, None)])
def test_layers_that_do_not_exist_are_refused(bench, name, layers):
    refuse(bench, name, rf"layers must be .*1\.\.{DEPTH}", repr(layers), keep=0.5, layers=layers)


def declared() -> list[tuple[str, str, object]]:
    """(method, parameter, nonsense) for every hyper-parameter, by the type of its default."""
    found = []
    for name in METHODS:
        for field in fields(kr.method(name)):
            value = field.default
            if field.name in ("keep", "layers") or isinstance(value, bool):
                continue
            nonsense = ["nonsense", None]
            if isinstance(value, int):
                nonsense += [-1, 1.5]
            elif isinstance(value, float):
                nonsense += [math.nan]
            elif isinstance(value, tuple):
                nonsense += [(), (-1,) * len(value), ("a",) * len(value)]
            found += [(name, field.name, n) for n in nonsense]
    return found


@pytest.mark.parametrize(("name", "parameter", "nonsense"), declared())
def test_nonsense_in_any_parameter_is_refused(bench, name, parameter, nonsense):
    given = repr(nonsense[0]) if isinstance(nonsense, tuple) and nonsense else repr(nonsense)
    refuse(bench, name, parameter, given, **{parameter: nonsense})


def test_merging_more_than_there_is_is_refused(bench):
    refuse(bench, "ToMe", f"r must not exceed the {N} patches", "65", r=65)
    refuse(bench, "ToMe", f"r must not exceed the {N} patches", "33", r=(33, -1))
    refuse(bench, "ToMe", "r must be an integer >= 0", "-1", r=-1)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="ToMee") as error:
        kr.method("ToMee")
    assert "ToMe" in str(error.value) and "TopK" in str(error.value)
    with pytest.raises(ValueError, match="rho") as error:
        kr.method("TopK", rho=0.5)
    assert "keep" in str(error.value) and "layers" in str(error.value)


@every_method
def test_an_unsupported_model_is_refused(name):
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30)
    for model, given in ((BertModel(config), "BertModel"), (torch.nn.Linear(2, 2), "Linear"), ("vit", "str")):
        with pytest.raises(ValueError, match=given) as error, kr.method(name)(model):
            pytest.fail("an unsupported model was accepted")
        assert isinstance(model, str) or all(row[0] in str(error.value) for row in CHECKPOINTS.values())


@every_method
def test_an_empty_batch_is_refused(bench, name):
    model = bench.zoo("vit")
    before = state(model)
    with pytest.raises(ValueError, match=r"batch is empty.*at least one"):
        run(kr.method(name), model, bench.x[:0])
    assert_untouched(model, before, bench.x, bench.dense("vit"))


@every_method
def test_two_methods_on_one_model_are_refused(bench, name):
    model, x = bench.zoo("vit"), bench.x
    method, before = kr.method(name, keep=0.6), state(model)
    with method(model) as outer:
        with pytest.raises(ValueError, match=r"active on this model already.*leave"), kr.vit.TopK(keep=0.5)(model):
            pytest.fail("nesting was accepted")
        with pytest.raises(ValueError, match="active"), method(anatomy(model).tower):
            pytest.fail("nesting on the tower was accepted")
        with torch.no_grad():
            logits = model(x).logits  # the outer one is still at work
    assert torch.equal(logits, bench.run(Case(method, "vit"))[0]) and len(outer.runs) == 1
    assert_untouched(model, before, x, bench.dense("vit"))
    # two models at once are nobody's problem
    with method(model), kr.vit.TopK(keep=0.5)(bench.zoo("deit")), torch.no_grad():
        assert torch.equal(model(x).logits, logits)


def test_gradient_checkpointing_is_refused(bench):
    model = bench.zoo("vit")
    model.gradient_checkpointing_enable()
    model.train()
    try:
        with pytest.raises(ValueError, match="gradient checkpointing"), kr.vit.TopK(keep=0.5)(model):
            model(bench.x)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def test_an_attention_mask_over_patches_is_refused(bench):
    mask = torch.ones(3, N + 1, dtype=torch.long)
    mask[0, 5] = 0
    with pytest.raises(ValueError, match="attention_mask"), kr.vit.TopK(keep=0.5)(bench.zoo("vit")), torch.no_grad():
        bench.zoo("vit")(bench.x, attention_mask=mask)


# --- nothing here names a method without need -------------------------------------------------------------------------


def test_the_tables_of_this_file_name_registered_methods():
    named = {name for name, _ in VARIANTS} | set(IDENTITIES) | STOCHASTIC | BLIND | set(AGREEMENT)
    with open(__file__) as file:
        tree = ast.parse(file.read())
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "bounds")
    named |= {
        n.value
        for n in ast.walk(function)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value[:1].isupper()
    }
    assert named <= set(METHODS)
