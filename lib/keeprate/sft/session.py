"""A model while it is trained with a method: hidden states in place of logits, attention, denominators, statistics."""

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from keeprate.anatomy import decoder
from keeprate.attention import AttentionView, Listener, listen
from keeprate.sft.head import Head, LinearHead
from keeprate.sft.tokens import UNREADABLE, Tokens, targets

if TYPE_CHECKING:
    from keeprate.sft.base import SFTMethod

_open: "weakref.WeakSet[Session]" = weakref.WeakSet()


def waiting(method: "SFTMethod") -> "Session | None":
    """The session of this method whose model has just run; None if there is none.

    Raises:
        ValueError: If two models ran before the loss of the first was asked for.
    """
    found = [session for session in _open if session.hidden is not None or session.ran]
    found = [session for session in found if session.method == method]
    if len(found) > 1:
        raise ValueError(f"{len(found)} models are trained with {method!r} and ran before either's loss was computed")
    return found[0] if found else None


class Session(Listener):
    """The context that `method(model)` returns; also what keeps statistics of the training.

    Where a gradient is wanted, the model's head runs for the first position only, and the loss takes the hidden states
    that go into it: `outputs.logits` are [b, 1, V] there. Where the head is no plain linear layer, or is not reachable
    outside the forward pass (a LoRA adapter on it, sharded weights), logits are computed as always. Without gradients,
    as in evaluation and generation, nothing changes.

    Args:
        method: The objective.
        model: A causal language model of transformers.
        groups: Names of the token groups that a column `group` numbers from 0, for the statistics; their numbers if ().
        logits: Let the model compute all logits; for a model that changes them after the head.
        always: Take part without gradients, too (`kr.sft.weigh`).

    Attributes:
        epoch: Number of the pass over the data, from 0; `RandomMask` draws anew for each.
        bypassed: Whether the model was given labels, and so computed its own loss, where a gradient was wanted.
        asked: Whether the method's loss was ever asked for.
    """

    def __init__(
        self,
        method: "SFTMethod",
        model: nn.Module,
        *,
        groups: tuple[str, ...] = (),
        logits: bool = False,
        always: bool = False,
    ):
        self.method, self.model, self.groups, self.always = method, model, tuple(groups), always
        self.named = bool(groups)
        self.linear = None if logits else _plain_head(model)
        self.epoch = 0
        self.active = self.ran = self.checked = self.bypassed = self.asked = False
        self.hidden: torch.Tensor | None = None
        self.view: AttentionView | None = None
        self.autocast: torch.dtype | None = None
        self._items: Any = None
        self._mass = self._value = self._seen = 0.0
        self._sums: dict[str, torch.Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Session":
        with ExitStack() as stack:  # which undoes everything if something fails
            stack.callback(self.model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            stack.callback(self.model.register_forward_hook(self._end).remove)
            if self.linear is not None:
                stack.callback(self.linear.register_forward_pre_hook(self._head).remove)
            if self.method.reads_attention:
                stack.enter_context(listen(self.model, self, [decoder(self.model).attention[-1]]))
            self._stack = stack.pop_all()
        _open.add(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _open.discard(self)
        self._forget()
        self._stack.close()

    # --- hooks ---------------------------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        # with labels of its own the model computes its own loss, which needs all logits
        own = kwargs.get("labels") is not None
        self.bypassed = self.bypassed or (own and torch.is_grad_enabled())
        self.active = (torch.is_grad_enabled() or self.always) and not own
        self._forget()

    def _head(self, module: nn.Module, args: tuple) -> tuple | None:
        if not self.active:
            return None
        (hidden,) = args
        kind = hidden.device.type
        self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.hidden = hidden
        return (hidden[:, :1],)

    def _end(self, module: nn.Module, args: tuple, outputs: Any) -> None:
        self.ran, self.active = self.active, False

    def fold(self, module: nn.Module, view: AttentionView) -> None:
        if not self.active:
            return
        window = getattr(module, "sliding_window", None)
        if view.mask is None and window is not None and view.k.shape[2] > window:
            raise ValueError(UNREADABLE)
        self.view = view

    def _forget(self) -> None:
        self.hidden = self.view = None
        self.ran = False

    # --- loss ----------------------------------------------------------------------------------------------------

    def tokens(self, outputs: Any, labels: torch.Tensor, columns: Mapping[str, torch.Tensor]) -> Tokens:
        """The predicted tokens of the batch that the model has just seen."""
        from keeprate.sft.base import check_labels, logits_head, logits_of

        logits, hidden, view = logits_of(outputs), self.hidden, self.view
        self._forget()
        head: Head
        if hidden is None:
            head = logits_head(logits, labels)
        else:
            if hidden.shape[:2] != labels.shape:
                raise ValueError(
                    f"labels must be {tuple(hidden.shape[:2])}, as the model's input; got {tuple(labels.shape)}"
                )
            row, place = targets(labels)
            check_labels(labels[row, place], len(self.linear.weight))
            self._check(hidden[:, 0], logits[:, 0])
            head = self._linear(hidden[row, place - 1]).held()
        method = self.method
        return Tokens(head, labels, columns, stats=method.stats, largest=method.largest, view=view, epoch=self.epoch)

    def loss(
        self,
        outputs: Any,
        labels: torch.Tensor,
        columns: Mapping[str, torch.Tensor],
        items: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """The method's loss of the batch that the model has just seen."""
        self.asked = True
        return self.method.reduce(self.tokens(outputs, labels, columns), items, self)

    def _linear(self, hidden: torch.Tensor) -> LinearHead:
        config = getattr(self.model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        cap = getattr(config, "final_logit_softcapping", None)
        return LinearHead(hidden, self.linear.weight, self.linear.bias, cap, self.autocast)

    @torch.no_grad()
    def _check(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Once: what the model returns for the first position is what its head alone gives."""
        if self.checked:
            return
        every = torch.arange(len(self.linear.weight), device=hidden.device)
        ours = self._linear(hidden).columns(torch.arange(len(hidden), device=hidden.device), every)
        close = 1e-4 if hidden.dtype in (torch.float32, torch.float64) and self.autocast is None else 3e-2
        if not torch.allclose(ours, logits.float(), rtol=close, atol=close * float(ours.abs().max().clamp_min(1))):
            raise ValueError(
                f"{type(self.model).__name__} changes its logits after the head; use method(model, logits=True)"
            )
        self.checked = True

    def divide(self, total: torch.Tensor, mass: torch.Tensor, items: Any, count: int) -> torch.Tensor:
        """total / mass over all micro-batches that are accumulated, of which this is the latest.

        The mass of the micro-batches to come is unknown. So each is divided by what has been seen, and the gradient
        that is held already is scaled down to match: after the last one all have the same denominator.

        Args:
            total: Weighted sum of losses of this micro-batch, with the graph.
            mass: Its denominator.
            items: Target tokens of all micro-batches; None = this is all. The same object for all of them, or equal.
            count: Target tokens of this one.
        """
        if items is None:
            return total / mass.where(mass > 0, 1)
        both = torch.stack((mass.detach().double(), mass.new_tensor(count, dtype=torch.double)))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(both)
        mass, count = both.tolist()
        begun = self._items is items if isinstance(items, torch.Tensor) else self._items == items
        if not begun or self._seen + count > float(items):
            self._mass = self._value = self._seen = 0.0
        self._items, before = items, self._mass
        self._mass += mass
        self._seen += count
        if self._seen >= float(items):
            self._items = None  # complete: whatever comes next begins anew
        if self._mass == 0:
            return total
        loss = total / self._mass
        if before == 0:
            self._value = loss.detach().clone()  # the Trainer scales what it is given in place
            return loss
        shrink = before / self._mass
        held = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not held:
            raise ValueError(
                f"denominator={self.method.denominator!r} rescales the gradient of the micro-batches before, and the "
                "model holds none: call backward after every micro-batch. Where gradients are kept elsewhere "
                "(DeepSpeed), allowed are 'valid' and 'mean_one', or one micro-batch a step"
            )
        if shrink != 1:
            torch._foreach_mul_(held, shrink)
        correction = (shrink - 1) * self._value  # so that the sum of what is returned is the loss, too
        self._value = self._value * shrink + loss.detach()
        return loss + correction

    # --- statistics ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def record(self, t: Tokens, weight: torch.Tensor, coefficient: torch.Tensor) -> None:
        """Add a micro-batch to the statistics: weight and d loss / d nll of its tokens, both [t]."""
        if self.always:
            return
        found = {
            "tokens": weight.new_tensor(len(t)),
            "kept": (weight > 0).sum(),
            "mass": weight.sum(),
            "log": torch.special.xlogy(weight, weight).sum(),
        }
        if "group" in t.columns and len(t):
            number = t.column("group").long()
            if not self.named:
                self._more_groups(int(t.columns["group"].max()) + 1)
            if not 0 <= int(number.min()) <= int(number.max()) < len(self.groups):
                raise ValueError(
                    f"group must number the {len(self.groups)} groups {', '.join(self.groups)}; "
                    f"got {int(number.min())} to {int(number.max())}"
                )
            # 2 c (1 - p) is the l1 norm of the gradient at the logits
            force = coefficient * (1 - t.prob)
            for name, value in (("force", force), ("share", weight), ("count", torch.ones_like(weight))):
                found[name] = value.new_zeros(len(self.groups)).index_add_(0, number, value)
        for name, value in found.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _more_groups(self, count: int) -> None:
        """Number the groups anew if there are more than before."""
        fresh = count - len(self.groups)
        if fresh > 0:
            self.groups = tuple(map(str, range(count)))
            for name in {"force", "share", "count"} & set(self._sums):
                self._sums[name] = torch.nn.functional.pad(self._sums[name], (0, fresh))

    def log(self) -> dict[str, float]:
        """Statistics since the last call, of this process; {} if there were no tokens.

        Returns:
            kept: share of target tokens that have a weight. weight_entropy: entropy of the weights over that of equal
            ones, 1 = all count the same. For every group, gradient/<name>: its share of the l1 norm of the gradient
            at the logits (of the weighted loss; auxiliary losses are left out), and weight/<name>: its mean weight
            over the mean weight of all.
        """
        sums, self._sums = self._sums, {}
        tokens = float(sums.get("tokens", 0))
        if tokens == 0:
            return {}
        mass = float(sums["mass"])
        entropy = torch.tensor(mass).log() - sums["log"].cpu() / mass if mass > 0 else torch.tensor(0.0)
        found = {
            "kept": float(sums["kept"]) / tokens,
            "weight_entropy": float(entropy) / max(float(torch.tensor(tokens).log()), 1e-9),
        }
        if "force" in sums:
            force = (sums["force"] / sums["force"].sum().clamp_min(1e-30)).tolist()
            level = (sums["share"] / sums["count"].clamp_min(1) / max(mass / tokens, 1e-30)).tolist()
            found |= {f"gradient/{name}": x for name, x in zip(self.groups, force, strict=True)}
            found |= {f"weight/{name}": x for name, x in zip(self.groups, level, strict=True)}
        return found


def _plain_head(model: nn.Module) -> nn.Linear | None:
    """The output head if it is a linear layer whose weight can be used as it stands; else None."""
    get: Callable | None = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if type(head) is not nn.Linear or hasattr(head.weight, "device_mesh") or head.weight.is_meta:
        return None
    return head if head.weight.dim() == 2 and head.weight.numel() else None


def on_model(model: nn.Module) -> list[Session]:
    """Sessions that are open on a model."""
    return [session for session in _open if session.model is model]
