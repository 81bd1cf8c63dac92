"""One look at the images, shown to methods, equals the encoder's own work on every multimodal architecture."""

import pytest
import torch

import keeprate as kr
from keeprate.measure.sight import Sight

from .multimodal import MULTIMODAL, Models, inputs

METHODS = ("FasterVLM", "VisionZip", "FastV", "FlowCut", "TrimmedLlama")  # attention, a block's output, none, inside
WORKS_INSIDE = {"FlowCut"}
IMAGES = (((1, 2),), ((1, 1), (1, 1)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("sight"))


@pytest.mark.parametrize("name", MULTIMODAL)
@torch.no_grad()
def test_shown_equals_seen(models, name):
    model, prompt = models(name), inputs(name, IMAGES, (12, 15))
    sight = Sight(model)
    with sight.watch():
        plain = model(**prompt).logits
    windows = name == "qwen2_5_vl"  # says at every look how it groups the patches
    tried = 0
    for each in METHODS:
        method = kr.method(each)
        if MULTIMODAL[name][0] not in method.architectures():
            continue
        with method(model) as real:
            expected = model(**prompt).logits
        sight.looked = 0
        with sight.show(), method(model) as trace:
            shown = model(**prompt).logits
        assert torch.equal(shown, expected) and not torch.equal(shown, plain)
        assert all(map(torch.equal, trace.kept, real.kept))
        assert sight.looked == (windows or each in WORKS_INSIDE)
        tried += 1
    assert tried >= 1
    assert torch.equal(model(**prompt).logits, plain)
