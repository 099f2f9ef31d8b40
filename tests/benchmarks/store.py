"""The label store: speed of reading, bytes, memory, and the time to open it. 62 classes, default shard size."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill_ray.config import Glyph62Data
from distill_ray.storage import Folder
from distill_ray.store import ShardRecord, Store, shards
from tests.benchmarks.common import Figure, Settings, alternate, benchmark
from tests.harness import environment
from tests.stores import LABELS_DIGEST, commit_labels

_CLASSES = 62
_SHARD_ROWS = int(Glyph62Data(source="glyph62").shard_rows)
PAYLOAD = 8 + 2 * _CLASSES  # bytes of a row: its id, its logits in float16
_READ_ROWS = 2_100_000  # 264 MiB
_MEMORY_ROWS = 100_000
_MANY_SHARDS = 100_000


@benchmark("store.read")
def read(settings: Settings) -> Figure:
    """Bytes/s of reading a whole label store into two tensors, against np.fromfile of each shard file.

    Ours ends with all ids in one int64 tensor and all logits in one contiguous float16 tensor, in ordinary memory. The
    reference ends with the files' bytes in memory, an array a file. Both count the files' bytes; the files are in the
    page cache. No checksums: they are in ``store.verified_read``.
    """
    return _read_figure("store.read", settings, verify=False, target=0.8)


@benchmark("store.verified_read")
def verified_read(settings: Settings) -> Figure:
    """The same with every checksum verified, as on the first read of a store; beside store.read, without a target."""
    return _read_figure("store.verified_read", settings, verify=True, target=None)


@benchmark("store.bytes")
def stored_bytes(settings: Settings) -> Figure:
    """Bytes of a label store's shard files against its payload: ids of 8 bytes, logits of 2 bytes each."""
    store = _label_store(settings.out / "store-read", settings.sized(_READ_ROWS, 4 * _SHARD_ROWS))
    files = sum((store.folder.path / shard.file).stat().st_size for shard in store.manifest.shards)
    pairs = ((float(files), float(store.manifest.rows * PAYLOAD)),)
    return Figure("store.bytes", "bytes", pairs, target=1.03, at_most=True)


@benchmark("store.memory")
def memory(settings: Settings) -> Figure:
    """Peak anonymous memory of a fresh process that streams a label store, at 10 times the rows against once the rows.

    This is ``Store.label_shard``, which ``read_shards`` stands on: every shard is read, verified and let go, and its
    logits are summed. Training is not measured here: it keeps a split in memory on purpose (``read_split``), unless
    ``shuffle`` is ``window``. The process samples itself, every 2 ms and after each shard.
    """
    large, small = (
        _label_store(settings.out / f"store-{name}", rows).folder.path
        for name, rows in zip(("large", "small"), memory_rows(settings), strict=True)
    )
    pairs = alternate("store.memory", settings.pairs, lambda: _fresh("stream", large), lambda: _fresh("stream", small))
    return Figure("store.memory", "bytes", pairs, target=1.15, at_most=True)


def memory_rows(settings: Settings) -> tuple[int, int]:
    """Of ``store.memory``: ten times the rows, and once."""
    rows = settings.sized(_MEMORY_ROWS, 40_000)
    return 10 * rows, rows


@benchmark("store.open")
def opening(settings: Settings) -> Figure:
    """Seconds to open a store of 100,000 shards, in a fresh process whose imports are done. No reference."""
    folder = settings.out / "store-open"
    _write_manifest(folder, settings.sized(_MANY_SHARDS, 100))
    pairs = tuple((_fresh("open", folder), None) for _ in range(settings.pairs))
    return Figure("store.open", "s", pairs, target=2.0, at_most=True)


def _read_figure(name: str, settings: Settings, *, verify: bool, target: float | None) -> Figure:
    store = _label_store(settings.out / "store-read", settings.sized(_READ_ROWS, 4 * _SHARD_ROWS))
    paths = [store.folder.path / shard.file for shard in store.manifest.shards]
    size = sum(path.stat().st_size for path in paths)

    def rate(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        held = work()
        seconds = time.perf_counter() - started
        del held  # outside the time: giving memory back is part of neither
        return size / seconds

    def ours() -> float:
        return rate(lambda: _read_to_tensors(store, verify=verify))

    def reference() -> float:
        return rate(lambda: [np.fromfile(path, dtype=np.uint8) for path in paths])

    for warm_up in (ours, reference):
        warm_up()
    return Figure(name, "bytes/s", alternate(name, settings.pairs, ours, reference), target)


def _read_to_tensors(store: Store, *, verify: bool) -> tuple[Tensor, Tensor]:
    """(ids [N], logits [N, C]) of all rows, in memory of their own.

    numpy asks the kernel for huge pages, torch does not: filling 260 MB for the first time takes a third of the time.
    """
    rows, classes = store.manifest.rows, store.manifest.classes
    ids_N, logits_NC = np.empty(rows, dtype=np.int64), np.empty((rows, classes), dtype=np.float16)
    start = 0
    for record in store.manifest.shards:
        shard = store.label_shard(record, verify=verify)
        ids_N[start : start + record.rows] = shard.row_ids
        logits_NC[start : start + record.rows] = shard.logits
        start += record.rows
    return torch.from_numpy(ids_N), torch.from_numpy(logits_NC)


@cache
def _label_store(folder: Path, rows: int) -> Store:
    """A label store of random logits, written by the real shard writer; one split."""
    place, random = Folder.at(folder), np.random.default_rng(0)
    records = []
    for index, first in enumerate(range(0, rows, _SHARD_ROWS)):
        ids = np.arange(first, min(first + _SHARD_ROWS, rows), dtype=np.int64)
        logits = random.standard_normal((len(ids), _CLASSES), dtype=np.float32) * 4
        batch = shards.encode_logits(ids, logits, precision="fp32")
        records.append(shards.write(place, "train", index, batch, store=LABELS_DIGEST))
    return _commit(place, records)


def _write_manifest(folder: Path, number: int) -> None:
    """The manifest of a store of so many shards, without the shards: opening a store does not look at them."""
    records = []
    for index in range(number):
        sha256 = f"{index:064x}"
        first, size = index * _SHARD_ROWS, _SHARD_ROWS * PAYLOAD
        records.append(
            ShardRecord(
                split="train", index=index, file=f"train-{index:05d}-{sha256[:16]}.arrow", rows=_SHARD_ROWS,
                first_id=first, last_id=first + _SHARD_ROWS - 1, bytes=size, sha256=sha256,
            )
        )  # fmt: skip
    _commit(Folder.at(folder), records)


def _commit(folder: Folder, records: list[ShardRecord]) -> Store:
    return commit_labels(folder, records, classes=_CLASSES, class_names=tuple(map(str, range(_CLASSES))))


def _fresh(work: str, folder: Path) -> float:
    """What ``store_child`` prints for ``work``, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.store_child", work, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise RuntimeError(f"{work} {folder}: {done.stderr[-2000:]}")
    return float(done.stdout)
