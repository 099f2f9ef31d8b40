"""The latency of every trained student of a search, measured alone: one after another, when no trial runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill_ray import placing, runtime
from distill_ray.artifacts import Stage
from distill_ray.config import ImportedModel, from_dict, to_dict
from distill_ray.stages import opening
from distill_ray.stages.context import Context
from distill_ray.stages.search_space import Inputs, Trial


def measure(context: Context, inputs: Inputs, trials: Mapping[int, Trial]) -> dict[int, float]:
    """Milliseconds for one row by the trial's number; networks that are equal are measured once.

    Raises:
        UserError, RunError: what the worker raised.
    """
    import ray

    if not trials:
        return {}
    of_network = {trial.network: trial for trial in trials.values()}
    placement = placing.independent(context.config.cluster, context.session.start(), 1)
    task = ray.remote(num_cpus=placement.cpus, num_gpus=placement.gpus, max_retries=3)(_measure)
    jobs = [_job(trial) for trial in of_network.values()]
    try:
        times = ray.get(task.remote(to_dict(inputs.config), inputs.data, jobs))
    except Exception as error:
        raise runtime.as_run_error("tune", error) from error
    found = dict(zip(of_network, times, strict=True))
    return {number: found[trial.network] for number, trial in trials.items()}


def _job(trial: Trial) -> tuple[Stage, bool]:
    """Its folder, and whether loading it runs code, for which the command asked for permission."""
    assert trial.config is not None
    assert trial.stage is not None
    return trial.stage, isinstance(trial.config.student.model, ImportedModel)


def _measure(config: Mapping[str, Any], data: Stage, jobs: Sequence[tuple[Stage, bool]]) -> list[float]:
    """Runs in a Ray task, alone."""
    import torch

    from distill_ray import inference, precision
    from distill_ray.models import load_model
    from distill_ray.store import read_shards

    precision.exact_fp32()
    device = runtime.worker_device()
    store = opening.data_store(from_dict(dict(config)), data)
    one_row = torch.from_numpy(next(read_shards(store, "validation")).inputs[:1].copy())
    return [
        inference.latency_ms(load_model(stage.folder, allow_import=names_code).to(device), one_row, device)
        for stage, names_code in jobs
    ]
