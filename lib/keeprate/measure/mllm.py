"""Measure visual-token methods: what the model answers under them, what they keep, what the language model still costs.

Every method of a comparison sees the same images, so the vision encoder looks at them once: `Sight` records what its
attention layers saw and what came out, and shows that to each method in turn. `answers` does this for the questions of
`tasks.vqa`, with one row per method and question; `summarise` turns rows into numbers with intervals.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from keeprate.anatomy import multimodal
from keeprate.check import whole
from keeprate.measure.cost import EXTRA, race
from keeprate.measure.interval import bootstrap, wilson
from keeprate.measure.kv import kl
from keeprate.measure.sight import Sight
from keeprate.measure.table import ratios, summarise
from keeprate.measure.truth import auroc
from keeprate.mllm.base import MLLMMethod, Wrapper
from keeprate.mllm.baselines import OracleVisual
from keeprate.mllm.encoder import around
from keeprate.mllm.session import MLLMTrace, Stopwatch
from keeprate.models import Loaded
from keeprate.tasks import words
from keeprate.tasks.vqa import VQA, Batch

__all__ = ["Sight", "answers", "located", "prefill_cost", "summarise", "yes_no"]

Methods = Mapping[str, MLLMMethod | None]  # name in the tables -> method; None = every visual token


# --- what a method kept against what was needed -----------------------------------------------------------------------


def located(trace: MLLMTrace, needed: torch.Tensor) -> dict[str, torch.Tensor]:
    """How well a method found the visual tokens that a question needs. All shares are means over decoder layers.

    Args:
        trace: Of one forward pass on a batch.
        needed: [b, n0] boolean, by number of the visual token in its sample.

    Returns:
        Each [b], NaN where nothing is needed: `found`, the share of the needed tokens that a layer still holds;
        `represented`, the share that lives on in some token, merged ones included; `possible`, what the best choice of
        as many tokens would find; `chance`, what a random one would; and `auroc` of the method's scores over the tokens
        that it scored, mean over its reductions, NaN where it gives none.

    Raises:
        ValueError: If `needed` does not fit.
    """
    there = torch.arange(int(trace.total.max()), device=trace.total.device) < trace.total[:, None]
    if needed.shape != there.shape or needed.dtype != torch.bool:
        raise ValueError(
            f"needed must be boolean {list(there.shape)}, one number a visual token; got {needed.dtype} "
            f"{list(needed.shape)}"
        )
    needed = needed.to(there.device) & there
    itself = there[:, None].repeat(1, trace.depth, 1)  # b layers n0
    lives = itself.clone()
    rates = []
    for i, step in enumerate(trace.steps):
        itself[:, step.layer :] = trace.mask(i)[:, None]
        lives[:, step.layer :] = (step.assignment >= 0)[:, None]
        if step.score is not None:
            rates.append(auroc(step.score, needed))
    wanted = needed.sum(1, keepdim=True).float()
    wanted = torch.where(wanted > 0, wanted, float("nan"))
    held = itself.sum(2).float()  # b layers
    rate = torch.stack(rates).nanmean(0) if rates else torch.full_like(wanted[:, 0], float("nan"))
    found = {
        "found": (itself & needed[:, None]).sum(2) / wanted,
        "represented": (lives & needed[:, None]).sum(2) / wanted,
        "possible": held.minimum(wanted) / wanted,
        "chance": held / trace.total[:, None] + 0 * wanted,
    }
    return {name: share.mean(1).cpu() for name, share in found.items()} | {"auroc": rate.cpu()}


def _needed(task: VQA, rows: range, trace: MLLMTrace) -> torch.Tensor | None:
    """The truth about a batch by number of the visual token; None where it is unknown on this model's tokens."""
    n0 = int(trace.total.max())
    one_view = trace.places is None or not bool((trace.places[..., :2] > 0).any())
    if task.truth is None or not one_view or bool((trace.total != n0).any()):
        return None
    try:
        return task.truth_on(n0)[rows.start : rows.stop]
    except ValueError:
        return None


def _given(method: MLLMMethod | None, needed: torch.Tensor | None) -> MLLMMethod | None:
    """An `OracleVisual` without a truth, alone or inside a wrapper, gets this one; other methods stay as they are."""
    if isinstance(method, OracleVisual) and method.needed is None:
        if needed is None:
            raise ValueError(
                "OracleVisual needs to know which tokens matter; this task does not on this model's tokens"
            )
        return replace(method, needed=needed.float())
    if isinstance(method, Wrapper):
        return replace(method, base=_given(method.base, needed))
    return method


# --- answers ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def answers(
    loaded: Loaded,
    task: VQA,
    methods: Methods,
    batch: int | Sequence[Batch] = 16,
    seed: int = 0,
    new_tokens: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """What a model answers, greedily, under several methods, beside what they kept.

    Args:
        loaded: Model and processor.
        task: Of `tasks.vqa.vqa`.
        methods: By the name they get in the table; None = every visual token. An `OracleVisual` is given the truth, and
            methods that read the question as text get it.
        batch: Questions a pass; or the batches of ``task.batches``, made once for several calls.
        seed: Of the methods.
        new_tokens: At most so many a answer; None = as the task says.
        progress: Show a bar.

    Returns:
        One row per method and question: method, sample, kind; question: "needle" where particular patches decide, else
        "gist", "unknown" for tasks without truth; answer: the text; correct: the task's score of it; agree: whether it
        is the answer with every token; kl: of the first answer token's prediction from that with every token, nats;
        tokens: visual tokens a decoder layer processes, mean over layers; found, represented, possible, chance, auroc:
        see `located`, NaN where the truth is unknown or empty.

    Raises:
        ValueError: On no methods, an empty task, or as a method does.

    Example:
        >>> answers(vlm, kr.tasks.vqa.vqa(), {"dense": None, "FastV": kr.mllm.FastV(keep=0.25)})   # doctest: +SKIP
    """
    _check_methods(methods)
    batches = list(task.batches(loaded, batch) if isinstance(batch, int) else batch)
    if not batches:
        raise ValueError(f"task {task.name!r} has no questions")
    most = whole("new_tokens", task.new_tokens if new_tokens is None else new_tokens)
    bar, tables = {} if progress else {"disable": True}, []
    for part in tqdm(batches, desc=task.name, leave=False, **bar):
        inputs, rows = part.to(loaded.model), part.rows
        asked = [task.questions[i] for i in rows]
        sight = Sight(loaded.model)
        with sight.watch(), _counted(loaded.model) as every:
            dense = _generate(loaded, inputs, most)
        needed = None if every is None else _needed(task, rows, every)
        for name, method in methods.items():
            said, logits, trace = *dense, every
            if method is not None:
                with sight.show(), _given(method, needed)(loaded.model, seed=seed, text=asked) as trace:
                    said, logits = _generate(loaded, inputs, most)
            columns = {
                "kind": [task.kinds[i] for i in rows],
                "question": [_question(task, i) for i in rows],
                "answer": said,
                "correct": task.score(said, rows).numpy(),
                "agree": np.array(said) == np.array(dense[0]),
                "kl": kl(dense[1][:, None], logits[:, None]).cpu().numpy(),
            }
            columns |= _kept(trace, needed)
            tables.append(pd.DataFrame({"method": name, "sample": rows} | columns))
    return pd.concat(tables, ignore_index=True)


def _question(task: VQA, row: int) -> str:
    return "unknown" if task.local is None else "needle" if bool(task.local[row]) else "gist"


@contextmanager
def _counted(model: nn.Module) -> Iterator[MLLMTrace | None]:
    """The model with every token, and a trace that counts them; None where the image is no part of the sequence."""
    if multimodal(model).cross:
        yield None
        return
    with MLLMMethod(keep=1.0)(model) as trace:
        yield trace


def _kept(trace: MLLMTrace | None, needed: torch.Tensor | None) -> dict[str, Any]:
    """The columns of `answers` about tokens."""
    shares = ("found", "represented", "possible", "chance", "auroc")
    if trace is None:
        return dict.fromkeys(("tokens", *shares), float("nan"))
    known = needed is not None and needed.shape == (len(trace.total), int(trace.total.max()))
    told = located(trace, needed) if known else dict.fromkeys(shares, torch.tensor(float("nan")))
    return {"tokens": trace.counts().float().mean(1).numpy()} | {name: x.numpy() for name, x in told.items()}


def _generate(loaded: Loaded, inputs: dict[str, torch.Tensor], most: int) -> tuple[list[str], torch.Tensor]:
    """Greedy answers as text, and the logits [b, v] of their first token."""
    tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
    end = loaded.model.generation_config.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    made = loaded.model.generate(
        **inputs,
        max_new_tokens=most,
        do_sample=False,
        num_beams=1,
        eos_token_id=tokenizer.eos_token_id if end is None else end,
        pad_token_id=pad,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = made.sequences[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)], made.logits[0].float()


def yes_no(samples: pd.DataFrame, task: VQA, by: Sequence[str] = ("method",), confidence: float = 0.95) -> pd.DataFrame:
    """POPE's measures of yes-no answers: "yes" is what is looked for.

    Args:
        samples: Of `answers`.
        task: The questions they answer, each answered by yes or no.
        by: Columns whose combinations get a row each.
        confidence: Of the intervals: Wilson's for the shares accuracy and yes, bootstrap over questions for the rest.

    Returns:
        One row per combination: n; accuracy, precision, recall, f1 and yes (share of answers that say yes), each with
        <name>_low and <name>_high. Precision without a yes counts as 0, as does an F1 without a hit.

    Raises:
        ValueError: If the task's answers are not yes and no, or a column is missing.

    Source: POPE, Evaluating Object Hallucination in Large Vision-Language Models.
    """
    if task.metric != "yesno":
        raise ValueError(
            f"questions answered by yes or no are needed; task {task.name!r} has the metric {task.metric!r}"
        )
    missing = [name for name in (*by, "sample", "answer") if name not in samples]
    if missing:
        raise ValueError(f"no column {missing}; the table has {', '.join(map(str, samples))}")
    truth = np.array([given[0].strip().lower() == "yes" for given in task.answers])
    rows = []
    for key, part in samples.groupby(list(by), sort=False, dropna=False):
        said = np.array([words.says_yes(text) for text in part["answer"]])
        pairs = np.stack([said, truth[part["sample"].to_numpy()]], 1)
        numbers = {"accuracy": wilson(pairs[:, 0] == pairs[:, 1], confidence)}
        numbers |= {name: bootstrap(pairs, measure, confidence) for name, measure in _YES_NO.items()}
        numbers["yes"] = wilson(pairs[:, 0], confidence)
        row = dict(zip(by, key, strict=True)) | {"n": len(part)}
        for name, number in numbers.items():
            row |= {name: number.value, f"{name}_low": number.low, f"{name}_high": number.high}
        rows.append(row)
    return pd.DataFrame(rows)


def _hits(pairs: np.ndarray) -> float:
    return float((pairs[:, 0] * pairs[:, 1]).sum())


_YES_NO: dict[str, Callable[[np.ndarray], float]] = {  # of pairs (said, true), 1 = yes
    "precision": lambda x: _hits(x) / max(1.0, x[:, 0].sum()),
    "recall": lambda x: _hits(x) / max(1.0, x[:, 1].sum()),
    "f1": lambda x: 2 * _hits(x) / max(1.0, x.sum()),
}


# --- cost -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def prefill_cost(
    loaded: Loaded,
    task: VQA,
    methods: Methods,
    batch: int = 16,
    seed: int = 0,
    repeats: int = 5,
    seconds_budget: float = 30.0,
) -> pd.DataFrame:
    """Time and work of reading the prompt behind the vision encoder, everybody in turns on the same machine.

    The encoder's own time is on neither side: it has looked at the images before. What a method computes from the
    encoder's attention is in. Only a method that works inside the encoder makes it look again. It pays for what this
    takes beyond a plain look; what it saves there is time of the encoder, and no gain here. An encoder that attends in
    windows (Qwen2.5-VL) looks again every time, on both sides.

    Args:
        loaded: Model and processor. The model runs on SDPA.
        task: Questions; the first `batch` of them are the prompts.
        methods: By name; None = every visual token once more, which shows the noise.
        batch: Prompts.
        seed: Of the methods.
        repeats: Rounds at most.
        seconds_budget: No new round is begun after this time; three are always measured (fewer if repeats is lower).

    Returns:
        One row per method: method; dense_ms, ms (medians); ratio = dense_ms / ms (median of the rounds; above 1 =
        faster) with low and high (quartiles); rounds; select_ms: part of ms in which the method decides;
        break_even_ms: what deciding could take before the method is no faster; gflops, and flops_ratio = dense work
        over the method's, counted, deciding included; tokens: visual tokens a layer, mean; encoder_ms: what the
        encoder took beyond a plain look (below 0 = less), 0 where it need not look again.

    Raises:
        ValueError: On no methods, an empty task, a model that does not run on SDPA, or as a method does.
    """
    _check_methods(methods)
    model = loaded.model
    if model.config._attn_implementation != "sdpa":
        raise ValueError(f"cost is measured against SDPA; this model runs {model.config._attn_implementation!r}")
    part = next(task.batches(loaded, whole("batch", batch)), None)
    if part is None:
        raise ValueError(f"task {task.name!r} has no questions")
    inputs, sight = part.to(model), Sight(model, memory=False)
    asked = [task.questions[i] for i in part.rows]
    with sight.watch(), _counted(model) as every:
        model(**inputs, use_cache=True, logits_to_keep=1)
    needed = None if every is None else _needed(task, part.rows, every)
    calls = {name: _given(method, needed) for name, method in methods.items()}

    def call(method: MLLMMethod | None) -> Callable[[], MLLMTrace | None]:
        def run() -> MLLMTrace | None:
            with nullcontext() if method is None else method(model, seed=seed, text=asked) as trace:
                model(**inputs, use_cache=True, logits_to_keep=1)
            return trace

        return run

    def looking() -> None:
        with sight.blank():
            call(None)()

    device = next(model.parameters()).device
    runs = [call(None), *map(call, calls.values()), *([looking] if sight.works else [])]
    with sight.show():
        works = [_work(run, sight.parts.tower) for run in runs]
        clocks = [_Clock(sight.parts.tower, run, device) for run in runs]
        taken = race(clocks, device, repeats, seconds_budget)
        rounds = range(min(3, len(taken)))
        spent = [[0.0 if method is None else sum(call(method)().seconds) for _ in rounds] for method in calls.values()]
    encoder = 1e3 * np.array([clock.seconds[-len(taken) :] for clock in clocks]).T
    total, inside = np.array([work[:2] for work in works], dtype=float).T
    beyond = np.zeros_like(encoder)
    if sight.works:
        again = inside > 0
        beyond[:, again] = encoder[:, again] - encoder[:, -1:]
        taken = taken - encoder + beyond.clip(0)
        total = total - inside + (inside - inside[-1]).clip(0) * again
    own = slice(1, 1 + len(calls))
    table = ratios(list(calls), taken[:, 0], taken[:, own], "ratio", lambda dense, own: dense / own)
    table = table.rename(columns={"full_ms": "dense_ms"})
    counts = [every if trace is None else trace for _, _, trace in works[own]]
    table["select_ms"] = 1e3 * np.median(spent, 1)
    table["gflops"], table["flops_ratio"] = total[own] / 1e9, total[0] / total[own]
    table["tokens"] = [float("nan") if count is None else count.mean_tokens for count in counts]
    table["encoder_ms"] = np.median(beyond[:, own], 0)
    table["break_even_ms"] = table["dense_ms"] - table["ms"] + table["select_ms"]
    return table


def _work(call: Callable[[], MLLMTrace | None], tower: nn.Module) -> tuple[int, int, MLLMTrace | None]:
    """Counted floating-point operations of a call, of them those of the vision encoder; and what the call returns."""
    looks = []

    def look(forward: Callable, *args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False, custom_mapping=EXTRA) as inside:
            output = forward(*args, **kwargs)
        looks.append(inside.get_total_flops())
        return output

    with FlopCounterMode(display=False, custom_mapping=EXTRA) as counter, around(tower, "forward", look):
        trace = call()
    return counter.get_total_flops(), sum(looks), trace


class _Clock:
    """A call that notes how long the vision encoder took, in seconds."""

    def __init__(self, tower: nn.Module, run: Callable, device: torch.device):
        self.tower, self.run, self.device = tower, run, device
        self.seconds: list[float] = []

    def __call__(self) -> None:
        watch = Stopwatch()

        def look(forward: Callable, *args: Any, **kwargs: Any) -> Any:
            with watch.running(self.device):
                return forward(*args, **kwargs)

        with around(self.tower, "forward", look):
            self.run()
        self.seconds.append(watch.read())


def _check_methods(methods: Methods) -> None:
    if not isinstance(methods, Mapping):
        raise ValueError(f"methods must be a mapping, name to method or None; got {type(methods).__name__}")
    for name, method in methods.items():
        if method is not None and not isinstance(method, MLLMMethod):
            raise ValueError(f"method {name!r} must be a visual-token method or None for every token; got {method!r}")
    if not methods:
        raise ValueError("no methods given; at least one is needed")
