"""Sliders for a notebook."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from keeprate.method import Method
from keeprate.plot.images import bare, clusters, overlay, overlays, pictures
from keeprate.trace import Trace

KEEPS = tuple(round(0.05 * i, 2) for i in range(1, 20))  # keep rates to choose from


def _live() -> bool:
    """Whether somebody sits in front of a notebook: a kernel, ipywidgets, and no batch run."""
    if "KEEPRATE_RUN_DIR" in os.environ:
        return False
    try:
        import ipywidgets  # noqa: F401
        from IPython import get_ipython
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")


def _still(figure: Figure) -> Figure:
    """A figure that a cell shows once: as its result, and not among the open figures as well."""
    plt.close(figure)
    return figure


def sliders(draw: Callable[..., Figure], **choices: Iterable[Any]) -> Any:
    """Controls for the arguments of a drawing; one static figure where nobody can move them.

    Args:
        draw: Called with one value of every choice, gives the figure.
        **choices: For each argument what can be chosen. Numbers get a slider, anything else a menu. The first one is
            shown first.

    Returns:
        The widget; in a batch run, or outside of a notebook, the figure of the first values.

    Raises:
        ValueError: On an argument without a value to choose.

    Example:
        >>> sliders(lambda method, keep: show(method, keep), method=["H2O", "TOVA"], keep=[0.2, 0.5])  # doctest: +SKIP
    """
    choices = {name: list(values) for name, values in choices.items()}
    if empty := [name for name, values in choices.items() if not values]:
        raise ValueError(f"every argument needs a value to choose; {', '.join(empty)} has none")
    first = {name: values[0] for name, values in choices.items()}
    if not _live():
        return _still(draw(**first))

    import ipywidgets as w
    from IPython.display import display

    def show(**values: Any) -> None:
        figure = draw(**values)
        display(figure)
        plt.close(figure)

    def control(name: str, values: list) -> Any:
        label = name.replace("_", " ")
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            options = sorted(set(values))
            return w.SelectionSlider(options=options, value=values[0], description=label, continuous_update=False)
        return w.Dropdown(options=values, description=label)

    controls = {name: control(name, values) for name, values in choices.items()}
    return w.VBox([w.HBox(list(controls.values())), w.interactive_output(show, controls)])


def explore(
    loaded: Any,
    task: Any,
    methods: Mapping[str, Callable[[float], Method]] | Callable[[float], Method],
    keep: float = 0.5,
    samples: int = 6,
) -> Any:
    """Sliders over method, keep rate, reduction and sample; one static figure where nobody can move them.

    Args:
        loaded: Model and processor: of image classification, or of questions about images.
        task: With `batches(loaded, batch_size)`, as `kr.task` gives it; or questions, as `kr.vqa` gives them.
        methods: keep -> method, one or several by name.
        keep: Where the keep-rate slider starts.
        samples: Images to choose from (columns of the static figure).

    Returns:
        The widget, or a matplotlib figure.

    Example:
        >>> explore(vit, task, {"TopK": lambda keep: kr.vit.TopK(keep=keep)})   # doctest: +SKIP
        >>> explore(vlm, kr.vqa("scenes", n=6), {"TRIM": lambda keep: kr.mllm.TRIM(keep=keep)})   # doctest: +SKIP
    """
    methods = {"method": methods} if callable(methods) else dict(methods)
    images, truth, run = (_questions if hasattr(task, "questions") else _images)(loaded, task, samples)
    if not _live():
        traces = {name: run(make(keep), None)[0] for name, make in methods.items()}
        figure = overlays(images, traces, truth=truth)
        for ax, question in zip(figure.axes, getattr(task, "questions", ()), strict=False):
            ax.set_title(question[:26], fontsize=5.5)
        return _still(figure)

    def draw(method: str, keep: float, reduction: int, sample: int) -> Figure:
        trace, said = run(methods[method](keep), sample)
        figure, axes = plt.subplots(1, 2 if truth is None else 3, figsize=(7, 2.7), layout="constrained")
        bare(axes[0], said).imshow(images[sample], interpolation="nearest")
        if trace.layers:
            step = min(reduction, len(trace.layers)) - 1
            of = clusters(trace, step)[0]
            title = f"{method}, block {trace.layers[step]}: {int((trace.sizes[step][0] > 0).sum())} tokens"
        else:
            of = torch.arange(trace.grid[0] * trace.grid[1])
            title = f"{method}: all {len(of)} tokens"
        overlay(images[sample], of, trace.grid, title, axes[1])
        if truth is not None:
            overlay(images[sample], truth[sample], trace.grid, "patches that matter", axes[2])
        return figure

    depth = max(len(run(make(keep), 0)[0].layers) for make in methods.values())
    return sliders(
        draw,
        method=list(methods),
        keep=dict.fromkeys((keep, *KEEPS)),
        reduction=range(max(depth, 1), 0, -1),
        sample=range(len(images)),
    )


def _images(loaded: Any, task: Any, samples: int) -> tuple[Any, Any, Callable]:
    """Pictures, truth, and what runs a method on one of them, or on all: (trace, what to say about it)."""
    batch = next(iter(task.batches(loaded, samples)))
    pixels, weight = batch["pixel_values"], next(loaded.model.parameters())

    @torch.no_grad()
    def run(method: Method, sample: int | None) -> tuple[Trace, str]:
        rows = slice(None) if sample is None else slice(sample, sample + 1)
        with method(loaded.model) as trace:
            logits = loaded.model(pixels[rows].to(weight.device, weight.dtype)).logits
        confidence, guess = logits.float().softmax(-1)[0].max(0)
        return trace, f"label {int(batch['labels'][sample or 0])}, answer {int(guess)} ({confidence:.0%})"

    return pictures(loaded.processor, pixels).numpy(), batch.get("truth"), run


def _questions(loaded: Any, task: Any, samples: int) -> tuple[Any, Any, Callable]:
    """The same for questions about images."""
    model, count = loaded.model, min(samples, len(task))

    def part(rows: range) -> Any:
        lists = ("images", "questions", "answers", "kinds")
        taken: dict[str, Any] = {name: [getattr(task, name)[i] for i in rows] for name in lists}
        for name in ("truth", "local"):
            if getattr(task, name) is not None:
                taken[name] = getattr(task, name)[rows.start : rows.stop]
        return replace(task, **taken)

    @torch.no_grad()
    def run(method: Method, sample: int | None) -> tuple[Trace, str]:
        asked = part(range(count) if sample is None else range(sample, sample + 1))
        inputs = next(asked.batches(loaded, len(asked))).to(model)
        with method(model, text=asked.questions) as trace:
            if sample is None:
                model(**inputs, logits_to_keep=1)
                return trace, ""
            ids = model.generate(**inputs, max_new_tokens=task.new_tokens, do_sample=False)
        said = loaded.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        return trace, f"{asked.questions[0][:34]}\n{said.strip()[:30]} (right: {asked.answers[0][0][:20]})"

    return [task.images[i][0] for i in range(count)], None if task.truth is None else task.truth[:count], run
