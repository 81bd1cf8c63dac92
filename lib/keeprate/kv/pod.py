"""PoD (2412.02252): proximal tokens over distant ones; neighbouring layers share the keys of what is far away."""

from dataclasses import dataclass

import torch
from torch import nn

from keeprate.anatomy import Decoder, decoder
from keeprate.attention import AttentionView, Listener, listen
from keeprate.check import number, whole
from keeprate.kv.base import KVMethod, Step
from keeprate.method import register
from keeprate.select import ragged_heads


@register(kind="key sharing", needs=("attention logits",))
@dataclass(frozen=True)
class PoD(KVMethod):
    """In every layer that follows a leader, distant tokens get the leader's logits, so their keys are stored once.

    Proximal tokens, the first and the last ones, use the layer's own queries and keys; one softmax runs over both,
    which equals merging the two parts by their normalisers. Values stay in every layer. The paper adapts the model to
    this with a short training; here nothing is trained.

    Args:
        keep: Proximal tokens, the first ones included.
        sinks: First tokens that are proximal.
        leaders: Layers that keep all keys; None = every second one. `PoD.of` finds them by similarity.
        stream: Tokens that become distant before their keys are dropped while decoding.

    Source: PoD (2412.02252), sharing the keys of distant tokens between layers; without its post-training.
    """

    sinks: int = 4
    leaders: tuple[int, ...] | None = None
    stream: int = 64

    packs = True

    def __post_init__(self):
        super().__post_init__()
        whole("sinks", self.sinks, 0)
        whole("stream", self.stream)
        if self.leaders is not None and (not self.leaders or list(self.leaders) != sorted(set(self.leaders))):
            raise ValueError(f"leaders must be layer numbers in ascending order; got {self.leaders!r}")
        if self.leaders is not None and self.leaders[0] != 0:
            raise ValueError(f"the first layer has nobody to follow, so it must lead; got {self.leaders!r}")
        if self.budget.ragged:
            raise ValueError(f"{self.name} needs a number of tokens known in advance; got keep={self.keep!r}")

    @classmethod
    def of(cls, model: nn.Module, ids: torch.Tensor, threshold: float = 0.5, rows: int = 32, **params) -> "PoD":
        """With leaders found on a text: a layer follows while its attention resembles its block's first layer's.

        Args:
            model: A causal language model.
            ids: [b, n] calibration text.
            threshold: Least similarity, 1 - Jensen-Shannon divergence in bits, of the last rows' mean attention.
            rows: How many last rows.
            **params: Fields of the method.
        """
        number("threshold", threshold)
        similar = layer_similarity(model, ids, rows)
        leaders = [0]
        for layer in range(1, len(similar)):
            if similar[leaders[-1], layer] < threshold:
                leaders.append(layer)
        return cls(leaders=tuple(leaders), **params)

    def leading(self, depth: int) -> tuple[int, ...]:
        """Layers that keep all keys."""
        return tuple(range(0, depth, 2)) if self.leaders is None else self.leaders

    def check(self, body: Decoder, lengths: torch.Tensor) -> None:
        if self.leaders is not None and self.leaders[-1] >= len(body.treated):
            raise ValueError(f"leaders {self.leaders} name a layer the model has not: it has {len(body.treated)}")

    def attend(self, step: Step) -> torch.Tensor | None:
        if step.first:
            return None
        if step.layer in self.leading(step.depth):
            step.common["logits"], step.common["arrival"] = step.logits(step.m), step.index
            return None
        if not step.cache.n_cold:
            return None
        logits, led = step.logits(step.m), step.common["logits"]
        # the leader holds every token in order of arrival, so an arrival number is its slot
        repeat = led.shape[1] // step.groups
        slot = step.index[:, :, None].repeat_interleave(repeat, 1).expand(-1, -1, step.m, -1)
        distant = torch.arange(step.n, device=slot.device) < step.cache.n_cold
        logits = torch.where(distant & ~logits.isneginf(), led.gather(3, slot), logits)
        weight = logits.softmax(-1).unflatten(1, (step.groups, repeat)).flatten(2, 3)
        return (weight @ step.view.v.float()).view(*step.view.q.shape[:3], -1).to(step.view.q.dtype)

    def fold(self, step: Step) -> None:
        if step.layer in self.leading(step.depth):
            return
        near = self.target(step)
        due = (step.cache.hot_counts - near).amax(1) > (0 if step.first else self.stream)  # b
        if not bool(due.any()):
            return
        hot = torch.arange(step.n, device=near.device) >= step.cache.n_cold
        hot = (hot if step.valid is None else hot & step.valid).expand(len(due), step.groups, -1)
        close = step.sinks(self.sinks) | (step.index >= step.cache.seen - (near - self.sinks).clamp_min(1)[..., None])
        close = close | ~due[:, None, None]
        keep, pack = ragged_heads(hot & close), ragged_heads(hot & ~close)
        step.cache.keep(keep.index, keep.valid, ((pack.index, pack.valid, 0),))


class _Rows(Listener):
    """Mean attention over heads of the last rows."""

    def __init__(self, rows: int):
        self.rows, self.seen = rows, {}

    def fold(self, module: nn.Module, view: AttentionView) -> None:
        n = view.q.shape[2]
        self.seen[module] = view.rows(list(range(max(0, n - self.rows), n))).mean(1)


@torch.no_grad()
def layer_similarity(model: nn.Module, ids: torch.Tensor, rows: int = 32) -> torch.Tensor:
    """How alike the layers attend: 1 - Jensen-Shannon divergence (bits) between their mean attention rows.

    Args:
        model: A causal language model.
        ids: [b, n].
        rows: Last rows to compare.

    Returns:
        [layers, layers], 1 on the diagonal.

    Source: PoD (2412.02252), similarity of attention between layers.
    """
    body = decoder(model)
    modules = [body.attention[i] for i in body.treated]
    watch = _Rows(rows)
    with listen(model, watch, modules):
        model(ids, use_cache=False)
    p = torch.stack([watch.seen[m] for m in modules])[:, None]  # l 1 b r n
    q = p.transpose(0, 1)
    mean = (p + q) / 2

    def divergence(a: torch.Tensor) -> torch.Tensor:
        return (a * ((a.clamp_min(1e-12) / mean.clamp_min(1e-12)).log2())).sum(-1)

    return 1 - ((divergence(p) + divergence(q)) / 2).mean((-1, -2))
