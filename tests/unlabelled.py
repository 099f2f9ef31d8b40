"""Data stores of which some rows, or all, have no label: written in the place where the command looks for its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distill_ray.config import Config, to_dict
from distill_ray.sources import open_source
from distill_ray.sources.glyph62 import Glyph62Source
from distill_ray.stages import prepare
from distill_ray.storage import Folder
from distill_ray.store import DataManifest, ShardRecord, Store, open_store, shards
from distill_ray.store import manifest as manifests

Ids = npt.NDArray[np.int64]


def write_data(config: Config, out: Path, labelled: Callable[[str, Ids], npt.NDArray[np.bool_]]) -> Store:
    """The config's data store, with the labels of those rows alone for which ``labelled(split, row_ids)``."""
    source, target = open_source(config.data), prepare.locate(config, Folder.at(out))
    assert isinstance(source, Glyph62Source)
    info, first = source.info(), 0
    records: list[ShardRecord] = []
    for split, rows in info.splits.items():
        for index, start in enumerate(range(0, len(rows), config.data.shard_rows)):
            examples = source.read(rows[start : start + config.data.shard_rows])
            ids = np.arange(first, first + len(examples.labels), dtype=np.int64)
            labels = np.where(labelled(split, ids), examples.labels, -1)
            batch = shards.encode_data(ids, examples.inputs, labels, examples.source_ids)
            records.append(shards.write(target.folder, split, index, batch, store=target.digest))
            first += len(ids)
    manifest = DataManifest(
        digest=target.digest, code_version="0", classes=len(info.class_names), class_names=info.class_names,
        splits=manifests.split_records(records), source=config.data.source, synthetic=info.synthetic,
        shape=info.shape, dtype=info.dtype, input=config.data.input, config=to_dict(config.data),
    )  # fmt: skip
    manifests.write(target.folder, manifest)
    return open_store(target.folder)
