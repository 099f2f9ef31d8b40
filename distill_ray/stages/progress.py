"""What can be told of a model folder without torch: whether it is finished, and how far its training is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

from distill_ray import artifacts
from distill_ray.artifacts import METRICS_FILE, WEIGHTS_FILE, History, Stage
from distill_ray.storage import Folder


def is_whole(target: Stage) -> bool:
    """Whether the folder is finished and its weights are those that it says."""
    summary = target.finished()
    if summary is None:
        return False
    weights = {"bytes": summary.get("bytes"), "sha256": summary.get("weights_sha256")}
    files = summary.get("files", {WEIGHTS_FILE: weights})  # a given teacher has others, or none
    if any(target.folder.size(name) != file["bytes"] for name, file in files.items()):
        return False
    if not target.folder.is_local:
        return True  # reading it all to compare would cost a download; who loads it compares
    return all(_sha256(target.folder, name) == file["sha256"] for name, file in files.items())


def _sha256(folder: Folder, name: str) -> str:
    return hashlib.sha256(folder.buffer(name)).hexdigest()


class Follower:
    """Reads the lines that training adds to ``metrics.jsonl`` of a folder, wherever the worker is."""

    def __init__(self, folder: Folder, on_row: Callable[[dict[str, float]], None]) -> None:
        self._folder, self._on_row = folder, on_row
        self._seen = len(read_history(folder))

    @property
    def epochs(self) -> int:
        """Epochs seen so far, those of earlier starts included."""
        return self._seen

    def poll(self) -> None:
        """Hand on the rows that are new since the last call."""
        history = read_history(self._folder)
        for row in history[self._seen :]:
            self._on_row(row)
        self._seen = max(self._seen, len(history))


def read_history(folder: Folder) -> History:
    """The finished epochs of a folder, empty where training has not begun."""
    try:
        return [json.loads(line) for line in folder.read_bytes(METRICS_FILE).decode().splitlines()]
    except (FileNotFoundError, ValueError):
        return []


def epoch_note(row: dict[str, float]) -> str:
    """An epoch in a few words, for progress lines."""
    loss, speed = row["train_loss"], row["rows_per_s"]
    measured = "accuracy" if "validation_accuracy" in row else "agreement"
    return f"epochs  loss {loss:.4f}  validation {measured} {artifacts.score(row):.4f}  {speed:,.0f} rows/s"
