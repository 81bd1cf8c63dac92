"""Sliders for a notebook."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import torch

from keeprate.method import Method
from keeprate.plot.images import bare, clusters, overlay, overlays, pictures
from keeprate.trace import Trace


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


def explore(
    loaded: Any,
    task: Any,
    methods: Mapping[str, Callable[[float], Method]] | Callable[[float], Method],
    keep: float = 0.5,
    samples: int = 6,
) -> Any:
    """Sliders over method, keep rate, reduction and sample; one static figure where nobody can move them.

    Args:
        loaded: Model and processor.
        task: With `batches(loaded, batch_size)`.
        methods: keep -> method, one or several by name.
        keep: Where the keep-rate slider starts.
        samples: Images to choose from (columns of the static figure).

    Returns:
        The widget, or a matplotlib figure.

    Example:
        >>> explore(vit, task, {"TopK": lambda keep: kr.vit.TopK(keep=keep)})   # doctest: +SKIP
    """
    methods = {"method": methods} if callable(methods) else dict(methods)
    batch = next(iter(task.batches(loaded, samples)))
    pixels, truth = batch["pixel_values"], batch.get("truth")
    images = pictures(loaded.processor, pixels)
    weight = next(loaded.model.parameters())

    def run(method: Method, rows: slice) -> tuple[Trace, torch.Tensor]:
        with method(loaded.model) as trace, torch.no_grad():
            return trace, loaded.model(pixels[rows].to(weight.device, weight.dtype)).logits.float().softmax(-1).cpu()

    if not _live():
        return overlays(images, {name: run(make(keep), slice(None))[0] for name, make in methods.items()}, truth=truth)

    import ipywidgets as w
    from IPython.display import display

    def show(name: str, keep: float, reduction: int, sample: int) -> None:
        trace, answer = run(methods[name](keep), slice(sample, sample + 1))
        step = min(reduction, len(trace.layers)) - 1
        confidence, guess = answer[0].max(0)
        figure, axes = plt.subplots(1, 3 if truth is not None else 2, figsize=(7, 2.6), layout="constrained")
        bare(axes[0], f"label {int(batch['labels'][sample])}, answer {int(guess)} ({confidence:.0%})")
        axes[0].imshow(images[sample].numpy(), interpolation="nearest")
        title = f"{name}, block {trace.layers[step]}: {int(trace.counts()[0, trace.layers[step] - 1])} tokens"
        overlay(images[sample], clusters(trace, step)[0], trace.grid, title, axes[1])
        if truth is not None:
            overlay(images[sample], truth[sample], trace.grid, "patches that matter", axes[2])
        display(figure)
        plt.close(figure)

    depth = max(len(run(make(keep), slice(0, 1))[0].layers) for make in methods.values())
    sliders = {
        "name": w.Dropdown(options=list(methods), description="method"),
        "keep": w.FloatSlider(keep, min=0.1, max=0.95, step=0.05, description="keep rate", continuous_update=False),
        "reduction": w.IntSlider(depth, min=1, max=depth, description="reduction", continuous_update=False),
        "sample": w.IntSlider(0, min=0, max=len(images) - 1, description="sample", continuous_update=False),
    }
    return w.VBox(
        [w.HBox(list(sliders.values())[:2]), w.HBox(list(sliders.values())[2:]), w.interactive_output(show, sliders)]
    )
