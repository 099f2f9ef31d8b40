"""A teacher that somebody trained, in each form that it may come in, and half of the rows without a label."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from distill_ray.losses import UNLABELLED
from distill_ray.store import open_store, read_split
from tests.harness import distill_ray, only, write_config
from tests.own_data import write_parquet
from tests.test_given import Net, exported, onnx_of, saved, scripted
from tests.test_own_pipeline import MODELS, NAMES, TRAIN, digits

SHAPE = (8, 8)
_WHITE = 240  # digits() reaches from 0 to this
EXAMPLE = torch.zeros(2, *SHAPE)
OWN_INPUT = {"input": {"scale": 1 / _WHITE, "mean": [0.0], "std": [1.0]}}  # what the networks were trained on


class Place:
    """Where one person works: their data, their two trained networks, all their runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        images, labels = digits()
        words = [NAMES[label] if row % 2 else None for row, label in enumerate(labels)]
        self.data = write_parquet(folder / "digits.parquet", {"pixels": images.tolist(), "digit": words})
        self.nets = [trained(images, labels, seed) for seed in (0, 1)]


def trained(images: Any, labels: Any, seed: int) -> Net:
    """By a plain loop, on half of the rows; its outputs are in the order of the names, as the data's classes are."""
    torch.manual_seed(seed)
    net = Net(classes=10, features=64, hidden=64)
    order = np.argsort(np.argsort(NAMES))
    x, y = torch.from_numpy(images[::2] / _WHITE).float(), torch.from_numpy(order[labels[::2]])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("person"))


def safetensors(place: Place, path: Path) -> dict[str, Any]:
    save_file(dict(place.nets[0].state_dict()), path / "t.safetensors")
    return {"checkpoint": str(path / "t.safetensors"), "model": {"name": "mlp", "hidden": [64]}, **OWN_INPUT}


def checkpoint(place: Place, path: Path) -> dict[str, Any]:
    weights = {f"module.{name}": tensor for name, tensor in place.nets[0].state_dict().items()}
    (path / "t.ckpt").write_bytes(saved({"epoch": 150, "state_dict": weights}))
    return {"checkpoint": str(path / "t.ckpt"), "model": {"name": "mlp", "hidden": [64]}, **OWN_INPUT}


def torchscript(place: Place, path: Path) -> dict[str, Any]:
    (path / "t.pt").write_bytes(scripted(place.nets[0], EXAMPLE))
    return {"checkpoint": str(path / "t.pt"), **OWN_INPUT}


def program(place: Place, path: Path) -> dict[str, Any]:
    (path / "t.pt2").write_bytes(exported(place.nets[0], example=EXAMPLE))
    return {"checkpoint": str(path / "t.pt2"), "format": "export", **OWN_INPUT}


def onnx(place: Place, path: Path) -> dict[str, Any]:
    (path / "t.onnx").write_bytes(onnx_of(place.nets[0], shape=SHAPE, classes=10))
    return {"checkpoint": str(path / "t.onnx"), **OWN_INPUT}


def ensemble(place: Place, path: Path) -> dict[str, Any]:
    (path / "second.onnx").write_bytes(onnx_of(place.nets[1], shape=SHAPE, classes=10))
    members = [safetensors(place, path), {"checkpoint": str(path / "second.onnx"), **OWN_INPUT}]
    return {"ensemble": members, "weights": [2, 1], "average": "probabilities"}


@pytest.mark.slow
@pytest.mark.parametrize("form", [safetensors, checkpoint, torchscript, program, onnx, ensemble])
def test_a_trained_teacher_and_half_of_the_labels_end_with_a_student(
    form: Callable[[Place, Path], dict[str, Any]], place: Place, tmp_path: Path
) -> None:
    raw = {
        **MODELS, "name": form.__name__,
        "data": {
            "source": "parquet", "path": str(place.data), "columns": {"input": "pixels", "label": "digit"},
            "shard_rows": 256,
        },
        "student": MODELS["student"] | {"train": TRAIN | {"epochs": 60}},
        "teacher": form(place, tmp_path),
    }  # fmt: skip
    config, out = write_config(tmp_path, raw), place.folder / "runs"
    done = distill_ray("run", config, "--out", out, "--json", "--allow-import")
    assert done.code == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    teacher, student, control = done.answer["rows"]
    assert teacher["accuracy"] > 0.9
    assert student["accuracy"] > 0.8
    # Over all rows the student learns what the teacher says of them; the control has half of them.
    assert student["agreement"] > control["agreement"] - 0.02
    folder = Path(next(stage["folder"] for stage in done.answer["stages"] if stage["name"] == "label"))
    checked = distill_ray("verify", folder, "--json", "--allow-import")
    assert checked.code == 0, checked.stderr
    assert checked.answer["replay"]["wrong_rows"] == 0
    data = open_store(str(only(out / "artifacts", "data-*")))  # all forms label the same rows
    labels = np.concatenate([read_split(data, split).labels for split in data.manifest.splits])
    assert (len(labels), int((labels == UNLABELLED).sum())) == (1797, 899)
