"""Trace: batches of several forward passes join, padding stays recognisable, counts follow the steps."""

import torch

from keeprate.trace import Step, Trace


def step(layer: int, kept: list[list[int]], n0: int, score: bool = False) -> Step:
    """A pure pruning step that keeps the given patches, padded with -1."""
    kept = torch.tensor(kept)
    assignment = torch.full((len(kept), n0 + 1), -1)
    assignment = assignment.scatter(1, kept + 1, torch.arange(kept.shape[1]).expand_as(kept))[:, 1:]
    return Step(layer, kept, (kept >= 0).long(), assignment, torch.rand(len(kept), n0) if score else None)


def trace_of(*runs: list[Step]) -> Trace:
    return Trace("X()", (2, 2), 1, 3, list(runs), [len(run[0].kept) for run in runs])


def test_an_empty_trace_is_empty():
    trace = Trace("X()", (2, 2), 1, 3)
    assert trace.steps == trace.kept == trace.sizes == trace.assignments == trace.scores == trace.layers == []
    assert trace.counts().shape == (0, 3)


def test_one_run_is_given_as_it_is():
    steps = [step(1, [[0, 1, 3], [1, 2, 3]], 4, True), step(3, [[0, 3], [2, 3]], 4)]
    trace = trace_of(steps)
    assert trace.layers == [1, 3]
    assert torch.equal(trace.kept[1], steps[1].kept) and torch.equal(trace.sizes[0], steps[0].size)
    assert torch.equal(trace.scores[0], steps[0].score) and trace.scores[1] is None
    assert trace.counts().tolist() == [[3, 3, 2], [3, 3, 2]]


def test_runs_join_along_the_batch_and_narrow_ones_are_padded():
    wide, narrow = [step(2, [[0, 1, 2]], 4, True)], [step(2, [[1, 3], [0, -1]], 4, True)]
    trace = trace_of(wide, narrow)
    assert trace.kept[0].tolist() == [[0, 1, 2], [1, 3, -1], [0, -1, -1]]
    assert trace.sizes[0].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert trace.assignments[0].tolist() == [[0, 1, 2, -1], [-1, 0, -1, 1], [0, -1, -1, -1]]
    assert trace.scores[0].shape == (3, 4)
    assert trace.counts().tolist() == [[4, 3, 3], [4, 2, 2], [4, 1, 1]]


def test_mask_marks_the_patches_that_stand_for_themselves():
    trace = trace_of([step(1, [[0, 1, 3], [2, -1, -1]], 4), step(2, [[3, -1], [2, -1]], 4)])
    assert trace.mask().tolist() == [[False, False, False, True], [False, False, True, False]]
    assert trace.mask(0).tolist() == [[True, True, False, True], [False, False, True, False]]


def test_runs_with_and_without_scores_join():
    # a ragged budget may drop nothing in one forward (no scores) and something in the next
    for first, second in ((True, False), (False, True)):
        trace = trace_of([step(1, [[0, 1]], 4, first)], [step(1, [[1, 2]], 4, second)])
        assert trace.kept[0].tolist() == [[0, 1], [1, 2]]
        known = trace.scores[0].isfinite().all(1)
        assert known.tolist() == [first, second]


def test_runs_of_different_image_sizes_join():
    trace = trace_of([step(1, [[0, 3]], 4, True)], [step(1, [[1, 8]], 9, True)])
    assert trace.kept[0].tolist() == [[0, 3], [1, 8]]
    assert trace.assignments[0].tolist() == [[0, -1, -1, 1] + [-1] * 5, [-1, 0] + [-1] * 6 + [1]]
