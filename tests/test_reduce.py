"""Reductions: physical equals masked, weighted means equal loops, and every token goes where the labels say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keeprate import reduce, score, select
from keeprate.reduce import Reduction
from keeprate.vit.tome import merge_similar

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def positions(seed: int, b: int, n: int, k: int) -> torch.Tensor:
    """[b, k] sorted unique positions below n."""
    return torch.rand(b, n, generator=generator(seed)).argsort(1)[:, :k].sort(1).values


def labels_of(seed: int, b: int, n: int, k: int, dropped: bool = False) -> torch.Tensor:
    """[b, n] labels, no cluster empty; with `dropped` some tokens beyond the first k join none."""
    g = generator(seed)
    labels = torch.cat([torch.arange(k).expand(b, k), torch.randint(k, (b, n - k), generator=g)], 1)
    if dropped:
        labels[:, k:][torch.rand(b, n - k, generator=g) < 0.3] = -1
    return labels.gather(1, torch.rand(b, n, generator=g).argsort(1))


@st.composite
def reductions(draw):
    """(name, Reduction of n tokens, n): one of every kind that the builders make."""
    seed, b, n = draw(seeds), draw(st.integers(1, 3)), draw(st.integers(2, 14))
    k = draw(st.integers(1, n))
    weight = torch.rand(b, n, generator=generator(seed)) + 0.05
    kind = draw(st.sampled_from(["drop", "ragged", "fuse", "fuse average", "merge", "merge dropped", "pairs", "into"]))
    if kind == "drop":
        found = reduce.drop(positions(seed, b, n, k))
    elif kind == "ragged":
        kept = select.top_counts(weight, torch.randint(1, n + 1, (b,), generator=generator(seed)))
        found = reduce.drop(kept.index, kept.valid)
    elif kind.startswith("fuse"):
        found = reduce.fuse_rest(positions(seed, b, n, min(k, n - 1)), weight, average=kind == "fuse average")
    elif kind.startswith("merge"):
        found = reduce.merge(labels_of(seed, b, n, k, kind == "merge dropped"), weight, k=k)
    elif kind == "pairs":
        r = draw(st.integers(1, max(1, n // 2)))
        index = torch.arange(n)
        source, target = select.bipartite(rand(seed, b, n, 3), r, index[::2], index[1::2])
        found = reduce.merge_pairs(source, target, weight)
    else:
        found = reduce.merge_into(positions(seed, b, n, k), rand(seed, b, n, 3), weight)
    return kind, found, n


def by_loop(found: Reduction, x: torch.Tensor) -> torch.Tensor:
    """What a Reduction must give, written as plainly as possible: [b, m, d]."""
    b, n, _ = x.shape
    y = torch.zeros(b, found.m, x.shape[2])
    for i in range(b):
        for j in range(found.m):
            if found.slot is None:
                y[i, j] = x[i, found.rep[i, j]]
                continue
            members = [t for t in range(n) if found.slot[i, t] == j]
            weights = [1.0 if found.weight is None else found.weight[i, t].item() for t in members]
            total = sum(w * x[i, t] for w, t in zip(weights, members, strict=True))
            y[i, j] = total / sum(weights) if found.average else total
    return y


def real(found: Reduction) -> torch.Tensor:
    return torch.ones_like(found.rep, dtype=torch.bool) if found.valid is None else found.valid


@settings(max_examples=80, deadline=None)
@given(reductions(), seeds)
def test_physical_execution_equals_the_loop(case, seed):
    _, found, n = case
    x = rand(seed, len(found.rep), n, 4)
    torch.testing.assert_close(found(x), by_loop(found, x), atol=1e-5, rtol=1e-4)


@settings(max_examples=80, deadline=None)
@given(reductions())
def test_slots_and_representatives_agree(case):
    kind, found, n = case
    b = len(found.rep)
    slot, own = found.slots(n), torch.arange(found.m).expand(b, found.m)
    assert slot.shape == (b, n) and slot.min() >= -1 and slot.max() < found.m
    plain = found.m - found.summaries
    for i in range(b):
        rep = found.rep[i, :plain][real(found)[i, :plain]]
        assert (rep.diff() > 0).all(), kind
        assert found.rep[i].unique().numel() == found.m, kind
    # every representative stands for itself (the host of a summary slot lies inside the summary)
    where = slot.gather(1, found.rep)
    assert torch.equal(where[real(found)], own[real(found)]), kind


@settings(max_examples=80, deadline=None)
@given(reductions(), seeds)
def test_masked_execution_equals_physical(case, seed):
    _, found, n = case
    b = len(found.rep)
    n0 = n + 5
    alive = positions(seed, b, n0, n)
    full = rand(seed, b, n0, 4)
    y, after = found.masked(full, alive)
    assert y.shape == full.shape and after.shape == found.rep.shape
    torch.testing.assert_close(reduce.gather_tokens(y, after), found(reduce.gather_tokens(full, alive)))
    elsewhere = torch.ones(b, n0, dtype=torch.bool).scatter(1, after, False)
    assert torch.equal(y[elsewhere], full[elsewhere])


@settings(max_examples=80, deadline=None)
@given(reductions(), seeds)
def test_total_adds_up_and_conserves(case, seed):
    _, found, n = case
    size = torch.randint(1, 9, (len(found.rep), n), generator=generator(seed)).float()
    slot, total = found.slots(n), found.total(size)
    for i in range(len(slot)):
        for j in range(found.m):
            assert total[i, j] == size[i][slot[i] == j].sum()
    assert torch.equal(total.sum(1), (size * (slot >= 0)).sum(1))


@settings(max_examples=80, deadline=None)
@given(reductions(), seeds)
def test_unmerge_copies_to_the_members(case, seed):
    _, found, n = case
    y = rand(seed, len(found.rep), found.m, 4)
    slot, back = found.slots(n), found.unmerge(y, n)
    for i in range(len(slot)):
        for t in range(n):
            want = torch.zeros(4) if slot[i, t] < 0 else y[i, slot[i, t]]
            assert torch.equal(back[i, t], want)
    if found.slot is not None and found.average and found.valid is None:
        torch.testing.assert_close(found(back), y, atol=1e-5, rtol=1e-4)  # constant on clusters: their mean is itself


@settings(max_examples=80, deadline=None)
@given(reductions(), st.integers(0, 3), seeds)
def test_the_prefix_passes_unchanged(case, prefix, seed):
    _, found, n = case
    b = len(found.rep)
    x = rand(seed, b, prefix + n, 4)
    whole = found.after_prefix(prefix)
    y = whole(x)
    assert whole.m == found.m + prefix
    assert torch.equal(y[:, :prefix], x[:, :prefix])
    torch.testing.assert_close(y[:, prefix:], found(x[:, prefix:]))
    masked, alive = whole.masked(x, torch.arange(prefix + n).expand(b, -1))
    assert torch.equal(masked[:, :prefix], x[:, :prefix]) and torch.equal(alive[:, :prefix], whole.rep[:, :prefix])
    assert torch.equal(whole.total(torch.ones(b, prefix + n))[:, :prefix], torch.ones(b, prefix))
    if found.valid is not None and prefix:
        assert whole.valid[:, :prefix].all() and torch.equal(whole.valid[:, prefix:], found.valid)


@quick
@given(reductions(), seeds)
def test_half_precision_means_are_taken_in_fp32(case, seed):
    _, found, n = case
    x = (100 * rand(seed, len(found.rep), n, 4)).bfloat16()
    y = found(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, found(x.float()).bfloat16())


@quick
@given(seeds, st.integers(1, 3), st.integers(2, 12), st.data())
def test_fuse_rest_is_the_formula_of_evit(seed, b, n, data):
    k = data.draw(st.integers(1, n - 1))
    x, s, kept = rand(seed, b, n, 4), rand(seed + 1, b, n).softmax(1), positions(seed, b, n, k)
    found = reduce.fuse_rest(kept, s)
    y = found(x)
    assert found.summaries == 1 and y.shape == (b, k + 1, 4)
    torch.testing.assert_close(y[:, :k], reduce.gather_tokens(x, kept))
    left = s.scatter(1, kept, 0.0)
    torch.testing.assert_close(y[:, k], (left[..., None] * x).sum(1), atol=1e-5, rtol=1e-4)
    assert torch.equal(found.total(torch.ones(b, n)), torch.tensor([[1.0] * k + [float(n - k)]]).expand(b, -1))
    mean = reduce.fuse_rest(kept, s, average=True)(x)[:, k]
    torch.testing.assert_close(mean, y[:, k] / left.sum(1, keepdim=True), atol=1e-4, rtol=1e-3)


@quick
@given(seeds, st.integers(1, 3), st.integers(1, 12), st.data())
def test_merge_does_not_depend_on_the_names_of_clusters(seed, b, n, data):
    k = data.draw(st.integers(1, n))
    labels, x = labels_of(seed, b, n, k), rand(seed, b, n, 4)
    names = torch.randperm(k, generator=generator(seed))
    one, two = reduce.merge(labels), reduce.merge(names[labels])
    assert torch.equal(one.rep, two.rep) and torch.equal(one.slot, two.slot)
    torch.testing.assert_close(one(x), two(x))
    assert torch.equal(one.total(torch.ones(b, n)).sum(1), torch.full((b,), float(n)))


def test_merge_refuses_an_empty_cluster():
    with pytest.raises(ValueError, match="3 clusters empty"):
        reduce.merge(torch.tensor([[0, 2, 2]]), k=3)


def test_a_slot_without_weight_falls_back_to_its_representative():
    found = reduce.merge(torch.tensor([[0, 0, 1]]), torch.tensor([[0.0, 0.0, 1.0]]))
    assert torch.equal(found(torch.tensor([[[1.0], [5.0], [7.0]]])), torch.tensor([[[1.0], [7.0]]]))


@quick
@given(seeds, st.integers(1, 3), st.integers(2, 16), st.integers(0, 1), st.data())
def test_merge_similar_reaches_any_count_and_conserves_size(seed, b, n, offset, data):
    r = data.draw(st.integers(1, n - 1))  # far beyond half: several rounds
    metric, x = rand(seed, b, n, 3), rand(seed + 1, b, n, 4)
    size = torch.randint(1, 5, (b, n), generator=generator(seed)).float()
    found = merge_similar(metric, size, r, offset)
    assert found.m == n - r
    total = found.total(size)
    assert torch.equal(total.sum(1), size.sum(1)) and (total >= 1).all()
    torch.testing.assert_close(found(x), by_loop(found, x), atol=1e-5, rtol=1e-4)
    # the weighted mean of everything survives any merging by size
    before, after = (x * size[..., None]).sum(1), (found(x) * total[..., None]).sum(1)
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)


@quick
@given(seeds, st.integers(1, 3), st.integers(1, 12), st.data())
def test_merge_into_joins_the_most_similar(seed, b, n, data):
    k = data.draw(st.integers(1, n))
    metric, kept = rand(seed, b, n, 3), positions(seed, b, n, k)
    found = reduce.merge_into(kept, metric)
    sim = score.similarity(metric).gather(2, kept[:, None].expand(b, n, k))
    inside = torch.zeros(b, n, dtype=torch.bool).scatter(1, kept, True)
    chosen = sim.gather(2, found.slot[..., None]).squeeze(-1)
    torch.testing.assert_close(chosen[~inside], sim.amax(-1)[~inside])
    assert torch.equal(found.slot.gather(1, kept), torch.arange(k).expand(b, k))


# --- soft mixing, parking, reconstruction -----------------------------------------------------------------------------


@quick
@given(seeds, st.integers(1, 3), st.integers(1, 8), st.integers(1, 8))
def test_soft_mix_is_a_convex_mixture(seed, b, n, m):
    x, mix = rand(seed, b, n, 4), rand(seed + 1, b, m, n).softmax(-1)
    y = reduce.soft_mix(x, mix)
    torch.testing.assert_close(y, torch.einsum("bmn,bnd->bmd", mix, x))
    assert (y <= x.amax(1, keepdim=True) + 1e-5).all() and (y >= x.amin(1, keepdim=True) - 1e-5).all()
    torch.testing.assert_close(
        reduce.soft_mix(x, torch.full((b, m, n), 1 / n)), x.mean(1, keepdim=True).expand(b, m, 4), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("mix", [torch.ones(1, 2, 3), torch.full((1, 2, 3), 0.3), torch.full((1, 2, 3), float("nan"))])
def test_soft_mix_refuses_rows_that_do_not_sum_to_one(mix):
    with pytest.raises(ValueError, match="sum to 1"):
        reduce.soft_mix(torch.ones(1, 3, 4), mix)


@quick
@given(seeds, st.integers(1, 3), st.integers(1, 9), st.data())
def test_scatter_back_restores_parked_tokens(seed, b, n, data):
    m = data.draw(st.integers(1, n))
    full, index, y = rand(seed, b, n, 4), positions(seed, b, n, m), rand(seed + 1, b, m, 4)
    joined = reduce.scatter_back(full, index, y)
    assert torch.equal(reduce.gather_tokens(joined, index), y)
    parked = torch.ones(b, n, dtype=torch.bool).scatter(1, index, False)
    assert torch.equal(joined[parked], full[parked])
    assert torch.equal(reduce.scatter_back(full, index, reduce.gather_tokens(full, index)), full)


@quick
@given(seeds, st.integers(1, 2), st.integers(1, 9), st.integers(1, 6), st.integers(1, 8), st.floats(0.01, 1.0))
def test_reconstruct_mixes_at_most_k_near_centres(seed, b, n, m, k, tau):
    features, centres = rand(seed, b, n, 3), rand(seed + 1, b, m, 3)
    # refining to the unit vectors makes the output the weights themselves
    weights = reduce.reconstruct(features, centres, torch.eye(m).expand(b, m, m), k, tau)
    assert (weights >= 0).all() and ((weights > 0).sum(-1) <= min(k, m)).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(b, n))
    want = (-tau * (features[:, :, None] - centres[:, None]).square().sum(-1)).exp()
    far = want.argsort(-1, descending=True)[..., min(k, m) :]
    want = want.scatter(-1, far, 0.0)
    torch.testing.assert_close(weights, want / want.sum(-1, keepdim=True), atol=1e-4, rtol=1e-3)


def test_reconstruct_is_the_identity_when_every_token_is_a_centre():
    features, refined = 10 * torch.eye(6)[None], rand(0, 1, 6, 4)
    torch.testing.assert_close(reduce.reconstruct(features, features, refined, tau=1.0), refined)


@quick
@given(seeds, st.integers(1, 3), st.integers(1, 9), st.data())
def test_visible_marks_what_is_alive_and_valid(seed, b, n, data):
    m = data.draw(st.integers(1, n))
    alive, valid = positions(seed, b, n, m), torch.rand(b, m, generator=generator(seed)) < 0.5
    everything = reduce.visible(alive, n)
    assert torch.equal(everything.sum(1), torch.full((b,), m)) and everything.gather(1, alive).all()
    seen = reduce.visible(alive, n, valid)
    assert torch.equal(seen.gather(1, alive), valid) and torch.equal(seen.sum(1), valid.sum(1))
