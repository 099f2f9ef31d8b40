"""Labelling: the real command against bare PyTorch loops on the same rows, network and precision.

The teacher is the article's network (8.5 million weights) on 1x32x32 bytes and 62 classes; where memory is measured, a
tiny one. It is not trained: the time of a forward pass does not depend on what the weights are. Everything runs on the
CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distill_ray import config as configs
from distill_ray import precision
from distill_ray.artifacts import SUMMARY_FILE, WEIGHTS_FILE
from distill_ray.models import ModelSpec, save_model
from distill_ray.stages import prepare, teacher
from distill_ray.storage import Folder
from distill_ray.store import Store, open_store
from tests.benchmarks import bare
from tests.benchmarks.bare import Layout, Work
from tests.benchmarks.common import Figure, Pairs, Settings, alternate, benchmark, say
from tests.benchmarks.memory import peak_of_command
from tests.harness import COMMAND, environment, only, write_config

Images = npt.NDArray[np.uint8]
_CLASSES, _SHAPE = 62, (1, 32, 32)
_CONFIG: dict[str, Any] = {
    "name": "label",
    "data": {"source": "idx", "classes": _CLASSES},
    "student": {"model": {"name": "char_cnn", "channels": [8, 16], "hidden": [32]}},
    "cluster": {"address": "local", "gpus_per_worker": 0},
}
_ARTICLES_TEACHER: dict[str, Any] = {"name": "char_cnn", "channels": [32, 64], "hidden": [512, 128]}
_TINY_TEACHER: dict[str, Any] = {"name": "char_cnn", "channels": [4, 8], "hidden": [16]}
_CALIBRATION_ROWS, _CALIBRATION_ROUNDS = 8192, 2
_LEAST_ROWS = 16384  # a few shards for each actor
_MEMORY_ROWS = 30_000  # ten times as many are 0.3 GB, which would show beside the 0.7 GB of three processes
_SMALL_BATCH = 64  # its activations stay in the caches of more CPUs
PAYLOAD = 1024 + 8 + 2 * _CLASSES  # bytes of a row: its input, its id and its logits in float16


@benchmark("label.steady")
def steady(settings: Settings) -> Figure:
    """Rows/s of `distill-ray label` once all its actors are at work, against the best bare loop.

    Ours is read off the shards of a whole run: rows of the shards that were written after the first 2 x actors ones, by
    the time from the last of those to the last shard. By then every actor is at work, unless one is more than a shard
    slower than another. What remains: each other actor is somewhere in a shard at that moment, whose rows before it
    count for ours, at most one shard an actor and half of one on average; at the end, which is counted too, actors run
    out of shards one by one, which costs ours about as much.
    """
    return Figure("label.steady", "rows/s", _runs(settings).steady, target=0.92)


@benchmark("label.cold")
def cold(settings: Settings) -> Figure:
    """Rows/s of the whole command `distill-ray label`, Ray started cold, against the best bare loop on the same rows.

    Ours is all rows by the wall time of the command, from its start to its exit: imports, Ray's start and end, the
    precision check, the manifest. The data store and the teacher are finished before. The reference is all rows by the
    bare loop's own time, its processes started, warm and with their rows in memory.
    """
    return Figure("label.cold", "rows/s", _runs(settings).cold, target=0.80)


@benchmark("label.memory")
def memory(settings: Settings) -> Figure:
    """Peak anonymous memory of driver and labelling actors together, at 10 times the rows against once the rows.

    The teacher is tiny, so that there can be many rows: were their inputs kept, the ratio would be about 1.4.
    """
    large, small = (
        _Bench.make(settings.out / f"memory-{name}", rows, _TINY_TEACHER)
        for name, rows in zip(("large", "small"), memory_rows(settings), strict=True)
    )
    pairs = alternate("label.memory", settings.pairs, large.peak_bytes, small.peak_bytes)
    return Figure("label.memory", "bytes", pairs, target=1.15, at_most=True)


def memory_rows(settings: Settings) -> tuple[int, int]:
    """Of ``label.memory``: ten times the rows, and once."""
    rows = settings.sized(_MEMORY_ROWS, 1024)
    return 10 * rows, rows


@dataclass(frozen=True)
class _Runs:
    """Both views of the same runs of the command."""

    steady: Pairs
    cold: Pairs


@cache
def _runs(settings: Settings) -> _Runs:
    resolved = precision.resolve("auto", torch.device("cpu"))
    layout, batch_size, rate = _best_bare_loop(settings, resolved)
    rows = max(_LEAST_ROWS, round(rate * settings.seconds))
    bench = _Bench.make(settings.out / "label", rows, _ARTICLES_TEACHER)
    np.save(bench.images, _random_images(rows))
    work = Work(only(bench.artifacts, "teacher-*"), bench.images, bench.rows, _CLASSES, resolved)
    found: list[_Labelled] = []

    def ours() -> float:
        found.append(bench.label())
        if found[-1].precision != resolved:
            raise RuntimeError(f"labels were made in {found[-1].precision}, the bare loop runs in {resolved}")
        say(f"label.steady: {found[-1].steady_rows_per_s:,.4g} rows/s")
        return found[-1].cold_rows_per_s

    pairs = alternate("label.cold", settings.pairs, ours, lambda: bare.rows_per_s(work, layout, [batch_size])[0])
    steady_pairs = tuple((run.steady_rows_per_s, reference) for run, (_, reference) in zip(found, pairs, strict=True))
    return _Runs(steady_pairs, pairs)


def _best_bare_loop(settings: Settings, resolved: str) -> tuple[Layout, int, float]:
    """The fastest of a few bare loops by short runs: layout, batch size, rows/s."""
    folder = settings.out / "calibration"
    work = Work(folder, folder / "images.npy", settings.sized(_CALIBRATION_ROWS, 512), _CLASSES, resolved)
    _save_teacher(Folder.at(folder), _ARTICLES_TEACHER)
    np.save(work.inputs, _random_images(work.rows))
    sizes = sorted({configs.LabelsConfig().batch_size, _SMALL_BATCH}) * _CALIBRATION_ROUNDS
    rates = {
        (layout, size): rate
        for layout in bare.layouts()
        for size, rate in sorted(zip(sizes, bare.rows_per_s(work, layout, sizes), strict=True))  # the best comes last
    }
    for (layout, size), rate in rates.items():
        say(f"bare loop in {resolved}, {layout.processes} x {layout.threads}, batches of {size}: {rate:,.0f} rows/s")
    (layout, size), rate = max(rates.items(), key=lambda item: item[1])
    return layout, size, rate


@dataclass(frozen=True)
class _Labelled:
    """One run of the command."""

    cold_rows_per_s: float
    steady_rows_per_s: float
    precision: str


@dataclass(frozen=True)
class _Bench:
    """A finished data store and teacher, ready to be labelled again and again."""

    folder: Path
    rows: int

    @classmethod
    def make(cls, folder: Path, rows: int, model: dict[str, Any]) -> _Bench:
        """Random images in idx files, the real ``prepare``, and a teacher folder with untrained weights."""
        bench = cls(folder, rows)
        if folder.exists():
            raise RuntimeError(f"{folder}: is there already: give --out a folder without it")
        write_config(folder, _config(model, folder / "source"))
        bench._write_source()
        bench._command("prepare")
        bench._write_teacher(model)
        return bench

    def label(self) -> _Labelled:
        """Label all rows anew."""
        self._forget_labels()
        started = time.perf_counter()
        self._command("label")
        wall_s = time.perf_counter() - started
        store = open_store(str(only(self.artifacts, "labels-*")))
        if store.manifest.rows != self.rows:
            raise RuntimeError(f"{store.manifest.rows} rows were labelled, expected {self.rows}")
        return _Labelled(self.rows / wall_s, _steady_rows_per_s(store), store.label_manifest.precision)

    def peak_bytes(self) -> float:
        """Peak anonymous memory of one run of the command: its own process and the labelling actors."""
        self._forget_labels()
        peak, actors = peak_of_command(self._arguments("label"), environment(), lambda title: "ray::MapWorker" in title)
        if not actors:
            raise RuntimeError("no labelling actor was seen")
        return float(peak)

    @property
    def images(self) -> Path:
        """The same images as one array, for the bare loop."""
        return self.folder / "images.npy"

    @property
    def artifacts(self) -> Path:
        return self.folder / "runs" / "artifacts"

    def _arguments(self, stage: str) -> list[str]:
        return [*COMMAND, stage, str(self.folder / "config.yaml"), "--out", str(self.folder / "runs"), "--quiet"]

    def _command(self, stage: str) -> None:
        done = subprocess.run(self._arguments(stage), capture_output=True, text=True, env=environment())
        if done.returncode:
            raise RuntimeError(f"distill-ray {stage} ended with {done.returncode}: {done.stderr[-2000:]}")

    def _forget_labels(self) -> None:
        for folder in self.artifacts.glob("labels-*"):
            shutil.rmtree(folder)

    def _write_source(self) -> None:
        source = self.folder / "source"
        source.mkdir()
        images = _random_images(self.rows)
        labels = (np.arange(self.rows) % _CLASSES).astype(np.uint8)
        test = max(_CLASSES, self.rows // 10)
        for part, rows in (("train", slice(test, None)), ("t10k", slice(0, test))):
            _write_idx(source / f"{part}-images-idx3-ubyte", images[rows, 0])
            _write_idx(source / f"{part}-labels-idx1-ubyte", labels[rows])

    def _write_teacher(self, model: dict[str, Any]) -> None:
        config = configs.load(self.folder / "config.yaml", [])
        data = prepare.locate(config, Folder.at(self.folder / "runs"))
        target = teacher.locate(config, Folder.at(self.folder / "runs"), data)
        sha256 = _save_teacher(target.folder, model)
        summary = {"weights_sha256": sha256, "bytes": target.folder.size(WEIGHTS_FILE), "epochs": 0}
        target.folder.write_json(SUMMARY_FILE, summary)


def _config(model: dict[str, Any], source: Path) -> dict[str, Any]:
    return _CONFIG | {"data": {**_CONFIG["data"], "path": str(source)}, "teacher": {"model": model}}


def _save_teacher(folder: Folder, model: dict[str, Any]) -> str:
    config = configs.from_dict(_config(model, Path("none")))
    spec = ModelSpec(
        model=config.teacher.model, input=config.data.input, shape=_SHAPE, dtype="uint8", classes=_CLASSES,
        class_names=tuple(map(str, range(_CLASSES))),
    )  # fmt: skip
    torch.manual_seed(0)
    return save_model(folder, spec, spec.build().net.state_dict())


def _random_images(rows: int) -> Images:
    return np.random.default_rng(0).integers(0, 256, (rows, *_SHAPE), dtype=np.uint8)


def _steady_rows_per_s(store: Store) -> float:
    """From the times at which the shards were written; see ``steady``."""
    path, shards = store.folder.path, store.manifest.shards
    arrivals = sorted(((path / shard.file).stat().st_mtime_ns, shard.rows) for shard in shards)
    skipped = min(2 * (os.cpu_count() or 1), len(arrivals) - 1)
    rows = sum(rows for _, rows in arrivals[skipped:])
    return rows * 1e9 / (arrivals[-1][0] - arrivals[skipped - 1][0])


def _write_idx(path: Path, values: Images) -> None:
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, dtype=">u4").tobytes()
    path.write_bytes(header + values.tobytes())
