"""What people do with a model beside reading a prompt: training, mixed precision, other methods, mistakes."""

import pytest
import torch

import keeprate as kr
from keeprate import Budget
from keeprate.tasks.vqa import Batch

from ..conformance.multimodal import Models, inputs

EVERY = [name for name in kr.methods("mllm")["name"] if name != "OracleVisual"]  # which is made for one batch
IMAGES, LENGTHS = (((1, 1),), ((1, 1),)), (12, 15)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("uses"))


def setting(models, name: str):
    """A method, a model it works on, a batch for it."""
    method = kr.method(name)
    checkpoint = method.architectures()[0]
    return method, models(checkpoint), inputs(checkpoint, IMAGES, LENGTHS)


@pytest.mark.parametrize("name", EVERY)
def test_gradients_pass(models, name):
    method, model, batch = setting(models, name)
    try:
        with method(model):
            model(**batch, labels=batch["input_ids"].where(batch["input_ids"] < 90, -100)).loss.backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert found and all(g.isfinite().all() for g in found) and any(bool(g.any()) for g in found)
    finally:
        model.zero_grad()


@pytest.mark.parametrize("name", EVERY)
def test_autocast(models, name):
    """Keys and scores are then fp32 in places where values are not."""
    method, model, batch = setting(models, name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), method(model) as trace:
        answer = model.generate(**batch, max_new_tokens=2, do_sample=False, output_logits=True,
                                return_dict_in_generate=True)  # fmt: skip
    assert all(x.isfinite().all() for x in answer.logits)
    assert int(trace.counts()[:, -1].max()) < int(trace.total.min())


@pytest.mark.parametrize("name", ["FastV", "DivPrune", "TrimmedLlama"])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames it
def test_gradient_checkpointing_is_refused(models, name):
    method, model, batch = setting(models, name)
    model.train().gradient_checkpointing_enable()
    try:
        with pytest.raises(ValueError, match="gradient checkpointing"), method(model):
            model(**batch)
        model.eval()  # nothing is run again where nothing is trained
        with torch.no_grad(), method(model):
            model(**batch)
    finally:
        model.eval().gradient_checkpointing_disable()


@torch.no_grad()
@pytest.mark.parametrize("outer", ["mllm", "kv"])
def test_a_method_for_the_cache_at_the_same_time_is_refused(models, outer):
    model, batch = models("llava"), inputs("llava", IMAGES, LENGTHS)
    blocks = [kr.mllm.DivPrune(keep=0.5), kr.kv.KNorm(keep=0.5)]
    first, second = blocks if outer == "mllm" else blocks[::-1]
    want = model(**batch).logits
    with pytest.raises(ValueError, match="another method is at work on this cache"), first(model), second(model):
        model(**batch)
    assert torch.equal(model(**batch).logits, want)
    for method in blocks:  # one behind the other is another matter
        with method(model):
            model(**batch)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("keep", [Budget(coverage=0.5), Budget(threshold=0.01)])
def test_a_budget_by_score_works_or_says_that_there_is_none(models, name, keep):
    _, model, batch = setting(models, name)
    try:
        with torch.no_grad(), kr.method(name, keep=keep)(model) as trace:
            model(**batch)
    except ValueError as error:
        assert "keep" in str(error)  # how to state the budget instead
    else:
        assert int(trace.counts().max()) <= int(trace.total.max())


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
def test_an_empty_batch_is_refused(models, name):
    batch = {key: x[:0] for key, x in inputs(name, IMAGES, LENGTHS).items()}
    with pytest.raises(ValueError, match="batch is empty"), kr.mllm.DivPrune()(models(name)):
        models(name)(**batch)


def test_mistakes_in_the_call(models):
    method, model, _ = setting(models, "TRIM")
    for text in ("what colour is the seven", 3):
        with pytest.raises(ValueError, match="text must be a list"), method(model, text=text):
            pass
    for seed in ("a", None, -1, 0.5):
        with pytest.raises(ValueError, match="seed must be an integer"), method(model, seed=seed):
            pass
    with pytest.raises(ValueError, match=r"keep must lie in \(0, 1\]; got LlavaFor") as told:
        kr.mllm.DivPrune(model)  # the parentheses of the method forgotten
    assert len(str(told.value)) < 250
    with method(model) as trace:
        pass
    for read in (trace.counts, lambda: trace.mean_tokens):
        with pytest.raises(ValueError, match="call the model inside"):
            read()


def test_mistakes_with_questions(models):
    asked = kr.vqa("scenes", n=2)
    with pytest.raises(ValueError, match=r"takes what kr.load returns.*got LlavaFor"):
        next(asked.batches(models("llava")))
    with pytest.raises(ValueError, match=r"takes the model.*got 'cpu'"):
        Batch({}, range(0)).to("cpu")
    with pytest.raises(ValueError, match=r"methods must be a mapping.*got list"):
        kr.measure.mllm.answers(kr.load("llava-digits"), asked, [kr.mllm.DivPrune()])
