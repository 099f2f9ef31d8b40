"""images: a folder a class, or a folder with a table that names image files and their labels.

Folders named train, validation and test at the top (or as data.split.values says) are the splits, with a folder a class
in each.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from distill_ray.config import ColumnsConfig, ImagesData
from distill_ray.errors import RunError, UserError
from distill_ray.sources import decoding, files
from distill_ray.sources.annotations import GROUP, ID, LABEL, SPLIT, Annotations, condensed, is_number
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
from distill_ray.storage import filesystem_of, reason_of

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_HIDDEN = (".",)  # cameras call their files _MG_1234.JPG
_NAMED_SUFFIXES = _NAMED_FOLDERS = 5
_PLAIN_SPLITS = frozenset(("train", "validation", "val", "valid", "dev", "test"))
_NUMBER = re.compile(r"[\s_-]*\d+$")


class ImagesSource:
    """See :class:`distill_ray.sources.base.OwnSource`. Rows are the files by name, or the lines of the table."""

    def __init__(self, config: ImagesData) -> None:
        self._config = config

    def fingerprint(self) -> dict[str, Any]:
        """Location, size and time of each image file; with a table, of the table alone."""
        if self._config.table is not None:
            return {"table": self._table_file.state()}
        # Folders of splits by other names were classes once: a store of them is another.
        renamed = {name: split for name, split in self._splits.items() if name not in _PLAIN_SPLITS}
        return {"files": [file.state() for file in self._files]} | ({"splits": renamed} if renamed else {})

    @cached_property
    def _splits(self) -> dict[str, str]:
        """Which split each folder at the top is; empty where they are the classes."""
        return splits_of_folders(self._config, [file.name.split("/") for file in self._files])

    @cached_property
    def _files(self) -> list[files.File]:
        """Folder by folder, those of a folder by name: as torchvision's ImageFolder has them."""
        found = files.find("data.path", self._config.path, _SUFFIXES, hidden=_HIDDEN, others=self._others)
        if len(found) == 1 and found[0].uri == self._config.path:
            raise UserError(f"data.path {self._config.path}: is a file, not a folder of images")
        return sorted(found, key=lambda file: (file.name.split("/")[:-1], file.name))

    @cached_property
    def _others(self) -> Counter[str]:
        """Files that are no images by their names, by suffix."""
        return Counter()

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
        splits = self._splits
        fitting = [len(parts) > 2 and parts[0] in splits for parts in names]
        own_splits = all(fitting)
        if any(fitting) and not own_splits:  # else the splits would become the classes
            raise UserError(
                f"data.path {self._config.path}: {'/'.join(names[fitting.index(False)])} is in no folder of a class in "
                f"a split, as {'/'.join(names[fitting.index(True)])} is: move it, say in data.split.values which split "
                "its folder is, or name a table in data.table"
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
        wanted = {"input": (columns.input, "data.columns.input"), LABEL: (columns.label, "data.columns.label")}
        wanted |= {ID: (columns.id, "data.columns.id"), SPLIT: (split.column, "data.split.column")}
        wanted |= {GROUP: (split.group_by, "data.split.group_by")}
        named = tuple(sorted({str(name) for name, _ in wanted.values() if name is not None}))
        table = _table(self._table_file.uri, self._table_file.size, self._table_file.mtime_ns, named)
        picked = {}
        for use, (name, key) in wanted.items():
            if name is None:
                continue
            if table.column_names.count(name) > 1:
                raise UserError(f"{key}: {self._table_file.uri} has several columns {name!r}: rename all but one")
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
        info = described(self._config, annotations, self._layout, bad)
        return replace(info, warnings=(*info.warnings, *self._left_out()))

    def _left_out(self) -> list[str]:
        counted = self._others.most_common()
        if not counted:
            return []
        named = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in counted[:_NAMED_SUFFIXES])
        more = ", ..." if len(counted) > _NAMED_SUFFIXES else ""
        return [
            f"{sum(self._others.values()):,} file(s) in data.path are not read, whose names do not end as those of "
            f"images: {named}{more} (read are {', '.join(_SUFFIXES)})"
        ]

    @cached_property
    def _layout(self) -> Layout:
        """From the first image that can be used, and whether one of a sample has colours."""
        from distill_ray.sources.parquet import wished

        bad = []
        for row in range(self.rows):
            try:
                shape = decoding.decode(self._encoded(row), self._config.input).shape
                shape = decoding.with_colours(shape, self._config.input, self.sample())
                return wished(Layout("images", shape, "uint8"), self._config)
            except decoding.Undecodable as error:
                bad.append(BadRow(row, self.name_of(row), str(error)))
                if len(bad) > self._config.max_bad_rows:
                    check_bad_rows(self._config.model_copy(update={"max_bad_rows": 0}), bad)
        raise UserError(f"data.path {self._config.path}: no image can be used")

    def layout(self) -> Layout:
        """Shape and dtype of the rows."""
        return self._layout

    def split_names(self) -> list[str]:
        """The splits that the data has of its own, by name."""
        return sorted(set(self._small[SPLIT].to_pylist())) if SPLIT in self._small.column_names else []

    def sample(self) -> Iterator[bytes]:
        """Some image files, from the first row to the last; none of rows without one."""
        for row in decoding.sampled(self.rows):
            with suppress(decoding.Undecodable):
                yield self._encoded(row)

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
        return [bad for part in in_steps(indices, self._layout.row_bytes) for bad in self._read(part)[2]]

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


def splits_of_folders(config: ImagesData, names: Sequence[Sequence[str]]) -> dict[str, str]:
    """Which split each folder at the top is, of the files with these ``names`` (in parts); none where they are classes.

    Raises:
        UserError: they look like splits that hold the classes, or like splits that hold none.
    """
    held: dict[str, set[str]] = {}  # folder at the top -> folders in it
    for parts in names:
        if len(parts) > 1:
            held.setdefault(parts[0], set()).update(parts[1:-1][:1])
    if not held or (config.split.values is None and set(held) <= set(config.class_names or ())):
        return {}
    refuse_absent(config, list(held), "folders")
    meant = {name: split for name in held if (split := config.split.split_of(name)) is not None}
    if any(held[name] for name in meant):
        return {name: str(split) for name, split in meant.items()}
    whose = f"data.path {config.path}: its folders {_some(held)}"
    said = "where they are the classes, name them in data.class_names"
    numbered = [config.split.split_of(_NUMBER.sub("", name)) for name in held]  # test1 beside train
    named_as_splits = None not in numbered and (len(meant) == len(held) or len(set(numbered)) > 1)
    if config.split.values is not None or named_as_splits:
        raise UserError(
            f"{whose} are splits by their names, and hold no folder a class: make one for each class in them, or name "
            f"a table in data.table; {said}"
        )
    shared = sorted(set.intersection(*held.values())) if len(held) > 1 else []
    if len(shared) > 1:
        raise UserError(
            f"{whose} hold folders of the same names ({_some(shared)}): say in data.split.values which split each is; "
            f"{said}"
        )
    return {}


def _some(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:_NAMED_FOLDERS]) + (", ..." if len(found) > _NAMED_FOLDERS else "")


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


@lru_cache(maxsize=2)
def _table(uri: str, size: int, mtime_ns: int, named: tuple[str, ...]) -> pa.Table:
    """A table whose columns ``named`` are as they are written: of text where a number would be written otherwise."""
    try:
        if not size:
            raise UserError(f"{uri}: is empty (0 bytes)")
        filesystem, path = filesystem_of(uri)
        if uri.split("?")[0].lower().endswith(".parquet"):
            return pq.read_table(path, filesystem=filesystem)
        table = _csv(filesystem, path)
        columns = {name: table[name] for name in named if table.column_names.count(name) == 1}
        guessed = [name for name, column in columns.items() if is_number(column.type)]
        texts = _csv(filesystem, path, guessed) if guessed else table
        for name in guessed:
            written = _as_written(columns[name], texts[name])
            table = table.set_column(table.column_names.index(name), name, written)
        return table
    except (OSError, pa.ArrowException) as error:
        if "://" in uri and isinstance(error, OSError):
            raise RunError(f"{uri}: cannot be read ({reason_of(error)}): try again later") from None
        raise UserError(f"{uri}: cannot be read as a table ({reason_of(error)})") from None


def _csv(filesystem: pafs.FileSystem, path: str, texts: Sequence[str] = ()) -> pa.Table:
    """The columns of a CSV file; or the ``texts`` alone, without a guess at what they mean."""
    # An empty field is no value; a class may well be called NA or null.
    convert = pa.csv.ConvertOptions(
        null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False, include_columns=list(texts),
        column_types=dict.fromkeys(texts, pa.string()),
    )  # fmt: skip
    with filesystem.open_input_stream(path) as stream:
        return pa.csv.read_csv(stream, convert_options=convert)


def _as_written(numbers: pa.ChunkedArray, texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers that were guessed from texts; the texts where one is not the integer's own, as 01 is not 1, and where
    they are integers too long for 64 bits, of which a float keeps the first digits alone."""
    trimmed = pc.utf8_trim_whitespace(texts)
    if pa.types.is_floating(numbers.type):
        return texts if pc.all(pc.match_substring_regex(trimmed, r"^[+-]?\d+$")).as_py() else numbers
    own = pc.all(pc.equal(numbers.cast(pa.string()), trimmed)).as_py()
    return numbers if own in (True, None) else texts
