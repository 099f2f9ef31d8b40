"""A project on disk to run the real command on: random images in idx files, a prepared data store, a teacher.

Images are 1x32x32 bytes of 62 classes. The teacher's weights are not trained: the time of a forward pass does not
depend on what they are. Everything runs on the CPU.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distill_ray import config as configs
from distill_ray.artifacts import SUMMARY_FILE, WEIGHTS_FILE
from distill_ray.models import ModelSpec, save_model
from distill_ray.stages import prepare, teacher
from distill_ray.storage import Folder
from tests.harness import COMMAND, environment, write_config

Images = npt.NDArray[np.uint8]
CLASSES, SHAPE = 62, (1, 32, 32)
ARTICLES_TEACHER: dict[str, Any] = {"name": "char_cnn", "channels": [32, 64], "hidden": [512, 128]}
STUDENT: dict[str, Any] = {"name": "char_cnn", "channels": [8, 16], "hidden": [32]}
_CONFIG: dict[str, Any] = {
    "name": "benchmark",
    "data": {"source": "idx", "classes": CLASSES},
    "student": {"model": STUDENT},
    "cluster": {"address": "local", "gpus_per_worker": 0},
}


@dataclass(frozen=True)
class Project:
    """A folder with a config, its source and what was made of it. ``rows`` counts all splits."""

    folder: Path
    rows: int

    @classmethod
    def make(cls, folder: Path, rows: int, model: dict[str, Any], **sections: Any) -> Project:
        """Random images in idx files and the real ``prepare``; ``sections`` are added to the config."""
        project = cls(folder, rows)
        if folder.exists():
            raise RuntimeError(f"{folder}: is there already: give --out a folder without it")
        write_config(folder, _config(model, folder / "source") | sections)
        project._write_source()
        project.command("prepare")
        return project

    def command(self, stage: str, *overrides: str) -> None:
        """Run a stage to its end."""
        done = subprocess.run([*self.arguments(stage), *overrides], capture_output=True, text=True, env=environment())
        if done.returncode:
            raise RuntimeError(f"distill-ray {stage} ended with {done.returncode}: {done.stderr[-2000:]}")

    def arguments(self, stage: str) -> list[str]:
        """The command line of a stage."""
        return [*COMMAND, stage, str(self.folder / "config.yaml"), "--out", str(self.folder / "runs"), "--quiet"]

    def forget(self, stage: str) -> None:
        """Delete the folders of a stage, so that it runs anew."""
        for folder in self.artifacts.glob(f"{stage}-*"):
            shutil.rmtree(folder)

    @property
    def artifacts(self) -> Path:
        return self.folder / "runs" / "artifacts"

    def write_teacher(self, model: dict[str, Any]) -> None:
        """A finished teacher folder with untrained weights."""
        config = configs.load(self.folder / "config.yaml", [])
        data = prepare.locate(config, Folder.at(self.folder / "runs"))
        target = teacher.locate(config, Folder.at(self.folder / "runs"), data)
        sha256 = save_untrained(target.folder, model)
        summary = {"weights_sha256": sha256, "bytes": target.folder.size(WEIGHTS_FILE), "epochs": 0}
        target.folder.write_json(SUMMARY_FILE, summary)

    def _write_source(self) -> None:
        source = self.folder / "source"
        source.mkdir()
        images = random_images(self.rows)
        labels = (np.arange(self.rows) % CLASSES).astype(np.uint8)
        test = max(CLASSES, self.rows // 10)
        for part, rows in (("train", slice(test, None)), ("t10k", slice(0, test))):
            _write_idx(source / f"{part}-images-idx3-ubyte", images[rows, 0])
            _write_idx(source / f"{part}-labels-idx1-ubyte", labels[rows])


def save_untrained(folder: Folder, model: dict[str, Any]) -> str:
    """Write a model folder with weights drawn from seed 0; their sha256."""
    config = configs.from_dict(_config(model, Path("none")))
    spec = ModelSpec(
        model=config.teacher.model, input=config.data.input, shape=SHAPE, dtype="uint8", classes=CLASSES,
        class_names=tuple(map(str, range(CLASSES))),
    )  # fmt: skip
    torch.manual_seed(0)
    return save_model(folder, spec, spec.build().net.state_dict())


def random_images(rows: int) -> Images:
    return np.random.default_rng(0).integers(0, 256, (rows, *SHAPE), dtype=np.uint8)


def _config(model: dict[str, Any], source: Path) -> dict[str, Any]:
    return _CONFIG | {"data": {**_CONFIG["data"], "path": str(source)}, "teacher": {"model": model}}


def _write_idx(path: Path, values: Images) -> None:
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, dtype=">u4").tobytes()
    path.write_bytes(header + values.tobytes())
