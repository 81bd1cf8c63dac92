"""Handwritten digits pasted on photographs: images whose important patches are known.

Everything is made at run time from a seed and from files that lie inside two installed packages; nothing is downloaded.

* Glyphs: ``sklearn.datasets.load_digits``, 1797 real digits of 8x8 pixels. The file lists one writer after another,
  about 128 digits each, so a contiguous block of samples is a group of people. The test split holds the samples
  516..902 (three writers); training uses the other eleven. Writers differ: a support vector machine that is tested on
  one thirteenth of the file and trained on the rest scores 93 % to 100 %; on these three 98 % to 99 %.
* Photographs: pictures shipped by scikit-learn and scikit-image. Each is cut across its longer side: the first 68 %
  belong to training, the last 30 % to the test, and the strip between them is used by neither.

An image is a crop of a photograph with exactly one digit, brighter than what surrounds it, of varying height, place,
colour, contrast, rotation, slant and stroke width. The *truth* is the set of patches that the digit's ink covers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import numpy as np
import torch
from torch.nn import functional as F

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "test")
PATCH = 4  # pixels
GRID = 14  # patches a side
HEIGHT = (13.0, 22.0)  # pixels, of the 8x8 glyph's box: 3.25 to 5.5 patches
CONTRAST = (0.45, 0.65)  # luminance of a digit above its surroundings, see ``paste``
INK = 0.15  # a patch belongs to the digit when at least this share of its area is ink

_TEST_WRITERS = slice(516, 903)
_PHOTOGRAPHS = (
    ("sklearn.datasets", "images/china.jpg"),
    ("sklearn.datasets", "images/flower.jpg"),
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/grass.png"),
    ("skimage", "data/gravel.png"),
    ("skimage", "data/brick.png"),
)
_LUMA = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601


def check_split(split: str) -> None:
    """Refuse a split that does not exist.

    Raises:
        ValueError: ``split`` is neither "train" nor "test".
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; allowed: {', '.join(map(repr, SPLITS))}")


@lru_cache
def glyphs(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Handwritten digits of one group of writers.

    Args:
        split: "train" or "test".

    Returns:
        Ink [m, 8, 8] in 0..1 and labels [m] (int64).

    Raises:
        ValueError: unknown split.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998), as shipped by scikit-learn.
    """
    check_split(split)
    from sklearn.datasets import load_digits

    digits = load_digits()
    held_out = np.zeros(len(digits.target), dtype=bool)
    held_out[_TEST_WRITERS] = True
    chosen = held_out if split == "test" else ~held_out
    ink = torch.from_numpy(digits.images[chosen]).float() / 16
    return ink, torch.from_numpy(digits.target[chosen]).long()


@lru_cache
def photographs(split: str, scales: tuple[float, ...] = (0.75, 0.5, 0.35)) -> tuple[np.ndarray, ...]:
    """The split's part of every photograph, at several scales.

    Args:
        split: "train" or "test".
        scales: factors by which a photograph is shrunk; a region with a side below 64 pixels is left out.

    Returns:
        uint8 arrays [h, w, 3] (RGB).

    Raises:
        ValueError: unknown split.
    """
    check_split(split)
    from PIL import Image

    regions = []
    for package, path in _PHOTOGRAPHS:
        with files(package).joinpath(path).open("rb") as file:
            whole = Image.open(file).convert("RGB")
        for scale in scales:
            pixels = np.asarray(whole.resize([round(scale * side) for side in whole.size], Image.Resampling.BOX))
            axis = 0 if pixels.shape[0] > pixels.shape[1] else 1
            length = pixels.shape[axis]
            part = range(0, int(0.68 * length)) if split == "train" else range(int(0.70 * length), length)
            region = np.take(pixels, part, axis=axis)
            if min(region.shape[:2]) >= 64:
                regions.append(region)
    return tuple(regions)


def crop_photographs(rng: np.random.Generator, n: int, height: int, width: int, split: str) -> torch.Tensor:
    """Random crops of photographs, half of them mirrored.

    Args:
        rng: source of chance.
        n: number of crops.
        height, width: size of a crop in pixels, at most 64.
        split: "train" or "test".

    Returns:
        [n, 3, height, width] in 0..1.
    """
    regions = photographs(split)
    crops = np.empty((n, height, width, 3), dtype=np.uint8)
    which = rng.integers(len(regions), size=n)
    corner, mirror = rng.random((n, 2)), rng.random(n) < 0.5
    for i in range(n):
        region = regions[which[i]]
        top = int(corner[i, 0] * (region.shape[0] - height + 1))
        left = int(corner[i, 1] * (region.shape[1] - width + 1))
        crop = region[top : top + height, left : left + width]
        crops[i] = crop[:, ::-1] if mirror[i] else crop
    return torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255


def draw_glyphs(
    ink: torch.Tensor,
    centre: torch.Tensor,
    height: torch.Tensor,
    canvas: tuple[int, int],
    angle: torch.Tensor | None = None,
    slant: torch.Tensor | None = None,
    threshold: torch.Tensor | None = None,
    bend: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw each glyph, smoothly enlarged, on its own empty canvas.

    Args:
        ink: [n, 8, 8] in 0..1.
        centre: [n, 2], (y, x) in pixels.
        height: [n], height of the glyph's box in pixels.
        canvas: (height, width) of the canvas in pixels.
        angle: [n], rotation in radians, default 0.
        slant: [n], horizontal shear, default 0.
        threshold: [n], ink level at which a pixel is half covered, default 0.5; higher is thinner.
        bend: [n, 4], second-order warp of the box: how far v^2 and u v shift u, and u^2 and u v shift v; default none.

    Returns:
        Coverage (alpha) [n, height, width] in 0..1.
    """
    n = len(ink)
    angle, slant = (torch.zeros(n) if value is None else value for value in (angle, slant))
    threshold = torch.full((n,), 0.5) if threshold is None else threshold
    y = (torch.arange(canvas[0]) + 0.5 - centre[:, :1]) / (height[:, None] / 2)  # n h, -1..1 inside the box
    x = (torch.arange(canvas[1]) + 0.5 - centre[:, 1:]) / (height[:, None] / 2)  # n w
    y, x = y[:, :, None], x[:, None, :]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    v = cos * y - sin * x  # n h w
    u = sin * y + cos * x + slant[:, None, None] * v
    if bend is not None:
        a, b, c, d = bend.T[:, :, None, None]
        u, v = u + a * v.square() + b * u * v, v + c * u.square() + d * u * v
    smooth = F.grid_sample(ink[:, None], torch.stack([u, v], -1), mode="bicubic", align_corners=False)[:, 0]
    return ((smooth - threshold[:, None, None]) / 0.4 + 0.5).clamp(0, 1)


def paste(background: torch.Tensor, alpha: torch.Tensor, hue: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
    """Paint coverage masks on backgrounds in a colour that is brighter than what they cover.

    A background whose luminance around the digit exceeds 0.45 is dimmed as a whole, so that there is room above it.

    Args:
        background: [n, 3, h, w] in 0..1.
        alpha: [n, h, w] in 0..1.
        hue: [n, 3], colours of any brightness above 0.
        contrast: [n], luminance above the background under and beside the digit (its mean plus half its deviation).

    Returns:
        [n, 3, h, w] in 0..1.
    """
    luma = torch.einsum("nchw,c->nhw", background, _LUMA)
    beside = F.max_pool2d(alpha[:, None], 5, stride=1, padding=2)[:, 0]
    weight = beside / beside.sum((1, 2), keepdim=True).clamp_min(1e-6)
    mean = (luma * weight).sum((1, 2))
    spread = ((luma - mean[:, None, None]).square() * weight).sum((1, 2)).sqrt()
    around = mean + spread / 2
    dim = (0.45 / around.clamp_min(1e-6)).clamp_max(1)
    target = (around * dim + contrast).clamp_max(1)
    colour = hue * (target / (hue @ _LUMA))[:, None]
    over = (colour - 1).clamp_min(0) @ _LUMA  # luminance lost where a channel saturates goes to all channels
    colour = (colour.clamp_max(1) + over[:, None]).clamp_max(1)
    alpha = alpha[:, None]
    return background * dim[:, None, None, None] * (1 - alpha) + colour[:, :, None, None] * alpha


def covered_patches(alpha: torch.Tensor, patch: int = PATCH) -> torch.Tensor:
    """Patches that hold ink.

    Args:
        alpha: [n, h, w] in 0..1.
        patch: side of a patch in pixels.

    Returns:
        bool [n, h / patch, w / patch]; at least one is true in every image.
    """
    share = F.avg_pool2d(alpha[:, None], patch)[:, 0]
    return share >= torch.minimum(share.amax((1, 2), keepdim=True), torch.tensor(INK))


@dataclass(frozen=True)
class Digits:
    """A batch of rendered images.

    Attributes:
        pixels: uint8 [n, 3, h, w].
        labels: int64 [n], 0..9.
        truth: bool [n, h / 4, w / 4], the patches that hold the digit.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    truth: torch.Tensor


def render(rng: np.random.Generator, n: int, split: str, side: int = GRID, clutter: float = 1.0) -> Digits:
    """Render images with one digit each.

    Args:
        rng: source of chance; the same state gives the same images.
        n: number of images.
        split: "train" or "test".
        side: canvas in patches of 4 pixels; 6 is the least that holds every digit.
        clutter: brightness of the photograph, 0 (black) to 1 (as it is).

    Returns:
        The images with labels and truth.

    Raises:
        ValueError: unknown split, or ``n``, ``side`` or ``clutter`` outside the allowed range.
    """
    if n < 1 or side * PATCH < HEIGHT[1] or not 0 <= clutter <= 1:
        raise ValueError(f"n={n}, side={side}, clutter={clutter}; allowed: n >= 1, side >= 6, clutter in [0, 1]")
    ink, labels = glyphs(split)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(low, high, (n, *shape))).float()

    which = torch.from_numpy(rng.integers(len(ink), size=n))
    canvas = side * PATCH
    height = uniform(*HEIGHT)
    centre = height[:, None] / 2 + uniform(0, 1, 2) * (canvas - height)[:, None]
    angle, slant, threshold = uniform(-0.2, 0.2), uniform(-0.2, 0.2), uniform(0.4, 0.6)
    bend = None
    if split == "train":  # eleven writers are few: vary their hands more than the test does
        angle, slant, bend = 1.5 * angle, 1.5 * slant, uniform(-0.15, 0.15, 4)
    alpha = draw_glyphs(ink[which], centre, height, (canvas, canvas), angle, slant, threshold, bend)
    background = crop_photographs(rng, n, canvas, canvas, split) * clutter
    pixels = paste(background, alpha, uniform(0.4, 1.0, 3), uniform(*CONTRAST))
    return Digits((pixels * 255).round().to(torch.uint8), labels[which], covered_patches(alpha))
