"""The run folder ``<out>/<name>/``: config.yaml, summary.json and report.html, referring to the shared artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill_ray import __version__
from distill_ray.artifacts import SUMMARY_FILE, Stage
from distill_ray.config import to_dict, to_yaml
from distill_ray.stages import label, prepare, student, teacher
from distill_ray.stages.context import CONFIG_FILE, Context
from distill_ray.stages.student import Student
from distill_ray.storage import Folder

_MEASURED = (
    "accuracy",
    "kl_to_teacher",
    "agreement",
    "ece",
    "macro_f1",
    "parameters",
    "bytes",
    "latency_ms",
    "seconds",
)


def run_folder(context: Context) -> Folder:
    """Where this run's own files go."""
    return context.out / context.config.name


def write(context: Context) -> dict[str, Any]:
    """Make every stage that is not finished, then write the run's config and summary; returns the summary."""
    data, model = prepare.run(context), teacher.run(context)
    labels = label.run(context)
    students = student.run(context)
    summary = {
        "name": context.config.name,
        "code_version": __version__,
        "synthetic": (data.finished() or {}).get("synthetic"),
        "class_counts": (data.finished() or {}).get("class_counts"),
        "rows": rows(model, students),
        "precision_check": (labels.finished() or {}).get("precision_check"),
        "stages": [outcome.to_json() for outcome in context.outcomes.values()],
    }
    folder = run_folder(context)
    folder.write_text(CONFIG_FILE, to_yaml(to_dict(context.config)))
    folder.write_json(SUMMARY_FILE, summary)
    return summary


def rows(model: Stage, students: Sequence[Student]) -> list[dict[str, Any]]:
    """One row a model, all measured on the test split."""
    # The teacher's divergence from itself is 0 by definition, not by measurement.
    first = _row(model, "teacher", "teacher") | {"kl_to_teacher": 0.0, "agreement": 1.0}
    return [first, *(_row(s.stage, s.title, s.role) | {"seed": s.seed, "loss": to_dict(s.loss)} for s in students)]


def _row(stage: Stage, name: str, role: str) -> dict[str, Any]:
    summary = stage.finished() or {}
    return {"name": name, "role": role, "folder": str(stage.folder), **{key: summary.get(key) for key in _MEASURED}}
