"""TidalDecode (2410.05076): what one layer looks at the next ones look at too, so a few layers choose for all."""

from dataclasses import dataclass

from keeprate.check import whole
from keeprate.kv.base import ReadMethod, Step
from keeprate.method import register
from keeprate.select import Kept, keep_top


@register(kind="read-time selection", needs=("attention logits",))
@dataclass(frozen=True)
class TidalDecode(ReadMethod):
    """The logits of the decode row choose at layer `start` and again at `correction`; layers between reuse the choice.

    Layers before `start` and the two that choose read everything. Query heads that share a KV head are averaged after
    the softmax; the newest token is always read.

    Args:
        keep: See `ReadMethod`.
        start: First layer that chooses, from 0.
        correction: Layer that chooses anew; None = 9/32 of the depth, the paper's for LLaMA-2-7B (13 for Llama-3-8B),
            if behind `start`.

    Source: TidalDecode (2410.05076), position persistent sparse attention.
    """

    start: int = 2
    correction: int | None = None

    def __post_init__(self):
        super().__post_init__()
        whole("start", self.start, 0)
        if self.correction is not None:
            whole("correction", self.correction, self.start)

    def choosers(self, depth: int) -> tuple[int, ...]:
        """Layers that read everything and choose."""
        again = round(depth * 9 / 32) if self.correction is None else self.correction
        return (self.start, again) if again > self.start else (self.start,)

    def choose(self, step: Step) -> Kept | None:
        if step.layer < self.start or step.n <= int(self.target(step).min()):
            return None
        if step.layer in self.choosers(step.depth):
            weight = step.by_kv_head(step.logits(1)[:, :, 0].softmax(-1))
            counts = self.target(step).expand(-1, step.groups)
            step.common["tidal"] = keep_top(weight, counts, step.recent(1), step.valid)
            return None
        return step.common["tidal"]
