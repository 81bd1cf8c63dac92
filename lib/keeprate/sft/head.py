"""The output head as the losses see it: statistics and a few logits of the tokens that are predicted.

Two of a kind. `LinearHead` has hidden states and the weight of the head, and never holds the logits of all tokens;
`LogitsHead` has the logits that a model returned. Both give the same numbers.
"""

import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from keeprate_kernels import TokenStats, token_stats

# Up to this many logits (128 MiB in fp32) are held. Beyond, the backward pass makes those of the tokens that count
# anew: at worst a third more products with the head, for less traffic of memory. With 4,096 tokens and 50,000 entries,
# where the head is five sixths of a step, one undisturbed CPU thread took 0.74 (Rho1) to 1.02 (SFT) times a plain step.
HELD = 2**25
ROWS = 2**22  # logits of a block where whole rows are needed one after another


class Head:
    """What both heads do; a row is a predicted token."""

    @property
    def size(self) -> int:
        """Number of entries of the vocabulary."""
        raise NotImplementedError

    def stats(self, labels: torch.Tensor, stats: tuple[str, ...] = ("nll",)) -> TokenStats:
        """Statistics of every row; nll carries the graph. labels: [t]."""
        raise NotImplementedError

    def columns(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the same entries for some rows, with a graph: rows [m], ids [k] -> [m, k] in fp32."""
        raise NotImplementedError

    def blocks(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits of entries that every sequence has of its own, with a graph.

        Args:
            rows: [s, m] rows of each sequence.
            ids: [s, k] entries of each sequence.

        Returns:
            [s, m, k] in fp32.
        """
        raise NotImplementedError

    def stats_and_top(self, labels: torch.Tensor, k: int) -> tuple[TokenStats, torch.Tensor]:
        """nll of every row, with the graph, and its k largest logits [t, k] in fp32, without."""
        raise NotImplementedError

    def zero(self) -> torch.Tensor:
        """A zero that hangs on the model's graph, so that a batch without tokens can be trained on."""
        raise NotImplementedError


@dataclass(frozen=True)
class LogitsHead(Head):
    """A head whose logits exist.

    Attributes:
        logits: [t, V].
    """

    logits: torch.Tensor

    @property
    def size(self) -> int:
        return self.logits.shape[-1]

    def stats(self, labels: torch.Tensor, stats: tuple[str, ...] = ("nll",)) -> TokenStats:
        z = self.logits.float() if self.logits.dtype != torch.float64 else self.logits
        nll = F.cross_entropy(z, labels, reduction="none")
        with torch.no_grad():
            hit = z.gather(1, labels[:, None])[:, 0]
            mean = variance = None
            if stats != ("nll",):
                logp = z.log_softmax(-1)
                p = logp.exp()
                mean = (p * logp).sum(-1)
                variance = (p * (logp - mean[:, None]) ** 2).sum(-1)
            correct = hit >= z.amax(-1)
        return TokenStats(nll, None if mean is None else -mean, mean, variance, nll.detach() + hit, correct)

    def columns(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.logits[rows][:, ids].float()

    def blocks(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.logits[rows].gather(2, ids[:, None].expand(-1, rows.shape[1], -1)).float()

    def stats_and_top(self, labels: torch.Tensor, k: int) -> tuple[TokenStats, torch.Tensor]:
        return self.stats(labels), self.logits.detach().float().topk(k, -1).values

    def zero(self) -> torch.Tensor:
        return self.logits.float().sum() * 0.0


@dataclass(frozen=True)
class LinearHead(Head):
    """A linear head whose logits are never held as a whole.

    Attributes:
        hidden: [t, c] states that go into the head.
        weight: [V, c].
        bias: [V] or None.
        softcap: Cap of the logits, cap * tanh(logits / cap), or None.
        autocast: dtype of products where the model ran under autocast, else None.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None
    autocast: torch.dtype | None = None

    @property
    def size(self) -> int:
        return len(self.weight)

    def _cast(self) -> contextlib.AbstractContextManager:
        """The precision in which the model itself would have used its head."""
        kind = self.hidden.device.type
        return torch.autocast(kind, self.autocast) if self.autocast else torch.autocast(kind, enabled=False)

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float() if logits.dtype != torch.float64 else logits
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        with self._cast():
            return self._capped(F.linear(hidden, self.weight, self.bias))

    def held(self) -> Head:
        """This head, with its logits if they are few."""
        few = len(self.hidden) * len(self.weight) <= HELD
        return LogitsHead(self._logits(self.hidden)) if few else self

    def stats(
        self, labels: torch.Tensor, stats: tuple[str, ...] = ("nll",), known: TokenStats | None = None
    ) -> TokenStats:
        given = {"bias": self.bias, "softcap": self.softcap, "ignore_index": -1, "stats": stats, "known": known}
        with self._cast():
            return token_stats(self.hidden, self.weight, labels, **given)

    def columns(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias[ids]
        with self._cast():
            return self._capped(F.linear(self.hidden[rows], self.weight[ids], bias))

    def blocks(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        with self._cast():
            logits = self.hidden[rows] @ self.weight[ids].transpose(1, 2)
        return self._capped(logits if self.bias is None else logits + self.bias[ids][:, None])

    def stats_and_top(self, labels: torch.Tensor, k: int) -> tuple[TokenStats, torch.Tensor]:
        step, found = max(1, ROWS // len(self.weight)), []
        narrow = self.autocast or self.hidden.dtype
        wide = torch.promote_types(narrow, torch.float32)
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            # the backward pass has logits that were never rounded to a narrow dtype; its lse must come from the same
            mixed = {"out_dtype": wide} if self.hidden.is_cuda and narrow != wide else {}
            hiddens, weight = (x.to(narrow).to(narrow if mixed else wide) for x in (self.hidden, self.weight))
            for hidden, label in zip(hiddens.split(step), labels.split(step), strict=True):
                z = torch.mm(hidden, weight.T, **mixed)
                z = self._capped(z if self.bias is None else z.add_(self.bias.to(narrow)))
                top = z.topk(k, -1).values
                first, hit = top[:, 0], z.gather(1, label[:, None])[:, 0]
                rest = z.sub_(first[:, None]).exp_().sum(-1).log()
                # not lse - hit: logits may be large, and lse rounds at their size
                found.append((first - hit + rest, first + rest, hit >= first, top))
        nll, lse, correct, top = map(torch.cat, zip(*found, strict=True))
        return self.stats(labels, known=TokenStats(nll, None, None, None, lse, correct)), top

    def zero(self) -> torch.Tensor:
        return self.hidden.float().sum() * 0.0 + self.weight.float().sum() * 0.0
