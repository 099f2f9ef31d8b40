"""The rows that the trials of a search learn from, in Ray's object store: read once for all of them.

One task reads and checks the shards. Ray brings what it returns to each further node that asks for it, once, and every
process there maps it: read-only arrays, none of them a copy. Where a node that held them is lost, Ray reads them again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill_ray.artifacts import Stage
from distill_ray.config import Config, from_dict, to_dict
from distill_ray.errors import DistillRayError
from distill_ray.stages import opening
from distill_ray.store import SplitArrays, Store, read_split

_SPLITS = ("train", "validation")
_MOST_OF_STORE = 0.5  # the rest of a node's object store is for whatever else Ray keeps there
_MAX_RETRIES = 3  # of the reading task, whose node died or has lost what it returned


@dataclass(frozen=True)
class SharedRows:
    """References into the object store: plain data, which travels in a job."""

    train: Any
    validation: Any

    def open(self, split: str) -> SplitArrays:
        """The rows of a split, read-only, in memory that is shared by all processes of this node; waits for them.

        Raises:
            UserError: a damaged shard, as ``read_split``.
        """
        import ray

        try:
            rows = ray.get(self.train if split == "train" else self.validation)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DistillRayError):  # Ray's own text of it is a stack trace
                raise error.cause from None
            raise
        assert isinstance(rows, SplitArrays)
        return rows


def share(config: Config, data: Stage, labels: Stage) -> SharedRows | None:
    """Begin to read the rows, without waiting for them; None where they would fill the smallest node's object store."""
    import ray

    inputs = opening.data_store(config, data)
    targets = opening.label_store(config, labels, inputs)
    if size_bytes(inputs, targets) > _MOST_OF_STORE * free_bytes(ray.nodes(), ray.available_resources()):
        return None
    # No CPU: where the rows must be read again, trials hold them all, and each waits for the rows.
    read = ray.remote(num_cpus=0, num_returns=len(_SPLITS), max_retries=_MAX_RETRIES)(_read)
    return SharedRows(*read.remote(to_dict(config), data, labels))


def _read(raw: dict[str, Any], data: Stage, labels: Stage) -> Iterator[SplitArrays]:
    """Runs in a Ray task; a split is in this process's own memory until Ray has taken it over."""
    config = from_dict(raw)
    inputs = opening.data_store(config, data)
    targets = opening.label_store(config, labels, inputs)
    for split in _SPLITS:
        yield read_split(inputs, split, targets)


def size_bytes(data: Store, labels: Store) -> int:
    """Of the train and validation rows in memory."""
    manifest = data.data_manifest
    inputs = math.prod(manifest.shape) * np.dtype(manifest.dtype).itemsize
    ids_and_labels, logits = 2 * np.dtype(np.int64).itemsize, labels.manifest.classes * np.dtype(np.float16).itemsize
    return sum(manifest.splits[split].rows for split in _SPLITS) * (inputs + ids_and_labels + logits)


def free_bytes(nodes: Sequence[Mapping[str, Any]], available: Mapping[str, float]) -> float:
    """Of the smallest object store, were all that is used of any used there: Ray tells only of all together."""
    stores = [node["Resources"].get("object_store_memory", 0.0) for node in nodes if node["Alive"]]
    used = sum(stores) - available.get("object_store_memory", 0.0)
    return float(max(0.0, min(stores, default=0.0) - used))
