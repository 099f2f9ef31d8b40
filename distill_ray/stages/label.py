"""label: the teacher's logits for every row, streamed through a pool of Ray Data actors into the label store."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from distill_ray import __version__, artifacts, placing, runtime
from distill_ray.artifacts import Stage
from distill_ray.config import Config, digest_payload, imports_of, to_dict
from distill_ray.errors import RunError, UserError
from distill_ray.placing import Placement
from distill_ray.stages import import_labels, opening, prepare, teacher
from distill_ray.stages.context import Context, config_section, tracking_id, write_stage_config
from distill_ray.stages.shard_job import ShardPlan, commit, keep_finished, run_shards, sweep_orphans
from distill_ray.storage import Folder
from distill_ray.store import LabelManifest, ShardCache, ShardRecord, open_store
from distill_ray.store import manifest as manifests

_CHECK_ROWS = 512  # of the first training shard, run in fp32 beside the resolved precision


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
    records, todo = keep_finished(target, plans)
    nodes = context.session.start()
    placement = placing.independent(context.config.cluster, nodes, max(1, len(todo)))
    arguments: dict[str, Any] = {
        "teacher": model.folder.uri, "weights": weights_sha256(model), "data": data.folder.uri,
        "cache": opening.cache_of(context.config),
        "allow_import": any(imports_of(to_dict(context.config.teacher))),  # the command asked for permission
    }  # fmt: skip
    check = _resolve(context, target, arguments, placement)
    write_stage_config(target, config_section(context.config, "labels"), {"precision": check["precision"]})
    arguments |= {
        "folder": target.folder.uri, "precision": check["precision"], "threads": placement.cpus,
        "batch_size": context.config.labels.batch_size, "store": target.digest,
    }  # fmt: skip
    started = time.perf_counter()
    fresh = _stream(context, todo, sum(r.rows for r in records), source.manifest.rows, arguments, placement)
    seconds = time.perf_counter() - started
    records = [*records, *fresh]
    if sum(record.rows for record in records) != source.manifest.rows:
        raise RunError(
            f"label: {sum(r.rows for r in records)} rows were labelled, the data store has {source.manifest.rows}"
        )
    manifest = LabelManifest(
        digest=target.digest, code_version=__version__, classes=source.manifest.classes,
        class_names=source.manifest.class_names, splits=manifests.split_records(records), data_digest=data.digest,
        teacher_digest=model.digest, teacher_weights_sha256=weights_sha256(model), precision=check["precision"],
        precision_check={key: check[key] for key in ("rows", "top1_agreement", "kl", "max_abs_difference")},
    )  # fmt: skip
    standing = commit(target, manifest)
    assert isinstance(standing, LabelManifest)
    _log(context, target, standing, {"label_seconds": seconds, "label_rows": sum(r.rows for r in fresh)})


def _stream(
    context: Context,
    todo: Sequence[ShardPlan],
    done: int,
    total: int,
    arguments: Mapping[str, Any],
    placement: Placement,
) -> list[ShardRecord]:
    records: list[ShardRecord] = []
    items = [plan.item(record=plan.payload["record"]) for plan in todo]
    with context.reporter.progress("label", total) as bar:
        bar.update(done, "rows")
        started, before = time.perf_counter(), done
        for record in run_shards("label", items, Labeller, arguments, placement):
            records.append(record)
            done += record.rows
            bar.update(done, f"rows  {(done - before) / (time.perf_counter() - started):,.0f} rows/s")
    return records


def _resolve(context: Context, target: Stage, arguments: dict[str, Any], placement: Placement) -> dict[str, Any]:
    """Resolve the precision where the labelling will run, and compare it with fp32 on a sample."""
    import ray

    task = ray.remote(num_cpus=placement.cpus, num_gpus=placement.gpus, max_retries=3)(check_precision)
    try:
        answer: dict[str, Any] = ray.get(task.remote(target.folder, context.config.labels.precision, **arguments))
    except Exception as error:
        raise runtime.as_run_error("label", error) from error
    return answer


def check_precision(
    folder: Folder, asked: Any, teacher: str, weights: str, data: str, cache: ShardCache, allow_import: bool
) -> dict[str, Any]:
    """Runs on a worker: the resolved precision, and its agreement with fp32 and KL(fp32 || resolved) on a sample."""
    import torch
    from torchmetrics import KLDivergence
    from torchmetrics.classification import MulticlassAccuracy

    from distill_ray.metrics import logits_of
    from distill_ray.models import load_model
    from distill_ray.stages import model_folder

    device = runtime.worker_device()
    model = load_model(Folder(teacher), expected_sha256=weights, allow_import=allow_import).to(device)
    resolved = model_folder.resolve_precision(folder, possible_precision(model, asked), device)
    store = open_store(Folder(data), cache)
    inputs = store.data_shard(store.manifest.splits["train"].shards[0]).inputs[:_CHECK_ROWS]
    rows = torch.from_numpy(inputs.copy())  # the shard is mapped read-only
    exact, used = (logits_of(model, rows, _CHECK_ROWS, p, device) for p in ("fp32", resolved))
    agreement = MulticlassAccuracy(store.manifest.classes, average="micro", sync_on_compute=False)
    kl = KLDivergence(log_prob=True, sync_on_compute=False)
    shift = (exact - exact.max(1, keepdim=True).values) - (used - used.max(1, keepdim=True).values)
    return {
        "precision": resolved, "rows": float(len(rows)), "top1_agreement": float(agreement(used, exact.argmax(1))),
        "kl": max(0.0, float(kl(exact.log_softmax(1), used.log_softmax(1)))), "max_abs_difference":
        float(shift.abs().max()),
    }  # fmt: skip


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
        self, teacher: str, weights: str, data: str, cache: ShardCache, allow_import: bool, folder: str,
        precision: str, threads: int, batch_size: int, store: str,
    ) -> None:  # fmt: skip
        import torch

        from distill_ray.memory import keep_freed_memory
        from distill_ray.models import load_model
        from distill_ray.precision import cast_weights, exact_fp32

        keep_freed_memory()
        exact_fp32()
        torch.set_num_threads(threads)
        self._device = runtime.worker_device()
        loaded = load_model(Folder(teacher), expected_sha256=weights, allow_import=allow_import)
        self._model = loaded.to(self._device)
        if loaded.ours:
            cast_weights(self._model, precision)
        self._data, self._folder = open_store(Folder(data), cache), Folder(folder)
        self._precision, self._batch_size, self._store = precision, batch_size, store

    def __call__(self, item: Mapping[str, Any]) -> ShardRecord:
        """Read, infer, write; the record of the written shard."""
        import torch

        from distill_ray.metrics import logits_of
        from distill_ray.store import shards

        record = ShardRecord.model_validate(item["record"])
        rows = self._data.data_shard(record)
        inputs = torch.from_numpy(rows.inputs.copy())  # the shard is mapped read-only
        logits = logits_of(self._model, inputs, self._batch_size, self._precision, self._device)
        batch = shards.encode_logits(rows.row_ids, logits.numpy())
        return shards.write(self._folder, record.split, record.index, batch, store=self._store)


def _log(context: Context, target: Stage, manifest: LabelManifest, measured: Mapping[str, float]) -> None:
    key = target.folder.name
    config = config_section(context.config, "labels") | {"digest": target.digest, "teacher": manifest.teacher_digest}
    context.tracker.start(key, run_id=tracking_id(target.folder), name=key, job_type="label", config=config)
    context.tracker.finish(key, {"rows": manifest.rows, **manifest.precision_check, **measured})
