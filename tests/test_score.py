"""Scores against naive references."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keeprate import score

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)
small = st.integers(1, 3)


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_scores_are_fp32_whatever_comes_in():
    assert score.value_norm(rand(0, 2, 3, 7, 4).half()).dtype == torch.float32
    assert score.pagerank(rand(0, 1, 2, 5, 5).softmax(-1).bfloat16(), 2).dtype == torch.float32
    assert score.energy(rand(0, 2, 7, 4).bfloat16(), 0.5).dtype == torch.float32
    assert score.density(score.distance(rand(0, 2, 7, 4).bfloat16())).dtype == torch.float32


@quick
@given(seeds, small, small, st.integers(1, 9), st.integers(1, 5))
def test_value_norm_concatenates_heads(seed, b, g, n, d):
    v = rand(seed, b, g, n, d)
    torch.testing.assert_close(score.value_norm(v), v.transpose(1, 2).flatten(2).norm(dim=-1))
    torch.testing.assert_close(score.value_norm(v, per_head=True), v.norm(dim=-1))


@quick
@given(seeds, small, small, st.integers(1, 12), st.integers(1, 6))
def test_pagerank_is_a_probability_vector(seed, b, h, n, iterations):
    s = score.pagerank((3 * rand(seed, b, h, n, n)).softmax(-1), iterations)
    assert s.shape == (b, h, n) and (s >= 0).all()
    torch.testing.assert_close(s.sum(-1), torch.ones(b, h))


@quick
@given(seeds, small, small, st.integers(1, 12))
def test_one_round_of_pagerank_is_the_attention_received(seed, b, h, n):
    probs = (3 * rand(seed, b, h, n, n)).softmax(-1)
    torch.testing.assert_close(score.pagerank(probs, 1), probs.mean(2))


@quick
@given(seeds, small, st.integers(1, 12))
def test_pagerank_starts_where_it_is_told(seed, h, n):
    probs, start = (3 * rand(seed, 1, h, n, n)).softmax(-1), rand(seed + 1, n).abs() + 0.1
    torch.testing.assert_close(score.pagerank(probs, 1, start), (start / start.sum()) @ probs)


@quick
@given(seeds, small, st.integers(2, 10))
def test_pagerank_converges_to_the_left_eigenvector(seed, h, n):
    probs = rand(seed, 1, h, n, n).softmax(-1)
    s = score.pagerank(probs, 200).double()
    torch.testing.assert_close((s[:, :, None] @ probs.double()).squeeze(2), s, atol=1e-5, rtol=1e-4)
    for head in range(h):
        values, vectors = torch.linalg.eig(probs[0, head].double().T)
        lead = vectors[:, (values - 1).abs().argmin()].real
        torch.testing.assert_close(s[0, head], lead / lead.sum(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("iterations", [0, -2])
def test_pagerank_needs_an_iteration(iterations):
    with pytest.raises(ValueError, match=f"at least 1; got {iterations}"):
        score.pagerank(torch.eye(3)[None, None], iterations)


@quick
@given(seeds, small, st.integers(1, 4), st.integers(2, 9))
def test_rms_of_heads_matches_a_loop_and_falls_back_to_all(seed, b, h, n):
    scores = rand(seed, b, h, n).abs() + 0.01
    low, high = 0.2, 0.5
    found = score.rms_of_heads(scores, low, high)
    for i in range(b):
        kept = []
        for head in scores[i]:
            scaled = head / head.mean()
            if low <= float(((scaled - 1) ** 2).mean()) <= high:
                kept.append(head)
        kept = kept or list(scores[i])
        torch.testing.assert_close(found[i], (sum(head**2 for head in kept) / len(kept)).sqrt())


def test_rms_of_heads_leaves_out_a_flat_head():
    flat, useful = torch.ones(4), torch.tensor([0.5, 0.5, 1.0, 2.0])
    found = score.rms_of_heads(torch.stack([flat, useful])[None], 0.01, 0.7)
    torch.testing.assert_close(found[0], useful)
    torch.testing.assert_close(score.rms_of_heads(flat[None, None], 0.01, 0.7)[0], flat)  # none passes: all are used


@quick
@given(seeds, small, st.integers(1, 9), st.integers(1, 4))
def test_similarity_is_the_cosine(seed, b, n, c):
    x, y = rand(seed, b, n, c), rand(seed + 1, b, n + 1, c)
    want = torch.nn.functional.cosine_similarity(x[:, :, None], y[:, None], dim=-1)
    torch.testing.assert_close(score.similarity(x, y), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(score.similarity(x), score.similarity(x, x))


def test_similarity_is_fp32_under_autocast():
    x = rand(0, 2, 9, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = score.similarity(x)
    assert torch.equal(found, score.similarity(x))


def test_similarity_of_a_zero_vector_is_zero_not_nan():
    assert score.similarity(torch.zeros(1, 2, 3)).tolist() == [[[0.0, 0.0], [0.0, 0.0]]]


@quick
@given(seeds, small, st.integers(1, 9), st.floats(-1, 1), st.floats(0.1, 2))
def test_energy_matches_its_formula(seed, b, n, margin, alpha):
    metric = rand(seed, b, n, 3)
    found, sim = score.energy(metric, margin, alpha), score.similarity(metric)
    for i in range(b):
        for j in range(n):
            terms = [c if c >= margin else alpha * (math.exp(c - margin) - 1) for c in sim[i, j].tolist()]
            assert found[i, j].item() == pytest.approx(sum(terms) / n, abs=1e-5)


def test_energy_is_high_for_redundant_tokens():
    metric = torch.tensor([[[1.0, 0.0], [1.0, 0.01], [1.0, -0.01], [0.0, 1.0]]])
    found = score.energy(metric, 0.5)[0]
    assert found.argmin() == 3 and (found[:3] > 0.6).all() and found[3] < 0


@quick
@given(seeds, small, st.integers(1, 12), st.integers(1, 20))
def test_density_matches_its_formula(seed, b, n, neighbours):
    x = rand(seed, b, n, 4)
    gap = torch.cdist(x.double(), x.double()) / 2  # sqrt(dim) = 2
    near = gap.sort(-1).values[..., : min(neighbours, n)]
    want = (-near.square().mean(-1)).exp()
    torch.testing.assert_close(score.density(score.distance(x), neighbours).double(), want, atol=2e-5, rtol=1e-4)


@quick
@given(seeds, small, st.integers(1, 10))
def test_separation_matches_a_loop(seed, b, n):
    x = rand(seed, b, n, 3)
    rho = torch.rand(b, n, generator=torch.Generator().manual_seed(seed)).argsort(1).float()  # no ties
    gap = score.distance(x)
    found = score.separation(gap, rho)
    for i in range(b):
        for j in range(n):
            denser = [gap[i, j, o].item() for o in range(n) if rho[i, o] > rho[i, j]]
            want = min(denser) if denser else gap[i, j].max().item()
            assert found[i, j].item() == pytest.approx(want, abs=1e-5)


@quick
@given(seeds, small, st.integers(1, 9), st.integers(1, 5))
def test_distance_is_symmetric_with_an_exact_zero_diagonal(seed, b, n, d):
    x = 100 + rand(seed, b, n, d)  # far from the origin, where cdist's matrix product form rounds
    gap = score.distance(x)
    assert (gap.diagonal(dim1=1, dim2=2) == 0).all()
    want = (x.double()[:, :, None] - x.double()[:, None]).norm(dim=-1) / d**0.5
    torch.testing.assert_close(gap.double(), want, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(gap, gap.transpose(1, 2), atol=1e-3, rtol=1e-3)


def test_duplicates_stay_nearest_among_many_tokens():
    # beyond 25 points cdist may switch to ||x||^2 + ||y||^2 - 2xy, which rounds small distances
    x = 20 + rand(0, 1, 40, 6)
    x[0, 20:] = x[0, :20]
    gap = score.distance(x)[0].fill_diagonal_(float("inf"))
    assert torch.equal(gap.argmin(1), (torch.arange(40) + 20) % 40)
    assert gap[torch.arange(20), torch.arange(20, 40)].max() < 0.02


def test_random_comes_from_the_callers_generator():
    def draw(seed):
        return score.random((2, 9), torch.Generator().manual_seed(seed))

    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1)[0], draw(1)[1])
    assert torch.equal(torch.get_rng_state(), before)


@quick
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1.0, 2.0, math.inf]))
def test_radial_is_the_distance_to_the_centre(rows, cols, norm):
    found = score.radial((rows, cols), norm)
    assert found.shape == (rows * cols,) and (found <= 0).all()
    for r in range(rows):
        for c in range(cols):
            dy, dx = abs(r - (rows - 1) / 2), abs(c - (cols - 1) / 2)
            want = {1.0: dy + dx, 2.0: math.hypot(dy, dx), math.inf: max(dy, dx)}[norm]
            assert -found[r * cols + c].item() == pytest.approx(want, abs=1e-5)


def test_confidence_is_the_largest_probability():
    logits = rand(0, 2, 5, 3)
    torch.testing.assert_close(score.confidence(logits), logits.softmax(-1).max(-1).values)


# --- cached keys and values -------------------------------------------------------------------------------------------


@quick
@given(seeds, small, small, small, st.sampled_from(["mean", "sum", "max"]))
def test_by_kv_head_reduces_neighbouring_query_heads(seed, b, g, r, reduce):
    x = rand(seed, b, g * r, 4, 3)
    got = score.by_kv_head(x, g, reduce)
    for i in range(g):
        part = [x[:, j] for j in range(g * r) if j // r == i]
        want = {"mean": sum(part) / r, "sum": sum(part), "max": torch.stack(part).amax(0)}[reduce]
        torch.testing.assert_close(got[:, i], want)


def test_by_kv_head_refuses_what_cannot_be_shared():
    with pytest.raises(ValueError, match=r"5 query heads .* 2 KV heads"):
        score.by_kv_head(torch.zeros(1, 5, 3), 2)
    with pytest.raises(ValueError, match="'median'"):
        score.by_kv_head(torch.zeros(1, 4, 3), 2, "median")


@quick
@given(seeds, small, st.integers(1, 12), st.sampled_from([1, 3, 5, 9]), st.sampled_from(["avg", "max"]), st.booleans())
def test_pool_matches_a_loop(seed, b, n, kernel, mode, padding):
    x = rand(seed, b, 2, n)
    valid = rand(seed + 1, b, 2, n) > -0.5 if padding else None
    got = score.pool(x, kernel, mode, valid)
    assert got.shape == x.shape and got.dtype == torch.float32
    for i in range(b):
        for h in range(2):
            for k in range(n):
                around = range(max(0, k - kernel // 2), min(n, k + kernel // 2 + 1))
                near = [j for j in around if valid is None or valid[i, h, j]]
                if near:
                    part = x[i, h, near]
                    want = part.mean() if mode == "avg" else part.amax()
                    torch.testing.assert_close(got[i, h, k], want, rtol=1e-4, atol=1e-5)


def test_pool_does_not_read_what_does_not_exist():
    x = torch.tensor([[1.0, float("nan"), 3.0, float("inf"), 5.0]])
    got = score.pool(x, 3, "avg", x.isfinite())
    torch.testing.assert_close(got, torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]))


@pytest.mark.parametrize("kernel", [0, 2, -3, 1.0, True])
def test_pool_needs_a_middle(kernel):
    with pytest.raises(ValueError, match="kernel must be an odd number"):
        score.pool(torch.zeros(1, 4), kernel)


def test_pool_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match="'median'"):
        score.pool(torch.zeros(1, 4), 3, "median")


@quick
@given(seeds, small, small, st.integers(2, 9), st.integers(1, 5), st.floats(0.5, 20))
def test_eviction_error_is_the_change_of_the_output(seed, b, g, n, d, factor):
    weight, v = rand(seed, b, g, n).softmax(-1), rand(seed + 1, b, g, n, d)
    a, v64 = weight.double(), v.double()
    output = (a[..., None] * v64).sum(2)
    got = score.eviction_error(factor * weight, v)  # weights need not be normalised
    for j in range(n):
        left = [i for i in range(n) if i != j]
        rest = a[..., left] / a[..., left].sum(-1, keepdim=True)
        moved = ((rest[..., None] * v64[:, :, left]).sum(2) - output).norm(dim=-1)
        torch.testing.assert_close(got[..., j].double(), moved, rtol=1e-3, atol=1e-4)


def test_eviction_error_of_a_token_nobody_reads_is_zero():
    weight = torch.tensor([[[0.5, 0.0, 0.5]]])
    got = score.eviction_error(weight, rand(0, 1, 1, 3, 4))
    assert got[0, 0, 1] == 0 and bool((got[0, 0, [0, 2]] > 0).all())


def test_eviction_error_takes_another_output():
    weight, v, output = rand(0, 1, 2, 5).softmax(-1), rand(1, 1, 2, 5, 3), rand(2, 1, 2, 3)
    want = weight / (1 - weight) * (output[:, :, None] - v).norm(dim=-1)
    torch.testing.assert_close(score.eviction_error(weight, v, output), want, rtol=1e-4, atol=1e-5)
