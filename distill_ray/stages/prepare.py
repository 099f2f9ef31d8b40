"""prepare: source -> data store. Rows are permuted once, numbered, and written as shards by Ray Data tasks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from distill_ray import __version__, artifacts, profiling
from distill_ray.artifacts import Stage
from distill_ray.config import Config, OwnData, digest_payload, to_dict
from distill_ray.console import Reporter
from distill_ray.errors import RunError, UserError
from distill_ray.sources import SPLITS, AnySource, ParquetSource, SourceInfo, open_source, require_state, state_of
from distill_ray.sources.annotations import class_counts
from distill_ray.stages import contract, entry, opening, streaming
from distill_ray.stages.context import Context
from distill_ray.stages.shard_job import ShardPlan, Written, commit, keep_finished, run_shards, sweep_orphans
from distill_ray.storage import Folder
from distill_ray.store import DataManifest, shards
from distill_ray.store import manifest as manifests

_LISTED_CLASSES = 20


@entry.Stage
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
    return _stage_of(config, out, open_source(config.data))


def _stage_of(config: Config, out: Folder, source: AnySource) -> Stage:
    return artifacts.stage(out, "data", {"config": digest_payload(config.data), "source": source.fingerprint()})


def _make(context: Context, target: Stage) -> None:
    data = context.config.data
    source = open_source(data)
    state = state_of(source)
    # Since the folder got its name time has passed: another run may have been waited for.
    if _stage_of(context.config, context.out, source).digest != target.digest:
        raise RunError("data.path: its files changed since the command began: the same command reads them anew")
    context.session.start()
    info = _info(context, target, source)
    _check_contract(context.config, info)
    for warning in info.warnings:
        context.reporter.warn(warning)
    counts = None if info.labels is None else class_counts(info.labels, len(info.class_names), info.splits)
    _tell_classes(context.reporter, info, counts)
    plans = _plan(context.config, info)
    records, todo = keep_finished(target, plans)
    with context.reporter.progress("prepare", info_rows := sum(plan.rows for plan in plans)) as bar:
        done = sum(record.rows for record in records)
        asked_at, profiles = time.time(), []
        for written in _written(context.config, target, source, info, todo):
            records.append(written.record)
            profiles += [written.notes["profile"]] if "profile" in written.notes else []
            done += written.record.rows
            bar.update(done, "rows")
    context.profile.add_workers("prepare", asked_at, profiles, context.session.cpus)
    if sum(record.rows for record in records) != info_rows:
        raise RunError(f"prepare: {sum(r.rows for r in records)} rows were written, {info_rows} are in the source")
    splits = manifests.split_records(records)
    manifest = DataManifest(
        digest=target.digest, code_version=__version__, classes=len(info.class_names), class_names=info.class_names,
        splits=splits, source=data.source, synthetic=info.synthetic, shape=info.shape, dtype=info.dtype,
        input=contract.settled(data, info, target.folder, splits["train"].shards), config=to_dict(data),
        class_counts=None if counts is None else {name: tuple(found.tolist()) for name, found in counts.items()},
        bad_rows=info.bad_rows or None,
    )  # fmt: skip
    require_state(open_source(data), state)
    commit(target, manifest)


def _info(context: Context, target: Stage, source: AnySource) -> SourceInfo:
    """What is known before inputs are read; of a source of the user's own also which rows cannot be used."""
    data = context.config.data
    if not isinstance(data, OwnData):
        assert not isinstance(source, ParquetSource)
        return source.info()
    if isinstance(source, ParquetSource):
        pieces = source.pieces()
        source.layout()  # what is wrong with the columns is told before anything is read
        small = streaming.small_columns(context.config, source, pieces)
        bad = streaming.bad_rows(context.config, source, target) if data.max_bad_rows else []
        return source.info(small, bad)
    bad = streaming.bad_rows(context.config, source, target) if data.max_bad_rows else []
    return source.info(bad)  # type: ignore[call-arg]


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


def _written(
    config: Config, target: Stage, source: AnySource, info: SourceInfo, todo: Sequence[ShardPlan]
) -> Iterator[Written]:
    """Write the shards that are to do: read in pieces and sorted, or taken row by row."""
    if isinstance(source, ParquetSource):
        return (Written(record) for record in streaming.write_shards(config, target, source, info, todo))
    known = isinstance(config.data, OwnData)
    items = [
        plan.item(
            indices=plan.payload["indices"],
            **({"labels": info.labels[plan.payload["indices"]]} if known and info.labels is not None else {}),
        )
        for plan in todo
    ]
    arguments = streaming.job_of(config, source) | {"folder": target.folder.uri, "store": target.digest}
    return run_shards("prepare", items, _write_shard, arguments)


def _write_shard(item: Mapping[str, Any], arguments: Mapping[str, Any]) -> Written:
    """Runs in a Ray Data task: read the rows from the source, write one shard."""
    source = streaming.opened(arguments)
    assert not isinstance(source, ParquetSource)
    with profiling.measured() as profile:
        with profiling.phase("reading"):
            examples = source.read(np.asarray(item["indices"], dtype=np.int64))
        labels = np.asarray(item["labels"], dtype=np.int64) if "labels" in item else examples.labels
        row_ids = np.arange(item["first_id"], item["first_id"] + len(labels), dtype=np.int64)
        with profiling.phase("writing"):
            batch = shards.encode_data(row_ids, examples.inputs, labels, examples.source_ids)
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
    contract.check(config.data, info)
    row_bytes = int(np.prod(info.shape)) * np.dtype(info.dtype).itemsize
    fits = shards.MAX_SHARD_BYTES // (row_bytes + 64)
    if not fits:
        raise UserError(f"data: a row of {row_bytes / 2**20:.0f} MiB does not fit into a shard, which has 100 MiB")
    if config.data.shard_rows > fits:
        raise UserError(
            f"data.shard_rows: {config.data.shard_rows} rows of {row_bytes} bytes exceed 100 MiB: use at most {fits}"
        )


def _tell_classes(reporter: Reporter, info: SourceInfo, counts: Mapping[str, Any] | None) -> None:
    """How many rows of each class are in each split: a line a class, or a line a split where there are many."""
    if counts is None:
        return
    rows = {split: len(numbers) for split, numbers in info.splits.items()}
    if len(info.class_names) > _LISTED_CLASSES:
        for split, found in counts.items():
            reporter.line(
                f"  {split}: {rows[split]:,} rows, {int(found.sum()):,} labelled, {found.min():,} to {found.max():,} "
                f"of each of {len(found)} classes"
            )
        return
    names = [*info.class_names, "without a label"]
    width = max(len(name) for name in names)
    reporter.line(f"  {'class':{width}}" + "".join(f" {split:>12}" for split in counts))
    for number, name in enumerate(names):
        of_class = [
            int(found[number]) if number < len(found) else rows[split] - int(found.sum())
            for split, found in counts.items()
        ]
        if number < len(info.class_names) or any(of_class):
            reporter.line(f"  {name:{width}}" + "".join(f" {count:>12,}" for count in of_class))
