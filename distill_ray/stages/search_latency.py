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
from distill_ray.storage import Folder

_FILE = "latencies.json"


def measure(
    context: Context, inputs: Inputs, trials: Mapping[int, Trial], folder: Folder
) -> dict[int, float | str]:  # fmt: skip
    """Milliseconds for one row by the trial's number, or why there are none; networks that are equal are measured once.

    What is measured is kept in ``folder``: a search that continues must not choose other finalists for its noise.

    Raises:
        RunError: Ray failed.
    """
    known = _known(folder)
    of_network = {trial.network: trial for trial in trials.values() if trial.network not in known}
    if of_network:
        known |= dict(zip(of_network, _measured(context, inputs, list(of_network.values())), strict=True))
        folder.write_json(_FILE, {network: ms for network, ms in known.items() if not isinstance(ms, str)})
    return {number: known[trial.network] for number, trial in trials.items()}


def _known(folder: Folder) -> dict[str, float | str]:
    try:
        return dict(folder.read_json(_FILE))
    except (FileNotFoundError, ValueError):
        return {}


def _measured(context: Context, inputs: Inputs, trials: Sequence[Trial]) -> list[float | str]:
    import ray

    placement = placing.independent(context.config.cluster, context.session.start(), 1)
    task = ray.remote(num_cpus=placement.cpus, num_gpus=placement.gpus, max_retries=3)(_measure)
    try:
        found: list[float | str] = ray.get(
            task.remote(to_dict(inputs.config), inputs.data, [_job(trial) for trial in trials])
        )
    except Exception as error:
        raise runtime.as_run_error("tune", error) from error
    return found


def _job(trial: Trial) -> tuple[Stage, bool]:
    """Its folder, and whether loading it runs code, for which the command asked for permission."""
    assert trial.config is not None
    assert trial.stage is not None
    return trial.stage, isinstance(trial.config.student.model, ImportedModel)


def _measure(config: Mapping[str, Any], data: Stage, jobs: Sequence[tuple[Stage, bool]]) -> list[float | str]:
    """Runs in a Ray task, alone."""
    import torch

    from distill_ray import inference, precision
    from distill_ray.models import load_model
    from distill_ray.store import read_shards

    precision.exact_fp32()
    device = runtime.worker_device()
    store = opening.data_store(from_dict(dict(config)), data)
    one_row = torch.from_numpy(next(read_shards(store, "validation")).inputs[:1].copy())
    found: list[float | str] = []
    for stage, names_code in jobs:
        try:
            model = load_model(stage.folder, allow_import=names_code).to(device)
            found.append(inference.latency_ms(model, one_row, device))
        except Exception as error:  # whatever a network's own code raises of a single row
            found.append(
                f"its latency cannot be measured: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            )
    return found
