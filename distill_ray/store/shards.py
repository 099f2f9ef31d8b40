"""One shard: an Arrow IPC file of plain columns, written whole and named by its checksum.

``encode_*`` and ``decode_*`` mirror each other. A data shard and its label shard hold the same row ids in the same
order.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distill_ray.errors import RunError, UserError
from distill_ray.storage import Folder
from distill_ray.store.cache import ShardCache
from distill_ray.store.manifest import SHARD_NAME, DataManifest, LabelManifest, ShardRecord

MAX_SHARD_BYTES = 100 * 2**20
ARROW_TYPES = {"uint8": pa.uint8(), "int32": pa.int32(), "float16": pa.float16(), "float32": pa.float32()}
Ids = npt.NDArray[np.int64]
_PRECISION = b"precision"  # in the metadata of a label shard: what the teacher ran in


@dataclass(frozen=True)
class DataShard:
    """B rows: ``row_ids`` [B], ``inputs`` [B, *shape], ``labels`` [B] (-1 where there is none)."""

    row_ids: Ids
    inputs: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelShard:
    """B rows: ``row_ids`` [B], ``logits`` float16 [B, C], each row minus its maximum."""

    row_ids: Ids
    logits: npt.NDArray[np.float16]


def encode_data(
    row_ids: Ids, inputs: npt.NDArray[Any], labels: npt.NDArray[np.int64], source_ids: Any
) -> pa.RecordBatch:
    """The record batch of a data shard; ``labels`` below 0 become null."""
    flat = np.ascontiguousarray(inputs).reshape(-1)
    width = int(np.prod(inputs.shape[1:], dtype=np.int64))
    columns = {
        "row_id": pa.array(row_ids, type=pa.int64()),
        "source_id": source_ids if isinstance(source_ids, pa.Array) else pa.array(source_ids),
        "input": pa.FixedSizeListArray.from_arrays(pa.array(flat), width),
        "label": pa.array(labels, type=pa.int64(), mask=labels < 0),
    }
    batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
    return batch.replace_schema_metadata({"shape": ",".join(str(n) for n in inputs.shape[1:])})


def decode_data(batch: pa.RecordBatch, shape: tuple[int, ...]) -> DataShard:
    """Views into the batch's memory, except for the labels (their nulls become -1)."""
    inputs = batch.column("input").flatten().to_numpy(zero_copy_only=True).reshape(-1, *shape)
    labels = batch.column("label").fill_null(-1).to_numpy(zero_copy_only=False)
    return DataShard(batch.column("row_id").to_numpy(zero_copy_only=True), inputs, labels)


def encode_logits(row_ids: Ids, logits_BC: npt.NDArray[np.float32], *, precision: str) -> pa.RecordBatch:
    """The record batch of a label shard; ``precision`` is what the teacher ran in.

    The row's maximum is subtracted first: softmax does not change, and float16 keeps its precision near 0, where the
    probable classes are. What lies below float16's range (-65504) is clipped; its probability is 0 at any temperature.

    Raises:
        RunError: a logit is not finite; names the row.
    """
    bad = np.flatnonzero(~np.isfinite(logits_BC).all(axis=1))
    if bad.size:
        raise RunError(
            f"the teacher gave a non-finite logit for row {int(row_ids[bad[0]])} ({bad.size} such rows in its shard): "
            "it overflows or its weights are bad; try labels.precision=fp32, else train another"
        )
    with np.errstate(over="ignore"):  # two finite float32 can lie further apart than float32 reaches: clipped next
        shifted = logits_BC - logits_BC.max(axis=1, keepdims=True)
    stored = np.maximum(shifted, np.finfo(np.float16).min).astype(np.float16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), stored.shape[1])
    schema = pa.schema(
        [pa.field("row_id", pa.int64()), pa.field("logits", column.type)], metadata={_PRECISION: precision}
    )
    return pa.RecordBatch.from_arrays([pa.array(row_ids, type=pa.int64()), column], schema=schema)


def decode_logits(batch: pa.RecordBatch, classes: int) -> LabelShard:
    """Views into the batch's memory."""
    logits = batch.column("logits").flatten().to_numpy(zero_copy_only=True).reshape(-1, classes)
    return LabelShard(batch.column("row_id").to_numpy(zero_copy_only=True), logits)


def write(folder: Folder, split: str, index: int, batch: pa.RecordBatch, *, store: str) -> ShardRecord:
    """Write a shard of the store with the digest ``store``; writing the same content twice is harmless.

    A file that has the name already is left alone only if its content is right: so a damaged one is mended.
    """
    batch = batch.replace_schema_metadata({**(batch.schema.metadata or {}), b"store": store.encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data = sink.getvalue()
    if data.size > MAX_SHARD_BYTES:
        fits = max(1, MAX_SHARD_BYTES * batch.num_rows // data.size)
        raise UserError(
            f"data.shard_rows: a shard would hold {data.size >> 20} MiB, the limit is 100: use at most {fits}"
        )
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"{split}-{index:05d}-{sha256[:16]}.arrow"
    if folder.size(name) != data.size or not folder.buffer(name).equals(data):
        folder.write_bytes(name, data)
    return _record(split, index, name, batch, data.size, sha256)


def read(folder: Folder, record: ShardRecord, *, verify: bool, cache: ShardCache | None = None) -> pa.RecordBatch:
    """Read a shard that a manifest names, memory-mapped where it is local; ``cache`` keeps copies of remote ones.

    Raises:
        UserError: the file is missing, or is not what the manifest says (size, and checksum where ``verify``; a remote
            one is always checked).
    """
    place = folder.location(record.file)
    checked = False
    try:
        if cache is None or folder.is_local:
            buffer = folder.buffer(record.file)
        else:
            buffer, checked = cache.get(record.sha256, record.bytes, lambda: folder.buffer(record.file))
    except FileNotFoundError:
        raise UserError(
            f"{place}: missing shard: the store is damaged; delete its manifest.json to make it again"
        ) from None
    # That it was checked before holds for a file; what comes from an object store again may be another.
    verify = (verify or not folder.is_local) and not checked
    if buffer.size != record.bytes or (verify and hashlib.sha256(buffer).hexdigest() != record.sha256):
        raise UserError(
            f"{place}: damaged shard (its checksum is not the manifest's); delete it and manifest.json to make it again"
        )
    return _only_batch(buffer, place)


def recover(folder: Folder, name: str, *, store: str | None, precision: str | None = None) -> ShardRecord | None:
    """The record of a shard that was left, None where the file is not whole or not of ``store`` (None: of any).

    ``precision``, where it is given, is what a label shard must have been made in: a job that goes on obeys the one
    that began, and two that run on different hardware do not mix theirs.

    The name carries the checksum of the content and the content the store's digest, so a file proves by itself that it
    is complete and where it belongs.
    """
    match = SHARD_NAME.match(name)
    if match is None:
        return None
    buffer = folder.buffer(name)
    sha256 = hashlib.sha256(buffer).hexdigest()
    if sha256[:16] != match["checksum"]:
        return None
    batch = _only_batch(buffer, folder.location(name))
    column = batch.schema.get_field_index("row_id")
    if batch.num_rows == 0 or column < 0 or batch.schema.field(column).type != pa.int64():
        return None
    metadata = batch.schema.metadata or {}
    if store is not None and metadata.get(b"store") != store.encode():
        return None
    said = metadata.get(_PRECISION)
    if precision is not None and said != precision.encode() and not (store is None and said is None):  # before 1.2
        return None
    record = _record(match["split"], int(match["index"]), name, batch, buffer.size, sha256)
    return record if ids_fault(batch, record) is None else None


def precision_of(folder: Folder, name: str) -> str | None:
    """What a label shard says it was made in; None of one from before version 1.2.

    Raises:
        UserError: it is no shard.
    """
    said = (_only_batch(folder.buffer(name), folder.location(name)).schema.metadata or {}).get(_PRECISION)
    return None if said is None else said.decode(errors="replace")


def ids_fault(batch: pa.RecordBatch, record: ShardRecord) -> str | None:
    """Whether the row ids are other than the manifest says."""
    ids = batch.column("row_id").to_numpy(zero_copy_only=True)
    if len(ids) != record.rows:
        return f"holds {len(ids)} rows, the manifest says {record.rows}"
    spanned = record.last_id - record.first_id + 1  # compared first: a forged range may be longer than memory
    if spanned != record.rows or not np.array_equal(ids, np.arange(record.first_id, record.last_id + 1)):
        return f"its row ids are not {record.first_id} to {record.last_id}, one by one"
    return None


def labels_fault(batch: pa.RecordBatch, classes: int) -> str | None:
    """Whether a label is none of the classes; a row without one has a null."""
    labels = batch.column("label").drop_null().to_numpy()
    beyond = labels[(labels < 0) | (labels >= classes)]
    if not len(beyond):
        return None
    return f"label {beyond[0]} is out of range for {classes} classes ({len(beyond)} such rows)"


def column_fault(batch: pa.RecordBatch, manifest: DataManifest | LabelManifest) -> str | None:
    """The first column that is not as FORMAT.md has it. Columns that a newer minor version added are ignored."""
    raw = batch.schema.metadata or {}
    metadata = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in raw.items()}
    if metadata.get("store", manifest.digest) != manifest.digest:  # shards of version 1.0 do not say
        return f"belongs to the store {metadata['store']}, this is {manifest.digest}"
    wanted: dict[str, pa.DataType] = {"row_id": pa.int64()}
    if isinstance(manifest, DataManifest):
        width = int(np.prod(manifest.shape, dtype=np.int64))
        wanted |= {"input": pa.list_(ARROW_TYPES.get(manifest.dtype, pa.null()), width), "label": pa.int64()}
        shape = ",".join(str(n) for n in manifest.shape)
        if (said := metadata.get("shape", "none")) != shape:
            return f"its metadata has shape {said}, the manifest {shape}"
    else:
        wanted["logits"] = pa.list_(pa.float16(), manifest.classes)
        if (made_in := metadata.get("precision", manifest.precision)) != manifest.precision:  # before 1.2: unsaid
            return f"was made in {made_in}, the manifest says {manifest.precision}"
    for name, kind in wanted.items():
        number = batch.schema.get_all_field_indices(name)
        if len(number) != 1:
            return f"has {len(number)} columns {name!r} instead of one"
        column = batch.column(number[0])
        if not _same_type(column.type, kind):
            return f"column {name!r} is {column.type}, expected {kind}"
        if name != "label" and (column.null_count or _inner_nulls(column)):
            return f"column {name!r} holds nulls"
    return None


def _same_type(found: pa.DataType, wanted: pa.DataType) -> bool:
    if not pa.types.is_fixed_size_list(wanted):
        return bool(found == wanted)
    # The name of a list's inner field does not count.
    return bool(
        pa.types.is_fixed_size_list(found)
        and found.value_type == wanted.value_type
        and found.list_size == wanted.list_size
    )


def _inner_nulls(column: pa.Array) -> bool:
    return bool(pa.types.is_fixed_size_list(column.type) and column.flatten().null_count)


def _record(split: str, index: int, name: str, batch: pa.RecordBatch, size: int, sha256: str) -> ShardRecord:
    ids = batch.column("row_id")
    return ShardRecord(
        split=split, index=index, file=name, rows=batch.num_rows, first_id=ids[0].as_py(), last_id=ids[-1].as_py(),
        bytes=size, sha256=sha256,
    )  # fmt: skip


def _only_batch(buffer: pa.Buffer, place: str) -> pa.RecordBatch:
    try:
        reader = pa.ipc.open_file(buffer)
        if reader.num_record_batches != 1:
            raise UserError(f"{place}: holds {reader.num_record_batches} record batches, a shard has one")
        batch = reader.get_batch(0)
        batch.validate()
    except (pa.ArrowException, OSError) as error:  # Arrow reports some broken files as OSError
        raise UserError(f"{place}: is not an Arrow IPC file ({' '.join(str(error).split())})") from None
    return batch
