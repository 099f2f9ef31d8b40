"""A running search as the driver sees it: progress, W&B, and in the end a row for every trial."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill_ray.artifacts import WEIGHTS_FILE, History, is_over, score
from distill_ray.config import to_dict
from distill_ray.stages import data_parallel, progress, search_schedule, search_space
from distill_ray.stages.context import Context, tracking_id
from distill_ray.stages.search_results import Status, TrialRow, described
from distill_ray.stages.search_space import METRIC, Inputs, Trial
from distill_ray.stages.search_trial import TAKEN
from distill_ray.storage import Folder

_BUDGET_FILE = "searching.json"
_NOTE_EVERY_S = 5.0
_BEST_SHOWN = 5
_METRICS = ("train_loss", "train_ce", "train_kd", "validation_ce", "validation_agreement", "validation_kl")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_OUT_OF_TIME = "the minutes of tune.minutes were over"
_CUT = "stopped by the scheduler: others were better after as many epochs"


class Budget:
    """The minutes that a search has for its trials. Those of an attempt that was killed count."""

    def __init__(self, folder: Folder, minutes: float | None) -> None:
        self._folder, self._minutes = folder, minutes
        self._spent_s, self._ended_before = 0.0, 0
        if minutes is not None:
            try:
                noted = folder.read_json(_BUDGET_FILE)
                self._spent_s, self._ended_before = float(noted["seconds"]), int(noted["ended"])
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                pass
        self._started = self._noted_at = time.monotonic()

    def is_over(self, ended: int) -> bool:
        """``ended`` of the trials are over. What an earlier attempt has trained is always taken in."""
        return self._minutes is not None and ended >= self._ended_before and self._seconds() >= 60 * self._minutes

    def note(self, ended: int) -> None:
        """Write down what is spent, now and then, for the attempt that follows should this one be killed."""
        if self._minutes is not None and time.monotonic() - self._noted_at >= _NOTE_EVERY_S:
            self._noted_at = time.monotonic()
            self._folder.write_json(_BUDGET_FILE, {"seconds": self._seconds(), "ended": max(ended, self._ended_before)})

    def _seconds(self) -> float:
        return self._spent_s + time.monotonic() - self._started


@dataclass
class _Followed:
    """A trial as the driver sees it."""

    number: int
    plan: Trial
    follower: Any = None
    reason: str | None = None  # of a trial that raised or whose process died
    over: bool = False
    out_of_time: bool = False  # it was running when the minutes were over
    epoch: int = 0
    best: float = 0.0

    def cells(self) -> tuple[str, ...]:
        """For the table of a running search."""
        parameters = f"{self.plan.parameters:,}" if self.plan.parameters is not None else ""
        accuracy = f"{self.best:.4f}" if self.epoch else ""
        state = "over" if self.over else "running"
        return str(self.number), described(self.plan.values), parameters, str(self.epoch), accuracy, state


class Watch:
    """What the driver knows of a running search: shows it, logs it, and turns it into rows at the end.

    ``keys`` are those of the trials' values that tell them apart.
    """

    def __init__(
        self, context: Context, inputs: Inputs, bar: Any, budget: Budget, keys: Sequence[str], *, name: str = "tune",
        in_groups: bool = False,
    ) -> None:  # fmt: skip
        self._context, self._inputs, self._bar, self._budget = context, inputs, bar, budget
        self._keys, self._name, self._in_groups = tuple(keys), name, in_groups
        self._trials: dict[str, _Followed] = {}
        self._open: set[str] = set()  # W&B runs, by folder: two trials may draw the same student
        self._out_of_time = False

    @property
    def ended(self) -> int:
        """How many trials are over."""
        return sum(followed.over for followed in self._trials.values())

    def is_out_of_time(self) -> bool:
        """Whether the minutes are over, and no group is left that has to end by itself."""
        if not self._out_of_time and self._budget.is_over(self.ended):
            self._out_of_time = True
            for trial_id, followed in self._trials.items():
                followed.out_of_time = not followed.over
                if self._in_groups and followed.out_of_time:
                    _ask_to_stop(followed, trial_id)
        groups = [followed for followed in self._trials.values() if self._in_groups and followed.out_of_time]
        return self._out_of_time and all(followed.over for followed in groups)

    def plan(self, sample: Mapping[str, Any]) -> Trial:
        """What a sample of Tune's means; its values are those that tell it apart."""
        tune = self._inputs.config.tune
        assert tune is not None
        plan = search_space.plan(self._inputs, search_space.values_of(tune, sample)).of_keys(self._keys)
        if (given := sample.get(search_space.GIVEN)) is None:
            return plan
        return replace(plan, values={"finalist": given["finalist"], **plan.values})

    def group(self, sample: Mapping[str, Any]) -> Any:
        """Equal for the trials that a scheduler may compare."""
        if (given := sample.get(search_space.GIVEN)) is not None:
            return "finalist", given["finalist"]
        return "size", search_schedule.size_class(self.plan(sample).parameters)

    def start(self, trial_id: str, sample: Mapping[str, Any]) -> None:
        """A trial begins, or begins again after its process died."""
        if trial_id in self._trials:
            return
        plan = self.plan(sample)
        followed = self._trials[trial_id] = _Followed(len(self._trials), plan)
        if plan.status == "ready" and plan.stage is not None and plan.stage.folder.name not in self._open:
            followed.follower = self._follow(plan, plan.stage.folder)
        if self._out_of_time and self._in_groups:  # begun in the place of one that has ended: it starts no group
            _ask_to_stop(followed, trial_id)
        self._show()

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
        followed.epoch = max(followed.epoch, int(result.get("epoch", 0)))
        followed.best = max(followed.best, float(result.get(METRIC, 0.0)))
        self._budget.note(self.ended)
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
        self._tell(followed)
        self._show()

    def _tell(self, followed: _Followed) -> None:
        plan = followed.plan
        why = plan.reason or followed.reason
        came_to = why or f"{followed.best:.4f} after {followed.epoch} epochs"
        size = f"{plan.parameters:,} parameters, " if plan.parameters is not None else ""
        self._context.reporter.line(f"{self._name}: trial {followed.number}: {size}{described(plan.values)}: {came_to}")

    def _show(self) -> None:
        best = max((followed.best for followed in self._trials.values()), default=0.0)
        running = [followed for followed in self._trials.values() if not followed.over]
        over = sorted((f for f in self._trials.values() if f.over), key=lambda f: -f.best)[:_BEST_SHOWN]
        self._bar.table(
            ("trial", "values", "parameters", "epoch", "validation accuracy", ""),
            [followed.cells() for followed in [*running, *over]],
        )
        epochs = sum(followed.epoch for followed in self._trials.values())
        self._bar.update(self.ended, f"trials  best validation accuracy {best:.4f}", news=epochs)

    def close(self, failed: Mapping[str, tuple[Mapping[str, Any], str]]) -> None:
        """The search is over. Trials that it has cut have not been ended yet, those in ``failed`` (sample, reason) may
        never have been started: their processes died before."""
        for trial_id, (sample, reason) in failed.items():
            if trial_id not in self._trials:
                self.start(trial_id, sample)
                self.end(trial_id, reason)
        for trial_id, followed in self._trials.items():
            if not followed.over:
                self.end(trial_id)

    def rows(self) -> tuple[list[TrialRow], dict[int, Trial]]:
        """A row a trial, as they were started, read from the folders: what stands there is what counts."""
        followed = sorted(self._trials.values(), key=lambda one: one.number)
        return [_row(one, self._fate(one)) for one in followed], {one.number: one.plan for one in followed}

    def _fate(self, followed: _Followed) -> _Followed:
        """The trial that tells what became of this one's student: a twin, where that had it."""
        if followed.reason != TAKEN:
            return followed
        twins = (one for one in self._trials.values() if one.plan.stage == followed.plan.stage and one.reason != TAKEN)
        return next(twins, followed)


def _ask_to_stop(followed: _Followed, trial_id: str) -> None:
    if followed.follower is not None and followed.plan.stage is not None:  # not a twin, which has no group
        data_parallel.ask_to_stop(followed.plan.stage.folder, trial_id)


def _row(followed: _Followed, fate: _Followed) -> TrialRow:
    number, trial = followed.number, followed.plan
    if trial.config is None or trial.stage is None:
        return TrialRow(number, trial.values, None, 0, None, 0.0, "invalid", trial.reason, None)
    if trial.status == "infeasible":
        return TrialRow(number, trial.values, None, 0, trial.parameters, 0.0, "infeasible", trial.reason, None)
    folder, train = trial.stage.folder, trial.config.student.train
    history, held = progress.read_history(folder), folder.size(WEIGHTS_FILE)
    status, reason = _status(fate)
    if held is not None and is_over(history, train.epochs, train.early_stop_epochs):
        status, reason = "completed", None
    best = max(history, key=score, default=None)
    return TrialRow(
        number, trial.values, None if best is None else score(best), len(history), trial.parameters, _seconds(history),
        status, reason, str(folder), held if status == "completed" else None,
        metrics={} if best is None else {key: best[key] for key in _METRICS if key in best},
    )  # fmt: skip


def _status(fate: _Followed) -> tuple[Status, str | None]:
    """Of a trial that has no trained student."""
    if fate.reason:
        return "failed", fate.reason
    return "stopped", _OUT_OF_TIME if fate.out_of_time else _CUT


def _seconds(history: History) -> float:
    return round(sum(row["train_seconds"] + row["validation_seconds"] for row in history), 3)


def callback_of(watch: Watch) -> Any:
    """``watch`` as a callback of Ray Tune; a class in a function, since its base is ray's and ray is imported late."""
    from ray import tune as ray_tune

    class Watcher(ray_tune.Callback):  # type: ignore[misc]
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
            watch.start(trial.trial_id, trial.config)  # its process may have died before it began
            watch.end(trial.trial_id, error=_reason_of(trial))

        def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
            watch.close({t.trial_id: (t.config, _reason_of(t)) for t in trials if t.status == t.ERROR})

    return Watcher()


def stopper_of(watch: Watch) -> Any:
    """Ends the search when its minutes are over, as Ray Tune asks for it."""
    from ray import tune as ray_tune

    class OutOfTime(ray_tune.Stopper):  # type: ignore[misc]
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return watch.is_out_of_time()

        def __reduce__(self) -> tuple[Any, tuple[()]]:
            return ray_tune.stopper.NoopStopper, ()  # pickled as the callbacks are

    return OutOfTime()


def _reason_of(trial: Any) -> str:
    """Why a trial ended without telling: mostly its process is gone, since what it raises itself it reports."""
    text = _ANSI.sub("", str(trial.get_error() or ""))
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Failure #")]
    if "Traceback" in text and "ActorDiedError" not in text:
        return lines[-1]
    return f"the trial's process died: {next((line for line in lines if 'Traceback' not in line), 'no trace of it')}"
