"""The table of methods: what the README prints and what the conformance suite runs."""

import dataclasses
import importlib
import re

import pandas as pd
import pytest

import keeprate as kr
from keeprate.anatomy import DECODERS, supported
from keeprate.method import Method, papers, register

COLUMNS = ["name", "family", "paper", "arxiv", "year", "kind", "needs", "architectures", "reconstructed"]
# lines of every figure rather than anybody's proposal
NO_PAPER = {"RandomKV", "OracleKV", "RandomRead", "SFT", "RandomMask"}
NO_PAPER |= {"RandomVisual", "RandomInside", "UniformGrid", "Pooling", "OracleVisual"}
TABLE = kr.methods()


def test_the_columns_are_the_promised_ones():
    assert list(TABLE.columns) == COLUMNS
    assert TABLE["name"].is_unique and len(TABLE) >= 41


def test_the_fourteen_methods_are_there():
    wanted = "Random Radial TopK EViT ToMe ATS DPCKNN KMedoids PiToMe TokenPooling BAT ATC ZeroTPrune MSTM"
    assert set(wanted.split()) <= set(kr.methods("vit")["name"])


def test_the_kv_methods_are_there():
    wanted = (
        "RandomKV OracleKV StreamingLLM H2O SnapKV PyramidKV AdaKV TOVA KeyDiff KNorm ExpectedAttention Scissorhands "
        "A2SF VATP CAOTE SepLLM RCStat KVCompose ZipCache PoD Quest TidalDecode TokenSelect FASA ActQKV"
    )
    assert set(wanted.split()) <= set(kr.methods("kv")["name"])


def test_the_fine_tuning_methods_are_there():
    wanted = (
        "SFT RandomMask Focal DFT EntropyWeight Rho1 TokenCleaning SsToken ProFit RFT PDL NTL TLTraining TokenFilter "
        "CT PRIOR"
    )
    assert set(wanted.split()) <= set(kr.methods("sft")["name"])


def test_every_paper_belongs_to_a_method_and_every_method_has_an_entry():
    entries = papers()
    assert set(TABLE["name"]) <= set(entries)
    assert all(set(entry) == {"title", "arxiv", "year", "venue"} for entry in entries.values())


def test_an_arxiv_id_has_one_title():
    titles = TABLE[TABLE["arxiv"] != ""].groupby("arxiv")["paper"].nunique()
    assert bool((titles == 1).all()), titles[titles > 1]


@pytest.mark.parametrize("row", list(TABLE.itertuples(index=False)), ids=lambda row: row.name)
def test_every_row_is_complete(row):
    assert row.kind.strip() and row.architectures.strip()
    assert isinstance(row.reconstructed, bool)
    assert isinstance(row.needs, str)
    if row.name in NO_PAPER:
        assert row.kind == "baseline" and row.paper == row.arxiv == "" and pd.isna(row.year)
        return
    assert row.paper.strip()
    if row.arxiv:
        assert re.fullmatch(r"\d{4}\.\d{4,5}", row.arxiv)
        assert 0 <= row.year - (2000 + int(row.arxiv[:2])) <= 2, "published in the year of the preprint or soon after"
    assert 1900 < row.year < 2100
    if row.family == "vit":
        assert set(row.architectures.split(", ")) <= set(supported())
    if row.family in ("kv", "sft"):
        assert set(row.architectures.split(", ")) <= set(DECODERS.values())


@pytest.mark.parametrize("row", list(TABLE.itertuples(index=False)), ids=lambda row: row.name)
def test_every_method_is_a_documented_frozen_value(row):
    method = kr.method(row.name)
    cls = type(method)
    assert isinstance(method, Method) and cls.__dataclass_params__.frozen and method.name == row.name
    assert hash(method) == hash(kr.method(row.name)) and method == kr.method(row.name)
    family = importlib.import_module(f"keeprate.{row.family}")
    assert getattr(family, row.name) is cls and row.name in family.__all__
    doc = cls.__doc__
    assert doc and not doc.startswith(f"{row.name}("), "a docstring of its own, not the generated signature"
    own = set(cls.__annotations__) - {"where", "takes_ragged"}
    for field in dataclasses.fields(cls):
        if field.name in own and "ClassVar" not in str(cls.__annotations__[field.name]):
            assert re.search(rf"^\s+{field.name}\b", doc, re.M), f"{row.name}.{field.name} is not documented"


def test_one_family_is_a_part_of_the_table():
    for family in ("vit", "kv", "sft"):
        assert set(kr.methods(family)["family"]) == {family}
    with pytest.raises(ValueError, match="'audio'") as error:
        kr.methods("audio")
    assert "vit" in str(error.value)


@pytest.mark.parametrize(
    ("typo", "meant"), [("ToMee", "ToMe"), ("topk", "TopK"), ("EVit", "EViT"), ("SnapKv", "SnapKV")]
)
def test_a_misspelt_method_gets_a_hint(typo, meant):
    with pytest.raises(ValueError, match=typo) as error:
        kr.method(typo)
    assert meant in str(error.value)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="TopK"):

        @register(kind="pruning")
        class TopK(Method):
            pass

    assert kr.method("TopK").keep == 0.7
