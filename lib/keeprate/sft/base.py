"""What every method of this family is: a loss function that says how much each training token counts.

    score (which tokens matter?) -> map or select (weights) -> reduce (divide by what?)

A method answers `weigh`, or `score` if it selects. The rest is here: alignment with the target, weights that the data
set brings, the denominator, and the sum over micro-batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from keeprate.anatomy import DECODERS
from keeprate.check import choice, fraction
from keeprate.method import Method
from keeprate.sft import session as sessions
from keeprate.sft.data import Labels
from keeprate.sft.head import LogitsHead
from keeprate.sft.tokens import Tokens, targets

DENOMINATORS = ("valid", "kept", "weight_sum", "mean_one")
SCOPES = ("sequence", "batch")


@dataclass(frozen=True)
class SFTMethod(Method):
    """Base of all training objectives.

    With w_t the weight of target token t and l_t its loss, the loss of a batch is sum_t w_t l_t / D. D is that of the
    whole batch when its gradient is accumulated over several micro-batches.

    Args:
        denominator: D. "valid": number of target tokens; "kept": number of those with a weight; "weight_sum": sum of
            the weights; "mean_one": as "valid", with the weights of every sequence rescaled to a mean of 1. A change
            of it rescales the learning rate.
    """

    denominator: str = field(default="valid", kw_only=True)

    family: ClassVar[str] = "sft"
    columns: ClassVar[tuple[str, ...]] = ()  # names of fields that name a column of the data set
    stats: ClassVar[tuple[str, ...]] = ("nll",)  # statistics of the head
    largest: ClassVar[int] = 0  # how many of the largest logits of every token are needed; then nll is all of `stats`
    reads_attention: ClassVar[bool] = False

    def __post_init__(self):
        choice("denominator", self.denominator, DENOMINATORS)

    @classmethod
    def architectures(cls) -> list[str]:
        """Architectures that the conformance suite runs; any causal language model of transformers should do."""
        return list(dict.fromkeys(DECODERS.values()))

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns that the data set must have to be trained on with this method."""
        return tuple(getattr(self, name) for name in self.columns)

    def weigh(self, t: Tokens) -> torch.Tensor:
        """How much every token counts: [t], not negative, without a graph."""
        raise NotImplementedError

    def score(self, t: Tokens) -> torch.Tensor:
        """How much every token matters to this method: [t], higher = more. The weight, unless it is thresholded."""
        return self.weigh(t)

    def pull(self, t: Tokens) -> torch.Tensor | None:
        """l dw/dl [t] where the weight itself has a gradient; None where it has none."""
        return None

    def extra(self, t: Tokens) -> torch.Tensor | None:
        """A loss beside the weighted one, a mean over tokens of the micro-batch; None for none.

        Where gradients are accumulated, that of a micro-batch counts by its share of the denominator.
        """
        return None

    def __call__(
        self,
        outputs: Any,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **columns: Any,
    ) -> Any:
        """The loss of a batch; or, called on a model, a context in which that loss needs no logits.

        The three ways to use a method:

        * `Trainer(..., compute_loss_func=method)`: the transformers Trainer, and TRL's SFTTrainer before its version 2
          with `loss_type="nll"` (any other computes its own loss) and `dataset_kwargs={"skip_prepare_dataset": True}`.
          Both need `remove_unused_columns=False`.
        * `with method(model) as trace:` around any training: the loss is computed from hidden states, attention can be
          read, gradients that are accumulated are divided by the exact denominator, and `trace` keeps statistics. For
          the Trainer, `callbacks=[kr.sft.Watch(method)]` does the same and logs them.
        * `method(logits, labels)`: a plain function.

        Args:
            outputs: What the model returned, with logits [b, n, V]; or these logits; or a model.
            labels: [b, n], -100 where a token is no target; not shifted. `Labels` bring their columns along.
            num_items_in_batch: Target tokens of all micro-batches that are accumulated; None = this batch is all.
            **columns: Further columns [b, n], each entry at the place of its target: `weights` multiplies the method's
                own; others as the method needs them. For a model: the options of `Session`.

        Returns:
            A scalar. Where the model's outputs come without a gradient, as when the Trainer evaluates, it is the plain
            mean loss, so that evaluations of different methods can be compared.

        Raises:
            ValueError: On a column that is missing or of another shape, NaN or negative weights, labels outside the
                vocabulary, or outputs with a router's loss, which this one would leave out.
        """
        if isinstance(outputs, nn.Module):
            return sessions.Session(self, outputs, **columns)
        if not isinstance(labels, torch.Tensor) or labels.dim() != 2:
            given = tuple(labels.shape) if isinstance(labels, torch.Tensor) else type(labels).__name__
            raise ValueError(f"labels must be a tensor [batch, n]; got {given}")
        columns = {**getattr(labels, "columns", {}), **columns}
        labels = labels.as_subclass(torch.Tensor) if isinstance(labels, Labels) else labels
        if torch.is_grad_enabled() and isinstance(outputs, Mapping) and outputs.get("aux_loss") is not None:
            raise ValueError(
                "outputs hold an aux_loss, the balancing of a router, which transformers adds to its own loss alone; "
                "allowed: outputs without it (output_router_logits=False in the model's config; for TRL "
                "router_aux_loss_coef=0)"
            )
        session = None if isinstance(outputs, torch.Tensor) else sessions.waiting(self)
        if session is not None:
            return session.loss(outputs, labels, columns, num_items_in_batch)
        evaluating = not isinstance(outputs, torch.Tensor) and not torch.is_grad_enabled()
        head = logits_head(logits_of(outputs), labels)
        if evaluating:
            tokens = Tokens(head, labels)
            return tokens.loss.sum() / max(len(tokens) if num_items_in_batch is None else int(num_items_in_batch), 1)
        return self.reduce(Tokens(head, labels, columns, stats=self.stats, largest=self.largest), num_items_in_batch)

    def weights(self, t: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """The method's weight of every token, and the factor that data set and denominator put on it: [t], [t].

        Raises:
            ValueError: On a weight that is NaN or negative.
        """
        own = self.weigh(t).detach().to(t.nll.dtype)
        factor = torch.ones_like(own)
        if "weights" in t.columns:
            factor = t.column("weights").to(own.dtype)
            if (factor < 0).any() or factor.isinf().any():
                raise ValueError(
                    f"weights must be finite and not negative; got {factor.min():g} to {factor.max():g} "
                    f"among {len(factor)} target tokens"
                )
        if self.denominator == "mean_one":
            mass = t.sums(own * factor)
            factor = factor * (t.sizes / mass.where(mass > 0, 1))[t.sequence].to(own.dtype)
        return own, factor

    def reduce(
        self, t: Tokens, items: torch.Tensor | int | None = None, session: "sessions.Session | None" = None
    ) -> torch.Tensor:
        """The loss of a batch of tokens; 0, on the graph, for a batch without any."""
        shared = self.denominator in ("kept", "weight_sum")
        if not len(t):
            nothing = t.head.zero()
            # the other processes wait for this one's share of the denominator
            return session.divide(nothing, nothing, items, 0) if session is not None and shared else nothing
        own, factor = self.weights(t)
        weight, pull = own * factor, self.pull(t)
        coefficient = weight
        total = (weight * t.loss).sum()
        if pull is not None:
            pull = (factor * pull).detach()
            coefficient = weight + pull
            total = total + (pull * (t.loss - t.nll)).sum()
        share, extra = 1.0 if items is None else len(t) / items, self.extra(t)
        if not shared:
            loss = total / len(t) * share
        else:
            mass = weight.sum() if self.denominator == "weight_sum" else (weight > 0).sum()
            if session is None:
                # the other micro-batches' denominator is unknown here: each counts by its number of targets
                loss = total / mass.where(mass > 0, 1) * share
            else:
                if extra is not None and items is not None:
                    # later micro-batches shrink the gradient of this one: what is added must come back to its share
                    total, extra = total + mass * extra, None
                loss = session.divide(total, mass, items, len(t))
        if session is not None:
            session.record(t, weight, coefficient)
        return loss if extra is None else loss + extra * share


@dataclass(frozen=True)
class Selector(SFTMethod):
    """Base of methods that train on a share of the tokens: those with the highest scores.

    Args:
        keep: Share of the target tokens that is trained on, in (0, 1]; rounded down, at least one.
        scope: Where the share is taken: "sequence", each by itself, or "batch", all tokens of a micro-batch together.
            Only "sequence" gives the same choice however a batch is cut into micro-batches.
        denominator: See `SFTMethod`.
    """

    keep: float = 0.6
    scope: str = "sequence"
    denominator: str = field(default="kept", kw_only=True)

    def __post_init__(self):
        fraction("keep", self.keep)
        choice("scope", self.scope, SCOPES)
        super().__post_init__()

    def score(self, t: Tokens) -> torch.Tensor:
        raise NotImplementedError

    def weigh(self, t: Tokens) -> torch.Tensor:
        return t.top_share(self.score(t), self.keep, self.scope).to(t.nll.dtype)


def logits_of(outputs: Any) -> torch.Tensor:
    """Logits [b, n, V] of whatever a model returned.

    Raises:
        ValueError: If there are none.
    """
    if isinstance(outputs, Mapping):
        outputs = outputs.get("logits")
    elif isinstance(outputs, tuple | list):
        outputs = next((x for x in outputs if isinstance(x, torch.Tensor) and x.dim() == 3), None)
    if not isinstance(outputs, torch.Tensor) or outputs.dim() != 3:
        given = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise ValueError(f"outputs must hold logits [batch, n, vocabulary]; got {given}")
    return outputs


def logits_head(logits: torch.Tensor, labels: torch.Tensor) -> LogitsHead:
    """The logits that predict the targets of labels [b, n], out of logits [b, n, V].

    Raises:
        ValueError: If the shapes differ, or a label lies outside the vocabulary.
    """
    if logits.shape[:2] != labels.shape:
        other = logits.shape[:2] == (len(labels), 1)
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must share batch and length"
            + ". Is another method's `with` block, or its Watch, open on this model?" * other
        )
    row, place = targets(labels)
    check_labels(labels[row, place], logits.shape[-1])
    return LogitsHead(logits[row, place - 1])


def check_labels(labels: torch.Tensor, vocabulary: int) -> None:
    """Raise a ValueError if a target [t] lies outside the vocabulary."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < vocabulary:
        raise ValueError(
            f"labels must lie in [0, {vocabulary}) or be -100; got {int(labels.min())} to {int(labels.max())}"
        )
