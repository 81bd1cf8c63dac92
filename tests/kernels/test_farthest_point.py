"""farthest_point against a greedy in float64 that starts from scratch at every step: choices, gains, ties, padding."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keeprate_kernels import farthest_point
from keeprate_kernels.runtime import backend

from .checks import DEVICE, DTYPES, needs_triton, rand, three_way

module = importlib.import_module("keeprate_kernels.farthest_point")  # the package's attribute is the function
BACKENDS = [pytest.param("triton", marks=needs_triton), "reference"]
WEIGHTED = ("suppress", "coverage", "dpp")
inf = float("inf")


def relation(x, metric, dtype=torch.float64):
    """[b, n, n] what the metric makes of features."""
    x = x.to(dtype)
    if metric == "euclidean":
        return (x[:, :, None] - x[:, None]).square().sum(-1).sqrt()
    unit = torch.nn.functional.normalize(x, dim=-1)
    return unit @ unit.mT


def gains(objective, matrix, chosen, weight, tau, distance):
    """Exact gain of every token given those chosen, one sample: matrix [m, n], weight [n or m] -> [n]."""
    m, n = matrix.shape
    weight = matrix.new_ones(m if objective == "coverage" else n) if weight is None else weight.to(matrix.dtype)
    if objective == "coverage":
        best = matrix[:, chosen].amax(1).clamp_min(0) if chosen else matrix.new_zeros(m)
        return (weight[:, None] * (matrix - best[:, None]).clamp_min(0)).sum(0)
    if objective == "dpp":
        kernel = weight[:, None] * matrix * weight
        before = torch.linalg.det(kernel[chosen][:, chosen]) if chosen else kernel.new_ones(())
        sets = torch.tensor([[*chosen, i] for i in range(n)], device=kernel.device)
        return torch.linalg.det(kernel[sets[:, :, None], sets[:, None, :]]) / before
    gap = matrix if distance else 1 - matrix
    if objective == "suppress":
        return weight if not chosen else torch.where(gap[chosen].amin(0) >= 1 - tau, weight, 0.0)
    return weight * (gap[chosen].amin(0) if objective == "max_min" else gap[chosen].sum(0))


def check(x, k, objective, metric, weight=None, tau=0.9, slack=2e-6, **options):
    """Every choice is the best one there is, up to rounding, and has the gain that is said; returns (order, gain)."""
    order, gain = farthest_point(x, k, objective=objective, metric=metric, weight=weight, tau=tau, **options)
    b = len(x)
    assert order.shape == gain.shape == (b, k) and order.dtype == torch.int64 and gain.dtype == torch.float32
    assert all(len(set(row)) == k for row in order.tolist())
    matrix = x.double() if metric in ("similarity", "distance") else relation(x, metric)
    for i in range(b):
        taken = order[i].tolist()
        first = options.get("start") is None and objective in WEIGHTED
        for step in range(0 if first else 1, k):
            exact = gains(objective, matrix[i], taken[:step], None if weight is None else weight[i], tau,
                          metric in ("euclidean", "distance"))  # fmt: skip
            exact[taken[:step]] = -inf
            room = slack * max(1.0, gain[i, 1 - first :].abs().max().item())
            assert exact[taken[step]] >= exact.max() - room, (i, step, taken[step], int(exact.argmax()))
            assert abs(gain[i, step] - exact[taken[step]]) <= room, (i, step)
    return order, gain


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("objective", module.OBJECTIVES)
def test_every_choice_is_the_best(objective, held, dtype, name, monkeypatch):
    """On the held matrix and row by row, in one block and in several."""
    monkeypatch.setattr(module, "HELD", 1 << 26 if held else 0)
    monkeypatch.setattr(module, "FEW", 1000)
    n, k = (200, 6) if objective == "coverage" else (140, 9)
    x = rand(1, 2, n, 20, dtype=dtype)
    weight = None if objective == "max_sum" else rand(2, 2, n).abs() + 0.1
    with backend(name):
        check(x, k, objective, "cosine", weight, tau=0.3)
        if not held and objective.startswith("max"):
            check(x, k, objective, "euclidean", weight)


@needs_triton
@pytest.mark.parametrize("objective", module.OBJECTIVES)
@pytest.mark.parametrize(("n", "held"), [(31, True), (65, False), (257, True)])
def test_kernel_and_reference_choose_alike(n, held, objective, monkeypatch):
    x, weight = rand(n, 2, n, 12), rand(n + 1, n, 2).abs().T
    valid = (torch.arange(n, device=DEVICE)[:, None] < torch.tensor([n, 24], device=DEVICE)).T
    assert not weight.is_contiguous() and not valid.is_contiguous()
    monkeypatch.setattr(module, "HELD", 1 << 26 if held else 0)
    found = {}
    for name in ("triton", "reference"):
        with backend(name):
            found[name] = farthest_point(x, 7, objective=objective, weight=weight, valid=valid, tau=0.2)
    assert torch.equal(found["triton"][0], found["reference"][0])
    torch.testing.assert_close(found["triton"][1], found["reference"][1], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gains_three_ways(dtype, name):
    """Distances of the same choices, against torch in the same precision."""
    x = rand(0, 2, 65, 48, dtype=dtype)
    with backend(name):
        order, gain = farthest_point(x, 20, objective="max_min", start=3)
    exact = {}
    for kind in (torch.float64, dtype):
        gap = 1 - relation(x, "cosine", kind)
        exact[kind] = torch.stack(
            [
                torch.stack([gap[i, row[step], row[:step]].amin() for step in range(1, 20)])
                for i, row in enumerate(order)
            ]
        )
    three_way(gain[:, 1:], exact[dtype], exact[torch.float64])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("objective", module.OBJECTIVES)
def test_one_token_all_tokens_and_prefixes(objective, name):
    x, weight = rand(3, 2, 31, 40), rand(4, 2, 31).abs() + 0.1
    with backend(name):
        order, gain = check(x, 31, objective, "cosine", weight, slack=1e-5)
        assert torch.equal(order.sort(1).values, torch.arange(31, device=DEVICE).expand(2, -1))
        for k in (1, 9):
            part, part_gain = farthest_point(x, k, objective=objective, weight=weight)
            assert torch.equal(part, order[:, :k])
            torch.testing.assert_close(part_gain, gain[:, :k])
        alone = farthest_point(x[:, :1], 1, objective=objective, weight=weight[:, :1])
    assert not alone[0].any()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("objective", module.OBJECTIVES)
def test_padding_comes_last_and_changes_nothing(objective, name):
    x, weight = rand(5, 3, 40, 8), rand(6, 3, 40).abs()
    valid = torch.arange(40, device=DEVICE) < torch.tensor([[40], [25], [6]], device=DEVICE)
    dirty = x.masked_fill(~valid[..., None], float("nan"))
    with backend(name):
        order, gain = farthest_point(dirty, 10, objective=objective, weight=weight, valid=valid, tau=0.5)
        for i, n in enumerate((40, 25, 6)):
            k = min(n, 10)
            own, own_gain = farthest_point(
                x[i : i + 1, :n], k, objective=objective, weight=weight[i : i + 1, :n], tau=0.5
            )
            assert torch.equal(order[i, :k], own[0])
            torch.testing.assert_close(gain[i, :k], own_gain[0], rtol=1e-4, atol=2e-6)
    assert order[2, 6:].tolist() == [6, 7, 8, 9] and gain[2, 6:].isneginf().all() and not gain[:2].isneginf().any()


@pytest.mark.parametrize("name", BACKENDS)
def test_ties_go_to_the_lower_position(name):
    # points on a grid: distances are whole numbers and exact
    x = torch.tensor([[[0.0], [4.0], [-4.0], [0.0], [4.0], [2.0]]], device=DEVICE)
    equal = torch.eye(6, device=DEVICE)[None]
    with backend(name):
        order, gain = farthest_point(x, 6, metric="euclidean", start=0)
        assert order.tolist() == [[0, 1, 2, 5, 3, 4]] and gain.tolist() == [[inf, 4, 4, 2, 0, 0]]
        for objective in ("coverage", "dpp"):
            order, gain = farthest_point(equal, 6, objective=objective, metric="similarity")
            assert order.tolist() == [[0, 1, 2, 3, 4, 5]] and gain.tolist() == [[1.0] * 6]


@pytest.mark.parametrize("name", BACKENDS)
def test_starts(name):
    x, weight = rand(7, 3, 33, 6), rand(8, 3, 33).abs()
    gap, unit = relation(x, "euclidean"), torch.nn.functional.normalize(x.double(), dim=-1)
    wants = {
        "mean": {
            "euclidean": (x.double() - x.double().mean(1, keepdim=True)).norm(dim=-1).argmin(1),
            "cosine": (unit * unit.mean(1, keepdim=True)).sum(-1).argmax(1),
        },
        "weight": dict.fromkeys(("euclidean", "cosine"), weight.argmax(1)),
        "isolated": {
            "euclidean": (gap + torch.diag(torch.full((33,), inf, device=DEVICE))).amin(1).argmax(1),
            "cosine": (unit @ unit.mT - 2 * torch.eye(33, device=DEVICE)).amax(1).argmin(1),
        },
    }
    with backend(name):
        for start, by_metric in wants.items():
            for metric, want in by_metric.items():
                order, gain = check(x, 4, "max_min", metric, weight, start=start)
                assert torch.equal(order[:, 0], want) and gain[:, 0].isposinf().all(), (start, metric)
        places = torch.tensor([5, 0, 32], device=DEVICE)
        assert torch.equal(check(x, 4, "dpp", "cosine", weight, start=places)[0][:, 0], places)
        assert check(x, 4, "max_sum", "euclidean", start=7)[0][:, 0].tolist() == [7, 7, 7]


@pytest.mark.parametrize("name", BACKENDS)
def test_matrices_are_taken_as_they_are(name):
    gap = rand(9, 2, 40, 40).abs()
    gap = gap + gap.mT
    scores = torch.softmax(3 * rand(10, 2, 57, 40), -1)  # rows to cover that are not the tokens
    rows = rand(11, 2, 57).abs()
    x = rand(12, 2, 40, 60)
    kernel = (x @ x.mT / 60).transpose(0, 1).contiguous().transpose(0, 1)
    assert not kernel.is_contiguous()
    with backend(name):
        check(gap, 9, "max_min", "distance", start="isolated")
        check(scores, 9, "coverage", "similarity", rows)
        check(scores, 40, "coverage", "similarity")
        check(kernel, 12, "dpp", "similarity", slack=1e-5)
        strided = farthest_point(x[:, ::2, ::3], 5, objective="dpp")
        plain = farthest_point(x[:, ::2, ::3].contiguous(), 5, objective="dpp")
    assert torch.equal(strided[0], plain[0])


@pytest.mark.parametrize("name", BACKENDS)
def test_duplicates_wait_until_nothing_else_is_left(name):
    distinct, weight = rand(13, 2, 7, 16), torch.rand(2, 28, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x = distinct.repeat(1, 4, 1)
    with backend(name):
        for objective in ("max_min", "suppress", "dpp"):
            order, gain = farthest_point(x, 20, objective=objective, weight=weight + 0.1)
            assert all(len({i % 7 for i in row[:7]}) == 7 for row in order.tolist()), objective
            if objective != "max_min":  # the others fill up by weight
                assert (gain[:, :7] > 0).all() and not gain[:, 7:].any()
                filled = weight.gather(1, order[:, 7:])
                assert (filled[:, :-1] >= filled[:, 1:]).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_suppression_is_that_of_a_sorted_loop(name):
    x, weight = rand(14, 1, 60, 4), rand(15, 1, 60).abs()
    similar, kept = relation(x, "cosine")[0], []
    for i in weight[0].argsort(descending=True).tolist():
        if all(similar[i, j] <= 0.4 for j in kept):
            kept.append(i)
    with backend(name):
        order, gain = farthest_point(x, 60, objective="suppress", weight=weight, tau=0.4)
        assert order[0, : len(kept)].tolist() == kept and not gain[0, len(kept) :].any()
        everything = farthest_point(x, 60, objective="suppress", weight=weight, tau=1)
    assert torch.equal(everything[0], weight.argsort(dim=1, descending=True))


def test_coverage_reaches_the_greedy_bound_and_its_gains_fall():
    scores = torch.softmax(2 * rand(16, 1, 12, 10), -1)
    order, gain = farthest_point(scores, 4, objective="coverage", metric="similarity")
    sets = torch.combinations(torch.arange(10, device=DEVICE), 4)
    optimum = scores[0][:, sets].amax(-1).sum(0).max()
    assert gain.sum() >= (1 - 1 / torch.e) * optimum and (gain[:, :-1] >= gain[:, 1:]).all()
    torch.testing.assert_close(gain.sum(), scores[0][:, order[0]].amax(-1).sum())


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31 - 1), st.integers(1, 3), st.integers(2, 40), st.integers(1, 8),
    st.sampled_from(module.OBJECTIVES), st.sampled_from([0, 1 << 26]), st.sampled_from([1, 1 << 22]),
)  # fmt: skip
def test_the_reference_at_any_shape(seed, b, n, c, objective, held, chunk):
    x, weight = rand(seed, b, n, c), rand(seed + 1, b, n).abs()
    k = 1 + seed % min(n, c if objective == "dpp" else 6)  # beyond the rank all determinants are 0
    with pytest.MonkeyPatch.context() as patch, backend("reference"):
        patch.setattr(module, "HELD", held)
        patch.setattr(module, "CHUNK", chunk)
        check(x, k, objective, "cosine", weight, tau=0.5, slack=3e-5, start="isolated")


def test_inputs_are_left_alone():
    for metric in module.METRICS[:3]:
        tensors = rand(17, 2, 30, 30).abs(), rand(18, 2, 30).abs()
        copies = [t.clone() for t in tensors]
        for objective in ("max_min",) if metric == "euclidean" else module.OBJECTIVES:
            farthest_point(tensors[0], 9, objective=objective, metric=metric, weight=tensors[1], start="weight")
        assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 3), {}, r"x must be.*\(4, 3\)"),
        ((0, 4, 3), {}, r"x must be.*\(0, 4, 3\)"),
        ((1, 4, 3), {"k": 5}, r"k must lie in 1\.\.4.*got 5"),
        ((1, 4, 3), {"objective": "best"}, r"objective must be one of 'max_min'.*got 'best'"),
        ((1, 4, 3), {"metric": "l1"}, r"metric must be one of.*got 'l1'"),
        ((1, 4, 3), {"metric": "distance"}, r"distance matrix must be square.*\(1, 4, 3\)"),
        ((1, 4, 3), {"objective": "dpp", "metric": "euclidean"}, r"dpp needs similarities.*got 'euclidean'"),
        ((1, 4, 3), {"weight": torch.ones(1, 3)}, r"weight must be \(1, 4\); got \(1, 3\)"),
        ((1, 4, 3), {"objective": "suppress"}, r"needs a weight"),
        ((1, 4, 3), {"start": "weight"}, r"needs a weight"),
        ((1, 4, 3), {"start": "middle"}, r"start must be one of 'mean'.*got 'middle'"),
        ((1, 4, 3), {"start": 4}, r"start must lie in 0\.\.3; got 4"),
        ((1, 4, 3), {"start": torch.zeros(2, dtype=torch.long)}, r"start must be.*\(1,\); got torch.int64 \(2,\)"),
        ((1, 4, 4), {"metric": "distance"}, r"start 'mean' needs features.*'distance'"),
        ((1, 4, 3), {"valid": torch.ones(1, 3, dtype=torch.bool)}, r"valid must be boolean \(1, 4\).*\(1, 3\)"),
        ((1, 4, 3), {"tau": 2.0}, r"tau must be a cosine.*got 2\.0"),
    ],
)
def test_what_does_not_fit_is_named(shape, options, message):
    with pytest.raises(ValueError, match=message):
        farthest_point(torch.zeros(shape), **{"k": 2} | options)


@pytest.mark.parametrize("objective", ["max_min", "max_sum"])
def test_autocast_changes_no_choice(objective):
    x = torch.randn(2, 60, 32, generator=torch.Generator().manual_seed(0))
    want = farthest_point(x, 20, objective=objective)
    with torch.autocast("cpu", torch.bfloat16):
        found = farthest_point(x, 20, objective=objective)
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])
