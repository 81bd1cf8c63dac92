"""What a first attempt gets wrong is refused in words, and never trained on in silence."""

import copy

import pytest
import torch

import keeprate as kr
from keeprate.sft import Collator

ROWS = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}, {"input_ids": [3, 4, 9], "labels": [3, 4, 9]}]


def train(model, rows, method=None, **options):
    return kr.sft.train(model, rows, kr.sft.SFT() if method is None else method, steps=1, batch_size=2, **options)


@pytest.fixture
def untouched(llama):
    """The model, which must be as before when the test is over."""
    state = copy.deepcopy(llama.state_dict())
    yield llama
    assert all(torch.equal(x, state[name]) for name, x in llama.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())
    assert torch.is_grad_enabled() and llama(input_ids=torch.tensor([[5, 6, 7]])).logits.shape[1] == 3


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        (lambda n: [1.0] * (n - 1), r"row 0: weights must have 4 entries, as labels; got \(3,\)"),
        (lambda n: [1.0] * (n + 1), r"row 0: weights must have 4 entries, as labels; got \(5,\)"),
        (lambda n: 1.0, r"row 0: weights must have 4 entries, as labels; got \(\)"),
        (lambda n: [], r"row 0: weights must have 4 entries"),
        (lambda n: [[1.0]] * n, r"row 0: weights must have 4 entries"),
        (lambda n: ["a"] * n, r"row 0: weights must hold a number for every token"),
    ],
)
def test_weights_that_do_not_fit_are_not_passed_over(untouched, weights, told):
    rows = [row | {"weights": weights(len(row["input_ids"]))} for row in ROWS]
    with pytest.raises(ValueError, match=told):
        Collator(pad=0)(rows)
    with pytest.raises(ValueError, match=r"weights must (have|hold)"):
        train(untouched, rows)


@pytest.mark.parametrize("without", [0, 1])
def test_weights_that_one_row_lacks(untouched, without):
    rows = [row | ({} if i == without else {"weights": [1.0] * len(row["input_ids"])}) for i, row in enumerate(ROWS)]
    with pytest.raises(ValueError, match=f"row {without}: unknown column 'weights'"):
        Collator(pad=0)(rows)
    with pytest.raises(ValueError, match="unknown column 'weights'"):
        train(untouched, rows)


@pytest.mark.parametrize("data", [[{"text": "hello"}] * 2, ["hello"] * 2])
def test_rows_that_are_no_tokens(untouched, data):
    for use in (lambda: train(untouched, data), lambda: kr.sft.score(untouched, data), lambda: Collator(pad=0)(data)):
        with pytest.raises(ValueError, match=r"row 0: rows must hold input_ids.*(text|hello)"):
            use()


def test_splits_in_place_of_rows(untouched):
    for use in (train, kr.sft.score):
        with pytest.raises(ValueError, match=r"sequence of rows; got dict of train, test"):
            use(untouched, {"train": ROWS, "test": ROWS})


def test_a_missing_column_points_at_the_trainer_and_keeps_quiet_about_ours(untouched):
    with pytest.raises(ValueError, match=r"unknown column 'reference'. Allowed: none.*remove_unused_columns=False"):
        train(untouched, ROWS, kr.sft.Rho1())


def test_labels_outside_the_vocabulary(untouched):
    for label in (-1, 10**6):
        with pytest.raises(ValueError, match=r"labels must lie in \[0, .*\) or be -100"):
            train(untouched, [{"input_ids": [1, 2, 3], "labels": [1, 2, label]}])


def test_what_is_no_model_and_no_method(untouched):
    for method in (kr.sft.DFT, "DFT", kr.kv.SnapKV()):
        with pytest.raises(ValueError, match=r"such as kr\.sft\.DFT\(\); got Llama.* and (.*DFT|str|SnapKV)"):
            train(untouched, ROWS, method)
    with pytest.raises(ValueError, match=r"train takes a model.*got list"):
        train([untouched], ROWS)
    for method, batch in ((kr.sft.DFT, Collator(pad=0)(ROWS)), (kr.sft.DFT(), ROWS)):
        with pytest.raises(ValueError, match=r"weigh takes a method.*and a batch"):
            kr.sft.weigh(method, untouched, batch)


def test_scores_do_not_replace_what_the_model_reads(untouched):
    scores = kr.sft.score(untouched, ROWS)
    for name in ("labels", "input_ids"):
        with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
            scores.join(ROWS, name)


def test_the_loss_of_another_method_than_the_open_one(untouched):
    batch = Collator(pad=0)(ROWS)
    labels = batch.pop("labels")
    with pytest.raises(ValueError, match="Is another method's `with` block"), kr.sft.DFT()(untouched):
        kr.sft.Focal()(untouched(**batch), labels)
