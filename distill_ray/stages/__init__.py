"""The stages of a run: config in, folder out. A finished folder is returned at once; what a stage needs runs first."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_ray.stages import export, label, pipeline, prepare, report, student, teacher, tune

__all__ = ["export", "label", "pipeline", "prepare", "report", "student", "teacher", "tune"]


def __getattr__(name: str) -> Any:
    # Lazy: the stages import torch and Ray where they need them, and `distill-ray --help` needs neither.
    if name in __all__:
        return importlib.import_module(f"distill_ray.stages.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
