"""distill_ray: distil a large PyTorch model into the best small one for a budget, on a laptop or a Ray cluster."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_ray import stages, store
    from distill_ray.models import load_model
    from distill_ray.stages.pipeline import run

__version__ = "0.1.0"
__all__ = ["__version__", "load_model", "run", "stages", "store"]


def __getattr__(name: str) -> Any:
    # Lazy: `distill-ray --help` imports this package and must not import torch.
    if name == "load_model":
        from distill_ray.models import load_model

        return load_model
    if name == "run":
        from distill_ray.stages.pipeline import run

        return run
    if name in ("stages", "store"):
        return importlib.import_module(f"distill_ray.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
