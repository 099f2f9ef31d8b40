"""Data stores and label stores: Arrow IPC shards and the manifest that commits them. The format is in FORMAT.md."""

from __future__ import annotations

from distill_ray.store.manifest import DataManifest, LabelManifest, ShardRecord
from distill_ray.store.reader import SplitArrays, Store, open_store, read_split

__all__ = ["DataManifest", "LabelManifest", "ShardRecord", "SplitArrays", "Store", "open_store", "read_split"]
