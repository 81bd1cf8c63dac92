"""Losses of other models: computed once, stored, and refused where they do not belong."""

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import keeprate as kr
from keeprate.sft import Scores
from keeprate.sft.scores import fingerprint, rows_of, with_column


@pytest.fixture(scope="module")
def tokenizer():
    return kr.load("llama-docs").processor


@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_score_is_the_loss_of_the_token_at_its_own_place(llama, rows, size):
    found = kr.sft.score(llama, rows, batch_size=size)
    assert len(found) == len(rows)
    for row, nll in zip(rows, found.nll, strict=True):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            plain = F.cross_entropy(llama(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        expected = np.zeros(len(nll))
        expected[3:] = plain[2:].numpy()  # the first three tokens are a prompt
        assert nll.dtype == np.float32 and np.allclose(nll, expected, atol=1e-5)


def test_how_a_tokenizer_was_last_called_is_no_part_of_it():
    tokenizer = kr.load("llama-docs").processor
    before = fingerprint(tokenizer)
    tokenizer(["one two three", "four"], padding=True, truncation=True, max_length=2)
    assert fingerprint(tokenizer) == before
    tokenizer.add_tokens(["<something>"])
    assert fingerprint(tokenizer) != before


def test_scoring_leaves_the_model_alone(llama, rows):
    llama.train()
    kr.sft.score(llama, rows[:2])
    assert llama.training and all(p.grad is None for p in llama.parameters())
    assert llama(torch.tensor([rows[0]["input_ids"]])).logits.shape[1] == 8


def test_scores_come_back_from_disk(llama, rows, tokenizer, tmp_path):
    found = kr.sft.score(llama, rows, tokenizer=tokenizer)
    found.save(tmp_path / "scores")
    again = Scores.load(tmp_path / "scores")
    assert again.tokenizer == fingerprint(tokenizer) and again.digest == found.digest and again.model == found.model
    assert all(np.array_equal(a, b) for a, b in zip(again.nll, found.nll, strict=True))
    joined = again.join(rows, "reference", tokenizer)
    assert [row["reference"] for row in joined] == [x.tolist() for x in found.nll]
    assert "reference" not in rows[0]
    with pytest.raises(ValueError, match=r"holds no scores: keeprate.json is missing"):
        Scores.load(tmp_path)


def test_a_data_set_of_the_library_gets_a_column(llama, rows):
    data = datasets.Dataset.from_list(rows)
    found = kr.sft.score(llama, data)
    joined = found.join(data, "reference")
    assert isinstance(joined, datasets.Dataset) and set(joined.column_names) == {*data.column_names, "reference"}
    again = found.join(with_column(joined, "reference", [[0.0] * len(r["labels"]) for r in rows]), "reference")
    assert np.allclose(again[5]["reference"], found.nll[5]), "a column of that name is replaced"
    method = kr.sft.TokenCleaning()
    cleaned = method.prepare(found.join(joined, "base"))
    assert sum(map(sum, cleaned["kept"])) == int(0.6 * sum(len(r["labels"]) - 3 for r in rows))
    assert set(rows_of(cleaned)[0]) == {*cleaned.column_names}
    assert isinstance(kr.sft.frequency(data), datasets.Dataset)


def test_scores_of_something_else_are_refused(llama, rows, tokenizer):
    found = kr.sft.score(llama, rows, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="these scores are of 24 rows; the data set has 23"):
        found.join(rows[1:], "reference")
    with pytest.raises(ValueError, match="row 0 has other tokens or targets"):
        found.join(rows[::-1], "reference")
    for name in ("input_ids", "labels"):
        other = [dict(row) for row in rows]
        other[7] = {**other[7], name: [*other[7][name][:-1], 3 + other[7][name][-1] % 5]}
        with pytest.raises(ValueError, match="row 7 has other tokens or targets"):
            found.join(other, "reference")
    foreign = kr.load("llama-docs").processor
    foreign.add_tokens(["<something>"])
    with pytest.raises(ValueError, match=f"made with tokenizer {fingerprint(tokenizer)}; the one given is"):
        found.join(rows, "reference", foreign)
    with pytest.raises(ValueError, match="at least one row"):
        kr.sft.score(llama, [])


def test_weigh_shows_the_batch_as_it_is(llama, rows):
    made = kr.sft.Collator(pad=0)(rows[:4])
    seen = kr.sft.weigh(kr.sft.ProFit(tau=0.05), llama, made)
    assert seen.weight.shape == seen.score.shape == seen.target.shape == made["labels"].shape
    assert torch.equal(seen.target, made["labels"].as_subclass(torch.Tensor) != -100)
    assert torch.equal(seen.weight[seen.target], (seen.score[seen.target] >= 0.05).float())
    assert bool(seen.score[~seen.target].isnan().all()) and bool(seen.nll[~seen.target].isnan().all())
    assert torch.allclose(seen.score[seen.target], (-seen.nll[seen.target]).exp())
