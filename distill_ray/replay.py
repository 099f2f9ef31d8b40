"""Are the stored logits the teacher's? A sample of rows goes through the teacher again and is compared.

Shapes: B rows of the sample, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distill_ray import precision
from distill_ray.errors import UserError
from distill_ray.inference import logits_of
from distill_ray.models import load_model
from distill_ray.storage import Folder
from distill_ray.store import Store
from distill_ray.store.manifest import ShardRecord

SAMPLE_ROWS = 256
_SHARDS = 8  # that the sample is drawn from, more where they are small
_FLOAT16_ROUNDING = 2.0**-10  # twice the half of a unit in the last place, relative
_FP32_SLACK = 1e-3  # other threads, batch sizes and hardware add in another order; relative to the logits' range
_REDUCED_SLACK = 4.0  # times the largest difference from fp32 that the labelling itself measured on its own sample


def replay(
    labels: Store, data: Store, teacher: Folder, rows: int = SAMPLE_ROWS, *, allow_import: bool = False
) -> dict[str, Any]:
    """Run the teacher over a random sample of ``data``, in the precision of the labels, and compare.

    Where this machine does not compute in that precision, fp32 takes its place; the bound allows for both. The sample
    is a function of the store: the same for everyone who asks.

    Returns:
        ``rows``, ``precision`` (what it ran in now), ``max_abs_difference`` between a stored and a computed logit (both
        minus their row's maximum), ``top1_agreement``, and ``wrong_rows``: how many rows lie outside the bound.

    Raises:
        UserError: the teacher cannot be loaded, or its weights are not those that made the labels; rows outside the
            bound, naming the first.
    """
    manifest = labels.label_manifest
    loaded = load_model(teacher, expected_sha256=manifest.teacher_weights_sha256, allow_import=allow_import)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = loaded.to(device)
    precision.exact_fp32()
    used = _supported(manifest.precision, device)
    differences, agreed, wrong, count = 0.0, 0, [], 0
    for row_ids, inputs, stored_BC in _sample(labels, data, rows):
        logits_BC = logits_of(model, torch.from_numpy(inputs), len(inputs), used, device).numpy()
        computed_BC = np.maximum(logits_BC - logits_BC.max(axis=1, keepdims=True), np.finfo(np.float16).min)
        off_BC = np.abs(computed_BC - stored_BC)
        within_BC = off_BC <= _bound(stored_BC, manifest.precision, manifest.precision_check)
        outside_B = ~within_BC.all(axis=1)  # NaN is within nothing
        wrong += [int(row) for row in row_ids[outside_B]]
        differences = max(differences, float(np.nan_to_num(off_BC, nan=np.inf).max()))
        agreed += int((computed_BC.argmax(axis=1) == stored_BC.argmax(axis=1)).sum())
        count += len(inputs)
    if wrong:
        raise UserError(
            f"{labels.folder}: 1 fault; first: the teacher, run again, gives other logits for {len(wrong)} of {count} "
            f"sampled rows, row {wrong[0]} among them (largest difference {differences:.4g}): delete this folder, then "
            "run the stage again"
        )
    return {
        "rows": count, "precision": used, "max_abs_difference": differences, "top1_agreement": agreed / max(1, count),
        "wrong_rows": 0,
    }  # fmt: skip


def _supported(asked: str, device: torch.device) -> str:
    if asked == "fp16" and device.type != "cuda":
        return "fp32"
    return asked if asked != "bf16" or precision.has_native_bf16(device) else "fp32"


def _sample(
    labels: Store, data: Store, rows: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[np.float32]]]:
    """Row ids [B], inputs [B, *shape] and stored logits [B, C], shard by shard."""
    random = np.random.default_rng(list(labels.manifest.digest.encode()))
    twins = {(record.split, record.index): record for record in data.manifest.shards}
    records = labels.manifest.shards
    share = -(-rows // min(_SHARDS, len(records)))
    missing = rows
    for number in random.permutation(len(records)):
        if missing <= 0:
            return
        record: ShardRecord = records[int(number)]
        at = np.sort(random.choice(record.rows, size=min(share, record.rows, missing), replace=False))
        missing -= len(at)
        twin = twins[record.split, record.index]
        inputs = data.data_shard(twin).inputs[at]
        stored = labels.label_shard(record, verify=False)  # verify has just read it
        yield stored.row_ids[at], inputs, stored.logits[at].astype(np.float32)


def _bound(
    stored_BC: npt.NDArray[np.float32], made_in: str, precision_check: Mapping[str, float]
) -> npt.NDArray[np.float32]:
    """How far a logit that is computed again may lie from the stored one."""
    rounding_BC = np.abs(stored_BC) * _FLOAT16_ROUNDING
    range_B1 = np.abs(stored_BC).max(axis=1, keepdims=True)
    slack = _FP32_SLACK * (1 + range_B1)
    if made_in != "fp32":
        slack = slack + _REDUCED_SLACK * precision_check.get("max_abs_difference", 0.0)
    bound: npt.NDArray[np.float32] = rounding_BC + slack
    return bound
