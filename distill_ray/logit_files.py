"""Logits that somebody computed already: Parquet files or .npy arrays, read a batch at a time.

Shapes: N rows of the file, B rows of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs

from distill_ray.errors import UserError
from distill_ray.storage import reason_of

BATCH_ROWS = 65_536
_ROOM_BYTES = 2**28  # of a batch of many classes


@dataclass(frozen=True)
class LogitBatch:
    """``ids`` [B] as an Arrow array, None where the file has none and its rows count from ``first``."""

    first: int
    ids: pa.Array | None
    values: npt.NDArray[np.float32]  # [B, C]


def fingerprint(location: str) -> list[list[Any]]:
    """Name, size and time of the last change of a file, or of each file in a folder.

    Raises:
        UserError: there is none.
    """
    filesystem, path = _filesystem(location)
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise UserError(f"labels.from {location}: no such file or folder")
    if info.type == pafs.FileType.Directory:
        found = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
        return sorted([i.path[len(path) :], i.size, i.mtime_ns] for i in found if i.type == pafs.FileType.File)
    return [[info.base_name, info.size, info.mtime_ns]]


def read(location: str, ids: str | None, by: str, class_names: Sequence[str]) -> Iterator[LogitBatch]:
    """The rows of ``location`` in the file's order.

    Raises:
        UserError: a file is damaged, or does not hold one number a class; ``by`` names the column of ids.
    """
    if location.endswith(".npy"):
        return _read_npy(location, ids, len(class_names))
    if ids is not None:
        raise UserError(f"labels.ids {ids}: is for .npy files; a Parquet file has its ids in the column {by}")
    return _read_parquet(location, by, class_names)


def _filesystem(location: str) -> tuple[pafs.FileSystem, str]:
    if "://" in location:
        filesystem, path = pafs.FileSystem.from_uri(location)
        return filesystem, path
    return pafs.LocalFileSystem(), location


# --- .npy -----------------------------------------------------------------------------------------------------------


def _read_npy(location: str, ids: str | None, classes: int) -> Iterator[LogitBatch]:
    values = _mapped(location, "labels.from")
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise UserError(
            f"labels.from {location}: is {values.dtype}{list(values.shape)}, expected numbers [rows, classes]"
        )
    if values.shape[1] != classes:
        raise UserError(f"labels.from {location}: has {values.shape[1]} numbers a row, the data has {classes} classes")
    names = None if ids is None else _mapped(ids, "labels.ids")
    if names is not None and (names.ndim != 1 or len(names) != len(values)):
        raise UserError(f"labels.ids {ids}: is {list(names.shape)}, expected one id for each of the {len(values)} rows")
    step = _rows_at_once(classes)
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        chosen = None if names is None else pa.array(names[part])
        yield LogitBatch(start, chosen, np.asarray(values[part], dtype=np.float32))


def _mapped(location: str, key: str) -> npt.NDArray[Any]:
    if "://" in location:
        raise UserError(f"{key} {location}: .npy files are read from local paths: copy it, or use Parquet")
    try:
        array: npt.NDArray[Any] = np.load(Path(location), mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{key} {location}: is no whole .npy array of numbers or text ({_line(error)})") from None
    except OSError as error:
        raise UserError(f"{key} {location}: cannot be read ({reason_of(error)})") from None
    return array


# --- Parquet --------------------------------------------------------------------------------------------------------


def _read_parquet(location: str, by: str, class_names: Sequence[str]) -> Iterator[LogitBatch]:
    filesystem, path = _filesystem(location)
    first = 0
    try:
        dataset = pads.dataset(path, filesystem=filesystem, format="parquet")
        columns = _columns(dataset.schema, location, by, class_names)
        rows = _rows_at_once(len(class_names))
        for batch in dataset.scanner(columns=[by, *columns], batch_size=rows).to_batches():
            if batch.num_rows:
                yield LogitBatch(first, batch.column(0), _values(batch, columns, len(class_names), location, first))
            first += batch.num_rows
    except (pa.ArrowException, OSError) as error:  # Arrow reports some broken files as OSError
        raise UserError(f"labels.from {location}: is no whole Parquet file ({_line(error)[:200]})") from None


def _columns(schema: pa.Schema, location: str, by: str, class_names: Sequence[str]) -> list[str]:
    """The columns that hold the numbers: a list column, or one column a class in the order of the data's classes."""
    place = f"labels.from {location}"
    if by not in schema.names:
        raise UserError(f"{place}: has no column {by!r}, only {', '.join(schema.names)[:200]}: labels.by names the ids")
    others = [field for field in schema if field.name != by]
    lists = [field.name for field in others if _is_list(field.type)]
    if lists:
        if len(lists) > 1 and "logits" not in lists:
            raise UserError(
                f"{place}: has several list columns ({', '.join(lists)}): call the one with logits 'logits'"
            )
        return ["logits"] if "logits" in lists else lists
    if set(class_names) <= {field.name for field in others}:
        return list(class_names)
    numbers = [field.name for field in others if pa.types.is_floating(field.type)]
    if len(numbers) != len(class_names):
        raise UserError(
            f"{place}: has {len(numbers)} columns of floats ({', '.join(numbers)[:200]}), the data has "
            f"{len(class_names)} classes: name the columns as the classes, or use a list column 'logits'"
        )
    return numbers


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _values(
    batch: pa.RecordBatch, columns: Sequence[str], classes: int, location: str, first: int
) -> npt.NDArray[np.float32]:
    """The numbers of a batch [B, C]; a null becomes NaN, which is refused later with the row's id."""
    if len(columns) > 1 or not _is_list(batch.column(1).type):
        parts = [batch.column(i).cast(pa.float32()).to_numpy(zero_copy_only=False) for i in range(1, batch.num_columns)]
        return np.stack(parts, axis=1)
    column = batch.column(1)
    lengths = pc.list_value_length(column).fill_null(-1).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(lengths != classes)
    if len(wrong):
        held = "no numbers" if lengths[wrong[0]] < 0 else f"{lengths[wrong[0]]} numbers"
        raise UserError(f"labels.from {location}: row {first + wrong[0]} has {held}, the data has {classes} classes")
    flat = column.flatten().cast(pa.float32()).to_numpy(zero_copy_only=False)
    values: npt.NDArray[np.float32] = flat.reshape(-1, classes)
    return values


def _rows_at_once(classes: int) -> int:
    return max(1, min(BATCH_ROWS, _ROOM_BYTES // (4 * classes)))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
