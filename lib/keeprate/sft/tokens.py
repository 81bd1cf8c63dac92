"""The tokens of a batch that are predicted, as a method sees them: flat, without padding, aligned with the target."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from keeprate.attention import AttentionView
from keeprate.check import choice, unknown
from keeprate.sft import groups
from keeprate.sft.data import IGNORE, check_columns
from keeprate.sft.head import Head

UNREADABLE = (
    "what this model's attention sees is not told by a mask of four dimensions; attn_implementation must be 'sdpa' or "
    "'eager' where attention is read"
)


def targets(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places (row [t], column [t]) of the tokens that are predicted: labels [b, n] that are not -100, from column 1."""
    row, column = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    return row, column + 1


class Tokens:
    """What there is to know about the predicted tokens of a batch. Token i is the target; the row before it guessed it.

    Attributes:
        head: The output head of the rows that predict.
        label: [t] the tokens.
        row, place: [t] sample of the batch, and position in it.
        sequence: [t] number of the sequence, 0..sequences-1; several share a row when packed.
        sequences: How many sequences have a predicted token.
        order: [t] how many predicted tokens stand before it in its sequence.
        loss: [t] -log p of the token, with the graph.
        nll: [t] the same without.
        columns: Name to [b, n] of what the batch says about every token.
        epoch: Number of the pass over the data, from 0, where it is known.
    """

    def __init__(
        self,
        head: Head,
        labels: torch.Tensor,
        columns: Mapping[str, torch.Tensor] | None = None,
        *,
        stats: tuple[str, ...] = ("nll",),
        largest: int = 0,
        view: AttentionView | None = None,
        epoch: int = 0,
    ):
        self.head, self.labels, self.columns, self.view, self.epoch = head, labels, dict(columns or {}), view, epoch
        check_columns(labels, self.columns)
        self.row, self.place = targets(labels)
        self.label = labels[self.row, self.place]
        mark = self.columns.get("sequence")
        mark = self.row if mark is None else mark[self.row, self.place]
        # packed sequences stand one behind the other, so each is one run of its mark
        mark = torch.stack((self.row, mark.to(self.row.device)))
        _, self.sequence, sizes = mark.unique_consecutive(return_inverse=True, return_counts=True, dim=1)
        self.sequences, self.sizes = len(sizes), sizes
        self.order = torch.arange(len(self.row), device=self.row.device) - (sizes.cumsum(0) - sizes)[self.sequence]
        if largest:
            self._stats, self._largest = head.stats_and_top(self.label, min(largest, head.size))
        else:
            self._stats = head.stats(self.label, stats)
        self.loss, self.nll = self._stats.nll, self._stats.nll.detach()

    def __len__(self) -> int:
        return len(self.label)

    @property
    def prob(self) -> torch.Tensor:
        """[t] probability of the token."""
        return (-self.nll).exp()

    def column(self, name: str) -> torch.Tensor:
        """What the batch says about every predicted token: [t], fp32 for numbers with a fraction.

        Raises:
            ValueError: If there is no such column, or it holds NaN.
        """
        if name not in self.columns:
            told = unknown("column", name, set(self.columns) - {"salt", "sequence"})  # those are the collator's own
            raise ValueError(
                f"{told}. Columns come from the data set through kr.sft.Collator (with the Trainer set "
                "TrainingArguments(remove_unused_columns=False)), or as arguments"
            )
        x = self.columns[name][self.row, self.place]
        x = x.to(self.nll.dtype) if x.is_floating_point() else x
        if x.isnan().any():
            raise ValueError(f"{name} holds NaN for {int(x.isnan().sum())} of {len(x)} tokens")
        return x

    def entropy(self, top: int | None = None) -> torch.Tensor:
        """Entropy in nats of the distribution that predicted each token, without a graph.

        Args:
            top: Only of the `top` most probable entries, renormalised; None = of all. The method must ask for the
                former by `largest`, for the latter in `stats`.

        Returns:
            [t].
        """
        if top is None:
            return self._stats.entropy.detach()
        logp = self._largest[:, :top].log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)

    @property
    def vocabulary(self) -> int:
        """Number of entries of the head."""
        return self.head.size

    def top_share(self, score: torch.Tensor, keep: float, scope: str, up: bool = False) -> torch.Tensor:
        """The share `keep` with the highest scores in every sequence, or in the batch: [t] bool."""
        whole = choice("scope", scope, ("sequence", "batch")) == "batch"
        group = torch.zeros_like(self.sequence) if whole else self.sequence
        return groups.top_share(score, group, 1 if whole else self.sequences, keep, up)

    def min_max(self, x: torch.Tensor, least: float = 0.0) -> torch.Tensor:
        """x [t] rescaled to [0, 1] within each sequence; 0 where its values differ by no more than `least`."""
        return groups.min_max(x, self.sequence, self.sequences, least)

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of x [t] over each sequence, [sequences]."""
        return groups.totals(x, self.sequence, self.sequences)

    def prompt_attention(self, reader: str = "predicting") -> torch.Tensor:
        """Share of attention that goes to the prompt in the last layer, mean over heads.

        The prompt is whatever is attended to and is no target. The share is exact: it is the attention's output when
        each key's value says whether it belongs to the prompt.

        Args:
            reader: "predicting" = the row that predicted the token; "own" = the token's own row.

        Returns:
            [t] in [0, 1].

        Raises:
            ValueError: If the model is not listened to (see `SFTMethod.__call__`), or its attention is told what to
                see in another way than by a mask [b|1, h|1, n_q|1, n_k], as flash attention is of padding and packing.
        """
        choice("reader", reader, ("predicting", "own"))
        if self.view is None:
            raise ValueError(
                "attention is read from the model: train inside `with method(model):`, "
                "or give the Trainer callbacks=[kr.sft.Watch(method)]"
            )
        view, mark = self.view, self.columns.get("sequence")
        packed = mark is not None and bool(((mark != mark[:, :1]) & (mark >= 0)).any())
        told = not packed if view.mask is None else isinstance(view.mask, torch.Tensor) and view.mask.dim() == 4
        if not told:
            raise ValueError(UNREADABLE)
        prompt = (self.labels == IGNORE).to(view.q.dtype)
        values = prompt[:, None, :, None].expand(-1, view.k.shape[1], -1, view.q.shape[-1])
        with torch.no_grad():
            mass = F.scaled_dot_product_attention(
                view.q, view.k, values, view.mask, is_causal=view.causal, scale=view.scaling, enable_gqa=True
            )
        mass = mass[..., 0].float().mean(1)  # b n
        return mass[self.row, self.place - int(reader == "predicting")].clamp(0, 1)

    def noise(self, seed: int) -> torch.Tensor:
        """Uniform noise that depends on seed, epoch, sequence and place alone: not on the batch, nor on the device.

        A sequence is known by its tokens (the collator's column `salt`), or by its targets where that is missing.

        Returns:
            [t] in [0, 1), float64.
        """
        salt = self.columns.get("salt")
        if salt is None:
            salt = self.sums(_mixed(self.label * 0x1000193 + self.order))[self.sequence]
        else:
            salt = salt.to(self.label.device)[self.row, self.place]
        lots = _mixed(_mixed(salt + _mixed(seed * 0x10001 + self.epoch)) + self.order)
        return ((lots >> 11) & (2**53 - 1)).double() / 2**53


def _mixed(x: torch.Tensor | int) -> torch.Tensor | int:
    """splitmix64's finaliser: every bit of the int64 input changes about half of the output. Products wrap around."""
    if isinstance(x, int):
        return int(_mixed(torch.tensor(x)))
    x = x + -0x61C8864680B583EB
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & (2**33 - 1))
