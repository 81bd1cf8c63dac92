"""Training of the language models: what is asked can be known, the run resumes, the published folders keep the bars."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from keeprate import load
from keeprate.tasks import docs, recall
from keeprate.train import llama_docs, llama_docs_draft, loop
from keeprate.train.llama_docs import ANSWER, IGNORED, KINDS, TEXT, Stage, Trainer

MODELS = Path(__file__).parents[2] / "data" / "models"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "head_dim": 8}
TINY = loop.Recipe((Stage(4, 64, 4, (0.5, 0.5, 0.0, 0.0)), Stage(4, 80, 4)), warmup=2, decay=0.5)


@pytest.fixture(scope="module")
def tokenizer():
    return load("llama-docs").processor


@pytest.fixture(autouse=True)
def held_out_text_instead_of_all(monkeypatch):
    """The training text takes a minute to read; for these tests the other split is as good."""
    whole = docs.tokens
    monkeypatch.setattr(docs, "tokens", lambda tokenizer, split="test": whole(tokenizer, "test"))


def tiny(seed=0):
    return llama_docs.build(seed, **SIZES)


def test_tokenizer_reads_digits_and_keys_one_by_one_and_gives_back_every_byte(monkeypatch):
    monkeypatch.setattr(docs, "documents", lambda split: docs_text)
    docs_text = (
        tuple(f"Returns the {word} of x, 0 1 2 3 4 5 6 7 8 9." for word in ("sum", "mean", "product", "norm")) * 20
    )
    made = llama_docs.tokenizer()
    assert (made.pad_token_id, made.bos_token_id, made.eos_token_id, made.padding_side) == (0, 1, 2, "left")
    for given in (made, load("llama-docs").processor):
        for key in recall.KEYS:
            assert len(given(f" {key}", add_special_tokens=False).input_ids) == 1
        assert [given.decode([i]) for i in given(" kiwi 471.").input_ids][1:] == [" kiwi", " 4", "7", "1", "."]
        text = 'See also: kiwi 471.\n\n    >>> x["a"] = 2.50  # naïve – ∑ 好\n\t- lemonade, kiwis\n'
        ids = given(text).input_ids
        assert ids[0] == given.bos_token_id and given.decode(ids[1:]) == text
    assert len(load("llama-docs").processor) == llama_docs.VOCABULARY


def test_build_is_a_llama_with_shared_keys_and_tied_embeddings():
    model = llama_docs.build(0)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.num_attention_heads == 2 * model.config.num_key_value_heads == 8
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(tiny(1).lm_head.weight, tiny(1).lm_head.weight)
    assert not torch.equal(tiny(1).lm_head.weight, tiny(2).lm_head.weight)


def test_grouped_attention_is_torchs(tokenizer):
    model = llama_docs.build(0).eval()
    ids = docs.text(tokenizer, n=2, length=300)
    expected = model(ids).logits
    Trainer(model, tokenizer, TINY, bf16=False)
    model.eval()
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)
    assert model.config._attn_implementation == "grouped"


def test_repeats_are_predictable_from_the_second_time_on(tokenizer):
    ids, role = llama_docs.repeats(recall.vocabulary(tokenizer), np.random.default_rng(0), 6, 64)
    period = int((role[0] == IGNORED).sum()) - 1
    assert 16 <= period <= 32
    assert torch.equal(ids[:, 1 + period :], ids[:, 1:-period])
    assert (role[:, 1 + period :] == TEXT).all() and (role[:, : 1 + period] == IGNORED).all()
    assert all(len(row[1:].unique()) <= 26 for row in ids[1::2])
    assert all(len(row[1:].unique()) > 14 for row in ids[::2])


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_stands_behind_its_key_in_the_context(tokenizer, kind):
    for seed in range(6):
        ids, role = llama_docs.asked(tokenizer, np.random.default_rng(seed), kind, 5, 160, 16)
        assert ids.shape == role.shape == (5, 160)
        assert (role[:, 0] == IGNORED).all()
        assert set(role.unique().tolist()) == {IGNORED, TEXT, ANSWER + KINDS.index(kind)}
        context, is_answer = (role == TEXT).int(), role >= ANSWER
        last_text = 159 - context.flip(1).argmax(1)
        assert (is_answer.int().argmax(1) > last_text).all()
        begin = (is_answer & ~is_answer.roll(1, 1)).nonzero()
        for row, start in begin.tolist():
            reply = ids[row, start:][is_answer[row, start:].int().cumprod(0).bool()].tolist()
            assert reply[-1] == tokenizer.convert_tokens_to_ids(".")
            told, key = ids[row, : start - 1].tolist(), int(ids[row, start - 1])
            links = [[key, reply[0]], reply[:-1]] if kind == "variables" else [[key, *reply[:-1]]]
            for link in links:  # plum -> kiwi, kiwi -> 471
                assert any(told[i : i + len(link)] == link for i in range(len(told)))


def test_training_reduces_the_loss_on_a_fixed_batch(tokenizer):
    trainer = Trainer(tiny(), tokenizer, replace(TINY, stages=(Stage(100, 64, 8),), warmup=1, lr=1e-2), bf16=False)
    batch = trainer.batch(0)
    losses = [trainer.update(*batch) for _ in range(30)]
    assert losses[-1][0] < 0.6 * losses[0][0]
    assert losses[-1][1] < losses[0][1]


def test_loss_is_the_mean_over_text_plus_the_mean_over_answers(tokenizer):
    trainer = Trainer(tiny().eval(), tokenizer, TINY, bf16=False)
    trainer.model.eval()
    ids, role = llama_docs.asked(tokenizer, np.random.default_rng(0), "needles", 3, 80, 16)
    loss, (text, *shares) = trainer.loss(ids, role)
    logits = trainer.model(ids).logits[:, :-1]
    each = -logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    right = logits.argmax(-1) == ids[:, 1:]
    of_text, of_answers = role[:, 1:] == TEXT, role[:, 1:] >= ANSWER
    assert loss.item() == pytest.approx((each[of_text].mean() + each[of_answers].mean()).item(), rel=1e-4)
    assert text == pytest.approx(each[of_text].mean().item(), rel=1e-4)
    assert shares[0] == pytest.approx(right[of_answers].float().mean().item(), abs=0.02)
    assert np.isnan(shares[1:]).all()


def test_batches_depend_on_seed_and_step_alone(tokenizer):
    whole, late = list(Trainer(tiny(), tokenizer, TINY).batches(0)), list(Trainer(tiny(), tokenizer, TINY).batches(5))
    assert [tuple(ids.shape) for ids, _ in whole] == [(4, 64)] * 4 + [(4, 80)] * 4
    assert all(
        torch.equal(a, b) for one, other in zip(whole[5:], late, strict=True) for a, b in zip(one, other, strict=True)
    )
    (other_seed,) = islice(Trainer(tiny(), tokenizer, replace(TINY, seed=1)).batches(0), 1)
    assert not torch.equal(other_seed[0], whole[0][0])


def test_an_interrupted_run_ends_in_the_same_state_even_if_what_lay_ahead_changed(tokenizer, tmp_path):
    through = Trainer(tiny(), tokenizer, TINY)
    through.run(tmp_path / "through.safetensors")
    longer = replace(TINY, stages=(TINY.stages[0], replace(TINY.stages[1], steps=40)), decay=0.5)
    planned = replace(longer, decay=TINY.decay * TINY.steps / longer.steps)
    first = Trainer(tiny(), tokenizer, planned)
    first.run(tmp_path / "state.safetensors", until=3)
    second = Trainer(tiny(seed=5), tokenizer, TINY)
    second.run(tmp_path / "state.safetensors")
    assert (first.step, second.step, through.step) == (3, 8, 8)
    for name, weight in through.named.items():
        assert torch.equal(weight, second.named[name])
        assert torch.equal(through.average[name], second.average[name])
    for other in (
        replace(TINY, stages=(replace(TINY.stages[0], batch=3), TINY.stages[1])),
        replace(TINY, stages=(replace(TINY.stages[0], steps=2), TINY.stages[1])),
        replace(TINY, lr=1.0),
        replace(TINY, ema=0.5),
    ):
        with pytest.raises(ValueError, match="delete it to start anew"):
            Trainer(tiny(), tokenizer, other).restore(tmp_path / "state.safetensors")


def test_averaged_weights_fill_a_tied_model(tokenizer):
    trainer = Trainer(tiny(), tokenizer, TINY)
    trainer.update(*trainer.batch(0))
    fresh = tiny(3)
    fresh.load_state_dict(trainer.averaged())
    assert torch.equal(fresh.lm_head.weight, trainer.average["model.embed_tokens.weight"])


def test_bigram_probabilities():
    bigram = llama_docs.Bigram(torch.tensor([0, 1, 0, 1, 0, 2]), 4, discount=0.5)
    single = torch.tensor([4, 3, 2, 1]) / 10
    torch.testing.assert_close(bigram.probability.sum(1), torch.ones(4))
    expected = torch.tensor([0, 1.5, 0.5, 0]) / 3 + (0.5 * 2 / 3) * single  # behind 0: twice 1, once 2
    torch.testing.assert_close(bigram.probability[0], expected)
    torch.testing.assert_close(bigram.probability[3], single)  # never seen before anything
    ids = torch.tensor([[9, 0, 1, 0]])
    by_hand = -(bigram.probability[0, 1].log() + bigram.probability[1, 0].log()) / 2
    assert bigram.loss(ids) == pytest.approx(by_hand.item())


def test_text_loss_is_the_models_own(tokenizer):
    model, ids = tiny().eval(), docs.text(tokenizer, n=5, length=30)
    labels = ids.clone()
    labels[:, :2] = -100
    assert llama_docs.text_loss(model, ids, batch=2) == pytest.approx(model(ids, labels=labels).loss.item(), rel=1e-5)


def test_proportion_is_wilsons_interval():
    assert loop.proportion(8, 10) == {"value": 0.8, "n": 10, "interval95": [0.4902, 0.9433]}
    assert loop.proportion(10, 10)["interval95"][1] == 1.0


@pytest.mark.parametrize(("name", "megabytes"), [("llama-docs", 12), ("llama-docs-draft", 3)])
def test_embedded_model(name, megabytes):
    folder = MODELS / name
    card = json.loads((folder / "card.json").read_text())
    assert {path.name for path in folder.iterdir()} == {*card["sha256"], "card.json"}
    assert all(loop.sha256(folder / file) == value for file, value in card["sha256"].items())
    assert sum(path.stat().st_size for path in folder.iterdir()) < megabytes * 1e6
    loaded = load(name)
    assert card["params"] == sum(weight.numel() for weight in loaded.model.parameters())
    assert loaded.processor.backend_tokenizer.to_str() == load("llama-docs").processor.backend_tokenizer.to_str()
    drawn = recall.sample(loaded.processor, "needles", n=32, length=1024, seed=7)
    measured = recall.accuracy(loaded.model, drawn).float().mean().item()
    assert abs(measured - card["recall"]["needles"]["value"]) < 0.25
    text = card["text"]["nats_a_token"]
    found = llama_docs.text_loss(loaded.model, docs.text(loaded.processor, n=8, length=1024, seed=7))
    assert abs(found - text["model"]) < 0.4


def test_bars():
    card = load("llama-docs").card
    assert card["recall"]["needle"]["interval95"][0] >= 0.95 and card["recall"]["needles"]["interval95"][0] >= 0.85
    assert all(share["n"] >= 500 for share in card["recall"].values())
    assert card["text"]["nats_a_token"]["model"] < card["text"]["nats_a_token"]["bigram"] - 0.3
    assert card["recipe"]["stages"][-1]["length"] == 1024


def test_recipes_name_what_the_cards_say():
    for name, recipe in (("llama-docs", llama_docs.RECIPE), ("llama-docs-draft", llama_docs_draft.RECIPE)):
        card = json.loads((MODELS / name / "card.json").read_text())
        assert card["status"] == "final" or card["status"] == f"interim: step {card['steps']} of {recipe.steps}"
        assert card["steps"] == recipe.steps if card["status"] == "final" else card["steps"] < recipe.steps
        assert [stage["steps"] for stage in card["recipe"]["stages"]] == [stage.steps for stage in recipe.stages]


def test_all_models_together_are_small():
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 40e6
