"""One model trained by several workers through Ray Train (gloo on CPUs, NCCL on GPUs): teachers, and large students."""

from __future__ import annotations

import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_ray import placing, profiling, runtime
from distill_ray.artifacts import Stage
from distill_ray.config import TrainConfig
from distill_ray.errors import DistillRayError, RunError, UserError
from distill_ray.placing import Placement
from distill_ray.stages.context import write_stage_config
from distill_ray.storage import Folder
from distill_ray.store import Store

if TYPE_CHECKING:
    from distill_ray.stages.shared_rows import SharedRows
    from distill_ray.training import FitResult, FitSpec, Worker

_FAILURE_FILE, _PROFILE_FILE = "failure.json", "profile.json"
_POLL_S, _LOOK_AT_NODES_S = 0.3, 5.0
_COLLECTIVE_TIMEOUT_S = 600  # for a rank that hangs; one that dies is noticed at once
_MAX_START_FAILURES = 10  # a group gets a minute to start; Ray's own default is to try for ever
_MAX_RESTARTS = 3  # of the worker group, after a lost worker or node; each continues from the last epoch
_SHORT_TOLD_S, _SHORT_ENDS_S = 60.0, 600.0

Work = Callable[[Any, "Worker", "Orders"], None]


def train(
    stage: str,
    target: Stage,
    work: Work,
    arguments: Any,
    placement: Placement,
    poll: Callable[[], None],
    tell: Callable[[str], None],
    name: str | None = None,
) -> dict[str, Any] | None:
    """Run ``work(arguments, worker, orders)`` in each worker of a group, again after a lost worker or node.

    ``stage`` is for messages. ``poll`` is called by this thread while the group works, ``tell`` with news of it.
    A group with a ``name`` ends early, and in peace, after ``ask_to_stop`` of that name.

    Returns:
        Where the time of rank 0 went; None where the last group found nothing to do.

    Raises:
        UserError, RunError: what a worker raised, or that the cluster has lost the room for the group.
    """
    attempt = secrets.token_hex(8)
    job = {
        "work": work, "arguments": arguments, "target": target, "attempt": attempt, "threads": placement.cpus,
        "name": name,
    }  # fmt: skip
    _run(stage, job, placement, poll, tell)
    profile: dict[str, Any] | None = None
    with suppress(FileNotFoundError):
        profile = target.folder.read_json(_PROFILE_FILE)
        target.folder.delete(_PROFILE_FILE)
    failure = _failure_of(stage, target.folder, attempt)
    target.folder.delete(_FAILURE_FILE)
    if failure is not None:
        raise failure
    return profile


def _run(
    stage: str, job: dict[str, Any], placement: Placement, poll: Callable[[], None], tell: Callable[[str], None]
) -> None:
    """Run the trainer in a thread, so that this one follows its progress and keeps Ctrl-C for itself."""
    failure: list[BaseException] = []

    def work(scratch: str) -> None:
        try:
            _fit_with_ray_train(job, placement, scratch)
        except BaseException as error:
            failure.append(error)

    shortage, looked_at = Shortage(stage, placement), time.monotonic()
    # fit() owns the checkpoints; Ray Train's own state is scratch, so that a reused name can never resume stale state.
    with tempfile.TemporaryDirectory(prefix="distill-ray-train-", ignore_cleanup_errors=True) as scratch:
        thread = threading.Thread(target=work, args=(scratch,), name="ray-train", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
            poll()
            if time.monotonic() - looked_at >= _LOOK_AT_NODES_S and thread.is_alive():
                looked_at = time.monotonic()
                try:
                    if news := shortage.look(_room(placement), looked_at):
                        tell(news)
                except RunError as error:
                    _note_failure(job, error)  # where Ray outlives this run, a group that starts later ends at once
                    raise
    if failure:
        raise runtime.as_run_error(stage, failure[0], f"{stage}.train.batch_size") from failure[0]


def _room(placement: Placement) -> int:
    """For how many of the workers the cluster has room now."""
    try:
        return placing.room_for(runtime.live_nodes(), placement)
    except Exception:  # no answer from Ray's head, which is watched elsewhere
        return placement.workers


@dataclass
class Shortage:
    """How long the cluster has had no room for the group's fewest workers: Ray waits for it silently, without end."""

    stage: str
    placement: Placement
    since: float | None = None
    told_at: float | None = None

    def look(self, room: int, now: float) -> str | None:
        """What to tell of it: now and then a line, mostly nothing. ``room`` is for so many workers, ``now`` in s.

        Raises:
            RunError: it has lasted for too long.
        """
        if room >= self.placement.workers:
            self.since = None
            return None
        if self.since is None:
            self.since = self.told_at = now
        if now - self.since >= _SHORT_ENDS_S:
            raise RunError(
                f"{self.stage}: {self.placement.key} needs room for {self.placement.workers}, and for "
                f"{_SHORT_ENDS_S / 60:.0f} minutes the cluster has had it for {room}: start nodes, or lower it; "
                "finished work is kept, the same command continues"
            )
        assert self.told_at is not None
        if now - self.told_at < _SHORT_TOLD_S:
            return None
        self.told_at = now
        left_s = _SHORT_ENDS_S - (now - self.since)
        return (
            f"{self.stage}: waiting for room for {self.placement.workers} workers ({self.placement.key}), the cluster "
            f"has it for {room}; the run ends in {left_s / 60:.0f} minutes without"
        )


def _fit_with_ray_train(job: dict[str, Any], placement: Placement, scratch: str) -> None:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        _train_worker,
        train_loop_config=job,
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


def _train_worker(job: dict[str, Any]) -> None:
    """Runs in each Ray Train worker.

    Ray Train restarts a group after any exception, also after one that will come again (a diverging loss, a damaged
    shard). So our own errors are written down. A worker alone then ends in peace; one among several raises, since its
    peers wait for it in a collective, and the group that Ray starts anew finds the note and ends at once.
    """
    folder = job["target"].folder
    if _failure_of("", folder, job["attempt"]) is not None:
        return
    try:
        with profiling.measured() as profile:
            rank = _work(job)
        if rank == 0:
            folder.write_json(_PROFILE_FILE, profile.to_json())
    except _StoppedError:
        return  # as all of its peers, at the same step
    except DistillRayError as error:
        _note_failure(job, error)
        import ray.train

        if ray.train.get_context().get_world_size() > 1:
            raise


def _work(job: dict[str, Any]) -> int:
    with profiling.phase("start-up"):
        import ray.train
        import ray.train.torch

        from distill_ray.training import Worker

    place = ray.train.get_context()
    device = ray.train.torch.get_device()
    worker = Worker(place.get_world_rank(), place.get_world_size(), job["threads"], device)
    orders = Orders(worker, job["target"].folder, job["name"], _notice_of_preemption())
    orders.end_if_asked()
    job["work"](job["arguments"], worker, orders)
    return worker.rank


def _note_failure(job: dict[str, Any], error: DistillRayError) -> None:
    note = {"attempt": job["attempt"], "exit_code": error.exit_code, "message": str(error)}
    job["target"].folder.write_json(_FAILURE_FILE, note)


def _failure_of(stage: str, folder: Folder, attempt: str) -> DistillRayError | None:
    try:
        note = folder.read_json(_FAILURE_FILE)
    except (FileNotFoundError, ValueError):
        return None
    if note["attempt"] != attempt:
        return None
    kind = UserError if note["exit_code"] == UserError.exit_code else RunError
    return kind(f"{stage}: {note['message']}")


def ask_to_stop(folder: Folder, name: str) -> None:
    """Let the group of this ``name`` that trains ``folder`` end soon; its finished epochs are kept.

    A note, which its workers look for: whoever ends them from outside, controller and all, leaves behind what Ray Train
    cleans up in the end of a run.
    """
    folder.write_json(_stop_file(name), {})


def must_stop(folder: Folder, name: str | None) -> bool:
    """Whether that group was asked to."""
    return name is not None and folder.exists(_stop_file(name))


def forget_stop(folder: Folder, name: str) -> None:
    """The group of this ``name`` is over."""
    if must_stop(folder, name):
        folder.delete(_stop_file(name))


def _stop_file(name: str) -> str:
    return f"stop-{name}.json"


class _StoppedError(Exception):
    """The group was asked to stop."""


@dataclass(frozen=True)
class Orders:
    """What the workers of a group are told while they train; each asks at the same steps, and gets the same answer."""

    worker: Worker
    folder: Folder
    name: str | None
    preempted: Callable[[], bool]

    def must_save(self) -> bool:
        """As ``training.fit`` wants it."""
        self.end_if_asked()
        return self.preempted()

    def end_if_asked(self) -> None:
        """Leave the training, on every worker, where the group was asked to stop."""
        import torch
        import torch.distributed as dist

        if self.name is None:
            return
        asked = torch.tensor(self.worker.rank == 0 and must_stop(self.folder, self.name), device=self.worker.device)
        if self.worker.world_size > 1:
            dist.broadcast(asked, src=0)
        if asked:
            raise _StoppedError


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


# --- what the workers of a group do, whatever they train --------------------------------------------------------------


def agree(
    worker: Worker, folder: Folder, train: TrainConfig, data: Store, labels: Store | None, share_bytes: float
) -> tuple[str, str]:
    """Precision and shuffle: rank 0 resolves ``auto`` and all obey, whatever hardware each has."""
    import torch.distributed as dist

    from distill_ray.stages import model_folder

    agreed: list[str | None] = [None, None]
    if worker.rank == 0:
        agreed = [
            model_folder.resolve_precision(folder, train.precision, worker.device),
            model_folder.resolve_shuffle(folder, train, data, labels, share_bytes),
        ]
    if worker.world_size > 1:
        dist.broadcast_object_list(agreed, src=0)
    return str(agreed[0]), str(agreed[1])


def fit(
    target: Stage,
    section: dict[str, Any],
    spec: FitSpec,
    data: Store,
    labels: Store | None,
    shuffle: str,
    worker: Worker,
    orders: Orders,
    shared: SharedRows | None = None,
) -> FitResult | None:
    """``training.fit`` of one worker of a group, after rank 0 has written the folder's ``config.yaml``.

    ``shared`` holds the rows already, for those that want all of them at once.
    """
    import ray.train

    from distill_ray import training
    from distill_ray.stages import model_folder, progress

    if worker.rank == 0:
        where = {
            "precision": spec.precision, "shuffle": shuffle, "workers": worker.world_size, "threads": worker.threads,
            "device": worker.device.type,
        }  # fmt: skip
        write_stage_config(target, section, where)
    last: dict[str, float] = {}

    def on_epoch(row: dict[str, float]) -> None:
        last.update(row)
        if row["epoch"] < spec.train.epochs:  # after the last the model is written
            orders.end_if_asked()

    result = training.fit(
        spec,
        model_folder.open_split(data, "train", labels, spec.train, shuffle, shared),
        model_folder.open_split(data, "validation", labels, spec.train, shuffle, shared),
        target.folder,
        worker,
        on_epoch,
        orders.must_save,
        progress.note_for_driver(target.folder),
    )
    ray.train.report(last)  # once: each report waits for the controller's next look at the workers
    return result
