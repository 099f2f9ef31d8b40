"""tune: a Ray Tune search over students, all of them trained from one label store.

A trial is a student: it trains in the folder that ``distill-ray student`` would use for the same values, so work is
shared in both directions and a folder that is trained already is not trained again. Trials see the train and the
validation split. Afterwards the finalists, chosen on validation, are repeated over seeds beside CE-only controls, and
only they meet the test split.
"""

from __future__ import annotations

import hashlib
import logging
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
from distill_ray.stages.context import Context, recorded
from distill_ray.stages.search_results import TrialRow
from distill_ray.stages.search_space import METRIC, Inputs, Trial
from distill_ray.stages.search_watch import Budget, Watch

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
    ahead = "distill_ray.stages.model_spec"
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
    found = _search(context, inputs, Budget(target.folder, tune.minutes), sorted(tune.space), "tune")
    rows = _with_latency(context, inputs, found)
    target.folder.write_bytes(TRIALS_FILE, search_results.to_parquet(rows, sorted(tune.space)))
    front = search_results.trial_front(rows)
    if not front:
        raise RunError(_why_nothing(rows))
    chosen = search_results.spread(front, tune.finalists)
    controls = _search_controls(context, tune, inputs, found, chosen)
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
        "trials": len(rows), "counts": dict(Counter(row.status for row in rows)),
        "control_trials": len(controls.rows), "finalists": len(measured), "seeds": tune.seeds,
        "best": {key: value for key, value in asdict(best).items() if key not in ("status", "reason")},
        "seconds": round(time.perf_counter() - started, 3), "search_seconds": found.seconds,
        # A trial is given the two stores and no teacher; this is the label store's commit before and, as checked
        # above, after the search.
        "labels_manifest_sha256": seen, "labels_digest": inputs.labels.digest, "data_digest": inputs.data.digest,
        **_saved(inputs, rows, measured, found, tune),
    }  # fmt: skip
    title = f"{context.config.name}: search"
    page = search_report.write(target.folder, title, rows, controls.rows, pareto, summary)
    context.reporter.line(f"tune: {page}")
    target.folder.write_json(SUMMARY_FILE, summary)


def _why_nothing(rows: Sequence[TrialRow]) -> str:
    counts = ", ".join(f"{n} {status}" for status, n in Counter(row.status for row in rows).items())
    reason = next((row.reason for row in rows if row.reason), "tune.minutes were over before one was started")
    return f"tune: none of {len(rows)} trials reached its last epoch within the constraints ({counts}); first: {reason}"


def _label_state(inputs: Inputs) -> str:
    """The label store's only commit, its manifest: as long as it is the same bytes, nothing was labelled."""
    return hashlib.sha256(inputs.labels.folder.read_bytes(inputs.labels.marker)).hexdigest()


def _saved(
    inputs: Inputs, rows: Sequence[TrialRow], measured: Mapping[int, Any], found: Found, tune: TuneConfig
) -> dict[str, Any]:
    """What a teacher in the loop would have cost: a pass over training and validation rows for each epoch trained.

    The seconds are those that labelling took for as many rows; None where nothing was labelled (imported logits, or a
    store of an earlier version).
    """
    distilled = {row.folder: row.epochs for row in rows if row.folder and _is_distilled(found, row)}
    passes = sum(distilled.values())
    for row in rows:
        if row.id in measured and _is_distilled(found, row):
            passes += (tune.seeds - 1) * row.epochs  # the first seed is the trial's own
    splits = opening.data_store(inputs.config, inputs.data).manifest.splits
    rate = recorded(inputs.labels.folder).get("rows_per_s")
    rows_a_pass = splits["train"].rows + splits["validation"].rows
    seconds = round(passes * rows_a_pass / rate, 1) if isinstance(rate, int | float) and rate > 0 else None
    return {"teacher_passes_saved": passes, "teacher_seconds_saved": seconds}


# --- the search -----------------------------------------------------------------------------------------------------


def _is_distilled(found: Found, row: TrialRow) -> bool:
    return not isinstance(_config_of(found, row).student.loss, CeLoss)


@dataclass(frozen=True)
class Found:
    """What a search of Ray Tune's came to: a row a trial, in the order they were sampled in, and what each was."""

    rows: list[TrialRow]
    plans: Mapping[int, Trial]
    seconds: float = 0.0


def _search(
    context: Context, inputs: Inputs, budget: Budget, keys: Sequence[str], name: str,
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
    job = search_trial.job_of(inputs, placement, search_trial.share_rows(inputs, placement.share_bytes))
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(search_trial.train_trial, job=job), search_trial.resources(placement)
    )
    with (
        tempfile.TemporaryDirectory(prefix="distill-ray-tune-") as scratch,
        context.reporter.progress(name, count) as bar,
        _quiet_tune(),
    ):
        watch = Watch(context, inputs, bar, budget, keys, name=name, in_groups=placement.workers > 1)
        watcher = search_watch.callback_of(watch)
        tune_config = _tune_config(tune, inputs.config, at_once, watch, drawn=not given)
        if placement.workers > 1 and tune_config.scheduler is not None:
            search_trial.ask_instead_of_stopping(tune_config.scheduler, inputs)
        tuner = ray_tune.Tuner(
            trainable,
            param_space={search_space.GIVEN: ray_tune.grid_search(list(given))} if given else _param_space(tune),
            tune_config=tune_config,
            run_config=ray_tune.RunConfig(
                name="search", storage_path=scratch, verbose=0, callbacks=[watcher],
                failure_config=ray_tune.FailureConfig(max_failures=_MAX_RETRIES),
                stop=search_watch.stopper_of(watch),
            ),
        )  # fmt: skip
        try:
            tuner.fit()
        except Exception as error:
            raise runtime.as_run_error("tune", error) from error
    return Found(*watch.rows(watcher.trial_ids), round(time.perf_counter() - started, 3))


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
        scheduler = search_schedule.asha_by_size(epochs, lambda sample: watch.plan(sample).parameters)
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


def _with_latency(context: Context, inputs: Inputs, found: Found) -> list[TrialRow]:
    """The rows with the latency of each trained student, measured now that nothing else runs; those that it puts
    outside of the constraints are told so."""
    trained = {row.id: found.plans[row.id] for row in found.rows if row.status == "completed"}
    latencies = search_latency.measure(context, inputs, trained)
    assert inputs.config.tune is not None
    limits = {str(measure): limit for measure, limit in inputs.config.tune.limits}
    return [_within(replace(row, latency_ms=latencies.get(row.id)), limits) for row in found.rows]


def _within(row: TrialRow, limits: Mapping[str, float]) -> TrialRow:
    for measure, value in (("bytes", row.bytes), ("latency_ms", row.latency_ms)):
        if row.status == "completed" and value is not None and value > limits.get(measure, value):
            return replace(row, status="infeasible", reason=search_space.exceeds(measure, value, limits[measure]))
    return row


def _search_controls(
    context: Context, tune: TuneConfig, inputs: Inputs, found: Found, chosen: Sequence[TrialRow]
) -> Found:
    """A search for each finalist's CE-only control, all together of as many trials as the students had.

    A control that were not searched for would make any search look like distillation's gain. One of its trials has the
    student's own values.
    """
    sections = [_config_of(found, row).student for row in chosen]
    if not opening.has_labels(opening.data_store(inputs.config, inputs.data), "train"):
        return Found([], {})
    own = {number: section for number, section in enumerate(sections) if not isinstance(section.loss, CeLoss)}
    tried = sum(row.status in ("completed", "stopped", "failed") for row in found.rows)
    each = -(-tried // max(1, len(chosen)))
    given = [
        search_space.control_values(section, sampled)
        for number, section in own.items()
        for sampled in [
            {},
            *_drawn(search_space.control_space(inputs.config.student, tune), each - 1, tune.seed + number),
        ]
    ]
    if not given:
        return Found([], {})
    keys = sorted(search_space.control_space(inputs.config.student, tune))
    context.reporter.line(f"controls: {each} trials over {', '.join(keys)} for each of {len(own)} finalists")
    controls = _search(context, inputs, Budget(inputs.out, None), keys, "controls", given)
    ids = [chosen[number].id for number in own]
    rows = [replace(row, values={"finalist": ids[row.id // each], **row.values}) for row in controls.rows]
    return Found(rows, controls.plans, controls.seconds)


def _drawn(space: Mapping[str, SpaceEntry], count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` samples of a space, by Ray Tune's own domains."""
    import numpy as np

    random = np.random.RandomState(seed)
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
    for number, row in enumerate(rows, 1):
        config = _config_of(found, row)
        # The trial's own seed, then 0, 1, 2, ...: tune.seeds in all.
        seeds = tuple(dict.fromkeys((config.student.seeds[0], *range(tune.seeds))))[: tune.seeds]
        told = search_results.described(row.values)
        context.reporter.line(f"tune: finalist {number} of {len(rows)}: {row.parameters:,} parameters, {told}")
        mine = [control for control in controls.rows if control.values["finalist"] == row.id]
        best = max(
            (control for control in mine if control.status == "completed"),
            key=lambda control: control.validation_accuracy or 0.0, default=None,
        )  # fmt: skip
        students = _over_seeds(context, config, seeds)
        others = _over_seeds(context, _config_of(controls, best), seeds) if best is not None else []
        entry = entries[row.id] = search_results.finalist(students, others, teacher_accuracy)
        if best is not None:
            values = {key: value for key, value in best.values.items() if key != "finalist"}
            entry["control"] |= {
                "trials": len(mine), "searched": values, "validation_accuracy": best.validation_accuracy
            }  # fmt: skip
        context.reporter.line(f"tune: {_told(entry)}")
    return entries


def _over_seeds(context: Context, config: Config, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """The summaries of the finished students of a config, seed by seed, without controls of their own."""
    section = config.student.model_copy(update={"seeds": seeds})
    made = student.run_alone(replace(context, config=config.model_copy(update={"student": section})))
    return [one.stage.finished() or {} for one in made]


def _told(entry: Mapping[str, Any]) -> str:
    measure = "accuracy" if entry["test_accuracy"] is not None else "agreement"
    test, control, difference = entry[f"test_{measure}"], entry["control"], entry["difference"]
    text = f"test {measure} {test['mean']:.4f} over {len(test['values'])} seed(s), {entry['latency_ms']:.3f} ms"
    if control is None:
        return text
    interval = "" if difference["low"] is None else f" [{difference['low']:+.4f}, {difference['high']:+.4f}]"
    return (
        f"{text}; CE-only control {control['mean']:.4f}; difference {difference['mean']:+.4f}{interval}: "
        f"{difference['verdict']}"
    )
