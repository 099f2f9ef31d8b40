"""Networks by name, and the saved form in which a trained one travels."""

from __future__ import annotations

from distill_ray.models.classifier import Classifier, build_classifier
from distill_ray.models.saved import ModelSpec, finished_weights, load_model, save_model

__all__ = ["Classifier", "ModelSpec", "build_classifier", "finished_weights", "load_model", "save_model"]
