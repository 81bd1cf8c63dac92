"""Reference text: split by file, identified by a hash, and given out as sequences that start with BOS."""

import ast
import inspect

import numpy as np
import pytest
import torch

from keeprate import load
from keeprate.tasks import docs


@pytest.fixture(scope="module")
def tokenizer():
    return load("llama-docs").processor


def test_no_test_file_is_a_training_file():
    train, test = ({name for name, _ in docs._sources(split)} for split in docs.SPLITS)
    assert not train & test
    assert {"numpy/linalg/_linalg.py", "sklearn/cluster/_kmeans.py"} <= test
    assert {"numpy/fft/_pocketfft.py", "pandas/core/frame.py"} <= train
    assert all(name.startswith(docs.HELD_OUT) for name in test)
    assert not [name for name in train | test if "/tests/" in name]
    assert {name.split("/")[0] for name in train} == set(docs.PACKAGES)


def test_documents_are_the_docstrings_of_a_file_and_the_topics():
    from pydoc_data.topics import topics

    from sklearn.cluster import DBSCAN

    text = docs.documents("test")
    holding = [document for document in text if inspect.cleandoc(DBSCAN.__doc__) in document]
    assert len(holding) == 1
    assert sum(topic.strip() in text for topic in topics.values()) == sum(
        document in {topic.strip() for topic in topics.values()} for document in text
    )
    assert 4 <= sum(topic.strip() in text for topic in topics.values()) <= len(topics) / 4
    assert docs.documents("test") is text


def test_docstrings_come_in_the_order_of_lines_and_broken_files_are_passed_over(tmp_path):
    source = (
        '"""Module."""\nclass A:\n    """Class."""\n    def f(self):\n        """Method."""\ndef g(): "Function."\n'
    )
    (tmp_path / "a.py").write_text(source)
    assert docs._docstrings(tmp_path / "a.py") == ["Module.", "Class.", "Method.", "Function."]
    (tmp_path / "b.py").write_text("def f(:\n")
    assert docs._docstrings(tmp_path / "b.py") == []
    with pytest.raises(SyntaxError):
        ast.parse((tmp_path / "b.py").read_text())


def test_training_text_lacks_docstrings_of_the_test_text_and_has_none_twice(monkeypatch):
    parts = {"test": (["shared", "only test"],), "train": (["one", "shared"], ["one", "two", "two"], ["shared"])}
    monkeypatch.setattr(docs, "_parts", lambda split: parts[split])
    monkeypatch.setattr("pydoc_data.topics.topics", {})
    assert docs.documents.__wrapped__("train") == ("one", "two")
    assert docs.documents.__wrapped__("test") == ("shared\n\nonly test",)


def test_fingerprint_names_the_text(monkeypatch):
    found = docs.fingerprint()
    assert found["characters"] == sum(map(len, docs.documents("test")))
    assert set(found["versions"]) == {"python", *docs.PACKAGES.values()}
    card = {"data": {"test": found}}
    assert docs.differs(card) == ""
    other = found | {"sha256": "0" * 64, "versions": found["versions"] | {"numpy": "0.1"}}
    assert f"numpy 0.1 -> {found['versions']['numpy']}" in docs.differs({"data": {"test": other}})
    monkeypatch.setattr(docs, "documents", lambda split: ("changed",))
    assert docs.fingerprint()["sha256"] != found["sha256"]


def test_text_starts_with_bos_and_lies_in_the_stream(tokenizer):
    ids = docs.text(tokenizer, n=3, length=40, seed=1)
    assert ids.shape == (3, 40) and ids.dtype == torch.int64
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    stream = docs.tokens(tokenizer, "test").unfold(0, 39, 1)
    assert all((stream == row[1:]).all(1).any() for row in ids)
    assert torch.equal(ids, docs.text(tokenizer, n=3, length=40, seed=1))
    assert not torch.equal(ids, docs.text(tokenizer, n=3, length=40, seed=2))


def test_stream_is_the_text_with_eos_behind_every_document(tokenizer):
    stream = docs.tokens(tokenizer, "test")
    text = docs.documents("test")
    assert (stream == tokenizer.eos_token_id).sum() == len(text)
    ends = (stream == tokenizer.eos_token_id).nonzero()[:, 0].tolist()
    assert tokenizer.decode(stream[: ends[0]]) == text[0]
    assert tokenizer.decode(stream[ends[4] + 1 : ends[5]]) == text[5]


def test_training_tokens_are_kept_and_read_again(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "_CACHE", tmp_path / "runs" / "docs")
    monkeypatch.setattr(docs, "documents", lambda split: ("Some text.", "More text."))
    docs.tokens.cache_clear()
    first = docs.tokens(tokenizer, "train")
    (kept,) = (tmp_path / "runs" / "docs").iterdir()
    monkeypatch.setattr(docs, "documents", lambda split: pytest.fail("must not be read again"))
    docs.tokens.cache_clear()
    assert torch.equal(docs.tokens(tokenizer, "train"), first)
    assert kept.suffix == ".npy" and tokenizer.decode(first) == "Some text.<eos>More text.<eos>"
    docs.tokens.cache_clear()


def test_fingerprint_of_the_training_text_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "_CACHE", tmp_path)
    monkeypatch.setattr(docs, "documents", lambda split: ("Some text.", "More."))
    found = docs.fingerprint("train")
    assert (found["documents"], found["characters"]) == (2, 15)
    monkeypatch.setattr(docs, "documents", lambda split: pytest.fail("must not be read again"))
    assert docs.fingerprint("train") == found and len(list(tmp_path.iterdir())) == 1


def test_first_token_is_bos_or_else_eos():
    class Tokenizer:
        bos_token_id, eos_token_id = None, 7

    assert docs.first_token(Tokenizer()) == 7
    Tokenizer.eos_token_id = None
    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        docs.first_token(Tokenizer())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"split": "dev"}, "split must be one of 'train', 'test'; got 'dev'"),
        ({"length": 1}, "length must be an integer of at least 2; got 1"),
        ({"n": 0}, "n must be an integer of at least 1; got 0"),
        ({"length": 10**9}, "length=999999999; allowed: below"),
    ],
)
def test_bad_input(tokenizer, given, message):
    with pytest.raises(ValueError, match=message):
        docs.text(tokenizer, **given)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(docs, "PACKAGES", {"no_such_package": "no-such-package"})
    with pytest.raises(ValueError, match="'no_such_package' is not installed; needed: no-such-package"):
        docs._sources("test")


def test_windows_reach_both_ends(tokenizer, monkeypatch):
    monkeypatch.setattr(docs, "tokens", lambda tokenizer, split: torch.arange(10))
    found = docs.windows(tokenizer, np.random.default_rng(0), 200, 8)
    assert torch.equal(found[:, 0].unique(), torch.arange(2))
    assert (found.diff(dim=1) == 1).all()
