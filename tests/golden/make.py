"""Writes the two golden stores with the present code: ``python -m tests.golden.make tests/golden/store-<version>``.

There is a folder for each format version, made once, with the code of that version: they are what its stores look like
on disk. The files were checked in as they came out and stay as they are. Here one sees where their bytes came from. Run
again with another pyarrow, the bytes may differ and the values may not; test_format.py compares the values.

The rows are few and each has its reason: a row without a label, one without a source id, a tie of all classes, a logit
below float16's range, one that float16 must round, one so near 0 that float16 has it as a subnormal number.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill_ray.config import InputConfig
from distill_ray.storage import Folder
from distill_ray.store import DataManifest, LabelManifest, shards
from distill_ray.store import manifest as manifests

SHAPE, CLASS_NAMES = (1, 2, 2), ("circle", "square", "star")
DATA_DIGEST, LABELS_DIGEST, TEACHER_DIGEST = "da7a" * 4, "1abe" * 4, "7eac" * 4


class Row(NamedTuple):
    """One row: the user's id, 4 pixels, the class (-1: none) and what the teacher gave, before it was stored."""

    source_id: str | None
    input: tuple[int, int, int, int]
    label: int
    logits: tuple[float, float, float]


SHARDS: dict[tuple[str, int], list[Row]] = {
    ("train", 0): [
        Row("a.png", (0, 64, 128, 255), 1, (2.0, 4.0, 1.0)),
        Row("b.png", (255, 254, 253, 252), -1, (5.0, 4.9, 3.0)),
        Row(None, (1, 2, 3, 4), 0, (0.0, -1e6, -1e-7)),
    ],
    ("train", 1): [
        Row("d.png", (0, 0, 0, 0), 2, (10.5, 10.5, 10.5)),
        Row("e.png", (9, 8, 7, 6), 2, (-700.0, -701.25, -699.5)),
    ],
    ("validation", 0): [
        Row("f.png", (16, 32, 48, 64), 0, (30000.0, 20000.0, 10000.0)),
        Row("g.png", (200, 100, 50, 25), 1, (0.1, 0.7, 0.2)),
    ],
    ("test", 0): [
        Row("h.png", (255, 0, 255, 0), 2, (-1.0, -2.0, 3.0)),
        Row("i.png", (0, 255, 0, 255), -1, (1.0, 2.0, 3.0)),
        Row("j.png", (127, 128, 129, 130), 1, (6.0, 6.0, -6.0)),
    ],
}


def make(root: Path) -> tuple[Path, Path]:
    """Write the two stores below ``root`` with the present code; their folders."""
    data, labels = Folder.at(root / f"data-{DATA_DIGEST}"), Folder.at(root / f"labels-{LABELS_DIGEST}")
    data_records, label_records, first = [], [], 0
    for (split, index), rows in SHARDS.items():
        ids = np.arange(first, first + len(rows), dtype=np.int64)
        inputs = np.array([row.input for row in rows], dtype=np.uint8).reshape(-1, *SHAPE)
        classes = np.array([row.label for row in rows], dtype=np.int64)
        logits = np.array([row.logits for row in rows], dtype=np.float32)
        batch = shards.encode_data(ids, inputs, classes, [row.source_id for row in rows])
        data_records.append(shards.write(data, split, index, batch, store=DATA_DIGEST))
        twin = shards.encode_logits(ids, logits, precision="fp32")
        label_records.append(shards.write(labels, split, index, twin, store=LABELS_DIGEST))
        first += len(rows)
    commit(data, labels, manifests.split_records(data_records), manifests.split_records(label_records))
    return data.path, labels.path


def commit(
    data: Folder,
    labels: Folder,
    data_splits: dict[str, manifests.SplitRecord],
    label_splits: dict[str, manifests.SplitRecord],
) -> None:
    """Write the two manifests."""
    data_manifest = DataManifest(
        digest=DATA_DIGEST, code_version="0.1.0", classes=len(CLASS_NAMES), class_names=CLASS_NAMES,
        splits=data_splits, source="handmade", synthetic=True, shape=SHAPE, dtype="uint8", input=InputConfig(),
        config={"source": "handmade", "rows": 10, "shard_rows": 3},
    )  # fmt: skip
    label_manifest = LabelManifest(
        digest=LABELS_DIGEST, code_version="0.1.0", classes=len(CLASS_NAMES), class_names=CLASS_NAMES,
        splits=label_splits, data_digest=DATA_DIGEST, teacher_digest=TEACHER_DIGEST,
        teacher_weights_sha256="ab" * 32, precision="fp32",
        precision_check={"rows": 5.0, "top1_agreement": 1.0, "kl": 0.0, "max_abs_difference": 0.0},
    )  # fmt: skip
    manifests.write(data, data_manifest)
    manifests.write(labels, label_manifest)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if target.exists():
        sys.exit(f"{target} is there already: a golden store is never written anew")
    for folder in make(target):
        print(folder)
