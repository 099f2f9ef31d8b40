"""One trial of a search, in its Ray Tune actor: the sampled student trains in its folder and reports every epoch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import yaml

from distill_ray import artifacts, runtime
from distill_ray.artifacts import Stage
from distill_ray.config import Config, StudentConfig, from_dict, to_dict, to_yaml
from distill_ray.errors import DistillRayError
from distill_ray.placing import Placement
from distill_ray.stages import opening, progress, search_space
from distill_ray.stages.context import write_stage_config
from distill_ray.stages.search_space import METRIC, Inputs
from distill_ray.store import SplitArrays, StoredSplit, read_split

_STOP_TIMEOUT_S = "60"


def job_of(inputs: Inputs, placement: Placement) -> dict[str, Any]:
    """What every trial is sent: the config and where the two stores are. No teacher."""
    return {
        "config": to_dict(inputs.config), "out": inputs.out, "threads": placement.cpus, "share_bytes":
        placement.share_bytes, "data": inputs.data, "labels": inputs.labels,
    }  # fmt: skip


class _TakenError(Exception):
    """Another trial, or another run, is training this very student."""


def train_trial(sample: Mapping[str, Any], job: Mapping[str, Any]) -> None:
    """Runs in a Tune actor: train the sampled student, from wherever its folder stands, reporting every epoch."""
    # A stopped trial's thread may take longer to end than Tune's 2 s; then Tune would fail the next, innocent trial
    # of this actor. Set here, since only this process reads it.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = _STOP_TIMEOUT_S
    config = from_dict(job["config"])
    assert config.tune is not None
    inputs = Inputs(config, job["out"], job["data"], job["labels"])
    trial = search_space.plan(inputs, search_space.values_of(config.tune, sample))
    if trial.status != "ready" or trial.config is None or trial.stage is None:
        _report(0, 0.0, reason=trial.reason)  # epoch 0 is below ASHA's first rung: it cuts nobody
        return
    try:
        with artifacts.exclusive(trial.stage, _do_not_wait):
            _fit(trial.config, trial.stage, inputs, job["threads"], job["share_bytes"])
    except _TakenError:
        # Waiting would hold a CPU, for ever where the other is a stopped trial whose actor idles. The row of this
        # trial is read from the shared folder at the end.
        _report(0, _best(_history(trial.stage)))
    except Exception as error:
        # Told to Tune as a bad result, not as a crash: the actor stays, and Optuna learns to keep away.
        _report(len(_history(trial.stage)), 0.0, reason=_reason(error))


def _fit(config: Config, target: Stage, inputs: Inputs, threads: int, share_bytes: float) -> None:
    history, section = _history(target), config.student
    for row in history:
        _report(int(row["epoch"]), _best(history[: int(row["epoch"])]))
    if _is_over(history, section):
        return
    from distill_ray.stages import model_folder  # seconds, of which trials that are trained already have no need
    from distill_ray.training import Worker, fit

    device, seed = runtime.worker_device(), section.seeds[0]
    data = opening.data_store(inputs.config, inputs.data)
    spec = model_folder.student_spec(data.data_manifest, section, section.loss, seed, target.folder, device)
    labels = opening.label_store(inputs.config, inputs.labels, data)
    shuffle = model_folder.resolve_shuffle(target.folder, spec.train, data, labels, share_bytes)
    where = {"precision": spec.precision, "shuffle": shuffle, "threads": threads, "device": device.type}
    write_stage_config(target, to_dict(section) | {"seed": seed}, where)
    window_rows = spec.train.window_rows if shuffle == "window" else None
    train, validation = _splits(to_yaml(to_dict(inputs.config)), inputs.data, inputs.labels, window_rows)

    def on_epoch(row: dict[str, float]) -> None:
        history.append(row)
        if not _is_over(history, section):  # the last is told when the model is written: a report can be the end
            _report(int(row["epoch"]), _best(history))

    on_note = progress.note_for_driver(target.folder)
    fit(spec, train, validation, target.folder, Worker(threads=threads, device=device), on_epoch, on_note=on_note)
    _report(section.train.epochs, _best(_history(target)))


@lru_cache(maxsize=1)
def _splits(
    config_yaml: str, data: Stage, labels: Stage, window_rows: int | None
) -> tuple[SplitArrays | StoredSplit, SplitArrays | StoredSplit]:
    """Train and validation rows, opened once an actor: actors are reused from trial to trial.

    ``config_yaml`` is the search's config, not a trial's: the rows are the same for all of them.
    """
    config = from_dict(yaml.safe_load(config_yaml))
    inputs = opening.data_store(config, data)
    targets = opening.label_store(config, labels, inputs)
    if window_rows is None:
        return read_split(inputs, "train", targets), read_split(inputs, "validation", targets)
    train, validation = (StoredSplit(inputs, split, targets, window_rows) for split in ("train", "validation"))
    return train, validation


def _is_over(history: artifacts.History, section: StudentConfig) -> bool:
    return artifacts.is_over(history, section.train.epochs, section.train.early_stop_epochs)


def _report(epoch: int, accuracy: float, reason: str | None = None) -> None:
    """Tell Tune. ``accuracy`` is the best so far, since the best epoch's weights are what a student keeps.

    Where the scheduler stops the trial, this raises SystemExit.
    """
    from ray import tune as ray_tune

    ray_tune.report({"epoch": epoch, METRIC: accuracy, **({"reason": reason} if reason else {})})


def _best(history: Sequence[Mapping[str, float]]) -> float:
    return max((artifacts.score(row) for row in history), default=0.0)


def _history(target: Stage) -> artifacts.History:
    return progress.read_history(target.folder)


def _do_not_wait(message: str) -> None:
    raise _TakenError(message)


def _reason(error: BaseException) -> str:
    if isinstance(error, DistillRayError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
