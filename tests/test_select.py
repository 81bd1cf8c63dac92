"""Selectors: exact counts, order, ties, equivariance, and agreement with independent references."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from keeprate import score, select

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(seed: int, b: int, n: int, d: int = 3, distinct: int | None = None) -> torch.Tensor:
    """[b, n, d] random points; with `distinct` they repeat a few locations."""
    g = generator(seed)
    if distinct is None:
        return torch.randn(b, n, d, generator=g)
    places = 3 * torch.randn(distinct, d, generator=g)
    return places[torch.randint(distinct, (b, n), generator=g)]


def is_sorted_unique(index: torch.Tensor) -> bool:
    return bool((index.diff(dim=1) > 0).all())


@st.composite
def tied_scores(draw, least: int = 1):
    """[b, n] scores out of five values, so that ties are the rule."""
    b, n = draw(st.integers(1, 3)), draw(st.integers(least, 24))
    rows = draw(st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=b, max_size=b))
    return torch.tensor(rows, dtype=torch.float32)


@st.composite
def shape(draw, least: int = 1, most: int = 20):
    """(b, n, k) with 1 <= k <= n."""
    n = draw(st.integers(least, most))
    return draw(st.integers(1, 3)), n, draw(st.integers(1, n))


# --- by score ---------------------------------------------------------------------------------------------------------


@quick
@given(tied_scores(), st.data())
def test_top_k_is_sorted_unique_exact_and_optimal(scores, data):
    k = data.draw(st.integers(1, scores.shape[1]))
    kept = select.top_k(scores, k)
    assert kept.shape == (len(scores), k) and is_sorted_unique(kept)
    assert kept.min() >= 0 and kept.max() < scores.shape[1]
    torch.testing.assert_close(scores.gather(1, kept).sort(1).values, scores.topk(k).values.sort(1).values)


@quick
@given(tied_scores(), st.data())
def test_top_k_gives_ties_to_the_earlier_token(scores, data):
    k = data.draw(st.integers(1, scores.shape[1]))
    for row, kept in zip(scores, select.top_k(scores, k), strict=True):
        order = sorted(range(len(row)), key=lambda i, row=row: (-row[i].item(), i))
        assert kept.tolist() == sorted(order[:k])


@quick
@given(seeds, shape())
def test_top_k_commutes_with_permutations_and_matches_torch(seed, size):
    b, n, k = size
    # a permutation of 0..n-1: no two scores of a row are equal
    scores = torch.rand(b, n, generator=generator(seed)).argsort(1).float()
    order = torch.randperm(n, generator=generator(seed + 1))
    kept, moved = select.top_k(scores, k), select.top_k(scores[:, order], k)
    assert torch.equal(order[moved].sort(1).values, kept)
    assert torch.equal(kept, scores.topk(k).indices.sort(1).values)


@quick
@given(tied_scores(), st.data())
def test_top_counts_gives_every_sample_its_number(scores, data):
    n = scores.shape[1]
    counts = torch.tensor(data.draw(st.lists(st.integers(1, n), min_size=len(scores), max_size=len(scores))))
    kept = select.top_counts(scores, counts)
    valid = torch.ones_like(kept.index, dtype=torch.bool) if kept.valid is None else kept.valid
    assert torch.equal(valid.sum(1), counts)
    assert kept.index.shape[1] == counts.max()
    for i, count in enumerate(counts.tolist()):
        own = kept.index[i][valid[i]]
        assert torch.equal(own[None], select.top_k(scores[i : i + 1], count))
        assert kept.index[i].unique().numel() == kept.index.shape[1]  # padding never repeats a position


@quick
@given(tied_scores(), st.integers(0, 5))
def test_threshold_keeps_what_reaches_it_and_the_best(scores, theta):
    kept = select.threshold(scores, float(theta))
    for i, row in enumerate(scores):
        valid = slice(None) if kept.valid is None else kept.valid[i]
        want = [j for j, s in enumerate(row.tolist()) if s >= theta] or [int(row.argmax())]
        assert kept.index[i][valid].tolist() == want


@quick
@given(tied_scores(), st.integers(1, 6))
def test_rank_bins_are_even_and_ordered(scores, bins):
    n = scores.shape[1]
    found = select.rank_bins(scores, bins)
    expected = torch.bincount(torch.arange(n) * bins // n, minlength=bins)
    for row, own in zip(scores, found, strict=True):
        assert torch.equal(torch.bincount(own, minlength=bins), expected)
        for i in range(n):
            for j in range(n):
                assert row[i] <= row[j] or own[i] <= own[j]


def test_ragged_refuses_a_sample_without_tokens():
    with pytest.raises(ValueError, match=r"samples \[1\]"):
        select.ragged(torch.tensor([[True, False], [False, False]]))


@pytest.mark.parametrize("k", [0, -1, 4])
def test_counts_outside_the_tokens_are_refused(k):
    x = torch.randn(1, 3, 2)
    flat = torch.rand(1, 3)
    calls = {
        "top_k": lambda: select.top_k(flat, k),
        "dpc_knn": lambda: select.dpc_knn(x, k),
        "k_medoids": lambda: select.k_medoids(x, k),
        "k_means": lambda: select.k_means(x, k),
        "farthest_point": lambda: select.farthest_point(x, k),
        "agglomerative": lambda: select.agglomerative(score.distance(x), k),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=rf"1\.\.3.*got {k}"):
            call()


@pytest.mark.parametrize("scores", [torch.zeros(0, 3), torch.zeros(3, 0), torch.zeros(3)])
def test_empty_scores_are_refused(scores):
    with pytest.raises(ValueError, match=r"\[batch, tokens\].*got"):
        select.top_k(scores, 1)


def test_nan_scores_are_refused_and_named():
    scores = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])
    for call in (lambda: select.top_k(scores, 1), lambda: select.inverse_cdf(scores, 1)):
        with pytest.raises(ValueError, match=r"NaN in samples \[1\]"):
            call()


# --- adaptive sampling ------------------------------------------------------------------------------------------------


@quick
@given(seeds, shape(), st.booleans())
def test_inverse_cdf_keeps_at_most_k_and_never_a_token_without_mass(seed, size, ascending):
    b, n, k = size
    g = generator(seed)
    scores = torch.rand(b, n, generator=g) ** 4
    empty = torch.rand(b, n, generator=g) < 0.4
    empty[:, int(torch.randint(n, (1,), generator=g))] = False
    scores = scores.clamp_min(1e-3).masked_fill(empty, 0.0)
    kept = select.inverse_cdf(scores, k, ascending)
    valid = torch.ones_like(kept.index, dtype=torch.bool) if kept.valid is None else kept.valid
    assert int(valid.sum(1).max()) <= k and int(valid.sum(1).min()) >= 1
    for i in range(b):
        own = kept.index[i][valid[i]]
        assert bool((own.diff() > 0).all())
        assert not empty[i][own].any()


@quick
@given(st.integers(1, 12), st.integers(1, 4), st.booleans())
def test_inverse_cdf_of_uniform_scores_is_an_even_grid(k, stride, ascending):
    kept = select.inverse_cdf(torch.ones(2, k * stride), k, ascending)
    assert kept.valid is None
    assert torch.equal(kept.index, (torch.arange(1, k + 1) * stride - 1).expand(2, k))


def test_inverse_cdf_keeps_fewer_when_scores_are_peaked():
    flat, peaked = torch.ones(20), torch.full((20,), 1e-3)
    peaked[7] = 1.0
    kept = select.inverse_cdf(torch.stack([flat, peaked]), 10)
    counts = kept.valid.sum(1)
    assert counts[0] == 10 and counts[1] < 4
    assert 7 in kept.index[1][kept.valid[1]]


@quick
@given(seeds, shape())
def test_inverse_cdf_matches_a_loop(seed, size):
    b, n, k = size
    scores = torch.rand(b, n, generator=generator(seed)).double() + 0.01
    kept = select.inverse_cdf(scores, k, ascending=True)
    for i in range(b):
        order = scores[i].argsort()
        cdf = (scores[i][order] / scores[i].sum()).cumsum(0)
        gaps = [(cdf - j / k).abs() for j in range(1, k + 1)]
        if any(len(g) > 1 and g.sort().values.diff()[0] < 1e-5 for g in gaps):
            continue  # two tokens equally near: either is right
        want = sorted({int(order[g.argmin()]) for g in gaps})
        valid = slice(None) if kept.valid is None else kept.valid[i]
        assert kept.index[i][valid].tolist() == want


@pytest.mark.parametrize("k", [0, -1, 1.5])
def test_inverse_cdf_needs_an_ordinate(k):
    with pytest.raises(ValueError, match=f"k must be .*got {k}"):
        select.inverse_cdf(torch.rand(1, 3), k)


def test_inverse_cdf_does_not_care_for_padding():
    """More ordinates than tokens are allowed, so the width of a padded batch cannot change what a sample keeps."""
    scores = torch.rand(1, 6, generator=generator(0)) + 0.1
    wide = torch.nn.functional.pad(scores, (0, 5))
    for k in (1, 4, 6, 9, 30):
        assert torch.equal(select.inverse_cdf(scores, k).index, select.inverse_cdf(wide, k).index)


def test_inverse_cdf_refuses_negative_scores():
    with pytest.raises(ValueError, match="non-negative"):
        select.inverse_cdf(torch.tensor([[1.0, -1.0]]), 1)


# --- bipartite --------------------------------------------------------------------------------------------------------


@quick
@given(seeds, st.integers(1, 3), st.integers(2, 16), st.data())
def test_bipartite_picks_the_best_edges(seed, b, n, data):
    metric = points(seed, b, n)
    source, target = torch.arange(0, n, 2), torch.arange(1, n, 2)
    r = data.draw(st.integers(1, len(source)))
    start, end = select.bipartite(metric, r, source, target)
    assert start.shape == end.shape == (b, r)
    sim = score.similarity(metric)
    for i in range(b):
        assert start[i].unique().numel() == r and set(start[i].tolist()) <= set(source.tolist())
        assert set(end[i].tolist()) <= set(target.tolist())
        best = sim[i][source][:, target].max(1).values
        taken = sim[i][start[i], end[i]]
        torch.testing.assert_close(taken.sort(descending=True).values, best.sort(descending=True).values[:r])


def test_bipartite_takes_groups_of_each_sample():
    metric = points(0, 2, 6)
    source, target = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[3, 4, 5], [0, 1, 2]])
    start, end = select.bipartite(metric, 2, source, target)
    assert start[0].max() <= 2 and end[0].min() >= 3
    assert start[1].min() >= 3 and end[1].max() <= 2


@pytest.mark.parametrize("r", [0, 3])
def test_bipartite_refuses_more_edges_than_sources(r):
    with pytest.raises(ValueError, match=rf"r must lie in 1\.\.2.*got {r}"):
        select.bipartite(points(0, 1, 4), r, torch.tensor([0, 2]), torch.tensor([1, 3]))


# --- clustering -------------------------------------------------------------------------------------------------------


def check_labels(labels: torch.Tensor, k: int) -> None:
    for row in labels:
        assert torch.equal(row.unique(), torch.arange(k)), "a cluster is empty or out of range"


@quick
@given(seeds, shape(), st.integers(1, 6), st.booleans())
def test_dpc_knn_centres_own_their_clusters(seed, size, neighbours, duplicates):
    b, n, k = size
    x = points(seed, b, n, distinct=3 if duplicates else None)
    centres, labels = select.dpc_knn(x, k, neighbours)
    assert centres.shape == (b, k) and is_sorted_unique(centres)
    check_labels(labels, k)
    assert torch.equal(labels.gather(1, centres), torch.arange(k).expand(b, k))
    gap = score.distance(x)
    own = gap.gather(2, centres.gather(1, labels)[..., None]).squeeze(-1)
    best = gap.gather(2, centres[:, None].expand(b, n, k)).amin(-1)
    torch.testing.assert_close(own, best)  # every token sits with (one of) its nearest centres


@quick
@given(seeds, st.integers(2, 5), st.integers(6, 20))
def test_dpc_knn_keeps_duplicates_together(seed, k, n):
    g = generator(seed)
    places = 10 * torch.randn(k, 3, generator=g)
    which = torch.cat([torch.arange(k), torch.randint(k, (n,), generator=g)])
    _, labels = select.dpc_knn(places[which][None], k)
    assert torch.equal(select.relabel(labels), select.relabel(which[None]))


def test_dpc_knn_keeps_many_duplicates_together():
    places = 3 * torch.randn(4, 8, generator=generator(0))
    which = torch.arange(200) % 4
    centres, labels = select.dpc_knn(places[which][None], 4)
    assert torch.equal(labels, which[None])
    assert torch.equal(which[centres], torch.arange(4)[None])


def objective(x, medoids, weight):
    """Weighted sum of distances to the nearest medoid, [b]."""
    gap = score.distance(x).gather(2, medoids[:, None].expand(-1, x.shape[1], -1)).amin(-1)
    return (gap * weight).sum(1)


@quick
@given(seeds, shape(least=2), st.booleans(), st.booleans())
def test_k_medoids_never_gets_worse(seed, size, weighted, duplicates):
    b, n, k = size
    x = points(seed, b, n, distinct=4 if duplicates else None)
    weight = torch.rand(b, n, generator=generator(seed + 1)) if weighted else None
    last = torch.full((b,), float("inf"))
    for iterations in (0, 1, 2, 4):
        medoids, labels = select.k_medoids(x, k, weight, iterations)
        assert is_sorted_unique(medoids) and medoids.min() >= 0 and medoids.max() < n
        assert torch.equal(labels.gather(1, medoids), torch.arange(k).expand(b, k))
        check_labels(labels, k)
        now = objective(x, medoids, torch.ones(b, n) if weight is None else weight)
        assert (now <= last + 1e-4).all(), (now, last)
        last = now


def test_k_medoids_finds_the_centres_of_clear_clusters():
    offsets = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    x = torch.cat([offsets, offsets + 50.0, offsets - 50.0])[None]
    medoids, labels = select.k_medoids(x, 3, iterations=3)
    assert medoids.tolist() == [[0, 5, 10]]
    assert torch.equal(labels, torch.arange(3).repeat_interleave(5)[None])
    # weights decide where it starts and what a medoid costs: the heavy corner of each cluster wins over its centre
    weight = torch.ones(1, 15)
    weight[0, [1, 6, 11]] = 20.0
    assert select.k_medoids(x, 3, weight, iterations=3)[0].tolist() == [[1, 6, 11]]


@quick
@given(seeds, st.integers(1, 12))
def test_clusterings_into_n_are_the_identity(seed, n):
    x = points(seed, 2, n)
    own = torch.arange(n).expand(2, n)
    for medoids, labels in (select.k_medoids(x, n), select.dpc_knn(x, n)):
        assert torch.equal(medoids, own) and torch.equal(labels, own)
    for labels in (select.k_means(x, n), select.agglomerative(score.distance(x), n)):
        assert torch.equal(select.relabel(labels), own)
    assert torch.equal(select.farthest_point(x, n), own)


def inertia(x, labels, k, weight):
    """Weighted sum of squared distances to the weighted cluster means, [b]."""
    member = torch.zeros(len(x), k, x.shape[1]).scatter(1, labels[:, None], weight[:, None])
    mean = member @ x / member.sum(-1, keepdim=True).clamp_min(1e-12)
    own = mean.gather(1, labels[..., None].expand_as(x))
    return ((x - own).square().sum(-1) * weight).sum(1)


@quick
@given(seeds, shape(least=2), st.booleans())
def test_k_means_never_gets_worse(seed, size, weighted):
    b, n, k = size
    x = points(seed, b, n)
    weight = torch.rand(b, n, generator=generator(seed + 1)) + 0.1 if weighted else None
    mass = torch.ones(b, n) if weight is None else weight
    last = torch.full((b,), float("inf"))
    for iterations in (1, 2, 3, 6):
        labels = select.k_means(x, k, weight, iterations)
        check_labels(labels, k)
        now = inertia(x, labels, k, mass)
        assert (now <= last + 1e-4).all(), (now, last)
        last = now


@quick
@given(seeds, shape(least=2), st.integers(1, 3), st.booleans())
def test_k_means_leaves_no_cluster_empty(seed, size, distinct, weighted):
    b, n, k = size
    weight = torch.rand(b, n, generator=generator(seed)).round() if weighted else None  # zero weights too
    check_labels(select.k_means(points(seed, b, n, distinct=distinct), k, weight), k)


@quick
@given(seeds, shape(least=3))  # two points are equally far from their mean
def test_farthest_point_matches_a_greedy_loop(seed, size):
    b, n, k = size
    x = points(seed, b, n)
    chosen = select.farthest_point(x, k)
    assert is_sorted_unique(chosen)
    for i in range(b):
        p = x[i].double()
        want = [int((p - p.mean(0)).norm(dim=-1).argmin())]
        while len(want) < k:
            gap = torch.cdist(p, p[want]).amin(1)
            gap[want] = -1
            want.append(int(gap.argmax()))
        assert chosen[i].tolist() == sorted(want)


@quick
@given(seeds, shape(), st.integers(1, 3))
def test_farthest_point_is_unique_among_duplicates(seed, size, distinct):
    b, n, k = size
    assert is_sorted_unique(select.farthest_point(points(seed, b, n, distinct=distinct), k))


def partition(labels) -> set[frozenset[int]]:
    labels = np.asarray(labels)
    return {frozenset(np.flatnonzero(labels == c).tolist()) for c in set(labels.tolist())}


@settings(max_examples=60, deadline=None)
@given(seeds, shape(least=2, most=40), st.sampled_from(["single", "complete", "average"]))
def test_agglomerative_equals_scipy(seed, size, how):
    b, n, k = size
    gap = score.distance(points(seed, b, n, d=4))
    labels = select.agglomerative(gap, k, how)
    check_labels(labels, k)
    for i in range(b):
        tree = linkage(squareform(gap[i].double().numpy(), checks=False), how)
        assert partition(labels[i]) == partition(fcluster(tree, k, "maxclust")), (n, k, how)


@pytest.mark.parametrize("how", ["single", "complete", "average"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (2, 2), (3, 1), (197, 1), (197, 59), (197, 197)])
def test_agglomerative_equals_scipy_at_the_edges(n, k, how):
    gap = score.distance(points(n, 1, n, d=8))
    labels = select.agglomerative(gap, k, how)
    if n == 1:
        assert labels.tolist() == [[0]]
        return
    tree = linkage(squareform(gap[0].double().numpy(), checks=False), how)
    assert partition(labels[0]) == partition(fcluster(tree, k, "maxclust"))


@quick
@given(seeds, shape(), st.integers(1, 3), st.sampled_from(["single", "complete", "average"]))
def test_agglomerative_gives_exactly_k_clusters_among_ties(seed, size, distinct, how):
    b, n, k = size
    gap = score.distance(points(seed, b, n, distinct=distinct))
    check_labels(select.agglomerative(gap, k, how), k)


def test_agglomerative_refuses_an_unknown_linkage():
    with pytest.raises(ValueError, match=r"'single', .*'complete'.* 'average'.*got 'ward'"):
        select.agglomerative(torch.zeros(1, 3, 3), 2, "ward")


@quick
@given(st.lists(st.integers(0, 9), min_size=10, max_size=10))
def test_relabel_numbers_by_first_appearance(labels):
    names = list(dict.fromkeys(labels))
    assert select.relabel(torch.tensor([labels])).tolist() == [[names.index(c) for c in labels]]


@quick
@given(seeds, shape(least=2))
def test_nearest_gives_every_centre_its_own_label(seed, size):
    b, n, k = size
    x = points(seed, b, n, distinct=2)
    centres = torch.rand(b, n, generator=generator(seed)).argsort(1)[:, :k].sort(1).values
    labels = select.nearest(score.distance(x), centres)
    assert torch.equal(labels.gather(1, centres), torch.arange(k).expand(b, k))


@pytest.mark.parametrize("how", ["dpc_knn", "k_medoids", "k_means", "farthest_point", "agglomerative"])
def test_samples_of_a_batch_are_independent(how):
    x = points(3, 3, 15)
    other = x.clone()
    other[1] = points(4, 1, 15)[0] * 5

    def run(y):
        out = select.agglomerative(score.distance(y), 4) if how == "agglomerative" else getattr(select, how)(y, 4)
        return out if isinstance(out, tuple) else (out,)

    for a, b in zip(run(x), run(other), strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert torch.equal(run(x[:1])[0], run(x)[0][:1])


# --- by head ----------------------------------------------------------------------------------------------------------


@st.composite
def headed(draw):
    """Scores [b, g, n] with ties, counts [b, g], a mask of what is protected and one of what exists."""
    b, g, n = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 12))
    rng = generator(draw(seeds))
    valid = torch.rand(b, g, n, generator=rng) < 0.8
    valid[..., -1] = True
    scores = torch.randint(0, 5, (b, g, n), generator=rng).float()
    protect = torch.rand(b, g, n, generator=rng) < 0.2
    return scores, torch.randint(1, n + 1, (b, g), generator=rng), protect, valid


def best_slots(scores: torch.Tensor, first: torch.Tensor, there: torch.Tensor, count: int) -> list[int]:
    """The slots of one head that are protected, then those of the highest scores, earlier ones first among equals."""
    slots = [j for j in range(len(scores)) if there[j]]
    return sorted(slots, key=lambda j: (not first[j], -float(scores[j]), j))[:count]


@quick
@given(headed(), st.booleans(), st.booleans())
def test_keep_top_takes_the_protected_then_the_best(case, shield, padding):
    scores, counts, protect, valid = case
    protect, valid = protect if shield else None, valid if padding else None
    kept = select.keep_top(scores, counts, protect, valid)
    b, g, n = scores.shape
    for i in range(b):
        for h in range(g):
            there = torch.ones(n, dtype=torch.bool) if valid is None else valid[i, h]
            first = torch.zeros(n, dtype=torch.bool) if protect is None else protect[i, h] & there
            count = max(int(first.sum()), min(int(counts[i, h]), int(there.sum())))
            real = torch.ones_like(kept.index[i, h], dtype=torch.bool) if kept.valid is None else kept.valid[i, h]
            got = kept.index[i, h][real].tolist()
            assert got == sorted(best_slots(scores[i, h], first, there, count))
            assert real.tolist() == sorted(real.tolist(), reverse=True), "padding comes last"
    assert kept.valid is None or not bool(kept.valid.all())


def test_keep_top_refuses_nan_among_tokens_only():
    scores = torch.zeros(2, 1, 3)
    scores[1, 0, 2] = float("nan")
    with pytest.raises(ValueError, match=r"\[1\]"):
        select.keep_top(scores, torch.ones(2, 1, dtype=torch.long))
    kept = select.keep_top(scores, torch.full((2, 1), 3), valid=~scores.isnan())
    assert kept.mask(3).tolist() == [[[True] * 3], [[True, True, False]]]


def test_keep_top_broadcasts_what_is_protected():
    kept = select.keep_top(
        torch.arange(6.0).expand(2, 3, 6), torch.full((2, 3), 3), torch.tensor([1, 0, 0, 0, 0, 0]).bool()[None, None]
    )
    assert bool((kept.index == torch.tensor([0, 4, 5])).all()) and kept.valid is None


@quick
@given(headed())
def test_kept_mask_and_ragged_heads_are_inverse(case):
    keep = case[2]
    keep[0, 0, 0] = True  # one head at least has something
    kept = select.ragged_heads(keep)
    assert torch.equal(kept.mask(keep.shape[-1]), keep)
    assert kept.index.shape[-1] == int(keep.sum(-1).max())
    for row, there in zip(
        kept.index.flatten(0, 1), kept.mask(keep.shape[-1]).flatten(0, 1).sum(-1).tolist(), strict=True
    ):
        assert row.unique().numel() == row.numel(), "padding is no slot twice"
        assert (row[:there].diff() > 0).all()


def test_kept_mask_leaves_padding_out():
    index = torch.tensor([[2, 4, 0], [1, 1, 1]])
    assert select.Kept(index[:1]).mask(5).tolist() == [[True, False, True, False, True]]
    padded = select.Kept(index, torch.tensor([[True, True, False], [True, False, False]]))
    assert padded.mask(5).tolist() == [[False, False, True, False, True], [False, True, False, False, False]]


@quick
@given(headed(), st.booleans(), st.booleans(), st.data())
def test_pooled_counts_follow_a_greedy_loop(case, shield, padding, data):
    scores, _, protect, valid = case
    protect, valid = protect if shield else None, valid if padding else None
    b, g, n = scores.shape
    scores = scores + torch.arange(b * g * n).view(b, g, n) / 1e4  # no ties: how they break among heads is no promise
    sure = torch.randint(0, n + 1, (b, g), generator=generator(data.draw(seeds)))
    total = torch.randint(1, g * n + 1, (b,), generator=generator(data.draw(seeds)))
    counts = select.pooled_counts(scores, total, sure, protect, valid)
    for i in range(b):
        held, pool = [], []
        for h in range(g):
            there = torch.ones(n, dtype=torch.bool) if valid is None else valid[i, h]
            first = torch.zeros(n, dtype=torch.bool) if protect is None else protect[i, h] & there
            order = best_slots(scores[i, h], first, there, n)
            least = max(int(first.sum()), min(int(sure[i, h]), len(order)))
            held.append(least)
            pool += [(float(scores[i, h, j]), h) for j in order[least:]]
        for _, h in sorted(pool, reverse=True)[: max(0, int(total[i]) - sum(held))]:
            held[h] += 1
        assert counts[i].tolist() == held
