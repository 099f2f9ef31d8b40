"""import-labels: logits that somebody computed already become a label store, by the user's own ids.

The teacher is then known by its logits alone: its folder has an accuracy and no weights. The file is read twice, a
batch at a time: to measure what it holds, before any label is written, and to write it. Rows are put in their places
in a scratch file, since a file of logits may have any order.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distill_ray import __version__, artifacts, logit_files
from distill_ray.artifacts import SUMMARY_FILE, Stage
from distill_ray.config import Config
from distill_ray.errors import UserError
from distill_ray.logit_files import LogitBatch, Outputs
from distill_ray.stages import opening
from distill_ray.stages.context import Context, config_section, tracking_id, write_stage_config
from distill_ray.stages.shard_job import commit
from distill_ray.storage import Folder, reason_of
from distill_ray.store import LabelManifest, Store, shards
from distill_ray.store import manifest as manifests

PRECISION = "imported"  # of such a label store: what the logits were computed in is not known here
_SAMPLE_ROWS = 256


def locate_teacher(config: Config, out: Folder, data: Stage) -> Stage:
    """The folder of what is known of the teacher of imported logits."""
    labels = config.labels
    assert labels.from_ is not None
    ids = None if labels.ids is None else logit_files.fingerprint(labels.ids)
    payload: dict[str, Any] = {
        "imported": logit_files.fingerprint(labels.from_), "ids": ids, "by": labels.by, "output": labels.output,
        "data": data.digest,
    }  # fmt: skip
    if labels.classes is not None:
        payload["classes"] = labels.classes
    return artifacts.stage(out, "teacher", payload)


def make_teacher(context: Context, data: Stage, target: Stage) -> None:
    """Read the logits once, and write down how good they are.

    Raises:
        UserError: they are not one row of logits for each row of the data, or the student cannot be trained.
    """
    from distill_ray.stages import given

    store = opening.data_store(context.config, data)
    given.check_student(context, store)
    with _placed(context, store) as placed:
        summary = _summary(context.config, store, placed)
    write_stage_config(target, config_section(context.config, "labels"), {"output": placed.kind})
    target.folder.write_json(SUMMARY_FILE, summary)
    if placed.kind != "logits":
        context.reporter.line(f"teacher: {context.config.labels.from_}: holds {placed.kind.replace('_', '-')}")
    given.tell(context, summary)
    key = target.folder.name
    section = config_section(context.config, "labels") | {"digest": target.digest}
    context.tracker.start(key, run_id=tracking_id(target.folder), name=key, job_type="teacher", config=section)
    context.tracker.finish(key, summary)


def make(context: Context, data: Stage, model: Stage, target: Stage) -> None:
    """Read the logits again and write the label store.

    Raises:
        UserError: they are no longer those that were measured.
    """
    target.folder.sweep_temporaries()
    store = opening.data_store(context.config, data)
    made_by = str((model.finished() or {})["weights_sha256"])
    with _placed(context, store) as placed:
        if placed.sha256() != made_by:
            raise UserError(f"labels.from {context.config.labels.from_}: changed while it was read: run it again")
        records = []
        for record in store.manifest.shards:
            ids = np.arange(record.first_id, record.last_id + 1, dtype=np.int64)
            logits = placed.logits[record.first_id : record.last_id + 1]
            batch = shards.encode_logits(ids, logits, precision=PRECISION)
            records.append(shards.write(target.folder, record.split, record.index, batch, store=target.digest))
    write_stage_config(target, config_section(context.config, "labels"), {"precision": PRECISION})
    manifest = LabelManifest(
        digest=target.digest, code_version=__version__, classes=store.manifest.classes,
        class_names=store.manifest.class_names, splits=manifests.split_records(records), data_digest=data.digest,
        teacher_digest=model.digest, teacher_weights_sha256=made_by, precision=PRECISION, precision_check={},
    )  # fmt: skip
    commit(target, manifest)


def _summary(config: Config, store: Store, placed: _Placed) -> dict[str, Any]:
    import torch

    from distill_ray import metrics

    labels = _labels(store)
    split = store.manifest.splits["test"]
    first, last = split.shards[0].first_id, split.shards[-1].last_id
    quality = metrics.quality(
        torch.from_numpy(placed.logits[first : last + 1].copy()), torch.from_numpy(labels[first : last + 1]), None
    )
    known = labels >= 0
    measured: dict[str, Any] = {"accuracy": None, "rows": 0, "split": None, "majority": None}
    if known.any():
        right = (placed.best == labels)[known]
        majority = float(np.bincount(labels[known]).max() / known.sum())
        measured = {"accuracy": float(right.mean()), "rows": int(known.sum()), "split": "every", "majority": majority}
    return {
        **quality, "parameters": None, "bytes": None, "latency_ms": None, "latency_of": None, "seconds": None,
        "test_rows": split.rows, "weights_sha256": placed.sha256(), "precision": PRECISION,
        "data_digest": store.manifest.digest, "files": {}, "measured": measured,
        "imported": {
            "from": config.labels.from_, "ids": config.labels.ids, "by": config.labels.by, "output": placed.kind,
            "rows": store.manifest.rows,
        },
    }  # fmt: skip


def _labels(store: Store) -> npt.NDArray[np.int64]:
    """The hard labels of all rows by row id; -1 where there is none."""
    return np.concatenate([store.data_shard(record).labels for record in store.manifest.shards])


# --- every row in its place -----------------------------------------------------------------------------------------


@dataclass
class _Placed:
    """Logits [N, C] by row id, and what is known of them so far."""

    logits: npt.NDArray[np.float32]
    seen: npt.NDArray[np.bool_]
    best: npt.NDArray[np.int64]
    kind: str
    order: list[int] | None  # which number of a row of the file is each class's; None: they are the classes
    double: int = 0
    unknown: int = 0
    first: dict[str, Any] = field(default_factory=dict)

    def sha256(self) -> str:
        """Of the logits of all rows in order: the identity of what was imported."""
        digest = hashlib.sha256()
        for start in range(0, len(self.logits), logit_files.BATCH_ROWS):
            digest.update(np.ascontiguousarray(self.logits[start : start + logit_files.BATCH_ROWS]).data)
        return digest.hexdigest()

    def put(self, rows: npt.NDArray[np.int64], values: npt.NDArray[np.float32], names: Any) -> None:
        """Store a batch whose row ids are ``rows``, -1 where the data has none; ``names`` are its ids for errors."""
        known = np.flatnonzero(rows >= 0)
        self._note("unknown", len(rows) - len(known), names, np.flatnonzero(rows < 0))
        _, firsts = np.unique(rows[known], return_index=True)
        fresh = known[firsts][~self.seen[rows[known[firsts]]]]
        repeated = np.setdiff1d(known, fresh)
        self._note("double", len(repeated), names, repeated)
        self.seen[rows[fresh]] = True
        self.logits[rows[fresh]] = values[fresh]
        self.best[rows[fresh]] = values[fresh].argmax(axis=1)

    def _note(self, what: str, count: int, names: Any, where: npt.NDArray[np.int64]) -> None:
        if count:
            setattr(self, what, getattr(self, what) + count)
            self.first.setdefault(what, names(int(where[0])))


@contextmanager
def _placed(context: Context, store: Store) -> Iterator[_Placed]:
    """The logits of every row of the data, each once.

    Raises:
        UserError: rows are missing, double or unknown (how many, and the first of each), or not finite.
    """
    from distill_ray.models.given import class_order

    labels, manifest = context.config.labels, store.manifest
    assert labels.from_ is not None
    names = labels.classes or manifest.class_names
    order = class_order(names, len(names), manifest.class_names, "labels")
    outputs = Outputs(tuple(names), said=labels.classes is not None)
    shape = (manifest.rows, manifest.classes)
    places = _Places.of(context.config, store)
    with _scratch(shape, context.out) as array, context.reporter.progress("import", manifest.rows) as bar:
        placed = _Placed(array, np.zeros(shape[0], np.bool_), np.full(shape[0], -1, np.int64), labels.output, order)
        for batch in logit_files.read(labels.from_, labels.ids, labels.by, outputs):
            ids = places.names(batch)
            placed.put(places.rows(batch), _as_logits(placed, batch, ids, labels.from_), ids)
            bar.update(min(batch.first + len(batch.values), manifest.rows), "rows read")
        _require_coverage(placed, places, labels.from_)
        yield placed


@contextmanager
def _scratch(shape: tuple[int, int], out: Folder) -> Iterator[npt.NDArray[np.float32]]:
    """Room for all logits in a file that nobody else sees and that ends with this process, beside the runs where they
    are on a disk: the folder for temporary files is in memory on many machines.

    Raises:
        UserError: there is no room; names the folder, and how much is wanted.
    """
    place = str(out.path) if out.is_local else tempfile.gettempdir()
    wanted = 4 * shape[0] * shape[1]
    with ExitStack() as held:
        try:
            file = held.enter_context(tempfile.TemporaryFile(dir=place))
            os.posix_fallocate(file.fileno(), 0, wanted)  # a mapped page without room would end the process
        except OSError as error:
            mend = "make room there, or choose another --out" if out.is_local else "make room there, or set TMPDIR"
            raise UserError(
                f"import-labels: {place}: no room for {wanted / 2**20:,.1f} MiB of logits while they are put in order "
                f"({reason_of(error)}): {mend}"
            ) from None
        yield np.memmap(file, dtype=np.float32, mode="r+", shape=shape)


def _as_logits(placed: _Placed, batch: LogitBatch, names: Any, location: str) -> npt.NDArray[np.float32]:
    import torch

    from distill_ray.models.given import check_kind, recognise, to_logits, unclear, usable

    values = torch.from_numpy(batch.values.copy() if not batch.values.flags.writeable else batch.values)
    bad = torch.nonzero(~usable(values, placed.kind))  # type: ignore[arg-type]
    if len(bad):
        raise UserError(f"labels.from {location}: {names(int(bad[0]))!r} has a number that is not finite")
    if placed.kind == "auto":
        if (doubt := unclear(values[:_SAMPLE_ROWS])) is not None:
            raise UserError(f"labels.output: {doubt}")
        placed.kind = recognise(values[:_SAMPLE_ROWS])
    wrong = check_kind(values, placed.kind)  # type: ignore[arg-type]
    if wrong is not None:
        raise UserError(
            f"labels.from {location}: {names(wrong)!r} has no {placed.kind.replace('_', '-')} (they sum to "
            f"{float(values[wrong].sum()):.4g}): set labels.output to what the file holds"
        )
    logits: npt.NDArray[np.float32] = to_logits(values, placed.kind).numpy()  # type: ignore[arg-type]
    return logits if placed.order is None else logits[:, placed.order]


def _require_coverage(placed: _Placed, places: _Places, location: str) -> None:
    missing = np.flatnonzero(~placed.seen)
    told = []
    if len(missing):
        told.append(f"{len(missing)} of {len(placed.seen)} rows missing (the first: {places.name(int(missing[0]))!r})")
    for what in ("double", "unknown"):
        if count := getattr(placed, what):
            told.append(f"{count} {what} (the first: {placed.first[what]!r})")
    if told:
        raise UserError(f"labels.from {location}: is not one row of logits for each row of the data: {', '.join(told)}")


class _Places:
    """Which row of the data a row of the file is about."""

    def __init__(
        self, by: str, place: str, rows: int, ids: pa.Array | None, order: npt.NDArray[np.int64] | None
    ) -> None:
        import pandas as pd

        self._by, self._place, self._count, self._ids, self._order = by, place, rows, ids, order
        self._index = None if ids is None else pd.Index(ids.to_pandas())
        if self._index is not None and not self._index.is_unique:
            twice = self._index[self._index.duplicated()][0]
            raise UserError(
                f"labels.by source_id: {twice!r} is the id of several rows of the data: use labels.by row_id"
            )

    @classmethod
    def of(cls, config: Config, store: Store) -> _Places:
        labels, rows = config.labels, store.manifest.rows
        no_ids = labels.ids is None and str(labels.from_).endswith(".npy")
        place = f"labels.from {labels.from_}" if labels.ids is None else f"labels.ids {labels.ids}"
        if labels.by == "row_id":
            return cls(labels.by, place, rows, None, np.arange(rows, dtype=np.int64) if no_ids else None)
        columns = [store.batch(record).column("source_id") for record in store.manifest.shards]
        ids = pa.chunked_array(columns).combine_chunks()
        return cls(labels.by, place, rows, ids, _source_order(config, rows) if no_ids else None)

    def rows(self, batch: LogitBatch) -> npt.NDArray[np.int64]:
        """Row ids [B], -1 where the data has no such row."""
        if batch.ids is None:
            assert self._order is not None
            part = self._order[batch.first : batch.first + len(batch.values)]
            return np.concatenate([part, np.full(len(batch.values) - len(part), -1, dtype=np.int64)])
        if self._index is None:
            found = self._cast(batch, pa.int64()).to_numpy(zero_copy_only=False)
            return np.where((found >= 0) & (found < self._count), found, -1).astype(np.int64)
        assert self._ids is not None
        given = self._cast(batch, self._ids.type)
        return np.asarray(self._index.get_indexer(given.to_pandas()), dtype=np.int64)

    def _cast(self, batch: LogitBatch, kind: pa.DataType) -> pa.Array:
        ids = batch.ids
        assert ids is not None
        if ids.null_count:
            row = batch.first + int(np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0])
            raise UserError(f"{self._place}: row {row} of the file has no {self._by}: give each row its own")
        try:
            return ids.cast(kind)
        except pa.ArrowException:
            row = logit_files.first_uncast(ids, kind)
            raise UserError(
                f"{self._place}: {self._by} {ids[row].as_py()!r} (row {batch.first + row}, {ids.type}) is no {kind}, "
                "which the data's ids are: write them as the data has them, or set labels.by"
            ) from None

    def names(self, batch: LogitBatch) -> Any:
        """The id of a row of the batch, as the file has it."""
        return lambda i: f"row {batch.first + i}" if batch.ids is None else batch.ids[i].as_py()

    def name(self, row: int) -> Any:
        """The id of a row of the data."""
        return row if self._ids is None else self._ids[row].as_py()


def _source_order(config: Config, rows: int) -> npt.NDArray[np.int64]:
    """Row ids in the order of the source's own rows: what a file without ids means.

    Raises:
        UserError: the data is a sample of the source, so that the two cannot be counted alike.
    """
    from distill_ray.sources import info_of, open_source
    from distill_ray.stages import prepare

    plans = prepare._plan(config, info_of(open_source(config.data)))
    numbers = np.concatenate([plan.payload["indices"] for plan in plans])
    if len(numbers) != rows or not np.array_equal(np.sort(numbers), np.arange(rows)):
        raise UserError("labels.from: the data is a sample of its source: give the ids of the rows in labels.ids")
    order: npt.NDArray[np.int64] = np.argsort(numbers).astype(np.int64)
    return order
