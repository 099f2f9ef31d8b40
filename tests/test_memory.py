"""Memory that a model gives back after every batch stays in the process: in a script, and in a worker of Ray."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray

from distill_ray.config import from_dict
from distill_ray.runtime import Session
from distill_ray.storage import Folder
from distill_ray.store import shards
from tests import stores
from tests.report_fixtures import RUN

_CHURN = """
import resource, sys, torch
from distill_ray.memory import keep_freed_memory

def faults(mebibytes, keep=True):
    if keep and not keep_freed_memory():
        sys.exit("refused")
    for _ in range(30):  # until the heap has found its shape
        torch.empty(mebibytes * 2**18).zero_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(mebibytes * 2**18).zero_()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""
_SHARE = 10  # of the faults that are there when nothing is kept


def _huge_pages_always() -> bool:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.exists() and "[always]" in path.read_text()


pytestmark = [
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt"),
    pytest.mark.skipif(_huge_pages_always(), reason="with transparent huge pages 'always' a block is a few faults"),
]


def _faults_of_a_script(call: str) -> int:
    script = f"{_CHURN}\nprint({call})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if done.stderr.strip() == "refused":
        pytest.skip("this glibc refuses such a threshold (2.34 and before: 32 MiB at most)")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_memory_is_kept() -> None:
    """48 MiB, twenty times: all their pages are faulted in anew unless malloc keeps them."""
    kept, left = _faults_of_a_script("faults(48)"), _faults_of_a_script("faults(48, keep=False)")
    assert left > _SHARE * max(kept, 20)  # less than a page for each of the twenty is none


def test_a_worker_of_ray_keeps_blocks_that_no_threads_heap_holds(tmp_path: Path) -> None:
    """Ray Data's actors, as others that may be asked twice at once, work in threads; 80 MiB is more than a heap of a
    thread's can be."""

    @ray.remote(max_concurrency=2)
    class Actor:
        def faults(self) -> int:
            names: dict[str, object] = {}
            exec(_CHURN + "\nfound = faults(80)", names)
            return int(str(names["found"]))

    left = _faults_of_a_script("faults(80, keep=False)")
    session = Session(from_dict(RUN), Folder.at(tmp_path))
    try:
        session.start()
        kept = ray.get(Actor.remote().faults.remote(), timeout=120)  # type: ignore[attr-defined]
    finally:
        session.close()
    assert left > _SHARE * max(kept, 20)


_WINDOWS = """
import sys
from distill_ray.memory import keep_freed_memory
from distill_ray.store import StoredSplit, open_store

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

keep_freed_memory()
split = StoredSplit(open_store(sys.argv[1]), "train", None, window_rows=1)
split.load([0])
before = resident()
window = split.load(range(len(split.shard_rows)))
size, held = window.inputs.nbytes, resident() - before
del window
print(size, held, resident() - before)
"""


def test_a_window_gives_its_memory_back(tmp_path: Path) -> None:
    """Windows come and go for hours: what malloc keeps for the next batch would grow with the holes between them."""
    shape, rows = (64, 1024), 256
    records = [
        shards.write(
            Folder.at(tmp_path), "train", index,
            shards.encode_data(
                np.arange(index * rows, (index + 1) * rows), np.zeros((rows, *shape), np.uint8),
                np.zeros(rows, np.int64), [str(n) for n in range(rows)],
            ), store=stores.DATA_DIGEST,
        )
        for index in range(3)
    ]  # fmt: skip
    stores.commit_data(Folder.at(tmp_path), records, shape=shape)
    done = subprocess.run([sys.executable, "-c", _WINDOWS, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, held, left = map(int, done.stdout.split())
    assert held > 0.9 * size
    assert left < 0.5 * size
