"""Search: the real command `tune` against the same trainings as bare PyTorch loops, and what Ray Tune itself costs.

All trials distill the same network from the same labels and differ in the temperature alone, so that the work of each
is the same. The labels are of an untrained network as small as the student: what they say takes no part in the time.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from distill_ray import precision
from distill_ray.artifacts import SUMMARY_FILE
from distill_ray.stages.context import CONFIG_FILE, recorded
from distill_ray.storage import Folder
from tests.benchmarks import bare_training
from tests.benchmarks.bare import Layout, layouts
from tests.benchmarks.bare_training import Training
from tests.benchmarks.common import Figure, Settings, alternate, benchmark, say
from tests.benchmarks.project import STUDENT, Project
from tests.benchmarks.training import work_of
from tests.harness import only

_TRIALS, _LEAST_TRIALS = 12, 3
_MORE = 3  # times as many trials, to tell what a trial costs from what a search costs
_EPOCHS, _BATCH = 6, 128
_CALIBRATION_ROWS, _LEAST_ROWS = 8192, 2048
_FEW_ROWS = 512  # where nothing but reports are timed
_TEMPERATURES = (1.0, 8.0)


@benchmark("sweep.trials")
def trials(settings: Settings) -> Figure:
    """Training rows/s of the 12 one-worker trials of a search, a new one each time, against 12 bare loops.

    Ours is the trials' rows times epochs by ``search_seconds`` of the search's own summary: from the start of the
    search to the end of its last trial, so Ray Tune's import in the command, the start of the actors (torch and Ray are
    imported there, the stores opened), reports, checkpoints and the W&B child beside them are in it. The start and the
    end of Ray, the finalists, their controls and the tables are not. The bare loops have processes that are warm and
    rows that are loaded: one a CPU with one thread each, or one with all CPUs, whichever is faster in a short run.
    """
    resolved = precision.resolve("auto", torch.device("cpu"))
    count = settings.sized(_TRIALS, _LEAST_TRIALS)
    layout, rate = _best_bare_loops(settings, resolved, count)
    rows = max(settings.sized(_LEAST_ROWS, _FEW_ROWS), round(rate * settings.seconds / (count * _EPOCHS)))
    project = _searched_project(settings.out / "sweep", rows)
    works = _bare_works(project, resolved, count, epochs=_EPOCHS)

    def ours() -> float:
        _forget_distilled(project)
        seconds = _search_seconds(project, count)
        used = recorded(Folder.at(next(project.artifacts.glob("student-*"))))["precision"]
        if used != resolved:
            raise RuntimeError(f"trials ran in {used}, the bare loops run in {resolved}")
        return sum(work.rows * work.epochs for work in works) / seconds

    pairs = alternate("sweep.trials", settings.pairs, ours, partial(bare_training.many_rows_per_s, works, layout))
    return Figure("sweep.trials", "rows/s", pairs, target=0.83)


@benchmark("sweep.cost")
def cost(settings: Settings) -> Figure:
    """Seconds that a search costs for each of 12 trials beside their training; no reference.

    The same search is run again over students that are trained already: its trials only report their epochs, nothing is
    opened or trained. Ours is its ``search_seconds`` by its trials: what a user waits for, so the start of the actors
    is in it, spread over 12 trials. What a further trial costs alone, the slope between 12 and 36 such trials, is said
    on stderr.
    """
    count = settings.sized(_TRIALS, _LEAST_TRIALS)
    project = _searched_project(settings.out / "sweep-cost", _FEW_ROWS)
    _search_seconds(project, _MORE * count)  # trains all; the smaller search draws the first of them
    _search_seconds(project, count)  # its finalist's control
    found = []
    for number in range(settings.pairs):
        few, many = _search_seconds(project, count), _search_seconds(project, _MORE * count)
        further = (many - few) / ((_MORE - 1) * count)
        say(
            f"sweep.cost: {number + 1} of {settings.pairs}: {count} trials in {few:.3g} s, {_MORE * count} in "
            f"{many:.3g} s: {few / count:.3g} s a trial, {further:.3g} s for a further one"
        )
        found.append((few / count, None))
    return Figure("sweep.cost", "s", tuple(found), target=0.5, at_most=True)


def _searched_project(folder: Path, rows: int) -> Project:
    """Labelled, with a search in its config."""
    student = {"model": STUDENT, "loss": {"name": "kd"}, "train": {"epochs": _EPOCHS, "batch_size": _BATCH}}
    tune: dict[str, Any] = {
        "space": {"loss.temperature": {"uniform": list(_TEMPERATURES)}}, "search": "random", "scheduler": "none",
        "trials": _TRIALS, "seeds": 1, "finalists": 1,
    }  # fmt: skip
    project = Project.make(folder, rows, STUDENT, student=student, tune=tune)
    project.write_teacher(STUDENT)
    project.command("label")
    return project


def _forget_distilled(project: Project) -> None:
    """Controls are no part of what is timed: those of the first search serve them all."""
    for folder in project.artifacts.glob("student-*"):
        if yaml.safe_load((folder / CONFIG_FILE).read_text())["config"]["loss"]["name"] == "kd":
            shutil.rmtree(folder)


def _search_seconds(project: Project, count: int) -> float:
    """Of a search that is run anew; students that are there are not trained again."""
    project.forget("tune")
    project.command("tune", f"tune.trials={count}")
    summary = json.loads((only(project.artifacts, "tune-*") / SUMMARY_FILE).read_text())
    if summary["counts"] != {"completed": count}:
        raise RuntimeError(f"{count} trials were asked for, there are {summary['counts']}")
    return float(summary["search_seconds"])


def _bare_works(project: Project, resolved: str, count: int, epochs: int) -> list[Training]:
    work = work_of(project, "bare", STUDENT, _BATCH, resolved, epochs=epochs)
    return [replace(work, temperature=float(value)) for value in np.linspace(*_TEMPERATURES, count)]


def _best_bare_loops(settings: Settings, resolved: str, count: int) -> tuple[Layout, float]:
    """What the bare loops do in a few seconds of work, without labels: how many rows the whole should have."""
    rows = settings.sized(_CALIBRATION_ROWS, _FEW_ROWS)
    project = Project.make(settings.out / "calibration-sweep", rows, STUDENT)
    works = _bare_works(project, resolved, count, epochs=1)
    rates = {layout: bare_training.many_rows_per_s(works, layout) for layout in layouts()}
    for layout, rate in rates.items():
        say(f"{count} bare loops in {resolved}, {layout.processes} x {layout.threads}: {rate:,.0f} rows/s")
    return max(rates.items(), key=lambda item: item[1])
