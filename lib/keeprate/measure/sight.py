"""One look at the images for all methods: what the vision encoder saw, shown to each in place of another look."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from keeprate.anatomy import multimodal
from keeprate.attention import AttentionView, Listener, listen, listeners
from keeprate.measure.kv.reading import Recorded
from keeprate.mllm.encoder import around


@dataclass(frozen=True)
class _Seen:
    """One call of the vision encoder.

    Attributes:
        hooks: Of the modules inside it; see `Sight._hooks`.
        given: The tensors it was given.
        output: What it gave.
        views: What its attention layers saw.
        blocks: The arguments and the output of each of its blocks, with the hooks that were told then.
    """

    hooks: list[tuple]
    given: list[torch.Tensor]
    output: Any
    views: list[tuple[nn.Module, AttentionView]]
    blocks: list[tuple[nn.Module, tuple, dict[str, Any], Any, set[int]]]


class Sight(Listener):
    """What the vision encoder of a model saw, to be shown to methods in place of another look.

    Args:
        model: A multimodal model of transformers. One whose encoder attends in windows looks again every time.
        memory: Whether statistics of the encoder's attention are computed once for all methods that ask for the same
            ones; False where methods are timed.

    Attributes:
        looked: How often the encoder really worked inside `show`.

    Example:
        >>> sight = Sight(vlm.model)                        # doctest: +SKIP
        >>> with sight.watch():                             # doctest: +SKIP
        ...     vlm.model(**inputs)
        >>> with sight.show(), method(vlm.model) as trace:  # doctest: +SKIP
        ...     vlm.model(**inputs)
    """

    def __init__(self, model: nn.Module, memory: bool = True):
        self.model, self.parts, self.memory = model, multimodal(model), memory
        self.works = not self.parts.windowed  # their order is learned from a run
        self.seen: list[_Seen] = []
        self.looked = 0
        self._views: list[tuple[nn.Module, AttentionView]] = []
        self._blocks: list[tuple] = []

    def fold(self, module: nn.Module, view: AttentionView) -> None:
        kind = Recorded if self.memory else AttentionView
        self._views.append((module, kind(**{f.name: getattr(view, f.name) for f in fields(AttentionView)})))

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record what the encoder does inside the block, and nothing from before."""
        self.seen = []
        if not self.works:
            yield
            return
        with ExitStack() as stack:
            for block in self.parts.tower_layers:
                stack.callback(block.register_forward_hook(self._note, with_kwargs=True).remove)
            stack.enter_context(around(self.parts.tower, "forward", self._record))
            stack.enter_context(listen(self.model, self, list(self.parts.tower_attention)))
            yield

    @contextmanager
    def show(self) -> Iterator[None]:
        """Inside the block, the encoder gives for images that it has seen what it gave then.

        It looks at others, and at all where a method takes part in the encoder's own work. Hooks that only want to know
        what a block of the encoder gave are told.
        """
        with around(self.parts.tower, "forward", self._replay):
            yield

    @contextmanager
    def blank(self) -> Iterator[None]:
        """Inside the block nothing has been seen: the encoder works."""
        seen, self.seen = self.seen, []
        try:
            yield
        finally:
            self.seen = seen

    def _record(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        self._views, self._blocks = [], []
        output = forward(*args, **kwargs)
        self.seen.append(_Seen(self._hooks(), _tensors(args, kwargs), _copied(output), self._views, self._blocks))
        return output

    def _note(self, block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self._blocks.append((block, args, kwargs, output, set(block._forward_hooks)))

    def _replay(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        given, hooks = _tensors(args, kwargs), self._hooks()
        for seen in self.seen:
            same = seen.hooks == hooks and len(seen.given) == len(given)
            if same and not self._changed() and all(map(torch.equal, seen.given, given)) and self._told(seen):
                for module, view in seen.views:
                    for listener in listeners(module):
                        listener.fold(module, view)
                return _copied(seen.output)
        self.looked += 1
        return forward(*args, **kwargs)

    def _hooks(self) -> list[tuple]:
        """For each module inside the encoder what could change its work; hooks that look at a block's output cannot."""
        tower, blocks = self.parts.tower, set(self.parts.tower_layers)
        return [
            (tuple(m._forward_pre_hooks), "forward" in m.__dict__, () if m in blocks else tuple(m._forward_hooks))
            for m in tower.modules()
            if m is not tower
        ]

    def _told(self, seen: _Seen) -> bool:
        """Call the hooks that blocks have got since; False if one of them gives an output of its own."""
        for block, args, kwargs, output, known in seen.blocks:
            for number in [number for number in block._forward_hooks if number not in known]:
                more = (kwargs,) if number in block._forward_hooks_with_kwargs else ()
                if block._forward_hooks[number](block, args, *more, output) is not None:
                    return False
        return True

    def _changed(self) -> bool:
        """Whether somebody takes part in the encoder's attention rather than looking on."""
        kinds = {type(one) for module in self.parts.tower_attention for one in listeners(module)}
        return any(kind.gather is not Listener.gather or kind.attend is not Listener.attend for kind in kinds)


def _tensors(args: tuple, kwargs: dict) -> list[torch.Tensor]:
    return [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]


def _copied(output: Any) -> Any:
    """The same tensors in a container of their own: models write into the encoder's output."""
    return type(output)(**output) if isinstance(output, ModelOutput) else output
