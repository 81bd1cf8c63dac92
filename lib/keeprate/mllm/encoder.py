"""The vision encoder at work: what its attention did, brought into the order of the language model's visual tokens.

Encoders and language models count differently: tiles, padding, line breaks, groups of 2 x 2 patches, windows. Nothing
here repeats how a model arranges its tokens; scores are sent through the model's own functions for that.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from keeprate import score
from keeprate.anatomy import Multimodal
from keeprate.attention import PREFIX, AttentionView, Listener, listen


class Encoder(Listener):
    """Watches the vision encoder of a model and keeps what the latest images left behind.

    Args:
        parts: The model's anatomy.
        layers: 0-based tower blocks whose queries, keys and values are kept.

    Attributes:
        lengths: Visual tokens of every image, those that end a line included; None before the first image.
        views: For each of `layers` its attention; several where the encoder attends in windows.
    """

    def __init__(self, parts: Multimodal, layers: tuple[int, ...] = ()):
        self.parts = parts
        self.layers = tuple(dict.fromkeys(layer % len(parts.tower_layers) for layer in layers))
        self.clear()

    def clear(self) -> None:
        """Forget the latest images."""
        self._encoding = False  # whether it is looking at the images of a prompt
        self.lengths: list[int] | None = None
        self.views: dict[int, list[AttentionView]] = {layer: [] for layer in self.layers}
        self._given: dict[str, Any] = {}
        self._packed: dict[str, Any] = {}
        self._window: torch.Tensor | None = None
        self._input: torch.Tensor | None = None

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[None]:
        """Watch the encoder; undo it on leaving.

        Raises:
            ValueError: If its attention is to be read but cannot be: flash attention tells no window from another.
        """
        inner, tower = self.parts.inner, self.parts.tower
        kind = (getattr(tower.config, "_attn_implementation", None) or "").removeprefix(PREFIX)
        if self.layers and self.parts.windowed and "flash" in kind:
            raise ValueError(
                "this vision encoder attends in windows; its attention can be read in front of sdpa or eager attention,"
                f" which are given one window at a time; it uses {kind!r}"
            )
        self.number = {self.parts.tower_attention[i]: i for i in self.layers}
        with ExitStack() as stack:
            stack.enter_context(around(inner, "get_image_features", self._encode))
            if hasattr(inner, "pack_image_features"):
                self.pack = inner.pack_image_features
                stack.enter_context(around(inner, "pack_image_features", self._pack))
            if self.parts.windowed:
                stack.enter_context(around(tower, "permute_input_for_window_attn", self._permute))
            stack.callback(self.parts.projector.register_forward_pre_hook(self._project).remove)
            stack.enter_context(listen(model, self, list(self.number)))
            yield

    # --- watching -----------------------------------------------------------------------------------------------------

    def _encode(self, encode: Callable, *args: Any, **kwargs: Any) -> Any:
        self.clear()
        self._given = inspect.signature(encode).bind(*args, **kwargs).arguments
        if any(isinstance(x, torch.Tensor) and x.numel() == 0 for x in self._given.values()):
            raise ValueError("the batch is empty: pixel_values must hold at least one image")
        self._check_selection()
        self._encoding = True
        try:
            output = encode(*args, **kwargs)
        finally:
            self._encoding = False
        self.lengths = [len(tokens) for tokens in output.pooler_output]
        return output

    def _check_selection(self) -> None:
        """Visual tokens must be the patches, all of them, at the block that `parts` names: scores are read there."""
        key, config = "vision_feature_select_strategy", self.parts.inner.config
        given = self._given.get(key) or getattr(config, key, None)  # None: a model that has no such choice
        wanted = "default" if self.parts.has_cls else "full"
        if given not in (None, wanted):
            reason = "has a class token, which is no patch" if self.parts.has_cls else "has no class token to leave out"
            raise ValueError(f"{key} must be {wanted!r}: the vision encoder of this model {reason}; got {given!r}")
        given, own = self._given.get("vision_feature_layer"), getattr(config, "vision_feature_layer", None)
        if given not in (None, own):
            raise ValueError(f"vision_feature_layer must be that of the model's configuration, {own!r}; got {given!r}")

    def _pack(self, pack: Callable, *args: Any, **kwargs: Any) -> Any:
        self._packed = inspect.signature(pack).bind(*args, **kwargs).arguments
        return pack(*args, **kwargs)

    def _permute(self, permute: Callable, x: torch.Tensor, window_index: torch.Tensor, *args: Any, **kwargs: Any):
        self._window = window_index
        return permute(x, window_index, *args, **kwargs)

    def _project(self, projector: nn.Module, args: tuple) -> None:
        if self._encoding:  # methods send features through it too
            self._input = args[0]

    def fold(self, module: nn.Module, view: AttentionView) -> None:
        if self._encoding:
            self.views[self.number[module]].append(view)

    # --- what the tokens are ------------------------------------------------------------------------------------------

    @property
    def group(self) -> int:
        """Patches that make one visual token."""
        config = self.parts.inner.config
        if self.parts.windowed:
            return self.parts.tower.spatial_merge_unit
        return round(config.downsample_ratio**-2) if self.parts.shuffled else 1

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Bring numbers of patches [views, patches, c] into the order of visual tokens: [tokens, c], NaN = line end.

        Where several patches make a token, it gets their mean.
        """
        if self._packed:
            packed = dict(self._packed)
            packed["image_features"] = torch.split(x, [len(views) for views in packed["image_features"]])
            packed["image_newline"] = x.new_full((x.shape[-1],), float("nan"))
            return torch.cat(self.pack(**packed)[0])
        if self.parts.shuffled:
            side = round(x.shape[1] ** 0.5)
            ratio = self.parts.inner.config.downsample_ratio
            groups = self.parts.inner.pixel_shuffle(x.unflatten(1, (side, side)).contiguous(), scale_factor=ratio)
            return groups.flatten(0, 2).unflatten(-1, (self.group, -1)).mean(-2)
        if self.parts.windowed:
            return self._unwindow(x.flatten(0, 1).unflatten(0, (-1, self.group)).mean(1))
        return x.flatten(0, 1)

    def _unwindow(self, x: torch.Tensor) -> torch.Tensor:
        return x[self._window.argsort()]

    def line_ends(self) -> torch.Tensor:
        """[tokens] bool: tokens that end a line of patches and show none."""
        if not self._packed:
            return torch.zeros(sum(self.lengths), dtype=torch.bool, device=self._input.device)
        return self.tokens(torch.zeros(*self._input.shape[:2], 1, device=self._input.device))[:, 0].isnan()

    def places(self) -> torch.Tensor:
        """[tokens, 3] view (0 = the whole image), row and column of every token in it; -1 = line end.

        Where a model resizes tiles together, a token lies in the tile that it is made of most.
        """
        device = self._input.device
        if self.parts.windowed:
            side = round(self.group**0.5)
            grids = self._given["image_grid_thw"].tolist()
            return torch.cat([_raster(frames, h // side, w // side, device) for frames, h, w in grids])
        if self._packed:
            views = torch.cat([torch.arange(len(v), device=device) for v in self._packed["image_features"]])
            n = self._input.shape[1]
            spot = _raster(1, round(n**0.5), n // round(n**0.5), device).float()
            spot[:, 0] = 1.0
            sent = nn.functional.one_hot(views)[:, None, :, None] * spot[:, None]  # views n view (share, row, column)
            place = self.tokens(sent.flatten(2)).unflatten(1, (-1, 3))
            share, view = place[..., 0].max(1)
            spot = place.gather(1, view[:, None, None].expand(-1, 1, 3))[:, 0, 1:] / share[:, None]
            return torch.cat([view[:, None], spot.round()], 1).masked_fill(share.isnan()[:, None], -1).long()
        views, n = self.lengths, self.lengths[0]  # InternVL's tiles are images of their own
        return _raster(1, round(n**0.5), n // round(n**0.5), device).repeat(len(views), 1)

    def features(self) -> torch.Tensor:
        """[tokens, c] what the projector turns into visual tokens; zero at line ends.

        LLaVA-OneVision resizes large images behind its projector. Here their features are resized in front of it, so
        that what is projected from them comes near those tokens, but is not equal to them.
        """
        x = self._input
        if self.parts.windowed:
            return self._unwindow(x.unflatten(0, (-1, self.group)).flatten(1))
        return x.flatten(0, 1) if self.parts.shuffled else self.tokens(x).nan_to_num(0.0)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Send [..., c] features through the projector: [..., d]."""
        if self.parts.windowed:
            flat = features.unflatten(-1, (self.group, -1)).flatten(0, -2)
            return self.parts.projector(flat).view(*features.shape[:-1], -1)
        return self.parts.projector(features)

    # --- what attention did -------------------------------------------------------------------------------------------

    def _at(self, layer: int) -> list[AttentionView]:
        views = self.views.get(layer % len(self.parts.tower_layers))
        if not views:
            raise ValueError(
                f"the attention of vision block {layer} was not kept: the images were encoded outside the `with` "
                "block, or the method does not list the block in `tower_layers`"
            )
        return views

    def class_attention(self, layer: int) -> torch.Tensor:
        """[tokens, h] attention of the class token, by head.

        Raises:
            ValueError: Where the encoder has no class token.
        """
        if not self.parts.has_cls:
            raise ValueError(f"the vision encoder of {self.parts.name} has no class token")
        heads = [score.attention_from(view, 0, self.parts.prefix) for view in self._at(layer)]
        return self.tokens(torch.cat(heads).transpose(1, 2))

    def received(self, layer: int) -> torch.Tensor:
        """[tokens, h] attention received, mean over the query rows of the image (of the view), by head.

        In a block that attends in windows, rows of other windows pay nothing: a small window at the border is no
        advantage.
        """
        views = self._at(layer)
        if self.parts.windowed:
            rows = self._given["image_grid_thw"].prod(1)  # windows of an image stand behind each other
            total = _join([view.received() for view in views], -1)
            return self.tokens((total / rows.repeat_interleave(rows).to(total.device)).transpose(1, 2))
        heads = [score.attention_received(view, self.parts.prefix) for view in views]
        return self.tokens(_join(heads, 0).transpose(1, 2))

    def keys(self, layer: int, values: bool = False) -> torch.Tensor:
        """[tokens, h, d] keys (rotated, where the encoder has rotary embeddings), or values, of the patches, fp32."""
        parts = [(view.v if values else view.k)[:, :, self.parts.prefix :].float() for view in self._at(layer)]
        x = _join(parts, 2 if self.parts.windowed else 0).transpose(1, 2)
        return self.tokens(x.flatten(2)).unflatten(1, x.shape[2:])

    def one_head(self, layer: int) -> torch.Tensor:
        """[tokens, 1] class attention computed as if the layer had a single head as wide as all of them.

        Source: LLaVA-PruMerge and Recoverable Compression, whose code does not split the heads.
        """
        views = self._at(layer)
        q, k = (torch.cat([getattr(v, name) for v in views]).transpose(1, 2).flatten(2).float() for name in "qk")
        logits = (q[:, :1] @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
        return self.tokens(logits.softmax(-1)[:, 0, self.parts.prefix :, None])


def _join(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Windows of one sequence behind each other; batches of views side by side."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _raster(frames: int, rows: int, cols: int, device: torch.device) -> torch.Tensor:
    """[frames * rows * cols, 3] frame, row and column in reading order."""
    sides = (torch.arange(side, device=device) for side in (frames, rows, cols))
    return torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).flatten(0, 2)


@contextmanager
def around(owner: Any, name: str, run: Callable) -> Iterator[None]:
    """Replace a method of one object by run(original, ...), and undo it on leaving."""
    original, held = getattr(owner, name), owner.__dict__.get(name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return run(original, *args, **kwargs)

    owner.__dict__[name] = wrapped
    try:
        yield
    finally:
        if held is None:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = held
