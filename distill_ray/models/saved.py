"""A trained model on disk: ``model.safetensors`` (weights) and ``model.json`` (everything needed to rebuild it)."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from distill_ray.artifacts import SPEC_FILE, SUMMARY_FILE, WEIGHTS_FILE
from distill_ray.config import InputConfig, ModelConfig
from distill_ray.errors import UserError
from distill_ray.models.classifier import Classifier, build_classifier
from distill_ray.storage import Folder


class ModelSpec(BaseModel):
    """What model.json holds."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    format_version: Literal[1] = 1
    model: ModelConfig
    input: InputConfig
    shape: tuple[int, ...]
    dtype: str
    classes: int
    class_names: tuple[str, ...]

    def build(self, *, key: str = "model") -> Classifier:
        """An untrained classifier of this kind."""
        return build_classifier(self.model, self.input, self.shape, self.classes, key=key)


def save_model(folder: Folder, spec: ModelSpec, weights: dict[str, torch.Tensor]) -> str:
    """Write both files; returns the sha256 of the weights. ``weights`` is the state dict of ``Classifier.net``."""
    data = save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
    folder.write_bytes(WEIGHTS_FILE, data)
    folder.write_text(SPEC_FILE, spec.model_dump_json(indent=2) + "\n")
    return hashlib.sha256(data).hexdigest()


def finished_weights(folder: Folder) -> str | None:
    """The checksum of the weights of a folder that is finished and whole; None where it is not."""
    recorded = _recorded_sha256(folder)
    if recorded is None or not folder.exists(WEIGHTS_FILE):
        return None
    return recorded if hashlib.sha256(folder.read_bytes(WEIGHTS_FILE)).hexdigest() == recorded else None


def load_model(folder: str | Folder, *, expected_sha256: str | None = None) -> Classifier:
    """The trained model of a teacher's or student's folder, in eval mode, on the CPU, taking raw rows.

    Args:
        folder: a stage folder such as ``runs/artifacts/student-<digest>``, by path or URI.
        expected_sha256: refuse other weights than these; by default those that the folder's summary.json names.

    Raises:
        UserError: a file is missing or damaged, or the weights do not fit model.json.
    """
    place = folder if isinstance(folder, Folder) else Folder.at(folder)
    try:
        spec = ModelSpec.model_validate_json(place.read_bytes(SPEC_FILE))
        data = place.read_bytes(WEIGHTS_FILE)
    except FileNotFoundError as error:
        raise UserError(f"{place}: holds no trained model ({error.filename or WEIGHTS_FILE} is missing)") from None
    except ValidationError as error:
        raise UserError(f"{place.location(SPEC_FILE)}: {error.errors()[0]['msg']}: the file is damaged") from None
    wanted = expected_sha256 or _recorded_sha256(place)
    if wanted is not None and (found := hashlib.sha256(data).hexdigest()) != wanted:
        raise UserError(
            f"{place.location(WEIGHTS_FILE)}: damaged, or not the weights that were asked for (sha256 {found[:16]}..., "
            f"expected {wanted[:16]}...): delete it, and the command that made it makes it again"
        )
    classifier = spec.build()
    try:
        classifier.net.load_state_dict(load_tensors(data))
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{place.location(WEIGHTS_FILE)}: does not fit {SPEC_FILE}: {reason}") from None
    return classifier.eval()


def _recorded_sha256(place: Folder) -> str | None:
    """What the finished folder says of its weights; None where it says nothing."""
    try:
        return str(place.read_json(SUMMARY_FILE)["weights_sha256"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
