"""Stage folders: named by a digest of what determines their content, finished by their last file.

``<out>/artifacts/<stage>-<digest>/`` is shared by all runs under ``<out>``. The marker of a stage (``manifest.json``
of a store, ``summary.json`` of a model) is written last; nothing reads a folder without it.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from filelock import FileLock, Timeout

from distill_ray.storage import Folder

StageName = Literal["data", "teacher", "labels", "student", "tune"]

# Raised when the same config would give another result than before: new code, new folders.
STAGE_VERSIONS: Mapping[StageName, int] = {"data": 1, "teacher": 1, "labels": 1, "student": 1, "tune": 2}
MARKERS: Mapping[StageName, str] = {
    "data": "manifest.json",
    "labels": "manifest.json",
    "teacher": "summary.json",
    "student": "summary.json",
    "tune": "summary.json",
}
# Files of a teacher's or student's folder.
WEIGHTS_FILE, SPEC_FILE = "model.safetensors", "model.json"
METRICS_FILE, SUMMARY_FILE = "metrics.jsonl", "summary.json"
History = list[dict[str, float]]  # what metrics.jsonl holds: one row an epoch, in order
_DIGEST_CHARS = 16
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP)  # of a mount without flock


@dataclass(frozen=True)
class Stage:
    """One stage folder of a run."""

    name: StageName
    digest: str
    folder: Folder

    @property
    def marker(self) -> str:
        """The file whose presence says that the folder is finished."""
        return MARKERS[self.name]

    def finished(self) -> dict[str, Any] | None:
        """The marker's content, None while the folder is unfinished.

        A marker that cannot be parsed (a disk that lost its tail) counts as unfinished: the stage runs again and
        reuses whatever in the folder still passes its checksums.
        """
        try:
            content = self.folder.read_json(self.marker)
        except (FileNotFoundError, ValueError):
            return None
        return content if isinstance(content, dict) else None


def stage(out: Folder, name: StageName, payload: Mapping[str, Any]) -> Stage:
    """The folder for ``payload``: the resolved config of the stage and the digests of its inputs."""
    digest = digest_of({"stage": name, "version": STAGE_VERSIONS[name], **payload})
    return Stage(name, digest, out / "artifacts" / f"{name}-{digest}")


def digest_of(payload: Mapping[str, Any]) -> str:
    """A short name for JSON-able content: equal content, equal name, on every machine."""
    canonical = json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:_DIGEST_CHARS]


def score(row: Mapping[str, float]) -> float:
    """What epochs and models are chosen by: the validation accuracy; where no row has a label, the agreement with the
    teacher."""
    return row["validation_accuracy"] if "validation_accuracy" in row else row["validation_agreement"]


def best_epoch(history: History) -> int:
    """The epoch of the best score, the earliest of equals."""
    scores = [score(row) for row in history]
    return 1 + scores.index(max(scores))


def is_over(history: History, epochs: int, patience_epochs: int | None) -> bool:
    """Whether a training has nothing left to do: the last epoch is done, or the accuracy has long stopped rising."""
    if len(history) >= epochs:
        return True
    return patience_epochs is not None and bool(history) and len(history) - best_epoch(history) >= patience_epochs


@contextmanager
def exclusive(target: Stage, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Hold the stage folder for this process; a second run waits for the first and then finds it finished.

    The lock is the kernel's and ends with its process, however that ends, so nobody waits for a dead one. Object stores
    and mounts without flock have no locks: there two writers do the same work twice, and the first to finish stays.
    """
    lock = _lock(target.folder)
    if lock is None:
        yield
        return
    if not _acquired(lock, lambda: on_wait(f"another run is making {target.folder.name}; waiting for it")):
        yield
        return
    try:
        yield
    finally:
        lock.release()


def has_locks(folder: Folder) -> bool:
    """Whether processes that write a stage's folder can shut each other out."""
    lock = _lock(folder, "probe")
    if lock is None or not _acquired(lock, lambda: None):  # whoever else holds it has just asked the same
        return False
    lock.release()
    return True


def _acquired(lock: FileLock, on_wait: Callable[[], None]) -> bool:
    """Wait for the lock; False where the file system has none."""
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            lock.acquire()
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _lock(folder: Folder, name: str | None = None) -> FileLock | None:
    """The lock of a stage's folder, not yet held. None where it is remote.

    Never a marker file: that of a process which was killed would stay, and block its successor for ever.
    """
    if not folder.is_local:
        return None
    directory = folder.path.parent / ".locks"
    directory.mkdir(parents=True, exist_ok=True)
    return FileLock(str(directory / f"{name or folder.name}.lock"), fallback_to_soft=False)
