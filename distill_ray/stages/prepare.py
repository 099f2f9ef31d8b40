"""prepare: source -> data store. Rows are permuted once, numbered, and written as shards by Ray Data tasks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill_ray import __version__, artifacts, profiling
from distill_ray.artifacts import Stage
from distill_ray.config import Config, digest_payload, from_dict, to_dict
from distill_ray.errors import RunError, UserError
from distill_ray.sources import SPLITS, SourceInfo, open_source
from distill_ray.stages import opening
from distill_ray.stages.context import Context
from distill_ray.stages.shard_job import ShardPlan, Written, commit, keep_finished, run_shards, sweep_orphans
from distill_ray.storage import Folder
from distill_ray.store import DataManifest, shards
from distill_ray.store import manifest as manifests


def run(context: Context) -> Stage:
    """The finished data store of the config."""
    target = locate(context.config, context.out)
    context.once("prepare", target, opening.store_is_whole, lambda: _make(context, target))
    store = opening.data_store(context.config, target)  # refuses a folder that holds another store
    if not target.folder.is_local:  # those that were too young when the store was committed
        sweep_orphans(target.folder, store.manifest)
    return target


def locate(config: Config, out: Folder) -> Stage:
    """The folder of this config's data store, finished or not."""
    source = open_source(config.data)
    return artifacts.stage(out, "data", {"config": digest_payload(config.data), "source": source.fingerprint()})


def _make(context: Context, target: Stage) -> None:
    info = open_source(context.config.data).info()
    _check_contract(context.config, info)
    for warning in info.warnings:
        context.reporter.warn(warning)
    plans = _plan(context.config, info)
    records, todo = keep_finished(target, plans)
    arguments = {"config": to_dict(context.config), "folder": target.folder.uri, "store": target.digest}
    items = [plan.item(indices=plan.payload["indices"]) for plan in todo]
    context.session.start()
    with context.reporter.progress("prepare", info_rows := sum(plan.rows for plan in plans)) as bar:
        done = sum(record.rows for record in records)
        asked_at, profiles = time.time(), []
        for written in run_shards("prepare", items, _write_shard, arguments):
            records.append(written.record)
            profiles.append(written.notes["profile"])
            done += written.record.rows
            bar.update(done, "rows")
    context.profile.add_workers("prepare", asked_at, profiles, context.session.cpus)
    if sum(record.rows for record in records) != info_rows:
        raise RunError(f"prepare: {sum(r.rows for r in records)} rows were written, {info_rows} are in the source")
    manifest = DataManifest(
        digest=target.digest, code_version=__version__, classes=len(info.class_names), class_names=info.class_names,
        splits=manifests.split_records(records), source=context.config.data.source, synthetic=info.synthetic,
        shape=info.shape, dtype=info.dtype, input=context.config.data.input, config=to_dict(context.config.data),
    )  # fmt: skip
    commit(target, manifest)


def _plan(config: Config, info: SourceInfo) -> list[ShardPlan]:
    """Which rows go into which shard: each split is permuted with the seed, ids count on through the splits."""
    plans: list[ShardPlan] = []
    first_id = 0
    for number, (split, rows) in enumerate(info.splits.items()):
        order = np.random.default_rng((config.data.seed, 4, number)).permutation(rows)
        for index, start in enumerate(range(0, len(order), config.data.shard_rows)):
            chunk = order[start : start + config.data.shard_rows]
            plans.append(ShardPlan(split, index, first_id, len(chunk), {"indices": chunk}))
            first_id += len(chunk)
    return plans


def _write_shard(item: Mapping[str, Any], arguments: Mapping[str, Any]) -> Written:
    """Runs in a Ray Data task: read the rows from the source, write one shard."""
    config = from_dict(arguments["config"])
    with profiling.measured() as profile:
        with profiling.phase("reading"):
            examples = open_source(config.data).read(np.asarray(item["indices"], dtype=np.int64))
        row_ids = np.arange(item["first_id"], item["first_id"] + len(examples.labels), dtype=np.int64)
        with profiling.phase("writing"):
            batch = shards.encode_data(row_ids, examples.inputs, examples.labels, examples.source_ids)
            folder = Folder.at(arguments["folder"])
            record = shards.write(folder, item["split"], item["index"], batch, store=arguments["store"])
    return Written(record, {"profile": profile.to_json()})


def _check_contract(config: Config, info: SourceInfo) -> None:
    for split in SPLITS:
        if not len(info.splits.get(split, ())):
            raise UserError(
                f"data.split.fractions: no rows are left for {split}: models are fitted on train, chosen on validation "
                "and measured on test"
            )
    wanted = config.data.input.shape
    if wanted is not None and wanted != info.shape:
        raise UserError(f"data.input.shape: {list(wanted)}, but the rows of this source are {list(info.shape)}")
    row_bytes = int(np.prod(info.shape)) * np.dtype(info.dtype).itemsize
    fits = shards.MAX_SHARD_BYTES // (row_bytes + 64)
    if config.data.shard_rows > fits:
        raise UserError(
            f"data.shard_rows: {config.data.shard_rows} rows of {row_bytes} bytes exceed 100 MiB: use at most {fits}"
        )
