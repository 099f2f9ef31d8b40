"""Learning curves as inline SVG for report.html, drawn by matplotlib; what a search shows is in ``search_charts``.

matplotlib is imported only where something is drawn: a report whose curves are unchanged keeps the drawings it has, and
a reused run does not wait for the import. Text and axes take the page's own colour, so that one drawing is readable on
a light and on a dark page.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"  # stands for the page's text colour until the drawing is done
_SIZE_INCHES = (4.6, 3.0)
_MARKED_EPOCHS = 30  # with more epochs than this, a mark on each would hide the line


@dataclass(frozen=True)
class Line:
    """How the curves of a role look; the dashes tell them apart where colours do not."""

    color: str
    matplotlib: str
    css: str


# Mid-tones with a contrast above 3:1 on white and on near-black.
LINES = {
    "teacher": Line("#7d8590", ":", "dotted"),
    "student": Line("#2f7ed8", "-", "solid"),
    "control": Line("#c8701a", "--", "dashed"),
}


@dataclass(frozen=True)
class Curve:
    """One model's epochs, as its metrics.jsonl has them."""

    role: str
    distilled: bool
    history: Sequence[dict[str, float]]


@dataclass(frozen=True)
class Chart:
    """A drawing and its caption."""

    title: str
    svg: str


@dataclass(frozen=True)
class _Kind:
    title: str
    key: str
    distilled_only: bool = False


_KINDS = (
    _Kind("Accuracy on the validation split", "validation_accuracy"),
    _Kind("Cross-entropy with the hard labels, training split, nats", "train_ce"),
    _Kind("Distillation term T² KL(teacher ‖ student), training split, nats", "train_kd", distilled_only=True),
)


def digest(curves: Sequence[Curve]) -> str:
    """Equal digests, equal drawings: it covers the curves and this file."""
    content = json.dumps([asdict(curve) for curve in curves], sort_keys=True).encode()
    return hashlib.sha256(content + Path(__file__).read_bytes()).hexdigest()[:16]


def draw(curves: Sequence[Curve]) -> list[Chart]:
    """A chart for every quantity that at least one of the curves has."""
    charts = []
    for kind in _KINDS:
        shown = [curve for curve in curves if curve.distilled or not kind.distilled_only]
        if any(_points(curve, kind.key)[0] for curve in shown):
            charts.append(Chart(kind.title, _svg(kind, shown)))
    return charts


def _svg(kind: _Kind, curves: Sequence[Curve]) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Text stays text (small, selectable); the salt keeps ids equal from run to run and different from chart to chart.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": kind.key, "font.size": 9}):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for curve in curves:
            _plot(axes, curve, kind.key)
        _dress(axes)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True)
    return inline(target.getvalue(), kind.title)


def _plot(axes: Axes, curve: Curve, key: str) -> None:
    epochs, values = _points(curve, key)
    line = LINES[curve.role]
    mark = "o" if len(epochs) <= _MARKED_EPOCHS else ""
    axes.plot(epochs, values, color=line.color, linestyle=line.matplotlib, marker=mark, markersize=3, linewidth=1.5)


def _points(curve: Curve, key: str) -> tuple[list[float], list[float]]:
    """Epochs that have a finite value: a split without labels has none."""
    found = [(row["epoch"], row[key]) for row in curve.history if math.isfinite(row.get(key, math.nan))]
    return [epoch for epoch, _ in found], [value for _, value in found]


def _dress(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    dress(axes)


def dress(axes: Axes) -> None:
    """Labels, ticks and spines in the colour that ``inline`` makes the page's own; a faint grid."""
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.tick_params(colors=INK)
    axes.grid(color=INK, alpha=0.15, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)


def inline(svg: str, title: str) -> str:
    """The ``<svg>`` element alone, named for screen readers, in the page's text colour."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r"<!--.*?-->", "", element, flags=re.DOTALL)
    element = re.sub(r' (width|height)="[\d.]+pt"', "", element, count=2)  # the page decides, the view box scales
    element = re.sub(r'<g id="[^"]*"', "<g", element)  # group names repeat from chart to chart; nothing refers to them
    named = element.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    return named.replace(INK, "currentColor").strip()
