"""Where examples come from: one module a source.

``glyph62``, ``idx``, ``images`` and ``huggingface`` give rows by number; ``parquet`` is read in pieces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import overload

import pyarrow as pa
from pydantic import TypeAdapter

from distill_ray.config import DataBase, DataConfig, Glyph62Data, HuggingfaceData, IdxData, ImagesData, ParquetData
from distill_ray.errors import RunError
from distill_ray.sources.base import SPLITS, BadRow, Examples, OwnSource, Piece, Source, SourceInfo
from distill_ray.sources.glyph62 import Glyph62Source
from distill_ray.sources.huggingface import HuggingfaceSource
from distill_ray.sources.idx import IdxSource
from distill_ray.sources.images import ImagesSource
from distill_ray.sources.parquet import ParquetSource

__all__ = [
    "SPLITS",
    "AnySource",
    "BadRow",
    "Examples",
    "HuggingfaceSource",
    "ImagesSource",
    "OwnSource",
    "ParquetSource",
    "Piece",
    "Source",
    "SourceInfo",
    "info_of",
    "open_cached",
    "open_source",
    "require_state",
    "state_of",
]

AnySource = Glyph62Source | IdxSource | ImagesSource | HuggingfaceSource | ParquetSource


@overload
def open_source(config: Glyph62Data) -> Glyph62Source: ...
@overload
def open_source(config: IdxData) -> IdxSource: ...
@overload
def open_source(config: DataBase) -> AnySource: ...
def open_source(config: DataBase) -> AnySource:
    """The source that ``config`` describes.

    Raises:
        UserError: its files are missing, damaged, or not what their names say.
    """
    if isinstance(config, Glyph62Data):
        return Glyph62Source(config)
    if isinstance(config, IdxData):
        return IdxSource(config)
    if isinstance(config, ParquetData):
        return ParquetSource(config)
    if isinstance(config, ImagesData):
        return ImagesSource(config)
    if isinstance(config, HuggingfaceData):
        return HuggingfaceSource(config)
    raise TypeError(f"no source for {type(config).__name__}")


def state_of(source: AnySource) -> str:
    """What tells whether the files of a source are still the same."""
    return json.dumps(source.fingerprint(), sort_keys=True)


def open_cached(config: DataBase, state: str) -> AnySource:
    """The source in this state; the same again where this process has just opened it: a worker makes many shards.

    Raises:
        RunError: its files are others now.
    """
    return _open_cached(config.model_dump_json(), state)


@lru_cache(maxsize=1)
def _open_cached(config: str, state: str) -> AnySource:
    source = open_source(TypeAdapter(DataConfig).validate_json(config))
    require_state(source, state)
    return source


def require_state(source: AnySource, state: str) -> None:
    """Refuse a source whose files have changed while they were read: a store holds one state of them.

    Raises:
        RunError: they have.
    """
    if state_of(source) != state:
        raise RunError("data.path: its files changed while they were read: the same command reads them anew")


def info_of(source: AnySource) -> SourceInfo:
    """What is known of a source before its inputs are read, found in this process; of Parquet piece by piece."""
    return source.info(_small_columns(source)) if isinstance(source, ParquetSource) else source.info()


def _small_columns(source: ParquetSource) -> Iterator[tuple[int, pa.Table]]:
    if source.annotated():
        for piece in source.pieces():
            for offset, table in source.annotations(piece):
                yield piece.first_row + offset, table
