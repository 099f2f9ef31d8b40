"""A running search as the driver sees it: progress, W&B, and in the end a row for every trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill_ray.artifacts import is_over, score
from distill_ray.config import to_dict
from distill_ray.stages import progress, search_space
from distill_ray.stages.context import Context, tracking_id
from distill_ray.stages.search_results import Status, TrialRow
from distill_ray.stages.search_space import METRIC, Inputs, Trial
from distill_ray.storage import Folder


@dataclass
class _Followed:
    """A trial as the driver sees it."""

    plan: Trial
    follower: Any = None
    reason: str | None = None  # of a trial that raised or whose process died
    over: bool = False


class Watch:
    """What the driver knows of a running search: shows it, logs it, and turns it into rows at the end."""

    def __init__(self, context: Context, inputs: Inputs, bar: Any) -> None:
        self._context, self._inputs, self._bar = context, inputs, bar
        self._trials: dict[str, _Followed] = {}
        self._open: set[str] = set()  # W&B runs, by folder: two trials may draw the same student
        self._best = 0.0

    def start(self, trial_id: str, sample: Mapping[str, Any]) -> None:
        """A trial begins, or begins again after its process died."""
        if trial_id in self._trials:
            return
        assert self._inputs.config.tune is not None
        plan = search_space.plan(self._inputs, search_space.decode(self._inputs.config.tune.space, sample))
        followed = self._trials[trial_id] = _Followed(plan)
        if plan.status == "ready" and plan.stage is not None and plan.stage.folder.name not in self._open:
            followed.follower = self._follow(plan, plan.stage.folder)

    def _follow(self, plan: Trial, folder: Folder) -> Any:
        assert plan.config is not None
        key, section = folder.name, to_dict(plan.config.student) | {"role": "student"}
        self._open.add(key)
        self._context.tracker.start(key, run_id=tracking_id(folder), name=key, job_type="trial", config=section)
        return progress.Follower(folder, lambda row: self._context.tracker.log(key, row), self._context.reporter.warn)

    def result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """A trial reports an epoch, or why there is none."""
        followed = self._trials[trial_id]
        followed.reason = result.get("reason") or followed.reason
        if followed.follower is not None:
            followed.follower.poll()
        self._best = max(self._best, float(result.get(METRIC, 0.0)))
        self._show()

    def end(self, trial_id: str, error: str | None = None) -> None:
        """A trial is over."""
        followed = self._trials[trial_id]
        followed.over, followed.reason = True, error or followed.reason
        if followed.follower is not None and followed.plan.stage is not None:
            followed.follower.poll()
            key = followed.plan.stage.folder.name
            self._open.discard(key)
            self._context.tracker.finish(key, {"epochs": followed.follower.epochs})
            followed.follower = None
        self._show()

    def _show(self) -> None:
        over = sum(followed.over for followed in self._trials.values())
        self._bar.update(over, f"trials  best validation accuracy {self._best:.4f}")

    def rows(self, trial_ids: Sequence[str]) -> tuple[list[TrialRow], dict[int, Trial]]:
        """A row a trial, in the order given, read from the folders: what stands there is what counts."""
        failed = {
            followed.plan.stage.digest: followed.reason
            for followed in self._trials.values()
            if followed.reason and followed.plan.stage is not None and followed.plan.status == "ready"
        }
        trials = [self._trials[trial_id].plan for trial_id in trial_ids]
        return [_row(number, trial, failed) for number, trial in enumerate(trials)], dict(enumerate(trials))


def _row(number: int, trial: Trial, failed: Mapping[str, str | None]) -> TrialRow:

    if trial.config is None or trial.stage is None:
        return TrialRow(number, trial.values, None, 0, None, 0.0, "invalid", trial.reason, None)
    if trial.status == "infeasible":
        return TrialRow(number, trial.values, None, 0, trial.parameters, 0.0, "infeasible", trial.reason, None)
    history, train = progress.read_history(trial.stage.folder), trial.config.student.train
    status: Status = "completed" if is_over(history, train.epochs, train.early_stop_epochs) else "stopped"
    reason = "stopped by the scheduler: others were better after as many epochs" if status == "stopped" else None
    if status == "stopped" and trial.stage.digest in failed:
        status, reason = "failed", failed[trial.stage.digest]
    accuracy = max((score(row) for row in history), default=None)
    seconds = sum(row["train_seconds"] + row["validation_seconds"] for row in history)
    folder = str(trial.stage.folder)
    return TrialRow(
        number, trial.values, accuracy, len(history), trial.parameters, round(seconds, 3), status, reason, folder
    )


def callback_of(watch: Watch) -> Any:
    """``watch`` as a callback of Ray Tune; a class in a function, since its base is ray's and ray is imported late."""
    from ray import tune as ray_tune

    class Watcher(ray_tune.Callback):  # type: ignore[misc]
        trial_ids: tuple[str, ...] = ()

        def __reduce__(self) -> tuple[Any, tuple[()]]:
            return ray_tune.Callback, ()  # Tune pickles its callbacks for a restore that never happens here

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            watch.start(trial.trial_id, trial.config)

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            watch.result(trial.trial_id, result)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            watch.end(trial.trial_id)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            watch.end(trial.trial_id, error=_reason_of(trial))

        def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
            self.trial_ids = tuple(trial.trial_id for trial in trials)

    return Watcher()


def _reason_of(trial: Any) -> str:
    """Why a trial ended without telling: what it raises itself it reports, so its process is gone."""
    lines = [line.strip() for line in str(trial.get_error() or "").splitlines()]
    told = next((line for line in lines if line and not line.startswith(("Failure #", "Traceback"))), "no trace of it")
    return f"the trial's process died: {told}"
