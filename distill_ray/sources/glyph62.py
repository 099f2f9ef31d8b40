"""glyph62: 62 characters (0-9, A-Z, a-z) drawn from vector fonts, 1x32x32 uint8. Synthetic, for smoke and speed.

The strokes are Hershey's, from the MIT package Hershey-Fonts. Each row is drawn with a seeded affine map, stroke width
and jitter. Glyphs are not size-normalised: size alone tells c from C.

Splits are by style. The package names 18 Latin styles, but several share outlines (``rowmans`` draws exactly what
``futural`` draws, all gothic styles share their digits), so styles that share an outline stay in one split together:
no outline of the test split is ever seen in training. What a font cannot tell apart stays so (I and l in ``futural``,
I and J in ``gothgrt``): accuracy on it cannot reach 1.
"""

from __future__ import annotations

import string
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from HersheyFonts import HersheyFonts
from PIL import Image, ImageDraw

from distill_ray.config import Glyph62Data
from distill_ray.errors import UserError
from distill_ray.sources.base import SPLITS, Examples, Indices, SourceInfo

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
STYLES = (
    "cursive", "futural", "futuram", "gothgbt", "gothgrt", "gothiceng", "gothicger", "gothicita", "gothitt",
    "rowmand", "rowmans", "rowmant", "scriptc", "scripts", "timesi", "timesib", "timesr", "timesrb",
)  # fmt: skip
SIDE = 32
_SUPERSAMPLE = 4  # drawn large, then reduced: pillow's lines are not antialiased
_FRACTIONS = (0.8, 0.1, 0.1)
_RENDERER_VERSION = 1

Stroke = npt.NDArray[np.float64]  # [points, 2]


@lru_cache(maxsize=1)
def outlines() -> dict[tuple[str, str], tuple[Stroke, ...]]:
    """(style, character) -> strokes in font units, x centred on the glyph, y downwards."""
    fonts = HersheyFonts()
    found: dict[tuple[str, str], tuple[Stroke, ...]] = {}
    for style in STYLES:
        fonts.load_default_font(style)
        for character in CHARACTERS:
            strokes = [np.asarray(stroke, dtype=np.float64) for stroke in fonts.strokes_for_text(character)]
            points = np.concatenate(strokes)
            centre = (points[:, 0].min() + points[:, 0].max()) / 2
            found[style, character] = tuple(stroke - (centre, 0.0) for stroke in strokes)
    return found


@lru_cache(maxsize=1)
def style_groups() -> tuple[tuple[str, ...], ...]:
    """The styles in groups, such that no outline occurs in two groups."""
    owner: dict[tuple[bytes, ...], str] = {}
    parent = {style: style for style in STYLES}

    def root(style: str) -> str:
        while parent[style] != style:
            style = parent[style]
        return style

    for (style, _), strokes in outlines().items():
        key = tuple(stroke.tobytes() for stroke in strokes)
        parent[root(style)] = root(owner.setdefault(key, style))
    groups: dict[str, list[str]] = {}
    for style in STYLES:
        groups.setdefault(root(style), []).append(style)
    return tuple(tuple(group) for group in groups.values())


def split_styles(fractions: tuple[float, ...], seed: int) -> dict[str, tuple[str, ...]]:
    """Assign whole groups of styles to splits: test and validation up to their share, the rest to train."""
    groups = [style_groups()[i] for i in np.random.default_rng((seed, 0)).permutation(len(style_groups()))]
    splits: dict[str, tuple[str, ...]] = {}
    rooms = {name: max(1, round(f * len(STYLES))) if f > 0 else 0 for name, f in zip(SPLITS, fractions, strict=True)}
    # The smaller share first: it fits fewer groups, and the other must not take the last of them.
    for name in sorted((SPLITS[2], SPLITS[1]), key=lambda name: rooms[name]):
        room = rooms[name]
        taken: list[str] = []
        for group in list(groups):
            if len(taken) + len(group) <= room:
                taken.extend(group)
                groups.remove(group)
        splits[name] = tuple(sorted(taken))
    return {SPLITS[0]: tuple(sorted(style for group in groups for style in group)), **splits}


def render(strokes: tuple[Stroke, ...], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Draw one glyph [32, 32], ink high, with a random affine map, stroke width, jitter and noise."""
    angle = rng.normal(0, 0.10)
    shear = rng.normal(0, 0.15)
    scale_x, scale_y = rng.uniform(0.75, 1.0, size=2)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    affine = rotation @ np.array([[scale_x, shear], [0.0, scale_y]])
    shift = rng.uniform(-1.5, 1.5, size=2)
    # Font units: capitals reach from -12 to 9, descenders to about 16; all fonts share this frame.
    units_to_pixels = SIDE / 36
    large = SIDE * _SUPERSAMPLE
    canvas = Image.new("L", (large, large), 0)
    pen = ImageDraw.Draw(canvas)
    width = max(1, round(rng.uniform(1.0, 2.2) * _SUPERSAMPLE))
    for stroke in strokes:
        points = stroke + rng.normal(0, 0.25, size=stroke.shape)
        pixels = ((points - (0.0, 1.5)) @ affine.T * units_to_pixels + SIDE / 2 + shift) * _SUPERSAMPLE
        pen.line([(float(x), float(y)) for x, y in pixels], fill=255, width=width, joint="curve")
    small = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    noisy = small * rng.uniform(0.7, 1.0) + rng.normal(0, 8.0, size=small.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


class Glyph62Source:
    """Row ``i`` shows character ``i % 62``; its style and its drawing depend on (seed, i) alone."""

    def __init__(self, config: Glyph62Data) -> None:
        self._config = config
        fractions = config.split.fractions or _FRACTIONS
        if len(fractions) != len(SPLITS):
            raise UserError(
                "data.split.fractions: glyph62 has no test files of its own, so it needs three fractions "
                f"(train, validation, test), got {list(fractions)}"
            )
        self._styles = split_styles(fractions, config.seed)
        self._fractions = fractions
        if not self._styles["train"]:
            raise UserError(f"data.split.fractions: {list(fractions)} leave no style for training")

    def fingerprint(self) -> dict[str, Any]:
        """The renderer's version: there are no files."""
        return {"renderer": _RENDERER_VERSION}

    def info(self) -> SourceInfo:
        """Row counts follow the fractions exactly; the styles approximate them."""
        bounds = self._bounds()
        splits = {
            name: np.arange(bounds[i], bounds[i + 1], dtype=np.int64)
            for i, name in enumerate(SPLITS)
            if bounds[i + 1] > bounds[i]
        }
        for name in splits:
            if not self._styles[name]:
                raise UserError(
                    f"data.split.fractions: the share of {name} is too small for one of {len(STYLES)} styles"
                )
        labels = np.arange(self._config.rows, dtype=np.int64) % len(CHARACTERS)
        return SourceInfo((1, SIDE, SIDE), "uint8", tuple(CHARACTERS), True, splits, labels=labels)

    def _bounds(self) -> npt.NDArray[np.int64]:
        """First row of each split, and the number of rows: splits are consecutive ranges of row numbers."""
        bounds: npt.NDArray[np.int64] = np.rint(np.cumsum((0.0, *self._fractions)) * self._config.rows).astype(np.int64)
        return bounds

    def read(self, indices: Indices) -> Examples:
        """Draw the rows. ``source_ids`` are ``style/character/row``."""
        splits = np.searchsorted(self._bounds()[1:], indices, side="right")
        drawn = [self._draw(int(row), self._styles[SPLITS[i]]) for row, i in zip(indices, splits, strict=True)]
        inputs = np.stack([image for image, _ in drawn])[:, np.newaxis]
        return Examples(inputs, (indices % len(CHARACTERS)).astype(np.int64), [name for _, name in drawn])

    def _draw(self, row: int, styles: tuple[str, ...]) -> tuple[npt.NDArray[np.uint8], str]:
        rng = np.random.default_rng((self._config.seed, 2, row))
        style = styles[rng.integers(len(styles))]
        character = CHARACTERS[row % len(CHARACTERS)]
        return render(outlines()[style, character], rng), f"{style}/{character}/{row}"
