"""teacher: data store -> trained teacher, data-parallel through Ray Train.

A teacher that is given instead is :mod:`distill_ray.stages.given`'s, one known by its logits alone
:mod:`distill_ray.stages.import_labels`'s: each makes a teacher folder, too.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from distill_ray import artifacts, placing, profiling, usercode
from distill_ray.artifacts import Stage
from distill_ray.config import Config, ImportedModel, digest_payload, from_dict, to_dict
from distill_ray.errors import UserError
from distill_ray.stages import data_parallel, entry, given, import_labels, opening, prepare, progress
from distill_ray.stages.context import Context, config_section, tracking_id
from distill_ray.storage import Folder
from distill_ray.store import Store

if TYPE_CHECKING:
    from distill_ray.stages.data_parallel import Orders
    from distill_ray.training import Worker


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
    ahead = ("distill_ray.stages.model_folder",)
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
        "share_bytes": placement.share_bytes,
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

        follower = progress.Follower(target.folder, on_row, context.reporter.warn)
        bar.update(follower.epochs)
        asked_at = time.time()
        profile = data_parallel.train(
            "teacher", target, _train_in_worker, arguments, placement, follower.poll, context.reporter.line
        )
    if profile is not None:
        context.profile.add_workers("teacher", asked_at, [profile], 1)
    context.tracker.finish(key, target.folder.read_json(target.marker))


def _require_labels(data: Store) -> None:
    """Refuse to train on nothing, or to choose among epochs by nothing."""
    for split, what in (("train", "learn from"), ("validation", "choose the best epoch by")):
        if not opening.has_labels(data, split):
            raise UserError(
                f"teacher: no row of the {split} split has a label, so there is nothing to {what}: give a teacher "
                "that is trained already (teacher.checkpoint), or its logits (labels.from)"
            )


def _train_in_worker(arguments: dict[str, Any], worker: Worker, orders: Orders) -> None:
    """Runs in each worker of the group."""
    with profiling.phase("start-up"):
        from distill_ray.stages import model_folder
        from distill_ray.training import FitSpec

    config = from_dict(arguments["config"])
    target: Stage = arguments["stage"]
    data = opening.data_store(config, arguments["data"])
    teacher = config.teacher
    resolved, shuffle = data_parallel.agree(worker, target.folder, teacher.train, data, None, arguments["share_bytes"])
    spec = FitSpec(
        model_folder.model_spec(data.data_manifest, teacher.model), teacher.train, teacher.loss, teacher.seed, resolved,
        model_folder.class_weights(teacher.loss, data.data_manifest),
    )  # fmt: skip
    section = config_section(config, "teacher")
    result = data_parallel.fit(target, section, spec, data, None, shuffle, worker, orders)
    if result is not None:
        extra = {"precision": resolved, "workers": worker.world_size, "data_digest": data.data_manifest.digest}
        model_folder.finish(target.folder, spec.model, result, data, None, worker.device, extra)
