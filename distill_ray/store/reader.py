"""Reading stores: one split of a data store, zipped by row id with the logits of its label store."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distill_ray.errors import UserError
from distill_ray.storage import Folder
from distill_ray.store import manifest as manifests
from distill_ray.store import shards
from distill_ray.store.cache import ShardCache
from distill_ray.store.manifest import DataManifest, LabelManifest, ShardRecord

_REMEDY = "delete that folder, the same command makes it again"


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

    def __init__(self, folder: Folder, manifest: DataManifest | LabelManifest, cache: ShardCache | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self._cache = cache

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
        """One shard of a data store, in memory that is mapped or shared: read-only."""
        manifest = self.data_manifest
        batch = self.batch(record, verify=verify)
        wrong = shards.labels_fault(batch, manifest.classes)
        if wrong is not None:
            raise UserError(f"{self.folder.location(record.file)}: {wrong}: run distill-ray verify on its store")
        return shards.decode_data(batch, manifest.shape)

    def label_shard(self, record: ShardRecord, *, verify: bool = True) -> shards.LabelShard:
        """One shard of a label store, in memory that is mapped or shared: read-only."""
        return shards.decode_logits(self.batch(record, verify=verify), self.label_manifest.classes)

    def batch(self, record: ShardRecord, *, verify: bool = True) -> pa.RecordBatch:
        """The columns of one shard; a remote one by way of the local cache, if the store was opened with one.

        Raises:
            UserError: the file is missing, or is not what the manifest says (size, columns, row ids, and checksum where
                ``verify``).
        """
        batch = shards.read(self.folder, record, verify=verify, cache=self._cache)
        wrong = shards.column_fault(batch, self.manifest) or shards.ids_fault(batch, record)
        if wrong is not None:
            raise UserError(f"{self.folder.location(record.file)}: {wrong}: run distill-ray verify on its store")
        return batch

    def missing_shard(self) -> str | None:
        """The name of the first shard whose file is absent or has another size; one listing, no reading."""
        sizes = self.folder.sizes()
        return next((shard.file for shard in self.manifest.shards if sizes.get(shard.file) != shard.bytes), None)


def open_store(location: str | Folder, cache: ShardCache | None = None) -> Store:
    """Open the store in a folder; ``cache`` keeps local copies of the shards where the folder is remote.

    Raises:
        UserError: the folder holds no finished store that this code reads.
    """
    folder = location if isinstance(location, Folder) else Folder.at(location)
    return Store(folder, manifests.read(folder), cache)


def read_shards(data: Store, split: str, labels: Store | None = None) -> Iterator[SplitArrays]:
    """The rows of a split shard by shard, each checked against its checksum, logits joined by row id.

    The arrays are views of mapped files or of one shard's memory: read-only, and what is held does not grow with the
    number of shards.

    Raises:
        UserError: no such split, a damaged shard, or a label store made from other data.
    """
    for record, twin in _pairs(data, split, labels):
        yield _joined(data, record, labels, twin, verify=True)


class StoredSplit:
    """A split that stays in its shards: any of them are read into memory together when they are asked for.

    ``window_rows`` is how many rows a reader of all of it should hold at a time. A shard's checksum is checked when the
    shard is first read by this process.
    """

    def __init__(self, data: Store, split: str, labels: Store | None, window_rows: int) -> None:
        self._data, self._labels = data, labels
        self._pairs = list(_pairs(data, split, labels))
        self._checked: set[int] = set()
        self.window_rows = window_rows
        self.shard_rows = [record.rows for record, _ in self._pairs]

    def load(self, numbers: Sequence[int]) -> SplitArrays:
        """The rows of these shards, end to end, in memory of their own.

        Raises:
            UserError: a damaged shard.
        """
        whole: SplitArrays | None = None
        start = 0
        for number in numbers:
            record, twin = self._pairs[number]
            part = _joined(self._data, record, self._labels, twin, verify=number not in self._checked)
            self._checked.add(number)
            if whole is None:
                whole = _room_for(sum(self.shard_rows[n] for n in numbers), part, empty=_own_pages)
            _fill(whole, start, part)
            start += len(part)
        assert whole is not None, "a window has at least one shard"
        return whole


def read_split(data: Store, split: str, labels: Store | None = None) -> SplitArrays:
    """All rows of a split in memory, every shard checked against its checksum, logits joined by row id.

    Raises:
        UserError: no such split, a damaged shard, or a label store made from other data.
    """
    whole: SplitArrays | None = None
    start = 0
    for part in read_shards(data, split, labels):
        if whole is None:
            whole = _room_for(data.manifest.splits[split].rows, part)
        _fill(whole, start, part)
        start += len(part)
    if whole is None:
        raise UserError(f"{data.folder}: split {split} has no shards: {_REMEDY}")
    return whole


def _pairs(data: Store, split: str, labels: Store | None) -> Iterator[tuple[ShardRecord, ShardRecord | None]]:
    """Each data shard of a split with its twin."""
    if split not in data.manifest.splits:
        raise UserError(f"{data.folder}: has no split {split!r}, only {', '.join(data.manifest.splits)}")
    records = _records(data, split)
    twins: tuple[ShardRecord | None, ...] = (None,) * len(records)
    if labels is not None:
        check_twins(data, labels)
        twins = _records(labels, split)
        if len(twins) != len(records):
            raise UserError(
                f"{labels.folder}: has {len(twins)} shards of split {split}, {data.folder} has {len(records)}"
            )
    return zip(records, twins, strict=True)


def _joined(
    data: Store, record: ShardRecord, labels: Store | None, twin: ShardRecord | None, *, verify: bool
) -> SplitArrays:
    """The rows of one data shard with the logits of its twin."""
    part = data.data_shard(record, verify=verify)
    if labels is None or twin is None:
        return SplitArrays(part.row_ids, part.inputs, part.labels, None)
    labelled = labels.label_shard(twin, verify=verify)
    if not np.array_equal(part.row_ids, labelled.row_ids):
        raise UserError(
            f"{labels.folder.location(twin.file)}: its row ids are not those of "
            f"{data.folder.location(record.file)}: run distill-ray verify on both stores"
        )
    return SplitArrays(part.row_ids, part.inputs, part.labels, labelled.logits)


def _fill(whole: SplitArrays, start: int, part: SplitArrays) -> None:
    stop = start + len(part)
    whole.row_ids[start:stop] = part.row_ids
    whole.inputs[start:stop] = part.inputs
    whole.labels[start:stop] = part.labels
    if whole.logits is not None:
        whole.logits[start:stop] = part.logits


def _records(store: Store, split: str) -> tuple[ShardRecord, ...]:
    """The shards of a split, which must hold as many rows as the manifest says of it."""
    said, records = store.manifest.splits[split].rows, store.manifest.splits[split].shards
    held = sum(record.rows for record in records)
    if said != held:
        raise UserError(f"{store.folder}: split {split} has {said} rows, but its shards hold {held}: {_REMEDY}")
    return records


def _room_for(rows: int, like: SplitArrays, empty: Callable[..., npt.NDArray[Any]] = np.empty) -> SplitArrays:
    """Arrays for ``rows`` rows that are still to be filled: shard by shard, so that no shard is in memory twice."""
    logits = None if like.logits is None else empty((rows, *like.logits.shape[1:]), dtype=np.float16)
    return SplitArrays(
        empty((rows,), dtype=np.int64),
        empty((rows, *like.inputs.shape[1:]), dtype=like.inputs.dtype),
        empty((rows,), dtype=np.int64),
        logits,
    )


def _own_pages(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array that gives its memory back to the system when it is gone, whatever malloc is told to keep.

    A training holds window after window between the activations of its batches; malloc's heap would grow with the holes
    that they leave (see memory.keep_freed_memory).
    """
    count = int(np.prod(shape, dtype=np.int64))
    pages = mmap.mmap(-1, max(1, count * np.dtype(dtype).itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype=dtype, count=count).reshape(shape)


def check_identity(store: Store, digest: str, remedy: str) -> None:
    """Refuse a store that is not the one asked for, naming both digests; there is no way around it.

    Raises:
        UserError: says which store the folder holds, and ``remedy``.
    """
    if store.manifest.digest != digest:
        held = f"holds the store {store.manifest.kind}-{store.manifest.digest}"
        raise UserError(f"{store.folder}: {held}, the config's is {store.manifest.kind}-{digest}: {remedy}")


def check_twins(data: Store, labels: Store) -> None:
    """Refuse a label store that was not made from this data store, naming both digests."""
    made_from, given = labels.label_manifest.data_digest, data.data_manifest.digest
    if made_from != given:
        raise UserError(
            f"{labels.folder}: was made from data {made_from}, the config's data is {given}: run `distill-ray label`"
        )
    if labels.manifest.classes != data.manifest.classes:
        raise UserError(
            f"{labels.folder}: has {labels.manifest.classes} classes, the data {given} has {data.manifest.classes}: "
            f"{_REMEDY}"
        )
    if labels.manifest.class_names != data.manifest.class_names:
        raise UserError(f"{labels.folder}: its classes have other names than those of the data {given}: {_REMEDY}")
    if set(labels.manifest.splits) != set(data.manifest.splits):
        raise UserError(
            f"{labels.folder}: has the splits {', '.join(labels.manifest.splits)}, the data has "
            f"{', '.join(data.manifest.splits)}: {_REMEDY}"
        )
