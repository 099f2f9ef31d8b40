"""The input contract that a data store is made with: what the config gives, and what follows from the rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_ray.config import BuiltinData, DataBase, InputConfig, InputWish, OwnData
from distill_ray.errors import UserError
from distill_ray.sources import SourceInfo
from distill_ray.stages.shard_job import run_items
from distill_ray.storage import Folder
from distill_ray.store import ShardRecord, shards

_STEP_BYTES = 4 * 2**20  # of a shard, in float64 at a time
Moments = tuple[
    float, npt.NDArray[np.float64], npt.NDArray[np.float64]
]  # count, mean [C], sum of squared deviations [C]


def check(data: DataBase, info: SourceInfo) -> None:
    """Refuse numbers that do not fit the rows.

    Raises:
        UserError: another shape than the rows have, or means for other channels.
    """
    wish = wanted(data)
    if wish.shape is not None and wish.shape != info.shape:
        raise UserError(f"data.input.shape: {list(wish.shape)}, but the rows of this source are {list(info.shape)}")
    for key in ("mean", "std"):
        given = getattr(wish, key)
        if isinstance(given, tuple) and len(given) not in (1, info.shape[0]):
            raise UserError(
                f"data.input.{key}: {len(given)} numbers for {info.shape[0]} channels: give 1 or {info.shape[0]}"
            )


def wanted(data: DataBase) -> InputConfig | InputWish:
    """What the config says."""
    assert isinstance(data, BuiltinData | OwnData)
    return data.input


def settled(data: DataBase, info: SourceInfo, folder: Folder, train: Sequence[ShardRecord]) -> InputConfig:
    """The contract in numbers; ``auto`` ones are measured on the training shards, which are written by now."""
    wish = wanted(data)
    if isinstance(wish, InputConfig):
        return wish
    picture = info.dtype == "uint8" and len(info.shape) == 3
    scale = wish.scale if wish.scale is not None else 1 / 255 if picture else 1.0
    mean = wish.mean if wish.mean is not None else (0.5,) if picture else (0.0,)
    std = wish.std if wish.std is not None else (0.5,) if picture else (1.0,)
    if "auto" in (mean, std):
        measured_mean, measured_std = measure(folder, train, scale)
        mean = measured_mean if mean == "auto" else mean
        std = measured_std if std == "auto" else std
    assert not isinstance(mean, str)
    assert not isinstance(std, str)
    return InputConfig(shape=wish.shape, scale=scale, mean=mean, std=std, resize=wish.resize, channels=wish.channels)


def measure(folder: Folder, train: Sequence[ShardRecord], scale: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of ``raw * scale`` per channel; 1 for a channel that never changes.

    Shard by shard, joined in the shards' order (Chan, Golub, LeVeque 1983): the same whatever the workers.
    """
    items = [{"record": record.model_dump_json()} for record in train]
    answers = [json.loads(text) for text in run_items("prepare", items, shard_moments, {"folder": folder.uri})]
    whole: Moments | None = None
    for answer in sorted(answers, key=lambda answer: answer["index"]):
        part = (answer["count"], np.asarray(answer["mean"]), np.asarray(answer["squares"]))
        whole = part if whole is None else joined(whole, part)
    assert whole is not None, "a training split has a shard"
    count, mean, squares = whole
    std = np.sqrt(squares / count)
    std[std < 1e-12 * np.maximum(1, np.abs(mean))] = 1 / scale
    return tuple((mean * scale).tolist()), tuple((std * scale).tolist())


def shard_moments(item: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    """Runs in a Ray Data task: the moments of one shard."""
    folder, record = Folder(arguments["folder"]), ShardRecord.model_validate_json(item["record"])
    batch = shards.read(folder, record, verify=False)
    shape = tuple(int(n) for n in batch.schema.metadata[b"shape"].decode().split(","))
    count, mean, squares = moments(shards.decode_data(batch, shape).inputs)
    return json.dumps({"index": record.index, "count": count, "mean": mean.tolist(), "squares": squares.tolist()})


def moments(inputs: npt.NDArray[Any]) -> Moments:
    """Of ``inputs`` [B, C, ...]: how many numbers a channel has, their means and sums of squared deviations [C]."""
    rows = max(1, _STEP_BYTES // max(1, inputs[0].size * 8))
    whole: Moments | None = None
    for start in range(0, len(inputs), rows):
        part = (
            inputs[start : start + rows].astype(np.float64).reshape(-1, inputs.shape[1], int(np.prod(inputs.shape[2:])))
        )
        mean = part.mean(axis=(0, 2))
        squares = np.square(part - mean[:, np.newaxis]).sum(axis=(0, 2))
        found = (float(part.shape[0] * part.shape[2]), mean, squares)
        whole = found if whole is None else joined(whole, found)
    assert whole is not None
    return whole


def joined(one: Moments, two: Moments) -> Moments:
    """The moments of two parts together."""
    count = one[0] + two[0]
    apart = two[1] - one[1]
    return count, one[1] + apart * two[0] / count, one[2] + two[2] + np.square(apart) * one[0] * two[0] / count
