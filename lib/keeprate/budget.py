"""How many tokens may survive: one value for all families."""

from dataclasses import dataclass, fields

import torch

from keeprate.check import fraction, number, plain, whole


@dataclass(frozen=True, repr=False)
class Budget:
    """A number of tokens, stated in one of four ways, with an optional schedule and pooling.

    Exactly one of the first five is given.

    Args:
        keep: Fraction of tokens that survive each reduction, in (0, 1].
        tokens: Number of tokens that survive.
        schedule: One entry per reduction (or layer): a float is a fraction of the original tokens, an int a count.
        coverage: Keep the fewest tokens whose normalised scores add up to this; the count differs by sample.
        threshold: Keep the tokens whose score is at least this; the count differs by sample.
        floor: With `allocate`: the share of an equal split that every group is sure of, in [0, 1].

    Example:
        >>> Budget(keep=0.5).count(2, 196)   # the second reduction: 0.5 ** 2 of 196
        49
        >>> Budget.of(64).count(1, 196)
        64
    """

    keep: float | None = None
    tokens: int | None = None
    schedule: tuple[float | int, ...] | None = None
    coverage: float | None = None
    threshold: float | None = None
    floor: float = 0.0

    def __post_init__(self):
        given = [f for f in ("keep", "tokens", "schedule", "coverage", "threshold") if getattr(self, f) is not None]
        if len(given) != 1:
            raise ValueError(f"a Budget takes exactly one of keep, tokens, schedule, coverage, threshold; got {given}")
        if self.keep is not None:
            fraction("keep", self.keep)
        if self.coverage is not None:
            fraction("coverage", self.coverage)
        counts = (self.tokens,) if self.tokens is not None else self.schedule or ()
        if self.schedule is not None and not self.schedule:
            raise ValueError("schedule must hold at least one entry")
        for entry in counts:
            if isinstance(entry, float):
                fraction("every fraction of a schedule", entry)
            else:
                whole("a number of tokens", entry)
        if self.threshold is not None:
            number("threshold", self.threshold)
        number("floor", self.floor, 0, 1)

    def __repr__(self) -> str:
        given = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default)
        return f"Budget({', '.join(given)})"

    @classmethod
    def of(cls, value: "Budget | float | int | tuple") -> "Budget":
        """A float is a keep rate, an int a number of tokens, a tuple a schedule, a Budget itself."""
        value = plain(value)
        if isinstance(value, Budget):
            return value
        if isinstance(value, tuple | list):
            return cls(schedule=tuple(map(plain, value)))
        if isinstance(value, int) and not isinstance(value, bool) and value != 1:
            return cls(tokens=value) if value > 0 else cls(keep=value)  # 0 or less: the keep rate's error says why
        return cls(keep=fraction("keep", value))

    @property
    def ragged(self) -> bool:
        """Whether the number of kept tokens depends on the sample."""
        return self.coverage is not None or self.threshold is not None

    def count(self, stage: int, total: int) -> int:
        """Tokens that survive reduction number `stage` (1-based) of `total` original tokens, at least 1.

        Args:
            stage: Which reduction of the model, from 1.
            total: Number of tokens before the first reduction.

        Raises:
            ValueError: If the budget depends on scores, or the schedule has no entry for the stage.
        """
        entry = self._entry(stage)
        if self.keep is not None:
            return max(1, int(total * self.keep**stage + 1e-9))
        return entry if isinstance(entry, int) else max(1, int(total * entry + 1e-9))

    def each(self, lengths: torch.Tensor, stage: int = 1) -> torch.Tensor:
        """Tokens that survive for samples of different lengths [b]: [b], between 1 and the length.

        Unlike `count`, a keep rate does not compound: it is a share of the length at every stage.
        """
        entry = self._entry(stage)
        if isinstance(entry, float):
            counts = (lengths.double() * entry + 1e-6).long()  # in fp32 the 1e-6 would vanish, and 0.53 of 100 be 52
        else:
            counts = torch.full_like(lengths, entry)
        return torch.minimum(counts.clamp_min(1), lengths)

    def of_length(self, length: int, stage: int = 1) -> int:
        """`each` for one length."""
        entry = self._entry(stage)
        return min(max(1, int(length * entry + 1e-6) if isinstance(entry, float) else entry), length)

    def _entry(self, stage: int) -> float | int:
        """Keep rate or number of tokens of one stage."""
        if self.ragged:
            raise ValueError(f"{self} has no count before scores are known; this use needs keep, tokens or a schedule")
        if self.schedule is None:
            return self.tokens if self.keep is None else self.keep
        if stage > len(self.schedule):
            raise ValueError(f"the schedule has {len(self.schedule)} entries but reduction {stage} was asked for")
        return self.schedule[stage - 1]

    def counts(self, scores: torch.Tensor, stage: int = 1, total: int | None = None) -> torch.Tensor:
        """Tokens to keep for every row of scores.

        Args:
            scores: [..., n], higher = keep; -inf marks tokens that do not exist.
            stage: Which reduction, from 1.
            total: Original number of tokens; n when None.

        Returns:
            Integer tensor [...], each between 1 and the number of existing tokens.
        """
        exists = ~scores.isneginf()
        present = exists.sum(-1)
        if self.coverage is not None:
            mass = scores.float().masked_fill(~exists, 0.0).clamp_min(0.0)
            mass = mass / mass.sum(-1, keepdim=True).clamp_min(1e-12)
            below = mass.sort(-1, descending=True).values.cumsum(-1) < self.coverage - 1e-6
            counts = below.sum(-1) + 1
        elif self.threshold is not None:
            counts = (scores >= self.threshold).sum(-1)
        else:
            counts = torch.full_like(present, self.count(stage, total or scores.shape[-1]))
        return torch.minimum(counts.clamp_min(1), present)

    def allocate(self, scores: torch.Tensor, stage: int = 1, total: int | None = None) -> torch.Tensor:
        """Split one pooled budget over groups (heads, or layers) by where the high scores are.

        Args:
            scores: [b, groups, n]; comparable between groups.

        Returns:
            [b, groups] counts whose sum is groups * count, each at least floor * count.

        Source: Ada-KV's adaptive allocation with its safeguard, as a budget rule.
        """
        b, groups, n = scores.shape
        each = min(self.count(stage, total or n), n)
        sure = int(self.floor * each)
        order = scores.argsort(-1, descending=True)
        rest = scores.scatter(-1, order[..., :sure], float("-inf")).flatten(1)
        winners = rest.topk(groups * (each - sure), dim=-1).indices // n
        return (
            torch.zeros(b, groups, dtype=torch.long, device=scores.device).scatter_add_(
                1, winners, torch.ones_like(winners)
            )
            + sure
        )
