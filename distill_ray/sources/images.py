"""images: a folder a class, or a folder with a table that names image files and their labels.

Folders named train, validation (or val, valid, dev) and test at the top are the splits, with a folder a class in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from distill_ray.config import ColumnsConfig, ImagesData
from distill_ray.errors import RunError, UserError
from distill_ray.sources import decoding, files
from distill_ray.sources.annotations import GROUP, ID, LABEL, SPLIT, Annotations, condensed
from distill_ray.sources.base import BadRow, Examples, Indices, SourceInfo, check_bad_rows, described
from distill_ray.sources.decoding import Layout
from distill_ray.storage import filesystem_of, reason_of

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_ALIASES = frozenset(("train", "validation", "val", "valid", "dev", "test"))


class ImagesSource:
    """See :class:`distill_ray.sources.base.OwnSource`. Rows are the files by name, or the lines of the table."""

    def __init__(self, config: ImagesData) -> None:
        self._config = config

    def fingerprint(self) -> dict[str, Any]:
        """Location, size and time of each image file; with a table, of the table alone."""
        if self._config.table is not None:
            return {"table": self._table_file.state()}
        return {"files": [file.state() for file in self._files]}

    @cached_property
    def _files(self) -> list[files.File]:
        return _found(self._config.path)

    @cached_property
    def _table_file(self) -> files.File:
        location = files.join(self._config.path, str(self._config.table))
        return files.find("data.table", location, (".csv", ".parquet"))[0]

    @cached_property
    def _small(self) -> pa.Table:
        """Of every row its ``input`` (where its image is) and what else is said of it."""
        if self._config.table is not None:
            return self._from_table()
        names = [file.name.split("/") for file in self._files]
        fitting = [len(parts) > 2 and parts[0] in _ALIASES for parts in names]
        own_splits = all(fitting)
        if any(fitting) and not own_splits:  # else the splits would become the classes
            raise UserError(
                f"data.path {self._config.path}: {'/'.join(names[fitting.index(False)])} is in no folder of a class in "
                f"a split, as {'/'.join(names[fitting.index(True)])} is: move it, or name a table in data.table"
            )
        least = 3 if own_splits else 2
        for parts in names:
            if len(parts) < least:
                raise UserError(
                    f"data.path {self._config.path}: {'/'.join(parts)} is in no folder of a class: give each class a "
                    "folder, or name a table in data.table"
                )
        columns = {
            "input": [file.uri for file in self._files],
            LABEL: [parts[least - 2] for parts in names],
            ID: ["/".join(parts) for parts in names],
        }
        if own_splits:
            columns[SPLIT] = [parts[0] for parts in names]
        return pa.table(columns)

    def _from_table(self) -> pa.Table:
        columns, split = self._config.columns, self._config.split
        assert isinstance(columns, ColumnsConfig)
        table = _table(self._table_file.uri, self._table_file.size, self._table_file.mtime_ns)
        wanted = {"input": (columns.input, "data.columns.input"), LABEL: (columns.label, "data.columns.label")}
        wanted |= {ID: (columns.id, "data.columns.id"), SPLIT: (split.column, "data.split.column")}
        wanted |= {GROUP: (split.group_by, "data.split.group_by")}
        picked = {}
        for use, (name, key) in wanted.items():
            if name is None:
                continue
            if name not in table.column_names:
                hint = files.nearest(str(name), table.column_names)
                raise UserError(f"{key}: {self._table_file.uri} has no column {name!r}: {hint}")
            picked[use] = table.column(name)
        if not pa.types.is_string(kind := decoding.storage_type(picked["input"].type)) and not pa.types.is_large_string(
            kind
        ):
            raise UserError(f"data.columns.input: column {columns.input!r} holds {kind}, not the names of files")
        if not table.num_rows:
            raise UserError(f"{self._table_file.uri}: holds no rows")
        return pa.table(picked)

    @cached_property
    def rows(self) -> int:
        """Rows of all splits."""
        return int(self._small.num_rows)

    def name_of(self, row: int) -> str:
        """What a row is called, for errors."""
        if self._config.table is None:
            return self._files[row].uri
        found = f"{self._table_file.uri}, row {row}"
        return f"{found} (id {self._small.column(ID)[row].as_py()!r})" if ID in self._small.column_names else found

    def info(self, bad: Sequence[BadRow] = ()) -> SourceInfo:
        """Shape, classes (by folder or label) and splits."""
        annotations = Annotations(self._config, self.rows, self.name_of)
        small = self._small.drop_columns(["input"])
        refuse_duplicates(small, self.name_of)
        annotations.add(0, condensed({name: small.column(name) for name in small.column_names}))
        return described(self._config, annotations, self._layout, bad)

    @cached_property
    def _layout(self) -> Layout:
        """From the first image that can be used."""
        from distill_ray.sources.parquet import wished

        bad = []
        for row in range(self.rows):
            try:
                shape = decoding.decode(self._encoded(row), self._config.input).shape
                return wished(Layout("images", shape, "uint8"), self._config)
            except decoding.Undecodable as error:
                bad.append(BadRow(row, self.name_of(row), str(error)))
                if len(bad) > self._config.max_bad_rows:
                    check_bad_rows(self._config.model_copy(update={"max_bad_rows": 0}), bad)
        raise UserError(f"data.path {self._config.path}: no image can be used")

    def _encoded(self, row: int) -> bytes:
        return decoding.encoded(self._inputs, row, lambda name: files.read(files.join(self._config.path, name)))

    @cached_property
    def _inputs(self) -> pa.Array:
        return decoding.plain(self._small.column("input"))

    def read(self, indices: Indices) -> Examples:
        """The images of these rows; labels are told by ``info``."""
        inputs, ids, bad = self._read(indices)
        check_bad_rows(self._config.model_copy(update={"max_bad_rows": 0}), bad)
        return Examples(inputs, np.full(len(indices), -1, dtype=np.int64), ids)

    def bad_rows(self, indices: Indices) -> list[BadRow]:
        """Those of these rows whose image cannot be used."""
        return self._read(indices)[2]

    def _read(self, indices: Indices) -> tuple[Any, pa.Array, list[BadRow]]:
        layout = self._layout
        inputs, faults = decoding.images(
            self._inputs.take(pa.array(indices)), layout, self._config.input,
            lambda name: files.read(files.join(self._config.path, name)),
        )  # fmt: skip
        bad = [
            BadRow(int(indices[at]), self.name_of(int(indices[at])), reason) for at, reason in sorted(faults.items())
        ]
        if ID in self._small.column_names:
            ids = decoding.plain(self._small.column(ID)).take(pa.array(indices))
        else:
            ids = self._inputs.take(pa.array(indices))
        return inputs, ids, bad


def refuse_duplicates(small: pa.Table, name_of: Any) -> None:
    """Ids that are there twice, where all of them are in memory.

    Raises:
        UserError: names the two rows.
    """
    if ID not in small.column_names:
        return
    counts = small.group_by(ID).aggregate([(ID, "count")])
    twice = counts.filter(pc.greater(counts.column(f"{ID}_count"), 1))
    if twice.num_rows:
        value = twice.column(ID)[0]
        rows = np.flatnonzero(pc.equal(small.column(ID), value).fill_null(False).to_numpy())
        raise UserError(
            f"data.columns.id: {value.as_py()!r} is the id of two rows, {name_of(int(rows[0]))} and "
            f"{name_of(int(rows[1]))}: ids must differ; leave data.columns.id out where they do not"
        )


def _found(path: str) -> list[files.File]:
    found = files.find("data.path", path, _SUFFIXES, hidden=(".",))  # cameras call their files _MG_1234.JPG
    if len(found) == 1 and found[0].uri == path:
        raise UserError(f"data.path {path}: is a file, not a folder of images")
    return found


@lru_cache(maxsize=2)
def _table(uri: str, size: int, mtime_ns: int) -> pa.Table:
    try:
        if not size:
            raise UserError(f"{uri}: is empty (0 bytes)")
        filesystem, path = filesystem_of(uri)
        if uri.split("?")[0].lower().endswith(".parquet"):
            return pq.read_table(path, filesystem=filesystem)
        with filesystem.open_input_stream(path) as stream:
            # An empty field is no value; a class may well be called NA or null.
            nulls = pa.csv.ConvertOptions(null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False)
            return pa.csv.read_csv(stream, convert_options=nulls)
    except (OSError, pa.ArrowException) as error:
        if "://" in uri and isinstance(error, OSError):
            raise RunError(f"{uri}: cannot be read ({reason_of(error)}): try again later") from None
        raise UserError(f"{uri}: cannot be read as a table ({reason_of(error)})") from None
