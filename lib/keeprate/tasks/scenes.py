"""Scenes of handwritten digits and small photographs, with questions whose needed patches are known.

Everything is made at run time from a seed and from files that lie inside installed packages; nothing is downloaded.

* Digits: those of ``keeprate.tasks.digits``, the test split written by other people than the training split.
* Small photographs, `PHOTOS`: faces, coins and pages of the test are others than those of training, the bike of the
  test is the same one photographed from a second place; cat, cup, flower and rocket are one photograph each, cut out
  and turned at random in both splits. So with these four an instance is recognised, not a class.
* Backgrounds, `BACKGROUNDS`: one photograph each, cut in two, one part for training and one for the test.

A scene is 96x96 pixels, 12x12 patches of 8. Its board has 4x4 places, named as in a spreadsheet: columns a to d from
the left, rows 1 to 4 from the top. One to four digits of different value and one to three different photographs stand
on it, in half of the scenes on the middle of their places, in the other half anywhere within them. Some scenes have
several digits in one row, which can be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from keeprate import check
from keeprate.tasks import digits

SIDE, PATCH, BOARD = 96, 8, 4
GRID = SIDE // PATCH
CELL = SIDE // BOARD
KINDS = ("presence", "place", "where", "count", "largest", "read", "colour", "gist")
DIGITS = tuple("0123456789")
PHOTOS = ("face", "coin", "cat", "cup", "flower", "rocket", "bike", "page")
CLASSES = DIGITS + PHOTOS
PLACES = tuple(f"{column}{row}" for row in "1234" for column in "abcd")
COLOURS = {
    "red": (1.0, 0.2, 0.15),
    "green": (0.2, 0.9, 0.25),
    "blue": (0.3, 0.45, 1.0),
    "yellow": (1.0, 0.9, 0.15),
    "white": (1.0, 1.0, 1.0),
    "pink": (1.0, 0.45, 0.9),
}
BACKGROUNDS = ("brick", "grass", "gravel", "moon", "stars", "tissue", "retina", "wood")
MOST_DIGITS, MOST_PHOTOS = 4, 3
HEIGHT = (16.0, 20.0)  # pixels, of digits and photographs
BRIGHTNESS = (0.1, 0.26)  # mean luminance of a background
WINDOW = 32  # pixels, a whole number of patches that holds any item wherever it begins
THUMBNAIL = 24  # pixels
LUMA = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601

# Where things are in the pictures of scikit-image and scikit-learn: left, top, right, bottom.
_COINS = (  # centres, row by row; the second row is the test's
    ((44, 54), (100, 56), (155, 51), (215, 51), (275, 53), (336, 44)),
    ((46, 124), (103, 126), (154, 128), (206, 124), (272, 120), (337, 124)),
    ((44, 197), (102, 196), (155, 198), (212, 194), (274, 195), (348, 187)),
    ((46, 261), (114, 265), (172, 262), (245, 264), (301, 264), (358, 267)),
)
_OBJECTS = {
    "cat": ("skimage", "data/chelsea.png", (40, 0, 340, 300)),
    "cup": ("skimage", "data/coffee.png", (150, 10, 460, 320)),
    "flower": ("sklearn.datasets", "images/flower.jpg", (160, 76, 456, 372)),
    "rocket": ("skimage", "data/rocket.jpg", (258, 115, 388, 245)),
}
_REGIONS = {
    "brick": ("data/brick.png", (0, 0, 512, 512), (1.0, 0.8)),
    "grass": ("data/grass.png", (0, 0, 512, 512), (1.0, 0.8)),
    "gravel": ("data/gravel.png", (0, 0, 512, 512), (1.0, 0.8)),
    "moon": ("data/moon.png", (0, 0, 512, 512), (1.0, 0.8)),
    "stars": ("data/hubble_deep_field.jpg", (0, 0, 1000, 872), (0.5, 0.4)),
    "tissue": ("data/ihc.png", (0, 0, 512, 512), (1.0, 0.8)),
    "retina": ("data/retina.jpg", (250, 250, 1150, 1150), (0.5, 0.4)),
    "wood": ("data/coffee.png", (460, 0, 600, 400), (1.0, 0.9)),
}


def _picture(package: str, path: str, box: tuple[int, int, int, int] | None = None, scale: float = 1.0) -> np.ndarray:
    """Part of a picture inside an installed package, shrunk, uint8 [h, w, 3]."""
    from PIL import Image

    with files(package).joinpath(path).open("rb") as file:
        image = Image.open(file).convert("RGB")
    image = image.crop(box or (0, 0, *image.size))
    return np.asarray(image.resize([round(scale * side) for side in image.size], Image.Resampling.BOX))


@lru_cache
def thumbnails(split: str, variants: int = 32) -> tuple[Tensor, Tensor]:
    """Small photographs of every class.

    Args:
        split: "train" or "test".
        variants: cuts of each class, each a little shifted and scaled.

    Returns:
        Pixels [m, 3, 24, 24] in 0..1 and, for each, which of `PHOTOS` it shows, int64 [m].

    Raises:
        ValueError: Unknown split.
    """
    from PIL import Image

    check.choice("split", split, digits.SPLITS)
    rng = np.random.default_rng([7, digits.SPLITS.index(split)])
    test = split == "test"
    with files("skimage").joinpath("data/lfw_subset.npy").open("rb") as file:
        faces = (np.load(file)[70:100] if test else np.load(file)[:70]) * 255  # the first hundred are faces
    coins, page = _picture("skimage", "data/coins.png"), _picture("skimage", "data/page.png")
    centres = _COINS[1] if test else _COINS[0] + _COINS[2] + _COINS[3]
    bike = _picture("skimage", f"data/motorcycle_{'right' if test else 'left'}.png")
    whole = {name: (_picture(package, path), box) for name, (package, path, box) in _OBJECTS.items()}
    pixels = []
    for name in PHOTOS:
        for i in range(variants):
            if name == "face":
                image, box = np.repeat(faces[i % len(faces)][:, :, None], 3, 2).astype(np.uint8), (0, 0, 25, 25)
            elif name == "coin":
                x, y = centres[i % len(centres)]
                image, box = coins, (x - 25, y - 25, x + 25, y + 25)
            elif name == "page":
                left = rng.integers(255, 300) if test else rng.integers(5, 160)
                top = rng.integers(28, 60)
                image, box = page, (left, top, left + 72, top + 72)
            elif name == "bike":
                image, box = bike, (340, 120, 690, 470)
            else:
                image, box = whole[name]
            side = box[2] - box[0]
            shift = rng.uniform(-0.06, 0.06, 2) * side
            zoom = rng.uniform(0.92, 1.0) * side / 2
            x, y = (box[0] + box[2]) / 2 + shift[0], (box[1] + box[3]) / 2 + shift[1]
            x = np.clip(x, zoom, image.shape[1] - zoom)
            y = np.clip(y, zoom, image.shape[0] - zoom)
            cut = Image.fromarray(image).resize(
                (THUMBNAIL, THUMBNAIL), Image.Resampling.BOX, (x - zoom, y - zoom, x + zoom, y + zoom)
            )
            pixels.append(np.asarray(cut))
    which = torch.arange(len(PHOTOS)).repeat_interleave(variants)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255, which


@dataclass(frozen=True)
class _Grounds:
    """Regions of photographs laid end to end: pixels uint8 [p, 3]; begin, height and width int64 [r] of each region."""

    pixels: Tensor
    begin: Tensor
    height: Tensor
    width: Tensor


@lru_cache
def _grounds(split: str) -> _Grounds:
    """The split's part of every background, at the same number of scales each, class by class."""
    parts = []
    for path, box, scales in _REGIONS.values():
        for scale in scales:
            region = _picture("skimage", path, box, scale)
            axis = 0 if region.shape[0] > region.shape[1] else 1
            length = region.shape[axis]
            part = range(0, int(0.68 * length)) if split == "train" else range(int(0.70 * length), length)
            parts.append(np.take(region, part, axis=axis))
    size = torch.tensor([region.shape[:2] for region in parts])
    begin = torch.cat([torch.zeros(1, dtype=torch.int64), size.prod(1).cumsum(0)[:-1]])
    pixels = torch.from_numpy(np.concatenate([region.reshape(-1, 3) for region in parts]))
    return _Grounds(pixels, begin, size[:, 0], size[:, 1])


def backgrounds(rng: np.random.Generator, which: Tensor, split: str) -> Tensor:
    """Random crops of the photographs that serve as backgrounds, half of them mirrored, dimmed to `BRIGHTNESS`.

    Args:
        rng: source of chance.
        which: int64 [n], of `BACKGROUNDS`.
        split: "train" or "test".

    Returns:
        [n, 3, 96, 96] in 0..1.
    """
    bank, n = _grounds(split), len(which)
    scales = len(bank.begin) // len(BACKGROUNDS)
    region = which * scales + torch.from_numpy(rng.integers(scales, size=n))
    step = torch.arange(SIDE)
    missing = (SIDE - torch.stack([bank.height, bank.width])[:, region]).clamp_min(0)  # a narrow region is reflected
    room = torch.stack([bank.height, bank.width])[:, region] - SIDE + missing
    top, left = (torch.from_numpy(rng.random((2, n))) * (room + 1)).long()
    y, x = top[:, None] + step, left[:, None] + step  # n 96
    x = torch.where(torch.from_numpy(rng.random(n) < 0.5)[:, None], x.flip(1), x)
    last = torch.stack([bank.height, bank.width])[:, region, None] - 1
    y, x = last[0] - (last[0] - y).abs(), last[1] - (last[1] - x).abs()
    index = bank.begin[region, None, None] + y[:, :, None] * bank.width[region, None, None] + x[:, None, :]
    crop = bank.pixels[index].permute(0, 3, 1, 2).float() / 255
    luma = torch.einsum("nchw,c->n", crop, LUMA) / SIDE**2
    wanted = torch.from_numpy(rng.uniform(*BRIGHTNESS, n)).float()
    return crop * (wanted / luma.clamp_min(1e-3)).clamp_max(1)[:, None, None, None]


@dataclass(frozen=True)
class Drawn:
    """A batch of scenes and what is in them. Slots 0..3 are for digits, 4..6 for photographs; see `crowd` for others.

    Attributes:
        pixels: uint8 [n, 3, 96, 96].
        classes: int64 [n, 7], of `CLASSES`; -1 for an empty slot.
        cells: int64 [n, 7], of `PLACES`; -1 for an empty slot.
        colours: int64 [n, 7], of `COLOURS`; -1 for photographs and empty slots.
        patches: bool [n, 7, 144], the patches that hold each item's ink or picture.
        background: int64 [n], of `BACKGROUNDS`.
    """

    pixels: Tensor
    classes: Tensor
    cells: Tensor
    colours: Tensor
    patches: Tensor
    background: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def rows(self) -> Tensor:
        """Whether a row of the board can be read, having two digits or more, bool [n, 4]."""
        cells = self.cells[:, :MOST_DIGITS]
        return ((cells // BOARD)[:, :, None] == torch.arange(BOARD)).logical_and((cells >= 0)[:, :, None]).sum(1) >= 2


def _layout(rng: np.random.Generator, n: int, row: Tensor) -> tuple[Tensor, Tensor]:
    """Which slots are filled, bool [n, 7], and their places, int64 [n, 7]; where ``row``, digits share a row."""
    slots = MOST_DIGITS + MOST_PHOTOS
    count = torch.from_numpy(rng.integers(1, MOST_DIGITS + 1, n))
    count = torch.where(row & (count < 2), torch.from_numpy(rng.integers(2, MOST_DIGITS + 1, n)), count)
    photos = torch.from_numpy(rng.integers(1, MOST_PHOTOS + 1, n))
    slot = torch.arange(slots)
    filled = torch.where(slot < MOST_DIGITS, slot < count[:, None], slot - MOST_DIGITS < photos[:, None])
    together = torch.minimum(count, torch.from_numpy(rng.integers(2, MOST_DIGITS + 1, n))) * row  # digits in one row
    chosen = torch.from_numpy(rng.integers(BOARD, size=n))
    place = torch.arange(BOARD**2)
    first = (place // BOARD == chosen[:, None]) & row[:, None]
    order = (torch.from_numpy(rng.random((n, BOARD**2))) - first.float()).argsort(1)  # the row's places come first
    j = together[:, None]
    return filled, order.gather(1, torch.where(slot < j, slot, BOARD + slot - j))


def _centres(rng: np.random.Generator, cells: Tensor, filled: Tensor, height: Tensor) -> Tensor:
    """Middle of every item in pixels, (y, x), [n, 7, 2]: within its place, clear of the other items."""
    n, slots = cells.shape
    middle = torch.stack([cells // BOARD, cells % BOARD], -1) * CELL + CELL / 2
    loose = torch.tensor([9.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.5])  # pixels; the last never collides
    tries = loose.repeat(n, 1)
    tries[torch.from_numpy(rng.random(n) < 0.5)] = loose[-1]  # on the grid
    shift = torch.from_numpy(rng.uniform(-1, 1, (n, len(loose), slots, 2))).float() * tries[:, :, None, None]
    half = (height / 2)[:, None, :, None]
    centre = torch.minimum(torch.maximum(middle[:, None] + shift, half), SIDE - half)  # n t 7 2
    gap = (centre[:, :, :, None] - centre[:, :, None]).abs().amax(-1)  # n t 7 7
    apart = gap >= half + half.mT
    apart |= ~(filled[:, None, :, None] & filled[:, None, None, :]) | torch.eye(slots, dtype=torch.bool)
    fits = apart.all(-1).all(-1)
    fits[:, -1] = True
    best = fits.int().argmax(1)  # the loosest one that fits
    return centre[torch.arange(n), best]


def draw(
    rng: np.random.Generator, n: int, split: str = "test", row: Tensor | None = None, clutter: float = 1.0
) -> Drawn:
    """Draw scenes.

    Args:
        rng: source of chance; the same state gives the same scenes.
        n: number of scenes.
        split: "train" or "test".
        row: bool [n], scenes that have at least two digits in one row; default a random half.
        clutter: brightness of the background, 0 (black) to 1 (as it is).

    Returns:
        The scenes.

    Raises:
        ValueError: Unknown split, ``n`` below 1, ``row`` of another shape, ``clutter`` outside 0..1.
    """
    check.choice("split", split, digits.SPLITS), check.whole("n", n), check.number("clutter", clutter, 0, 1)
    row = torch.from_numpy(rng.random(n) < 0.5) if row is None else row
    if row.shape != (n,) or row.dtype != torch.bool:
        raise ValueError(f"row must be bool [{n}]; got {row.dtype} {tuple(row.shape)}")

    filled, cells = _layout(rng, n, row)
    values = torch.from_numpy(rng.random((n, 10)).argsort(1)[:, :MOST_DIGITS].copy())
    objects = torch.from_numpy(rng.random((n, len(PHOTOS))).argsort(1)[:, :MOST_PHOTOS].copy()) + len(DIGITS)
    classes = torch.cat([values, objects], 1)  # n 7, no class twice
    colours = torch.from_numpy(rng.integers(len(COLOURS), size=(n, MOST_DIGITS)))
    colours = torch.cat([colours, torch.full((n, MOST_PHOTOS), -1)], 1)
    height = _uniform(rng, *HEIGHT, n, filled.shape[1])
    centre = _centres(rng, cells, filled, height)
    return _render(rng, split, clutter, filled, classes, cells, colours, centre, height)


def crowd(rng: np.random.Generator, n: int, split: str = "train", clutter: float = 1.0) -> Drawn:
    """Draw scenes as full as can be, to learn many digits from at once; no question can be asked about them.

    Twelve digits and four photographs, any class any number of times, stand on a board that is shifted at random; those
    that would leave the picture are left out.

    Args:
        rng: source of chance.
        n: number of scenes.
        split: "train" or "test".
        clutter: brightness of the background, 0 to 1.

    Returns:
        The scenes, slots 0..11 for digits, 12..15 for photographs.
    """
    photos = BOARD
    classes = torch.from_numpy(rng.integers(len(DIGITS), size=(n, BOARD**2)))
    classes[:, -photos:] = torch.from_numpy(rng.integers(len(DIGITS), len(CLASSES), (n, photos)))
    colours = torch.from_numpy(rng.integers(len(COLOURS), size=(n, BOARD**2)))
    colours[:, -photos:] = -1
    cells = torch.from_numpy(rng.random((n, BOARD**2)).argsort(1))
    height = _uniform(rng, *HEIGHT, n, BOARD**2)
    middle = torch.stack([cells // BOARD, cells % BOARD], -1) * CELL + CELL / 2
    shift = _uniform(rng, -CELL / 2, CELL / 2, n, 1, 2) + _uniform(rng, -1.5, 1.5, n, BOARD**2, 2)
    centre, half = middle + shift, height[:, :, None] / 2
    filled = ((centre >= half) & (centre <= SIDE - half)).all(-1)
    y, x = (centre / CELL).long().clamp(0, BOARD - 1).unbind(-1)
    return _render(rng, split, clutter, filled, classes, y * BOARD + x, colours, centre, height)


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Random numbers, float32."""
    return torch.from_numpy(rng.uniform(low, high, shape)).float()


def _render(
    rng: np.random.Generator,
    split: str,
    clutter: float,
    filled: Tensor,
    classes: Tensor,
    cells: Tensor,
    colours: Tensor,
    centre: Tensor,
    height: Tensor,
) -> Drawn:
    """Paint scenes; all but ``centre`` [n, s, 2] and ``height`` [n, s], in pixels, as in `Drawn`, -1 not yet set."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return _uniform(rng, low, high, *shape)

    n = len(filled)
    ink, label = digits.glyphs(split)
    start = ((centre - height[:, :, None] / 2 - 1) / PATCH).floor().clamp(0, (SIDE - WINDOW) // PATCH).long() * PATCH
    local = centre - start

    scene, slot = filled.nonzero().T  # k items in all
    k = len(scene)
    is_digit = colours[scene, slot] >= 0
    angle, slant, threshold, bend = uniform(-0.1, 0.1, k), uniform(-0.1, 0.1, k), uniform(0.35, 0.55, k), None
    if split == "train":  # few hands are known: vary them more than the test does
        angle, slant, bend = 1.5 * angle, 2.5 * slant, uniform(-0.15, 0.15, k, 4)
        threshold = uniform(0.3, 0.6, k)
    alpha, paint = torch.empty(k, WINDOW, WINDOW), torch.empty(k, 3, WINDOW, WINDOW)

    a, b = is_digit.nonzero()[:, 0], (~is_digit).nonzero()[:, 0]
    among, first = label.argsort(stable=True), torch.bincount(label, minlength=10)
    value = classes[scene[a], slot[a]]
    which = among[(first.cumsum(0) - first)[value] + (uniform(0, 1, len(a)) * first[value]).long()]
    alpha[a] = digits.draw_glyphs(
        ink[which], local[scene[a], slot[a]], height[scene[a], slot[a]], (WINDOW, WINDOW), angle[a], slant[a],
        threshold[a], None if bend is None else bend[a],
    )  # fmt: skip
    hue = torch.tensor(list(COLOURS.values()))[colours[scene[a], slot[a]]]
    hue = ((hue + uniform(-0.06, 0.06, len(a), 3)) * uniform(0.85, 1.0, len(a), 1)).clamp(0, 1)
    paint[a] = hue[:, :, None, None]

    bank, _ = thumbnails(split)
    each = len(bank) // len(PHOTOS)
    shown = (classes[scene[b], slot[b]] - len(DIGITS)) * each + torch.from_numpy(rng.integers(each, size=len(b)))
    mirror = torch.from_numpy(np.where(rng.random(len(b)) < 0.5, -1.0, 1.0)).float()
    alpha[b], paint[b] = _photograph(bank[shown], local[scene[b], slot[b]], height[scene[b], slot[b]], angle[b], mirror)
    paint[b] = (paint[b] * uniform(0.8, 1.15, len(b), 1)[:, :, None, None]).clamp(0, 1)

    # paint all items of a scene at once: they do not overlap
    step = torch.arange(WINDOW)
    corner = start[scene, slot]  # k 2
    pixel = (corner[:, 0, None, None] + step[:, None]) * SIDE + corner[:, 1, None, None] + step  # k 32 32
    layers = torch.cat([paint * alpha[:, None], alpha[:, None]], 1).permute(1, 0, 2, 3).flatten(1)  # 4 k*32*32
    target = (scene[:, None] * SIDE**2 + pixel.flatten(1)).flatten()
    canvas = torch.zeros(4, n * SIDE**2).index_add_(1, target, layers).view(4, n, SIDE, SIDE)
    background = torch.from_numpy(rng.integers(len(BACKGROUNDS), size=n))
    pixels = backgrounds(rng, background, split) * clutter
    pixels = pixels * (1 - canvas[3].clamp(0, 1)[:, None]) + canvas[:3].transpose(0, 1)

    share = digits.covered_patches(alpha, PATCH).flatten(1)  # k 16
    patch = torch.arange(WINDOW // PATCH)
    held = (corner[:, 0, None, None] // PATCH + patch[:, None]) * GRID + corner[:, 1, None, None] // PATCH + patch
    patches = torch.zeros(n, filled.shape[1], GRID**2, dtype=torch.bool)
    patches[scene[:, None], slot[:, None], held.flatten(1)] = share
    return Drawn(
        (pixels * 255).round().clamp(0, 255).to(torch.uint8),
        torch.where(filled, classes, -1),
        torch.where(filled, cells, -1),
        torch.where(filled, colours, -1),
        patches,
        background,
    )


def _photograph(
    thumbnail: Tensor, centre: Tensor, height: Tensor, angle: Tensor, mirror: Tensor
) -> tuple[Tensor, Tensor]:
    """Small photographs with rounded corners in their windows: coverage [k, 32, 32] and pixels [k, 3, 32, 32]."""
    y, x = ((torch.arange(WINDOW) + 0.5 - centre[:, i, None]) / (height[:, None] / 2) for i in range(2))
    y, x = y[:, :, None], x[:, None, :]  # k h 1, k 1 w, -1..1 inside
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    v, u = cos * y - sin * x, (sin * y + cos * x)
    edge = (u.abs() ** 4 + v.abs() ** 4) ** 0.25
    alpha = ((1 - edge) * height[:, None, None] / 2 + 0.5).clamp(0, 1)
    grid = torch.stack([u * mirror[:, None, None], v], -1)
    return alpha, F.grid_sample(thumbnail, grid, padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class Asked:
    """Questions about scenes, in the order of the rows that were asked about.

    Attributes:
        questions: words with single spaces between them.
        answers: likewise; one word each but for reading.
        truth: bool [n, 144], the patches that must be seen.
        local: bool [n], False where no particular patches decide (the background, a class that is not there); the
            truth is then empty.
    """

    questions: list[str]
    answers: list[str]
    truth: Tensor
    local: Tensor


def _pick(rng: np.random.Generator, allowed: Tensor) -> Tensor:
    """A random true column of every row of bool [n, m], int64 [n]; 0 where there is none."""
    return (torch.from_numpy(rng.random(tuple(allowed.shape))) * allowed).argmax(1)


def ask(rng: np.random.Generator, drawn: Drawn, kind: str, rows: Tensor | None = None) -> Asked:
    """Ask one question of a kind about each of some scenes.

    Args:
        rng: source of chance.
        drawn: the scenes.
        kind: one of `KINDS`.
        rows: int64 [n], the scenes asked about, one may come several times; default each once.

    Returns:
        The questions.

    Raises:
        ValueError: Unknown kind; reading where no row has two digits.
    """
    check.choice("kind", kind, KINDS)
    rows = torch.arange(len(drawn)) if rows is None else rows
    each = torch.arange(len(rows))
    classes, cells, patches = drawn.classes[rows], drawn.cells[rows], drawn.patches[rows]
    filled = classes >= 0
    is_digit = filled & (torch.arange(filled.shape[1]) < MOST_DIGITS)
    truth, local = torch.zeros(len(rows), GRID**2, dtype=torch.bool), torch.ones(len(rows), dtype=torch.bool)

    def names(of: Sequence[str], index: Tensor) -> list[str]:
        return [of[i] for i in index.tolist()]

    if kind == "presence":
        there = torch.zeros(len(rows), len(CLASSES) + 1, dtype=torch.bool)
        there = there.scatter_(1, classes.where(filled, len(CLASSES)), True)[:, :-1]
        # digits and photographs alike, whether the answer is yes or no: the question alone must not tell
        group = (torch.arange(len(CLASSES)) < len(DIGITS)) == torch.from_numpy(rng.random((len(rows), 1)) < 0.5)
        local = torch.from_numpy(rng.random(len(rows)) < 0.5)
        asked = _pick(rng, (there == local[:, None]) & group)
        slot = (classes == asked[:, None]).int().argmax(1)
        truth = patches[each, slot] & local[:, None]
        questions, answers = names(CLASSES, asked), ["yes" if yes else "no" for yes in local.tolist()]
        return Asked([f"is there a {word}" for word in questions], answers, truth, local)
    if kind in ("place", "where", "colour"):
        slot = _pick(rng, is_digit if kind == "colour" else filled)
        what, where = names(CLASSES, classes[each, slot]), names(PLACES, cells[each, slot])
        truth = patches[each, slot]
        if kind == "place":
            return Asked([f"what is at {place}" for place in where], what, truth, local)
        if kind == "where":
            return Asked([f"where is the {word}" for word in what], where, truth, local)
        colour = names(tuple(COLOURS), drawn.colours[rows][each, slot])
        return Asked([f"what colour is the {word}" for word in what], colour, truth, local)
    if kind == "count":
        digit = torch.from_numpy(rng.random(len(rows)) < 0.5)
        counted = torch.where(digit[:, None], is_digit, filled & ~is_digit)
        questions = [f"how many {'digits' if one else 'photos'}" for one in digit.tolist()]
        return Asked(questions, names(DIGITS, counted.sum(1)), (patches & counted[:, :, None]).any(1), local)
    if kind == "largest":
        value = classes.where(is_digit, -1).amax(1)
        truth = (patches & is_digit[:, :, None]).any(1)
        return Asked(["which digit is largest"] * len(rows), names(DIGITS, value), truth, local)
    if kind == "read":
        readable = drawn.rows[rows]
        if not readable.any(1).all():
            raise ValueError(
                f"no row with two digits in {(~readable.any(1)).sum()} of {len(rows)} scenes; allowed: scenes drawn "
                "with row=True, see Drawn.rows"
            )
        row = _pick(rng, readable)
        of_row = is_digit & (cells // BOARD == row[:, None])
        order = cells.where(of_row, BOARD**2).argsort(1)
        values, counts = classes.gather(1, order).tolist(), of_row.sum(1).tolist()
        answers = [" ".join(DIGITS[v] for v in line[:count]) for line, count in zip(values, counts, strict=True)]
        truth = (patches & of_row[:, :, None]).any(1)
        return Asked([f"read row {line + 1}" for line in row.tolist()], answers, truth, local)
    answers = names(BACKGROUNDS, drawn.background[rows])
    return Asked(["what is the background"] * len(rows), answers, truth, torch.zeros_like(local))


def captions(drawn: Drawn) -> list[str]:
    """What is in every scene, place by place, such as "a red 7 at b1 and a cat at d3 on grass".

    Args:
        drawn: the scenes.

    Returns:
        One caption a scene.
    """
    colours = tuple(COLOURS)
    order = drawn.cells.where(drawn.cells >= 0, BOARD**2).argsort(1)
    items = torch.stack([drawn.classes, drawn.cells, drawn.colours], -1).gather(1, order[:, :, None].expand(-1, -1, 3))
    lines = []
    for scene, ground in zip(items.tolist(), drawn.background.tolist(), strict=True):
        words = [
            f"a {colours[colour] + ' ' if colour >= 0 else ''}{CLASSES[what]} at {PLACES[where]}"
            for what, where, colour in scene
            if what >= 0
        ]
        lines.append(f"{' and '.join(words)} on {BACKGROUNDS[ground]}")
    return lines


@dataclass(frozen=True)
class Scenes:
    """A sample, one question a scene.

    Attributes:
        pixels: uint8 [n, 3, 96, 96].
        questions: to follow the image, such as "what is at b3".
        answers: such as "cat".
        kinds: of `KINDS`.
        truth: bool [n, 144], the patches that must be seen, in reading order.
        local: bool [n], False where no particular patches decide; see `Asked`.
        captions: what is in each scene.
        drawn: the scenes, to ask more about them.
    """

    pixels: Tensor
    questions: list[str]
    answers: list[str]
    kinds: list[str]
    truth: Tensor
    local: Tensor
    captions: list[str]
    drawn: Drawn

    def __len__(self) -> int:
        return len(self.pixels)


def ask_each(rng: np.random.Generator, drawn: Drawn, kinds: Sequence[str], rows: Tensor | None = None) -> Asked:
    """Ask questions of several kinds, such as several about one scene: ``rows=torch.arange(len(drawn)).repeat(k)``.

    Args:
        rng: source of chance.
        drawn: the scenes.
        kinds: of every question.
        rows: int64, the scene of every question; default one question each.

    Returns:
        The questions.

    Raises:
        ValueError: Unknown kind; not one kind a question; reading where no row has two digits.
    """
    rows = torch.arange(len(drawn)) if rows is None else rows
    if len(kinds) != len(rows):
        raise ValueError(f"{len(kinds)} kinds for {len(rows)} questions; allowed: one each")
    questions, answers = [""] * len(rows), [""] * len(rows)
    truth = torch.zeros(len(rows), GRID**2, dtype=torch.bool)
    local = torch.zeros(len(rows), dtype=torch.bool)
    of = np.array(kinds)
    for kind in dict.fromkeys(kinds):
        where = np.flatnonzero(of == kind)
        asked = ask(rng, drawn, kind, rows[torch.from_numpy(where)])
        truth[where], local[where] = asked.truth, asked.local
        for i, question, answer in zip(where, asked.questions, asked.answers, strict=True):
            questions[i], answers[i] = question, answer
    return Asked(questions, answers, truth, local)


def sample(n: int, seed: int = 0, split: str = "test", kinds: Sequence[str] = KINDS) -> Scenes:
    """Draw scenes with one question each, the kinds in turn.

    Args:
        n: number of scenes.
        seed: decides everything.
        split: "train" or "test".
        kinds: of `KINDS`; question i is of kind ``kinds[i % len(kinds)]``.

    Returns:
        The sample.

    Raises:
        ValueError: Unknown split or kind, no kind, ``n`` below 1.
    """
    check.whole("n", n), check.choice("split", split, digits.SPLITS)
    if not kinds or isinstance(kinds, str):
        raise ValueError(f"kinds={kinds!r}; allowed: a sequence of {', '.join(KINDS)}")
    for kind in kinds:
        check.choice("kind", kind, KINDS)
    rng = np.random.default_rng([seed, digits.SPLITS.index(split)])
    of = [kinds[i % len(kinds)] for i in range(n)]
    row = torch.from_numpy(rng.random(n) < 0.5) | torch.tensor([kind == "read" for kind in of])
    drawn = draw(rng, n, split, row)
    asked = ask_each(rng, drawn, of)
    return Scenes(drawn.pixels, asked.questions, asked.answers, of, asked.truth, asked.local, captions(drawn), drawn)


@torch.inference_mode()
def replies(model: Any, processor: Any, drawn: Scenes, batch: int = 32, most: int = 5) -> list[str]:
    """What a model says, greedily.

    Args:
        model: an image-text-to-text model of transformers, such as ``kr.load("llava-digits").model``.
        processor: of the model.
        drawn: the sample.
        batch: questions a call.
        most: tokens of a reply.

    Returns:
        One reply a question, without surrounding spaces; right where it equals ``drawn.answers``.
    """
    from PIL import Image

    check.whole("batch", batch), check.whole("most", most)
    device, said = next(model.parameters()).device, []
    for start in range(0, len(drawn), batch):
        part = slice(start, start + batch)
        images = [Image.fromarray(pixels) for pixels in drawn.pixels[part].permute(0, 2, 3, 1).numpy()]
        text = [f"<image> {question}" for question in drawn.questions[part]]
        fed = processor(images=images, text=text, padding=True, return_tensors="pt").to(device)
        out = model.generate(**fed, max_new_tokens=most, do_sample=False)[:, fed["input_ids"].shape[1] :]
        said += [line.strip() for line in processor.batch_decode(out, skip_special_tokens=True)]
    return said
