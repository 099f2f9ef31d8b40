"""The model that a config describes, for the rows of a data store.

Beside ``model_folder`` for those who count parameters and train nothing: that one imports torchmetrics, which brings
matplotlib and SciPy and takes longer than torch.
"""

from __future__ import annotations

from typing import Any

from distill_ray.models import ModelSpec
from distill_ray.store import DataManifest


def model_spec(data: DataManifest, model: Any) -> ModelSpec:
    """``model`` for the inputs and classes of this data store."""
    return ModelSpec(
        model=model,
        input=data.input,
        shape=data.shape,
        dtype=data.dtype,
        classes=data.classes,
        class_names=data.class_names,
    )
