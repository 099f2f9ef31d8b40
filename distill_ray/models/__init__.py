"""Networks by name, by import path and from files, and the saved form in which a trained one travels."""

from __future__ import annotations

from distill_ray.models.classifier import Classifier, build_classifier
from distill_ray.models.given import GivenNet, GivenSpec
from distill_ray.models.saved import ModelSpec, finished_weights, load_classifier, load_model, read_spec, save_model

__all__ = [
    "Classifier",
    "GivenNet",
    "GivenSpec",
    "ModelSpec",
    "build_classifier",
    "finished_weights",
    "load_classifier",
    "load_model",
    "read_spec",
    "save_model",
]
