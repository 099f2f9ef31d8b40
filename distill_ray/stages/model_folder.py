"""What teacher and student folders share on the worker: resolving ``auto``, and finishing with test metrics."""

from __future__ import annotations

from typing import Any

import torch

from distill_ray import inference, losses, precision, profiling
from distill_ray.artifacts import SUMMARY_FILE, WEIGHTS_FILE
from distill_ray.config import CeLoss, ImportedModel, KdLoss, PrecisionName, StudentConfig, TeacherConfig, TrainConfig
from distill_ray.errors import UserError
from distill_ray.footprint import step_bytes
from distill_ray.models import ModelSpec, finished_weights, load_model
from distill_ray.models.classifier import check_output, count_parameters, is_ours
from distill_ray.order import least_rows
from distill_ray.placing import Placement
from distill_ray.stages.context import recorded
from distill_ray.stages.shared_rows import SharedRows
from distill_ray.storage import Folder
from distill_ray.store import DataManifest, SplitArrays, Store, StoredSplit, read_shards, read_split
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
    weights = class_weights(loss, data)
    return FitSpec(model_spec(data, student.model), student.train, loss, seed, resolved, weights)


def class_weights(loss: CeLoss | KdLoss, data: DataManifest) -> tuple[float, ...] | None:
    """The classes' weights in the CE term, from the training split; None where the loss has none.

    Raises:
        UserError: the data store is an older one, which does not say how many rows each class has.
    """
    if loss.class_weights is None:
        return None
    counts = (data.class_counts or {}).get("train")
    if counts is None:
        raise UserError(
            f"loss.class_weights {loss.class_weights}: the data store {data.digest} does not say how many rows each "
            "class has (an earlier version made it): delete its folder, the same command makes it again"
        )
    return losses.balanced_weights(counts)


def resolve_precision(folder: Folder, asked: PrecisionName, device: torch.device) -> str:
    """The precision that this folder was started with; at its first start, what ``asked`` means on this device."""
    return recorded(folder).get("precision") or precision.resolve(asked, device)


def check_model(key: str, data: DataManifest, section: TeacherConfig | StudentConfig, placement: Placement) -> None:
    """Refuse, before any worker starts, a network that does not fit the data, a batch that can never fit in memory, or
    one that leaves a single row to a network that cannot be trained on one.

    A GPU's own memory is not known here.

    Raises:
        UserError: what does not fit; of memory how much a step takes, how much there is, and what to lower.
    """
    spec, train, rows = model_spec(data, section.model), section.train, data.splits["train"].rows
    if is_ours(spec.model):
        network = spec.build_on_meta(key=f"{key}.model")
    else:
        network = spec.build(key=f"{key}.model")
        check_output(network, spec.shape, spec.dtype, spec.classes, f"{key}.model")
    _check_single_rows(key, network, spec, train, rows, placement)
    needed = step_bytes(spec, train, rows, placement.workers)
    if not placement.gpus and needed > placement.room_bytes:
        raise UserError(
            f"{key}.train.batch_size {train.batch_size}: a step takes at least {needed / 2**30:.1f} GiB in each of "
            f"{placement.workers} worker(s), which have {placement.room_bytes / 2**30:.1f} GiB: lower it, or raise "
            f"{key}.train.accumulate"
        )


def _check_single_rows(
    key: str, network: torch.nn.Module, spec: ModelSpec, train: TrainConfig, rows: int, placement: Placement
) -> None:
    """One row alone: always when a latency is measured; in training where the sizes leave it so, and batch norm then
    has no spread to divide by."""
    reason = _fails_on_one_row(network.eval(), spec)
    if reason is not None:
        raise UserError(f"{key}.model: it cannot take a single row, as its latency is measured by ({reason})")
    workers = range(placement.workers, max(placement.workers, placement.most_workers) + 1)
    synchronised = bool(placement.gpus) and placement.workers > 1  # batch norm then sees the rows of all workers

    def leaves_one(batch_size: int) -> bool:
        return any(least_rows(rows, batch_size, count, train.accumulate) == 1 for count in workers)

    if synchronised or not leaves_one(train.batch_size):
        return
    reason = _fails_on_one_row(network.train(), spec)
    if reason is None:
        return
    near = sorted(range(2, 2 * train.batch_size + 2), key=lambda size: abs(size - train.batch_size))
    fitting = next((size for size in near if not leaves_one(size)), None)
    mend = f"set it to {fitting}, or" if fitting is not None else "give it more rows, or"
    shared = "" if placement.workers == 1 else f" over {placement.workers} workers"
    parts = "" if train.accumulate == 1 else f" in {train.accumulate} parts"
    raise UserError(
        f"{key}.train.batch_size {train.batch_size}: {rows} training rows in batches of that{shared}{parts} leave one "
        f"row alone, which this network cannot be trained on ({reason}): {mend} use a network without batch norm"
    )


def _fails_on_one_row(network: torch.nn.Module, spec: ModelSpec) -> str | None:
    device = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))
    one = torch.zeros((1, *spec.shape), dtype=getattr(torch, spec.dtype), device=device)
    try:
        with torch.no_grad():
            network(one)
    except Exception as error:  # whatever the network's own code raises
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def open_split(
    data: Store, split: str, labels: Store | None, train: TrainConfig, shuffle: str, shared: SharedRows | None = None
) -> SplitArrays | StoredSplit:
    """The rows of a split: in memory, which may be ``shared``, or in their shards where ``shuffle`` is ``window``."""
    with profiling.phase("reading"):
        if shuffle == "window":
            return StoredSplit(data, split, labels, train.window_rows)
        return read_split(data, split, labels) if shared is None else shared.open(split)


def resolve_shuffle(folder: Folder, train: TrainConfig, data: Store, labels: Store | None, share_bytes: float) -> str:
    """How this folder was started; at its first start ``whole`` where all rows fit in half of ``share_bytes``.

    The order of the rows hangs on it, so it must not hang on the number of workers: see ``Placement.share_bytes``.
    """
    if before := recorded(folder).get("shuffle"):
        return str(before)
    if train.shuffle != "auto":
        return train.shuffle
    return "whole" if fits_in_memory(data, labels, share_bytes) else "window"


def fits_in_memory(data: Store, labels: Store | None, share_bytes: float) -> bool:
    """Whether all rows that a student learns from fit in half of ``share_bytes``."""
    stores = [data] if labels is None else [data, labels]
    size = sum(shard.bytes for store in stores for shard in store.manifest.shards if shard.split != "test")
    return size <= share_bytes / 2


def finish(
    folder: Folder,
    spec: ModelSpec,
    result: FitResult,
    data: Store,
    labels: Store | None,
    device: torch.device,
    extra: dict[str, Any],
) -> None:
    """Evaluate the saved model once on the test split, in fp32, measure its latency, and write ``summary.json``.

    The model is loaded back from its files: what is measured is what ``load_model`` gives to a user. A folder that
    another run has finished meanwhile, where there are no locks, is left as it is.
    """
    if finished_weights(folder) is not None:
        return
    names_code = isinstance(spec.model, ImportedModel)  # the command asked for permission
    precision.exact_fp32()
    with profiling.phase("evaluation"):
        from distill_ray import metrics

        model = load_model(folder, expected_sha256=result.weights_sha256, allow_import=names_code).to(device)
        quality = metrics.evaluate(model, read_shards(data, "test", labels), _EVALUATION_BATCH, "fp32", device)
        one_row = torch.from_numpy(next(read_shards(data, "test")).inputs[:1].copy())
        latency = inference.latency_ms(model, one_row, device)
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
        "validation_accuracy": best.get("validation_accuracy"),
        **({} if "validation_accuracy" in best else {"validation_agreement": best["validation_agreement"]}),
        "test_rows": data.manifest.splits["test"].rows,
        "weights_sha256": result.weights_sha256,
        **extra,
    }
    folder.write_json(SUMMARY_FILE, summary)
