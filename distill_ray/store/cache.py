"""Local copies of the shards of remote stores: bounded in bytes, shared by the processes of a machine.

A copy is named by the SHA-256 of its content, so stores share one cache and an outdated copy cannot exist. Everything
that changes the folder happens under one lock of the kernel's, which ends with its process: the bound holds at every
moment, and what a killed process left is swept by the next one. Readers need no lock: a file that is deleted while it
is mapped stays readable.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from filelock import FileLock

_LOCK_TIMEOUT_S = 300.0  # whoever holds a lock copies one shard of at most 100 MiB, or is stuck
_SUFFIX, _TEMPORARY_SUFFIX = ".arrow", ".part"
_OURS = re.compile(r"[0-9a-f]{64}(\.arrow|\.part)\Z")  # the folder is the user's, too


@dataclass(frozen=True)
class ShardCache:
    """A folder of this machine that holds at most ``limit_bytes`` of shards."""

    directory: Path
    limit_bytes: int

    @classmethod
    def of(cls, directory: str, limit_gib: float) -> ShardCache:
        """As the config has it; ``auto`` is the user's cache folder of this machine (XDG base directories)."""
        if directory == "auto":
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            return cls(base / "distill_ray" / "shards", int(limit_gib * 2**30))
        return cls(Path(directory), int(limit_gib * 2**30))

    def get(self, sha256: str, size: int, download: Callable[[], pa.Buffer]) -> tuple[pa.Buffer, bool]:
        """The shard with this checksum and size, mapped from its local copy; downloaded where there is none.

        Where the cache cannot be used (too small, disk full, not writable) the shard comes from the store each time.

        Returns:
            The bytes, and whether they are known to have the checksum. A copy that has not is replaced; a download that
            has not is for the caller to refuse.
        """
        if size > self.limit_bytes:
            return download(), False
        try:
            turn = self._lock(f"{sha256[:2]}.lock")  # one download a machine, not one a process
            turn.acquire()
        except OSError:  # a lock that is not had in time, too
            return download(), False
        try:
            copy = self._copy(sha256, size)
            return (copy, True) if copy is not None else self._keep(sha256, download())
        finally:
            turn.release()

    def _copy(self, sha256: str, size: int) -> pa.Buffer | None:
        path = self.directory / f"{sha256}{_SUFFIX}"
        with suppress(OSError):
            with pa.memory_map(str(path)) as source:
                buffer = source.read_buffer()
            if buffer.size == size and hashlib.sha256(buffer).hexdigest() == sha256:
                with suppress(OSError):  # evicted a moment ago; what is mapped stays
                    os.utime(path)
                return buffer
            path.unlink(missing_ok=True)
        return None

    def _keep(self, sha256: str, data: pa.Buffer) -> tuple[pa.Buffer, bool]:
        if hashlib.sha256(data).hexdigest() != sha256:
            return data, False
        path = self.directory / f"{sha256}{_SUFFIX}"
        temporary = path.with_suffix(_TEMPORARY_SUFFIX)
        with suppress(OSError), self._lock("evict.lock"):
            self._make_room(data.size)
            try:
                temporary.write_bytes(data)
                temporary.replace(path)
            except OSError:
                temporary.unlink(missing_ok=True)
        return data, True

    def _make_room(self, size: int) -> None:
        """Delete the copies that were used longest ago. Under the lock, so whatever is half-written is dead."""
        found = []
        for path in filter(lambda path: _OURS.match(path.name), self.directory.iterdir()):
            if path.suffix == _TEMPORARY_SUFFIX:
                path.unlink()
            else:
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        held = sum(bytes_ for _, bytes_, _ in found)
        for _, bytes_, path in sorted(found):
            if held + size <= self.limit_bytes:
                return
            path.unlink(missing_ok=True)
            held -= bytes_

    def _lock(self, name: str) -> FileLock:
        locks = self.directory / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(str(locks / name), timeout=_LOCK_TIMEOUT_S)
