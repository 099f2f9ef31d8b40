"""Where examples come from: one module a source, each giving a :class:`~distill_ray.sources.base.Source`."""

from __future__ import annotations

from distill_ray.config import DataBase, Glyph62Data, IdxData
from distill_ray.sources.base import SPLITS, Examples, Source, SourceInfo
from distill_ray.sources.glyph62 import Glyph62Source
from distill_ray.sources.idx import IdxSource

__all__ = ["SPLITS", "Examples", "Source", "SourceInfo", "open_source"]


def open_source(config: DataBase) -> Source:
    """The source that ``config`` describes.

    Raises:
        UserError: its files are missing, damaged, or not what their names say.
    """
    if isinstance(config, Glyph62Data):
        return Glyph62Source(config)
    if isinstance(config, IdxData):
        return IdxSource(config)
    raise TypeError(f"no source for {type(config).__name__}")
