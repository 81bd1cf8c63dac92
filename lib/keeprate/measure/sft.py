"""Fine-tuning with many methods on tasks that know the truth: learning curves, selection against the truth, claims."""

from __future__ import annotations

import copy
import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn
from tqdm.auto import tqdm

from keeprate import check, sft
from keeprate.measure.interval import Interval
from keeprate.measure.truth import auroc
from keeprate.tasks import finetune

SFT, ORACLE, EVOLVING = "SFT", "Oracle", "TokenCleaning(evolving)"
REFERENCE_ROWS = 256  # rows without noise for the reference model, an eighth of the recipe's
SHUFFLED_SHARE = 0.05  # of the rows whose outputs are exchanged for SHAD; 1 % of so few rows would be twenty
PROBE_ROWS = 32  # training rows, the last, on which a method's scores are held against the truth
ANNOTATED_ROWS = 128  # rows, the first, whose groups TokenFilter's classifier is fitted on


def recipe(kind: str, lr: float = 0.0, steps: int = 0, rows: int = 0) -> finetune.Recipe:
    """A task's recipe with other numbers.

    Args:
        kind: a task; public data begins with lr 1e-5 and 200 steps.
        lr, steps, rows: in place of the recipe's; 0 leaves it.
    """
    usual = finetune.RECIPES.get(kind, finetune.Recipe(lr=1e-5, steps=200))
    other = {"lr": lr, "steps": steps, "rows": rows}
    other |= {"warmup": min(usual.warmup, steps)} if steps else {}
    return replace(usual, **{name: value for name, value in other.items() if value})


@dataclass(frozen=True)
class Material:
    """One task drawn with one seed, and all that methods want to know of its tokens, computed when first asked for.

    Args:
        model: what is fine-tuned; never changed.
        tokenizer: its tokenizer.
        kind: a task, as `finetune.sample` takes it.
        seed: decides rows, order and what is drawn in training.
        recipe: of the training; the task's own when None, which only embedded tasks have.
        tested: rows of the test split, the same for every seed.
        noise: as in `finetune.sample`.

    Raises:
        ValueError: No recipe for a task that is not embedded.
    """

    model: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    kind: str
    seed: int = 0
    recipe: finetune.Recipe | None = None
    tested: int = 128
    noise: float | None = None

    def __post_init__(self) -> None:
        if self.recipe is None:
            check.choice("kind", self.kind, finetune.KINDS)
            object.__setattr__(self, "recipe", finetune.RECIPES[self.kind])

    @cached_property
    def records(self) -> finetune.Records:
        """The training split."""
        return finetune.sample(self.tokenizer, self.kind, self.recipe.rows, self.seed, noise=self.noise)

    @cached_property
    def test(self) -> finetune.Records:
        """The test split."""
        return finetune.sample(self.tokenizer, self.kind, self.tested, 0, "test", self._clean)

    @property
    def _clean(self) -> float | None:
        """The noise of splits that have none; None keeps the groups of public data that is drawn without."""
        return None if self.noise is None else 0.0

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The training split row by row, without further columns."""
        return self.records.rows()

    @cached_property
    def clean(self) -> list[dict[str, Any]]:
        """A few rows without noise."""
        return finetune.sample(self.tokenizer, self.kind, REFERENCE_ROWS, self.seed, "reference", self._clean).rows()

    @cached_property
    def reference(self) -> nn.Module:
        """The model after as many steps on the few clean rows."""
        return self.train(self.clean, sft.SFT())[0]

    @cached_property
    def base(self) -> sft.Scores:
        """Losses of the training split before anything is trained."""
        return sft.score(self.model, self.rows)

    @cached_property
    def shuffled(self) -> sft.Scores:
        """Losses of a copy that was trained for a sixth of the steps on a few rows with exchanged outputs (SHAD)."""
        few = sft.shuffled(self.rows, SHUFFLED_SHARE, self.seed)
        return sft.score(self.train(few, sft.SFT(), max(1, self.recipe.steps // 6))[0], self.rows)

    def train(
        self, rows: list[dict[str, Any]], method: sft.SFTMethod, steps: int | None = None, **options: Any
    ) -> tuple[nn.Module, pd.DataFrame]:
        """A copy of the model, trained, and what `keeprate.sft.train` says of it."""
        recipe, model = self.recipe, copy.deepcopy(self.model)
        torch.manual_seed(self.seed)
        told = sft.train(
            model,
            rows,
            method,
            steps=recipe.steps if steps is None else steps,
            batch_size=recipe.batch,
            lr=recipe.lr,
            warmup=recipe.warmup / recipe.steps,
            seed=self.seed,
            groups=self.records.names,
            **options,
        )
        return model, told

    @cached_property
    def begin(self) -> dict[str, float]:
        """`evaluate` before anything is trained."""
        return self.evaluate(self.model)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Score on the test split, and nats a token of what was to be learned."""
        found = finetune.evaluate(model, self.tokenizer, self.test)
        return {"score": found.value, "nll": found.nll}

    def prepared(self, method: sft.SFTMethod) -> list[dict[str, Any]]:
        """The training split with the columns that a method needs.

        Raises:
            ValueError: A column that nothing here can fill.
        """
        fill: dict[str, Callable[[list], list]] = {
            "reference": lambda rows: self._referenced.join(rows, "reference"),
            "base": lambda rows: self.base.join(rows, "base"),
            "history": lambda rows: self.base.join(rows, "history"),
            "original": lambda rows: self.base.join(rows, "original"),
            "shuffled": lambda rows: self.shuffled.join(rows, "shuffled"),
            "frequency": sft.frequency,
            "key": lambda rows: _with(rows, key=self._keys),
            "forget": lambda rows: _with(rows, forget=self._forget),
            "kept": lambda rows: method.prepare(self._referenced.join(self.base.join(rows, "base"), "reference")),
        }
        rows = self.rows
        for name in method.needed:
            if name not in fill:
                raise ValueError(f"{method!r} needs a column {name!r}; allowed: {', '.join(map(repr, fill))}")
            rows = fill[name](rows)
        return rows

    @cached_property
    def oracle(self) -> list[dict[str, Any]]:
        """The training split with the truth as weights."""
        return self.records.rows(weights=self.records.truth.float())

    @cached_property
    def _referenced(self) -> sft.Scores:
        return sft.score(self.reference, self.rows)

    @cached_property
    def _keys(self) -> list[list[int]]:
        """1 where tools part, 2 at the token that ends an argument, as TL-Training's parser would say."""
        if self.kind != "tools":
            raise ValueError(f"only the task 'tools' has tool names; got {self.kind!r}")
        names = {name: self.tokenizer(f" {name}", add_special_tokens=False)["input_ids"] for name in finetune.REQUESTS}
        places = {tuple(ids): sft.key_places(ids, list(names.values())) for ids in names.values()}
        found = []
        for row in self.rows:
            marks, starts = np.zeros(len(row["group"]), dtype=int), np.array([-1, *row["group"]])
            runs = np.flatnonzero((starts[1:] == 1) & (starts[:-1] != 1))  # tool, item, day
            first = int(runs[0])
            length = int(np.argmin(np.array([*row["group"][first:], 0]) == 1))
            name = tuple(row["input_ids"][first : first + length])
            marks[[first + place for place in places[name]]] = 1
            marks[runs[1:]] = 2  # item and day are one token each
            found.append(marks.tolist())
        return found

    @cached_property
    def _forget(self) -> list[list[float]]:
        """Probability that a token is not to be learned, of a classifier fitted on a few rows with known groups.

        The paper's classifier reads both sides of a token. Here it is logistic: on the clean model's loss of the token
        and of its neighbours, and that model's last hidden states at the token and behind it.
        """
        from sklearn.linear_model import LogisticRegression

        hidden, there = _hidden(self.reference, self.records), self.records.group >= 0
        losses = torch.zeros(there.shape)
        for i, loss in enumerate(self._referenced.nll):
            losses[i, : len(loss)] = torch.from_numpy(loss)
        near = torch.stack([losses.roll(shift, 1) for shift in (1, 0, -1)], dim=-1)
        seen = torch.cat([hidden, hidden.roll(-1, 1), near], dim=-1)
        few = torch.arange(len(there)) < ANNOTATED_ROWS
        chosen = there & few[:, None]
        mean, spread = seen[chosen].mean(0), seen[chosen].std(0) + 1e-6
        fitted = LogisticRegression(C=0.05, max_iter=200)
        fitted.fit(((seen[chosen] - mean) / spread).numpy(), (self.records.group[chosen] == 0).numpy())
        say = torch.zeros(there.shape)
        say[there] = torch.from_numpy(fitted.predict_proba(((seen[there] - mean) / spread).numpy())[:, 1]).float()
        lengths = self.records.attention_mask.sum(1).tolist()
        return [row[:length] for row, length in zip(say.tolist(), lengths, strict=True)]


def _with(rows: list[dict[str, Any]], **columns: list[list]) -> list[dict[str, Any]]:
    """The rows with columns added."""
    return [row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(rows)]


@torch.inference_mode()
def _hidden(model: nn.Module, records: finetune.Records, batch: int = 128) -> Tensor:
    """Last hidden states [n, length, width]."""
    device = next(model.parameters()).device
    options = {"output_hidden_states": True, "use_cache": False, "logits_to_keep": 1}
    found = [
        model(ids.to(device), attention_mask=mask.to(device), **options).hidden_states[-1].float().cpu()
        for ids, mask in zip(records.input_ids.split(batch), records.attention_mask.split(batch), strict=True)
    ]
    return torch.cat(found)


def separation(method: sft.SFTMethod, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> float:
    """How well a method's scores tell tokens to be learned from the others at this point of the training.

    Args:
        method: the objective.
        model: as far as it is trained.
        rows: with the columns that the method needs, and `group`.

    Returns:
        AUROC over all targets of the rows: 1 = every token to be learned scores higher, 0.5 = chance; NaN without both
        groups.
    """
    batch = sft.Collator(pad=0)(list(rows))
    group = batch["labels"].columns["group"]
    seen = sft.weigh(method, model, batch)
    target = seen.target.cpu()
    return auroc(seen.score.cpu()[target][None], (group[target] == 1)[None]).item()


def run(material: Material, name: str, method: sft.SFTMethod, points: int = 3) -> tuple[nn.Module, pd.DataFrame]:
    """Train once and measure on the way.

    Args:
        material: task, seed and model.
        name: of the contender; `ORACLE` trains on the true tokens alone, `EVOLVING` cleans in rounds.
        method: its objective.
        points: measurements behind the first.

    Returns:
        The trained model; and a row for every measurement: method, kind, seed, step, score, nll, auroc, the statistics
        of `keeprate.sft.train`, and seconds of the whole run, measuring included.

    Raises:
        ValueError: As `Material.prepared`.
    """
    rows = material.oracle if name == ORACLE else material.rows if name == EVOLVING else material.prepared(method)
    probe = rows[-PROBE_ROWS:]
    begin = time.perf_counter()

    first = iter([material.begin])

    def evaluate(model: nn.Module) -> dict[str, float]:
        found = next(first, None) or material.evaluate(model)  # before training all methods have the same score
        return found if name in (ORACLE, EVOLVING) else found | {"auroc": separation(method, model, probe)}

    if name == EVOLVING:
        model, told = _evolve(material, method, evaluate)
    else:
        every = -(-material.recipe.steps // check.whole("points", points))
        model, told = material.train(rows, method, evaluate=evaluate, every=every)
    told.insert(0, "method", name)
    told.insert(1, "kind", material.kind)
    told.insert(2, "seed", material.seed)
    return model, told.assign(seconds=time.perf_counter() - begin)


def _evolve(
    material: Material, method: sft.SFTMethod, evaluate: Callable[[nn.Module], dict[str, float]]
) -> tuple[nn.Module, pd.DataFrame]:
    """Self-evolving cleaning in four rounds of a quarter of the others' steps each, rounded down."""
    model, parts, told = copy.deepcopy(material.model), 4, [{"step": 0} | evaluate(material.model)]
    recipe, each = material.recipe, material.recipe.steps // 4

    def train(model: nn.Module, rows: list[dict[str, Any]], method: sft.SFTMethod) -> None:
        torch.manual_seed(material.seed)
        # A round begins where the whole run's schedule stands, not at its peak anew, and falls to zero: the mean rate
        # over all rounds is five eighths of the others'.
        behind = len(told) - 1
        lr = recipe.lr * (parts - behind) / parts
        last = sft.train(
            model,
            rows,
            method,
            steps=each,
            batch_size=recipe.batch,
            lr=lr,
            warmup=recipe.warmup / recipe.steps,
            seed=material.seed,
            groups=material.records.names,
        ).iloc[-1]
        told.append({**last.to_dict(), "step": each * len(told)} | evaluate(model))

    sft.evolve(model, material.rows, train, method, parts=parts)
    return model, pd.DataFrame(told)


def study(
    model: nn.Module,
    tokenizer: Any,
    kinds: Mapping[str, Mapping[str, sft.SFTMethod]],
    seeds: Iterable[int],
    recipes: Mapping[str, finetune.Recipe] | None = None,
    tested: int = 128,
    points: int = 3,
    noise: float | None = None,
    kept: Path | None = None,
) -> pd.DataFrame:
    """Train every method on every task with every seed.

    Args:
        model: fine-tuned again from the same weights for every run.
        tokenizer: its tokenizer.
        kinds: task -> name -> method.
        seeds: of rows and order.
        recipes: task -> recipe; the task's own for those that are not named.
        tested: rows of the test split.
        points: measurements a run.
        noise: as in `finetune.sample`.
        kept: folder in which every finished run is written down, so that a study that was interrupted goes on where it
            stopped; removed at the end. It knows settings, not code: delete it after a change.

    Returns:
        The rows of `run`, one under the other.
    """
    from keeprate.project import write_text  # which needs pydantic, not installed where only training happens

    todo = [(kind, int(seed)) for kind in kinds for seed in seeds]
    found = []
    with tqdm(total=sum(len(kinds[kind]) for kind, _ in todo), desc="runs") as bar:
        for kind, seed in todo:
            material = Material(model, tokenizer, kind, seed, (recipes or {}).get(kind), tested, noise)
            for name, method in kinds[kind].items():
                told = repr((kind, seed, name, method, material.recipe, tested, points, noise))
                path = kept and kept / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.csv"
                if path and path.is_file():
                    found.append(pd.read_csv(path))
                else:
                    found.append(run(material, name, method, points)[1])
                    if path:
                        write_text(path, found[-1].to_csv(index=False))
                bar.update()
    if kept:
        shutil.rmtree(kept, ignore_errors=True)
    return pd.concat(found, ignore_index=True)


def final(curves: pd.DataFrame) -> pd.DataFrame:
    """The last measurement of every run."""
    return curves.loc[curves.groupby(["kind", "method", "seed"], sort=False).step.idxmax()].reset_index(drop=True)


def over_seeds(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean over seeds with Student's t interval; of infinite width for a single seed.

    Args:
        values: one number a seed.
        confidence: coverage of the interval.

    Raises:
        ValueError: On no number, or NaN.
    """
    values = np.asarray(values, dtype=float)
    if not len(values) or np.isnan(values).any():
        raise ValueError(f"values must hold at least one number and no NaN; got {values.tolist()}")
    half = np.inf
    if len(values) > 1:
        half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return Interval(float(values.mean()), float(values.mean() - half), float(values.mean() + half), len(values))


def gains(curves: pd.DataFrame) -> pd.DataFrame:
    """What every method gains over plain fine-tuning, as a share of what the true mask gains on average over seeds.

    Args:
        curves: of `study`, with `SFT` and `ORACLE` in every task.

    Returns:
        Task by task, seed by seed: kind, seed, method, score, gain: 0 = as plain fine-tuning, 1 = as the oracle; all 0
        where the oracle gains nothing.
    """
    last = final(curves)
    wide = last.pivot_table("score", ["kind", "seed"], "method", sort=False)
    gap = (wide[ORACLE] - wide[SFT]).groupby("kind").mean()
    # positive where better: the oracle's own gain sets the sign
    unit = pd.Series(wide.index.get_level_values("kind").map(gap), wide.index)
    share = wide.sub(wide[SFT], axis=0).div(unit.where(unit.abs() > 1e-9, np.inf), axis=0)
    long = share.stack().rename("gain").reset_index()
    return long.merge(last[["kind", "seed", "method", "score"]], on=["kind", "seed", "method"])


def compare(gained: pd.DataFrame, a: str, b: str = SFT, kinds: Sequence[str] | None = None) -> Interval:
    """Gain of a method minus that of another, seed by seed, averaged over tasks.

    Args:
        gained: of `gains`.
        a, b: names of the two.
        kinds: tasks; all that are there when None.

    Raises:
        ValueError: One of the two was not trained on a task.
    """
    wide = gained[gained.kind.isin(kinds or gained.kind.unique())].pivot_table("gain", ["kind", "seed"], "method")
    for name in (a, b):
        if name not in wide or wide[name].isna().any():
            raise ValueError(f"{name!r} was not trained on every task; there are {', '.join(map(repr, wide))}")
    return over_seeds((wide[a] - wide[b]).groupby("seed").mean().to_numpy())


def summarise(table: pd.DataFrame, value: str, by: Sequence[str] = ("kind", "method", "step")) -> pd.DataFrame:
    """Mean of a column over seeds, with its interval; without width for a single seed.

    Args:
        table: with a column `seed`, such as what `study` and `gains` return.
        value: the column; rows where it is NaN are left out.
        by: what tells groups apart.

    Returns:
        The columns of `by`, value, low, high, seeds.
    """
    found = []
    for key, part in table.dropna(subset=[value]).groupby(list(by), sort=False):
        mean = over_seeds(part[value].to_numpy())
        ends = mean.bounds if mean.n > 1 else (mean.value, mean.value)
        found.append((*key, mean.value, *ends, mean.n))
    return pd.DataFrame(found, columns=[*by, value, "low", "high", "seeds"])
