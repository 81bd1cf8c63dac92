"""Recall: what is planted is where the truth says, answers stand behind keys, accuracy is that of greedy decoding."""

import numpy as np
import pytest
import torch
import transformers

from keeprate import load
from keeprate.tasks import docs, recall


@pytest.fixture(scope="module")
def loaded():
    return load("llama-docs")


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded.processor


@pytest.mark.parametrize("kind", recall.KINDS)
@pytest.mark.parametrize("length", [96, 257])
def test_shapes_and_truth(tokenizer, kind, length):
    drawn = recall.sample(tokenizer, kind, n=40, length=length, seed=3)
    assert drawn.kind == kind and len(drawn) == 40
    assert drawn.context.shape == drawn.truth.shape == drawn.distractors.shape == (40, length)
    assert (drawn.context[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(drawn.prompt, torch.cat([drawn.context, drawn.question], 1))
    assert not (drawn.truth & drawn.distractors).any()
    key, answer = drawn.question[:, -1:], drawn.answer
    told = drawn.context[drawn.truth].unflatten(0, (40, -1))
    others = drawn.context[drawn.distractors].unflatten(0, (40, -1))
    if kind == "variables":  # source first: its key is the first token of the answer, then comes the alias
        assert torch.equal(told, torch.cat([answer, key, answer[:, :1]], 1))
        assert others.shape[1] == told.shape[1]
    else:
        assert torch.equal(told, torch.cat([key, answer], 1))
        assert others.shape[1] == {"needle": 0, "needles": 3 * told.shape[1], "copy": 0}[kind]
    keys = recall.vocabulary(tokenizer).keys
    assert torch.isin(key, keys).all()
    if kind == "needles":  # key and value of each, no key twice
        every = torch.cat([key, others.unflatten(1, (3, -1))[:, :, 0]], 1)
        assert torch.isin(every, keys).all() and all(len(row.unique()) == 4 for row in every)


def test_text_between_the_statements_is_held_out_text(tokenizer):
    drawn = recall.sample(tokenizer, "needles", n=4, length=200, seed=1)
    words = recall.vocabulary(tokenizer)
    width = len(words.note["code"]) + 1 + words.values.shape[1] + len(words.stop)
    core = drawn.truth | drawn.distractors
    planted = core.clone()
    for _ in words.note["code"]:
        planted[:, :-1] |= planted[:, 1:].clone()
    planted[:, 1:] |= core[:, :-1]
    assert (planted.sum(1) == 4 * width).all()
    stream = docs.tokens(tokenizer, "test").unfold(0, 199 - 4 * width, 1)
    for row, hidden in zip(drawn.context, planted, strict=True):
        assert (stream == row[~hidden][1:]).all(1).any()


def test_depths_are_spread_and_statements_follow_a_sentence_or_paragraph(tokenizer):
    drawn = recall.sample(tokenizer, "needle", n=400, length=512)
    begin = drawn.truth.int().argmax(1) - len(recall.vocabulary(tokenizer).note["code"])
    assert begin.min() < 100 and begin.max() > 400
    assert 170 < begin.float().mean() < 340
    before = tokenizer.batch_decode(drawn.context.gather(1, begin[:, None] - 1))
    assert np.mean([text.endswith(".") or "\n" in text for text in before]) > 0.9


def test_same_seed_same_sample_and_kinds_and_splits_differ(tokenizer):
    one, again = (recall.sample(tokenizer, "needles", n=3, length=128, seed=5) for _ in range(2))
    assert torch.equal(one.context, again.context) and torch.equal(one.answer, again.answer)
    assert not torch.equal(one.context, recall.sample(tokenizer, "needles", n=3, length=128, seed=6).context)


def test_plant_keeps_the_order_of_text_and_of_statements():
    text = torch.tensor([[10, 11, 12], [20, 21, 22]])
    first, second = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5], [6]])
    merged, origin = recall.plant(text, [first, second], torch.tensor([[0, 2], [1, 1]]))
    assert merged.tolist() == [[10, 1, 2, 11, 12, 5], [20, 21, 3, 4, 6, 22]]
    assert origin.tolist() == [[-1, 0, 1, -1, -1, 2], [-1, -1, 0, 1, 2, -1]]


def test_cuts_move_on_to_the_next_boundary():
    boundary = torch.zeros(200, 50, dtype=torch.bool)
    boundary[:, [9, 29]] = True
    cut = recall.cuts(np.random.default_rng(0), boundary, 1)
    assert {9, 29} < set(cut.flatten().tolist())
    assert ((cut == 9) | (cut == 29) | (cut > 29)).all()  # behind the last boundary it stays where it fell


def test_boundary_of_sentences_and_paragraphs(tokenizer):
    ids = tokenizer("Use np.sum. It adds 2.5.\n\nSee also", add_special_tokens=False, return_tensors="pt").input_ids
    ends = recall.vocabulary(tokenizer).boundary(ids)[0].nonzero()[:, 0]
    read = [tokenizer.decode(ids[0, : end + 1]) for end in ends]
    assert read[0] == "Use np.sum." and "Use np." not in read
    assert any(text.endswith("2.5.") or text.endswith("2.5.\n\n") for text in read)
    assert not any(text.endswith("2.") for text in read)


def test_choose_is_without_repetition_and_even():
    rows = recall.choose(np.random.default_rng(0), 3000, 3, 5)
    assert all(len(row.unique()) == 3 for row in rows[:100])
    assert (rows.flatten().bincount() - 1800).abs().max() < 150


@pytest.mark.parametrize("kind", recall.KINDS)
def test_accuracy_is_that_of_greedy_decoding_with_a_cache(loaded, kind):
    drawn = recall.sample(loaded.processor, kind, n=12, length=160, seed=2)
    right = recall.accuracy(loaded.model, drawn, batch=5)
    a = drawn.answer.shape[1]
    written = loaded.model.generate(
        drawn.prompt, attention_mask=torch.ones_like(drawn.prompt), max_new_tokens=a, min_new_tokens=a, do_sample=False
    )[:, -a:]
    assert torch.equal(right, (written == drawn.answer).all(1))


def test_accuracy_sees_a_wrong_answer(loaded):
    drawn = recall.sample(loaded.processor, "needles", n=16, length=160, seed=2)
    right = recall.accuracy(loaded.model, drawn)
    assert right.float().mean() > 0.5
    wrong = recall.Recall(
        "needles", drawn.context, drawn.question, drawn.answer.roll(1, 0), drawn.truth, drawn.distractors
    )
    assert not (recall.accuracy(loaded.model, wrong) & right).any()


def test_show_marks_what_holds_the_answer(tokenizer):
    drawn = recall.sample(tokenizer, "needles", n=2, length=300)
    for row in range(2):
        text = recall.show(tokenizer, drawn, row)
        key, value = tokenizer.decode(drawn.question[row, -1:]), tokenizer.decode(drawn.answer[row])
        assert f">>{key}{value} <<" in text
        assert text.count("Note the code:") == 4
        assert text.endswith(f"What is the code?{key} ->{value}")
    with pytest.raises(ValueError, match="row=2; allowed: 0 to 1"):
        recall.show(tokenizer, drawn, 2)


def other_tokenizer(keys):
    """A tokenizer by words and numbers as a whole, without BOS, that knows some of the keys."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["?", ".", ":", "Note", "What", "is", "the", "code", "value", "passage"]
    vocabulary = {word: i for i, word in enumerate([*words, "<e>", *keys, *map(str, recall.VALUES)])}
    backend = Tokenizer(models.WordLevel(vocabulary, "?"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", unk_token="?")


def test_another_tokenizer_serves_as_well():
    tokenizer = other_tokenizer(recall.KEYS)
    drawn = recall.sample(tokenizer, "needles", n=3, length=64)
    assert (drawn.context[:, 0] == tokenizer.eos_token_id).all()
    assert drawn.answer.shape == (3, 1) and drawn.question.shape == (3, 6)


def test_unfit_tokenizer_is_refused():
    class Letters:
        """Every letter a token."""

        def __call__(self, text, **_):
            return {"input_ids": list(text.encode())}

    with pytest.raises(ValueError, match="only 0 of the 64 keys are single tokens"):
        recall.vocabulary(Letters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "niddle"}, "kind must be one of 'needle', 'needles', 'variables', 'copy'; got 'niddle'"),
        ({"kind": "needle", "split": "dev"}, "split must be one of"),
        ({"kind": "needle", "n": 0}, "n must be an integer of at least 1; got 0"),
        ({"kind": "needle", "length": 0}, "length must be an integer of at least 1; got 0"),
        ({"kind": "needles", "length": 30}, "length=30 of kind 'needles'; allowed: at least 38"),
    ],
)
def test_bad_input(tokenizer, given, message):
    with pytest.raises(ValueError, match=message):
        recall.sample(tokenizer, **given)


def test_shortest_length_that_is_allowed_works(tokenizer):
    assert recall.sample(tokenizer, "needles", n=2, length=38).context.shape == (2, 38)
