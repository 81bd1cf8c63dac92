"""Budget: one value for every way of saying how many tokens may survive."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keeprate import Budget
from keeprate.budget import fraction

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (0.5, Budget(keep=0.5)),
        (1, Budget(keep=1.0)),
        (1.0, Budget(keep=1.0)),
        (64, Budget(tokens=64)),
        ((0.7, 20), Budget(schedule=(0.7, 20))),
        ([0.7, 20], Budget(schedule=(0.7, 20))),
        (Budget(coverage=0.9), Budget(coverage=0.9)),
    ],
)
def test_of_reads_every_shorthand(value, want):
    assert Budget.of(value) == want


@pytest.mark.parametrize("value", [0, -0.1, -3, 1.5, math.nan, math.inf, "a", None, True])
def test_of_refuses_what_is_no_budget(value):
    with pytest.raises(ValueError, match=r"\(0, 1\]") as error:
        Budget.of(value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"exactly one of .*got \[\]"),
        ({"keep": 0.5, "tokens": 3}, r"exactly one of .*got \['keep', 'tokens'\]"),
        ({"tokens": 0}, "integer of at least 1; got 0"),
        ({"tokens": 2.5}, r"2\.5"),
        ({"tokens": True}, "integer of at least 1; got True"),
        ({"schedule": ()}, "at least one entry"),
        ({"schedule": (0.5, 1.5)}, r"\(0, 1\]; got 1\.5"),
        ({"schedule": (0.5, 0)}, "integer of at least 1; got 0"),
        ({"schedule": (0.5, "a")}, "integer of at least 1; got 'a'"),
        ({"coverage": 1.5}, r"coverage must lie in \(0, 1\]; got 1\.5"),
        ({"threshold": math.nan}, "threshold must be .*; got nan"),
        ({"keep": 0.5, "floor": 1.5}, r"floor must .*\[0, 1\]; got 1\.5"),
        ({"keep": 0.5, "floor": -0.1}, r"floor must .*\[0, 1\]; got -0\.1"),
    ],
)
def test_contradictions_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Budget(**given)


def test_fraction_names_its_argument():
    with pytest.raises(ValueError, match=r"rho must lie in \(0, 1\]; got 2"):
        fraction("rho", 2)


@quick
@given(st.integers(1, 99), st.integers(1, 12), st.integers(1, 1000))
def test_count_of_a_keep_rate_is_geometric(percent, stage, total):
    keep = percent / 100
    exact = total * percent**stage // 100**stage  # in integers, free of rounding
    found = Budget(keep=keep).count(stage, total)
    assert found == max(1, exact)
    assert found >= Budget(keep=keep).count(stage + 1, total)


@pytest.mark.parametrize(
    ("keep", "stage", "want"), [(0.5, 1, 98), (0.5, 2, 49), (0.7, 3, 67), (0.9, 1, 176), (1.0, 9, 196)]
)
def test_counts_of_the_papers(keep, stage, want):
    assert Budget(keep=keep).count(stage, 196) == want


def test_count_of_tokens_and_schedules():
    assert [Budget(tokens=30).count(stage, 196) for stage in (1, 2)] == [30, 30]
    schedule = Budget(schedule=(0.5, 40, 0.1))
    assert [schedule.count(stage, 196) for stage in (1, 2, 3)] == [98, 40, 19]
    with pytest.raises(ValueError, match="3 entries but reduction 4"):
        schedule.count(4, 196)


@pytest.mark.parametrize("budget", [Budget(coverage=0.9), Budget(threshold=0.1)])
def test_ragged_budgets_have_no_count(budget):
    assert budget.ragged and not Budget(keep=0.5).ragged
    with pytest.raises(ValueError, match="before scores are known"):
        budget.count(1, 196)


@quick
@given(seeds, st.integers(1, 3), st.integers(1, 20), st.floats(0.05, 1.0))
def test_coverage_keeps_the_fewest_that_cover(seed, b, n, coverage):
    scores = torch.rand(b, n, generator=torch.Generator().manual_seed(seed)) + 1e-3
    for row, count in zip(scores, Budget(coverage=coverage).counts(scores).tolist(), strict=True):
        mass = (row / row.sum()).sort(descending=True).values.double()
        assert mass[:count].sum() >= coverage - 1e-4
        assert count == 1 or mass[: count - 1].sum() < coverage + 1e-4


@quick
@given(seeds, st.integers(1, 3), st.integers(1, 20), st.floats(-1.0, 2.0))
def test_threshold_counts_and_keeps_at_least_one(seed, b, n, theta):
    scores = torch.rand(b, n, generator=torch.Generator().manual_seed(seed))
    found = Budget(threshold=theta).counts(scores)
    assert found.tolist() == [max(1, sum(s >= theta for s in row)) for row in scores.tolist()]


def test_counts_never_exceed_the_tokens_that_exist():
    scores = torch.tensor([[0.5, 0.2, 0.3, 0.1], [0.5, 0.2, float("-inf"), float("-inf")]])
    for budget in (Budget(tokens=3), Budget(coverage=1.0), Budget(threshold=0.0), Budget(keep=1.0)):
        counts = budget.counts(scores)
        assert counts[1] == 2, budget
        assert counts[0] in (3, 4)
    assert Budget(keep=0.5).counts(scores, total=8).tolist() == [4, 2]


@quick
@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 12), st.integers(2, 12), st.floats(0, 1))
def test_allocate_splits_the_pool_and_respects_the_floor(seed, b, groups, n, tokens, floor):
    scores = torch.rand(b, groups, n, generator=torch.Generator().manual_seed(seed))
    each = min(tokens, n)
    counts = Budget(tokens=tokens, floor=floor).allocate(scores)
    assert counts.shape == (b, groups)
    assert (counts.sum(1) == groups * each).all()
    assert (counts >= int(floor * each)).all() and (counts <= n).all()


def test_allocate_gives_more_to_the_group_with_the_high_scores():
    scores = torch.tensor([[[9.0, 8.0, 7.0, 6.0], [0.4, 0.3, 0.2, 0.1]]])
    assert Budget(tokens=2).allocate(scores).tolist() == [[4, 0]]
    assert Budget(tokens=2, floor=0.5).allocate(scores).tolist() == [[3, 1]]
    assert Budget(tokens=2, floor=1.0).allocate(scores).tolist() == [[2, 2]]


def test_budgets_are_values():
    assert Budget(keep=0.5) == Budget(keep=0.5) and hash(Budget(keep=0.5)) == hash(Budget.of(0.5))
    assert eval(repr(Budget(schedule=(0.5, 3)))) == Budget(schedule=(0.5, 3))


@quick
@given(st.lists(st.integers(1, 500), min_size=1, max_size=5), st.floats(0.01, 1.0), st.integers(1, 3))
def test_each_is_a_share_of_every_length_at_every_stage(lengths, keep, stage):
    counts = Budget(keep=keep).each(torch.tensor(lengths), stage)
    for length, count in zip(lengths, counts.tolist(), strict=True):
        assert 1 <= count <= length and count <= length * keep + 1 and count > length * keep - 1
    assert counts.tolist() == [Budget(keep=keep).of_length(length, stage) for length in lengths]


@quick
@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(1, 60))
def test_each_never_asks_for_more_than_there_is(lengths, tokens):
    counts = Budget(tokens=tokens).each(torch.tensor(lengths))
    assert counts.tolist() == [min(tokens, length) for length in lengths]
    assert counts.tolist() == [Budget(tokens=tokens).of_length(length) for length in lengths]


def test_each_does_not_lose_a_token_to_rounding():
    lengths = torch.arange(1, 1025)
    for hundredth in range(1, 101):
        budget, want = Budget(keep=hundredth / 100), (lengths * hundredth // 100).clamp_min(1)
        assert torch.equal(budget.each(lengths), want), hundredth
        assert [budget.of_length(n) for n in (1, 100, 900)] == want[[0, 99, 899]].tolist()


def test_each_reads_a_schedule_by_stage():
    budget = Budget(schedule=(0.5, 7))
    lengths = torch.tensor([20, 5])
    assert budget.each(lengths, 1).tolist() == [10, 2] and budget.each(lengths, 2).tolist() == [7, 5]
    assert budget.of_length(20, 1) == 10 and budget.of_length(5, 2) == 5
    for ask in (budget.each, lambda lengths, stage: budget.of_length(20, stage)):
        with pytest.raises(ValueError, match="2 entries but reduction 3"):
            ask(lengths, 3)


@pytest.mark.parametrize("budget", [Budget(coverage=0.9), Budget(threshold=0.1)])
def test_each_cannot_know_what_depends_on_scores(budget):
    for ask in (lambda: budget.each(torch.tensor([9])), lambda: budget.of_length(9)):
        with pytest.raises(ValueError, match="before scores are known"):
            ask()


def test_numbers_of_numpy_are_numbers():
    assert Budget.of(np.int64(9)) == Budget(tokens=9) and type(Budget.of(np.int64(9)).tokens) is int
    assert Budget.of(np.float32(0.5)) == Budget(keep=0.5)
    assert Budget.of((np.int32(7), np.float64(0.25))) == Budget(schedule=(7, 0.25))
    with pytest.raises(ValueError, match=r"keep must lie in \(0, 1\]; got -3"):
        Budget.of(np.int64(-3))
