"""What a search leaves behind, without a search: rows of trials, the content of pareto.json and of summary.json."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from distill_ray import evidence
from distill_ray.stages import search_results
from distill_ray.stages.search_results import TrialRow

TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0)
CHANNELS = ([2, 4], [4, 8], [8, 16], [16, 32])
PARAMETERS = (17_550, 68_226, 134_398, 561_310)
TEACHER = {"test_accuracy": 0.7752, "parameters": 4_311_614, "latency_ms": 1.91}


def trial_rows(per_setting: int = 2) -> list[TrialRow]:
    """A grid over widths and temperatures with drawn learning rates; then one trial of each other status."""
    random = np.random.default_rng(7)
    rows: list[TrialRow] = []
    for size, channels in enumerate(CHANNELS):
        for temperature in TEMPERATURES:
            for _ in range(per_setting):
                best = 0.42 + 0.08 * size - 0.012 * (math.log2(temperature) - 2) ** 2
                accuracy = best - 0.03 * float(random.random())
                rate = 10 ** float(random.uniform(-3, -2))
                values = {"loss.temperature": temperature, "model.channels": channels, "train.lr": rate}
                rows.append(
                    TrialRow(len(rows), values, accuracy, 20, PARAMETERS[size], 12.5, "completed", None, "/out/s")
                )
    values = {"loss.temperature": 4.0, "model.channels": [4, 8], "train.lr": 0.05}
    first = len(rows)
    return [
        *rows,
        TrialRow(first, values, 0.2, 5, PARAMETERS[1], 3.0, "stopped", "stopped by the scheduler", "/out/s"),
        TrialRow(first + 1, {"model.channels": [64]}, None, 0, 9_000_000, 0.0, "infeasible", "too large", None),
        TrialRow(first + 2, values | {"loss.temperature": -1.0}, None, 0, None, 0.0, "invalid", "T <= 0", None),
    ]


def control_rows() -> list[TrialRow]:
    """Trials on the hard labels alone."""
    return [
        TrialRow(n, {"train.lr": rate}, 0.38 + 0.01 * n, 20, PARAMETERS[0], 11.0, "completed", None, "/out/c")
        for n, rate in enumerate((0.001, 0.0025, 0.006))
    ]


def latency_of(row: TrialRow) -> float:
    """Milliseconds that grow with the parameters; no two trials have the same."""
    return 0.05 + math.sqrt(row.parameters or 0) / 1000 + 0.0005 * row.id


def finalist(row: TrialRow, seeds: int, gain: float) -> dict[str, Any]:
    """What pareto.json says of a finalist beyond its validation accuracy."""
    base = (row.validation_accuracy or 0.0) - 0.01
    ours = [base + 0.008 * math.sin(seed + row.id) for seed in range(seeds)]
    theirs = [base - gain + 0.009 * math.cos(2 * seed + row.id) for seed in range(seeds)]
    control = evidence.mean_std(theirs) | {
        "trials": 3, "searched": {"train.lr": 0.0025}, "validation_accuracy": base - gain, "failed_seeds": {},
    }  # fmt: skip
    return {
        "test_accuracy": evidence.mean_std(ours), "latency_ms": latency_of(row),
        "latency_of": "1 row, fp32, 1 thread, cpu", "bytes": 4 * (row.parameters or 0), "control": control,
        "difference": evidence.paired_difference(ours, theirs), "gap_closed": 0.25, "failed_seeds": {},
        "why_no_control": None,
    }  # fmt: skip


def pareto_of(rows: list[TrialRow], seeds: int = 5) -> dict[str, Any]:
    """The content of pareto.json: the front's trials are finalists, the largest of them gains nothing."""
    chosen = search_results.trial_front(rows)
    gains = [0.0 if row is chosen[-1] and len(chosen) > 1 else 0.05 for row in chosen]
    front = [
        {
            "trial": row.id, "parameters": row.parameters, "validation_accuracy": row.validation_accuracy,
            "values": dict(row.values), "folder": row.folder, "finalist": True, **finalist(row, seeds, gain),
        }
        for row, gain in zip(chosen, gains, strict=True)
    ]  # fmt: skip
    done = [row for row in rows if row.status == "completed"]
    fastest = search_results.front([(latency_of(row), row.validation_accuracy or 0.0) for row in done])
    latency = [
        {
            "trial": row.id, "latency_ms": latency_of(row), "validation_accuracy": row.validation_accuracy,
            "test_accuracy": None, "on_front": index in fastest,
        }
        for index, row in enumerate(done)
    ]  # fmt: skip
    return {
        "chosen_by": "validation_accuracy", "teacher": dict(TEACHER), "front": front,
        "latency": sorted(latency, key=lambda point: float(point["latency_ms"] or 0.0)),
    }  # fmt: skip


def summary_of(rows: list[TrialRow], controls: list[TrialRow], seeds: int = 5) -> dict[str, Any]:
    """The content of summary.json."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.status] = counts.get(row.status, 0) + 1
    return {
        "trials": len(rows), "students": len(rows), "counts": counts, "control_trials": len(controls),
        "finalists": 4, "seeds": seeds,
        "seconds": 900.0, "search_seconds": 500.0, "teacher_passes_saved": 1205, "teacher_seconds_saved": 8000.0,
        "synthetic": False, "labels_digest": "3fa9c0ffee00", "data_digest": "81c2deadbeef",
    }  # fmt: skip
