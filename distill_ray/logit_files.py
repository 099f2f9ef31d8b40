"""Logits that somebody computed already: Parquet files or .npy arrays, read a batch at a time.

Shapes: N rows of the file, B rows of a batch, W numbers of a row: those of the data's classes, or of labels.classes.
"""

from __future__ import annotations

import re
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
    values: npt.NDArray[np.float32]  # [B, W]


@dataclass(frozen=True)
class Outputs:
    """What the numbers of a row stand for, in order: the classes of the data, or those ``said`` by labels.classes."""

    names: tuple[str, ...]
    said: bool = False

    @property
    def count(self) -> int:
        """How many numbers a row has."""
        return len(self.names)

    def __str__(self) -> str:
        return f"labels.classes names {self.count}" if self.said else f"the data has {self.count} classes"


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


def read(location: str, ids: str | None, by: str, outputs: Outputs) -> Iterator[LogitBatch]:
    """The rows of ``location`` in the file's order, their numbers in that of ``outputs``.

    Raises:
        UserError: a file is damaged, or does not hold one number a class; ``by`` names the column of ids.
    """
    if location.endswith(".npy"):
        return _read_npy(location, ids, outputs)
    if ids is not None:
        raise UserError(f"labels.ids {ids}: is for .npy files; a Parquet file has its ids in the column {by}")
    return _read_parquet(location, by, outputs)


def _filesystem(location: str) -> tuple[pafs.FileSystem, str]:
    if "://" in location:
        filesystem, path = pafs.FileSystem.from_uri(location)
        return filesystem, path
    return pafs.LocalFileSystem(), location


# --- .npy -----------------------------------------------------------------------------------------------------------


def _read_npy(location: str, ids: str | None, outputs: Outputs) -> Iterator[LogitBatch]:
    values = _mapped(location, "labels.from")
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise UserError(
            f"labels.from {location}: is {values.dtype}{list(values.shape)}, expected numbers [rows, classes]"
        )
    if values.shape[1] != outputs.count:
        raise UserError(
            f"labels.from {location}: has {values.shape[1]} numbers a row, {outputs}: give one number for each, or "
            "name what they stand for in labels.classes"
        )
    names = None if ids is None else _mapped(ids, "labels.ids")
    if names is not None and (names.ndim != 1 or len(names) != len(values)):
        raise UserError(f"labels.ids {ids}: is {list(names.shape)}, expected one id for each of the {len(values)} rows")
    if names is not None and names.dtype.kind not in "iufUS":
        raise UserError(f"labels.ids {ids}: holds {names.dtype}: save the ids as numbers or text")
    step = _rows_at_once(outputs.count)
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        chosen = None if names is None else pa.array(names[part])
        with np.errstate(over="ignore"):  # it becomes infinite, which is refused with the row's id
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


def _read_parquet(location: str, by: str, outputs: Outputs) -> Iterator[LogitBatch]:
    filesystem, path = _filesystem(location)
    first, place = 0, f"labels.from {location}"
    try:
        files = _parquet_files(filesystem, path) or path
        for file in pads.dataset(files, filesystem=filesystem, format="parquet").get_fragments():
            place, schema = f"labels.from {file.path}", file.physical_schema  # its own, where files differ
            columns = _columns(schema, place, by, outputs)
            scanner = file.scanner(schema=schema, columns=[by, *columns], batch_size=_rows_at_once(outputs.count))
            for batch in scanner.to_batches():
                if batch.num_rows:
                    yield LogitBatch(first, batch.column(0), _values(batch, columns, outputs, place, first))
                first += batch.num_rows
    except (pa.ArrowException, OSError) as error:  # Arrow reports some broken files as OSError
        raise UserError(f"{place}: is no whole Parquet file ({_line(error)[:200]})") from None


def _parquet_files(filesystem: pafs.FileSystem, path: str) -> list[str]:
    """The files of a folder that are called .parquet, by name; empty where none is, or it is no folder."""
    if filesystem.get_file_info(path).type != pafs.FileType.Directory:
        return []
    found = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    names = {entry.path: entry.path[len(path) :].strip("/").split("/") for entry in found if entry.is_file}
    return sorted(
        entry for entry, parts in names.items()
        if entry.lower().endswith(".parquet") and not any(part.startswith((".", "_")) for part in parts)
    )  # fmt: skip


def _columns(schema: pa.Schema, place: str, by: str, outputs: Outputs) -> list[str]:
    """The columns that hold the numbers: a list column, or one column a class in the order of ``outputs``.

    A column says its class by its name: the class's, or that in a text that all of them share (``prob_cat``), or else
    its number (``logit_0``). The order in the file counts where labels.classes says what it is.
    """
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
    if set(outputs.names) <= {field.name for field in others}:
        return list(outputs.names)
    numbers = [field.name for field in others if pa.types.is_floating(field.type)]
    sets = _by_class(numbers, outputs.names) or _by_number(numbers, outputs.count)
    if len(sets) > 1:
        several = ", ".join(columns[0] for columns in sets)[:200]
        raise UserError(f"{place}: has several columns of floats for one class ({several}): remove all but one")
    if not sets and (not outputs.said or len(numbers) != outputs.count):
        raise UserError(
            f"{place}: has {len(numbers)} columns of floats ({', '.join(numbers)[:200]}), {outputs}: name the columns "
            "as the classes, use a list column 'logits', or say what the columns are, in their order, in labels.classes"
        )
    return sets[0] if sets else numbers


def _by_class(columns: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """Each set of columns whose names differ by the classes' names alone, in the order of those."""
    affixes = {
        (column[: found.start()], column[found.start() + len(names[0]) :])
        for column in columns
        for found in re.finditer(f"(?={re.escape(names[0])})", column)
    }
    sets = [[f"{before}{name}{after}" for name in names] for before, after in sorted(affixes)]
    return [wanted for wanted in sets if set(wanted) <= set(columns)]


def _by_number(columns: Sequence[str], count: int) -> list[list[str]]:
    """Each set of columns that have one text and the numbers from 0 or 1 on, in the order of those."""
    found: dict[str, dict[int, str]] = {}
    for column in columns:
        if match := re.fullmatch(r"(.*?)(\d+)", column):
            found.setdefault(match[1], {})[int(match[2])] = column
    whole = [set(range(count)), set(range(1, count + 1))]
    return [[held[number] for number in sorted(held)] for held in found.values() if set(held) in whole]


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _values(
    batch: pa.RecordBatch, columns: Sequence[str], outputs: Outputs, place: str, first: int
) -> npt.NDArray[np.float32]:
    """The numbers of a batch [B, W]; a null becomes NaN, which is refused later with the row's id."""
    if len(columns) > 1 or not _is_list(batch.column(1).type):
        return np.stack([_floats(batch, i, 1, place, first) for i in range(1, batch.num_columns)], axis=1)
    column = batch.column(1)
    lengths = pc.list_value_length(column).fill_null(-1).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(lengths != outputs.count)
    if len(wrong):
        held = "no numbers" if lengths[wrong[0]] < 0 else f"{lengths[wrong[0]]} numbers"
        raise UserError(
            f"{place}: {_row(batch, int(wrong[0]), first)} has {held} in column {columns[0]!r}, {outputs}: give one "
            "number for each"
        )
    return _floats(batch, 1, outputs.count, place, first).reshape(-1, outputs.count)


def _floats(batch: pa.RecordBatch, column: int, width: int, place: str, first: int) -> npt.NDArray[np.float32]:
    """The numbers of a column, ``width`` to a row, end to end.

    Raises:
        UserError: it holds something else, or a number that float32 cannot hold; names column, row and id.
    """
    held = batch.column(column).flatten() if width > 1 or _is_list(batch.column(column).type) else batch.column(column)
    name, kind = batch.schema.names[column], held.type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)):
        raise UserError(f"{place}: column {name!r} holds {kind}, expected numbers: cast it to float32, or remove it")
    try:
        values: npt.NDArray[np.float32] = held.cast(pa.float32()).to_numpy(zero_copy_only=False)
    except pa.ArrowException:
        wrong = first_uncast(held, pa.float32())
        raise UserError(
            f"{place}: {_row(batch, wrong // width, first)} has {held[wrong].as_py()!r} ({kind}) in column {name!r}, "
            "which float32 does not hold: write logits as floats"
        ) from None
    return values


def first_uncast(values: pa.Array, kind: pa.DataType) -> int:
    """The number of the first value that is none of ``kind``; there is one."""
    for number in range(len(values)):
        try:
            values[number].cast(kind)
        except pa.ArrowException:
            return number
    raise ValueError(f"every value is {kind}")


def _row(batch: pa.RecordBatch, row: int, first: int) -> str:
    return f"row {first + row} ({batch.schema.names[0]} {batch.column(0)[row].as_py()!r})"


def _rows_at_once(classes: int) -> int:
    return max(1, min(BATCH_ROWS, _ROOM_BYTES // (4 * classes)))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
