"""What can be told of a model folder without torch: whether it is finished, and how far its training is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress

from distill_ray import artifacts
from distill_ray.artifacts import METRICS_FILE, WEIGHTS_FILE, History, Stage
from distill_ray.storage import Folder

_NOTE_FILE = "note.txt"


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


def note_for_driver(folder: Folder) -> Callable[[str], None]:
    """What a worker tells the one who follows it: ``on_note`` of training.fit, since its log is seen by nobody."""
    return lambda text: folder.write_text(_NOTE_FILE, text)


class Follower:
    """Reads the lines that training adds to ``metrics.jsonl`` of a folder, wherever the worker is; and its note."""

    def __init__(
        self, folder: Folder, on_row: Callable[[dict[str, float]], None], on_note: Callable[[str], None]
    ) -> None:
        self._folder, self._on_row, self._on_note = folder, on_row, on_note
        self._seen = len(read_history(folder))

    @property
    def epochs(self) -> int:
        """Epochs seen so far, those of earlier starts included."""
        return self._seen

    def poll(self) -> None:
        """Hand on the rows that are new since the last call."""
        history = read_history(self._folder)
        if len(history) > self._seen:  # not at each look: an object store is asked once less
            self._pass_note_on()
        for row in history[self._seen :]:
            self._on_row(row)
        self._seen = max(self._seen, len(history))

    def _pass_note_on(self) -> None:
        with suppress(FileNotFoundError):
            self._on_note(self._folder.read_bytes(_NOTE_FILE).decode())
            self._folder.delete(_NOTE_FILE)


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
