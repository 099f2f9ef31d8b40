"""The page of a search, and its drawings as files: what the finalists gained, and every trial that was made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from distill_ray.stages import pages, search_charts
from distill_ray.stages.search_charts import Drawing, measure_of
from distill_ray.stages.search_results import TrialRow
from distill_ray.storage import Folder

REPORT_FILE = "report.html"
_TEMPLATE = "search_report.html.j2"


def write(
    folder: Folder,
    title: str,
    rows: Sequence[TrialRow],
    control_rows: Sequence[TrialRow],
    pareto: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> str:
    """Write report.html and each drawing as SVG and PNG into the folder of a search; returns where the page is.

    Args:
        folder: the folder of the search.
        title: what the page is called, the name of the run.
        rows: the trials of the search.
        control_rows: the trials of the CE-only controls, the same students learning from the hard labels alone.
        pareto: the content of ``pareto.json``.
        summary: the content of ``summary.json``.
    """
    drawings = search_charts.draw(rows, pareto)
    for drawing in drawings:
        folder.write_text(f"{drawing.name}.svg", drawing.svg)
        folder.write_bytes(f"{drawing.name}.png", drawing.png)
    folder.write_text(REPORT_FILE, _render(title, rows, control_rows, pareto, summary, drawings))
    return folder.location(REPORT_FILE)


def _render(
    title: str,
    rows: Sequence[TrialRow],
    control_rows: Sequence[TrialRow],
    pareto: Mapping[str, Any],
    summary: Mapping[str, Any],
    drawings: Sequence[Drawing],
) -> str:
    finalists = [point for point in pareto["front"] if point["finalist"]]
    environment = pages.environment()
    environment.filters |= {
        "value": _value, "exact": _exact, "mean": _mean, "trials": _trials, "points": _points, "share": _share,
        "measure": measure_of,
    }  # fmt: skip
    return environment.get_template(_TEMPLATE).render(
        title=title, summary=summary, counts=_counts(summary), teacher=pareto.get("teacher"),
        verdicts=[verdict(point) for point in finalists], finalists=finalists,
        finalist_keys=sorted({key for point in finalists for key in point["values"]}),
        saved=saved(summary), charts=[(drawing.title, Markup(drawing.inline)) for drawing in drawings],
        tables=[(name, _best_first(those), _keys(those)) for name, those in (("search", rows), ("ce", control_rows))],
        latency_of=next((point["latency_of"] for point in finalists if point.get("latency_of")), None),
        duration=_duration,
    )  # fmt: skip


def verdict(point: Mapping[str, Any]) -> str:
    """What distillation did for a finalist, in a sentence: both means, the difference and how sure it is."""
    measure = measure_of(point)
    test, control = point[f"test_{measure}"], point["control"]
    does = "is right on" if measure == "accuracy" else "chooses the teacher's class on"
    seeds = len(test["values"])
    over = f"over {seeds} seeds" if seeds > 1 else "with one seed"
    text = f"{_named(point)}: {over} it {does} {_share(test['mean'], 2)} of the test rows"
    if control is None:
        return f"{text}. It has no control: {point['why_no_control']}."
    return f"{text}, its CE-only control on {_share(control['mean'], 2)}: {_judged(point['difference'])}"


def _named(point: Mapping[str, Any]) -> str:
    values = ", ".join(f"{key}={_value(value)}" for key, value in point["values"].items())
    return f"Trial #{point['trial']} ({pages.count(point['parameters'])} parameters{'; ' if values else ''}{values})"


def _judged(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return "they have no seed in common, so their difference is not known."
    text = f"distillation {pages.change(difference['mean'])}"
    if difference["low"] is None:
        return f"{text}; one seed says nothing about the spread between seeds: {difference['verdict']}."
    interval = f"{100 * difference['low']:+.2f} to {100 * difference['high']:+.2f} points"
    return f"{text} on average, 95 % interval of the paired difference {interval}: {difference['verdict']}."


def saved(summary: Mapping[str, Any]) -> str:
    """What the label store saved, in sentences."""
    passes, seconds = summary["teacher_passes_saved"], summary["teacher_seconds_saved"]
    text = "Every distilled student of this search learned from one label store; none of them ran the teacher."
    cost = f"{_duration(seconds)} of its time" if seconds is not None else "how long one takes was not recorded"
    return (
        f"{text} With the teacher beside each of them it would have made {passes:,} more passes over the rows: {cost}."
    )


def _duration(seconds: float) -> str:
    """In the unit that suits: 42 s, 12.3 min, 4.5 h."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def _counts(summary: Mapping[str, Any]) -> str:
    return ", ".join(f"{count:,} {status}" for status, count in summary["counts"].items())


def _best_first(rows: Sequence[TrialRow]) -> list[dict[str, Any]]:
    """Rows as the table shows them, the best validation accuracy first and trials without one last."""

    def rank(row: TrialRow) -> tuple[float, int]:
        return (math.inf if row.validation_accuracy is None else -row.validation_accuracy, row.id)

    return [vars(row) for row in sorted(rows, key=rank)]


def _keys(rows: Sequence[TrialRow]) -> list[str]:
    return sorted({key for row in rows for key in row.values})


def _value(value: Any) -> str:
    """A searched value for reading: four digits of a drawn number, names as they are, the rest as JSON."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _exact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _mean(entry: Mapping[str, Any] | None) -> str:
    """Mean ± sample standard deviation (number of seeds)."""
    if entry is None:
        return "n/a"
    spread = "" if entry["std"] is None else f" ± {entry['std']:.4f}"
    return f"{entry['mean']:.4f}{spread} (n={len(entry['values'])})"


def _trials(control: Mapping[str, Any] | None) -> str:
    """How many trials a control was chosen from, and with which values."""
    if control is None or control.get("trials") is None:
        return "n/a"
    values = ", ".join(f"{key}={_value(value)}" for key, value in (control.get("searched") or {}).items())
    return f"{control['trials']:,}{': ' if values else ''}{values}"


def _points(difference: Mapping[str, Any] | None) -> str:
    """A paired difference and its interval in percentage points."""
    if difference is None:
        return "n/a"
    low, high = difference["low"], difference["high"]
    interval = "" if low is None else f" [{100 * low:+.2f}, {100 * high:+.2f}]"
    return f"{100 * difference['mean']:+.2f}{interval}"


def _share(value: float | None, digits: int) -> str:
    return "n/a" if value is None else f"{100 * value:.{digits}f} %"
