"""huggingface: a dataset that was saved by ``save_to_disk``, or a DatasetDict, whose splits are kept.

Its Arrow files are mapped, not read: rows are taken by number. Images are decoded as those of other sources are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_ray.config import HuggingfaceData
from distill_ray.errors import UserError
from distill_ray.sources import decoding, files
from distill_ray.sources.annotations import GROUP, ID, LABEL, SPLIT, Annotations, condensed
from distill_ray.sources.base import (
    BadRow,
    Examples,
    Indices,
    SourceInfo,
    check_bad_rows,
    described,
    in_steps,
    refuse_absent,
)
from distill_ray.sources.decoding import Layout
from distill_ray.sources.images import refuse_duplicates
from distill_ray.sources.parquet import plain_id, wished

_IMAGES_AT_ONCE = 16  # whose files are in memory together


class HuggingfaceSource:
    """See :class:`distill_ray.sources.base.OwnSource`. Rows are numbered through the splits, in their order."""

    def __init__(self, config: HuggingfaceData) -> None:
        self._config = config
        if "://" in config.path:
            raise UserError("data.path: source huggingface reads local folders, this is a URI: copy it to a local path")

    def fingerprint(self) -> dict[str, Any]:
        """Location, size and time of every file of the saved dataset."""
        return {"files": [file.state() for file in _files(self._config.path)]}

    @cached_property
    def _parts(self) -> list[tuple[str | None, Any]]:
        """The datasets and their names; one without a name where no DatasetDict was saved."""
        return _saved(self._config.path)

    @cached_property
    def _own_splits(self) -> list[str] | None:
        """Which split each part is; None where it is one dataset."""
        if self._parts[0][0] is None:
            return None
        config = self._config.split
        meant = {str(name): config.split_of(str(name)) for name, _ in self._used}
        unknown = next((name for name, split in meant.items() if split is None), None)
        if unknown is not None:
            raise UserError(
                f"data.path {self._config.path}: its split {unknown!r} means none of ours: "
                f"{files.nearest(unknown, list(config.split_of_value()))} (data.split.values says what means which)"
            )
        return [str(split) for split in meant.values()]

    @cached_property
    def _used(self) -> list[tuple[str | None, Any]]:
        """The parts that are read: where data.split.values is given, those that it names."""
        if self._config.split.values is None or self._parts[0][0] is None:
            return self._parts
        refuse_absent(self._config, [str(name) for name, _ in self._parts], "splits")
        return [part for part in self._parts if self._config.split.split_of(str(part[0])) is not None]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(len(part) for _, part in self._used)]

    @cached_property
    def rows(self) -> int:
        """Rows of all splits."""
        return int(self._starts[-1])

    def _column(self, name: str, key: str) -> pa.ChunkedArray:
        """A column of all parts, whole; for small ones."""
        columns = [decoding.plain(part.with_format("arrow")[:].column(name)) for _, part in self._with(name, key)]
        try:  # a part without any value has it as null
            tables = [pa.table({name: column}) for column in columns]
            # Of labels, too, a part that misses some has its integers as floats.
            promote = "permissive" if key == "data.columns.label" else "default"
            return pa.concat_tables(tables, promote_options=promote)[name]
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            types = ", ".join(dict.fromkeys(str(column.type) for column in columns))
            raise UserError(
                f"{key}: {self._config.path}: column {name!r} has several types in its splits ({types}): give it one"
            ) from None

    def _with(self, name: str, key: str) -> list[tuple[str | None, Any]]:
        for split, part in self._used:
            if name not in part.column_names:
                where = f", split {split}" if split else ""
                hint = files.nearest(name, part.column_names)
                raise UserError(f"{key}: {self._config.path}{where} has no column {name!r}: {hint}")
        return [(split, part.select_columns([name])) for split, part in self._used]

    @cached_property
    def _small(self) -> pa.Table:
        columns, split = self._config.columns, self._config.split
        named = {
            LABEL: (columns.label, "data.columns.label"), ID: (columns.id, "data.columns.id"),
            GROUP: (split.group_by, "data.split.group_by"), SPLIT: (split.column, "data.split.column"),
        }  # fmt: skip
        picked: dict[str, pa.ChunkedArray | pa.Array] = {}
        for use, (name, key) in named.items():
            if name is not None:
                picked[use] = self._column(name, key)
        if self._own_splits is not None:
            if SPLIT in picked:
                raise UserError("data.split.column: the saved dataset has splits of its own: leave it out")
            sizes = [len(part) for _, part in self._used]
            picked[SPLIT] = pa.array(np.repeat(np.asarray([str(name) for name, _ in self._used], dtype=object), sizes))
        return pa.table(picked) if picked else pa.table({})

    @cached_property
    def _class_names(self) -> tuple[str, ...] | None:
        """Those of the label column's ClassLabel feature."""
        names = {
            tuple(getattr(part.features[self._config.columns.label], "names", None) or ())
            for _, part in (
                self._with(self._config.columns.label, "data.columns.label") if self._config.columns.label else ()
            )
        }
        if len(names) > 1:
            raise UserError(f"data.path {self._config.path}: its splits have labels of different classes")
        return next(iter(names), ()) or None

    def name_of(self, row: int) -> str:
        """What a row is called, for errors."""
        part, within = self._find(row)
        name = self._used[part][0]
        found = f"{self._config.path}{f', split {name}' if name else ''}, row {within}"
        return f"{found} (id {self._small.column(ID)[row].as_py()!r})" if ID in self._small.column_names else found

    def _find(self, row: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return part, row - self._starts[part]

    def info(self, bad: Sequence[BadRow] = ()) -> SourceInfo:
        """Shape, classes and splits."""
        if not self.rows:
            raise UserError(f"data.path {self._config.path}: holds no rows")
        config, small = self._config, self._small
        names = self._class_names
        if names is not None:
            config = config.model_copy(update={"class_names": config.class_names or names})
            if LABEL in small.column_names:
                # By name: the config may have the classes in another order. A ClassLabel of -1 is none.
                codes = pc.cast(small.column(LABEL), pa.int64())
                self._refuse_beyond(codes, names)
                known = pc.if_else(pc.less(codes, 0).fill_null(True), pa.scalar(None, pa.int64()), codes)
                position = small.column_names.index(LABEL)
                small = small.set_column(
                    position, LABEL, pa.array(names, type=pa.string()).take(known.combine_chunks())
                )
        annotations = Annotations(config, self.rows, self.name_of)
        refuse_duplicates(small, self.name_of)
        annotations.add(0, condensed({name: small.column(name) for name in small.column_names}))
        return described(config, annotations, self._layout, bad)

    def _refuse_beyond(self, codes: pa.ChunkedArray, names: Sequence[str]) -> None:
        """Labels that the ClassLabel feature has no name for."""
        beyond = np.flatnonzero(pc.greater_equal(codes, len(names)).fill_null(False).to_numpy())
        if len(beyond):
            row = int(beyond[0])
            raise UserError(
                f"data.columns.label: {self.name_of(row)} has the label {codes[row].as_py()}, and the dataset names "
                f"{len(names)} classes (0 to {len(names) - 1}): mend the label, or write null where there is none"
            )

    @property
    def _input_names(self) -> list[str]:
        names = self._config.columns.input
        return [names] if isinstance(names, str) else list(names)

    @cached_property
    def _layout(self) -> Layout:
        """From the columns' types and the first row that can be used."""
        table = self._rows(np.arange(min(16, self.rows), dtype=np.int64))
        kinds = {name: decoding.kind_of(name, table.schema.field(name).type) for name in self._input_names}
        if len(kinds) > 1:
            other = next((name for name, kind in kinds.items() if kind != "scalars"), None)
            if other is not None:
                raise UserError(f"data.columns.input: column {other!r}: of several input columns each holds one number")
            return wished(Layout("scalars", (len(kinds),), "float32"), self._config)
        ((name, kind),) = kinds.items()
        dtype = "uint8" if kind in ("images", "paths") else decoding.dtype_of(name, table.schema.field(name).type)
        if kind == "scalars":
            return wished(Layout(kind, (1,), dtype), self._config)
        shape = self._first_shape(kind, name)
        if kind != "list":
            shape = decoding.with_colours(shape, self._config.input, self.sample())
        return wished(Layout(kind, shape, dtype), self._config)

    def layout(self) -> Layout:
        """Shape and dtype of the rows."""
        return self._layout

    def split_values(self) -> list[str | None]:
        """What data.split.column holds, every value once."""
        return self._small.column(SPLIT).cast(pa.string()).unique().to_pylist()  # type: ignore[no-any-return]

    def sample(self) -> Iterator[bytes]:
        """Some image files, from the first row to the last; none of rows without one."""
        (name,) = self._input_names
        for row in decoding.sampled(self.rows):
            with suppress(decoding.Undecodable):
                yield decoding.encoded(decoding.plain(self._rows(np.asarray([row])).column(name)), 0, self._open)

    def _first_shape(self, kind: decoding.Kind, name: str) -> tuple[int, ...]:
        bad: list[BadRow] = []
        for row in range(self.rows):
            column = decoding.plain(self._rows(np.asarray([row])).column(name))
            try:
                if kind != "list":
                    return decoding.decode(decoding.encoded(column, 0, self._open), self._config.input).shape
                shape = decoding.list_shape(column[0])
                if shape is not None:
                    return shape
                reason = "its input is null, empty, or its lists are of different length"
            except decoding.Undecodable as error:
                reason = str(error)
            bad.append(BadRow(row, self.name_of(row), reason))
            if len(bad) > self._config.max_bad_rows:
                check_bad_rows(self._config.model_copy(update={"max_bad_rows": 0}), bad)
        raise UserError(f"data.path {self._config.path}: no row has an input that can be used")

    def _open(self, name: str) -> bytes:
        return files.read(files.join(self._config.path, name))

    def _rows(self, indices: Indices) -> pa.Table:
        """The input columns of these rows, in this order."""
        names = self._input_names
        for name in names:
            self._with(name, "data.columns.input")
        part_of = np.searchsorted(self._starts, indices, side="right") - 1
        order, tables = [], []
        for number in np.unique(part_of):
            mine = np.flatnonzero(part_of == number)
            order.append(mine)
            part = self._used[int(number)][1].select_columns(names).with_format("arrow")
            tables.append(part[(indices[mine] - self._starts[int(number)]).tolist()])
        whole = pa.concat_tables(tables, promote_options="permissive")
        return whole.take(pa.array(np.argsort(np.concatenate(order))))

    def read(self, indices: Indices) -> Examples:
        """The rows of these numbers; labels are told by ``info``."""
        inputs, bad = self._read(indices)
        check_bad_rows(self._config.model_copy(update={"max_bad_rows": 0}), bad)
        return Examples(inputs, np.full(len(indices), -1, dtype=np.int64), self._ids(indices))

    def bad_rows(self, indices: Indices) -> list[BadRow]:
        """Those of these rows whose input cannot be used."""
        return [bad for part in in_steps(indices, self._layout.row_bytes) for bad in self._read(part)[1]]

    def _read(self, indices: Indices) -> tuple[Any, list[BadRow]]:
        layout = self._layout
        inputs = np.zeros((len(indices), *layout.shape), dtype=layout.dtype)
        faults: decoding.Faults = {}
        # Images may be many times as large in their files as they are here, once they are resized.
        step = _IMAGES_AT_ONCE if layout.kind in ("images", "paths") else len(indices)
        for start in range(0, len(indices), step):
            inputs[start : start + step], wrong = self._decoded(indices[start : start + step], layout)
            faults |= {start + offset: reason for offset, reason in wrong.items()}
        bad = [BadRow(int(indices[at]), self.name_of(int(indices[at])), why) for at, why in sorted(faults.items())]
        return inputs, bad

    def _decoded(self, indices: Indices, layout: Layout) -> tuple[decoding.Array, decoding.Faults]:
        table = self._rows(indices)
        columns = [decoding.plain(table.column(name)) for name in self._input_names]
        if layout.kind == "list":
            return decoding.lists(columns[0], layout)
        if layout.kind == "scalars":
            return decoding.scalars(columns, self._input_names, layout)
        return decoding.images(columns[0], layout, self._config.input, self._open)

    def _ids(self, indices: Indices) -> pa.Array:
        if ID in self._small.column_names:
            return plain_id(self._small.column(ID)).take(pa.array(indices))
        found = [self._find(int(row)) for row in indices]
        return pa.array([f"{self._used[part][0] or 'row'}/{within}" for part, within in found], type=pa.string())


def _saved(path: str) -> list[tuple[str | None, Any]]:
    if not Path(path).is_dir():
        raise UserError(f"data.path {path}: no such folder; it is what save_to_disk of datasets made")
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise UserError(
            "data.source huggingface: needs the package datasets: pip install 'distill-ray[huggingface]'"
        ) from None
    try:
        state = json.dumps([file.state() for file in _files(path)])
    except UserError:  # nothing is there; what it is not is told below
        state = ""
    return _opened(path, state)


def _files(path: str) -> list[files.File]:
    return files.find("data.path", path, (".arrow", ".json"))


@lru_cache(maxsize=2)  # a worker that prepares many shards opens it once; another state is another dataset
def _opened(path: str, state: str) -> list[tuple[str | None, Any]]:
    import datasets

    try:
        found = datasets.load_from_disk(path)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"data.path {path}: is no dataset that save_to_disk made, or is damaged ({reason})") from None
    if isinstance(found, datasets.DatasetDict):
        return [(str(name), part) for name, part in found.items()]
    return [(None, found)]


def schema_of(location: str) -> tuple[pa.Schema, list[str]]:
    """The columns of a saved dataset, and the names of its splits that have rows, none where it is no DatasetDict."""
    parts = _saved(location)
    return parts[0][1].features.arrow_schema, [name for name, part in parts if name is not None and len(part)]
