"""What a search found: a row a trial, the front over parameters and over latency, and how sure its differences are."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from distill_ray import evidence

_LEAST_GAP = 0.01  # of accuracy; a share of less would be noise

Status = Literal["completed", "stopped", "invalid", "infeasible", "failed"]

_COLUMNS = {
    "id": pa.int64(), "validation_accuracy": pa.float64(), "epochs": pa.int64(), "parameters": pa.int64(),
    "bytes": pa.int64(), "latency_ms": pa.float64(), "seconds": pa.float64(), "status": pa.string(),
    "reason": pa.string(), "folder": pa.string(),
}  # fmt: skip


@dataclass(frozen=True)
class TrialRow:
    """One trial. ``seconds`` is the training of its folder, whichever search did it; accuracy is its best epoch's."""

    id: int
    values: Mapping[str, Any]
    validation_accuracy: float | None
    epochs: int
    parameters: int | None
    seconds: float
    status: Status
    reason: str | None
    folder: str | None
    bytes: int | None = None
    latency_ms: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)  # of the best epoch, as in metrics.jsonl


def to_parquet(rows: Sequence[TrialRow], keys: Sequence[str]) -> pa.Buffer:
    """The trials as a parquet file: id, a column for every searched key, then what was measured."""
    columns: dict[str, pa.Array] = {"id": pa.array([row.id for row in rows], pa.int64())}
    columns |= {key: _column([row.values.get(key) for row in rows]) for key in keys}
    for name, kind in _COLUMNS.items():
        columns[name] = pa.array([getattr(row, name) for row in rows], kind)
    for name in sorted({name for row in rows for name in row.metrics} - set(columns)):
        columns[name] = pa.array([row.metrics.get(name) for row in rows], pa.float64())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def described(values: Mapping[str, Any]) -> str:
    """Sampled values in a line: ``loss.temperature=4, model.channels=[8, 16]``."""
    return ", ".join(f"{key}={_short(value)}" for key, value in sorted(values.items()))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def _column(values: Sequence[Any]) -> pa.Array:
    """A typed column where the values share a type; else their JSON, so that any space makes a table."""
    if not any(isinstance(value, dict) for value in values):
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            pass
    return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, gain) points that no other beats in both, by rising cost; of equal points the first."""
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1], index))
    best, kept = -math.inf, []
    for index in order:
        if points[index][1] > best:
            best = points[index][1]
            kept.append(index)
    return kept


def trial_front(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Completed trials that no other beats in both parameters and validation accuracy, the smallest first."""
    done = [(row, float(row.parameters or 0), row.validation_accuracy or 0.0) for row in rows if _is_done(row)]
    return [done[index][0] for index in front([(cost, gain) for _, cost, gain in done])]


def _is_done(row: TrialRow) -> bool:
    return row.status == "completed" and row.validation_accuracy is not None


def spread(front_rows: Sequence[TrialRow], count: int) -> list[TrialRow]:
    """At most ``count`` rows of a front, its ends among them, evenly over the rest."""
    if len(front_rows) <= count:
        return list(front_rows)
    if count == 1:
        return [front_rows[-1]]
    picked = {round(step * (len(front_rows) - 1) / (count - 1)) for step in range(count)}
    return [front_rows[index] for index in sorted(picked)]


def finalist(
    students: Mapping[int, Mapping[str, Any]], controls: Mapping[int, Mapping[str, Any]],
    teacher_accuracy: float | None,
) -> dict[str, Any]:  # fmt: skip
    """What a finalist's summaries by seed say beside those of its CE-only control; differences are paired by seed.

    A finalist whose own loss is ``ce`` has no control: it is its own. Where the test split has no labels, the
    agreement with the teacher takes the place of the accuracy. ``gap_closed`` is the part of the way from control to
    teacher that the student is ahead of its control, where that way is longer than a point.
    """
    measure = "accuracy" if all(summary["accuracy"] is not None for summary in students.values()) else "agreement"
    first = next(iter(students.values()))
    entry: dict[str, Any] = {
        "test_accuracy": None, f"test_{measure}": evidence.mean_std(_of(measure, students, students)),
        "seeds": list(students), "latency_of": first["latency_of"], "bytes": first["bytes"],
        "control": None, "difference": None, "gap_closed": None,
    }  # fmt: skip
    shared = [seed for seed in students if seed in controls]
    if controls:
        theirs = _of(measure, controls, controls)
        entry["control"] = evidence.mean_std(theirs)
    if shared:
        ours, beside = _of(measure, students, shared), _of(measure, controls, shared)
        entry["difference"] = evidence.paired_difference(ours, beside)
        if measure == "accuracy" and teacher_accuracy is not None:
            gap = teacher_accuracy - fmean(theirs)
            entry["gap_closed"] = entry["difference"]["mean"] / gap if gap > _LEAST_GAP else None
    return entry


def _of(measure: str, summaries: Mapping[int, Mapping[str, Any]], seeds: Iterable[int]) -> list[float]:
    return [float(summaries[seed][measure]) for seed in seeds]


def pareto(
    rows: Sequence[TrialRow], finalists: Mapping[int, Mapping[str, Any]], teacher: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The content of ``pareto.json``: both fronts are chosen by validation accuracy, the test split only describes."""
    points = [
        {
            "trial": row.id, "parameters": row.parameters, "validation_accuracy": row.validation_accuracy,
            "values": dict(row.values), "folder": row.folder, "finalist": row.id in finalists,
            "latency_ms": row.latency_ms, **finalists.get(row.id, {}),
        }
        for row in trial_front(rows)
    ]  # fmt: skip
    measured = sorted((row for row in rows if _is_done(row) and row.latency_ms is not None), key=_latency)
    on_front = set(front([(_latency(row), row.validation_accuracy or 0.0) for row in measured]))
    tested = {trial: entry["test_accuracy"] for trial, entry in finalists.items()}
    latency = [
        {
            "trial": row.id, "latency_ms": row.latency_ms, "validation_accuracy": row.validation_accuracy,
            "test_accuracy": tested[row.id]["mean"] if tested.get(row.id) else None, "on_front": index in on_front,
        }
        for index, row in enumerate(measured)
    ]  # fmt: skip
    return {"chosen_by": "validation_accuracy", "teacher": teacher, "front": points, "latency": latency}


def _latency(row: TrialRow) -> float:
    return float(row.latency_ms or 0.0)
