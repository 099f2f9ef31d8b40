"""A data set many times larger than what a run may take of memory: prepared, labelled and trained on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.harness import COMMAND, environment, only, session_processes, write_config
from tests.own_data import pixels, png
from tests.test_cluster import RAY, TOKEN, free_port, wait_for_port

SIDE, DISTINCT = 64, 1000
OBJECT_STORE_BYTES = 200 * 2**20
SMALL_ROWS, ROWS = 6_000, 393_216  # decoded 74 MB, and 4.8 GB: 23 times the object store
TIMEOUT_S = 3000  # a bound for a hang


def write_images(path: Path, rows: int) -> None:
    """Few different images and many rows, so that the file is small: decoded they are what counts."""
    images = pixels(DISTINCT, SIDE, SIDE, 3) // 64 * 64
    images[:, :8] = (np.arange(DISTINCT) % 4 * 60).astype(np.uint8)[:, None, None, None]  # the class can be seen
    encoded = pa.array([png(image) for image in images])
    schema = pa.schema({"image": pa.binary(), "label": pa.int64(), "key": pa.int64()})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 10_000):
            keys = np.arange(start, min(start + 10_000, rows))
            table = {"image": encoded.take(pa.array(keys % DISTINCT)), "label": keys % DISTINCT % 4, "key": keys}
            writer.write_table(pa.table(table, schema=schema), row_group_size=2000)


class Memory:
    """The most anonymous memory that the processes of some sessions had together."""

    def __init__(self, sessions: list[int]) -> None:
        self._sessions, self._over = sessions, threading.Event()
        self.peak_bytes = 0
        self.largest: dict[str, int] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.25):
            found = {
                f"{pid} {title[:60]}": anonymous_bytes(pid)
                for session in self._sessions
                for pid, title in session_processes(session)
            }
            if sum(found.values()) > self.peak_bytes:
                self.peak_bytes, self.largest = sum(found.values()), found


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process: what neither a file nor the shared object store backs."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


@contextmanager
def cluster() -> Iterator[tuple[str, int]]:
    """A head of two CPUs with a small object store; its address and its session."""
    scratch, port = tempfile.mkdtemp(prefix="ray-"), free_port()
    process = subprocess.Popen(
        [RAY, "start", "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2", "--block",
         f"--object-store-memory={OBJECT_STORE_BYTES}", "--include-dashboard=false", "--disable-usage-stats",
         f"--temp-dir={scratch}"],
        env=environment(**TOKEN), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for_port(f"127.0.0.1:{port}")
        yield f"127.0.0.1:{port}", process.pid
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(scratch, ignore_errors=True)


def measured_run(folder: Path, rows: int) -> tuple[int, int, Path]:
    """Prepare so many rows: the peak, the bytes of the data store, and the config of the whole run."""
    folder.mkdir()
    write_images(folder / "images.parquet", rows)
    train = {"epochs": 1, "batch_size": 256, "precision": "fp32", "shuffle": "window", "window_rows": 2048}
    model = {"model": {"name": "mlp", "hidden": [8]}, "train": train}
    data = {"source": "parquet", "path": str(folder / "images.parquet"),
            "columns": {"input": "image", "label": "label", "id": "key"}}  # fmt: skip
    config = write_config(folder, {
        "name": "large", "data": data, "teacher": model, "labels": {"precision": "fp32"}, "student": model,
        "tracking": {"wandb": {"mode": "disabled"}},
    })  # fmt: skip
    with cluster() as (address, session):
        command = [*COMMAND, "prepare", str(config), "--out", str(folder / "runs"), "--json"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=environment(RAY_ADDRESS=address, **TOKEN),
        )  # fmt: skip
        try:
            with Memory([session, process.pid]) as memory:
                _, err = process.communicate(timeout=TIMEOUT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    manifest = json.loads((only(folder / "runs" / "artifacts", "data-*") / "manifest.json").read_text())
    held = sum(shard["bytes"] for split in manifest["splits"].values() for shard in split["shards"])
    print(f"{rows} rows, {held / 2**20:.0f} MiB: {memory.peak_bytes / 2**20:.0f} MiB at most", memory.largest)
    return memory.peak_bytes, held, config


@pytest.mark.slow
def test_preparing_takes_less_memory_than_a_quarter_of_the_data_and_the_run_goes_on(tmp_path: Path) -> None:
    """What is measured: RssAnon of all processes of Ray and of the command, summed, four times a second. Files that are
    mapped or cached are the kernel's to drop and do not count; the shared object store counts as a whole.

    Ray's processes take the same for a data set of any size, so preparing a small one is subtracted: what remains is
    what the data costs. The stages after it read shards in windows; what their processes hold is not asserted here.
    """
    small, _, _ = measured_run(tmp_path / "small", SMALL_ROWS)
    large, held, config = measured_run(tmp_path / "large", ROWS)
    assert large - small + OBJECT_STORE_BYTES < held / 4
    done = subprocess.run(
        [*COMMAND, "run", str(config), "--out", str(config.parent / "runs"), "--json"],
        capture_output=True, text=True, timeout=TIMEOUT_S, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["accuracy"] > 0.9 for row in rows] == [True] * 3
