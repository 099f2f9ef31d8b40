"""Small stores, written with the real writer and without Ray: 60 rows, 5 classes, 9 shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distill_ray.config import InputConfig
from distill_ray.storage import Folder
from distill_ray.store import DataManifest, LabelManifest, ShardRecord, Store, open_store, shards
from distill_ray.store import manifest as manifests

CLASSES, SHAPE = 5, (1, 4, 4)
SPLITS = {"train": 36, "validation": 12, "test": 12}
SHARD_ROWS = 8
DATA_DIGEST, TEACHER_DIGEST, LABELS_DIGEST = "da7a" * 4, "7eac" * 4, "1abe" * 4
WEIGHTS = "ab" * 32


def plan() -> list[tuple[str, int, npt.NDArray[np.int64]]]:
    """(split, index, row ids) of each shard."""
    planned, first = [], 0
    for split, rows in SPLITS.items():
        for index, start in enumerate(range(0, rows, SHARD_ROWS)):
            ids = np.arange(first + start, first + min(start + SHARD_ROWS, rows), dtype=np.int64)
            planned.append((split, index, ids))
        first += rows
    return planned


def labels_of(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return ids * 7 % CLASSES


def data_batch(ids: npt.NDArray[np.int64], seed: int = 0) -> pa.RecordBatch:
    inputs = np.random.default_rng((seed, int(ids[0]))).integers(0, 256, (len(ids), *SHAPE), dtype=np.uint8)
    return shards.encode_data(ids, inputs, labels_of(ids), [f"mine/{row}" for row in ids])


def logits_of(ids: npt.NDArray[np.int64], wrong: int = 0, seed: int = 0) -> npt.NDArray[np.float32]:
    """Logits whose largest is the label's, except for the rows whose id is a multiple of ``wrong``."""
    logits = np.random.default_rng((seed, int(ids[0]))).normal(0, 1, (len(ids), CLASSES)).astype(np.float32)
    winners = labels_of(ids)
    if wrong:
        winners = np.where(ids % wrong == 0, (winners + 1) % CLASSES, winners)
    logits[np.arange(len(ids)), winners] = 9.0
    return logits


def label_batch(ids: npt.NDArray[np.int64], wrong: int = 0) -> pa.RecordBatch:
    return shards.encode_logits(ids, logits_of(ids, wrong), precision="fp32")


def data_manifest(records: list[ShardRecord]) -> DataManifest:
    """The manifest of a data store of these shards, not yet written."""
    return DataManifest(
        digest=DATA_DIGEST, code_version="0", classes=CLASSES, class_names=tuple("abcde"),
        splits=manifests.split_records(records), source="test", synthetic=True, shape=SHAPE, dtype="uint8",
        input=InputConfig(), config={},
    )  # fmt: skip


def commit_data(folder: Folder, records: list[ShardRecord], **changes: Any) -> Store:
    """Write the manifest of a data store."""
    manifests.write(folder, data_manifest(records).model_copy(update=changes))
    return open_store(folder)


def commit_labels(folder: Folder, records: list[ShardRecord], **changes: Any) -> Store:
    """Write the manifest of a label store."""
    manifest = LabelManifest(
        digest=LABELS_DIGEST, code_version="0", classes=CLASSES, class_names=tuple("abcde"),
        splits=manifests.split_records(records), data_digest=DATA_DIGEST, teacher_digest=TEACHER_DIGEST,
        teacher_weights_sha256=WEIGHTS, precision="fp32", precision_check={"rows": 8.0, "kl": 0.0},
    )  # fmt: skip
    manifests.write(folder, manifest.model_copy(update=changes))
    return open_store(folder)


def make_data(artifacts: Path, digest: str = DATA_DIGEST, seed: int = 0) -> Store:
    folder = Folder.at(artifacts / f"data-{digest}")
    records = [shards.write(folder, split, index, data_batch(ids, seed), store=digest) for split, index, ids in plan()]
    return commit_data(folder, records, digest=digest)


def make_labels(artifacts: Path, digest: str = LABELS_DIGEST, wrong: int = 0, **changes: Any) -> Store:
    folder = Folder.at(artifacts / f"labels-{digest}")
    records = [
        shards.write(folder, split, index, label_batch(ids, wrong), store=digest) for split, index, ids in plan()
    ]
    return commit_labels(folder, records, digest=digest, **changes)


def file_of(store: Store, number: int = 0) -> Path:
    """The path of a shard, by its place in the manifest."""
    return store.folder.path / store.manifest.shards[number].file


def flip_byte(path: Path, position: int | None = None) -> None:
    """Change one byte and nothing else: the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 0x40
    path.write_bytes(data)
