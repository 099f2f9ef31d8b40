"""What a search shows, drawn by matplotlib: accuracy against parameters, against latency, and against temperature.

Each drawing comes three times: as a file of its own on white (SVG, and PNG for READMEs), and as an element for a page,
in the page's text colour. Marks and dashes tell the series apart where colours do not.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from distill_ray.stages import charts
from distill_ray.stages.charts import INK, LINES
from distill_ray.stages.search_results import TrialRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEMPERATURE = "loss.temperature"

_SIZE_INCHES = (6.4, 4.6)
_PNG_DPI = 150
_FAINT = 0.35  # opacity of a single trial: hundreds of them stay behind what they add up to
_FRONT = charts.Line("#2f9a62", "-.", "dashed")
_APART_POINTS = 5.0  # a finalist and its control have the same network: side by side, their bars can both be read
_NAME_WIDTH = 0.06  # of a finalist's name, as a share of the axis
_NAMED_TEMPERATURES = 10  # more distinct values than this are gathered at the nearest power of 2


@dataclass(frozen=True)
class Drawing:
    """One drawing: ``name`` is that of its files without the ending, ``inline`` the ``<svg>`` element for a page."""

    name: str
    title: str
    svg: str
    png: bytes
    inline: str


@dataclass(frozen=True)
class _Cost:
    """What accuracy is shown against."""

    name: str
    key: str
    title: str
    label: str
    tick: Callable[[float], str]


@dataclass(frozen=True)
class _Look:
    """How the trials of one size look."""

    color: str
    mark: str
    dashes: Any


def _si(value: float) -> str:
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g} {letter}"
    return f"{value:g}"


_COSTS = (
    _Cost("front", "parameters", "Accuracy against parameters", "parameters", _si),
    _Cost(
        "latency", "latency_ms", "Accuracy against latency",
        "latency, ms (1 row, fp32, 1 thread, measured alone)", lambda value: f"{value:g}",
    ),
)  # fmt: skip
# Mid-tones with a contrast above 3:1 on white and on near-black; more sizes than these are shown as single trials.
_LOOKS = (
    _Look("#2f7ed8", "o", "-"),
    _Look("#c8701a", "s", "--"),
    _Look("#2f9a62", "^", "-."),
    _Look("#a65ec0", "D", ":"),
    _Look("#c9506b", "v", (0, (7, 1.5, 1.5, 1.5, 1.5, 1.5))),
    _Look("#7d8590", "P", (0, (1, 1))),
)


def draw(rows: Sequence[TrialRow], pareto: Mapping[str, Any]) -> list[Drawing]:
    """The fronts over parameters and latency, and accuracy over temperature where the search tried several.

    Args:
        rows: the trials of the search, without those of the controls.
        pareto: the content of ``pareto.json``.
    """
    drawings = [_drawing(cost.name, cost.title, _front_painter(cost, rows, pareto)) for cost in _COSTS]
    done = [row for row in rows if _temperature(row) is not None]
    if len({_temperature(row) for row in done}) >= 2:
        drawings.append(
            _drawing("temperature", "Accuracy against temperature", lambda axes: _paint_temperature(axes, done))
        )
    return drawings


def _drawing(name: str, title: str, paint: Callable[[Axes], None]) -> Drawing:
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text; the salt keeps ids equal from search to search and different from drawing to drawing.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"search-{name}", "font.size": 9}):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        charts.dress(axes)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # once for all three
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=_PNG_DPI, facecolor="white")
        svg = _svg(figure, facecolor="white")
        inline = charts.inline(_svg(figure, transparent=True), title)
    return Drawing(name, title, svg, png.getvalue(), inline)


def _svg(figure: Figure, **options: Any) -> str:
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None}, **options)  # a date would make each search another
    return target.getvalue()


# --- the fronts -------------------------------------------------------------------------------------------------------


def _front_painter(cost: _Cost, rows: Sequence[TrialRow], pareto: Mapping[str, Any]) -> Callable[[Axes], None]:
    if cost.key == "parameters":
        trials = [(row.parameters, row.validation_accuracy) for row in rows if row.status == "completed"]
        front = [(point["parameters"], point["validation_accuracy"]) for point in pareto["front"]]
    else:
        trials = [(point["latency_ms"], point["validation_accuracy"]) for point in pareto["latency"]]
        front = [(p["latency_ms"], p["validation_accuracy"]) for p in pareto["latency"] if p["on_front"]]
    finalists = [point for point in pareto["front"] if point["finalist"] and _measured([(point.get(cost.key), 0.0)])]
    return lambda axes: _paint_front(axes, cost, _measured(trials), sorted(_measured(front)), finalists, pareto)


def _measured(points: Iterable[tuple[Any, Any]]) -> list[tuple[float, float]]:
    """Points of which both values are there; a cost of 0 has no place on a logarithmic axis."""
    return [(float(x), float(y)) for x, y in points if x and y is not None and math.isfinite(y)]


def _paint_front(
    axes: Axes,
    cost: _Cost,
    trials: Sequence[tuple[float, float]],
    front: Sequence[tuple[float, float]],
    finalists: Sequence[Mapping[str, Any]],
    pareto: Mapping[str, Any],
) -> None:
    measures = {measure_of(point) for point in finalists}
    axes.set_xlabel(cost.label)
    axes.set_ylabel("accuracy, share of rows" if measures <= {"accuracy"} else "accuracy or agreement, share of rows")
    costs = [x for x, _ in (*trials, *front)] + [float(point[cost.key]) for point in finalists]
    if not costs:
        _say_nothing(axes, "no completed trial to show")
        return
    _log_axis(axes, min(costs), max(costs), cost.tick)
    if measures != {"agreement"}:  # with itself the teacher always agrees
        _paint_teacher(axes, cost, pareto.get("teacher"))
    for measure in sorted(measures):
        shown = [point for point in finalists if measure_of(point) == measure]
        _paint_finalists(axes, cost, shown, measure)
    axes.plot(
        *_columns(front), color=_FRONT.color, linestyle=_FRONT.matplotlib, drawstyle="steps-post", marker=".",
        linewidth=1.2, zorder=1, label="front: best validation accuracy for the budget",
    )  # fmt: skip
    axes.plot(
        *_columns(trials), "o", color=INK, alpha=_FAINT, markersize=3.5, markeredgewidth=0, zorder=2,
        label="a trial's validation accuracy",
    )  # fmt: skip
    _legend(axes, columns=1)


def measure_of(point: Mapping[str, Any]) -> str:
    """``accuracy``, or ``agreement`` with the teacher for a finalist whose test split has no labels."""
    return "accuracy" if point.get("test_accuracy") is not None else "agreement"


def _paint_teacher(axes: Axes, cost: _Cost, teacher: Mapping[str, Any] | None) -> None:
    if teacher is None or teacher.get("test_accuracy") is None:
        return
    told = [f"{teacher['test_accuracy']:.4f}"]
    if teacher.get("parameters") is not None:
        told.append(f"{teacher['parameters']:,} parameters")
    if cost.key == "latency_ms" and teacher.get("latency_ms") is not None:
        told.append(f"{teacher['latency_ms']:.3g} ms")
    line = LINES["teacher"]
    label = f"teacher, test: {', '.join(told)}"
    axes.axhline(teacher["test_accuracy"], color=line.color, linestyle=line.matplotlib, linewidth=1.6, label=label)


def _paint_finalists(axes: Axes, cost: _Cost, finalists: Sequence[Mapping[str, Any]], measure: str) -> None:
    what = "accuracy" if measure == "accuracy" else "agreement with the teacher"
    key = f"test_{measure}"
    ours = [(float(p[cost.key]), p[key]) for p in finalists if p.get(key) is not None]
    theirs = [(float(p[cost.key]), p["control"]) for p in finalists if p.get("control") is not None]
    _paint_means(axes, ours, "student", "D", -_APART_POINTS, f"finalists (#trial), test {what}, {_spread(ours)}")
    _paint_means(axes, theirs, "control", "s", _APART_POINTS, f"their CE-only controls, test {what}, {_spread(theirs)}")
    _name_finalists(axes, [(float(p[cost.key]), p) for p in finalists if p.get(key) is not None], key)


def _name_finalists(axes: Axes, finalists: Sequence[tuple[float, Mapping[str, Any]]], key: str) -> None:
    """``#trial`` above all marks of a finalist, a line higher where the name of the one before it is close."""
    low, high = axes.get_xlim()
    before, level = 0.0, 0
    for x, point in sorted(finalists, key=lambda pair: pair[0]):
        close = before > 0 and math.log(x / before) < _NAME_WIDTH * math.log(high / low)
        level = (level + 1) % 3 if close else 0
        tops = [_top(entry) for entry in (point[key], point.get("control")) if entry is not None]
        axes.annotate(
            f"#{point['trial']}", (x, max([*tops, point["validation_accuracy"]])), xytext=(0, 4 + 9 * level),
            textcoords="offset points", ha="center", va="bottom", color=INK, fontsize=8,
        )  # fmt: skip
        before = x


def _top(entry: Mapping[str, Any]) -> float:
    return float(entry["mean"] + (entry["std"] or 0.0))


def _spread(means: Sequence[tuple[float, Mapping[str, Any]]]) -> str:
    seeds = max((len(entry["values"]) for _, entry in means), default=0)
    return f"mean ± sd of {seeds} seeds" if seeds > 1 else "1 seed"


def _paint_means(
    axes: Axes, means: Sequence[tuple[float, Mapping[str, Any]]], role: str, mark: str, shift: float, label: str
) -> None:
    from matplotlib.transforms import ScaledTranslation

    figure = axes.get_figure()
    if not means or figure is None:
        return
    shifted = axes.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
    bars = [entry["std"] or 0.0 for _, entry in means]
    axes.errorbar(
        [x for x, _ in means], [entry["mean"] for _, entry in means], bars if any(bars) else None,
        color=LINES[role].color, marker=mark, markersize=4.5, linestyle="none", capsize=3, elinewidth=1.4,
        transform=shifted, zorder=3, label=label,
    )  # fmt: skip
    # Its bars are autoscaled in shifted coordinates, which the limits of the data do not cover.
    axes.update_datalim([(x, y) for x, e in means for y in (e["mean"] - (e["std"] or 0.0), _top(e))])
    axes.autoscale_view(scalex=False)


# --- temperature ------------------------------------------------------------------------------------------------------


def _temperature(row: TrialRow) -> float | None:
    """The temperature of a completed trial that has one: with the hard labels alone it does nothing."""
    value = row.values.get(TEMPERATURE)
    if row.status != "completed" or row.validation_accuracy is None or row.values.get("loss.name") == "ce":
        return None
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _paint_temperature(axes: Axes, done: Sequence[TrialRow]) -> None:
    points: dict[int, list[tuple[float, float]]] = {}
    for row in done:
        points.setdefault(row.parameters or 0, []).extend(_measured([(_temperature(row), row.validation_accuracy)]))
    sampled = sorted({x for found in points.values() for x, _ in found})
    gathered = len(sampled) > _NAMED_TEMPERATURES
    lined = _evenly([size for size in sorted(points) if len({x for x, _ in points[size]}) >= 2], len(_LOOKS))
    for size, look in zip(lined, _LOOKS, strict=False):
        _paint_size(axes, points[size], look, f"{size:,} parameters" if size else "unknown size", gathered)
    others = [point for size, found in points.items() if size not in lined for point in found]
    if others:
        label = "trials of other sizes" if lined else "a trial"
        axes.plot(*_columns(others), "x", color=INK, alpha=_FAINT, markersize=4, zorder=1, label=label)
    axes.set_xlabel(f"{TEMPERATURE}, T of softmax(logits / T)")
    axes.set_ylabel("validation accuracy, share of rows")
    _temperature_axis(axes, sampled)
    at = ", at the nearest power of 2" if gathered else ""
    _legend(axes, columns=2, title=f"a line: median of the trials of one size{at}; faint: one trial" if lined else None)


def _paint_size(axes: Axes, points: Sequence[tuple[float, float]], look: _Look, label: str, gathered: bool) -> None:
    placed = [(2.0 ** round(math.log2(x)) if gathered else x, y) for x, y in points]
    medians = [(x, median(y for other, y in placed if other == x)) for x in sorted({x for x, _ in placed})]
    axes.plot(
        *_columns(points), look.mark, color=look.color, alpha=_FAINT, markersize=4, markeredgewidth=0, zorder=1
    )  # fmt: skip
    axes.plot(
        *_columns(medians), color=look.color, marker=look.mark, linestyle=look.dashes, markersize=5, linewidth=1.6,
        label=label,
    )  # fmt: skip


def _evenly(sizes: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of the sizes, the smallest and the largest among them."""
    if len(sizes) <= count:
        return list(sizes)
    return [sizes[round(step * (len(sizes) - 1) / (count - 1))] for step in range(count)]


def _temperature_axis(axes: Axes, sampled: Sequence[float]) -> None:
    low, high = sampled[0], sampled[-1]
    if high / low >= 4:
        axes.set_xscale("log", base=2)
    if len(sampled) <= _NAMED_TEMPERATURES:
        ticks = list(sampled)
    elif high / low >= 4:
        ticks = [2.0**power for power in range(round(math.log2(low)), round(math.log2(high)) + 1)]
    else:
        return  # matplotlib's own
    axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


# --- both -------------------------------------------------------------------------------------------------------------


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _say_nothing(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=INK)
    axes.set_xticks([])
    axes.set_yticks([])


def _legend(axes: Axes, columns: int, title: str | None = None) -> None:
    """Below the axes, where it covers nothing."""
    figure = axes.get_figure()
    handles, labels = axes.get_legend_handles_labels()
    if figure is None or not handles:
        return
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK, title=title,
        handlelength=3.2,
    )  # fmt: skip
    legend.get_title().set_color(INK)


def _log_axis(axes: Axes, low: float, high: float, text: Callable[[float], str]) -> None:
    """A logarithmic axis with a few plain numbers on it, however short it is; matplotlib's own may have none."""
    room = max((high / low) ** 0.06, 1.12)
    low, high = low / room, high * room
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = _log_ticks(low, high)
    axes.set_xticks(ticks, labels=[text(tick) for tick in ticks])
    axes.minorticks_off()


def _log_ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [tick for power in powers for step in steps if low <= (tick := step * 10.0**power) <= high]
        if 3 <= len(found) <= 8:
            return found
    return [float(tick) for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
