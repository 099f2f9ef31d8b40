"""tune: a Ray Tune search over students, all of them trained from one label store.

A trial is a student: it trains in the folder that ``distill-ray student`` would use for the same values, so work is
shared in both directions and a folder that is trained already is not trained again. Trials see the train and the
validation split. Afterwards the finalists, chosen on validation, are repeated over seeds beside CE-only controls, and
only they meet the test split.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from distill_ray import artifacts, placing, runtime, usercode
from distill_ray.artifacts import SUMMARY_FILE, Stage
from distill_ray.config import Config, TuneConfig, digest_payload, imports_of, to_dict
from distill_ray.errors import RunError, UserError
from distill_ray.placing import Placement
from distill_ray.stages import (
    entry,
    given,
    label,
    prepare,
    search_results,
    search_space,
    search_trial,
    search_watch,
    student,
    teacher,
)
from distill_ray.stages.context import Context
from distill_ray.stages.search_results import TrialRow
from distill_ray.stages.search_space import METRIC, Inputs, Trial
from distill_ray.stages.search_watch import Watch

TRIALS_FILE, PARETO_FILE = "trials.parquet", "pareto.json"

# Each finalist costs 2 * tune.seeds trainings, its controls included: 4 show the ends and the bend of a front, for
# the price of 40 trainings at 5 seeds.
MAX_FINALISTS = 4
_MAX_RETRIES = 2  # of a trial whose process or node died; it continues from its last epoch
# A rung at a quarter and at half of the epochs, half of the trials cut at each: with Ray's default of 4 a search of 24
# trials would end with 1 or 2 whole ones, which is no front.
_ASHA_FIRST_RUNG, _ASHA_REDUCTION = 4, 2


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
    context.once("tune", target, is_whole, lambda: _make(context, tune, inputs, target))
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
    """Whether the search is finished and its tables are there."""
    return target.finished() is not None and all(target.folder.exists(name) for name in (TRIALS_FILE, PARETO_FILE))


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
    rows, plans = _search(context, tune, inputs)
    target.folder.write_bytes(TRIALS_FILE, search_results.to_parquet(rows, sorted(tune.space)))
    chosen = search_results.trial_front(rows)
    if not chosen:
        counts = ", ".join(f"{n} {status}" for status, n in Counter(row.status for row in rows).items())
        reason = next((row.reason for row in rows if row.reason), "no reason was recorded")
        raise RunError(f"tune: none of {len(rows)} trials reached its last epoch ({counts}); the first: {reason}")
    measured = _finish(context, tune, plans, search_results.spread(chosen, MAX_FINALISTS))
    pareto = search_results.pareto(chosen, measured)
    target.folder.write_json(PARETO_FILE, pareto)
    if _label_state(inputs) != seen:
        raise RunError(f"tune: {inputs.labels.folder} changed during the search: run the command again")
    best = max(chosen, key=lambda row: row.validation_accuracy or 0.0)
    target.folder.write_json(
        SUMMARY_FILE,
        {
            "trials": len(rows), "counts": dict(Counter(row.status for row in rows)),
            "finalists": len(measured), "seeds": tune.seeds,
            "best": {key: value for key, value in asdict(best).items() if key not in ("status", "reason")},
            "seconds": round(time.perf_counter() - started, 3),
            # A trial is given the two stores and no teacher; this is the label store's commit before and, as checked
            # above, after the search.
            "labels_manifest_sha256": seen,
            "teacher_passes_without_labels": sum({row.folder: row.epochs for row in rows}.values()),
            "labels_digest": inputs.labels.digest, "data_digest": inputs.data.digest,
        },
    )  # fmt: skip


def _label_state(inputs: Inputs) -> str:
    """The label store's only commit, its manifest: as long as it is the same bytes, nothing was labelled."""
    return hashlib.sha256(inputs.labels.folder.read_bytes(inputs.labels.marker)).hexdigest()


# --- the search -----------------------------------------------------------------------------------------------------


def _search(context: Context, tune: TuneConfig, inputs: Inputs) -> tuple[list[TrialRow], dict[int, Trial]]:
    """Run the trials; a row for each, in the order in which they were sampled, and what each was.

    A killed search is not restored from Tune's own state, which is pickled and lives in a scratch folder. It samples
    again: random and grid draw the same sequence from the same seed, and a trial whose folder is trained costs no more
    than its reports. Optuna draws the same start and then answers to the order in which results come, so it may
    ask for other values; every folder that it asks for again still counts. Either way the search ends with the trials
    that were asked for.
    """
    from ray import tune as ray_tune

    placement, at_once = _placement(context, tune)
    job = search_trial.job_of(inputs, placement, search_trial.share_rows(inputs, placement.share_bytes))
    trainable = ray_tune.with_resources(
        ray_tune.with_parameters(search_trial.train_trial, job=job), search_trial.resources(placement)
    )
    tune_config = _tune_config(tune, inputs.config, at_once)
    if placement.workers > 1 and tune_config.scheduler is not None:
        search_trial.ask_instead_of_stopping(tune_config.scheduler, inputs)
    with (
        tempfile.TemporaryDirectory(prefix="distill-ray-tune-") as scratch,
        context.reporter.progress("tune", tune.planned_trials) as bar,
        _quiet_tune(),
    ):
        watcher = search_watch.callback_of(watch := Watch(context, inputs, bar))
        tuner = ray_tune.Tuner(
            trainable, param_space=_param_space(tune), tune_config=tune_config,
            run_config=ray_tune.RunConfig(
                name="search", storage_path=scratch, verbose=0, callbacks=[watcher],
                failure_config=ray_tune.FailureConfig(max_failures=_MAX_RETRIES),
            ),
        )  # fmt: skip
        try:
            tuner.fit()
        except Exception as error:
            raise runtime.as_run_error("tune", error) from error
    return watch.rows(watcher.trial_ids)


def _placement(context: Context, tune: TuneConfig) -> tuple[Placement, int]:
    """Of one trial: one CPU or the configured part of a GPU, or a group; and how many at a time the cluster holds."""
    nodes, cluster = context.session.start(), context.config.cluster
    if cluster.student_workers > 1:
        return placing.groups(cluster, nodes, tune.planned_trials)
    all_of_them = placing.independent(cluster, nodes, tune.planned_trials)
    return replace(all_of_them, workers=1), all_of_them.workers


def _param_space(tune: TuneConfig) -> dict[str, Any]:
    """The space as Ray Tune's domains; options by their number, see ``search_space.decode``. Sorted: one digest, one
    sequence."""
    from ray import tune as ray_tune

    domains: dict[str, Any] = {}
    for key, dimension in sorted(tune.space.items()):
        if dimension.options:
            numbers = list(range(len(dimension.options)))
            domains[key] = ray_tune.grid_search(numbers) if tune.search == "grid" else ray_tune.choice(numbers)
        elif dimension.loguniform:
            domains[key] = ray_tune.loguniform(*dimension.loguniform)
        elif dimension.quniform:
            domains[key] = ray_tune.quniform(*dimension.quniform)
        elif dimension.uniform:
            domains[key] = ray_tune.uniform(*dimension.uniform)
    return domains


def _tune_config(tune: TuneConfig, config: Config, at_once: int) -> Any:
    from ray import tune as ray_tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter

    if tune.search == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        sampler: Any = ConcurrencyLimiter(
            OptunaSearch(metric=METRIC, mode="max", seed=tune.seed), max_concurrent=at_once
        )
    else:
        sampler = BasicVariantGenerator(random_state=tune.seed, max_concurrent=at_once)
    scheduler = None
    if tune.scheduler == "asha":
        epochs = _most_epochs(tune, config)
        scheduler = ASHAScheduler(
            time_attr="epoch", metric=METRIC, mode="max", max_t=epochs, reduction_factor=_ASHA_REDUCTION,
            grace_period=max(1, epochs // _ASHA_FIRST_RUNG), stop_last_trials=False,
        )  # fmt: skip
    alone = {} if scheduler is not None or tune.search == "optuna" else {"metric": METRIC, "mode": "max"}
    return ray_tune.TuneConfig(
        search_alg=sampler, scheduler=scheduler, reuse_actors=True,
        num_samples=1 if tune.search == "grid" else tune.trials, **alone,
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


def _finish(
    context: Context, tune: TuneConfig, plans: Mapping[int, Trial], rows: Sequence[TrialRow]
) -> dict[int, dict[str, Any]]:
    """Repeat the finalists over the seeds beside their controls, and only now look at the test split.

    Each is the ``student`` stage of its config: what exists is not trained again, and latency is measured alone.
    """
    found: dict[int, dict[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        config = plans[row.id].config
        assert config is not None
        # The trial's own seed, then 0, 1, 2, ...: tune.seeds in all.
        seeds = tuple(dict.fromkeys((config.student.seeds[0], *range(tune.seeds))))[: tune.seeds]
        values = ", ".join(f"{key}={json.dumps(value)}" for key, value in row.values.items())
        context.reporter.line(f"tune: finalist {number} of {len(rows)}: {row.parameters:,} parameters, {values}")
        section = config.student.model_copy(update={"seeds": seeds})
        made = student.run(replace(context, config=config.model_copy(update={"student": section})))
        summaries = {
            role: [m.stage.finished() or {} for m in made if m.role == role] for role in ("student", "control")
        }
        found[row.id] = search_results.finalist(summaries["student"], summaries["control"])
        context.reporter.line(f"tune: {_told(found[row.id])}")
    return found


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
