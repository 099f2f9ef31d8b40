"""tune: a Ray Tune search over students, all of them trained from one label store.

A trial is a student: it trains in the folder that ``distill-ray student`` would use for the same values, so work is
shared in both directions and a folder that is trained already is not trained again. Trials see the train and the
validation split. Afterwards the finalists, chosen on validation, are repeated over seeds beside CE-only controls, and
only they meet the test split.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from distill_ray import artifacts, placing, runtime, usercode
from distill_ray.artifacts import SUMMARY_FILE, Stage
from distill_ray.config import CeLoss, Config, SpaceEntry, TuneConfig, digest_payload, imports_of, to_dict
from distill_ray.errors import RunError, UserError
from distill_ray.placing import Placement
from distill_ray.stages import (
    entry,
    given,
    label,
    opening,
    prepare,
    search_latency,
    search_report,
    search_results,
    search_schedule,
    search_space,
    search_trial,
    search_watch,
    student,
    teacher,
)
from distill_ray.stages.context import Context, recorded, write_stage_config
from distill_ray.stages.search_results import TrialRow
from distill_ray.stages.search_space import METRIC, Inputs, Trial
from distill_ray.stages.search_watch import Budget, Watch
from distill_ray.stages.shared_rows import SharedRows
from distill_ray.stages.student import Student
from distill_ray.storage import Folder

TRIALS_FILE, CONTROLS_FILE, PARETO_FILE = "trials.parquet", "control_trials.parquet", "pareto.json"

_MAX_RETRIES = 2  # of a trial whose process or node died; it continues from its last epoch


@entry.Stage
def run(context: Context) -> dict[str, Any]:
    """Make the search where it is not finished; returns its summary and front.

    Raises:
        UserError: no ``tune`` section, or a space over keys that the student does not have.
        RunError: no trial reached its last epoch.
    """
    tune = context.config.tune
    if tune is None:
        raise UserError("tune: the config has no tune section: add one with a space, as tune_configs/smoke_search.yaml")
    search_space.check(context.config.student, tune)
    _check_installed(tune)
    data, labels = prepare.run(context), label.run(context)
    inputs = Inputs(context.config, context.out, data, labels)
    target = locate(inputs)
    # The first trial waits for the driver to count its parameters: for the import of torch, were that not done by then.
    ahead = ("distill_ray.stages.model_folder", "ray.tune")
    context.once("tune", target, is_whole, lambda: _make(context, tune, inputs, target), ahead=ahead)
    return {"tune": {"folder": str(target.folder), **(target.finished() or {}), **target.folder.read_json(PARETO_FILE)}}


def locate(inputs: Inputs) -> Stage:
    """The folder of this config's search, finished or not."""
    assert inputs.config.tune is not None
    payload: dict[str, Any] = {
        "config": digest_payload(inputs.config.tune), "student": digest_payload(inputs.config.student),
        "seed": inputs.config.student.seeds[0], "data": inputs.data.digest, "labels": inputs.labels.digest,
    }  # fmt: skip
    named = " ".join(code for _, code in imports_of(to_dict(inputs.config.tune)))
    code = teacher.code_of([("student.model", inputs.config.student.model)])
    code += [usercode.fingerprint(path, "tune.space") for path in re.findall(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", named)]
    code += [given.content_sha256(path, "tune.space") for path in search_space.pretrained_of(inputs.config.tune.space)]
    if code:
        payload["code"] = code
    return artifacts.stage(inputs.out, "tune", payload)


def is_whole(target: Stage) -> bool:
    """Whether the search is finished, and its tables and page are there."""
    files = (TRIALS_FILE, PARETO_FILE, search_report.REPORT_FILE)
    return target.finished() is not None and all(target.folder.exists(name) for name in files)


def _check_installed(tune: TuneConfig) -> None:
    if tune.search == "optuna":
        try:
            import optuna
        except ImportError:
            raise UserError("tune.search: optuna is not installed: pip install 'distill-ray[search]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)


def _make(context: Context, tune: TuneConfig, inputs: Inputs, target: Stage) -> None:
    started = time.perf_counter()
    seen = _label_state(inputs)
    _say_what_it_is(context, tune, inputs, target)
    shared = search_trial.share_rows(inputs, _placement(context, tune.planned_trials)[0].share_bytes)
    found = _search(context, inputs, shared, Budget(target.folder, tune.minutes), sorted(tune.space), "tune")
    rows = _with_latency(context, inputs, found, target.folder)
    target.folder.write_bytes(TRIALS_FILE, search_results.to_parquet(rows, sorted(tune.space)))
    front = search_results.trial_front(rows)
    if not front:
        raise RunError(_why_nothing(rows))
    chosen = search_results.spread(front, tune.finalists)
    controls = _search_controls(context, tune, inputs, shared, found, chosen)
    control_keys = sorted(search_space.control_space(inputs.config.student, tune))
    if controls.rows:
        target.folder.write_bytes(CONTROLS_FILE, search_results.to_parquet(controls.rows, ["finalist", *control_keys]))
    model = teacher.run(context).finished() or {}
    measured = _finish(context, tune, found, controls, chosen, model.get("accuracy"))
    told = {"test_accuracy": model.get("accuracy"), **{key: model.get(key) for key in ("parameters", "latency_ms")}}
    pareto = search_results.pareto(rows, measured, told if model.get("parameters") else None)
    target.folder.write_json(PARETO_FILE, pareto)
    if _label_state(inputs) != seen:
        raise RunError(f"tune: {inputs.labels.folder} changed during the search: run the command again")
    best = max(front, key=lambda row: row.validation_accuracy or 0.0)
    summary = {
        "trials": len(rows), "students": len({row.folder for row in rows if row.folder}),
        "counts": dict(Counter(row.status for row in rows)),
        "synthetic": (inputs.data.finished() or {}).get("synthetic"),
        "control_trials": len(controls.rows), "finalists": len(measured), "seeds": tune.seeds,
        "best": {key: value for key, value in asdict(best).items() if key not in ("status", "reason")},
        "seconds": round(time.perf_counter() - started, 3), "search_seconds": found.seconds,
        # A trial is given the two stores and no teacher; this is the label store's commit before and, as checked
        # above, after the search.
        "labels_manifest_sha256": seen, "labels_digest": inputs.labels.digest, "data_digest": inputs.data.digest,
        **_saved(inputs, rows, measured, found, tune),
    }  # fmt: skip
    page = search_report.write(target.folder, context.config.name, rows, controls.rows, pareto, summary)
    context.reporter.line(f"tune: {page}")
    target.folder.write_json(SUMMARY_FILE, summary)


def _say_what_it_is(context: Context, tune: TuneConfig, inputs: Inputs, target: Stage) -> None:
    """``config.yaml`` of the folder; and a line where the controls may be varied in what the students are not."""
    section = {"tune": to_dict(tune), "student": to_dict(inputs.config.student)}
    controls = search_space.control_space(inputs.config.student, tune)
    write_stage_config(target, section, {"control_space": {key: to_dict(entry) for key, entry in controls.items()}})
    if alone := sorted(set(controls) - set(tune.space)):
        keys = ", ".join(alone)
        context.reporter.line(
            f"tune: the controls are searched over {keys}, the students are not: with {keys} in tune.space both are"
        )


def _why_nothing(rows: Sequence[TrialRow]) -> str:
    counts = ", ".join(f"{n} {status}" for status, n in Counter(row.status for row in rows).items()) or "none begun"
    # What only the scheduler stopped says least: those that it left came to nothing for another reason.
    order = ("failed", "infeasible", "invalid", "stopped")
    telling = sorted((row for row in rows if row.reason), key=lambda row: order.index(row.status))
    reason = telling[0].reason if telling else "the minutes of tune.minutes were over"
    mends = {
        "failed": "mend that, or leave such values out of tune.space", "invalid": "change tune.space",
        "infeasible": "loosen tune.constraints, or add smaller students to tune.space",
    }  # fmt: skip
    mend = mends.get(telling[0].status if telling else "", "raise tune.minutes")
    return (
        f"tune: none of {len(rows)} trials reached its last epoch within the constraints ({counts}); the first: "
        f"{reason}: {mend}"
    )


def _label_state(inputs: Inputs) -> str:
    """The label store's only commit, its manifest: as long as it is the same bytes, nothing was labelled."""
    return hashlib.sha256(inputs.labels.folder.read_bytes(inputs.labels.marker)).hexdigest()


def _saved(
    inputs: Inputs, rows: Sequence[TrialRow], measured: Mapping[int, Any], found: Found, tune: TuneConfig
) -> dict[str, Any]:
    """What a teacher in the loop would have cost: a pass over the training rows for each epoch of distillation, but for
    the one that made the labels.

    The seconds are those that labelling computed for as many rows; None where that is not known (imported logits, or a
    store of an earlier version).
    """
    distilled = {row.folder: row.epochs for row in rows if row.folder and _is_distilled(found, row)}
    again = sum((tune.seeds - 1) * row.epochs for row in rows if row.id in measured and _is_distilled(found, row))
    passes = max(0, sum(distilled.values()) + again - 1)
    rate = recorded(inputs.labels.folder).get("rows_per_s")
    train_rows = opening.data_store(inputs.config, inputs.data).manifest.splits["train"].rows
    seconds = round(passes * train_rows / rate, 3) if isinstance(rate, int | float) and rate > 0 else None
    return {"teacher_passes_saved": passes, "teacher_seconds_saved": seconds}


def _is_distilled(found: Found, row: TrialRow) -> bool:
    return not isinstance(_config_of(found, row).student.loss, CeLoss)


@dataclass(frozen=True)
class Found:
    """What a search of Ray Tune's came to: a row a trial, in the order they were sampled in, and what each was."""

    rows: list[TrialRow]
    plans: Mapping[int, Trial]
    seconds: float = 0.0  # wall-clock


def _search(
    context: Context, inputs: Inputs, shared: SharedRows | None, budget: Budget, keys: Sequence[str], name: str,
    given: Sequence[Mapping[str, Any]] = (),
) -> Found:  # fmt: skip
    """Run the trials: those that the space gives, or ``given`` ones; ``keys`` tell them apart.

    A killed search is not restored from Tune's own state, which is pickled and lives in a scratch folder. It samples
    again: random and grid draw the same sequence from the same seed, and a trial whose folder is trained costs no more
    than its reports. Optuna draws the same start and then answers to the order in which results come, so it may
    ask for other values; every folder that it asks for again still counts. Either way the search ends with the trials
    that were asked for.
    """
    from ray import tune as ray_tune

    tune = inputs.config.tune
    assert tune is not None
    count = len(given) or tune.planned_trials
    started = time.perf_counter()
    placement, at_once = _placement(context, count)
    job = search_trial.job_of(inputs, placement, shared)
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(search_trial.train_trial, job=job), search_trial.resources(placement)
    )
    with (
        tempfile.TemporaryDirectory(prefix="distill-ray-tune-") as scratch,
        context.reporter.progress(name, count) as bar,
        _quiet_tune(),
    ):
        watch = Watch(context, inputs, bar, budget, keys, name=name, in_groups=placement.workers > 1)
        tune_config = _tune_config(tune, inputs.config, at_once, watch, drawn=not given)
        if placement.workers > 1 and tune_config.scheduler is not None:
            search_trial.ask_instead_of_stopping(tune_config.scheduler, inputs)
        tuner = ray_tune.Tuner(
            trainable,
            param_space={search_space.GIVEN: ray_tune.grid_search(list(given))} if given else _param_space(tune),
            tune_config=tune_config,
            run_config=ray_tune.RunConfig(
                name="search", storage_path=scratch, verbose=0, callbacks=[search_watch.callback_of(watch)],
                failure_config=ray_tune.FailureConfig(max_failures=_MAX_RETRIES),
                stop=search_watch.stopper_of(watch),
            ),
        )  # fmt: skip
        try:
            tuner.fit()
        except Exception as error:
            raise runtime.as_run_error("tune", error) from error
    return Found(*watch.rows(), round(time.perf_counter() - started, 3))


def _placement(context: Context, trials: int) -> tuple[Placement, int]:
    """Of one trial: one CPU or the configured part of a GPU, or a group; and how many at a time the cluster holds."""
    nodes, cluster = context.session.start(), context.config.cluster
    if cluster.student_workers > 1:
        return placing.groups(cluster, nodes, trials)
    all_of_them = placing.independent(cluster, nodes, trials)
    return replace(all_of_them, workers=1), all_of_them.workers


def _param_space(tune: TuneConfig) -> dict[str, Any]:
    """The space as Ray Tune's domains; options by their number, see ``search_space.decode``. Sorted: one digest, one
    sequence."""
    from ray import tune as ray_tune

    if tune.search == "grid":
        return {key: ray_tune.grid_search(list(range(len(e.options)))) for key, e in sorted(tune.space.items())}
    return _domains(tune.space)


def _domains(space: Mapping[str, SpaceEntry]) -> dict[str, Any]:
    from ray import tune as ray_tune

    domains: dict[str, Any] = {}
    for key, dimension in sorted(space.items()):
        if dimension.options:
            domains[key] = ray_tune.choice(list(range(len(dimension.options))))
        elif dimension.loguniform:
            domains[key] = ray_tune.loguniform(*dimension.loguniform)
        elif dimension.quniform:
            domains[key] = ray_tune.quniform(*dimension.quniform)
        elif dimension.uniform:
            domains[key] = ray_tune.uniform(*dimension.uniform)
    return domains


def _tune_config(tune: TuneConfig, config: Config, at_once: int, watch: Watch, *, drawn: bool) -> Any:
    """``drawn``: from the space, by its sampler; else the trials are given, as a grid of one key."""
    from ray import tune as ray_tune
    from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter

    optuna = tune.search == "optuna" and drawn
    if optuna:
        from ray.tune.search.optuna import OptunaSearch

        sampler: Any = ConcurrencyLimiter(
            OptunaSearch(metric=METRIC, mode="max", seed=tune.seed), max_concurrent=at_once
        )
    else:
        sampler = BasicVariantGenerator(random_state=tune.seed, max_concurrent=at_once)
    scheduler = None
    if tune.scheduler == "asha":
        epochs = _most_epochs(tune, config)
        scheduler = search_schedule.asha_within(epochs, watch.group)
    alone = {} if scheduler is not None or optuna else {"metric": METRIC, "mode": "max"}
    return ray_tune.TuneConfig(
        search_alg=sampler, scheduler=scheduler, reuse_actors=True,
        num_samples=1 if tune.search == "grid" or not drawn else tune.trials, **alone,
    )  # fmt: skip


def _most_epochs(tune: TuneConfig, config: Config) -> int:
    entry = tune.space.get("train.epochs")
    if entry is None:
        return config.student.train.epochs
    bounds = entry.options or (entry.uniform or entry.loguniform or entry.quniform or ())[:2]
    return max((int(value) for value in bounds if isinstance(value, int | float)), default=1)


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Tune without its console, its loggers and its own handler of Ctrl-C, which would swallow the first one."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new console prints on stdout even when it is told to be silent
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    levels = [logger.level for logger in loggers]
    if not os.environ.get(runtime.DEBUG_VARIABLE):
        for logger in loggers:  # a failed trial is told in its row, not by a stack trace
            logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --- after the search -------------------------------------------------------------------------------------------------


def _with_latency(context: Context, inputs: Inputs, found: Found, folder: Folder) -> list[TrialRow]:
    """The rows with the latency of each trained student, measured now that nothing else runs; those that it puts
    outside of the constraints are told so."""
    trained = {row.id: found.plans[row.id] for row in found.rows if row.status == "completed"}
    latencies = search_latency.measure(context, inputs, trained, folder)
    assert inputs.config.tune is not None
    limit = dict(inputs.config.tune.limits).get("latency_ms", math.inf)
    return [_within(row, latencies.get(row.id), limit) for row in found.rows]


def _within(row: TrialRow, latency_ms: float | str | None, limit: float) -> TrialRow:
    if isinstance(latency_ms, str):
        return replace(row, status="failed", reason=latency_ms)
    row = replace(row, latency_ms=latency_ms)
    if latency_ms is None or latency_ms <= limit:
        return row
    return replace(row, status="infeasible", reason=search_space.exceeds("latency_ms", latency_ms, limit))


def _search_controls(
    context: Context, tune: TuneConfig, inputs: Inputs, shared: SharedRows | None, found: Found,
    chosen: Sequence[TrialRow],
) -> Found:  # fmt: skip
    """A search for each finalist's CE-only control: in all as many trials as the students had, and for none fewer than
    the students of its network.

    A control that were not searched for would make any search look like distillation's gain. One of its trials has the
    student's own values.
    """
    if not opening.has_labels(opening.data_store(inputs.config, inputs.data), "train"):
        return Found([], {})
    space = search_space.control_space(inputs.config.student, tune)
    given: list[dict[str, Any]] = []
    for number, row in enumerate(chosen):
        section = _config_of(found, row).student
        if isinstance(section.loss, CeLoss):
            continue
        count = _control_trials(found, row, len(chosen))
        samples = [{}, *_drawn(space, count - 1, tune.seed + number)]
        given += [{"finalist": row.id, "values": search_space.control_values(section, one)} for one in samples]
    if not given:
        return Found([], {})
    context.reporter.line(f"controls: {len(given)} trials over {', '.join(sorted(space))}, for {len(chosen)} finalists")
    return _search(context, inputs, shared, Budget(inputs.out, None), sorted(space), "controls", given)


def _control_trials(found: Found, chosen: TrialRow, finalists: int) -> int:
    tried = [found.plans[row.id] for row in found.rows if row.status not in ("invalid", "infeasible")]
    of_network = sum(trial.network == found.plans[chosen.id].network for trial in tried)
    return max(1, of_network, -(-len(tried) // finalists))


def _drawn(space: Mapping[str, SpaceEntry], count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` samples of a space, by Ray Tune's own domains; of a finite one each once, so that they may be fewer."""
    import numpy as np

    random = np.random.RandomState(seed)
    if all(entry.options for entry in space.values()):
        points = list(itertools.product(*(range(len(entry.options)) for entry in space.values())))
        picked = [points[index] for index in random.permutation(len(points))[:count]]
        return [search_space.decode(space, dict(zip(space, point, strict=True))) for point in picked]
    domains = _domains(space)
    return [
        search_space.decode(space, {key: domain.sample(random_state=random) for key, domain in domains.items()})
        for _ in range(count)
    ]


def _config_of(found: Found, row: TrialRow) -> Config:
    config = found.plans[row.id].config
    assert config is not None
    return config


def _finish(
    context: Context, tune: TuneConfig, found: Found, controls: Found, rows: Sequence[TrialRow],
    teacher_accuracy: float | None,
) -> dict[int, dict[str, Any]]:  # fmt: skip
    """Repeat the finalists, and the best control of each, over the seeds, and only now look at the test split.

    Each is the ``student`` stage of its config: what exists is not trained again, and latency is measured alone.
    """
    entries: dict[int, dict[str, Any]] = {}
    failures: list[RunError] = []
    for number, row in enumerate(rows, 1):
        told = search_results.described(row.values)
        context.reporter.line(f"tune: finalist {number} of {len(rows)}: {row.parameters:,} parameters, {told}")
        mine = [control for control in controls.rows if control.values["finalist"] == row.id]
        best = max(
            (control for control in mine if control.status == "completed"),
            key=lambda control: control.validation_accuracy or 0.0, default=None,
        )  # fmt: skip
        students, lost = _over_seeds(context, tune, _config_of(found, row))
        if not students:
            failures += lost.values()
            context.reporter.warn(f"tune: finalist {number} of {len(rows)} is left out: {failures[-1]}")
            continue
        others, others_lost = _over_seeds(context, tune, _config_of(controls, best)) if best is not None else ({}, {})
        entry = entries[row.id] = search_results.finalist(students, others, teacher_accuracy)
        entry["failed_seeds"] = {str(seed): str(error) for seed, error in lost.items()}
        if best is not None and entry["control"] is not None:
            values = {key: value for key, value in best.values.items() if key != "finalist"}
            entry["control"] |= {
                "trials": len(mine), "searched": values, "validation_accuracy": best.validation_accuracy,
                "failed_seeds": {str(seed): str(error) for seed, error in others_lost.items()},
            }  # fmt: skip
        entry["why_no_control"] = None if entry["control"] else _why_no_control(found, row, mine, others_lost)
        context.reporter.line(f"tune: {_told(entry, row)}")
    if not entries:
        raise failures[0]
    return entries


def _why_no_control(
    found: Found, row: TrialRow, trials: Sequence[TrialRow], lost: Mapping[int, RunError]
) -> str:  # fmt: skip
    if isinstance(_config_of(found, row).student.loss, CeLoss):
        return "it learns from the hard labels alone itself"
    if not trials:
        return "the training rows have no labels"
    reason = next(iter(lost.values()), None) or next((trial.reason for trial in trials if trial.reason), None)
    return f"none of its {len(trials)} trials could be finished: {reason}"


def _over_seeds(
    context: Context, tune: TuneConfig, config: Config
) -> tuple[dict[int, dict[str, Any]], dict[int, RunError]]:
    """The summaries of the finished students of a config by seed, and what went wrong with other seeds.

    The trial's own seed is the first, then 0, 1, 2, ...: ``tune.seeds`` in all. They have no controls of their own.
    """
    seeds = tuple(dict.fromkeys((config.student.seeds[0], *range(tune.seeds))))[: tune.seeds]
    try:
        return {one.seed: one.stage.finished() or {} for one in _trained(context, config, seeds)}, {}
    except RunError:  # of one of them, mostly: the others are tried alone
        found: dict[int, dict[str, Any]] = {}
        lost: dict[int, RunError] = {}
        for seed in seeds:
            try:
                found |= {one.seed: one.stage.finished() or {} for one in _trained(context, config, (seed,))}
            except RunError as error:
                lost[seed] = error
        return found, lost


def _trained(context: Context, config: Config, seeds: tuple[int, ...]) -> list[Student]:
    section = config.student.model_copy(update={"seeds": seeds})
    return student.run_alone(replace(context, config=config.model_copy(update={"student": section})))


def _told(entry: Mapping[str, Any], row: TrialRow) -> str:
    measure = "accuracy" if entry["test_accuracy"] is not None else "agreement"
    test, control, difference = entry[f"test_{measure}"], entry["control"], entry["difference"]
    text = f"test {measure} {test['mean']:.4f} over {len(test['values'])} seed(s), {row.latency_ms or 0.0:.3f} ms"
    if control is None:
        return f"{text}; no control: {entry['why_no_control']}"
    if difference is None:
        return f"{text}; its control has no seed in common"
    interval = "" if difference["low"] is None else f" [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    return (
        f"{text}; CE-only control {control['mean']:.4f}; difference {difference['mean']:+.4f}{interval}: "
        f"{difference['verdict']}"
    )
