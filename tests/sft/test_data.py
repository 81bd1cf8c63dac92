"""Columns beside the labels: through padding, packing, truncation and processes, and aligned with the target."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import keeprate as kr
from keeprate.sft import Collator, Labels
from keeprate.sft.head import LogitsHead
from keeprate.sft.scores import rows_of
from keeprate.sft.tokens import Tokens, targets

ROWS = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8], "weights": [9.0, 1.0, 0.5, 2.0], "group": [0, 1, 1, 0]},
    {"input_ids": [3, 4], "labels": [3, 4], "weights": [1.0, 3.0], "group": [1, 0]},
    {"input_ids": [10, 11, 12], "weights": [0.0, 1.0, 4.0], "group": [0, 0, 1]},
]


def test_padding_carries_every_column():
    batch = Collator(pad=0)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [3, 4, 0, 0], [10, 11, 12, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    # the first token of a sequence is nobody's target; without labels all others are
    assert batch["labels"].tolist() == [[-100, 6, 7, 8], [-100, 4, -100, -100], [-100, 11, 12, -100]]
    columns = batch["labels"].columns
    assert columns["weights"].tolist() == [[9, 1, 0.5, 2], [1, 3, 0, 0], [0, 1, 4, 0]]
    assert columns["group"].tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0]]
    assert not columns["group"].is_floating_point()
    assert Collator(pad=0, multiple=8)(ROWS)["input_ids"].shape == (3, 8)


def test_truncation_cuts_every_column():
    batch = Collator(pad=0, max_length=3)(ROWS)
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 4, -100], [-100, 11, 12]]
    assert batch["labels"].columns["weights"].tolist() == [[9, 1, 0.5], [1, 3, 0], [0, 1, 4]]


def test_packing_carries_every_column():
    batch = Collator(pad=0, pack=6)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 3, 4], [10, 11, 12, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, 8, -100, 4], [-100, 11, 12, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 1, 2]]
    assert batch["labels"].columns["weights"].tolist() == [[9, 1, 0.5, 2, 1, 3], [0, 1, 4, 0, 0, 0]]
    assert "attention_mask" not in batch


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", [kr.sft.RandomMask(), kr.sft.SsToken(), kr.sft.PRIOR(), kr.sft.CT(length=1.0)])
def test_a_packed_batch_has_the_weights_of_a_padded_one(llama, rows, method, attention):
    """Packed sequences do not see each other, and a choice per sequence stays one per sequence."""
    llama.set_attn_implementation(attention)
    rows = kr.sft.score(llama, rows).join(rows, "history")
    g = torch.Generator().manual_seed(0)
    other = [[x + float(torch.rand((), generator=g)) for x in row["history"]] for row in rows]
    rows = [{**row, "reference": row["history"], "history": x} for row, x in zip(rows, other, strict=True)][:7]
    padded, packed = (kr.sft.weigh(method, llama, Collator(pad=0, pack=pack)(rows)) for pack in (None, 40))
    assert packed.nll.shape[0] < padded.nll.shape[0]
    for name in ("nll", "weight", "score"):
        a, b = (getattr(seen, name)[seen.target] for seen in (padded, packed))
        assert torch.allclose(a, b, atol=1e-5), name
    losses = []
    for pack in (None, 40):
        batch = Collator(pad=0, pack=pack)(rows)
        labels = batch.pop("labels")
        with method(llama):
            losses.append(method(llama(**batch), labels))
    assert torch.allclose(*losses, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_columns_survive_a_loader(workers):
    loader = DataLoader(ROWS, batch_size=2, collate_fn=Collator(pad=0), num_workers=workers)
    batches = [batch["labels"] for batch in loader]
    assert [type(x) for x in batches] == [Labels, Labels]
    assert batches[0].columns["weights"].tolist() == [[9, 1, 0.5, 2], [1, 3, 0, 0]]
    assert batches[1].tolist() == [[-100, 11, 12]]


def test_labels_move_with_their_columns_and_are_plain_otherwise():
    labels = Collator(pad=0)(ROWS)["labels"]
    moved = labels.to("meta")
    assert moved.device.type == "meta" and moved.columns["weights"].device.type == "meta"
    short = labels.to(torch.int32)
    assert short.dtype == torch.int32 and short.columns["weights"].dtype == torch.float32
    assert torch.equal(labels.clone().columns["weights"], labels.columns["weights"])
    assert torch.equal(labels.detach().columns["group"], labels.columns["group"])
    assert type(labels[:, 1:]) is torch.Tensor and type(labels != -100) is torch.Tensor
    assert int((labels[:, 1:] != -100).sum()) == 6  # what the Trainer counts


def test_only_named_columns_are_carried_and_each_must_be_there():
    assert set(Collator(pad=0, columns=("group",))(ROWS)["labels"].columns) == {"group", "salt"}
    with pytest.raises(ValueError, match=r"row 0: unknown column 'wieghts', did you mean 'weights'.*remove_unused"):
        Collator(pad=0, columns=("wieghts",))(ROWS)
    with pytest.raises(ValueError, match="row 2: unknown column 'x'"):
        Collator(pad=0)([{**row, "x": row["weights"]} if i < 2 else row for i, row in enumerate(ROWS)])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"weights": [1.0, 2.0]}, r"row 0: weights must have 4 entries, as labels; got \(2,\)"),
        ({"weights": [1.0, float("nan"), 1.0, 1.0]}, "row 0: weights holds NaN"),
        ({"labels": [1, 2]}, r"row 0: input_ids and labels must be equally long.*\(4,\) and \(2,\)"),
        ({"input_ids": [], "labels": []}, "at least one token"),
        ({"weights": ["a", "b", "c", "d"]}, r"row 0: weights must hold a number for every token; got \['a', 'b'"),
        ({"weights": [1.0, None, 1.0, 1.0]}, "row 0: weights must hold a number for every token"),
        ({"weights": [[1.0], [1.0, 2.0], [1.0], [1.0]]}, "row 0: weights must hold a number for every token"),
        ({"labels": [-100, 6.5, 7.0, 8.0]}, "row 0: labels must hold integers; got torch.float32"),
    ],
)
def test_broken_rows_are_named(row, told):
    with pytest.raises(ValueError, match=told):
        Collator(pad=0, columns=("weights",))([{**ROWS[0], **row}])


def test_a_column_that_begins_with_nothing_is_not_passed_over():
    """The first token has no score in many a data set; without an error its weights would be lost in silence."""
    with pytest.raises(
        ValueError, match=r"row 0: weights must hold a number for every token; got \[None, 1.0, 0.5, 2.0"
    ):
        Collator(pad=0)([{**ROWS[0], "weights": [None, 1.0, 0.5, 2.0]}])
    with pytest.raises(ValueError, match="at least one token"):
        Collator(pad=0)([{"input_ids": [], "weights": []}])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"attention_mask": [0, 1, 1, 1]}, "row 0: attention_mask holds 0; rows must come without padding"),
        ({"completion_mask": [0, 0, 1, 1]}, "row 0: completion_mask without labels"),
        ({"assistant_masks": [0, 0, 1, 1]}, "row 0: assistant_masks without labels"),
    ],
)
def test_what_other_collators_read_is_not_passed_over(row, told):
    bare = {"input_ids": [5, 6, 7, 8]}
    with pytest.raises(ValueError, match=told):
        Collator(pad=0)([bare | row])
    with pytest.raises(ValueError, match=told):
        Collator(pad=0)(rows_of([bare | row]))
    ones = {name: [1] * 4 for name in row}
    assert Collator(pad=0)([bare | {"labels": [-100, 6, 7, 8]} | ones])["labels"].tolist() == [[-100, 6, 7, 8]]


def test_bad_arguments_are_refused():
    for params, told in (
        ({}, "needs a padding token"),
        ({"pad": 0, "max_length": 0}, "max_length must be an integer of at least 1"),
        ({"pad": 0, "pack": 2.5}, "pack must be an integer"),
    ):
        with pytest.raises(ValueError, match=told):
            Collator(**params)
    with pytest.raises(ValueError, match="row 0 has 4 tokens, more than pack=3"):
        Collator(pad=0, pack=3)(ROWS)
    with pytest.raises(ValueError, match="at least one row"):
        Collator(pad=0)([])
    with pytest.raises(ValueError, match=r"x must be a tensor \(3, 4\), as the labels; got \(3, 3\)"):
        Labels.of(torch.zeros(3, 4).long(), {"x": torch.zeros(3, 3)})


def test_scores_belong_to_the_target_token():
    """By hand: row 1 predicts token 2. The loss, the column and the weight of token 2 all stand at index 2."""
    labels = torch.tensor([[7, 1, 2, -100, 3]])
    logits = torch.zeros(1, 5, 8)
    for place, value in ((0, 1.0), (1, 2.0), (3, 4.0)):  # the row before each target gives it this much
        logits[0, place, labels[0, place + 1]] = value
    marks = torch.tensor([[10.0, 11.0, 12.0, 13.0, 14.0]])
    row, place = targets(labels)
    assert row.tolist() == [0, 0, 0] and place.tolist() == [1, 2, 4]
    t = Tokens(LogitsHead(logits[row, place - 1]), labels, {"marks": marks})
    assert (
        t.label.tolist() == [1, 2, 3] and t.column("marks").tolist() == [11, 12, 14] and t.order.tolist() == [0, 1, 2]
    )
    expected = [np.log(7 + np.exp(v)) - v for v in (1.0, 2.0, 4.0)]
    assert np.allclose(t.nll, expected)
    for at, value in ((1, expected[0]), (2, expected[1]), (4, expected[2])):
        weights = torch.zeros(1, 5)
        weights[0, at] = 3.0
        loss = kr.sft.SFT(denominator="kept")(logits, labels, weights=weights)
        assert np.isclose(float(loss), 3 * value)
    # a weight at a place that is no target, the first token included, has no effect
    weights = torch.tensor([[5.0, 0, 0, 5.0, 0]])
    assert float(kr.sft.SFT(denominator="kept")(logits, labels, weights=weights)) == 0
    # excess loss picks the token whose own reference is low, not its neighbour's
    reference = torch.tensor([[0.0, 9.0, 0.0, 9.0, 9.0]])
    loss = kr.sft.Rho1(keep=0.4)(logits, labels, reference=reference)
    assert np.isclose(float(loss), expected[1])


def test_noise_is_uniform_and_its_own_for_seed_epoch_and_sequence():
    labels = torch.arange(4000).remainder(37).view(4, 1000)
    head = LogitsHead(torch.zeros(4 * 999, 40))
    lots = Tokens(head, labels, {}).noise(0)
    assert float(lots.min()) >= 0 and float(lots.max()) < 1
    assert np.allclose(np.sort(lots.numpy())[:: len(lots) // 10][:10], np.arange(10) / 10, atol=0.02)
    assert abs(np.corrcoef(lots[:-1], lots[1:])[0, 1]) < 0.05
    for other in (Tokens(head, labels, {}).noise(1), Tokens(head, labels, {}, epoch=1).noise(0)):
        assert abs(np.corrcoef(lots, other)[0, 1]) < 0.05
    salted = Tokens(head, labels, {"salt": torch.arange(4)[:, None].expand(4, 1000)}).noise(0)
    assert abs(np.corrcoef(lots, salted)[0, 1]) < 0.05
    same = torch.zeros(2, 50).long()
    salt = torch.tensor([[1], [2]]).expand(2, 50)
    twins = Tokens(LogitsHead(torch.zeros(98, 4)), same, {"salt": salt}).noise(0).view(2, 49)
    assert not torch.equal(twins[0], twins[1]), "equal answers to different prompts draw their own lots"
