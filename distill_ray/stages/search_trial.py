"""One trial of a search, in its Ray Tune actor: the sampled student trains in its folder and reports every epoch.

A student of one worker trains in the actor itself. One of several trains in a group of Ray Train's workers, which the
actor follows: it needs no CPU then, and a group has no part of itself reserved before all of it has room.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import yaml

from distill_ray import artifacts, runtime
from distill_ray.artifacts import WEIGHTS_FILE, Stage
from distill_ray.config import Config, StudentConfig, TuneConfig, from_dict, to_dict, to_yaml
from distill_ray.errors import DistillRayError
from distill_ray.placing import Placement
from distill_ray.stages import data_parallel, opening, progress, search_space, shared_rows, student
from distill_ray.stages.context import write_stage_config
from distill_ray.stages.search_space import METRIC, Inputs, Trial
from distill_ray.stages.shared_rows import SharedRows
from distill_ray.stages.student import Student
from distill_ray.store import SplitArrays, StoredSplit, read_split

TAKEN = "another trial, or another run, was training this very student"
_STOP_TIMEOUT_S = "60"
_MEMORY_BYTES = 2**20  # of an actor that only follows: Tune takes no empty request, and every node has memory


def job_of(inputs: Inputs, placement: Placement, rows: SharedRows | None = None) -> dict[str, Any]:
    """What every trial is sent: the config, where the two stores are, and the rows themselves. No teacher."""
    return {
        "config": to_dict(inputs.config), "out": inputs.out, "placement": placement, "data": inputs.data,
        "labels": inputs.labels, "rows": rows,
    }  # fmt: skip


def resources(placement: Placement) -> dict[str, float]:
    """What Tune reserves for a trial's actor; a group of workers reserves its own."""
    if placement.workers > 1:
        return {"cpu": 0, "memory": _MEMORY_BYTES}
    return {"cpu": placement.cpus, **({"gpu": placement.gpus} if placement.gpus else {})}


def share_rows(inputs: Inputs, share_bytes: float) -> SharedRows | None:
    """Begin to read the rows for all trials, where any of them may hold all rows at once."""
    from distill_ray.stages import model_folder

    assert inputs.config.tune is not None
    data = opening.data_store(inputs.config, inputs.data)
    labels = opening.label_store(inputs.config, inputs.labels, data)
    fits = model_folder.fits_in_memory(data, labels, share_bytes)
    if not _shuffles(inputs.config.student, inputs.config.tune) & ({"whole", "auto"} if fits else {"whole"}):
        return None
    return shared_rows.share(inputs.config, inputs.data, inputs.labels)


def _shuffles(base: StudentConfig, tune: TuneConfig) -> set[str]:
    entry = tune.space.get("train.shuffle")
    return {base.train.shuffle} if entry is None else {str(option) for option in entry.options}


def ask_instead_of_stopping(scheduler: Any, inputs: Inputs) -> None:
    """For groups: have ``scheduler`` not stop a trial but ask it to end, which it then does by itself.

    Tune ends a trial by ending its actor within seconds, its thread wherever that stands. Ray Train would be cut off
    in the middle of its own end, and the next trial would start while the workers still hold their CPUs.
    """
    from ray.tune.schedulers import TrialScheduler

    decide = scheduler.on_trial_result

    def on_trial_result(controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = str(decide(controller, trial, result))
        if decision != TrialScheduler.STOP:
            return decision
        place = _planned(inputs, trial.config).stage
        if place is not None:
            data_parallel.ask_to_stop(place.folder, trial.trial_id)
        return str(TrialScheduler.CONTINUE)

    scheduler.on_trial_result = on_trial_result


def _planned(inputs: Inputs, sample: Mapping[str, Any]) -> Trial:
    assert inputs.config.tune is not None
    # The driver counts the parameters; a trial that is trained already needs no torch.
    return search_space.plan(inputs, search_space.values_of(inputs.config.tune, sample), sized=False)


class _TakenError(Exception):
    """Another trial, or another run, is training this very student."""


def train_trial(sample: Mapping[str, Any], job: Mapping[str, Any]) -> None:
    """Runs in a Tune actor: train the sampled student, from wherever its folder stands, reporting every epoch."""
    # A stopped trial's thread may take longer to end than Tune's 2 s; then Tune would fail the next, innocent trial
    # of this actor. Set here, since only this process reads it.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = _STOP_TIMEOUT_S
    inputs = Inputs(from_dict(job["config"]), job["out"], job["data"], job["labels"])
    trial = _planned(inputs, sample)
    if trial.status != "ready" or trial.config is None or trial.stage is None:
        _report(0, 0.0, reason=trial.reason)  # epoch 0 is below ASHA's first rung: it cuts nobody
        return
    try:
        with artifacts.exclusive(trial.stage, _do_not_wait):
            fit = _fit if job["placement"].workers == 1 else _fit_in_group
            fit(trial.config, trial.stage, inputs, job["placement"], job["rows"])
    except _TakenError:
        # Waiting would hold a CPU, for ever where the other is a stopped trial whose actor idles. Where the other is of
        # this search, the row of this trial is read from the shared folder at the end.
        _report(0, _best(_history(trial.stage)), reason=TAKEN)
    except Exception as error:
        # Told to Tune as a bad result, not as a crash: the actor stays, and Optuna learns to keep away.
        _report(len(_history(trial.stage)), 0.0, reason=_reason(error))


def _fit(config: Config, target: Stage, inputs: Inputs, placement: Placement, rows: SharedRows | None) -> None:
    history, section = _history(target), config.student
    _tell(history)
    if _is_done(target, history, section):
        return
    from distill_ray.stages import model_folder  # seconds, of which trials that are trained already have no need
    from distill_ray.training import Worker, fit

    device, seed = runtime.worker_device(), section.seeds[0]
    data = opening.data_store(inputs.config, inputs.data)
    spec = model_folder.student_spec(data.data_manifest, section, section.loss, seed, target.folder, device)
    labels = opening.label_store(inputs.config, inputs.labels, data)
    shuffle = model_folder.resolve_shuffle(target.folder, spec.train, data, labels, placement.share_bytes)
    where = {"precision": spec.precision, "shuffle": shuffle, "threads": placement.cpus, "device": device.type}
    write_stage_config(target, to_dict(section) | {"seed": seed}, where)
    train: SplitArrays | StoredSplit
    validation: SplitArrays | StoredSplit
    if shuffle == "whole" and rows is not None:
        train, validation = rows.open("train"), rows.open("validation")
    else:
        window_rows = spec.train.window_rows if shuffle == "window" else None
        train, validation = _splits(to_yaml(to_dict(inputs.config)), inputs.data, inputs.labels, window_rows)

    def on_epoch(row: dict[str, float]) -> None:
        history.append(row)
        if not _is_over(history, section):  # the last is told when the model is written: a report can be the end
            _report(int(row["epoch"]), _best(history))

    on_note = progress.note_for_driver(target.folder)
    worker = Worker(threads=placement.cpus, device=device)
    fit(spec, train, validation, target.folder, worker, on_epoch, on_note=on_note)
    _report(section.train.epochs, _best(_history(target)))


def _fit_in_group(config: Config, target: Stage, inputs: Inputs, placement: Placement, rows: SharedRows | None) -> None:
    """The group goes on while Tune decides, so a trial may have done an epoch more than its scheduler saw."""
    from ray import tune as ray_tune

    section, name = config.student, str(ray_tune.get_context().get_trial_id())
    one = Student("student", section.loss, section.seeds[0], target)
    job = student.job_of(config, inputs.data, inputs.labels, one, placement) | {"rows": rows}
    told, stopped = _history(target), list[SystemExit]()
    try:
        _tell(told)
        if _is_done(target, told, section) or data_parallel.must_stop(target.folder, name):
            return

        def poll() -> None:
            history = _history(target)
            if stopped or len(history) <= len(told) or _is_over(history, section):
                return  # the last is told when the model is written
            try:
                _tell(history, len(told))
            except SystemExit as stop:  # of the whole search: the group must not outlive it
                stopped.append(stop)
                data_parallel.ask_to_stop(target.folder, name)
            told[:] = history

        note = progress.note_for_driver(target.folder)
        data_parallel.train("student", target, student.train_in_group, job, placement, poll, note, name)
        if stopped:
            raise stopped[0]
        _tell(_history(target), len(told))
    finally:
        data_parallel.forget_stop(target.folder, name)


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


def _is_done(target: Stage, history: artifacts.History, section: StudentConfig) -> bool:
    """Whether nothing is left to do: the last epoch stands in metrics.jsonl before its model is written."""
    return _is_over(history, section) and target.folder.exists(WEIGHTS_FILE)


def _tell(history: artifacts.History, told: int = 0) -> None:
    """Report the epochs after the first ``told``."""
    for epoch in range(told + 1, len(history) + 1):
        _report(epoch, _best(history[:epoch]))


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
