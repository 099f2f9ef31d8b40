"""label: the teacher's logits for every row, streamed through a pool of Ray Data actors into the label store."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from distill_ray import __version__, artifacts, placing, profiling, runtime
from distill_ray.artifacts import Stage
from distill_ray.config import Config, digest_payload, imports_of, to_dict
from distill_ray.errors import RunError, UserError
from distill_ray.placing import Placement
from distill_ray.stages import entry, import_labels, opening, prepare, teacher
from distill_ray.stages.context import Context, config_section, recorded, tracking_id, write_stage_config
from distill_ray.stages.shard_job import (
    ShardPlan,
    Written,
    commit,
    keep_finished,
    precision_left,
    run_shards,
    sweep_orphans,
)
from distill_ray.storage import Folder
from distill_ray.store import LabelManifest, ShardCache, ShardRecord, open_store
from distill_ray.store import manifest as manifests

_CHECK_ROWS = 512  # of the first shard, run in fp32 beside the resolved precision


@entry.Stage
def run(context: Context) -> Stage:
    """The finished label store of the config."""
    data = prepare.run(context)
    model = teacher.run(context)
    target = locate(context.config, context.out, data, model)
    make = _make if context.config.labels.from_ is None else import_labels.make
    context.once("label", target, opening.store_is_whole, lambda: make(context, data, model, target))
    store = opening.label_store(context.config, target, opening.data_store(context.config, data))
    opening.check_teacher(store, model, weights_sha256(model))
    if not target.folder.is_local:  # those that were too young when the store was committed
        sweep_orphans(target.folder, store.manifest)
    return target


def locate(config: Config, out: Folder, data: Stage, model: Stage) -> Stage:
    """The folder of this config's labels. The teacher's very weights are part of it: labels of others do not count."""
    payload = {
        "config": digest_payload(config.labels), "data": data.digest, "teacher": model.digest, "weights":
        weights_sha256(model),
    }  # fmt: skip
    return artifacts.stage(out, "labels", payload)


def weights_sha256(model: Stage) -> str:
    """The checksum of a finished model's weights."""
    summary = model.finished()
    if summary is None:
        raise RunError(f"{model.folder}: is not finished")
    return str(summary["weights_sha256"])


def _make(context: Context, data: Stage, model: Stage, target: Stage) -> None:
    source = opening.data_store(context.config, data)
    plans = [
        ShardPlan(shard.split, shard.index, shard.first_id, shard.rows, {"record": shard.model_dump()})
        for shard in source.manifest.shards
    ]
    before = begun(target)
    records, todo = keep_finished(target, plans, before.get("precision"))
    nodes = context.session.start()
    placement = placing.independent(context.config.cluster, nodes, max(1, len(todo)))
    check = before.get("precision_check")
    arguments: dict[str, Any] = {
        "teacher": model.folder.uri, "weights": weights_sha256(model), "data": data.folder.uri, "target": target,
        "cache": (context.config.cluster.cache_dir, context.config.cluster.cache_gib),
        "section": config_section(context.config, "labels"),
        "allow_import": any(imports_of(to_dict(context.config.teacher))),  # the command asked for permission
        "asked": context.config.labels.precision, "threads": placement.cpus,
        "precision": before.get("precision") or _agreed(context, placement, len(nodes)),
    }  # fmt: skip
    _start_tracking(context, target, model)
    started = time.perf_counter()
    # The first shard is compared with fp32. A job that was killed after its last shard makes the first one again.
    items = [plan.item(record=plan.payload["record"], check=False) for plan in todo or plans[: check is None]]
    if check is None:
        items[0]["check"] = True
    fresh, notes = _stream(context, items, sum(r.rows for r in records), source.manifest.rows, arguments, placement)
    seconds = time.perf_counter() - started
    rate = notes.pop("rows_per_s", None) or recorded(target.folder).get("rows_per_s")
    if notes:
        before = {"precision": notes["precision"], "precision_check": notes["check"]}
    write_stage_config(target, arguments["section"], before | ({} if rate is None else {"rows_per_s": rate}))
    records = [*records, *(fresh if todo else [])]
    if sum(record.rows for record in records) != source.manifest.rows:
        raise RunError(
            f"label: {sum(r.rows for r in records)} rows were labelled, the data store has {source.manifest.rows}"
        )
    manifest = LabelManifest(
        digest=target.digest, code_version=__version__, classes=source.manifest.classes,
        class_names=source.manifest.class_names, splits=manifests.split_records(records), data_digest=data.digest,
        teacher_digest=model.digest, teacher_weights_sha256=arguments["weights"], precision=before["precision"],
        precision_check=before["precision_check"],
    )  # fmt: skip
    standing = commit(target, manifest)
    if isinstance(standing, LabelManifest) and standing.precision != manifest.precision:  # another writer's
        kept = {"precision": standing.precision, "precision_check": standing.precision_check}
        write_stage_config(target, arguments["section"], kept)
    measured = {"label_seconds": seconds, "label_rows": sum(r.rows for r in fresh)}
    context.tracker.finish(target.folder.name, {"rows": standing.rows, **manifest.precision_check, **measured})


def begun(target: Stage) -> dict[str, Any]:
    """What is known of the job that began this store: its precision, and how that compares with fp32.

    A manifest that stands, of a store that lost shards, says it best; then the folder's config.yaml; then the shards.
    """
    try:
        standing = manifests.read(target.folder)
    except UserError:
        standing = None
    if isinstance(standing, LabelManifest) and standing.digest == target.digest:
        return {"precision": standing.precision, "precision_check": standing.precision_check}
    known = recorded(target.folder)
    if "precision" not in known and (left := precision_left(target)) is not None:
        known = {**known, "precision": left}
    return known


def _start_tracking(context: Context, target: Stage, model: Stage) -> None:
    key = target.folder.name
    config = config_section(context.config, "labels") | {"digest": target.digest, "teacher": model.digest}
    context.tracker.start(key, run_id=tracking_id(target.folder), name=key, job_type="label", config=config)


def _stream(
    context: Context,
    items: Sequence[Mapping[str, Any]],
    done: int,
    total: int,
    arguments: Mapping[str, Any],
    placement: Placement,
) -> tuple[list[ShardRecord], dict[str, Any]]:
    """The records of the shards, and what was noted of the one that was compared with fp32."""
    records: list[ShardRecord] = []
    notes: dict[str, Any] = {}
    arguments = {**arguments, "batch_size": context.config.labels.batch_size}
    with context.reporter.progress("label", total) as bar:
        bar.update(done, "rows")
        started, before = time.perf_counter(), done
        asked_at, profiles = time.time(), []
        for written in run_shards("label", items, Labeller, arguments, placement):
            records.append(written.record)
            profiles.append(written.notes.pop("profile"))
            notes |= written.notes
            done += written.record.rows
            bar.update(min(done, total), f"rows  {(done - before) / (time.perf_counter() - started):,.0f} rows/s")
    context.profile.add_workers("label", asked_at, profiles, placement.workers)
    computed_s = sum(profile["seconds"].get("compute", 0.0) for profile in profiles) / placement.workers
    if computed_s:  # what a pass of the teacher takes here, for what a search saves: without start-up, reading, writing
        notes["rows_per_s"] = round(sum(record.rows for record in records) / computed_s, 1)
    return records, notes


def _agreed(context: Context, placement: Placement, nodes: int) -> str:
    """The precision to label in. On one node each actor finds what ``auto`` means there; several nodes may differ."""
    asked = context.config.labels.precision
    if asked != "auto" or nodes == 1:
        return asked
    import ray

    task = ray.remote(num_cpus=placement.cpus, num_gpus=placement.gpus, max_retries=3)(_resolve)
    try:
        return str(ray.get(task.remote(asked)))
    except Exception as error:
        raise runtime.as_run_error("label", error) from error


def _resolve(asked: Any) -> str:
    from distill_ray import precision

    return precision.resolve(asked, runtime.worker_device())


def possible_precision(model: Any, asked: Any) -> Any:
    """``asked``, or fp32 for a teacher that is given as a program: it computes as it was made.

    Raises:
        UserError: another precision is asked of such a teacher.
    """
    if getattr(model, "reducible", True):
        return asked
    if asked not in ("auto", "fp32"):
        raise UserError(f"labels.precision {asked}: a teacher given as a program computes as it was made: use auto")
    return "fp32"


class Labeller:
    """A labelling actor: holds the teacher, turns one data shard at a time into its label shard."""

    def __init__(
        self, teacher: str, weights: str, data: str, cache: tuple[str, float], allow_import: bool, target: Stage,
        section: dict[str, Any], asked: Any, precision: Any, threads: int, batch_size: int,
    ) -> None:  # fmt: skip
        self._born = profiling.Profile()
        import torch

        from distill_ray.memory import keep_freed_memory
        from distill_ray.models import load_model
        from distill_ray.precision import cast_weights, exact_fp32, resolve

        keep_freed_memory()
        exact_fp32()
        torch.set_num_threads(threads)
        self._device = runtime.worker_device()
        self._load = partial(load_model, Folder(teacher), expected_sha256=weights, allow_import=allow_import)
        self._model = self._load().to(self._device)
        possible = possible_precision(self._model, asked)
        self._precision = resolve(precision if possible == asked else possible, self._device)
        if not recorded(target.folder):  # before the first shard: a job that continues obeys it
            write_stage_config(target, section, {"precision": self._precision})
        if self._model.ours:
            cast_weights(self._model, self._precision)
        # "auto" is this node's own folder, whatever the driver's is.
        self._data = open_store(Folder(data), ShardCache.of(*cache))
        self._target, self._batch_size = target, batch_size
        self._born.seconds["start-up"] = time.time() - self._born.began

    def __call__(self, item: Mapping[str, Any]) -> Written:
        """Read, infer, write; the record of the written shard, with a comparison with fp32 where ``check`` says so."""
        import torch

        from distill_ray.inference import logits_of
        from distill_ray.store import shards

        record = ShardRecord.model_validate(item["record"])
        notes: dict[str, Any] = {}
        with profiling.measured() as profile:
            profile.began, profile.seconds, self._born = self._born.began, self._born.seconds, profiling.Profile()
            with profiling.phase("reading"):
                rows = self._data.data_shard(record)
                inputs = torch.from_numpy(rows.inputs.copy())  # the shard is mapped read-only
            with profiling.phase("compute"):
                logits = logits_of(self._model, inputs, self._batch_size, self._precision, self._device)
            if item["check"]:
                with profiling.phase("evaluation"):
                    notes |= {"precision": self._precision, "check": self._compared(inputs, logits)}
            with profiling.phase("writing"):
                batch = shards.encode_logits(rows.row_ids, logits.numpy(), precision=self._precision)
                folder, digest = self._target.folder, self._target.digest
                written = shards.write(folder, record.split, record.index, batch, store=digest)
        return Written(written, notes | {"profile": profile.to_json()})

    def _compared(self, inputs: Any, logits: Any) -> dict[str, float]:
        """Agreement of the first rows' logits with fp32, KL(fp32 || resolved), and the largest difference."""
        import torch.nn.functional as F

        from distill_ray.inference import logits_of

        rows, used = inputs[:_CHECK_ROWS], logits[:_CHECK_ROWS]
        exact = logits_of(self._load().to(self._device), rows, self._batch_size, "fp32", self._device)
        # By torch itself: an actor that imports torchmetrics for this alone stands still for a second.
        kl = F.kl_div(used.log_softmax(1), exact.log_softmax(1), reduction="batchmean", log_target=True)
        shift = (exact - exact.max(1, keepdim=True).values) - (used - used.max(1, keepdim=True).values)
        return {
            "rows": float(len(rows)), "top1_agreement": float((used.argmax(1) == exact.argmax(1)).float().mean()),
            "kl": max(0.0, float(kl)),
            "max_abs_difference": float(shift.abs().max()),
        }  # fmt: skip
