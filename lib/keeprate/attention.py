"""One attention function for every Hugging Face model, with attention rows on demand.

transformers sends every attention layer through a registered function. `listen` puts ours in front of the one the model
already uses (sdpa, eager, flash): a listener may change what is attended to (`gather`) and look at what was (`fold`),
and the original kernel still does the work. Nothing switches a model to eager attention.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from keeprate_kernels import attention_received, attention_rows

PREFIX = "keeprate_"  # "keeprate_sdpa" is our function in front of "sdpa"
_listeners: "weakref.WeakKeyDictionary[nn.Module, list[Listener]]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class AttentionView:
    """What one attention layer is about to do, or has just done. Probabilities are computed only when asked for.

    Attributes:
        q: [b, h, n_q, d] queries.
        k: [b, g, n_k, d] keys; h is a multiple of g.
        v: [b, g, n_k, d] values.
        mask: Additive or boolean mask [b|1, h|1, n_q|1, n_k], or None.
        scaling: Factor on the logits.
        causal: Whether a causal mask applies on top of `mask`.
        position_ids: [b|1, n_q] positions of the queries, where the model hands them over.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    causal: bool = False
    position_ids: torch.Tensor | None = None

    def rows(self, index: int | list[int] | torch.Tensor) -> torch.Tensor:
        """Exact probabilities of a few query rows.

        Args:
            index: One row, a list of rows, or a [b, r] tensor with its own rows per sample.

        Returns:
            [b, h, r, n_k] in fp32.
        """
        n_q, n_k = self.q.shape[2], self.k.shape[2]
        if not isinstance(index, torch.Tensor):
            index = torch.tensor([index] if isinstance(index, int) else index, device=self.q.device)
        if index.dim() == 1:
            index = index.expand(self.q.shape[0], -1)
        query = self.q.gather(2, index[:, None, :, None].expand(-1, self.q.shape[1], -1, self.q.shape[3]))
        mask = self.mask
        if mask is not None and mask.shape[-2] != 1:
            mask = mask.expand(len(index), -1, -1, -1)
            mask = mask.gather(2, index[:, None, :, None].expand(-1, mask.shape[1], -1, n_k))
        if self.causal:
            seen = torch.arange(n_k, device=index.device) <= (index + n_k - n_q)[:, None, :, None]
            mask = seen if mask is None else _add_masks(mask, seen)
        return attention_rows(query, self.k, scaling=self.scaling, mask=mask)

    def received(self, weight: torch.Tensor | None = None, reduce: str = "sum") -> torch.Tensor:
        """Weighted column sums of the probabilities, in memory linear in n.

        Args:
            weight: Weight of each query row, broadcastable to [b, h, n_q].
            reduce: "sum" or "max" over query rows.

        Returns:
            [b, h, n_k] in fp32.
        """
        return attention_received(
            self.q, self.k, weight, scaling=self.scaling, mask=self.mask, causal=self.causal, reduce=reduce
        )

    def probs(self) -> torch.Tensor:
        """The full matrix [b, h, n_q, n_k] in fp32. Quadratic: only for methods that truly need every entry."""
        return attention_rows(self.q, self.k, scaling=self.scaling, mask=self.whole_mask())

    def whole_mask(self) -> torch.Tensor | None:
        """The mask with causality in it, [b|1, h|1, n_q|1, n_k] additive or boolean; None = everything is seen."""
        if not self.causal:
            return self.mask
        n_q, n_k = self.q.shape[2], self.k.shape[2]
        seen = torch.ones(n_q, n_k, dtype=torch.bool, device=self.q.device).tril(n_k - n_q)[None, None]
        return seen if self.mask is None else _add_masks(self.mask, seen)

    def with_bias(self, bias: torch.Tensor | None) -> "AttentionView":
        """The same layer with `bias` [b|1, h|1, n_q|1, n_k] added to the logits."""
        if bias is None:
            return self
        bias = bias.to(self.q.dtype)
        return replace(self, mask=bias if self.mask is None else _add_masks(self.mask, bias))

    def tail(self, count: int) -> "AttentionView":
        """The same layer as its last `count` query rows see it; all rows when there are no more."""
        if count >= self.q.shape[2]:
            return self
        mask, ids = self.mask, self.position_ids
        return replace(
            self,
            q=self.q[:, :, -count:],
            mask=mask if mask is None or mask.shape[2] == 1 else mask[:, :, -count:],
            causal=self.causal and count > 1,
            position_ids=None if ids is None else ids[:, -count:],
        )

    def take(self, index: torch.Tensor) -> "AttentionView":
        """The layer restricted to some tokens, as queries and as keys.

        Args:
            index: [b, m] token positions.
        """

        def pick(x: torch.Tensor) -> torch.Tensor:
            return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

        mask = self.mask
        if mask is not None:
            mask = mask.expand(len(index), -1, -1, -1)
            if mask.shape[2] != 1:
                mask = pick(mask)
            mask = mask.gather(3, index[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))
        return replace(self, q=pick(self.q), k=pick(self.k), v=pick(self.v), mask=mask)


def _add_masks(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sum of two masks, each additive or boolean (True = visible)."""
    if a.dtype == torch.bool and b.dtype == torch.bool:
        return a & b
    if a.dtype == torch.bool:
        a, b = b, a
    return a.masked_fill(~b, float("-inf")) if b.dtype == torch.bool else a + b


def listeners(module: nn.Module) -> tuple["Listener", ...]:
    """Who takes part in the attention of a layer at the moment."""
    return tuple(_listeners.get(module, ()))


class Listener:
    """Base of everything that takes part in attention; both hooks do nothing by default."""

    def gather(self, module: nn.Module, view: AttentionView) -> AttentionView:
        """Called before the layer attends; returns the view it shall use (fewer keys, an added bias)."""
        return view

    def attend(self, module: nn.Module, view: AttentionView) -> torch.Tensor | None:
        """Called in place of the layer's own kernel; None leaves the work to it.

        Returns:
            [b, h, n_q, d], or None.
        """

    def fold(self, module: nn.Module, view: AttentionView) -> None:
        """Called after the layer attended, with the view that was used."""


def _attend(inner: str):
    """Our attention function in front of the implementation called `inner`."""

    def forward(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ):
        active = listeners(module)
        view = None
        if active:
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            view = AttentionView(
                query,
                key,
                value,
                attention_mask,
                query.shape[-1] ** -0.5 if scaling is None else scaling,
                # a mask that was handed over already holds causality, and a single query row sees every key
                bool(causal) and attention_mask is None and query.shape[2] > 1,
                kwargs.get("position_ids"),
            )
            for listener in active:
                view = listener.gather(module, view)
            query, key, value, attention_mask = view.q, view.k, view.v, view.mask
        done = next((out for out in (a.attend(module, view) for a in active) if out is not None), None)
        if done is None:
            function = ALL_ATTENTION_FUNCTIONS.get_interface(inner, _eager(module))
            output = function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        else:
            output = done.transpose(1, 2), None
        for listener in active:
            listener.fold(module, view)
        return output

    return forward


def _eager(module: nn.Module):
    """The eager attention of the module's own modelling file (eager is not in transformers' table)."""
    import sys

    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _register(inner: str) -> str:
    """Name under which our function in front of `inner` is known to transformers, with the mask builder of `inner`."""
    name = PREFIX + inner
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _attend(inner))
        # without its mask builder the mask would arrive as None and padded batches would be silently wrong
        if inner in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    return name


@contextmanager
def listen(model: nn.Module, listener: Listener, modules: list[nn.Module]) -> Iterator[None]:
    """Route the attention of `model` through `listener` for the given attention modules, and undo it on leaving.

    Args:
        model: Any transformers model.
        listener: Receives `gather` before and `fold` after each attention of `modules`.
        modules: The attention modules the listener wants.
    """
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    changed = []
    try:
        for config in configs.values():
            inner = getattr(config, "_attn_implementation_internal", None)
            if inner is not None and not inner.startswith(PREFIX):
                changed.append((config, inner))
                config._attn_implementation_internal = _register(inner)
        for module in modules:
            _listeners.setdefault(module, []).append(listener)
        yield
    finally:
        for module in modules:
            held = _listeners.get(module, [])
            if listener in held:
                held.remove(listener)
            if not held:
                _listeners.pop(module, None)
        for config, inner in changed:
            config._attn_implementation_internal = inner
