"""An independent count of a store's rows: json, hashlib and pyarrow.ipc, none of the product's code."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

Rows = Mapping[int, bytes]  # what is stored of a row (its logits; of a data store, input and label), by row id
_CONTENT = {"labels": ("logits",), "data": ("input", "label")}  # the columns that count


@dataclass(frozen=True)
class Count:
    """Against the ids of the data store and the logits of an undisturbed run."""

    lost: int  # ids without a row, or with other logits
    doubled: int  # rows beyond the first of an id, and rows of ids that the data does not have


def count(labels: Path, data: Path, reference: Rows) -> Count:
    """Count the rows of the store in ``labels``; a folder without a manifest has lost them all."""
    wanted = ids_of(data)
    try:
        held = list(_rows(labels))
    except (OSError, ValueError, KeyError):
        return Count(len(wanted), 0)
    right, wrong, doubled = _compared(held, reference, wanted)
    return Count(len(wanted - (right - wrong)), doubled)


def accepted(rows: Iterable[tuple[int, bytes]], reference: Rows, *, refused: bool) -> Count:
    """Count what a reader took from a store: ``lost`` are the rows that it took as other than theirs.

    Rows that a reader ``refused`` to give are not lost, since it said so; in a store that it took as whole, they are.
    """
    right, wrong, doubled = _compared(list(rows), reference, set(reference))
    return Count(len(wrong) if refused else len(set(reference) - (right - wrong)), doubled)


def _compared(rows: list[tuple[int, bytes]], reference: Rows, wanted: set[int]) -> tuple[set[int], set[int], int]:
    """Ids with the content of the reference, ids with other content, and how many rows there are too many."""
    times = Counter(row for row, _ in rows)
    right = {row for row, content in rows if reference.get(row) == content}
    wrong = {row for row, content in rows if reference.get(row) != content}
    return right & wanted, wrong, sum(n - 1 if row in wanted else n for row, n in times.items())


def rows_of(store: Path) -> dict[int, bytes]:
    """The content of a sound store by row id."""
    return dict(_rows(store))


def ids_of(data: Path) -> set[int]:
    """The row ids of a data store."""
    return {row for table in _tables(data) for row in table.column("row_id").to_pylist()}


def _rows(store: Path) -> Iterator[tuple[int, bytes]]:
    columns = _CONTENT[json.loads((store / "manifest.json").read_bytes())["kind"]]
    for table in _tables(store):
        ids = table.column("row_id").to_pylist()
        if ids:
            content = [_bytes_of(table.column(name).combine_chunks(), len(ids)) for name in columns]
            yield from ((int(row), b"".join(parts)) for row, *parts in zip(ids, *content, strict=True))


def _bytes_of(column: Any, rows: int) -> list[bytes]:
    """Each row's values, one after the other; the campaign's labels have no nulls."""
    flat = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
    values = flat.to_numpy(zero_copy_only=False).reshape(rows, -1)
    return [row.tobytes() for row in values]


def _tables(store: Path) -> Iterator[Any]:
    """The whole shards that the manifest names; a file that is not what the manifest says holds no rows."""
    manifest = json.loads((store / "manifest.json").read_bytes())
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            path = store / shard["file"]
            raw = path.read_bytes() if path.is_file() else b""
            if len(raw) == shard["bytes"] and hashlib.sha256(raw).hexdigest() == shard["sha256"]:
                yield pa.ipc.open_file(pa.py_buffer(raw)).read_all()
