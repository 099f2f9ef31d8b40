"""Training: the real commands against bare PyTorch loops on the same rows, network, precision and batch size.

The teacher is the article's network, the student has 66,000 parameters. The bare loops validate after each epoch as the
product does; what they do without is checkpoints, metrics files and everything else that makes a run continue.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from distill_ray import precision
from distill_ray.artifacts import METRICS_FILE, SUMMARY_FILE
from distill_ray.storage import Folder
from distill_ray.store import open_store, read_split
from tests.benchmarks import bare_training
from tests.benchmarks.bare_training import Training
from tests.benchmarks.common import Figure, Pairs, Settings, alternate, benchmark, say
from tests.benchmarks.project import ARTICLES_TEACHER, STUDENT, Project, save_untrained
from tests.harness import only

_EPOCHS = 6
_TEACHER_BATCH, _STUDENT_BATCH = 256, 128
_CALIBRATION_ROWS, _STUDENT_ROWS, _ONLINE_ROWS = 8192, 60_000, 4096
_LEAST_ROWS = 2048


@benchmark("teacher.epoch")
def teacher_epoch(settings: Settings) -> Figure:
    """Training rows/s of the teacher under Ray Train, its median epoch, against the best bare loop.

    Ours is rows by the sum of an epoch's own times, training and validation, as in metrics.jsonl; the first epoch, in
    which memory grows, is left out.
    """
    return Figure("teacher.epoch", "rows/s", _teacher(settings).epoch, target=0.92)


@benchmark("teacher.stage")
def teacher_stage(settings: Settings) -> Figure:
    """Training rows/s of the whole command `distill-ray teacher`, Ray started cold, against the best bare loop.

    Ours is rows times epochs by the wall time of the command: imports, Ray's start and end, Ray Train's, a checkpoint
    an epoch, the test split in fp32, the latency.
    """
    return Figure("teacher.stage", "rows/s", _teacher(settings).stage, target=0.75)


@benchmark("student.epoch")
def student_epoch(settings: Settings) -> Figure:
    """Training rows/s of student and control together, from the stores, their median epochs, against bare loops.

    The bare loops train the same two, with their rows and logits in memory: side by side with a share of the CPUs each,
    or one after another, whichever is faster.
    """
    return Figure("student.epoch", "rows/s", _student(settings).epoch, target=0.95)


@benchmark("online.epoch")
def online_epoch(settings: Settings) -> Figure:
    """Training rows/s of the student alone, from the stores, against one with an fp32 teacher in its loop.

    Both are alone on all CPUs. The other is what a plain script does: teacher and student in fp32 and contiguous
    memory, a teacher's forward pass in each step, malloc as it comes.
    """
    return Figure("online.epoch", "rows/s", _student(settings).online, target=10.0)


@dataclass(frozen=True)
class _TeacherRuns:
    epoch: Pairs
    stage: Pairs


@dataclass(frozen=True)
class _StudentRuns:
    epoch: Pairs
    online: Pairs


@cache
def _teacher(settings: Settings) -> _TeacherRuns:
    resolved = precision.resolve("auto", torch.device("cpu"))
    rate = _rate_of_small_teacher(settings, resolved)
    rows = max(_LEAST_ROWS, round(rate * settings.seconds / _EPOCHS))
    project = Project.make(settings.out / "teacher", rows, ARTICLES_TEACHER, teacher=_trained(ARTICLES_TEACHER))
    work = work_of(project, "bare", ARTICLES_TEACHER, _TEACHER_BATCH, resolved, epochs=_EPOCHS)
    epochs: list[float] = []

    def ours() -> float:
        project.forget("teacher")
        started = time.perf_counter()
        project.command("teacher")
        wall_s = time.perf_counter() - started
        epochs.append(_epoch_rows_per_s(only(project.artifacts, "teacher-*"), work.rows))
        say(f"teacher.epoch: {epochs[-1]:,.4g} rows/s")
        return work.rows * _EPOCHS / wall_s

    stage = alternate("teacher.stage", settings.pairs, ours, lambda: bare_training.data_parallel_rows_per_s(work))
    epoch = tuple((mine, reference) for mine, (_, reference) in zip(epochs, stage, strict=True))
    return _TeacherRuns(epoch, stage)


@cache
def _student(settings: Settings) -> _StudentRuns:
    resolved = precision.resolve("auto", torch.device("cpu"))
    rows = settings.sized(_STUDENT_ROWS, _LEAST_ROWS)
    student = {"model": STUDENT, "train": {"epochs": _EPOCHS, "batch_size": _STUDENT_BATCH}}
    project = Project.make(settings.out / "student", rows, ARTICLES_TEACHER, student=student)
    project.write_teacher(ARTICLES_TEACHER)
    project.command("label")
    kd = work_of(project, "kd", STUDENT, _STUDENT_BATCH, resolved, epochs=_EPOCHS)
    control = replace(kd, logits=None)
    few = settings.sized(_ONLINE_ROWS, 512)
    online = work_of(project, "online", STUDENT, _STUDENT_BATCH, resolved, epochs=1, rows=few)
    online = replace(online, logits=None, teacher=only(project.artifacts, "teacher-*"), plain=True)

    def ours() -> float:
        project.forget("student")
        project.command("student")
        return sum(rates().values())

    def alone() -> float:
        project.forget("student")
        project.command("student", f"cluster.cpus_per_worker={os.cpu_count() or 1}")  # one after another
        return rates()["kd"]

    def rates() -> dict[str, float]:
        folders = project.artifacts.glob("student-*")
        return {_loss_of(folder): _epoch_rows_per_s(folder, kd.rows) for folder in folders}

    epoch = alternate(
        "student.epoch", settings.pairs, ours, lambda: bare_training.side_by_side_rows_per_s([kd, control])
    )
    return _StudentRuns(
        epoch, alternate("online.epoch", settings.pairs, alone, lambda: bare_training.rows_per_s(online))
    )


def _rate_of_small_teacher(settings: Settings, resolved: str) -> float:
    """What the bare loop does in a second or two of work: how many rows the whole should have."""
    folder = settings.out / "calibration-teacher"
    rows = settings.sized(_CALIBRATION_ROWS, 512)
    project = Project.make(folder, rows, ARTICLES_TEACHER)
    work = work_of(project, "calibration", ARTICLES_TEACHER, _TEACHER_BATCH, resolved, epochs=1)
    rate = bare_training.data_parallel_rows_per_s(work)
    say(f"bare training loop in {resolved}: {rate:,.0f} rows/s")
    return rate


def _trained(model: dict[str, Any]) -> dict[str, Any]:
    return {"model": model, "train": {"epochs": _EPOCHS, "batch_size": _TEACHER_BATCH}}


def work_of(
    project: Project, name: str, model: dict[str, Any], batch_size: int, resolved: str, *, epochs: int,
    rows: int | None = None,
) -> Training:  # fmt: skip
    """The work of the bare loop: the very rows of the project's stores, saved as arrays; at most ``rows`` of them."""
    data = open_store(str(only(project.artifacts, "data-*")))
    found = sorted(project.artifacts.glob("labels-*"))
    labels = open_store(str(found[0])) if found else None
    splits = [read_split(data, split, labels) for split in ("train", "validation")]
    held_out = len(splits[1]) if rows is None else 0
    kept = slice(rows)
    place = project.folder / name
    save_untrained(Folder.at(place), model)
    np.save(place / "inputs.npy", np.concatenate([split.inputs for split in splits])[kept])
    np.save(place / "labels.npy", np.concatenate([split.labels for split in splits])[kept])
    if labels is not None:
        np.save(
            place / "logits.npy", np.concatenate([split.logits for split in splits if split.logits is not None])[kept]
        )
    return Training(
        place, place / "inputs.npy", place / "labels.npy", held_out, batch_size, epochs, resolved,
        logits=place / "logits.npy" if labels is not None else None,
    )  # fmt: skip


def _loss_of(folder: Path) -> str:
    return str(json.loads((folder / SUMMARY_FILE).read_text())["loss"]["name"])


def _epoch_rows_per_s(folder: Path, rows: int) -> float:
    """Of the median epoch after the first, by its own times."""
    epochs = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return rows / float(median(epoch["train_seconds"] + epoch["validation_seconds"] for epoch in epochs[1:]))
