"""What teacher and student folders share on the worker: resolving ``auto``, and finishing with test metrics."""

from __future__ import annotations

from typing import Any

import torch
import yaml

from distill_ray import metrics, precision
from distill_ray.artifacts import SUMMARY_FILE, WEIGHTS_FILE
from distill_ray.config import CeLoss, KdLoss, PrecisionName, StudentConfig
from distill_ray.models import ModelSpec, finished_weights, load_model
from distill_ray.models.classifier import count_parameters
from distill_ray.stages.context import CONFIG_FILE
from distill_ray.storage import Folder
from distill_ray.store import DataManifest, SplitArrays
from distill_ray.training import FitResult, FitSpec

_EVALUATION_BATCH = 512


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


def student_spec(
    data: DataManifest, student: StudentConfig, loss: CeLoss | KdLoss, seed: int, folder: Folder, device: torch.device
) -> FitSpec:
    """What ``fit`` needs for the student of ``folder``."""
    resolved = resolve_precision(folder, student.train.precision, device)
    return FitSpec(model_spec(data, student.model), student.train, loss, seed, resolved)


def resolve_precision(folder: Folder, asked: PrecisionName, device: torch.device) -> str:
    """The precision that this folder was started with; at its first start, what ``asked`` means on this device."""
    try:
        recorded = yaml.safe_load(folder.read_bytes(CONFIG_FILE))["resolved"]["precision"]
    except (FileNotFoundError, yaml.YAMLError, KeyError, TypeError):
        return precision.resolve(asked, device)
    return str(recorded)


def finish(folder: Folder, result: FitResult, test: SplitArrays, device: torch.device, extra: dict[str, Any]) -> None:
    """Evaluate the saved model once on the test split, in fp32, measure its latency, and write ``summary.json``.

    The model is loaded back from its files: what is measured is what ``load_model`` gives to a user. A folder that
    another run has finished meanwhile, where there are no locks, is left as it is.
    """
    if finished_weights(folder) is not None:
        return
    model = load_model(folder, expected_sha256=result.weights_sha256).to(device)
    quality = metrics.evaluate(model, test, _EVALUATION_BATCH, "fp32", device)
    latency = metrics.latency_ms(model, torch.from_numpy(test.inputs[:1]), device)
    best = result.history[result.best_epoch - 1]
    summary = {
        **quality,
        "parameters": count_parameters(model),
        "bytes": folder.size(WEIGHTS_FILE),
        "latency_ms": latency,
        "latency_of": f"1 row, fp32, 1 thread, {device.type}",
        "seconds": sum(row["train_seconds"] + row["validation_seconds"] for row in result.history),
        "epochs": len(result.history),
        "best_epoch": result.best_epoch,
        "validation_accuracy": best["validation_accuracy"],
        "test_rows": len(test),
        "weights_sha256": result.weights_sha256,
        **extra,
    }
    folder.write_json(SUMMARY_FILE, summary)
