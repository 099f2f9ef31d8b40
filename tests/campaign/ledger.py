"""An independent count of a label store's rows: json, hashlib and pyarrow.ipc, none of the product's code."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

Rows = Mapping[int, bytes]  # stored logits by row id


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
    times = Counter(row for row, _ in held)
    right = {row for row, logits in held if reference.get(row) == logits}
    wrong = {row for row, logits in held if reference.get(row) != logits}
    whole = (right - wrong) & wanted
    doubled = sum(n - 1 if row in wanted else n for row, n in times.items())
    return Count(len(wanted) - len(whole), doubled)


def rows_of(labels: Path) -> dict[int, bytes]:
    """The logits of a sound store by row id."""
    return dict(_rows(labels))


def ids_of(data: Path) -> set[int]:
    """The row ids of a data store."""
    return {row for table in _tables(data) for row in table.column("row_id").to_pylist()}


def _rows(labels: Path) -> Iterator[tuple[int, bytes]]:
    for table in _tables(labels):
        ids = table.column("row_id").to_pylist()
        if not ids:
            continue
        flat = table.column("logits").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        for row, logits in zip(ids, np.split(flat, len(ids)), strict=True):
            yield int(row), logits.tobytes()


def _tables(store: Path) -> Iterator[Any]:
    """The whole shards that the manifest names; a file that is not what the manifest says holds no rows."""
    manifest = json.loads((store / "manifest.json").read_bytes())
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            path = store / shard["file"]
            raw = path.read_bytes() if path.is_file() else b""
            if len(raw) == shard["bytes"] and hashlib.sha256(raw).hexdigest() == shard["sha256"]:
                yield pa.ipc.open_file(pa.py_buffer(raw)).read_all()
