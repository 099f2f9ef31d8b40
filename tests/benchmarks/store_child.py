"""What is measured in a process of its own: ``stream FOLDER`` prints peak bytes, ``open FOLDER`` seconds."""

from __future__ import annotations

import sys
import time

import numpy as np

from distill_ray.store import open_store
from tests.benchmarks.memory import anonymous_bytes, own_peak


def stream(folder: str) -> float:
    """Peak anonymous memory while all shards are read and verified, one after the other."""
    total = 0.0
    with own_peak() as peak:
        store = open_store(folder)
        for record in store.manifest.shards:
            shard = store.label_shard(record)
            total += float(shard.logits.sum(dtype=np.float64)) + int(shard.row_ids[-1])
            peak.see(anonymous_bytes())
    if not total:
        raise RuntimeError(f"{folder}: nothing was read")
    return float(peak.bytes)


def opened(folder: str) -> float:
    """Seconds to open the store."""
    started = time.perf_counter()
    store = open_store(folder)
    seconds = time.perf_counter() - started
    if not store.manifest.shards:
        raise RuntimeError(f"{folder}: no shards")
    return seconds


if __name__ == "__main__":
    print({"stream": stream, "open": opened}[sys.argv[1]](sys.argv[2]))
