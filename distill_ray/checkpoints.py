"""Checkpoints of a training run: one safetensors file an epoch, named by its own checksum.

A file whose content does not match its name is not whole, whatever killed its writer, and is passed over. Kept are the
last two, and the best as of each of them. Nothing is pickled: the optimizer's tensors lie beside the weights, the rest
is JSON in the header.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from distill_ray.artifacts import History
from distill_ray.storage import Folder

_NAME = re.compile(r"^epoch-(?P<epoch>\d{5})-(?P<checksum>[0-9a-f]{16})\.safetensors$")
_MODEL, _OPTIMIZER, _HEADER = "model.", "optimizer.", "distill_ray"


@dataclass(frozen=True)
class Checkpoint:
    """The state after ``epoch`` whole epochs."""

    epoch: int
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    history: History
    best_epoch: int


def best_epoch(history: History) -> int:
    """The epoch of the best validation accuracy, the earliest of equals."""
    accuracies = [row["validation_accuracy"] for row in history]
    return 1 + accuracies.index(max(accuracies))


def save(folder: Folder, checkpoint: Checkpoint) -> None:
    """Write the checkpoint, then drop those that are neither among the last two nor the best."""
    tensors = {f"{_MODEL}{name}": tensor for name, tensor in checkpoint.model.items()}
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
    }  # fmt: skip
    # A copy: safetensors wants contiguous memory of its own, channels_last weights are not contiguous.
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data = save_tensors(owned, metadata={_HEADER: json.dumps(header)})
    checksum = hashlib.sha256(data).hexdigest()[:16]
    folder.write_bytes(f"epoch-{checkpoint.epoch:05d}-{checksum}.safetensors", data)
    _drop_old(folder, checkpoint)


def latest(folder: Folder) -> Checkpoint | None:
    """The newest checkpoint that is whole and whose best epoch is whole too; None where there is none."""
    for epoch in sorted(_epochs(folder), reverse=True):
        checkpoint = at(folder, epoch)
        if checkpoint is not None and (checkpoint.best_epoch == epoch or at(folder, checkpoint.best_epoch) is not None):
            return checkpoint
    return None


def at(folder: Folder, epoch: int) -> Checkpoint | None:
    """The whole checkpoint of an epoch, None where there is none."""
    for name in _epochs(folder).get(epoch, []):
        try:
            data = folder.read_bytes(name)
        except FileNotFoundError:  # another run, which sees no lock of this one, has dropped it
            continue
        if hashlib.sha256(data).hexdigest()[:16] != _NAME.match(name)["checksum"]:  # type: ignore[index]
            continue
        try:
            return _decode(data)
        except (SafetensorError, KeyError, ValueError):
            continue
    return None


def _decode(data: bytes) -> Checkpoint:
    header_size = int.from_bytes(data[:8], "little")  # safetensors format: u64 header length, JSON header, tensors
    header = json.loads(json.loads(data[8 : 8 + header_size])["__metadata__"][_HEADER])
    model: dict[str, torch.Tensor] = {}
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in header["optimizer_plain"].items()}
    for name, tensor in load_tensors(data).items():
        if name.startswith(_MODEL):
            model[name.removeprefix(_MODEL)] = tensor
        else:
            index, _, key = name.removeprefix(_OPTIMIZER).partition(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer = {"state": state, "param_groups": header["param_groups"]}
    return Checkpoint(header["epoch"], model, optimizer, header["scaler"], header["history"], header["best_epoch"])


def _epochs(folder: Folder) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in folder.names():
        if match := _NAME.match(name):
            found.setdefault(int(match["epoch"]), []).append(name)
    return found


def _drop_old(folder: Folder, newest: Checkpoint) -> None:
    # The previous checkpoint is only of use with its own best epoch, which may not be the newest's.
    before = newest.history[:-1]
    keep = {newest.epoch, newest.epoch - 1, newest.best_epoch, best_epoch(before) if before else 0}
    for epoch, names in _epochs(folder).items():
        if epoch not in keep and epoch < newest.epoch:  # later ones are another writer's
            for name in names:
                folder.delete(name)
