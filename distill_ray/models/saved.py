"""A trained model on disk: ``model.safetensors`` (weights) and ``model.json`` (everything needed to rebuild it).

A given teacher has its own files beside a ``model.json`` of another kind: see :mod:`distill_ray.models.given`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from distill_ray.artifacts import SPEC_FILE, SUMMARY_FILE, WEIGHTS_FILE
from distill_ray.config import ImportedModel, InputConfig, ModelConfig
from distill_ray.errors import UserError
from distill_ray.models import foreign
from distill_ray.models.classifier import Classifier, build_classifier, is_ours
from distill_ray.models.given import GivenNet, GivenSpec
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
        """A classifier of this kind as its training starts: untrained, or with the pretrained weights it names."""
        return build_classifier(self.model, self.input, self.shape, self.classes, key=key)

    def bare(self, *, key: str = "model") -> ModelSpec:
        """The same without pretrained weights, for weights that follow: it needs no file but those of its folder."""
        return self.model_copy(update={"model": foreign.bare(self.model, key)})

    def build_on_meta(self, *, key: str = "model") -> Classifier:
        """The same without data in its tensors; one of ours need not fit on this machine."""
        if is_ours(self.model):
            with torch.device("meta"):
                return self.build(key=key)
        return self.bare(key=key).build(key=key).to("meta")  # code that is not ours may look at numbers


def save_model(folder: Folder, spec: ModelSpec, weights: dict[str, torch.Tensor]) -> str:
    """Write both files; returns the sha256 of the weights. ``weights`` is the state dict of ``Classifier.net``."""
    data = to_safetensors(weights)
    folder.write_bytes(WEIGHTS_FILE, data)
    folder.write_text(SPEC_FILE, spec.bare().model_dump_json(indent=2, by_alias=True) + "\n")
    return hashlib.sha256(data).hexdigest()


def to_safetensors(weights: dict[str, torch.Tensor]) -> bytes:
    """The tensors as a safetensors file; those that share memory (tied weights) get one copy each."""
    data: bytes = save_tensors({name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()})
    return data


def finished_weights(folder: Folder) -> str | None:
    """The checksum of the weights of a folder that is finished and whole; None where it is not."""
    recorded = _recorded_sha256(folder)
    if recorded is None or not folder.exists(WEIGHTS_FILE):
        return None
    return recorded if hashlib.sha256(folder.read_bytes(WEIGHTS_FILE)).hexdigest() == recorded else None


def load_model(
    folder: str | Folder, *, expected_sha256: str | None = None, allow_import: bool = False
) -> Classifier | GivenNet:
    """The model of a teacher's or student's folder, in eval mode, on the CPU, taking raw rows.

    Args:
        folder: a stage folder such as ``runs/artifacts/student-<digest>``, by path or URI.
        expected_sha256: refuse other weights than these; by default those that the folder's summary.json names.
        allow_import: run the code that the folder's model.json names by an import path, if it does.

    Raises:
        UserError: a file is missing or damaged, the weights do not fit model.json, or it names code and
            ``allow_import`` was not given.
    """
    place = folder if isinstance(folder, Folder) else Folder.at(folder)
    text, raw = _read_spec(place)
    spec = _parsed(raw, place)
    _refuse_code(spec, place, allow_import)
    wanted = expected_sha256 or _recorded_sha256(place)
    if isinstance(spec, GivenSpec):
        _compare(hashlib.sha256(text).hexdigest(), wanted, place.location(SPEC_FILE))
        return spec.open(place)
    try:
        data = place.read_bytes(WEIGHTS_FILE)
    except FileNotFoundError as error:
        raise UserError(f"{place}: holds no trained model ({error.filename or WEIGHTS_FILE} is missing)") from None
    _compare(hashlib.sha256(data).hexdigest(), wanted, place.location(WEIGHTS_FILE))
    return _filled(spec, data, place)


def load_classifier(
    folder: str | Folder, *, expected_sha256: str | None = None, allow_import: bool = False
) -> Classifier:
    """``load_model`` of a folder whose model was trained here: one network with its input contract.

    Raises:
        UserError: as ``load_model``, or it is a given teacher.
    """
    model = load_model(folder, expected_sha256=expected_sha256, allow_import=allow_import)
    if not isinstance(model, Classifier):
        raise UserError(f"{folder}: holds a given teacher, which was not trained here")
    return model


def read_spec(folder: Folder) -> ModelSpec | GivenSpec:
    """What model.json of a folder says.

    Raises:
        UserError: there is none, or it is damaged.
    """
    return _parsed(_read_spec(folder)[1], folder)


def _read_spec(place: Folder) -> tuple[bytes, Any]:
    try:
        text = place.read_bytes(SPEC_FILE)
        return text, json.loads(text)
    except FileNotFoundError as error:
        raise UserError(f"{place}: holds no trained model ({error.filename or SPEC_FILE} is missing)") from None
    except ValueError:
        raise UserError(f"{place.location(SPEC_FILE)}: is no JSON: the file is damaged") from None


def _parsed(raw: Any, place: Folder) -> ModelSpec | GivenSpec:
    try:
        if isinstance(raw, dict) and raw.get("kind") == "given":
            return GivenSpec.model_validate(raw)
        return ModelSpec.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{place.location(SPEC_FILE)}: {error.errors()[0]['msg']}: the file is damaged") from None


def _refuse_code(spec: ModelSpec | GivenSpec, place: Folder, allow_import: bool) -> None:
    models = [member.model for member in spec.members] if isinstance(spec, GivenSpec) else [spec.model]
    named = [model.import_ for model in models if isinstance(model, ImportedModel)]
    if isinstance(spec, GivenSpec):
        named += [member.file for member in spec.members if member.format == "export"]
    if named and not allow_import:
        raise UserError(
            f"{place.location(SPEC_FILE)}: names code that would run here, {named[0]}: read it, then say "
            "allow_import=True (--allow-import)"
        )


def _compare(found: str, wanted: str | None, location: str) -> None:
    if wanted is not None and found != wanted:
        raise UserError(
            f"{location}: damaged, or not the weights that were asked for (sha256 {found[:16]}..., "
            f"expected {wanted[:16]}...): delete it, and the command that made it makes it again"
        )


def _filled(spec: ModelSpec, data: bytes, place: Folder) -> Classifier:
    classifier = spec.bare().build()
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
