"""Public data as questions: what is compressed, what is asked, where the answer stands."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from keeprate.tasks import reading

TEMPLATE = (
    "<s>{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} [assistant] {% endif %}"
)
ROWS = [
    {"context": f"Some text. The code of plum is {code}. More text, {code} again.", "question": "Which code?"}
    | {"answer": [str(code)], "answer_prefix": "It is"}
    for code in (471, 902, 13)
]


@pytest.fixture
def tokenizer():
    """One token per byte, so that positions can be counted."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(["<s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return str(path)


def test_rows_become_token_ids(tokenizer, file):
    found = reading.questions(tokenizer, file, n=5, length=1000)
    assert len(found) == 3
    texts = {tokenizer.decode(q.context[0, 1:]): q for q in found}
    assert set(texts) == {row["context"] for row in ROWS}
    for row in ROWS:
        asked, code = texts[row["context"]], row["answer"][0]
        assert asked.context[0, 0] == tokenizer.bos_token_id and not asked.distractors.any()
        assert tokenizer.decode(asked.question[0]) == "\n\nWhich code?\nIt is"
        assert tokenizer.decode(asked.answer[0]) == f" {code}"
        marked = [i - 1 for i in asked.truth[0].nonzero()[:, 0].tolist()]
        assert "".join(row["context"][i] for i in marked) == code * 2
    other = reading.questions(tokenizer, file, n=2, length=1000, seed=1)
    assert len(other) == 2


def test_long_contexts_lose_their_middle(tokenizer, file):
    whole = {q.answer[0].tolist().__str__(): q for q in reading.questions(tokenizer, file, n=3, length=1000)}
    for short in reading.questions(tokenizer, file, n=3, length=21):
        long = whole[str(short.answer[0].tolist())]
        assert short.context.shape == short.truth.shape == (1, 21)
        for a, b in ((short.context, long.context), (short.truth, long.truth)):
            assert torch.equal(a[0, :11], b[0, :11]) and torch.equal(a[0, 11:], b[0, -10:])


def test_chat_template_goes_around(tokenizer, file):
    tokenizer.chat_template = TEMPLATE
    found = reading.questions(tokenizer, file, n=1, length=1000)[0]
    head, tail = (tokenizer.decode(x[0]) for x in (found.context, found.question))
    assert head.startswith("<s>[user] Some text.") and head.endswith("again.")
    assert tail == "\n\nWhich code? [assistant] It is" and found.truth.sum() in (4, 6)


def test_recall_is_one_batch(tokenizer, monkeypatch):
    monkeypatch.setattr(reading.recall, "sample", lambda *a: a)
    assert reading.questions(tokenizer, "copy", 4, 64, 9, "train") == [(tokenizer, "copy", 4, 64, 9, "train")]


def test_what_does_not_fit_is_refused(tokenizer, tmp_path, file):
    with pytest.raises(ValueError, match=r"'nobody'.*'needle'"):
        reading.questions(tokenizer, "nobody")
    with pytest.raises(ValueError, match="n must be"):
        reading.questions(tokenizer, file, n=0)
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "a"}))
    with pytest.raises(ValueError, match="columns text; needed: context, question or input"):
        reading.questions(tokenizer, str(tmp_path / "other.jsonl"))
    (tmp_path / "empty.jsonl").write_text(json.dumps({"context": "a b", "question": "c", "answer": " "}))
    with pytest.raises(ValueError, match="without question or answer"):
        reading.questions(tokenizer, str(tmp_path / "empty.jsonl"))
