"""Measuring fine-tuning: columns that methods need, what selection finds, gains over plain training, intervals."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from keeprate import load, sft
from keeprate.measure import sft as measure
from keeprate.tasks import finetune


@pytest.fixture(scope="module")
def loaded():
    return load("llama-docs-draft")


def material(loaded, kind, **options):
    recipe = finetune.Recipe(lr=1e-3, steps=12, warmup=1, batch=4, rows=24)
    return measure.Material(loaded.model, loaded.processor, kind, recipe=recipe, tested=8, **options)


def test_columns_lie_at_the_tokens_they_speak_of(loaded):
    task = material(loaded, "tools")
    rows = task.prepared(sft.RFT())
    with torch.no_grad():
        ids = torch.tensor([rows[0]["input_ids"]])
        loss = torch.nn.functional.cross_entropy(loaded.model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    there = torch.tensor(rows[0]["group"]) >= 0
    torch.testing.assert_close(torch.tensor(rows[0]["original"])[there], loss[there[1:]], atol=1e-4, rtol=1e-4)
    assert rows[0]["shuffled"] != rows[0]["original"]
    before = copy.deepcopy(loaded.model.state_dict())
    task.prepared(sft.Rho1())
    assert all(torch.equal(before[name], weight) for name, weight in loaded.model.state_dict().items())


def test_key_tokens_are_where_tool_names_part(loaded):
    task, say = material(loaded, "tools"), loaded.processor.decode
    for row in task.prepared(sft.TLTraining()):
        content = [i for i, group in enumerate(row["group"]) if group == 1]
        *name, item, day = content
        assert say(row["input_ids"][name[0] : name[-1] + 1]).strip() in finetune.REQUESTS
        keys = {i for i, key in enumerate(row["key"]) if key == 1}
        assert name[0] in keys and keys <= set(name)  # get or set, then price, place or stock
        assert {i for i, key in enumerate(row["key"]) if key == 2} == {item, day}
    with pytest.raises(ValueError, match="only the task 'tools' has tool names; got 'numbers'"):
        material(loaded, "numbers").prepared(sft.TLTraining())


def test_a_column_that_nobody_knows(loaded):
    with pytest.raises(ValueError, match="needs a column 'mine'; allowed: 'reference', 'base'"):
        material(loaded, "tools").prepared(sft.Rho1(reference="mine"))


def test_separation_is_the_chance_to_rank_a_wanted_token_higher(loaded):
    task = material(loaded, "documents")

    class Told(sft.SFT):
        columns = ("said",)
        said = "said"

        def weigh(self, t):
            return t.column("said").to(t.nll.dtype)

    truth = [row | {"said": [float(g == 1) for g in row["group"]]} for row in task.rows]
    assert measure.separation(Told(), loaded.model, truth) == 1.0
    lies = [row | {"said": [float(g == 0) for g in row["group"]]} for row in task.rows]
    assert measure.separation(Told(), loaded.model, lies) == 0.0
    assert measure.separation(sft.SFT(), loaded.model, task.rows) == 0.5
    # probable tokens are the clean ones: the model knows the language
    assert measure.separation(sft.DFT(), loaded.model, task.rows) > 0.7


def test_the_classifier_is_better_on_rows_it_has_not_seen_than_chance(loaded, monkeypatch):
    monkeypatch.setattr(measure, "ANNOTATED_ROWS", 40)
    recipe = finetune.Recipe(lr=1e-3, steps=2, warmup=1, batch=4, rows=80)
    task = measure.Material(loaded.model, loaded.processor, "documents", recipe=recipe, tested=8)
    rows = task.prepared(sft.TokenFilter())
    assert all(0.0 <= p <= 1.0 for row in rows for p in row["forget"])
    assert measure.separation(sft.TokenFilter(), loaded.model, rows[40:]) > 0.7


def test_what_a_score_is_held_against_was_not_told_before(loaded, monkeypatch):
    """TokenFilter's classifier is fitted on the first rows; a method's AUROC is taken on the last ones."""
    monkeypatch.setattr(measure, "ANNOTATED_ROWS", 60)
    monkeypatch.setattr(measure, "PROBE_ROWS", 16)
    recipe = finetune.Recipe(lr=1e-3, steps=2, warmup=1, batch=4, rows=80)
    task = measure.Material(loaded.model, loaded.processor, "documents", recipe=recipe, tested=8)
    method = sft.TokenFilter()
    rows = task.prepared(method)
    _, told = measure.run(task, "TokenFilter", method, points=1)
    assert told.auroc[0] == measure.separation(method, loaded.model, rows[64:])


def test_study_trains_every_method_from_the_same_weights(loaded):
    before = copy.deepcopy(loaded.model.state_dict())
    recipe = finetune.Recipe(lr=1e-3, steps=4, warmup=1, batch=4, rows=24)
    methods = {"SFT": sft.SFT(), "Oracle": sft.SFT(denominator="kept"), measure.EVOLVING: sft.TokenCleaning()}
    kinds = {"tools": methods, "documents": methods}
    recipes = dict.fromkeys(kinds, recipe)
    curves = measure.study(loaded.model, loaded.processor, kinds, [0, 1], recipes, tested=8, points=2)
    assert all(torch.equal(before[name], weight) for name, weight in loaded.model.state_dict().items())
    steps = curves.groupby(["kind", "method", "seed"]).step.apply(list)
    assert len(steps) == 12 and steps["tools", "SFT", 0] == [0, 2, 4] and steps["tools", measure.EVOLVING, 1][-1] == 4
    start = curves[curves.step == 0].groupby("kind").score
    assert (start.max() == start.min()).all()
    again = measure.study(loaded.model, loaded.processor, {"tools": {"SFT": sft.SFT()}}, [1], recipes, 8, 2)
    same = curves[(curves.kind == "tools") & (curves.method == "SFT") & (curves.seed == 1)]
    np.testing.assert_allclose(again.nll, same.nll)
    assert len(measure.final(curves)) == 12 and (measure.final(curves).step == 4).all()


CURVES = pd.DataFrame(
    [
        (kind, method, seed, step, score)
        for kind, table in {
            "arithmetic": {"SFT": (0.2, 0.4), "Oracle": (0.8, 0.8), "DFT": (0.5, 0.4)},  # more is better
            "documents": {"SFT": (4.0, 3.8), "Oracle": (3.5, 3.3), "DFT": (3.5, 3.8)},  # less is better
        }.items()
        for method, scores in table.items()
        for seed, last in enumerate(scores)
        for step, score in ((0, 9.0), (10, last))
    ],
    columns=["kind", "method", "seed", "step", "score"],
)


def test_gains_are_shares_of_what_the_oracle_gains():
    gained = measure.gains(CURVES)
    by = gained.set_index(["kind", "method", "seed"]).gain.sort_index()
    assert by["arithmetic", "SFT"].tolist() == [0.0, 0.0]
    # the oracle gains 0.6 and 0.4, on average 0.5; for documents -0.5 and -0.5
    assert by["arithmetic", "Oracle"].tolist() == pytest.approx([1.2, 0.8])
    assert by["arithmetic", "DFT"].tolist() == pytest.approx([0.6, 0.0])
    assert by["documents", "DFT"].tolist() == pytest.approx([1.0, 0.0])
    effect = measure.compare(gained, "DFT")
    assert effect.value == pytest.approx((0.8 + 0.0) / 2) and effect.n == 2
    assert measure.compare(gained, "DFT", "Oracle", ["documents"]).value == pytest.approx(-0.5)
    with pytest.raises(ValueError, match="'Rho1' was not trained on every task; there are 'DFT', 'Oracle', 'SFT'"):
        measure.compare(gained, "Rho1")


def test_nothing_is_gained_where_the_oracle_gains_nothing():
    flat = CURVES.assign(score=CURVES.score.where(CURVES.method != "Oracle", 0.3))  # as SFT on average
    gained = measure.gains(flat[flat.kind == "arithmetic"])
    assert (gained.gain == 0).all() and len(gained) == 6
    assert measure.compare(gained, "DFT").value == 0.0


def test_intervals_over_seeds_are_students():
    values = [0.1, 0.4, 0.2, 0.6, 0.3]
    found = measure.over_seeds(values)
    expected = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert found.bounds == pytest.approx(expected) and found.n == 5
    one = measure.over_seeds([0.3])
    assert one.bounds == (-np.inf, np.inf) and not one.excludes_zero
    with pytest.raises(ValueError, match="at least one number and no NaN"):
        measure.over_seeds([0.1, float("nan")])
    table = measure.summarise(CURVES, "score")
    last = table[(table.kind == "arithmetic") & (table.method == "DFT") & (table.step == 10)].iloc[0]
    assert last.score == pytest.approx(0.45) and last.seeds == 2 and last.low < 0.4 < 0.5 < last.high
    single = measure.summarise(CURVES[CURVES.seed == 0], "score")
    assert (single.low == single.score).all() and (single.high == single.score).all()


def test_recipes_with_other_numbers():
    usual = finetune.RECIPES["tools"]
    assert measure.recipe("tools") == usual
    short = measure.recipe("tools", steps=4, rows=32)
    assert (short.steps, short.rows, short.lr, short.warmup) == (4, 32, usual.lr, 4)
    assert measure.recipe("org/name", lr=2e-5).lr == 2e-5
    with pytest.raises(ValueError, match="kind must be one of"):
        measure.Material(torch.nn.Identity(), None, "org/name")


def test_an_interrupted_study_goes_on_where_it_stopped(loaded, monkeypatch, tmp_path):
    recipes = {"documents": finetune.Recipe(lr=1e-3, steps=2, warmup=1, batch=4, rows=8)}
    methods = {"SFT": sft.SFT(), "DFT": sft.DFT()}
    done, usual = [], measure.run

    def run(material, name, *rest):
        if len(done) == 1 and name == "DFT":
            done.append("interrupted")
            raise KeyboardInterrupt
        done.append(name)
        return usual(material, name, *rest)

    def study(kept):
        return measure.study(loaded.model, loaded.processor, {"documents": methods}, [0], recipes, 4, 1, kept=kept)

    monkeypatch.setattr(measure, "run", run)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "kept")
    curves = study(tmp_path / "kept")
    assert done == ["SFT", "interrupted", "DFT"] and not (tmp_path / "kept").exists()
    whole = study(None)
    pd.testing.assert_frame_equal(curves.drop(columns="seconds"), whole.drop(columns="seconds"), check_like=True)
