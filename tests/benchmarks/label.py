"""Labelling: the real command against bare PyTorch loops on the same rows, network and precision.

The teacher is the article's network (8.5 million weights); where memory is measured, a tiny one.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill_ray import config as configs
from distill_ray import precision
from distill_ray.storage import Folder
from distill_ray.store import Store, open_store
from tests.benchmarks import bare
from tests.benchmarks.bare import Layout, Work
from tests.benchmarks.common import Figure, Pairs, Settings, alternate, benchmark, say
from tests.benchmarks.memory import peak_of_command
from tests.benchmarks.project import ARTICLES_TEACHER, CLASSES, Project, random_images, save_untrained
from tests.harness import environment, only

_TINY_TEACHER: dict[str, Any] = {"name": "char_cnn", "channels": [4, 8], "hidden": [16]}
_CALIBRATION_ROWS, _CALIBRATION_ROUNDS = 8192, 2
_LEAST_ROWS = 16384  # a few shards for each actor
_MEMORY_ROWS = 30_000  # ten times as many are 0.3 GB, which would show beside the 0.7 GB of three processes
_SMALL_BATCH = 64  # its activations stay in the caches of more CPUs
PAYLOAD = 1024 + 8 + 2 * CLASSES  # bytes of a row: its input, its id and its logits in float16


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
        _labelled_project(settings.out / f"memory-{name}", rows, _TINY_TEACHER)
        for name, rows in zip(("large", "small"), memory_rows(settings), strict=True)
    )
    pairs = alternate("label.memory", settings.pairs, lambda: _peak_bytes(large), lambda: _peak_bytes(small))
    return Figure("label.memory", "bytes", pairs, target=1.15, at_most=True)


def _labelled_project(folder: Path, rows: int, model: dict[str, Any]) -> Project:
    """Ready to be labelled again and again."""
    project = Project.make(folder, rows, model)
    project.write_teacher(model)
    return project


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
    project = _labelled_project(settings.out / "label", rows, ARTICLES_TEACHER)
    images = project.folder / "images.npy"  # the same images as one array, for the bare loop
    np.save(images, random_images(rows))
    work = Work(only(project.artifacts, "teacher-*"), images, rows, CLASSES, resolved)
    found: list[_Labelled] = []

    def ours() -> float:
        found.append(_label(project))
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
    work = Work(folder, folder / "images.npy", settings.sized(_CALIBRATION_ROWS, 512), CLASSES, resolved)
    save_untrained(Folder.at(folder), ARTICLES_TEACHER)
    np.save(work.inputs, random_images(work.rows))
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


def _label(project: Project) -> _Labelled:
    """Label all rows anew."""
    project.forget("labels")
    started = time.perf_counter()
    project.command("label")
    wall_s = time.perf_counter() - started
    store = open_store(str(only(project.artifacts, "labels-*")))
    if store.manifest.rows != project.rows:
        raise RuntimeError(f"{store.manifest.rows} rows were labelled, expected {project.rows}")
    return _Labelled(project.rows / wall_s, _steady_rows_per_s(store), store.label_manifest.precision)


def _peak_bytes(project: Project) -> float:
    """Peak anonymous memory of one run of the command: its own process and the labelling actors."""
    project.forget("labels")
    peak, actors = peak_of_command(project.arguments("label"), environment(), lambda title: "ray::MapWorker" in title)
    if not actors:
        raise RuntimeError("no labelling actor was seen")
    return float(peak)


def _steady_rows_per_s(store: Store) -> float:
    """From the times at which the shards were written; see ``steady``."""
    path, shards = store.folder.path, store.manifest.shards
    arrivals = sorted(((path / shard.file).stat().st_mtime_ns, shard.rows) for shard in shards)
    skipped = min(2 * (os.cpu_count() or 1), len(arrivals) - 1)
    rows = sum(rows for _, rows in arrivals[skipped:])
    return rows * 1e9 / (arrivals[-1][0] - arrivals[skipped - 1][0])
