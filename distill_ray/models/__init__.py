"""Networks by name, and the saved form in which a trained one travels."""

from __future__ import annotations

from distill_ray.models.classifier import Classifier, build_classifier
from distill_ray.models.saved import ModelSpec, load_model, save_model

__all__ = ["Classifier", "ModelSpec", "build_classifier", "load_model", "save_model"]
