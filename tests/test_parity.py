"""The comparison with kvpress: how agreement is counted, and the committed table that `make parity` makes anew."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest


@pytest.fixture(scope="module")
def ours(root: Path) -> ModuleType:
    """parity/ours.py, which is a script outside the packages."""
    spec = importlib.util.spec_from_file_location("parity_ours", root / "parity" / "ours.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table(ours: ModuleType) -> pd.DataFrame:
    return pd.read_csv(ours.TABLE, keep_default_na=False)


def test_agreement_counts_positions_and_heads(ours: ModuleType):
    agreement = ours.Agreement()
    agreement.add([[[0, 1, 2], [4, 5]], [[7], [8, 9]]], [[[2, 1, 0], [5, 6, 7]], [[7], [1, 2]]])
    # by head 3 of 3, 1 of the larger 3, 1 of 1, 0 of 2
    assert agreement.positions == pytest.approx(5 / 9)
    assert (agreement.same, agreement.heads) == (2, 4)
    assert (agreement.kept_ours, agreement.kept_theirs) == (["2-3 1-2"], ["3 1-2"])


def test_a_smaller_selection_does_not_pass_for_an_equal_one(ours: ModuleType):
    agreement = ours.Agreement()
    agreement.add([[[1, 2]]], [[[1, 2, 3, 4]]])
    assert (agreement.positions, agreement.same) == (0.5, 0)


@pytest.mark.parametrize(
    ("mine", "other", "says"),
    [([[[0]]], [[[0]], [[0]]], "not the same model"), ([[[1, 1]]], [[[1, 2]]], "twice")],
    ids=["layers", "repeated position"],
)
def test_agreement_refuses_what_cannot_be_compared(ours: ModuleType, mine: list, other: list, says: str):
    with pytest.raises(ValueError, match=says):
        ours.Agreement().add(mine, other)


def test_committed_table_has_a_row_for_every_comparison(ours: ModuleType, table: pd.DataFrame):
    assert tuple(table.columns) == ours.COLUMNS
    expected = [
        (case.method, repr(row.ours(ours.LENGTHS[-1])), case.theirs, row.changed, row.why)
        for case in ours.CASES
        for row in case.rows
    ]
    found = table[["method", "ours", "theirs", "variant", "why"]].itertuples(index=False, name=None)
    assert list(found) == expected, "a method or a setting changed: run `make parity`"
    assert table["positions"].between(0, 1).all() and (table["heads_equal"] <= table["heads"]).all()
    assert ((table["positions"] == 1) == (table["heads_equal"] == table["heads"])).all()
    for column in ("kvpress", "torch", "transformers_ours", "transformers_theirs", "date"):
        assert table[column].nunique() == 1 and table[column].str.match(r"\d").all()


def test_every_difference_to_kvpress_is_explained_by_a_variant(table: pd.DataFrame):
    compared = table[table["method"] != "none"]
    best = compared.groupby("theirs")["positions"].max()
    assert (best == 1).all(), f"no variant keeps the positions of {list(best[best < 1].index)}"
    chance = table[table["method"] == "none"]["positions"].item()
    assert chance < 0.5, "the comparison cannot tell methods from chance"
