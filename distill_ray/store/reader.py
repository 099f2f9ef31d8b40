"""Reading stores: one split of a data store, zipped by row id with the logits of its label store."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_ray.errors import UserError
from distill_ray.storage import Folder
from distill_ray.store import manifest as manifests
from distill_ray.store import shards
from distill_ray.store.manifest import DataManifest, LabelManifest, ShardRecord


@dataclass(frozen=True)
class SplitArrays:
    """N rows by ascending id: inputs [N, *shape], labels int64 [N] (-1: none), logits float16 [N, C] or None."""

    row_ids: npt.NDArray[np.int64]
    inputs: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float16] | None

    def __len__(self) -> int:
        return len(self.row_ids)


class Store:
    """A finished store. Opening it reads the manifest alone."""

    def __init__(self, folder: Folder, manifest: DataManifest | LabelManifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @cached_property
    def data_manifest(self) -> DataManifest:
        """The manifest of a data store."""
        if not isinstance(self.manifest, DataManifest):
            raise UserError(f"{self.folder}: is a label store, expected a data store")
        return self.manifest

    @cached_property
    def label_manifest(self) -> LabelManifest:
        """The manifest of a label store."""
        if not isinstance(self.manifest, LabelManifest):
            raise UserError(f"{self.folder}: is a data store, expected a label store")
        return self.manifest

    def data_shard(self, record: ShardRecord, *, verify: bool = True) -> shards.DataShard:
        """One shard of a data store."""
        batch = shards.read(self.folder, record, verify=verify)
        return shards.decode_data(batch, self.data_manifest.shape)

    def label_shard(self, record: ShardRecord, *, verify: bool = True) -> shards.LabelShard:
        """One shard of a label store."""
        batch = shards.read(self.folder, record, verify=verify)
        return shards.decode_logits(batch, self.label_manifest.classes)

    def missing_shard(self) -> str | None:
        """The name of the first shard whose file is absent or has another size; one look at each file, no reading."""
        return next((s.file for s in self.manifest.shards if self.folder.size(s.file) != s.bytes), None)


def open_store(location: str | Folder) -> Store:
    """Open the store in a folder.

    Raises:
        UserError: the folder holds no finished store that this code reads.
    """
    folder = location if isinstance(location, Folder) else Folder.at(location)
    return Store(folder, manifests.read(folder))


def read_split(data: Store, split: str, labels: Store | None = None) -> SplitArrays:
    """All rows of a split in memory, every shard checked against its checksum, logits joined by row id.

    Raises:
        UserError: no such split, a damaged shard, or a label store made from other data.
    """
    if split not in data.manifest.splits:
        raise UserError(f"{data.folder}: has no split {split!r}, only {', '.join(data.manifest.splits)}")
    if labels is not None:
        check_twins(data, labels)
    parts = [data.data_shard(record) for record in data.manifest.splits[split].shards]
    row_ids = np.concatenate([part.row_ids for part in parts])
    logits = None
    if labels is not None:
        twins = [labels.label_shard(record) for record in labels.manifest.splits[split].shards]
        if not np.array_equal(row_ids, np.concatenate([twin.row_ids for twin in twins])):
            raise UserError(f"{labels.folder}: the row ids of split {split} are not those of {data.folder}")
        logits = np.concatenate([twin.logits for twin in twins])
    return SplitArrays(
        row_ids,
        np.concatenate([part.inputs for part in parts]),
        np.concatenate([part.labels for part in parts]),
        logits,
    )


def check_twins(data: Store, labels: Store) -> None:
    """Refuse a label store that was not made from this data store, naming both digests."""
    made_from, given = labels.label_manifest.data_digest, data.data_manifest.digest
    if made_from != given:
        raise UserError(
            f"{labels.folder}: was made from data {made_from}, the config's data is {given}: run `distill-ray label`"
        )
    if labels.manifest.classes != data.manifest.classes:
        raise UserError(f"{labels.folder}: has {labels.manifest.classes} classes, the data has {data.manifest.classes}")
    if set(labels.manifest.splits) != set(data.manifest.splits):
        raise UserError(
            f"{labels.folder}: has the splits {', '.join(labels.manifest.splits)}, the data has "
            f"{', '.join(data.manifest.splits)}: the store is damaged; delete its manifest.json to make it again"
        )
