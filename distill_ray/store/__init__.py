"""Data stores and label stores: Arrow IPC shards and the manifest that commits them. The format is in FORMAT.md."""

from __future__ import annotations

from distill_ray.store.cache import ShardCache
from distill_ray.store.manifest import DataManifest, LabelManifest, ShardRecord
from distill_ray.store.reader import (
    SplitArrays,
    Store,
    StoredSplit,
    check_identity,
    check_twins,
    open_store,
    read_shards,
    read_split,
)

open = open_store  # distill_ray.store.open(folder): the name that people who import the module will look for

__all__ = [
    "DataManifest",
    "LabelManifest",
    "ShardCache",
    "ShardRecord",
    "SplitArrays",
    "Store",
    "StoredSplit",
    "check_identity",
    "check_twins",
    "open",
    "open_store",
    "read_shards",
    "read_split",
]
