"""student: fit() from the two stores, for every seed, with the CE-only control beside it. No teacher in the process.

Students of one worker are Ray tasks side by side, those of several go through Ray Train as the teacher, one after
another; each is finished (test metrics, latency) alone, so that no latency is measured while another model trains.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter

from distill_ray import artifacts, placing, profiling, runtime
from distill_ray.artifacts import Stage
from distill_ray.config import CeLoss, Config, KdLoss, LossConfig, digest_payload, from_dict, to_dict
from distill_ray.errors import UserError
from distill_ray.placing import Placement
from distill_ray.stages import data_parallel, entry, label, opening, prepare, progress, teacher
from distill_ray.stages.context import Context, Outcome, tracking_id, write_stage_config
from distill_ray.storage import Folder

if TYPE_CHECKING:
    from distill_ray.stages.data_parallel import Orders
    from distill_ray.training import Worker

_POLL_S = 0.3
_MAX_RETRIES = 3  # of a task whose worker or node died; it continues from the last epoch

Role = Literal["student", "control"]


@dataclass(frozen=True)
class Student:
    """One model to train: the config's student with this loss and seed, and its folder."""

    role: Role
    loss: CeLoss | KdLoss
    seed: int
    stage: Stage

    @property
    def title(self) -> str:
        """For tables: what distinguishes it from its neighbours."""
        if isinstance(self.loss, KdLoss):
            return f"student kd T={self.loss.temperature:g} alpha={self.loss.alpha:g}, seed {self.seed}"
        return f"{'control' if self.role == 'control' else 'student'} ce, seed {self.seed}"


@entry.Stage
def run(context: Context) -> list[Student]:
    """The finished students of the config and their CE-only controls, seed by seed."""
    return _run(context, controls=True)


def run_alone(context: Context) -> list[Student]:
    """The same without controls: a search has controls of its own."""
    return _run(context, controls=False)


def _run(context: Context, *, controls: bool) -> list[Student]:
    data, labels = prepare.run(context), label.run(context)
    labelled = opening.has_labels(opening.data_store(context.config, data), "train")
    wanted = students_of(context.config, context.out, data, labels, labelled=labelled)
    wanted = [student for student in wanted if controls or student.role == "student"]
    _make_all(context, data, labels, wanted)
    return wanted


def students_of(config: Config, out: Folder, data: Stage, labels: Stage, *, labelled: bool = True) -> list[Student]:
    """What the config asks for. A student whose own loss is ``ce`` is its own control; without hard labels in the train
    split (``labelled``) there can be no control.

    Raises:
        UserError: the loss learns from hard labels alone, and there are none.
    """
    check_loss(config.student.loss, labelled)
    wanted: list[Student] = []
    for seed in config.student.seeds:
        losses: list[tuple[Role, CeLoss | KdLoss]] = [("student", config.student.loss)]
        if labelled and not isinstance(config.student.loss, CeLoss):
            losses.append(("control", CeLoss(name="ce", class_weights=config.student.loss.class_weights)))
        wanted += [Student(role, loss, seed, locate(config, out, data, labels, loss, seed)) for role, loss in losses]
    return wanted


def check_loss(loss: CeLoss | KdLoss, labelled: bool) -> None:
    """Refuse a loss that would have nothing to learn from.

    ``kd`` with alpha below 1 is none: its CE part is a mean over the labelled rows, and 0 where there are none.

    Raises:
        UserError: names the loss.
    """
    if labelled or (isinstance(loss, KdLoss) and loss.alpha > 0):
        return
    name = "kd with alpha 0" if isinstance(loss, KdLoss) else loss.name
    raise UserError(
        f"student.loss {name}: learns from hard labels alone, and no row of the train split has one: use kd with alpha "
        "above 0"
    )


def locate(config: Config, out: Folder, data: Stage, labels: Stage, loss: CeLoss | KdLoss, seed: int) -> Stage:
    """The folder of one student, finished or not."""
    section = digest_payload(config.student) | {"loss": digest_payload(loss)}
    payload: dict[str, Any] = {"config": section, "seed": seed, "data": data.digest, "labels": labels.digest}
    if code := teacher.code_of([("student.model", config.student.model)]):
        payload["code"] = code
    return artifacts.stage(out, "student", payload)


def _make_all(context: Context, data: Stage, labels: Stage, wanted: Sequence[Student]) -> None:
    todo = [student for student in wanted if not progress.is_whole(student.stage)]
    with ExitStack() as locks:
        for student in sorted(todo, key=lambda s: s.stage.digest):  # one order everywhere: two runs cannot deadlock
            locks.enter_context(artifacts.exclusive(student.stage, context.reporter.line))
        todo = [student for student in todo if not progress.is_whole(student.stage)]
        if todo:
            _train_and_finish(context, data, labels, todo, len(wanted))
    for student in wanted:
        if student.stage.digest not in context.outcomes:
            context.reused("student", student.stage, student.role, student.seed)


def _train_and_finish(context: Context, data: Stage, labels: Stage, todo: Sequence[Student], wanted: int) -> None:
    import ray

    from distill_ray.stages import model_folder

    context.announce_ray()
    source = opening.data_store(context.config, data)
    placement = placing.student(context.config.cluster, context.session.start(), wanted)
    model_folder.check_model("student", source.data_manifest, context.config.student, placement)
    before = {student.stage.digest: len(progress.read_history(student.stage.folder)) for student in todo}
    started = time.perf_counter()
    jobs = {student.stage.digest: job_of(context.config, data, labels, student, placement) for student in todo}
    if placement.workers > 1:
        _train_in_groups(context, todo, jobs, placement)
    try:
        if placement.workers == 1:
            _train_side_by_side(context, todo, jobs, placement)
        finish_task = ray.remote(**_task_options(placement))(finish_student)
        for student in todo:  # one at a time: latency is measured alone
            asked_at = time.time()
            profile, seconds = ray.get(finish_task.remote(jobs[student.stage.digest]))
            context.profile.add_workers("student", asked_at, [profile], 1)
            _record(context, student, before[student.stage.digest], seconds)
    except Exception as error:
        raise runtime.as_run_error("student", error, "student.train.batch_size") from error
    context.profile.add_stage("student", time.perf_counter() - started)


def _task_options(placement: Placement) -> dict[str, Any]:
    return {"num_cpus": placement.cpus, "num_gpus": placement.gpus, "max_retries": _MAX_RETRIES}


def _train_side_by_side(
    context: Context, todo: Sequence[Student], jobs: Mapping[str, Mapping[str, Any]], placement: Placement
) -> None:
    import ray

    asked_at = time.time()
    fit_task = ray.remote(**_task_options(placement))(train_student)
    running = {fit_task.remote(jobs[student.stage.digest]): student for student in todo}
    _follow(context, running)
    at_once = max(1, min(len(todo), context.session.cpus // placement.cpus))
    context.profile.add_workers("student", asked_at, ray.get(list(running)), at_once)


def _train_in_groups(
    context: Context, todo: Sequence[Student], jobs: Mapping[str, Mapping[str, Any]], placement: Placement
) -> None:
    """Each by all of the workers, one after another."""
    epochs = context.config.student.train.epochs
    with context.reporter.progress("students", epochs * len(todo)) as bar:
        for number, student in enumerate(todo):
            follower = _follower(context, student, bar)

            def poll(number: int = number, follower: progress.Follower = follower) -> None:
                follower.poll()
                note = f"epochs  {number + 1} of {len(todo)} training on {placement.workers} workers"
                bar.update(epochs * number + follower.epochs, note)

            asked_at, job = time.time(), jobs[student.stage.digest]
            profile = data_parallel.train(
                "student", student.stage, train_in_group, job, placement, poll, context.reporter.line
            )
            if profile is not None:
                context.profile.add_workers("student", asked_at, [profile], 1)


def job_of(config: Config, data: Stage, labels: Stage, student: Student, placement: Placement) -> dict[str, Any]:
    """What each worker that trains ``student`` is sent."""
    return {
        "config": to_dict(config), "data": data, "labels": labels, "seed": student.seed,
        "loss": to_dict(student.loss), "stage": student.stage, "threads": placement.cpus,
        "share_bytes": placement.share_bytes,
    }  # fmt: skip


def _follow(context: Context, running: Mapping[Any, Student]) -> None:
    """Wait for the tasks, showing and logging each finished epoch."""
    import ray

    epochs = context.config.student.train.epochs
    with context.reporter.progress("students", epochs * len(running)) as bar:
        followers = [_follower(context, student, bar) for student in running.values()]
        pending = list(running)
        while pending:
            done, pending = ray.wait(pending, timeout=_POLL_S)
            for follower in followers:
                follower.poll()
            bar.update(
                sum(follower.epochs for follower in followers), f"epochs  {len(pending)} of {len(running)} training"
            )
            ray.get(done)  # raises what the task raised; the others are cancelled with the session


def _follower(context: Context, student: Student, bar: Any) -> Any:
    key = student.stage.folder.name
    section = to_dict(context.config.student) | {
        "loss": to_dict(student.loss),
        "seed": student.seed,
        "role": student.role,
    }
    context.tracker.start(
        key, run_id=tracking_id(student.stage.folder), name=student.title, job_type=student.role, config=section
    )
    return progress.Follower(student.stage.folder, lambda row: context.tracker.log(key, row), context.reporter.warn)


def _record(context: Context, student: Student, epochs_before: int, finish_seconds: float) -> None:
    summary = student.stage.finished() or {}
    fresh = progress.read_history(student.stage.folder)[epochs_before:]
    seconds = round(sum(row["train_seconds"] + row["validation_seconds"] for row in fresh) + finish_seconds, 3)
    folder = str(student.stage.folder)
    context.outcomes[student.stage.digest] = Outcome("student", folder, seconds, "ran", student.role, student.seed)
    context.tracker.finish(student.stage.folder.name, summary)
    accuracy = "n/a" if summary["accuracy"] is None else f"{summary['accuracy']:.4f}"
    context.reporter.line(f"student: {student.stage.folder.name} ({student.title}): test accuracy {accuracy}")


def train_student(job: Mapping[str, Any]) -> dict[str, Any]:
    """Runs in a Ray task: train one student to its last epoch, from wherever its folder stands; where the time went."""
    with profiling.measured() as profile:
        _train_student(job)
    return profile.to_json()


def _train_student(job: Mapping[str, Any]) -> None:
    with profiling.phase("start-up"):
        from distill_ray.stages import model_folder
        from distill_ray.training import Worker, fit

    config, target, device = _unpack(job)
    data, labels = _stores(config, job)
    spec = model_folder.student_spec(data.data_manifest, config.student, _loss(job), job["seed"], target.folder, device)
    shuffle = model_folder.resolve_shuffle(target.folder, spec.train, data, labels, job["share_bytes"])
    where = {"precision": spec.precision, "shuffle": shuffle, "threads": job["threads"], "device": device.type}
    write_stage_config(target, _section(config, job), where)
    splits = [model_folder.open_split(data, split, labels, spec.train, shuffle) for split in ("train", "validation")]
    worker, on_note = Worker(threads=job["threads"], device=device), progress.note_for_driver(target.folder)
    fit(spec, splits[0], splits[1], target.folder, worker, on_note=on_note)


def train_in_group(job: Mapping[str, Any], worker: Worker, orders: Orders) -> None:
    """Runs in each worker of the group that trains one student."""
    with profiling.phase("start-up"):
        from distill_ray.stages import model_folder

    config, target = from_dict(job["config"]), job["stage"]
    data, labels = _stores(config, job)
    train, share_bytes = config.student.train, job["share_bytes"]
    resolved, shuffle = data_parallel.agree(worker, target.folder, train, data, labels, share_bytes)
    spec = model_folder.student_spec(
        data.data_manifest, config.student, _loss(job), job["seed"], target.folder, worker.device
    )
    spec = replace(spec, precision=resolved)  # rank 0's
    data_parallel.fit(target, _section(config, job), spec, data, labels, shuffle, worker, orders, job.get("rows"))


def _section(config: Config, job: Mapping[str, Any]) -> dict[str, Any]:
    return to_dict(config.student) | {"loss": job["loss"], "seed": job["seed"]}


def finish_student(job: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """Runs in a Ray task, alone: test metrics and latency of a trained student; where the time went, and how much."""
    started = time.perf_counter()
    with profiling.measured() as profile:
        _finish_student(job)
    return profile.to_json(), time.perf_counter() - started


def _finish_student(job: Mapping[str, Any]) -> None:
    with profiling.phase("start-up"):
        from distill_ray.stages import model_folder
        from distill_ray.training import export_best

    config, target, device = _unpack(job)
    data, labels = _stores(config, job)
    spec = model_folder.student_spec(data.data_manifest, config.student, _loss(job), job["seed"], target.folder, device)
    extra = {
        "precision": spec.precision, "seed": job["seed"], "loss": job["loss"],
        "data_digest": data.data_manifest.digest, "labels_digest": labels.label_manifest.digest,
        "teacher_digest": labels.label_manifest.teacher_digest,
    }  # fmt: skip
    result = export_best(spec.model, target.folder)
    model_folder.finish(target.folder, spec.model, result, data, labels, device, extra)


def _unpack(job: Mapping[str, Any]) -> tuple[Config, Stage, Any]:
    return from_dict(job["config"]), job["stage"], runtime.worker_device()


def _stores(config: Config, job: Mapping[str, Any]) -> tuple[Any, Any]:
    data = opening.data_store(config, job["data"])
    return data, opening.label_store(config, job["labels"], data)


def _loss(job: Mapping[str, Any]) -> CeLoss | KdLoss:
    loss: CeLoss | KdLoss = TypeAdapter(LossConfig).validate_python(job["loss"])
    return loss
