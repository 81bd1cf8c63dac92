"""What a trace says of several forward passes in one block."""

import time

import pytest
import torch

import keeprate as kr
from keeprate.mllm.session import Stopwatch


@torch.no_grad()
def test_passes_that_were_left_alone_stand_beside_shortened_ones():
    vlm = kr.load("llava-digits")
    asked = kr.vqa("scenes", n=3, seed=0)
    first, second = (part.to(vlm.model) for part in asked.batches(vlm, 2))

    class Sometimes(kr.mllm.RandomVisual):
        """Leaves single prompts alone."""

        def before(self, t):
            return super().before(t) if len(t.x) > 1 else None

    with Sometimes(keep=0.25)(vlm.model) as trace:
        vlm.model(**first)
        vlm.model(**second)
    assert trace.layers == [0] and trace.counts()[:, 0].tolist() == [36, 36, 144]
    assert trace.kept[0].shape == (3, 144) and (trace.kept[0] >= 0).sum(1).tolist() == [36, 36, 144]
    assert trace.mask().sum(1).tolist() == [36, 36, 144]
    assert trace.scores[0][:2].isfinite().all() and trace.scores[0][2].isnan().all()


@torch.no_grad()
def test_a_prompt_that_was_refused_leaves_no_trace():
    vlm = kr.load("llava-digits")
    inputs = next(kr.vqa("scenes", n=2, seed=0).batches(vlm)).to(vlm.model)
    with kr.mllm.DivPrune(keep=145)(vlm.model) as trace:
        try:
            vlm.model(**inputs)
        except ValueError as error:
            assert "145" in str(error) and "144" in str(error)
        else:
            raise AssertionError("more tokens than there are were asked for")
    assert trace.runs == [] and trace.steps == [] and trace.kept == []
    with pytest.raises(ValueError, match="no prompt has been read yet"):
        trace.counts()


@torch.no_grad()
def test_looking_on_the_way_is_part_of_deciding():
    vlm = kr.load("llava-digits")
    inputs = next(kr.vqa("scenes", n=1, seed=0).batches(vlm)).to(vlm.model)

    class Slow(kr.mllm.FastV):
        """Takes its time before the first layer."""

        def watched(self, depth):
            return (0,)

        def observe(self, t):
            time.sleep(0.2)

    with Slow()(vlm.model) as trace:
        vlm.model(**inputs)
    assert len(trace.seconds) == 1 and trace.seconds[0] >= 0.2


@torch.no_grad()
def test_a_prompt_on_which_a_method_gave_up_leaves_no_trace():
    vlm = kr.load("llava-digits")
    one, two = (part.to(vlm.model) for part in kr.vqa("scenes", n=3, seed=0).batches(vlm, 2))

    class Picky(kr.mllm.FastV):
        """Refuses single prompts, in the middle of the model."""

        def score(self, t):
            if len(t.x) == 1:
                raise ValueError("one is too few")
            return super().score(t)

    with Picky(keep=0.25)(vlm.model) as trace:
        vlm.model(**one)
        with pytest.raises(ValueError, match="too few"):
            vlm.model(**two)
        assert len(trace.runs) == len(trace.batches) == len(trace.seconds) == 1
        vlm.model(**one)
        with pytest.raises(ValueError, match="too few"):
            vlm.model(**two)
    assert trace.batches == [2, 2] and len(trace.total) == len(trace.places) == len(trace.kept[-1]) == 4
    assert trace.counts()[:, -1].tolist() == [36] * 4


def test_on_a_gpu_only_the_blocks_count(monkeypatch):
    """Milliseconds between a block's two marks on the stream; what was queued before it is not its own."""
    now = [0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "stream of cuda:1"
            self.at = now[0]

        def synchronize(self):
            now[0] += 1000

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    watch = Stopwatch()
    for took in (5, 7):
        now[0] += 100
        with watch.running(torch.device("cuda:1")):
            now[0] += took
    assert watch.read() == pytest.approx(0.012) == watch.read()
