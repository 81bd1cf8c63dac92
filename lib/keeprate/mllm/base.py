"""What every visual-token method is made of.

A method acts *before* the language model, where it sees the visual tokens of every image (`Visual`), *inside* it, where
it sees those of every sample as they enter a decoder layer (`Inside`), or at both places. It answers with a `Reduction`
(which tokens stand for which), a mask of tokens to keep, or None for "leave them alone". The session (session.py) does
the rest: finding the visual tokens, shortening the sequence, masks, positions, caches of different lengths, padding,
the trace.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from keeprate import select
from keeprate.anatomy import MULTIMODAL, Multimodal, multimodal
from keeprate.attention import AttentionView
from keeprate.budget import Budget
from keeprate.check import choice
from keeprate.method import Method
from keeprate.mllm.encoder import Encoder
from keeprate.reduce import Reduction, drop, gather_tokens

if TYPE_CHECKING:
    from keeprate.mllm.session import MLLMTrace

POSITIONS = ("keep", "compact")
NO_QUESTION = "a text-guided method needs a question, but a prompt holds no text beside its image"
IN_SEQUENCE = tuple(row.name for row in MULTIMODAL.values() if not row.cross)  # the image is a part of the sequence


@dataclass
class Visual:
    """The visual tokens of every image of a batch, between vision encoder and language model.

    Attributes:
        x: [i, n, d] embeddings, as the language model gets them.
        valid: [i, n] False = padding, which comes last, of an image with fewer tokens; None = all have n.
        place: [i, n, 3] view (0 = the whole image), row and column of each token.
        text: [i, t, d] embeddings of the question: the text behind the images; what stands before them if nothing does.
        text_valid: [i, t] False = padding; None = all are words.
        words: The question as text, one for every image; None when the call was not given any.
        parts: The model's anatomy.
        encoder: What the vision encoder did.
        generator: The method's own source of chance.
    """

    x: torch.Tensor
    valid: torch.Tensor | None
    place: torch.Tensor
    text: torch.Tensor
    text_valid: torch.Tensor | None
    words: list[str] | None
    parts: Multimodal
    encoder: Encoder
    token: torch.Tensor  # [i, n] number of each token among all visual tokens the encoder made
    generator: torch.Generator

    @property
    def n(self) -> int:
        """Tokens of the largest image."""
        return self.x.shape[1]

    @cached_property
    def total(self) -> torch.Tensor:
        """[i] tokens of every image."""
        if self.valid is None:
            return torch.full((len(self.x),), self.n, device=self.x.device)
        return self.valid.sum(1)

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the widest view."""
        rows, cols = (self.place[..., 1:].flatten(0, 1).amax(0) + 1).tolist()
        return rows, cols

    def hide(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [i, n] in fp32 with padding at -inf."""
        return scores.float() if self.valid is None else scores.float().masked_fill(~self.valid, float("-inf"))

    def pad(self, tokens: torch.Tensor) -> torch.Tensor:
        """[tokens, ...] in the encoder's order -> [i, n, ...], zero where there is no token."""
        x = tokens[self.token]
        if self.valid is None:
            return x
        return x.masked_fill(~self.valid.view(*self.valid.shape, *(1,) * (x.dim() - 2)), 0)

    @cached_property
    def features(self) -> torch.Tensor:
        """[i, n, c] what the projector turned into `x`."""
        return self.pad(self.encoder.features())

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Features [..., c] -> embeddings [..., d], by the model's own projector."""
        return self.encoder.project(features)

    def class_attention(self, layer: int) -> torch.Tensor:
        """[i, h, n] attention of the class token in a tower block; see `Encoder.class_attention`."""
        return self.pad(self.encoder.class_attention(layer)).transpose(1, 2)

    def received(self, layer: int) -> torch.Tensor:
        """[i, h, n] attention each token receives in a tower block, mean over query rows."""
        return self.pad(self.encoder.received(layer)).transpose(1, 2)

    def importance(self, layer: int) -> torch.Tensor:
        """[i, n] class attention, mean over heads; attention received where the encoder has no class token."""
        heads = self.class_attention if self.parts.has_cls else self.received
        return heads(layer).mean(1)

    def one_head(self, layer: int) -> torch.Tensor:
        """[i, n] class attention of unsplit heads (received attention without a class token)."""
        if not self.parts.has_cls:
            return self.importance(layer)
        return self.pad(self.encoder.one_head(layer))[..., 0]

    def keys(self, layer: int, mean: bool = False) -> torch.Tensor:
        """[i, n, c] keys of a tower block, heads side by side, or their mean."""
        keys = self.pad(self.encoder.keys(layer))
        return keys.mean(2) if mean else keys.flatten(2)

    def values(self, layer: int) -> torch.Tensor:
        """[i, n, h, d] values of a tower block."""
        return self.pad(self.encoder.keys(layer, values=True))

    def question(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`text` and `text_valid`.

        Raises:
            ValueError: If an image comes with no text at all.
        """
        there = torch.ones(self.text.shape[:2], dtype=torch.bool) if self.text_valid is None else self.text_valid
        if self.text.shape[1] == 0 or not bool(there.any(1).all()):
            raise ValueError(NO_QUESTION)
        return self.text, self.text_valid

    def asked(self) -> list[str]:
        """`words`.

        Raises:
            ValueError: If the call was not given the questions as text.
        """
        if self.words is None or not all(isinstance(w, str) and w.strip() for w in self.words):
            raise ValueError(
                "this method reads the question as text; pass it where the method is called: method(model, text=[...]) "
                f"with one non-empty string a sample; got {self.words!r}"
            )
        return self.words


@dataclass
class Inside:
    """The visual tokens of every sample on entering a decoder layer, with the sequence around them.

    Attributes:
        sequence: [b, m, d] hidden states of the running sequence.
        slot: [b, v] where the visual tokens stand in it, sorted; padding last.
        valid: [b, v] False = padding of a sample that has fewer; None = all have v.
        ids: [b, v] number of each visual token in its sample, 0-based.
        total: [b] visual tokens the samples came with.
        text_slot, text_valid: [b, t] where the question stands: the text behind the first visual token, or all text.
        last: [b] slot of the last real token.
        view: Attention of the layer before, on the running sequence; None at layer 0.
        layer: 0-based number of the layer about to run; depth: their number.
        stage: 1-based number of this reduction inside the language model.
        parts: The model's anatomy.
        taps: (layer, name of a submodule) -> its latest (input, output), for what the method lists in `taps`.
        common: Anything a method carries through this call.
        generator: The method's own source of chance.
    """

    sequence: torch.Tensor
    slot: torch.Tensor
    valid: torch.Tensor | None
    ids: torch.Tensor
    total: torch.Tensor
    text_slot: torch.Tensor
    text_valid: torch.Tensor | None
    last: torch.Tensor
    view: AttentionView | None
    layer: int
    stage: int
    parts: Multimodal
    taps: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
    common: dict[str, Any]
    generator: torch.Generator
    session: Any

    @property
    def depth(self) -> int:
        """Decoder layers of the model."""
        return self.parts.depth

    @property
    def v(self) -> int:
        """Visual tokens present, padding included."""
        return self.slot.shape[1]

    @cached_property
    def count(self) -> torch.Tensor:
        """[b] visual tokens present."""
        if self.valid is None:
            return torch.full((len(self.slot),), self.v, device=self.slot.device)
        return self.valid.sum(1)

    @cached_property
    def x(self) -> torch.Tensor:
        """[b, v, d] hidden states of the visual tokens."""
        return gather_tokens(self.sequence, self.slot)

    @cached_property
    def text(self) -> torch.Tensor:
        """[b, t, d] hidden states of the question."""
        return gather_tokens(self.sequence, self.text_slot)

    @cached_property
    def last_hidden(self) -> torch.Tensor:
        """[b, d] hidden state of the last real token."""
        return gather_tokens(self.sequence, self.last[:, None])[:, 0]

    @cached_property
    def real(self) -> torch.Tensor:
        """[b, m] which tokens of the running sequence are real."""
        return self.session.present()

    @cached_property
    def place(self) -> torch.Tensor:
        """[b, v, 4] image of the sample, view, row and column of every visual token, -1 = none."""
        return gather_tokens(self.session.places(), self.ids.clamp_min(0))

    def hide(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [b, v] in fp32 with padding at -inf."""
        return scores.float() if self.valid is None else scores.float().masked_fill(~self.valid, float("-inf"))

    def visual(self, x: torch.Tensor) -> torch.Tensor:
        """What belongs to the visual tokens: [b, m, ...] of the running sequence -> [b, v, ...]."""
        return gather_tokens(x, self.slot)

    @property
    def attention(self) -> AttentionView:
        """Attention of the layer before.

        Raises:
            ValueError: At layer 0, where there is none.
        """
        if self.view is None:
            raise ValueError("no attention has been computed before layer 0; place the reduction at layer 1 or later")
        return self.view

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        """Attention to the visual tokens: [b, ..., n] over all keys -> [b, ..., v] in the same dtype."""
        offset = x.shape[-1] - self.sequence.shape[1]  # keys of earlier calls come first
        index = (self.slot + offset).view(len(x), *(1,) * (x.dim() - 2), self.v)
        return x.gather(-1, index.expand(*x.shape[:-1], -1))

    def from_last(self, ahead: bool = False) -> torch.Tensor:
        """[b, h, v] attention of the prompt's last real token, in the layer before or (`ahead`) the one to run."""
        rows = self.last[:, None]
        return self.columns((self.ahead(rows).rows(0) if ahead else self.attention.rows(rows))[:, :, 0])

    def text_weight(self) -> torch.Tensor:
        """[b, 1, m] one at the question's tokens."""
        ones = torch.ones(self.text_slot.shape, device=self.slot.device)
        ones = ones if self.text_valid is None else self.text_valid.float()
        return torch.zeros(self.sequence.shape[:2], device=ones.device).scatter(1, self.text_slot, ones)[:, None]

    def visual_weight(self) -> torch.Tensor:
        """[b, 1, m] one at the visual tokens."""
        ones = torch.ones(self.slot.shape, device=self.slot.device) if self.valid is None else self.valid.float()
        return torch.zeros(self.sequence.shape[:2], device=ones.device).scatter(1, self.slot, ones)[:, None]

    def from_text(self, reduce: str = "mean") -> torch.Tensor:
        """[b, h, v] attention from the question's rows in the layer before: their "mean", "sum" or "max"."""
        choice("reduce", reduce, ("mean", "sum", "max"))
        weight = self.text_weight()
        got = self.columns(self.attention.received(weight, "max" if reduce == "max" else "sum"))
        return got / weight.sum(-1, keepdim=True).clamp_min(1) if reduce == "mean" else got

    def from_visual(self) -> torch.Tensor:
        """[b, h, v] attention from the rows of the visual tokens in the layer before, their mean."""
        weight = self.visual_weight()
        return self.columns(self.attention.received(weight)) / weight.sum(-1, keepdim=True).clamp_min(1)

    def keys(self, values: bool = False) -> torch.Tensor:
        """[b, v, c] keys (rotated), or values, of the visual tokens in the layer before, heads side by side, fp32."""
        x = (self.attention.v if values else self.attention.k)[:, :, -self.sequence.shape[1] :].float()
        return self.visual(x.transpose(1, 2).flatten(2))

    def ahead(self, rows: torch.Tensor) -> AttentionView:
        """The attention that the layer about to run would pay, for some query rows, with nothing dropped yet.

        Args:
            rows: [b, r] slots of the running sequence.

        Returns:
            A view whose queries are these rows; its columns are those of `columns`.

        Source: the recomputed attention row of PyramidDrop; needs no attention matrix.
        """
        return self.session.ahead(self.layer, rows)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """The language model's final norm."""
        return self.parts.body.norm(x)

    def carry(self, name: str) -> torch.Tensor:
        """[b, m] numbers in fp32 that travel with the tokens from layer to layer, zero at first; write in place."""
        return self.session.carry(name)


def best(scores: torch.Tensor, count: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Mask of the highest scores, any number in each sample, none too: [b, n], [b] -> bool [b, n].

    Args:
        scores: [b, n]; ties go to the earlier token.
        count: [b] how many.
        valid: [b, n] tokens that exist; scores of the others may be anything.

    Raises:
        ValueError: On NaN.
    """
    scores = scores if valid is None else scores.masked_fill(~valid, float("-inf"))
    if bool(scores.isnan().any()):
        raise ValueError(f"scores hold NaN in samples {scores.isnan().any(1).nonzero().flatten().tolist()}")
    rank = scores.sort(dim=1, descending=True, stable=True).indices.argsort(1)
    keep = rank < count[:, None]
    return keep if valid is None else keep & valid


def first(order: torch.Tensor, count: torch.Tensor, n: int) -> torch.Tensor:
    """Mask of what a greedy selector chose first: order [b, k] positions, count [b] of them -> bool [b, n]."""
    taken = torch.arange(order.shape[1], device=order.device) < count[:, None]
    return torch.zeros(len(order), n, dtype=torch.bool, device=order.device).scatter(1, order, taken)


@dataclass(frozen=True)
class Choice:
    """What a method decides before the language model.

    Attributes:
        reduction: Which tokens stand for which.
        x: [i, m, d] embeddings of the slots; None = those of the representatives, or what the reduction makes of them.
    """

    reduction: Reduction
    x: torch.Tensor | None = None


def dropped(keep: torch.Tensor, score: torch.Tensor | None = None) -> Reduction:
    """Keep the tokens of a mask [i, n], at least one in each row, and drop the others."""
    kept = select.ragged(keep)
    return drop(kept.index, kept.valid, score=score)


@dataclass(frozen=True)
class MLLMMethod(Method):
    """Base of all visual-token methods. Calling it on a model gives the context manager.

    A subclass gives `before`, `inside`, or both. Most score tokens and keep the best: they give `score` alone, see
    `BeforeMethod` and `InsideMethod`.

    Args:
        keep: Share of the visual tokens that stays, a number of tokens, or a `Budget`.
        positions: "keep": survivors keep the position ids they had among all tokens; "compact": ids are numbered anew,
            without gaps, over all three axes alike where the model has multimodal rotary embeddings. None = as the
            paper does it, and "keep" on models with multimodal rotary embeddings.
    """

    family: ClassVar[str] = "mllm"
    policy: ClassVar[str] = "compact"  # the paper's position policy
    text_guided: ClassVar[bool] = False  # needs a question beside the image
    middle: ClassVar[bool] = False  # acts between attention and MLP of its layers, not before them
    output_aware: ClassVar[bool] = False  # after the prompt, cut the cache of every layer to what the last one kept
    supports: ClassVar[tuple[str, ...]] = IN_SEQUENCE
    staged: ClassVar[bool] = False  # `keep` may be a schedule

    keep: float | int | tuple | Budget = 1 / 9
    positions: str | None = None

    def __post_init__(self):
        budget = Budget.of(self.keep)
        if budget.schedule is not None and not self.staged:
            raise ValueError(f"{self.name} reduces once and takes no schedule; got keep={self.keep!r}")
        if self.positions is not None:
            choice("positions", self.positions, POSITIONS)

    @property
    def budget(self) -> Budget:
        """`keep` as a Budget."""
        return Budget.of(self.keep)

    @classmethod
    def architectures(cls) -> tuple[str, ...]:
        """Architectures that the conformance suite runs this method on."""
        return cls.supports

    def tower_layers(self, parts: Multimodal) -> tuple[int, ...]:
        """Tower blocks whose attention `before` reads; negative numbers count from the last."""
        return ()

    def encoder(self, parts: Multimodal) -> Encoder:
        """What watches the vision encoder; a method that changes what it does gives its own."""
        return Encoder(parts, self.tower_layers(parts))

    def layers_at(self, depth: int) -> tuple[int, ...]:
        """0-based decoder layers before which (`middle`: within which) `inside` is called, increasing.

        Raises:
            ValueError: If the method's layers do not fit a model of this depth.
        """
        return ()

    def taps(self, depth: int) -> tuple[tuple[int, str], ...]:
        """(decoder layer, submodule such as "mlp" or "mlp.down_proj") whose inputs and outputs `Inside.taps` holds."""
        return ()

    def watched(self, depth: int) -> tuple[int, ...]:
        """Decoder layers before which `observe` is called (depth itself: after the last)."""
        return ()

    def observe(self, t: Inside) -> None:
        """Look at the sequence on its way, without changing it."""

    def before(self, t: Visual) -> Choice | Reduction | torch.Tensor | None:
        """Decide before the language model: a reduction, a mask [i, n] of tokens to keep, None = leave them alone."""

    def inside(self, t: Inside) -> Reduction | torch.Tensor | None:
        """Decide on entering a layer: a reduction, a mask [b, v] of tokens to keep, even none, None = leave them."""

    def policy_on(self, parts: Multimodal) -> str:
        """Position policy on a model."""
        return self.positions or ("keep" if parts.axes > 1 else self.policy)

    def __call__(
        self, model: nn.Module, *, seed: int = 0, masked: bool = False, text: list[str] | None = None
    ) -> "AbstractContextManager[MLLMTrace]":
        """Run the model with this method inside a `with` block.

        Args:
            model: A multimodal model of transformers. It is untouched before and after.
            seed: Of the method's own random numbers; torch's global state is not used.
            masked: Hide dropped tokens behind a mask instead of removing them: slower, the same result, for tests.
            text: The questions, one a sample, for methods that read them as text.

        Returns:
            Context manager that gives an `MLLMTrace`. Outputs keep the prompt's length: hidden states and logits of
            visual tokens that were dropped are zero, all others stand where they always do.

        Raises:
            ValueError: On an unsupported model, a method active already; inside the block on a prompt without image,
                more tokens to keep than there are, a cache it cannot treat.

        Example:
            >>> with kr.mllm.DivPrune(keep=0.111)(vlm.model) as trace:   # doctest: +SKIP
            ...     vlm.model.generate(**inputs)
        """
        from keeprate.mllm.session import MLLMSession

        return MLLMSession(self, self.parts_of(model), seed, masked, text).attach(model)

    def parts_of(self, model: nn.Module) -> Multimodal:
        """Anatomy of a model that the method supports.

        Raises:
            ValueError: On any other model.
        """
        parts = multimodal(model)
        if parts.name not in self.architectures():
            raise ValueError(
                f"{self.name} does not support {parts.name} ({type(model).__name__}); it works on "
                f"{', '.join(self.architectures())}"
            )
        return parts


@dataclass(frozen=True)
class BeforeMethod(MLLMMethod):
    """A method between vision encoder and language model that keeps the tokens of the highest score.

    The views of one image, an overview and tiles, share its budget; published codes often give every view the same
    (InternVL's tiles are images of their own here, and have a budget each).
    """

    def score(self, t: Visual) -> torch.Tensor:
        """Importance of every visual token, [i, n], higher = keep; padding may be anything."""
        raise NotImplementedError(f"{self.name} does not say how it scores")

    def count(self, t: Visual, scores: torch.Tensor | None = None) -> torch.Tensor:
        """[i] tokens that every image keeps."""
        budget, known = self.budget, scores is not None
        return budget.counts(t.hide(scores)) if budget.ragged and known else budget.each(t.total)

    def keeps_all(self, t: Visual) -> bool:
        """Whether the budget leaves nothing to decide."""
        return not self.budget.ragged and bool((self.count(t) >= t.total).all())

    def before(self, t: Visual) -> Choice | Reduction | torch.Tensor | None:
        return None if self.keeps_all(t) else self.choose(t, self.score(t))

    def choose(self, t: Visual, scores: torch.Tensor) -> Choice | Reduction | torch.Tensor | None:
        """Decide by the scores [i, n]."""
        return dropped(best(scores.float(), self.count(t, scores), t.valid), t.hide(scores))


@dataclass(frozen=True)
class InsideMethod(MLLMMethod):
    """A method that keeps the tokens of the highest score on entering some decoder layers."""

    def score(self, t: Inside) -> torch.Tensor:
        """Importance of every visual token, [b, v], higher = keep; padding may be anything."""
        raise NotImplementedError(f"{self.name} does not say how it scores")

    def count(self, t: Inside, scores: torch.Tensor | None = None) -> torch.Tensor:
        """[b] tokens that every sample has left after this reduction: a share of those it came with."""
        budget, known = self.budget, scores is not None
        return budget.counts(t.hide(scores)) if budget.ragged and known else budget.each(t.total, t.stage)

    def keeps_all(self, t: Inside) -> bool:
        """Whether the budget leaves nothing to decide."""
        return not self.budget.ragged and bool((self.count(t) >= t.count).all())

    def inside(self, t: Inside) -> Reduction | torch.Tensor | None:
        return None if self.keeps_all(t) else self.choose(t, self.score(t))

    def choose(self, t: Inside, scores: torch.Tensor) -> Reduction | torch.Tensor | None:
        """Decide by the scores [b, v]."""
        return dropped(best(scores.float(), self.count(t, scores), t.valid), t.hide(scores))


def check_layers(layers: tuple[int, ...], depth: int, least: int = 1) -> tuple[int, ...]:
    """Decoder layers that a method was given, checked.

    Raises:
        ValueError: Unless they increase and lie in least..depth-1.
    """
    whole = isinstance(layers, tuple | list) and all(type(layer) is int for layer in layers)
    if not whole or not layers or [*layers] != sorted({*layers}) or not least <= layers[0] <= layers[-1] < depth:
        raise ValueError(f"layers must be increasing layer numbers in {least}..{depth - 1}; got {layers!r}")
    return tuple(layers)


@dataclass(frozen=True)
class Wrapper(MLLMMethod):
    """A method around another one, which it changes in one place and follows in all others.

    Args:
        keep: Replaces the base's budget when given.
        base: The method that is changed.
    """

    keep: float | int | tuple | Budget | None = None
    base: MLLMMethod | None = None

    def __post_init__(self):
        base = self.default() if self.base is None else self.base
        if not isinstance(base, MLLMMethod) or isinstance(base, type):
            raise ValueError(f"{self.name} needs a visual-token method as base; got {base!r}")
        if self.keep is None:
            object.__setattr__(self, "keep", base.keep)
        given = {"keep": self.keep} if any(f.name == "keep" for f in fields(base)) else {}
        object.__setattr__(self, "base", replace(base, positions=self.positions or base.positions, **given))

    @classmethod
    def default(cls) -> MLLMMethod:
        """The base when none is given."""
        raise NotImplementedError(f"{cls.__name__} needs a base")

    @property
    def text_guided(self) -> bool:
        return self.base.text_guided

    @property
    def middle(self) -> bool:
        return self.base.middle

    @property
    def output_aware(self) -> bool:
        return self.base.output_aware

    @property
    def policy(self) -> str:
        return self.base.policy

    @property
    def budget(self) -> Budget:
        return self.base.budget  # a base may count without being told: `keep` is None then

    def parts_of(self, model: nn.Module) -> Multimodal:
        super().parts_of(model)
        return self.base.parts_of(model)

    def tower_layers(self, parts: Multimodal) -> tuple[int, ...]:
        return self.base.tower_layers(parts)

    def encoder(self, parts: Multimodal) -> Encoder:
        return self.base.encoder(parts)

    def layers_at(self, depth: int) -> tuple[int, ...]:
        return self.base.layers_at(depth)

    def taps(self, depth: int) -> tuple[tuple[int, str], ...]:
        return self.base.taps(depth)

    def watched(self, depth: int) -> tuple[int, ...]:
        return self.base.watched(depth)

    def observe(self, t: Inside) -> None:
        self.base.observe(t)

    def before(self, t: Visual) -> Choice | Reduction | torch.Tensor | None:
        return self.base.before(t)

    def inside(self, t: Inside) -> Reduction | torch.Tensor | None:
        return self.base.inside(t)
