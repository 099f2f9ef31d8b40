"""Checkpoints of a training run: safetensors files named by position and by their own checksum.

A file whose content does not match its name is not whole, whatever killed its writer, and is passed over. Kept are the
last two epochs, the best as of each of them, and the last two within the present epoch. Where the best one's file alone
is lost, the training goes on and the best of those left takes its place, which the header says from then on. Nothing is
pickled: the optimizer's tensors lie beside the weights, the rest is JSON in the header.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from distill_ray.artifacts import History, best_epoch, score
from distill_ray.errors import RunError
from distill_ray.storage import Folder

_NAME = re.compile(r"^epoch-(?P<epoch>\d{5})(-steps-(?P<steps>\d{9}))?-(?P<checksum>[0-9a-f]{16})\.safetensors$")
_MODEL, _AVERAGE, _OPTIMIZER, _HEADER = "model.", "average.", "optimizer.", "distill_ray"
_Position = tuple[int, int]  # whole epochs, and steps of the next
_PATIENCE_S, _PAUSE_S = 60.0, 1.0  # NFS clients by default believe for up to a minute what they know of a folder


@dataclass(frozen=True)
class Unfinished:
    """How far an epoch is: its ``steps`` done, the ``sums`` of its loss terms over their rows, and the ``seconds``."""

    steps: int
    sums: list[float]
    labelled: int
    seconds: float


@dataclass(frozen=True)
class Mended:
    """As of ``epoch`` the best epoch's weights were lost; ``best_epoch`` took its place, 0 where none was left."""

    epoch: int
    best_epoch: int


@dataclass(frozen=True)
class Checkpoint:
    """The state after ``epoch`` whole epochs, and ``unfinished`` of the next.

    ``average`` is the moving average of the weights, where there is one; ``model`` is what the optimizer works on.
    ``best_epoch`` is the best of those whose weights are kept, see ``best_kept``.
    """

    epoch: int
    model: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    history: History
    best_epoch: int
    unfinished: Unfinished | None = None
    mended: Mended | None = None

    @property
    def position(self) -> _Position:
        """For comparing: later is larger."""
        return self.epoch, self.unfinished.steps if self.unfinished is not None else 0


@dataclass(frozen=True)
class Choice:
    """What a training continues from: the file ``name`` and its content, None where nothing is whole; and a line that
    says what was lost, None where nothing was."""

    name: str | None
    checkpoint: Checkpoint | None
    lost: str | None


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint with memory of its own: training can go on while it is written."""

    checkpoint: Checkpoint
    tensors: dict[str, torch.Tensor]
    header: str


class Writer:
    """Does what it is given in a thread, in order, one thing at a time: checkpoints are hashed, written and uploaded
    while training goes on. As a context manager it ends when all is done."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[None] | None = None

    def submit(self, work: Callable[[], None]) -> None:
        """Start ``work`` when what was given before is done, and wait for that: no more than one snapshot is kept.

        Raises:
            OSError, or whatever else that raised.
        """
        self.wait()
        self._pending = self._thread.submit(work)

    def wait(self) -> None:
        """Until all is done; raises as ``submit`` does."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._thread, suppress(*([] if kind is None else [Exception])):  # the first error is the one to tell
            self.wait()


def save(folder: Folder, checkpoint: Checkpoint) -> None:
    """Write the checkpoint, then drop those that are of no use any more."""
    write(folder, snapshot(checkpoint))


def snapshot(checkpoint: Checkpoint) -> Snapshot:
    """A copy of all that ``checkpoint`` refers to."""
    tensors = {f"{_MODEL}{name}": tensor for name, tensor in checkpoint.model.items()}
    tensors |= {f"{_AVERAGE}{name}": tensor for name, tensor in (checkpoint.average or {}).items()}
    plain: dict[str, dict[str, Any]] = {}
    for index, state in checkpoint.optimizer["state"].items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{_OPTIMIZER}{index}.{name}"] = value
            else:
                plain.setdefault(str(index), {})[name] = value
    header = {
        "epoch": checkpoint.epoch, "history": checkpoint.history, "best_epoch": checkpoint.best_epoch,
        "param_groups": checkpoint.optimizer["param_groups"], "optimizer_plain": plain, "scaler": checkpoint.scaler,
        "unfinished": None if checkpoint.unfinished is None else asdict(checkpoint.unfinished),
        **({} if checkpoint.mended is None else {"mended": asdict(checkpoint.mended)}),
    }  # fmt: skip
    # A copy: safetensors wants contiguous memory of its own, channels_last weights are not contiguous.
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return Snapshot(checkpoint, owned, json.dumps(header))


def write(folder: Folder, taken: Snapshot) -> None:
    """As ``save``, of a snapshot."""
    checkpoint = taken.checkpoint
    data = save_tensors(taken.tensors, metadata={_HEADER: taken.header})
    checksum = hashlib.sha256(data).hexdigest()[:16]
    within = "" if checkpoint.unfinished is None else f"-steps-{checkpoint.unfinished.steps:09d}"
    folder.write_bytes(f"epoch-{checkpoint.epoch:05d}{within}-{checksum}.safetensors", data)
    _drop_old(folder, checkpoint)


def best_kept(history: History, mended: Mended | None) -> int:
    """``artifacts.best_epoch`` of those whose weights are kept; 0 where there is none."""
    if mended is None or len(history) < mended.epoch:
        return best_epoch(history)
    kept = [*([mended.best_epoch] if mended.best_epoch else []), *range(mended.epoch + 1, len(history) + 1)]
    return max(kept, key=lambda epoch: score(history[epoch - 1]), default=0)  # the earliest of equals


def latest(folder: Folder) -> Checkpoint | None:
    """The checkpoint of ``choose``."""
    return choose(folder).checkpoint


def choose(folder: Folder) -> Choice:
    """What a training continues from: the newest whole checkpoint whose best epoch is whole too.

    Where that is more than an epoch back, it is the newest whole one, and the best of what is left is its best.
    """
    found, newest, damaged = _found(folder), None, list[str]()
    for position in sorted(found, reverse=True):
        if newest is not None and position[0] < newest[1].epoch - 1:
            break
        whole = _whole_file(folder, found[position])
        if whole is None:
            damaged += found[position]
        elif _has_its_best(folder, whole[1]):
            return Choice(*whole, _told(damaged, whole[1], newest))
        else:
            newest = newest or whole
    if newest is None:
        return Choice(None, None, _told(damaged, None, None))
    mended = _mended(folder, newest[1])
    return Choice(newest[0], mended, _told(damaged, mended, newest))


def _mended(folder: Folder, checkpoint: Checkpoint) -> Checkpoint:
    """The same with the best of the finished epochs whose weights are left."""
    ends = [epoch for epoch, steps in _found(folder) if not steps and epoch <= checkpoint.epoch]
    by_score = sorted(ends, key=lambda epoch: (-score(checkpoint.history[epoch - 1]), epoch))
    best = next((epoch for epoch in by_score if at(folder, epoch) is not None), 0)
    return replace(checkpoint, best_epoch=best, mended=Mended(checkpoint.epoch, best))


def _told(damaged: list[str], checkpoint: Checkpoint | None, newest: tuple[str, Checkpoint] | None) -> str | None:
    """What was lost: the ``damaged`` files, and the best epoch of the ``newest`` whole one; and what goes on."""
    lost = [f"{', '.join(damaged)}: not whole"] if damaged else []
    if newest is not None:
        lost.append(f"the weights of epoch {newest[1].best_epoch}, the best until then, are lost")
    if not lost:
        return None
    if checkpoint is None:
        goes_on = "nothing else is whole: the training begins anew"
    else:
        steps = f" and {checkpoint.unfinished.steps} steps" if checkpoint.unfinished is not None else ""
        goes_on = f"the training goes on after epoch {checkpoint.epoch}{steps}"
        if checkpoint.mended is not None and newest is not None and checkpoint.best_epoch:
            goes_on += f", the best is now epoch {checkpoint.best_epoch}"
    return f"{'; '.join(lost)}; {goes_on}"


def at(folder: Folder, epoch: int) -> Checkpoint | None:
    """The whole checkpoint of an epoch's end, None where there is none."""
    whole = _whole_file(folder, _found(folder).get((epoch, 0), []))
    return None if whole is None else whole[1]


def named(folder: Folder, name: str) -> Checkpoint:
    """The checkpoint in the file ``name``, which another worker has read; this one's view of the folder may be older.

    Raises:
        RunError: it is not there, or not whole, for long.
    """
    until = time.monotonic() + _PATIENCE_S
    while True:
        with suppress(OSError):  # a handle of the server that is stale
            if (whole := _whole_file(folder, [name])) is not None:
                return whole[1]
        if time.monotonic() >= until:
            raise RunError(
                f"{folder / name}: worker 0 continues from it, another worker cannot read it: see that its node has "
                "the same folder there, and run the command again"
            )
        time.sleep(_PAUSE_S)


def _has_its_best(folder: Folder, checkpoint: Checkpoint) -> bool:
    if checkpoint.best_epoch in (0, checkpoint.position[0]) and checkpoint.unfinished is None:
        return True
    return checkpoint.best_epoch == 0 or at(folder, checkpoint.best_epoch) is not None


def _whole_file(folder: Folder, names: list[str]) -> tuple[str, Checkpoint] | None:
    """The first of ``names`` that is whole, and what it holds."""
    for name in names:
        try:
            data = folder.read_bytes(name)
        except FileNotFoundError:  # another run, which sees no lock of this one, has dropped it
            continue
        if hashlib.sha256(data).hexdigest()[:16] != _NAME.match(name)["checksum"]:  # type: ignore[index]
            continue
        try:
            return name, _decode(data)
        except (SafetensorError, KeyError, ValueError):
            continue
    return None


def _decode(data: bytes) -> Checkpoint:
    header_size = int.from_bytes(data[:8], "little")  # safetensors format: u64 header length, JSON header, tensors
    header = json.loads(json.loads(data[8 : 8 + header_size])["__metadata__"][_HEADER])
    model: dict[str, torch.Tensor] = {}
    average: dict[str, torch.Tensor] = {}
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in header["optimizer_plain"].items()}
    for name, tensor in load_tensors(data).items():
        if name.startswith(_MODEL):
            model[name.removeprefix(_MODEL)] = tensor
        elif name.startswith(_AVERAGE):
            average[name.removeprefix(_AVERAGE)] = tensor
        else:
            index, _, key = name.removeprefix(_OPTIMIZER).partition(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer = {"state": state, "param_groups": header["param_groups"]}
    unfinished, mended = header.get("unfinished"), header.get("mended")
    return Checkpoint(
        header["epoch"], model, average or None, optimizer, header["scaler"], header["history"], header["best_epoch"],
        None if unfinished is None else Unfinished(**unfinished), None if mended is None else Mended(**mended),
    )  # fmt: skip


def _found(folder: Folder) -> dict[_Position, list[str]]:
    found: dict[_Position, list[str]] = {}
    for name in folder.names():
        if match := _NAME.match(name):
            found.setdefault((int(match["epoch"]), int(match["steps"] or 0)), []).append(name)
    return found


def _drop_old(folder: Folder, newest: Checkpoint) -> None:
    # The previous checkpoint is only of use with its own best epoch, which may not be the newest's.
    before = newest.history[:-1]
    epochs = {newest.epoch, newest.epoch - 1, newest.best_epoch, best_kept(before, newest.mended) if before else 0}
    found = _found(folder)
    within = sorted(position for position in found if position[1] and position <= newest.position)
    keep = {(epoch, 0) for epoch in epochs} | (set(within[-2:]) if newest.unfinished is not None else set())
    for position, names in found.items():
        if position not in keep and position < newest.position:  # later ones are another writer's
            for name in names:
                folder.delete(name)
