"""The cache layer of this family: cached tokens of one attention layer that may be dropped, shortened or moved about.

It takes the place of transformers' `DynamicLayer` in any `DynamicCache`. Tokens carry their arrival number, so slots
need no order; every KV head may hold its own tokens and its own number of them; what is not worth full precision is
kept in 2, 4 or 8 bits. Keys and values are stored once per KV head and never repeated for its query heads.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from keeprate_kernels import Packed, compact_kv, quantise_kv

GROW = 64  # tokens of head room when a full buffer grows: one copy of the cache every 64 decode steps


class Growing:
    """A tensor that grows and shrinks along its token axis without being copied at every step.

    Args:
        x: [b, g, n, ...], taken as it is.
    """

    def __init__(self, x: torch.Tensor):
        self.buffer, self.n = x, x.shape[2]

    @property
    def view(self) -> torch.Tensor:
        """[b, g, n, ...], a view."""
        return self.buffer.narrow(2, 0, self.n)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, head room included."""
        return self.buffer.untyped_storage().nbytes()

    def append(self, x: torch.Tensor) -> None:
        """Add tokens [b, g, m, ...] behind the present ones."""
        m = x.shape[2]
        if x.requires_grad or self.buffer.requires_grad:  # writing in place would break the graph
            self.buffer = torch.cat([self.view, x], 2)
        else:
            if self.n + m > self.buffer.shape[2]:
                shape = list(self.buffer.shape)
                shape[2] = self.n + m + GROW
                bigger = self.buffer.new_empty(shape)
                bigger.narrow(2, 0, self.n).copy_(self.view)
                self.buffer = bigger
            self.buffer.narrow(2, self.n, m).copy_(x)
        self.n += m

    def take(self, slot: torch.Tensor) -> torch.Tensor:
        """Tokens at slots [b, g, k]: [b, g, k, ...], a copy."""
        x = self.view
        return x.gather(2, slot.view(*slot.shape, *(1,) * (x.dim() - 3)).expand(*slot.shape, *x.shape[3:]))

    def replace(self, slot: torch.Tensor) -> None:
        """Put the last token of every head into slot [b, g], whose token is lost, and shorten by one."""
        last = self.buffer.narrow(2, self.n - 1, 1)
        where = slot.view(*slot.shape, *(1,) * (last.dim() - 2)).expand(last.shape)
        self.buffer.scatter_(2, where, last.clone())
        self.n -= 1

    def along_batch(self, index: torch.Tensor) -> "Growing":
        """The same for some samples [b']."""
        return Growing(self.view.index_select(0, index))


@dataclass
class Flat:
    """Keys and values of heads that hold different numbers of tokens, without padding.

    Attributes:
        keys, values: [t, d], head after head.
        counts: [b, g] tokens of every head; they sum to t.
    """

    keys: torch.Tensor
    values: torch.Tensor
    counts: torch.Tensor
    n: int = field(init=False)  # tokens of the longest head
    offsets: torch.Tensor = field(init=False)  # [b * g + 1]
    slots: torch.Tensor = field(init=False)  # [b, g, n] row of every slot, clamped where the head is shorter

    def __post_init__(self):
        self.n = int(self.counts.max())
        self.offsets = torch.nn.functional.pad(self.counts.flatten().cumsum(0), (1, 0))
        step = torch.arange(self.n, device=self.counts.device)
        self.slots = self.offsets[:-1].view(*self.counts.shape, 1) + torch.minimum(step, self.counts[..., None] - 1)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    def padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [b, g, n, d]; what lies beyond a head's count repeats its last token."""
        shape, rows = self.slots.shape, self.slots.flatten()
        return tuple(x.index_select(0, rows).view(*shape, -1) for x in (self.keys, self.values))


@dataclass(frozen=True)
class Plain:
    """A tensor [b, g, n, d] kept as it is among packed ones."""

    data: torch.Tensor

    @property
    def n(self) -> int:
        return self.data.shape[2]

    @property
    def nbytes(self) -> int:
        return self.data.untyped_storage().nbytes()

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        return self.data.to(dtype)


@dataclass(frozen=True)
class Absent:
    """Nothing in place of [b, g, n, d]: keys that another layer's stand in for. They read as zero."""

    like: torch.Tensor  # [b, g, 0, d]
    n: int
    nbytes: int = 0

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        b, g, _, d = self.like.shape
        return self.like.new_zeros((), dtype=dtype).expand(b, g, self.n, d)


Part = Packed | Plain | Absent


@dataclass
class Cold:
    """Tokens kept apart from the others, in few bits or without keys."""

    keys: Part
    values: Part

    @property
    def n(self) -> int:
        return self.keys.n

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def read(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [b, g, n, d]."""
        return self.keys.dequantise(dtype), self.values.dequantise(dtype)


class KVLayer(CacheLayerMixin):
    """Cached tokens of one layer. Slots are laid out as packed tokens, then per-head flat ones, then the dense rest.

    Attributes:
        seen: Tokens that ever arrived; `get_seq_length` of the cache, and so the position of the next one.
        index: [b, g, n] arrival number of the token in every slot.
        valid: [b, g, n] whether a slot holds a token (False = padding or, in a masked run, dropped); None = all.
        state: Tensors [b, g, n, ...] that travel with the tokens (accumulated attention and the like).
        extra: Anything else a method carries from step to step.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, **kwargs: Any):
        super().__init__()
        self.masked = False
        self.owner: Any = None  # the running session; a shortened cache means nothing to a model without one
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self.seen = self.last = 0
        self.touched = False  # whether slots still are the tokens in order of arrival
        self.dense: tuple[Growing, Growing] | None = None
        self.flat: Flat | None = None
        self.cold: list[Cold] = []
        self.state: dict[str, Growing] = {}
        self.extra: dict[str, Any] = {}
        self.probing = False
        self._announced: tuple[torch.Tensor, torch.Tensor | None, int] | None = None
        self._index: Growing | None = None
        self._valid: Growing | None = None
        self._positions: Growing | None = None

    def announce(self, arrival: torch.Tensor, there: torch.Tensor | None, total: int) -> None:
        """Say that the next tokens are not all that arrive: some were dropped on the way to this layer.

        Args:
            arrival: [b, m] which of the `total` tokens of this call they are, 0-based.
            there: [b, m] False = padding of a sample that has fewer; None = all are real.
            total: Tokens of this call before any was dropped.
        """
        self._announced = arrival, there, total

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    # --- what transformers calls -------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in new tokens [b, g, m, d]; returns all keys and values the layer may attend to, [b, g, n, d].

        Raises:
            ValueError: On a cache that a method has shortened, outside the method's `with` block.
        """
        if self.touched and (self.owner is None or not self.owner.running):
            raise ValueError(
                "this cache was shortened inside a method's `with` block and needs one to be read: "
                "call the model inside the block, or start from a new cache"
            )
        # under autocast, rotary embeddings leave keys in fp32 beside values in 16 bits
        value_states = value_states.to(key_states.dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.probing:
            keys, values = self.read()
            return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)
        self.last = m = key_states.shape[2]
        arrival, there, total = self._announced or (None, None, m)
        self._announced = None
        if arrival is not None and self._index is None:
            held = key_states[:, :, :0, 0].long() if self.dense is None else self.index.contiguous()
            self._index = Growing(held)
        if there is not None and self._valid is None:
            self._valid = Growing(torch.ones_like(self._index.view, dtype=torch.bool))
        if self.dense is None:
            self.dense = Growing(key_states), Growing(value_states)
        else:
            self.dense[0].append(key_states)
            self.dense[1].append(value_states)
        if self._index is not None:
            new = torch.arange(m, device=self.device).expand(1, m) if arrival is None else arrival
            self._index.append((new + self.seen)[:, None].expand(*key_states.shape[:2], m))
        if self._valid is not None:
            here = torch.ones(1, 1, m, dtype=torch.bool, device=self.device) if there is None else there[:, None]
            self._valid.append(here.expand(*key_states.shape[:2], m))
        for carried in self.state.values():
            shape = (*key_states.shape[:3], *carried.buffer.shape[3:])
            carried.append(torch.zeros(shape, dtype=carried.buffer.dtype, device=self.device))
        self.seen += total
        self.touched = self.touched or arrival is not None
        if m == 1 and self.flat is not None and self.owner is not None and self.owner.reads_flat:
            return key_states, value_states  # the session attends to the flat storage itself
        return self.read()

    def get_seq_length(self) -> int:
        """Tokens that arrived so far, whether or not they are still here: the position of the next one."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are built over arrival numbers; the session picks the columns of the slots."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens. Only a cache from which nothing was dropped can be cut back.

        Raises:
            ValueError: Otherwise, and on a positive number.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove; got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if self.touched or self.state or self.extra:
            raise ValueError("a cache that a method works on cannot be cropped (assisted generation needs that)")
        remaining = max(0, self.seen + tokens_to_remove)
        self.dense = tuple(Growing(x.view[:, :, :remaining].clone()) for x in self.dense)
        if self._valid is not None:
            self._valid = Growing(self._valid.view[:, :, :remaining].clone())
        if self._positions is not None:
            self._positions = Growing(self._positions.view[:, :, :remaining].clone())
        self.seen = remaining

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Samples in another order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sample several times in a row."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only some samples, or some of them several times."""
        if not self.is_initialized:
            return
        pick, before = indices.to(self.device), self.batch
        self.dense = tuple(x.along_batch(pick) for x in self.dense)
        if self.flat is not None:
            counts = self.flat.counts.index_select(0, pick)
            keys, values = (x.index_select(0, pick) for x in self.flat.padded())
            there = torch.arange(self.flat.n, device=self.device) < counts[..., None]
            self.flat = Flat(keys[there], values[there], counts)
        self.cold = [Cold(_some(c.keys, pick), _some(c.values, pick)) for c in self.cold]
        self.state = {name: x.along_batch(pick) for name, x in self.state.items()}
        for name in ("_index", "_valid", "_positions"):
            held = getattr(self, name)
            if held is not None and (name != "_positions" or held.buffer.shape[0] > 1):  # positions may be shared
                setattr(self, name, held.along_batch(pick))
        self.extra = {
            name: x.index_select(0, pick) if isinstance(x, torch.Tensor) and x.dim() and len(x) == before else x
            for name, x in self.extra.items()
        }

    # --- what sessions and methods read -------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.dense[0].buffer.shape[0]

    @property
    def n(self) -> int:
        """Slots, those of a shorter head's padding included."""
        return self.n_cold + (self.flat.n if self.flat else 0) + (self.dense[0].n if self.dense else 0)

    @property
    def n_cold(self) -> int:
        """Slots of packed tokens, the first ones."""
        return sum(c.n for c in self.cold)

    @property
    def index(self) -> torch.Tensor:
        """[b, g, n] arrival number of the token in each slot."""
        if self._index is not None:
            return self._index.view
        return torch.arange(self.n, device=self.device).expand(*self.dense[0].buffer.shape[:2], -1)

    @property
    def valid(self) -> torch.Tensor | None:
        """[b, g, n] which slots hold a token; None = all."""
        return None if self._valid is None else self._valid.view

    def mark_padding(self, there: torch.Tensor) -> None:
        """Say which of the tokens that just arrived are real: [b, last] bool."""
        if self._valid is None:
            if bool(there.all()):
                return
            b, g = self.dense[0].buffer.shape[:2]
            self._valid = Growing(torch.ones(b, g, self.n, dtype=torch.bool, device=self.device))
        self._valid.view[:, :, -self.last :] &= there[:, None]

    def note_positions(self, position_ids: torch.Tensor) -> None:
        """Remember the positions [b|1, m] of the tokens that just arrived."""
        new = position_ids[:, None].int()
        if self._positions is None:
            self._positions = Growing(new)
        elif self._positions.buffer.shape[0] == new.shape[0]:
            self._positions.append(new)
        else:
            b = max(self._positions.buffer.shape[0], new.shape[0])
            old = self._positions.view.expand(b, -1, -1)
            self._positions = Growing(torch.cat([old, new.expand(b, -1, -1)], 2))

    @property
    def positions(self) -> torch.Tensor:
        """[b, g, n] position id of the token in each slot."""
        index = self.index
        table = self._positions.view.expand(len(index), index.shape[1], -1)
        return table.gather(2, index).long()

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values [b, g, n, d] in slot order; a view where one buffer holds them all."""
        if self.flat is None and not self.cold:
            return self.dense[0].view, self.dense[1].view
        parts = [c.read(self.dtype) for c in self.cold]
        if self.flat is not None:
            parts.append(self.flat.padded())
        parts.append((self.dense[0].view, self.dense[1].view))
        keys, values = zip(*parts, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, in whatever form."""
        held = [*self.cold, *(self.dense or ())]
        return sum(x.nbytes for x in held) + (self.flat.nbytes if self.flat else 0)

    @property
    def bookkeeping(self) -> int:
        """Bytes allocated for arrival numbers, positions, padding and carried state."""
        held = [x for x in (self._index, self._valid, self._positions, *self.state.values()) if x is not None]
        held = sum(x.nbytes for x in held)
        return held + sum(x.untyped_storage().nbytes() for x in self.extra.values() if isinstance(x, torch.Tensor))

    @property
    def counts(self) -> torch.Tensor:
        """[b, g] tokens that every head holds."""
        return self._count(0)

    @property
    def hot_counts(self) -> torch.Tensor:
        """[b, g] tokens that every head holds in full precision."""
        return self._count(self.n_cold)

    def _count(self, first: int) -> torch.Tensor:
        b, g = self.dense[0].buffer.shape[:2]
        if self._valid is None:
            return torch.full((b, g), self.n - first, device=self.device)
        return self._valid.view[:, :, first:].sum(-1)

    def kept(self) -> torch.Tensor:
        """[b, g, n] arrival numbers of the tokens still here, sorted; -1 pads heads that hold fewer."""
        there, index = self.valid, self.index
        if there is None:
            return index.sort(-1).values
        last = torch.iinfo(index.dtype).max
        index = index.masked_fill(~there, last).sort(-1).values[..., : int(there.sum(-1).max())]
        return index.masked_fill(index == last, -1)

    def carry(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The state tensor [b, g, n, *shape] of that name, zero where it is new; write into it in place."""
        if name not in self.state:
            b, g = self.dense[0].buffer.shape[:2]
            self.state[name] = Growing(torch.zeros(b, g, self.n, *shape, dtype=dtype, device=self.device))
        return self.state[name].view

    # --- what becomes of tokens ---------------------------------------------------------------------------------------

    def keep(
        self,
        slot: torch.Tensor,
        there: torch.Tensor | None = None,
        cold: tuple[tuple[torch.Tensor, torch.Tensor | None, int], ...] = (),
    ) -> None:
        """Keep some slots as they are, move others to fewer bits, lose the rest. Packed tokens always stay.

        Args:
            slot: [b, g, k] slots to keep, none of them packed.
            there: [b, g, k] False = padding of a head that keeps fewer; None = every head keeps k.
            cold: (slots [b, g, c], padding or None, bits) of tokens to pack; 0 bits = values alone, as they are.
        """
        if self.masked:
            held = torch.zeros(*slot.shape[:2], self.n, dtype=torch.int8, device=self.device)
            held = held.scatter_add(2, slot, _mask(slot, there).to(torch.int8)) > 0
            held[:, :, : self.n_cold] = True
            if self._valid is not None:
                held &= self._valid.view
            self._index, self._valid, self.touched = Growing(self.index.contiguous()), Growing(held), True
            return
        old = self.n_cold
        hot_keys, hot_values = _hot(self)
        packed = []
        for where, real, bits in cold:
            keys, values = compact_kv(hot_keys, hot_values, (where - old).clamp_min(0))
            if bits:
                packed.append(Cold(*quantise_kv(keys, values, bits=bits, valid=real)))
            else:
                packed.append(Cold(Absent(keys[:, :, :0].clone(), keys.shape[2]), Plain(values)))
        # padding may point anywhere, a packed slot too
        keys, values = compact_kv(hot_keys, hot_values, (slot - old).clamp_min(0))
        first = torch.arange(old, device=self.device).expand(*slot.shape[:2], -1)
        order = torch.cat([first, *(where for where, _, _ in cold), slot], 2)
        parts = [torch.ones_like(first, dtype=torch.bool), *(_mask(where, real) for where, real, _ in cold)]
        valid = torch.cat([*parts, _mask(slot, there)], 2)
        if self._valid is not None:
            valid &= self._valid.take(order)
        self._index = Growing(self.index.gather(2, order))
        self._valid = None if bool(valid.all()) else Growing(valid)
        self.state = {name: Growing(x.take(order)) for name, x in self.state.items()}
        self.cold, self.flat, self.touched = [*self.cold, *packed], None, True
        if there is None:
            self.dense = Growing(keys), Growing(values)
        else:
            self.flat = Flat(keys[there], values[there], there.sum(-1))
            self.dense = Growing(keys[:, :, :0].clone()), Growing(values[:, :, :0].clone())

    def drop(self, slot: torch.Tensor) -> None:
        """Lose one token of every head, slot [b, g], in constant time: the newest token takes its place."""
        if self.masked:
            self.keep(*_all_but(slot, self.n))
            return
        if self._index is None:
            self._index = Growing(self.index.contiguous())
        for x in (self._index, self._valid, *self.state.values()):
            if x is not None:
                x.replace(slot)
        if self.flat is None:
            for x in self.dense:
                x.replace(slot - self.n_cold)
        else:
            self._drop_flat(slot - self.n_cold)
        self.touched = True

    def _drop_flat(self, slot: torch.Tensor) -> None:
        """The same where heads hold different numbers: the newest token is in the dense part, the lost one anywhere."""
        inside = slot < self.flat.n
        row = self.flat.slots.gather(2, slot.clamp_max(self.flat.n - 1)[..., None])[..., 0][inside]
        for store, new in zip((self.flat.keys, self.flat.values), self.dense, strict=True):
            last = new.view[:, :, -1]
            store[row] = last[inside]
            if new.n > 1:
                new.replace(torch.where(inside, new.n - 1, slot - self.flat.n))
            else:
                new.n = 0


def _mask(slot: torch.Tensor, there: torch.Tensor | None) -> torch.Tensor:
    return torch.ones_like(slot, dtype=torch.bool) if there is None else there


def _all_but(slot: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All slots, and which of them stay when slot [b, g] goes."""
    every = torch.arange(n, device=slot.device).expand(*slot.shape, n)
    return every, every != slot[..., None]


def _hot(layer: KVLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the slots that are not packed."""
    if layer.flat is None:
        return layer.dense[0].view, layer.dense[1].view
    keys, values = layer.flat.padded()
    return torch.cat([keys, layer.dense[0].view], 2), torch.cat([values, layer.dense[1].view], 2)


def _some(part: Part, index: torch.Tensor) -> Part:
    """A packed tensor for some samples."""
    held = {name: getattr(part, name, None) for name in ("data", "low", "step", "scale", "like")}
    return replace(part, **{name: x.index_select(0, index) for name, x in held.items() if x is not None})


def take_over(cache: Any, depth: int, treated: tuple[int, ...], kind: type = KVLayer, owner: Any = None) -> list[Any]:
    """Put our layers into a cache, in place, so that whoever made it goes on with it.

    Args:
        cache: What the model was given as `past_key_values`.
        depth: Number of the model's layers.
        treated: Those whose cache shall be ours.
        kind: Class of our layers.
        owner: The session that will shorten them.

    Returns:
        Our layers, in the order of `treated`; tokens that were cached before are in them.

    Raises:
        ValueError: On a cache of another kind, an offloaded one, one made for another model, or a sliding window; on
            one that another session is at work on.
    """
    if type(cache) is not DynamicCache:
        raise ValueError(
            f"these methods work on a DynamicCache (what generate makes by default); got {type(cache).__name__}"
        )
    if getattr(cache, "offloading", False):
        raise ValueError("these methods do not work on an offloaded cache")
    if not cache.layers:
        cache.layers = [DynamicLayer() for _ in range(depth)]
        cache.layer_class_to_replicate = None
    if len(cache.layers) != depth:
        raise ValueError(f"the cache has {len(cache.layers)} layers, the model {depth}: not made for it")
    ours = []
    for i in treated:
        layer = cache.layers[i]
        if not isinstance(layer, kind):
            if type(layer) is not DynamicLayer:
                raise ValueError(f"layer {i} of the cache is a {type(layer).__name__}, which cannot be shortened")
            taken = kind()
            if layer.get_seq_length():
                taken.update(layer.keys, layer.values)
            cache.layers[i] = layer = taken
        if owner is not None and layer.owner not in (None, owner) and layer.owner.running:
            raise ValueError(
                "another method is at work on this cache: methods for the KV cache and for visual tokens cannot act on "
                "one model at once; leave the outer `with` block first"
            )
        ours.append(layer)
    return ours
