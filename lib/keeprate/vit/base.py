"""How a ViT method takes hold of a model: what it sees (`Tokens`), what it is (`ViTMethod`), how it is applied."""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from keeprate import score
from keeprate.anatomy import Anatomy, anatomy, quarters, supported
from keeprate.attention import AttentionView, Listener, listen
from keeprate.budget import Budget
from keeprate.method import Method
from keeprate.reduce import Reduction, gather_tokens, visible
from keeprate.trace import Step, Trace

GATE_EPS = 1e-6  # DynamicViT's eps: a closed gate hides a token by log(eps), which keeps its gradient exact


@dataclass(frozen=True)
class Tokens:
    """The patch tokens at one reduction, as a method sees them; the prefix is left out and always survives.

    Attributes:
        x: [b, n, d] hidden states of the tokens present.
        view: The latest attention layer with prefix and patches, None before the first block.
        size: [b, n] number of original patches each token stands for.
        valid: [b, n], False = padding of a ragged batch; None when there is none.
        ids: [b, n] original patch of each token, -1 = summary or padding.
        prefix: Number of prefix tokens in `view`.
        has_cls: Whether token 0 of `view` is a class token.
        grid: Rows and columns of the original patches.
        layer: 1-based block.
        depth: Number of blocks.
        stage: 1-based number of this reduction.
        generator: The method's own random generator.
    """

    x: torch.Tensor
    view: AttentionView | None
    size: torch.Tensor
    valid: torch.Tensor | None
    ids: torch.Tensor
    prefix: int
    has_cls: bool
    grid: tuple[int, int]
    layer: int
    depth: int
    stage: int
    generator: torch.Generator

    @property
    def n(self) -> int:
        """Tokens present."""
        return self.x.shape[1]

    @property
    def total(self) -> int:
        """Patches before any reduction."""
        return self.grid[0] * self.grid[1]

    @property
    def attention(self) -> AttentionView:
        """The latest attention layer.

        Raises:
            ValueError: Before the first block, where there is none.
        """
        if self.view is None:
            raise ValueError("no attention has been computed before block 1; place the reduction at layer 2 or later")
        return self.view

    def hide(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [b, n] with padding at -inf."""
        return scores if self.valid is None else scores.masked_fill(~self.valid, float("-inf"))

    def heads(self, cls: bool) -> torch.Tensor:
        """[b, h, n] attention each token gets by head: from the class token, or the mean over (real) query rows."""
        if cls:
            return score.attention_from(self.attention, 0, self.prefix)
        valid = self.valid
        if valid is not None:
            valid = nn.functional.pad(valid, (self.prefix, 0), value=True)
        return score.attention_received(self.attention, self.prefix, valid)

    def received(self) -> torch.Tensor:
        """[b, n] attention each token receives, mean over heads and query rows."""
        return self.heads(cls=False).mean(1)

    def importance(self) -> torch.Tensor:
        """[b, n] class-token attention; the attention received where there is no class token."""
        return self.heads(cls=self.has_cls).mean(1)

    def keys(self) -> torch.Tensor:
        """[b, n, dim] keys of the patches in fp32, mean over heads: ToMe's similarity metric."""
        return self.attention.k[:, :, self.prefix :].float().mean(1)


@dataclass(frozen=True)
class ViTMethod(Method):
    """Base of the ViT methods. A subclass gives `reduce`, and says where it acts.

    Class attributes:
        where: "middle" (between attention and MLP), "before" or "after" the block.
        proportional: Add log(size) to the attention logits once tokens have merged (ToMe's proportional attention).
    """

    family: ClassVar[str] = "vit"
    where: ClassVar[str] = "middle"

    @classmethod
    def architectures(cls) -> list[str]:
        """Names of the architectures the conformance suite runs this method on."""
        return supported()

    def reduce(self, t: Tokens) -> Reduction | None:
        """Decide what becomes of the tokens present; None leaves them alone."""
        raise NotImplementedError(f"{self.name} does not say how it reduces")

    def placement(self, depth: int, patches: int) -> tuple[int, ...]:
        """1-based layers at which `reduce` is called.

        Raises:
            ValueError: If the method's layers do not exist in a model of this depth, or ask for too many tokens.
        """
        layers = getattr(self, "layers", None)
        if layers is None:
            return quarters(depth)
        numbers = isinstance(layers, tuple | list) and all(type(layer) is int for layer in layers)
        if not numbers or not layers or [*layers] != sorted({*layers}) or not 1 <= layers[0] <= layers[-1] <= depth:
            raise ValueError(f"layers must be increasing block numbers in 1..{depth}; got {layers!r}")
        return tuple(layers)

    @contextmanager
    def __call__(self, model: nn.Module, *, seed: int = 0, masked: bool = False) -> Iterator[Trace]:
        """Apply the method to a model inside a `with` block; afterwards the model is as it was.

        Args:
            model: A supported vision model (see `kr.methods()`).
            seed: Seed of the method's own random generator.
            masked: Keep the sequence at full length and hide what is dropped; slower, equal, differentiable.

        Yields:
            The trace of what every forward pass in the block kept.

        Raises:
            ValueError: On an unsupported model, hyper-parameters that do not fit it, or a method active already.

        Example:
            >>> with kr.vit.TopK(keep=0.5)(vit.model) as trace:   # doctest: +SKIP
            ...     logits = vit.model(pixels).logits
        """
        session = Session(self, anatomy(model), seed, masked)
        with session.attach(model):
            yield session.trace


@dataclass(frozen=True)
class StagedMethod(ViTMethod):
    """A method that cuts the tokens down at a few layers.

    Args:
        keep: Fraction of patch tokens that survives each reduction (the papers' rho), or a `Budget`. Reduction i leaves
            int(keep^i * patches).
        layers: 1-based blocks; None = after a quarter, half and three quarters of the depth (4, 7, 10 of 12).
    """

    keep: float | int | tuple | Budget = 0.7
    layers: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.budget.ragged and not self.takes_ragged:
            raise ValueError(f"{self.name} needs a number of tokens known in advance; got keep={self.keep!r}")

    takes_ragged: ClassVar[bool] = False

    @property
    def budget(self) -> Budget:
        """`keep` as a Budget."""
        return Budget.of(self.keep)

    def count(self, t: Tokens) -> int:
        """Tokens that shall be left after this reduction."""
        return self.budget.count(t.stage, t.total)

    def reduce(self, t: Tokens) -> Reduction | None:
        k = self.count(t)
        return None if k >= t.n else self.select(t, k)

    def select(self, t: Tokens, k: int) -> Reduction:
        """The decision itself, for 1 <= k < t.n."""
        raise NotImplementedError(f"{self.name} does not say how it selects")


_active: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


class Session(Listener):
    """One method on one model: holds the state of the running forward pass and writes the trace."""

    def __init__(self, method: ViTMethod, body: Anatomy, seed: int, masked: bool):
        self.method, self.body, self.masked = method, body, masked
        self.stages = {
            layer: i + 1 for i, layer in enumerate(method.placement(body.depth, body.grid[0] * body.grid[1]))
        }
        self.trace = Trace(repr(method), body.grid, body.prefix, body.depth)
        self.generator = torch.Generator().manual_seed(seed)
        self.grid = body.grid

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[None]:
        """Wrap the blocks, listen to attention, weigh mean pooling; undo all of it on leaving."""
        body = self.body
        if body.tower in _active:
            raise ValueError("a token reduction is active on this model already; leave its with block first")
        # the module that calls the attention function may lie inside a wrapper of the block's attention
        attention = [module for layer in body.layers for module in body.attention(layer).modules()]
        with ExitStack() as stack:
            _active.add(body.tower)
            stack.callback(_active.discard, body.tower)
            stack.enter_context(listen(model, self, attention))
            for number, layer in enumerate(body.layers, 1):
                stack.enter_context(_replace_forward(layer, self._forward(number, layer)))
            stack.callback(body.patches.register_forward_hook(self._see_grid).remove)
            for pooling in (m for m in body.tower.modules() if isinstance(m, nn.MultiheadAttention)):
                stack.callback(pooling.register_forward_pre_hook(self._hide, with_kwargs=True).remove)
            if body.mean_pooled:
                stack.callback(body.tower.register_forward_hook(self._weigh).remove)
            yield

    # --- the forward pass of one block -------------------------------------------------------------------------------

    def _forward(self, number: int, layer: nn.Module):
        block, where = self.body.block, self.method.where

        def forward(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any):
            if attention_mask is not None:
                raise ValueError("token reduction does not take an attention_mask over patches")
            x = hidden_states
            if number == 1:
                self._begin(x)
            if where == "before":
                x = self._reduce(number, x)
            x = block.attend(layer, x, **kwargs)
            if where == "middle":
                x = self._reduce(number, x)
            x = block.feed(layer, x)
            if where == "after":
                x = self._reduce(number, x)
            return x

        return forward

    def _see_grid(self, patches: nn.Module, args: tuple, output: torch.Tensor) -> None:
        self.grid = tuple(output.shape[2:])  # an image need not have the configured size

    def _begin(self, x: torch.Tensor) -> None:
        b, n = x.shape[0], x.shape[1] - self.body.prefix
        if b == 0:
            raise ValueError("the batch is empty; at least one image is needed")
        finite = x.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            raise ValueError(f"pixel_values hold NaN or infinity in samples {(~finite).nonzero().flatten().tolist()}")
        if self.body.layers[0].training and getattr(self.body.layers[0], "gradient_checkpointing", False):
            raise ValueError("token reduction does not work under gradient checkpointing: blocks would reduce twice")
        self.trace.grid = self.grid
        self.view: AttentionView | None = None
        self.size = torch.ones(b, n, device=x.device)
        self.ids = torch.arange(n, device=x.device).expand(b, n)
        self.assignment = self.ids
        self.valid: torch.Tensor | None = None
        self.gate: torch.Tensor | None = None
        self.alive = torch.arange(x.shape[1], device=x.device).expand(b, -1) if self.masked else None
        self.length = x.shape[1]
        self.merged = False
        self.trace.runs.append([])
        self.trace.batches.append(b)

    def _reduce(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        stage = self.stages.get(layer)
        if stage is None:
            return x
        prefix, view, here = self.body.prefix, self.view, x
        if self.masked:
            here = gather_tokens(x, self.alive)
            view = None if view is None else view.take(self.alive)
        tokens = Tokens(
            here[:, prefix:],
            view,
            self.size,
            self.valid,
            self.ids,
            prefix,
            self.body.has_cls,
            self.grid,
            layer,
            self.body.depth,
            stage,
            self.generator,
        )
        reduction = self.method.reduce(tokens)
        if reduction is not None:
            whole = reduction.after_prefix(prefix)
            if self.masked:
                if reduction.gate is not None:
                    self._close(whole.gate)
                x, self.alive = whole.masked(x, self.alive)
            else:
                x = whole(x)
            self._update(reduction, tokens)
        self._record(layer, reduction, tokens)
        return x

    def _close(self, gate: torch.Tensor) -> None:
        ones = torch.ones(len(gate), self.length, device=gate.device)
        full = ones.scatter(1, self.alive, gate.float())
        self.gate = full if self.gate is None else self.gate * full

    def _update(self, reduction: Reduction, t: Tokens) -> None:
        slot = reduction.slots(t.n)
        present = self.assignment >= 0
        self.assignment = torch.where(present, slot.gather(1, self.assignment.clamp_min(0)), self.assignment)
        self.size = reduction.total(self.size)
        self.ids = self.ids.gather(1, reduction.rep)
        if reduction.summaries:
            last = torch.arange(reduction.m, device=slot.device) >= reduction.m - reduction.summaries
            self.ids = self.ids.masked_fill(last, -1)
        self.valid = reduction.valid
        if self.valid is not None:
            self.ids = self.ids.masked_fill(~self.valid, -1)
        self.merged = self.merged or reduction.slot is not None

    def _record(self, layer: int, reduction: Reduction | None, t: Tokens) -> None:
        scores = None
        if reduction is not None and reduction.score is not None:
            n0 = self.assignment.shape[1]
            blank = torch.full((len(t.ids), n0 + 1), float("nan"), device=t.ids.device)
            scores = blank.scatter(1, t.ids + 1, reduction.score.detach().float())[:, 1:]
        self.trace.runs[-1].append(Step(layer, self.ids, self.size.long(), self.assignment, scores))

    # --- attention and pooling ---------------------------------------------------------------------------------------

    def gather(self, module: nn.Module, view: AttentionView) -> AttentionView:
        return view.with_bias(self._bias())

    def fold(self, module: nn.Module, view: AttentionView) -> None:
        self.view = view

    def _seen(self) -> torch.Tensor | None:
        """[b, length] which tokens of the running sequence exist; None = all."""
        there = self.valid
        if there is not None:
            there = nn.functional.pad(there, (self.body.prefix, 0), value=True)
        if self.masked and self.alive.shape[1] < self.length:
            there = visible(self.alive, self.length, there)
        return there

    def _bias(self) -> torch.Tensor | None:
        """Additive bias over keys [b, 1, 1, length]: hidden tokens, and log(size) where the method asks for it."""
        bias, seen = None, self._seen()
        if self.merged and getattr(self.method, "proportional", False):
            bias = nn.functional.pad(self.size.clamp_min(1.0).log(), (self.body.prefix, 0))
            if self.masked:
                bias = bias.new_zeros(len(bias), self.length).scatter(1, self.alive, bias)
        if self.gate is not None:
            # a gate closes by log(eps), through which gradients pass; what was dropped without one is hidden for good
            opened = (self.gate + GATE_EPS).log()
            bias = opened if bias is None else bias + opened
            seen = None if seen is None else seen | (self.gate < 0.5)
        if seen is not None:
            bias = torch.zeros(seen.shape, device=seen.device) if bias is None else bias
            bias = bias.masked_fill(~seen, float("-inf"))
        return None if bias is None else bias[:, None, None]

    def _hide(self, pooling: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Keep an attention-pooling head from seeing tokens that do not exist."""
        seen = self._seen()
        return args, kwargs if seen is None else {**kwargs, "key_padding_mask": ~seen}

    def _weigh(self, tower: nn.Module, args: tuple, output: Any) -> Any:
        """Scale the patches so that the head's plain mean is the mean over original patches."""
        if not self.merged and self._seen() is None and self.gate is None:
            return output
        prefix, y, weight = self.body.prefix, output.last_hidden_state, self.size
        if self.masked:
            full = weight.new_zeros(len(y), self.length) if self.gate is None else (self.gate < 0.5).float()
            weight = full.scatter(1, self.alive[:, prefix:], weight)
            weight = (weight if self.gate is None else weight * self.gate)[:, prefix:]
        weight = nn.functional.pad(weight * weight.shape[1] / weight.sum(1, keepdim=True), (prefix, 0), value=1.0)
        output.last_hidden_state = y * weight[..., None].to(y.dtype)
        return output


@contextmanager
def _replace_forward(layer: nn.Module, forward) -> Iterator[None]:
    held = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if held is None:
            del layer.forward
        else:
            layer.forward = held
