"""Data as users have it, written by pyarrow and Pillow; and a source read to its end without Ray."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import TypeAdapter

from distill_ray.config import DataConfig, OwnData
from distill_ray.sources import ParquetSource, SourceInfo, open_source

Array = npt.NDArray[Any]


def png(pixels: Array, kind: str = "PNG") -> bytes:
    """An image file of [height, width] or [height, width, 3] pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def pixels(rows: int, height: int = 6, width: int = 5, channels: int | None = None, seed: int = 0) -> Array:
    """Random images [rows, height, width(, channels)]."""
    shape = (rows, height, width) if channels is None else (rows, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def fixed_list(values: Array) -> pa.Array:
    """[rows, width] as a FixedSizeList column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def write_parquet(
    path: Path, columns: Mapping[str, Any], row_group_size: int = 16, files: int = 1, **options: Any
) -> Path:
    """One file, or where ``files`` is more a folder of as many."""
    table = pa.table(dict(columns))
    if files == 1:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=row_group_size, **options)
        return path
    path.mkdir(parents=True, exist_ok=True)
    bounds = np.linspace(0, table.num_rows, files + 1).astype(int)
    for number in range(files):
        part = table.slice(bounds[number], bounds[number + 1] - bounds[number])
        pq.write_table(part, path / f"part-{number:03d}.parquet", row_group_size=row_group_size, **options)
    return path


def data_config(**keys: Any) -> OwnData:
    config = TypeAdapter(DataConfig).validate_python(keys)
    assert isinstance(config, OwnData)
    return config


@dataclass(frozen=True)
class AllRows:
    """What a source says, and all of its rows by number."""

    info: SourceInfo
    inputs: Array
    ids: list[Any]

    @property
    def labels(self) -> list[int]:
        assert self.info.labels is not None
        return [int(label) for label in self.info.labels]


def read_all(config: OwnData) -> AllRows:
    """The whole source, as prepare reads it."""
    source = open_source(config)
    if not isinstance(source, ParquetSource):
        info = source.info()
        examples = source.read(np.arange(source.rows, dtype=np.int64))  # type: ignore[union-attr]
        return AllRows(info, examples.inputs, pa.array(examples.source_ids).to_pylist())
    pieces = source.pieces()
    small = ((piece.first_row + at, table) for piece in pieces for at, table in source.annotations(piece))
    info = source.info(small if source.annotated() else ())
    inputs: list[Array] = []
    ids: list[Any] = []
    for piece in pieces:
        for _, part, part_ids, bad in source.stream(piece, source.layout(), np.ones(piece.rows, dtype=bool)):
            if bad:
                raise AssertionError(f"bad row: {bad[0]}")
            inputs.append(part)
            ids += part_ids.to_pylist()
    return AllRows(info, np.concatenate(inputs), ids)


def bad_rows(config: OwnData) -> list[str]:
    """What is said of each bad row."""
    source = open_source(config)
    if not isinstance(source, ParquetSource):
        return [str(row) for row in source.bad_rows(np.arange(source.rows, dtype=np.int64))]  # type: ignore[union-attr]
    found = []
    for piece in source.pieces():
        for _, _, _, bad in source.stream(piece, source.layout(), np.ones(piece.rows, dtype=bool)):
            found += [str(row) for row in bad]
    return found


def split_sizes(splits: Mapping[str, Sequence[Any] | Array]) -> dict[str, int]:
    return {name: len(rows) for name, rows in splits.items()}
