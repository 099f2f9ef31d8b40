"""parquet: a file, a folder or a pattern of Parquet files, on any storage; read in pieces, never whole.

Rows are numbered through the files in the order of their names. A piece is a few row groups, or one large one, which is
read batch by batch. What is held at a time is a batch, whatever the size of the data or of its row groups.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distill_ray.config import ParquetData
from distill_ray.errors import RunError, UserError
from distill_ray.sources import decoding, files
from distill_ray.sources.annotations import GROUP, ID, LABEL, SPLIT, Annotations, condensed, is_number
from distill_ray.sources.base import BadRow, Piece, SourceInfo, check_bad_rows, described
from distill_ray.sources.decoding import Layout
from distill_ray.sources.files import File
from distill_ray.storage import filesystem_of, reason_of

_SUFFIXES = (".parquet", ".parq", ".pq")
_FOOTER_THREADS = 16
_PIECE_BYTES = 32 * 2**20  # of the columns that are read, as they are in memory
_PIECE_ROWS = 262_144
_BATCH_BYTES = 8 * 2**20
_MOST_BATCH_ROWS = 8192
_BUFFER_BYTES = 2**20  # column chunks are read through a buffer of so much, not whole
_SAMPLED_GROUPS, _SAMPLED_IN_GROUP = 8, 4  # row groups, and images of each, that are looked at for colours
_MOST_SPLIT_VALUES = 100
_LOOKED_AT = 1000  # rows in search of the first that can be used


@dataclass(frozen=True)
class Footer:
    """What is kept of a file's footer."""

    schema: pa.Schema
    group_rows: tuple[int, ...]
    group_bytes: tuple[int, ...]  # uncompressed, of the columns that are read

    @property
    def rows(self) -> int:
        """Rows of the file."""
        return sum(self.group_rows)


class ParquetSource:
    """See :class:`distill_ray.sources.base.StreamedSource`."""

    def __init__(self, config: ParquetData) -> None:
        self.config = config

    @cached_property
    def files(self) -> list[File]:
        """The files, by name."""
        return files.find("data.path", self.config.path, _SUFFIXES)

    def fingerprint(self) -> dict[str, Any]:
        """Location, size and time of each file; not of the images that the files name."""
        return {"files": [file.state() for file in self.files]}

    @cached_property
    def _input_names(self) -> list[str]:
        names = self.config.columns.input
        return [names] if isinstance(names, str) else list(names)

    @cached_property
    def _small_names(self) -> dict[str, str]:
        """The small columns that the config names: what for -> which."""
        columns, split = self.config.columns, self.config.split
        named = {LABEL: columns.label, SPLIT: split.column, GROUP: split.group_by, ID: columns.id}
        return {use: name for use, name in named.items() if name is not None}

    # --- footers -------------------------------------------------------------------------------------------------

    @cached_property
    def _footers(self) -> list[Footer]:
        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:  # reading a footer is waiting
            footers = list(pool.map(self._footer, self.files))
        self._check_schemas(footers)
        if not sum(footer.rows for footer in footers):
            raise UserError(f"data.path {self.config.path}: holds no rows")
        return footers

    def _footer(self, file: File) -> Footer:
        if file.size == 0:
            raise UserError(f"{file.uri}: is empty (0 bytes): make it again, or remove it")
        with _opened(file) as opened:
            metadata, schema = opened.metadata, opened.schema_arrow
        wanted = tuple(f"{name}." for name in (*self._input_names, *self._small_names.values()))
        rows, sizes = [], []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            columns = [group.column(i) for i in range(group.num_columns)]
            rows.append(group.num_rows)
            sizes.append(sum(c.total_uncompressed_size for c in columns if f"{c.path_in_schema}.".startswith(wanted)))
        return Footer(schema, tuple(rows), tuple(sizes))

    def _check_schemas(self, footers: Sequence[Footer]) -> None:
        """Every column is in every file, and of one type, or of none (null) where a file has no value in it."""
        keys = dict.fromkeys(self._input_names, "data.columns.input")
        said = {
            LABEL: "data.columns.label",
            ID: "data.columns.id",
            SPLIT: "data.split.column",
            GROUP: "data.split.group_by",
        }
        keys |= {name: said[use] for use, name in self._small_names.items()}
        typed: dict[str, tuple[File, pa.DataType]] = {}
        for file, footer in zip(self.files, footers, strict=True):
            for name, key in keys.items():
                if name not in footer.schema.names:
                    raise UserError(
                        f"{key}: {file.uri} has no column {name!r}: {files.nearest(name, footer.schema.names)}"
                    )
                here = decoding.storage_type(footer.schema.field(name).type)
                if pa.types.is_null(here):
                    continue
                first, there = typed.setdefault(name, (file, here))
                if here != there and not (key == said[LABEL] and is_number(here) and is_number(there)):
                    raise UserError(
                        f"{key}: column {name!r} is {there} in {first.uri}, but {here} in {file.uri}: give all files "
                        "one type"
                    )

    @cached_property
    def _types(self) -> dict[str, pa.DataType]:
        """The type of each column that is read: that of the first file in which it is not null."""
        types: dict[str, pa.DataType] = {}
        for footer in self._footers:
            for name in (*self._input_names, *self._small_names.values()):
                if name not in types or pa.types.is_null(types[name]):
                    types[name] = footer.schema.field(name).type
        return types

    @cached_property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(footer.rows for footer in self._footers)

    @cached_property
    def _first_rows(self) -> npt.NDArray[np.int64]:
        """The number of the first row of each file."""
        return np.cumsum([0, *(footer.rows for footer in self._footers)])

    def pieces(self) -> Sequence[Piece]:
        """Row groups in order, as many to a piece as stay within its size."""
        pieces: list[Piece] = []
        parts: list[tuple[int, tuple[int, ...], int]] = []
        first = rows = size = 0
        for number, footer in enumerate(self._footers):
            for group, (count, held) in enumerate(zip(footer.group_rows, footer.group_bytes, strict=True)):
                if parts and (size + held > _PIECE_BYTES or rows + count > _PIECE_ROWS):
                    pieces.append(Piece(first, rows, tuple(parts)))
                    first, rows, size, parts = first + rows, 0, 0, []
                if parts and parts[-1][0] == number:
                    parts[-1] = (number, (*parts[-1][1], group), parts[-1][2] + count)
                else:
                    parts.append((number, (group,), count))
                rows, size = rows + count, size + held
        pieces.append(Piece(first, rows, tuple(parts)))
        return [piece for piece in pieces if piece.rows]

    # --- small columns -------------------------------------------------------------------------------------------

    def annotated(self) -> bool:
        """Whether the config names a label, a split, a group or an id."""
        return bool(self._small_names)

    def annotations(self, piece: Piece) -> Iterator[tuple[int, pa.Table]]:
        """Labels, splits, groups and ids of the rows of a piece: the offset in it, and some rows."""
        names = list(dict.fromkeys(self._small_names.values()))
        for at, table in self._batches(piece, names, _PIECE_ROWS):
            yield at, condensed({use: table.column(name) for use, name in self._small_names.items()})

    def split_values(self) -> list[str | None]:
        """What data.split.column holds, every value once, in order; of many no more than tell that it is no split."""
        found: dict[str | None, None] = {}
        for piece in self.pieces():
            for _, table in self.annotations(piece):
                found |= dict.fromkeys(table.column(SPLIT).unique().to_pylist())
                if len(found) > _MOST_SPLIT_VALUES:
                    return list(found)
        return list(found)

    def info(self, small: Iterable[tuple[int, pa.Table]], bad: Sequence[BadRow] = ()) -> SourceInfo:
        """Shape, classes and splits; looks for ids that are there twice."""
        annotations = Annotations(self.config, self.rows, self.name_of)
        for first_row, table in small:
            annotations.add(first_row, table)
        self._refuse_duplicates(annotations)
        return described(self.config, annotations, self.layout(), bad)

    def _refuse_duplicates(self, annotations: Annotations) -> None:
        for rows in annotations.duplicate_candidates():
            ids: dict[Any, int] = {}
            for row in rows.tolist():
                value = self._value(row, str(self.config.columns.id))
                if value in ids:
                    raise UserError(
                        f"data.columns.id: {value!r} is the id of two rows, {self._place(ids[value])} and "
                        f"{self._place(row)}: ids must differ; leave data.columns.id out where they do not"
                    )
                ids[value] = row

    def name_of(self, row: int) -> str:
        """Where a row is, and its id, for errors."""
        if self.config.columns.id is None:
            return self._place(row)
        return f"{self._place(row)} (id {self._value(row, self.config.columns.id)!r})"

    def _called(self, row: int, value: pa.Scalar) -> str:
        """``name_of`` where the id is at hand."""
        return self._place(row) if self.config.columns.id is None else f"{self._place(row)} (id {value.as_py()!r})"

    def _place(self, row: int) -> str:
        file, within = self._find(row)
        return f"{self.files[file].uri}, row {within}"

    def _find(self, row: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return file, int(row - self._first_rows[file])

    def _value(self, row: int, column: str) -> Any:
        """One value of one column; for errors."""
        file, within = self._find(row)
        group = int(np.searchsorted(np.cumsum(self._footers[file].group_rows), within, side="right"))
        within -= sum(self._footers[file].group_rows[:group])
        with _opened(self.files[file]) as opened:
            return opened.read_row_group(group, columns=[column]).column(0)[within].as_py()

    # --- inputs --------------------------------------------------------------------------------------------------

    def layout(self) -> Layout:
        """Shape and dtype, from the columns' types and the first row that can be used."""
        return self._layout

    @cached_property
    def _layout(self) -> Layout:
        types = self._types
        kinds = {name: decoding.kind_of(name, types[name]) for name in self._input_names}
        if len(kinds) > 1:
            for name, kind in kinds.items():
                if kind != "scalars":
                    raise UserError(
                        f"data.columns.input: column {name!r} holds {types[name]}; of several input columns each "
                        "holds one number"
                    )
            return self._with_wished_shape(Layout("scalars", (len(kinds),), "float32"))
        ((name, kind),) = kinds.items()
        if kind == "scalars":
            return self._with_wished_shape(Layout("scalars", (1,), decoding.dtype_of(name, types[name])))
        shape = self._first_shape(kind)
        if kind != "list":
            shape = decoding.with_colours(shape, self.config.input, self.sample())
        dtype = "uint8" if kind != "list" else decoding.dtype_of(name, types[name])
        return self._with_wished_shape(Layout(kind, shape, dtype))

    def _with_wished_shape(self, found: Layout) -> Layout:
        return wished(found, self.config)

    def _first_shape(self, kind: decoding.Kind) -> tuple[int, ...]:
        bad: list[BadRow] = []
        for piece in self.pieces():
            for at, table in self._batches(piece, self._input_names, 16):
                column = decoding.plain(table.column(0))
                for offset in range(len(column)):
                    shape, reason = self._shape_of(kind, column, offset, piece, at)
                    if shape is not None:
                        return shape
                    row = piece.first_row + at + offset
                    bad.append(BadRow(row, self.name_of(row), reason))
                    if len(bad) > self.config.max_bad_rows or len(bad) >= _LOOKED_AT:
                        check_bad_rows(self.config.model_copy(update={"max_bad_rows": 0}), bad)
        raise UserError(f"data.path {self.config.path}: no row has an input that can be used")

    def sample(self) -> Iterator[bytes]:
        """Some image files: the first of some row groups, from the first group to the last."""
        groups = [
            Piece(0, rows, ((number, (group,), rows),))
            for number, footer in enumerate(self._footers)
            for group, rows in enumerate(footer.group_rows)
            if rows
        ]
        for place in decoding.sampled(len(groups), _SAMPLED_GROUPS):
            with closing(self._batches(groups[place], self._input_names, _SAMPLED_IN_GROUP)) as batches:
                column = decoding.plain(next(batches)[1].column(0))
            for offset in range(len(column)):
                with suppress(decoding.Undecodable):
                    yield decoding.encoded(column, offset, self._opener(groups[place].parts[0][0]))

    def _shape_of(
        self, kind: decoding.Kind, column: pa.Array, offset: int, piece: Piece, at: int
    ) -> tuple[tuple[int, ...] | None, str]:
        if kind == "list":
            value = column[offset]
            if not value.is_valid:
                return None, "its input is null"
            return decoding.list_shape(value), "its input is empty, or its lists are of different length"
        file, _ = self._find(piece.first_row + at + offset)
        try:
            data = decoding.encoded(column, offset, self._opener(file))
            return decoding.decode(data, self.config.input).shape, ""
        except decoding.Undecodable as error:
            return None, str(error)

    def _opener(self, file: int) -> Any:
        base = self.config.root or files.parent(self.files[file].uri)
        return lambda name: files.read(files.join(base, name))

    def stream(
        self, piece: Piece, layout: Layout, wanted: npt.NDArray[np.bool_]
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[Any], pa.Array, list[BadRow]]]:
        """The wanted rows of a piece, a batch at a time."""
        names = list(dict.fromkeys([*self._input_names, *([self.config.columns.id] if self.config.columns.id else [])]))
        largest = max(layout.row_bytes, self._stored_row_bytes(piece))  # resized images are larger in the file
        batch_rows = max(1, min(_MOST_BATCH_ROWS, _BATCH_BYTES // largest))
        for at, table in self._batches(piece, names, batch_rows):
            offsets = at + np.flatnonzero(wanted[at : at + table.num_rows])
            if not len(offsets):
                continue
            if len(offsets) < table.num_rows:
                table = table.take(pa.array(offsets - at))
            columns = [decoding.plain(table.column(name)) for name in self._input_names]
            inputs, faults = self._decoded(columns, layout, piece.first_row + int(offsets[0]))
            rows = piece.first_row + offsets
            ids = self._ids(table, rows)
            bad = [BadRow(int(rows[i]), self._called(int(rows[i]), ids[i]), why) for i, why in sorted(faults.items())]
            yield offsets, inputs, ids, bad

    def _stored_row_bytes(self, piece: Piece) -> int:
        """Bytes of a row in the files, uncompressed: the mean of the row group where it is largest."""
        held = (self._footers[number] for number, _, _ in piece.parts)
        return max(
            size // max(1, rows)
            for footer, (_, groups, _) in zip(held, piece.parts, strict=True)
            for size, rows in ((footer.group_bytes[group], footer.group_rows[group]) for group in groups)
        )

    def _decoded(
        self, columns: Sequence[pa.Array], layout: Layout, row: int
    ) -> tuple[npt.NDArray[Any], decoding.Faults]:
        if layout.kind == "list":
            return decoding.lists(columns[0], layout)
        if layout.kind == "scalars":
            return decoding.scalars(columns, self._input_names, layout)
        return decoding.images(columns[0], layout, self.config.input, self._opener(self._find(row)[0]))

    def _ids(self, table: pa.Table, rows: npt.NDArray[np.int64]) -> pa.Array:
        """The user's ids; where there are none the file's name and the row's number in it."""
        if self.config.columns.id is not None:
            return plain_id(table.column(self.config.columns.id))
        file, _ = self._find(int(rows[0]))
        name, first = self.files[file].name, self._first_rows[file]
        return pa.array([f"{name}/{row - first}" for row in rows.tolist()], type=pa.string())

    def _typed(self, table: pa.Table) -> pa.Table:
        """The table with the types that the columns have in other files, where in this one they have none."""
        for number, field in enumerate(table.schema):
            if pa.types.is_null(field.type):
                missing = pa.nulls(table.num_rows, decoding.storage_type(self._types[field.name]))
                table = table.set_column(number, field.name, missing)
        return table

    def _batches(self, piece: Piece, names: Sequence[str], rows: int) -> Generator[tuple[int, pa.Table], None, None]:
        """Some columns of a piece: the offset of the first row, and so many rows. No batch is of two files."""
        at = 0
        for number, groups, _ in piece.parts:
            file = self.files[number]
            with _opened(file) as opened:
                try:
                    for batch in opened.iter_batches(
                        rows, row_groups=list(groups), columns=list(names), use_threads=False
                    ):
                        yield at, self._typed(pa.Table.from_batches([batch]))
                        at += batch.num_rows
                except (OSError, pa.ArrowException) as error:
                    raise _unreadable(file, error) from None
        if at != piece.rows:
            raise RunError(f"{self.files[piece.parts[0][0]].uri}: has changed while it was read: run the command again")


def wished(found: Layout, config: Any) -> Layout:
    """The layout with the shape that the config gives.

    Raises:
        UserError: another number of values than the rows have; keys that are for images alone.
    """
    wish, shape = config.input, config.input.shape
    if found.kind not in ("images", "paths"):
        for key in ("resize", "channels"):
            if getattr(wish, key) is not None:
                raise UserError(f"data.input.{key}: is for images, and column {config.columns.input!r} holds numbers")
    if found.kind == "list":
        found = replace(found, lengths=found.shape[1:])
    if shape is None or shape == found.shape:
        return found
    if found.kind == "list" and np.prod(shape) == np.prod(found.shape):
        return replace(found, shape=shape)
    if found.kind == "list":
        raise UserError(
            f"data.input.shape: {list(shape)} is {np.prod(shape)} numbers, but the rows have {np.prod(found.shape)}"
        )
    raise UserError(f"data.input.shape: {list(shape)}, but the rows of this source are {list(found.shape)}")


def plain_id(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Ids as they are stored: of any plain type.

    Raises:
        UserError: they are lists or structs.
    """
    ids = decoding.plain(column)
    if pa.types.is_nested(ids.type) or pa.types.is_null(ids.type):
        raise UserError(f"data.columns.id: the column holds {ids.type}; an id is a number, a string or a time")
    return ids


def _opened(file: File) -> pq.ParquetFile:
    try:
        filesystem, path = filesystem_of(file.uri)
        return pq.ParquetFile(path, filesystem=filesystem, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: File, error: BaseException) -> UserError | RunError:
    reason = reason_of(error)
    if "://" in file.uri and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return RunError(f"{file.uri}: cannot be read ({reason}): try again later")
    if "magic bytes" in reason or "footer" in reason.lower():
        reason = "it has no Parquet footer: it was cut short, or is no Parquet file"
    return UserError(f"{file.uri}: cannot be read as Parquet ({reason}): make or fetch it again")


def schema_of(location: str) -> pa.Schema:
    """The columns of the first of the files at ``location``.

    Raises:
        UserError: there is none, or it is damaged.
    """
    first = files.find("data.path", location, _SUFFIXES)[0]
    if first.size == 0:
        raise UserError(f"{first.uri}: is empty (0 bytes): make it again, or remove it")
    with _opened(first) as opened:
        return opened.schema_arrow
