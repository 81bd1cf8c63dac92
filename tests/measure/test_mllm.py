"""Measuring visual-token methods: shown images equal real ones, shares equal counting, answers equal generating."""

from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from keeprate import mllm
from keeprate.measure import mllm as M
from keeprate.measure.sight import Sight
from keeprate.models import Loaded
from keeprate.tasks import scenes, vqa
from keeprate.trace import Step

N0 = scenes.GRID**2
METHODS = {
    "dense": None,
    "random": mllm.RandomVisual(keep=24),
    "cls": mllm.FasterVLM(keep=24),
    "div": mllm.DivPrune(keep=24),
    "fastv": mllm.FastV(keep=24),
    "pdrop": mllm.PyramidDrop(),
    "pool": mllm.Pooling(keep=24),
    "oracle": mllm.OracleVisual(keep=24),
}


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """A LLaVA with random weights and as many visual tokens as the scenes have patches; one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<image>"]
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate([*special, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    side = {"height": scenes.SIDE, "width": scenes.SIDE}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": scenes.SIDE}, crop_size=side),
        tokenizer,
        patch_size=scenes.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=scenes.SIDE,
        patch_size=scenes.PATCH,
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        pad_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=3, image_seq_length=N0, vision_feature_layer=-2
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 4 if weight.dim() > 1 else 1  # peaked attention, answers that depend on the image
    # here for good, since a hook that appears tells `Sight` that somebody works inside the encoder
    model.model.vision_tower.embeddings.patch_embedding.register_forward_hook(lambda *a: LOOKS.append(1))
    return Loaded("tiny", model, processor)


@pytest.fixture(scope="module")
def task() -> vqa.VQA:
    return vqa.vqa(n=10)


@pytest.fixture(scope="module")
def table(loaded, task) -> pd.DataFrame:
    return M.answers(loaded, task, METHODS, batch=4, progress=False)


LOOKS: list[int] = []  # grows whenever the vision encoder really works


def looks(loaded, run) -> int:
    """How often the vision encoder really works while `run` is called."""
    before = len(LOOKS)
    run()
    return len(LOOKS) - before


# --- one look for all -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "oracle"])
@torch.no_grad()
def test_what_is_shown_is_what_is_seen(loaded, task, name, memory):
    model, method = loaded.model, METHODS[name]
    inputs = next(task.batches(loaded, 3)).to(model)
    sight = Sight(model, memory)
    with sight.watch():
        model(**inputs)
    for _ in range(2):  # nothing that a method does spoils the record
        with nullcontext() if method is None else method(model, seed=4) as real:
            expected = model(**inputs).logits
        with sight.show(), nullcontext() if method is None else method(model, seed=4) as trace:
            logits = []
            assert looks(loaded, lambda to=logits: to.append(model(**inputs).logits)) == 0
        assert torch.equal(logits[0], expected)
        if method is not None:
            assert all(map(torch.equal, trace.kept, real.kept)) and trace.places.equal(real.places)


@torch.no_grad()
def test_the_encoder_works_only_for_what_it_has_not_seen(loaded, task):
    model = loaded.model
    first, second = (batch.to(model) for batch in list(task.batches(loaded, 5))[:2])
    sight = Sight(model)
    with sight.watch():
        assert looks(loaded, lambda: model(**first)) == 1
    with sight.show():
        assert looks(loaded, lambda: model(**first)) == 0
        assert looks(loaded, lambda: model(**second)) == 1
        tower = model.model.vision_tower
        heard = []
        block = tower.encoder.layers[
            1
        ]  # the block before the features: someone who looks on is told, one who acts acts
        with block.register_forward_hook(lambda *told: heard.append(told[2])):
            assert looks(loaded, lambda: model(**first)) == 0
        with block.register_forward_hook(lambda *told, **more: heard.append(told[3]), with_kwargs=True):
            assert looks(loaded, lambda: model(**first)) == 0
        features = model.get_image_features(pixel_values=first["pixel_values"], output_hidden_states=True)
        assert len(heard) == 2 and all(x.equal(features.hidden_states[-2]) for x in heard)
        for act in (
            lambda: block.register_forward_hook(lambda *told: 2 * told[2]),
            lambda: block.register_forward_pre_hook(lambda *told: None),
            lambda: block.mlp.register_forward_hook(lambda *told: None),
        ):
            with act():
                assert looks(loaded, lambda: model(**first)) == 1
        assert looks(loaded, lambda: model(**first)) == 0
    assert looks(loaded, lambda: model(**first)) == 1, "outside the block the model is as it was"
    assert "forward" not in model.model.vision_tower.__dict__


@torch.no_grad()
def test_an_encoder_with_windows_looks_every_time(loaded, task, monkeypatch):
    model = loaded.model
    inputs = next(task.batches(loaded, 2)).to(model)
    monkeypatch.setattr(model.model.vision_tower, "permute_input_for_window_attn", None, raising=False)
    sight = Sight(model)
    with sight.watch():
        model(**inputs)
    with sight.show():
        assert looks(loaded, lambda: model(**inputs)) == 1


# --- what was kept against what was needed ----------------------------------------------------------------------------


def test_located_counts(loaded):
    """Two samples of 6 and 4 tokens through 3 layers: layer 0 holds all, then a drop, then a merge, by hand."""
    trace = mllm.MLLMTrace("by hand", depth=3)
    trace.total, trace.batches = torch.tensor([6, 4]), [2]
    kept = torch.tensor([[0, 2, 3, 5], [0, 1, -1, -1]])
    home = torch.tensor([[0, -1, 1, 2, -1, 3], [0, 1, -1, -1, -1, -1]])
    score = torch.tensor([[5.0, 1, 4, 3, 2, 6], [2, 1, 0, 0, float("nan"), float("nan")]])
    later = torch.tensor([[0, 5], [0, -1]])
    merged = torch.tensor([[0, -1, 0, 1, -1, 1], [0, 0, -1, -1, -1, -1]])
    trace.runs = [[Step(1, kept, (kept >= 0).long(), home, score), Step(2, later, (later >= 0).long(), merged)]]
    needed = torch.tensor([[True, True, False, True, False, False], [False, True, False, False, True, True]])
    told = M.located(trace, needed)
    # the second sample needs token 1 alone: 4 and 5 are padding
    assert torch.allclose(told["found"], torch.tensor([(1 + 2 / 3 + 1 / 3) / 3, (1 + 1 + 0) / 3]))
    assert torch.allclose(told["represented"], torch.tensor([(1 + 2 / 3 + 2 / 3) / 3, 1.0]))
    assert torch.allclose(told["possible"], torch.tensor([(1 + 1 + 2 / 3) / 3, 1.0]))
    assert torch.allclose(told["chance"], torch.tensor([(6 + 4 + 2) / 18, (4 + 2 + 1) / 12]))
    # needed scores 5, 1, 3 against 4, 2, 6: pairs won 2 + 0 + 1 of 9; sample two: 1 against 2, 0, 0
    assert torch.allclose(told["auroc"], torch.tensor([3 / 9, 2 / 3]))
    empty = M.located(trace, torch.zeros_like(needed))
    assert all(x.isnan().all() for x in empty.values())
    for wrong in (needed[:, :5], needed.float(), needed[:1]):
        with pytest.raises(ValueError, match=r"boolean \[2, 6\]"):
            M.located(trace, wrong)


def test_the_oracle_finds_what_can_be_found(table):
    asked = table[(table["question"] == "needle")].set_index(["method", "sample"])
    oracle, dense = asked.loc["oracle"], asked.loc["dense"]
    assert np.allclose(oracle["found"], oracle["possible"]) and (oracle["auroc"] == 1.0).all()
    assert (dense["found"] == 1.0).all() and (dense["tokens"] == N0).all() and dense["auroc"].isna().all()
    for name in METHODS:
        rows = asked.loc[name]
        assert (rows["found"] <= rows["possible"] + 1e-6).all() and (rows["found"] <= rows["represented"]).all()
        assert np.allclose(rows["chance"], rows["tokens"] / N0)
    assert (asked.loc["pool"]["represented"] == 1.0).all(), "pooling drops nothing"


def test_tokens_are_those_a_layer_processes(table):
    tokens = table.groupby("method")["tokens"].first()
    assert tokens["random"] == tokens["cls"] == 24
    assert tokens["fastv"] == (2 * N0 + 2 * 24) / 4  # before layer 2 of 4


# --- answers ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_answers_are_what_the_model_generates(loaded, task, table):
    model, processor = loaded.model, loaded.processor
    for name in ("dense", "cls", "fastv"):
        method = METHODS[name]
        rows = table[table["method"] == name].set_index("sample")
        for i in (0, 6):
            inputs = processor(images=task.images[i], text=task.prompt(processor, i), return_tensors="pt")
            whole = model(**inputs).logits[:, -1].log_softmax(-1)
            with nullcontext() if method is None else method(model):
                own = model(**inputs).logits[:, -1].log_softmax(-1)
                made = model.generate(**inputs, max_new_tokens=task.new_tokens, do_sample=False)
            text = processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
            assert rows["answer"][i] == text.strip()
            assert rows["kl"][i] == pytest.approx(float((whole.exp() * (whole - own)).sum()), abs=1e-4)
            assert rows["correct"][i] == bool(task.score([text.strip()], [i])[0])
    plain = table[table["method"] == "dense"].set_index("sample")["answer"]
    assert (table["agree"] == (table["answer"] == table["sample"].map(plain))).all()
    assert len(set(plain)) > 1, "a model that always says the same would test nothing"
    assert table[table["method"] == "dense"]["kl"].max() == 0.0


def test_batches_may_be_made_before(loaded, task, table):
    made = list(task.batches(loaded, 5))
    again = M.answers(loaded, task, {"cls": METHODS["cls"]}, batch=made, progress=False)
    first = table[table["method"] == "cls"].reset_index(drop=True)
    assert again["answer"].equals(first["answer"]) and again["sample"].tolist() == list(range(10))
    assert np.allclose(again["kl"], first["kl"], atol=1e-5)


def test_the_encoder_looks_once_a_batch(loaded, task):
    some = {name: METHODS[name] for name in ("dense", "random", "cls", "fastv")}
    assert looks(loaded, lambda: M.answers(loaded, task, some, batch=5, progress=False)) == 2


def test_summary_by_kind(table):
    parts = M.summarise(table, ("method", "question"))
    assert set(parts["question"]) == {"needle", "gist"} and "accuracy" in parts and "found" in parts
    kinds = M.summarise(table, ("method", "kind"))
    assert len(kinds) == len(METHODS) * len(scenes.KINDS)
    one = kinds[(kinds["method"] == "cls") & (kinds["kind"] == "gist")].iloc[0]
    rows = table[(table["method"] == "cls") & (table["kind"] == "gist")]
    assert one["agree"] == rows["agree"].mean() and one["n"] == len(rows)
    assert one["agree_low"] < one["agree"] + 1e-9 < one["agree_high"] + 1e-9


def test_a_task_without_truth(loaded, task):
    blind = vqa.VQA("blind", "test", "yesno", task.images, task.questions, [("yes",)] * len(task), ["all"] * len(task))
    some = {"dense": None, "cls": METHODS["cls"]}
    told = M.answers(loaded, blind, some, batch=10, progress=False, new_tokens=2)
    assert told[["found", "represented", "possible", "chance", "auroc"]].isna().all().all()
    assert set(told["question"]) == {"unknown"} and told["tokens"].tolist() == [float(N0)] * 10 + [24.0] * 10
    with pytest.raises(ValueError, match="OracleVisual needs to know"):
        M.answers(loaded, blind, {"oracle": METHODS["oracle"]}, progress=False)


def test_the_question_reaches_methods_that_read_it(loaded, task):
    heard = []

    class Reads(mllm.BeforeMethod):
        def before(self, t):
            heard.extend(t.asked())

    M.answers(loaded, task, {"reads": Reads()}, batch=4, progress=False)
    assert heard == task.questions
    oracle = mllm.GAP(base=mllm.OracleVisual(keep=24))  # inside a wrapper it is given the truth too
    told = M.answers(loaded, task, {"oracle": oracle}, batch=4, progress=False)
    assert np.allclose(told["found"].dropna(), told["possible"].dropna())


def test_what_does_not_fit_is_refused(loaded, task):
    with pytest.raises(ValueError, match="no methods"):
        M.answers(loaded, task, {})
    with pytest.raises(ValueError, match="'x' must be a visual-token method"):
        M.answers(loaded, task, {"x": "FastV"})
    with pytest.raises(ValueError, match="no questions"):
        M.answers(loaded, task, {"dense": None}, batch=[])
    with pytest.raises(ValueError, match="new_tokens"):
        M.answers(loaded, task, {"dense": None}, new_tokens=0)
    with pytest.raises(ValueError, match="cannot keep 1000 tokens"):
        M.answers(loaded, task, {"x": mllm.RandomVisual(keep=1000)}, progress=False)
    assert "forward" not in loaded.model.model.vision_tower.__dict__


def test_popes_measures():
    rng = np.random.default_rng(0)
    said, true = rng.random(80) < 0.6, rng.random(80) < 0.5
    toy = vqa.VQA("toy", "test", "yesno", [], ["?"] * 80, [("yes",) if one else ("no",) for one in true], ["all"] * 80)
    rows = [{"method": "m", "sample": i, "answer": "Yes." if one else "no"} for i, one in enumerate(said)]
    rows += [{"method": "never", "sample": i, "answer": "No"} for i in range(80)]
    told = M.yes_no(pd.DataFrame(rows), toy).set_index("method")
    precision, recall, f1, _ = precision_recall_fscore_support(true, said, average="binary")
    one = told.loc["m"]
    assert one[["precision", "recall", "f1"]].tolist() == pytest.approx([precision, recall, f1])
    assert one["accuracy"] == accuracy_score(true, said) and one["yes"] == said.mean() and one["n"] == 80
    assert one["f1_low"] < one["f1"] < one["f1_high"] and told.loc["never", "yes_high"] > 0
    assert told.loc["never"][["precision", "recall", "f1", "yes"]].tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="'exact'"):
        M.yes_no(pd.DataFrame(rows), vqa.vqa(n=2))
    with pytest.raises(ValueError, match="answer"):
        M.yes_no(pd.DataFrame({"method": ["m"], "sample": [0]}), toy)


# --- cost -------------------------------------------------------------------------------------------------------------


def test_cost_of_the_prompt(loaded, task):
    some = {name: METHODS[name] for name in ("dense", "cls", "fastv", "oracle")}
    told = M.prefill_cost(loaded, task, some, batch=8, repeats=3).set_index("method")
    assert told["rounds"].tolist() == [3] * 4 and (told["ms"] > 0).all() and (told["low"] <= told["high"]).all()
    assert told["tokens"].tolist() == [N0, 24, (N0 + 24) / 2, 24]
    dense, cls, fastv = (told.loc[name] for name in ("dense", "cls", "fastv"))
    assert dense["flops_ratio"] == 1.0 and dense["select_ms"] == 0.0
    assert cls["flops_ratio"] > fastv["flops_ratio"] > 1.3 and cls["select_ms"] > 0
    assert np.allclose(told["break_even_ms"], told["dense_ms"] - told["ms"] + told["select_ms"])
    assert not told["encoder_ms"].any()


class Everything(mllm.FlowCut):
    """Works inside the encoder, and changes nothing there."""

    def before(self, t):
        return None


def test_a_method_inside_the_encoder_pays_for_what_it_adds(loaded, task, monkeypatch):
    some = {"cls": METHODS["cls"], "flowcut": mllm.FlowCut(keep=24), "all": Everything(keep=N0)}
    # whole calls and the encoder's part of them: dense, the three methods, dense with a plain look
    whole = np.array([[10.0, 4.0, 14.0, 21.0, 18.0], [10.0, 4.0, 13.0, 22.0, 20.0]])
    inside = np.array([[0.0, 0.0, 8.0, 10.0, 8.0], [0.0, 0.0, 7.0, 10.0, 10.0]])

    def race(calls, *rest):
        for call, took in zip(calls, inside.T, strict=True):
            call()
            call.seconds[:] = list(took / 1e3)
        return whole

    monkeypatch.setattr(M, "race", race)
    told = M.prefill_cost(loaded, task, some, batch=4, repeats=2).set_index("method")
    assert told.loc["flowcut", "tokens"] == 24
    assert np.allclose(told["encoder_ms"], [0.0, (0 - 3) / 2, (2 + 0) / 2])
    # the language model's part, and what the encoder took beyond a plain look
    assert np.allclose(told["ms"], [4, (6 + 6) / 2, (13 + 12) / 2])
    assert told.loc["all", "flops_ratio"] == pytest.approx(1.0, abs=1e-3)
    # every patch less in the encoder is work saved there, and no gain here
    assert told.loc["cls", "flops_ratio"] == pytest.approx(told.loc["flowcut", "flops_ratio"], rel=0.02)
    answered = M.answers(loaded, task, some, batch=10, progress=False).set_index(["method", "sample"])
    inputs = next(task.batches(loaded, 10)).inputs
    with torch.no_grad(), some["flowcut"](loaded.model) as trace:
        loaded.model(**inputs)
    found = M.located(trace, task.truth)["found"].numpy()
    assert np.allclose(answered.loc["flowcut"]["found"], found, equal_nan=True)


@torch.no_grad()
def test_work_is_that_of_the_language_model(loaded, task):
    """Of the dense run: 2 weights a token for every matrix behind the encoder, and the products of attention."""
    told = M.prefill_cost(loaded, task, {"dense": None}, batch=4, repeats=1).iloc[0]
    model, inputs = loaded.model, next(task.batches(loaded, 4)).inputs
    b, n = inputs["input_ids"].shape
    parts = [
        (model.model.language_model.layers, b * n),
        (model.model.multi_modal_projector, b * N0),
        (model.lm_head, b),
    ]
    linear = sum(
        2 * m.weight.numel() * tokens
        for part, tokens in parts
        for m in part.modules()
        if isinstance(m, torch.nn.Linear)
    )
    config = model.config.text_config
    attention = 4 * b * n * n * config.hidden_size * config.num_hidden_layers
    rotary = told["gflops"] * 1e9 - linear - attention  # frequencies times positions
    assert 0 <= rotary < 0.01 * linear


def test_cost_needs_sdpa(loaded, task):
    loaded.model.set_attn_implementation("eager")
    try:
        with pytest.raises(ValueError, match="'eager'"):
            M.prefill_cost(loaded, task, {"dense": None})
    finally:
        loaded.model.set_attn_implementation("sdpa")
