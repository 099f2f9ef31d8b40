"""teacher: data store -> trained teacher, data-parallel through Ray Train (gloo on CPUs, NCCL on GPUs).

A teacher that is given instead is :mod:`distill_ray.stages.given`'s, one known by its logits alone
:mod:`distill_ray.stages.import_labels`'s: each makes a teacher folder, too.
"""

from __future__ import annotations

import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill_ray import artifacts, placing, profiling, runtime, usercode
from distill_ray.artifacts import Stage
from distill_ray.config import Config, ImportedModel, digest_payload, from_dict, to_dict
from distill_ray.errors import DistillRayError, RunError, UserError
from distill_ray.placing import Placement
from distill_ray.stages import entry, given, import_labels, opening, prepare, progress
from distill_ray.stages.context import Context, config_section, tracking_id, write_stage_config
from distill_ray.storage import Folder
from distill_ray.store import Store

_FAILURE_FILE, _PROFILE_FILE = "failure.json", "profile.json"
_POLL_S = 0.3
_COLLECTIVE_TIMEOUT_S = 600  # for a rank that hangs; one that dies is noticed at once
_MAX_START_FAILURES = 10  # a group gets a minute to start; Ray's own default is to try for ever
_MAX_RESTARTS = 3  # of the worker group, after a lost worker or node; each continues from the last epoch


@entry.Stage
def run(context: Context) -> Stage:
    """The finished teacher of the config."""
    data = prepare.run(context)
    target = locate(context.config, context.out, data)
    make = _make
    if context.config.labels.from_ is not None:
        make = import_labels.make_teacher
    elif context.config.teacher.given:
        make = _make_given
    ahead = "distill_ray.stages.model_folder"
    return context.once("teacher", target, progress.is_whole, lambda: make(context, data, target), ahead=ahead)


def locate(config: Config, out: Folder, data: Stage) -> Stage:
    """The folder of this config's teacher, finished or not."""
    if config.labels.from_ is not None:
        return import_labels.locate_teacher(config, out, data)
    teacher = config.teacher
    payload: dict[str, Any] = {"config": digest_payload(teacher), "data": data.digest}
    if teacher.given:
        kept = ("model", "format", "key", "output", "classes", "input", "ensemble", "weights", "average")
        payload["config"] = {key: value for key, value in payload["config"].items() if key in kept}
        payload["files"] = given.files(config)
    sections: list[tuple[str, Any]] = [*given.keyed(config)] or [("teacher", teacher)]
    if code := code_of((f"{key}.model", section.model) for key, section in sections):
        payload["code"] = code
    return artifacts.stage(out, "teacher", payload)


def _make_given(context: Context, data: Stage, target: Stage) -> None:
    given.make(context, data, target, lambda: locate(context.config, context.out, data) == target)


def code_of(models: Iterable[tuple[str, Any]]) -> list[str]:
    """Fingerprints of the code, and of the pretrained weights, that (key, model) pairs name.

    Empty, and then no part of a digest, where they name none.
    """
    found = []
    for key, model in models:
        if isinstance(model, ImportedModel):
            found.append(usercode.fingerprint(model.import_, f"{key}.import"))
        elif (pretrained := getattr(model, "pretrained", None)) is not None:
            found.append(given.content_sha256(pretrained, f"{key}.pretrained"))
    return found


def _make(context: Context, data: Stage, target: Stage) -> None:
    from distill_ray.stages import model_folder

    nodes = context.session.start()
    placement = placing.training(context.config.cluster, nodes)
    source = opening.data_store(context.config, data)
    _require_labels(source)
    model_folder.check_model("teacher", source.data_manifest, context.config.teacher, placement)
    # The student's now, too, not after hours of the teacher's training.
    alone = placing.student(context.config.cluster, nodes, 1)
    model_folder.check_model("student", source.data_manifest, context.config.student, alone)
    arguments: dict[str, Any] = {
        "config": to_dict(context.config),
        "data": data,
        "stage": target,
        "threads": placement.cpus,
        "room_bytes": placement.room_bytes,
        "attempt": secrets.token_hex(8),
    }
    key = target.folder.name
    section = config_section(context.config, "teacher")
    run_id = tracking_id(target.folder)
    context.tracker.start(key, run_id=run_id, name=key, job_type="teacher", config=section | {"digest": target.digest})
    epochs = context.config.teacher.train.epochs
    with context.reporter.progress("teacher", epochs) as bar:

        def on_row(row: dict[str, float]) -> None:
            bar.update(row["epoch"], progress.epoch_note(row))
            context.tracker.log(key, row)

        follower = progress.Follower(target.folder, on_row)
        bar.update(follower.epochs)
        asked_at = time.time()
        _train(arguments, placement, follower)
    with suppress(FileNotFoundError):  # the last group found nothing to do
        context.profile.add_workers("teacher", asked_at, [target.folder.read_json(_PROFILE_FILE)], 1)
        target.folder.delete(_PROFILE_FILE)
    failure = _failure_of(target.folder, arguments["attempt"])
    target.folder.delete(_FAILURE_FILE)
    if failure is not None:
        raise failure
    context.tracker.finish(key, target.folder.read_json(target.marker))


def _require_labels(data: Store) -> None:
    """Refuse to train on nothing, or to choose among epochs by nothing."""
    for split, what in (("train", "learn from"), ("validation", "choose the best epoch by")):
        if not opening.has_labels(data, split):
            raise UserError(
                f"teacher: no row of the {split} split has a label, so there is nothing to {what}: give a teacher "
                "that is trained already (teacher.checkpoint), or its logits (labels.from)"
            )


def _train(arguments: dict[str, Any], placement: Placement, follower: Any) -> None:
    """Run the trainer in a thread, so that this one follows its progress and keeps Ctrl-C for itself."""
    failure: list[BaseException] = []

    def work(scratch: str) -> None:
        try:
            _fit_with_ray_train(arguments, placement, scratch)
        except BaseException as error:
            failure.append(error)

    # fit() owns the checkpoints; Ray Train's own state is scratch, so that a reused name can never resume stale state.
    with tempfile.TemporaryDirectory(prefix="distill-ray-train-", ignore_cleanup_errors=True) as scratch:
        thread = threading.Thread(target=work, args=(scratch,), name="ray-train", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
            follower.poll()
    if failure:
        raise runtime.as_run_error("teacher", failure[0]) from failure[0]


def _fit_with_ray_train(arguments: dict[str, Any], placement: Placement, scratch: str) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        _train_worker,
        train_loop_config=arguments,
        torch_config=TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=_num_workers(placement), use_gpu=bool(placement.gpus),
            resources_per_worker=placement.resources(),
        ),
        run_config=ray.train.RunConfig(
            name=Path(scratch).name, storage_path=scratch,
            failure_config=ray.train.FailureConfig(
                max_failures=_MAX_RESTARTS, controller_failure_limit=_MAX_START_FAILURES
            ),
        ),
    )  # fmt: skip
    trainer.fit()


def _num_workers(placement: Placement) -> int | tuple[int, int]:
    """As Ray Train has it: a range lets it shrink the group when a node is lost and grow it when one joins."""
    return (placement.workers, placement.most_workers) if placement.most_workers else placement.workers


def _train_worker(arguments: dict[str, Any]) -> None:
    """Runs in each Ray Train worker.

    Ray Train restarts a group after any exception, also after one that will come again (a diverging loss, a damaged
    shard). So our own errors are written down. A worker alone then ends in peace; one among several raises, since its
    peers wait for it in a collective, and the group that Ray starts anew finds the note and ends at once.
    """
    folder = arguments["stage"].folder
    if _failure_of(folder, arguments["attempt"]) is not None:
        return
    try:
        with profiling.measured() as profile:
            rank = _train_in_worker(arguments)
        if rank == 0:
            folder.write_json(_PROFILE_FILE, profile.to_json())
    except DistillRayError as error:
        note = {"attempt": arguments["attempt"], "exit_code": error.exit_code, "message": str(error)}
        folder.write_json(_FAILURE_FILE, note)
        import ray.train

        if ray.train.get_context().get_world_size() > 1:
            raise


def _failure_of(folder: Folder, attempt: str) -> DistillRayError | None:
    try:
        note = folder.read_json(_FAILURE_FILE)
    except (FileNotFoundError, ValueError):
        return None
    if note["attempt"] != attempt:
        return None
    kind = UserError if note["exit_code"] == UserError.exit_code else RunError
    return kind(f"teacher: {note['message']}")


def _train_in_worker(arguments: dict[str, Any]) -> int:
    with profiling.phase("start-up"):
        import ray.train
        import ray.train.torch

        from distill_ray.stages import model_folder
        from distill_ray.training import FitSpec, Worker, fit

    config = from_dict(arguments["config"])
    target: Stage = arguments["stage"]
    place = ray.train.get_context()
    device = ray.train.torch.get_device()
    worker = Worker(place.get_world_rank(), place.get_world_size(), arguments["threads"], device)
    data = opening.data_store(config, arguments["data"])
    resolved, shuffle = _agree(config, target.folder, worker, data, arguments["room_bytes"])
    if worker.rank == 0:
        where = {
            "precision": resolved, "shuffle": shuffle, "workers": worker.world_size, "threads": worker.threads,
            "device": device.type,
        }  # fmt: skip
        write_stage_config(target, config_section(config, "teacher"), where)
    spec = FitSpec(
        model_folder.model_spec(data.data_manifest, config.teacher.model), config.teacher.train, config.teacher.loss,
        config.teacher.seed, resolved, model_folder.class_weights(config.teacher.loss, data.data_manifest),
    )  # fmt: skip
    last: dict[str, float] = {}
    result = fit(
        spec,
        model_folder.open_split(data, "train", None, spec.train, shuffle),
        model_folder.open_split(data, "validation", None, spec.train, shuffle),
        target.folder,
        worker,
        last.update,
        _notice_of_preemption(),
    )
    ray.train.report(last)  # once: each report waits for the controller's next look at the workers
    if result is not None:
        extra = {"precision": resolved, "workers": worker.world_size, "data_digest": data.data_manifest.digest}
        model_folder.finish(target.folder, spec.model, result, data, None, device, extra)
    return worker.rank


def _notice_of_preemption() -> Callable[[], bool]:
    """Whether Ray Train has a new notice that a node of the group will be taken away: once for each, on every worker.

    Such a notice comes from the cloud by way of ``ray drain-node``, usually 30 s to 2 min ahead; what is not saved by
    then is lost. The group starts again on the nodes that are left, see ``_MAX_RESTARTS``.
    """
    import ray.train

    known = getattr(ray.train, "get_preemption_info", None)  # since Ray 2.56
    told: set[tuple[Any, ...]] = set()

    def is_new() -> bool:
        notice = known() if known is not None else None
        if notice is None:
            return False
        key = (notice.deadline_ms, *notice.preempted_node_ids)
        new = key not in told
        told.add(key)
        return new

    return is_new


def _agree(config: Config, folder: Folder, worker: Any, data: Any, room_bytes: float) -> tuple[str, str]:
    """Precision and shuffle: rank 0 resolves ``auto`` and all obey, whatever hardware each has."""
    import torch.distributed as dist

    from distill_ray.stages import model_folder

    agreed: list[str | None] = [None, None]
    if worker.rank == 0:
        train = config.teacher.train
        agreed = [
            model_folder.resolve_precision(folder, train.precision, worker.device),
            model_folder.resolve_shuffle(folder, train, data, None, room_bytes),
        ]
    if worker.world_size > 1:
        dist.broadcast_object_list(agreed, src=0)
    return str(agreed[0]), str(agreed[1])
