"""The cache of remote shards: bounded at every moment, right whatever happens to it, one download a machine."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from filelock import FileLock

from distill_ray.store import cache as caches
from distill_ray.store.cache import ShardCache

SIZE = 10_000
PROCESSES, SHARDS = 4, 12


def content(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SIZE)


def checksum(number: int) -> str:
    return hashlib.sha256(content(number)).hexdigest()


class Remote:
    """A store that writes down every download."""

    def __init__(self, log: Path, pause_s: float = 0.0) -> None:
        self.log, self.pause_s = log, pause_s

    def get(self, cache: ShardCache, number: int) -> tuple[pa.Buffer, bool]:
        def download() -> pa.Buffer:
            with self.log.open("a") as file:
                file.write(f"{number}\n")
            time.sleep(self.pause_s)
            return pa.py_buffer(content(number))

        return cache.get(checksum(number), SIZE, download)

    def downloads(self) -> Counter[int]:
        return Counter(int(line) for line in self.log.read_text().split()) if self.log.exists() else Counter()


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    return Remote(tmp_path / "downloads")


def held(cache: ShardCache) -> int:
    """Bytes in the folder, half-written files too."""
    total = 0
    for path in cache.directory.iterdir():
        if path.is_file():
            try:
                total += path.stat().st_size
            except FileNotFoundError:  # evicted meanwhile
                continue
    return total


def cache_of(tmp_path: Path, shards: float) -> ShardCache:
    return ShardCache(tmp_path / "cache", int(shards * SIZE))


def test_a_shard_is_downloaded_once_and_mapped_afterwards(tmp_path: Path, remote: Remote) -> None:
    cache = cache_of(tmp_path, 3)
    for _ in range(3):
        buffer, checked = remote.get(cache, 0)
        assert buffer.to_pybytes() == content(0)
        assert checked
    assert remote.downloads() == {0: 1}


def test_what_was_used_longest_ago_goes_first(tmp_path: Path, remote: Remote) -> None:
    cache = cache_of(tmp_path, 3)
    for number in (0, 1, 2, 0, 3):  # 1 is the oldest when 3 needs room
        remote.get(cache, number)
        time.sleep(0.01)  # file times have a grain
    assert held(cache) == 3 * SIZE
    for number in (0, 2, 3):
        remote.get(cache, number)
    assert remote.downloads() == {0: 1, 1: 1, 2: 1, 3: 1}
    remote.get(cache, 1)
    assert remote.downloads()[1] == 2


def test_a_copy_that_was_evicted_while_it_is_mapped_stays_readable(tmp_path: Path, remote: Remote) -> None:
    cache = cache_of(tmp_path, 1)
    remote.get(cache, 0)
    mapped, _ = remote.get(cache, 0)
    remote.get(cache, 1)
    assert not (cache.directory / f"{checksum(0)}.arrow").exists()
    assert mapped.to_pybytes() == content(0)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_copy_is_downloaded_again(tmp_path: Path, remote: Remote, damage: str) -> None:
    cache = cache_of(tmp_path, 3)
    remote.get(cache, 0)
    path = cache.directory / f"{checksum(0)}.arrow"
    bad = {"flipped": bytes([content(0)[0] ^ 1]) + content(0)[1:], "cut": content(0)[:-1], "empty": b""}[damage]
    path.write_bytes(bad)
    buffer, checked = remote.get(cache, 0)
    assert (buffer.to_pybytes(), checked) == (content(0), True)
    assert path.read_bytes() == content(0)


def test_a_wrong_download_is_neither_kept_nor_called_right(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 3)
    buffer, checked = cache.get(checksum(0), SIZE, lambda: pa.py_buffer(content(1)))
    assert (buffer.to_pybytes(), checked) == (content(1), False)
    assert held(cache) == 0


@pytest.mark.parametrize("shards", [0, 0.5])
def test_a_shard_larger_than_the_bound_is_not_kept(tmp_path: Path, remote: Remote, shards: float) -> None:
    cache = cache_of(tmp_path, shards)
    for _ in range(2):
        assert remote.get(cache, 0)[0].to_pybytes() == content(0)
    assert remote.downloads() == {0: 2}
    assert not cache.directory.exists()


def test_a_place_that_cannot_be_used_costs_a_download_and_no_more(tmp_path: Path, remote: Remote) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    cache = cache_of(tmp_path, 3)
    assert remote.get(cache, 0)[0].to_pybytes() == content(0)
    assert remote.downloads() == {0: 1}


def test_what_a_download_raises_is_raised_once(tmp_path: Path) -> None:
    calls = []

    def gone() -> pa.Buffer:
        calls.append(1)
        raise FileNotFoundError("no such object")

    with pytest.raises(FileNotFoundError, match="no such object"):
        cache_of(tmp_path, 3).get(checksum(0), SIZE, gone)
    assert len(calls) == 1


def test_what_a_killed_process_left_half_written_is_swept(tmp_path: Path, remote: Remote) -> None:
    cache = cache_of(tmp_path, 3)
    remote.get(cache, 0)
    left = cache.directory / f"{checksum(1)}.part"
    left.write_bytes(content(1)[:100])
    remote.get(cache, 2)
    assert not left.exists()


def test_a_lock_that_is_never_released_is_not_waited_for_without_end(
    tmp_path: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "_LOCK_TIMEOUT_S", 0.2)
    cache = cache_of(tmp_path, 3)
    (cache.directory / "locks").mkdir(parents=True)
    with FileLock(str(cache.directory / "locks" / f"{checksum(0)[:2]}.lock")):
        assert remote.get(cache, 0)[0].to_pybytes() == content(0)


def read_all(directory: Path, limit: int, log: Path, seed: int, right: str) -> None:
    """One of several processes: all shards in its own order; ``right`` is written at the end if all was well."""
    cache, remote = ShardCache(directory, limit), Remote(log, pause_s=0.01)
    for number in np.random.default_rng(seed).permutation(SHARDS):
        buffer, checked = remote.get(cache, int(number))
        assert checked
        assert buffer.to_pybytes() == content(int(number))
        assert held(cache) <= limit
    Path(right).write_text("all right")


@pytest.mark.parametrize("room", [SHARDS, 3])
def test_several_processes_share_it(tmp_path: Path, remote: Remote, room: int) -> None:
    cache = cache_of(tmp_path, room)
    context = multiprocessing.get_context("spawn")
    done = [tmp_path / f"done-{seed}" for seed in range(PROCESSES)]
    processes = [
        context.Process(target=read_all, args=(cache.directory, cache.limit_bytes, remote.log, seed, str(path)))
        for seed, path in enumerate(done)
    ]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        most = max(most, held(cache) if cache.directory.exists() else 0)
        time.sleep(0.002)
    for process in processes:
        process.join()
    assert [path.exists() for path in done] == [True] * PROCESSES
    assert 0 < most <= cache.limit_bytes
    if room == SHARDS:  # nothing had to go, so nothing was downloaded twice
        assert remote.downloads() == dict.fromkeys(range(SHARDS), 1)


def test_auto_is_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ShardCache.of("auto", 0.5) == ShardCache(tmp_path / "distill_ray" / "shards", 2**29)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ShardCache.of("auto", 1).directory == Path(os.environ["HOME"]) / ".cache" / "distill_ray" / "shards"
    assert ShardCache.of("/scratch/shards", 1) == ShardCache(Path("/scratch/shards"), 2**30)


def test_the_users_own_files_in_its_folder_are_left_alone(tmp_path: Path, remote: Remote) -> None:
    cache = cache_of(tmp_path, 2)
    cache.directory.mkdir()
    mine = [cache.directory / name for name in ("my_dataset.arrow", "download.part", f"{'a' * 63}.arrow")]
    for path in mine:
        path.write_bytes(bytes(SIZE))
    for number in range(4):
        remote.get(cache, number)
    assert all(path.exists() for path in mine)
    assert held(cache) == (2 + len(mine)) * SIZE
