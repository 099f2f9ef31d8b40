"""What prepare and label share: a store is written shard by shard through Ray Data, and a killed job continues.

One item a shard, so that blocks are ours rather than inferred from bytes; a worker writes its shard and emits only the
shard's manifest record. The shards' names are the ledger: each carries the checksum of its content.
"""

from __future__ import annotations

import inspect
import json
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from distill_ray import runtime
from distill_ray.artifacts import Stage, has_locks
from distill_ray.errors import DistillRayError, RunError, UserError
from distill_ray.placing import Placement
from distill_ray.stages import opening
from distill_ray.storage import Folder
from distill_ray.store import ShardRecord, shards
from distill_ray.store import manifest as manifests
from distill_ray.store.manifest import SHARD_NAME, StoreManifest

_RECOVERY_THREADS = 16
# How often a piece of work, and an actor, may lose its process: Ray Data's own limits are none, so that work whose
# process dies each time (memory, a crash in native code) would be begun again for ever, without a word.
RETRIES = 10
RESTARTS = 50  # of an actor in all: nodes come and go in a long job
_REMOTE_ORPHAN_S = 86_400.0
_DECIDES_MEMORY = {"prepare": "data.shard_rows", "label": "labels.batch_size"}


@dataclass(frozen=True)
class ShardPlan:
    """A shard to be written: ``rows`` rows with ids from ``first_id`` on."""

    split: str
    index: int
    first_id: int
    rows: int
    payload: Mapping[str, Any] = field(default_factory=dict)

    def item(self, **more: Any) -> dict[str, Any]:
        """The Ray Data item of this shard."""
        return {"split": self.split, "index": self.index, "first_id": self.first_id, **more}

    def matches(self, record: ShardRecord) -> bool:
        """Whether ``record`` is this very shard."""
        last_id = self.first_id + self.rows - 1
        return (record.first_id, record.last_id, record.rows) == (self.first_id, last_id, self.rows)


@dataclass(frozen=True)
class Written:
    """What the work on one shard gives: the record for the manifest, and what else there is to tell, JSON-able."""

    record: ShardRecord
    notes: dict[str, Any] = field(default_factory=dict)


def keep_finished(
    target: Stage, plans: Sequence[ShardPlan], precision: str | None = None
) -> tuple[list[ShardRecord], list[ShardPlan]]:
    """Divide the plans into those whose whole shard an earlier, killed job left in the folder, and the rest.

    Of label shards only those made in ``precision`` count, where one is given (see ``precision_left``).
    """
    folder = target.folder
    folder.sweep_temporaries()
    left: dict[tuple[str, int], list[str]] = {}
    for name in folder.names():
        if match := SHARD_NAME.match(name):
            left.setdefault((match["split"], int(match["index"])), []).append(name)

    trusted = _named_before(target)

    def recovered(plan: ShardPlan) -> ShardRecord | None:
        return _whole_shard(target, left.get((plan.split, plan.index), []), plan, trusted, precision)

    # Each is read once, from a disk or an object store: threads, since neither reading nor hashing holds the GIL.
    with ThreadPoolExecutor(_RECOVERY_THREADS) as pool:
        found = list(pool.map(recovered, plans))
    records = [record for record in found if record is not None]
    return records, [plan for plan, record in zip(plans, found, strict=True) if record is None]


def precision_left(target: Stage) -> str | None:
    """What the label shards were made in that an earlier job left without a record of it; None where there are none.

    Of several precisions the first shard's counts.
    """
    for name in sorted(filter(SHARD_NAME.match, target.folder.names())):
        try:
            if found := shards.precision_of(target.folder, name):
                return found
        except (UserError, FileNotFoundError):
            continue
    return None


def _named_before(target: Stage) -> frozenset[str]:
    """Shards that a manifest of this very store names, of which others were lost: its word counts for those left."""
    try:
        manifest = manifests.read(target.folder)
    except UserError:
        return frozenset()
    return frozenset(record.file for record in manifest.shards) if manifest.digest == target.digest else frozenset()


def _whole_shard(
    target: Stage, names: Sequence[str], plan: ShardPlan, trusted: frozenset[str], precision: str | None
) -> ShardRecord | None:
    for name in names:
        store = None if name in trusted else target.digest
        try:
            record = shards.recover(target.folder, name, store=store, precision=precision)
        except (UserError, FileNotFoundError):  # not a shard, or swept by another writer a moment ago
            continue
        if record is not None and plan.matches(record):
            return record
    return None


def run_shards(
    stage: str,
    items: Sequence[Mapping[str, Any]],
    work: Callable[..., Written] | type,
    arguments: Mapping[str, Any],
    placement: Placement | None = None,
) -> Iterator[Written]:
    """Stream the items through ``work`` on the cluster and yield what each shard gives as it is finished.

    ``work`` is a function ``(item, arguments) -> Written`` run as tasks, or a class run as a pool of actors placed by
    ``placement``, made with ``arguments`` and called with an item.

    Raises:
        UserError, RunError: what the work raised in its process.
    """
    for text, notes in _run(stage, items, work, arguments, placement):
        yield Written(ShardRecord.model_validate_json(text), notes)


def run_items(
    stage: str,
    items: Sequence[Mapping[str, Any]],
    work: Callable[..., str],
    arguments: Mapping[str, Any],
) -> Iterator[str]:
    """As ``run_shards``, for a function whose answer is any text."""
    for text, _ in _run(stage, items, work, arguments, None):
        yield text


def _run(
    stage: str,
    items: Sequence[Mapping[str, Any]],
    work: Callable[..., Written | str] | type,
    arguments: Mapping[str, Any],
    placement: Placement | None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    if not items:
        return
    data = runtime.data()
    dataset = data.from_items([dict(item) for item in items], override_num_blocks=len(items))
    if placement is None:
        rows = bounded(dataset.map, _Task(work, arguments), num_cpus=1)
    else:
        pool = data.ActorPoolStrategy(size=placement.workers)
        rows = bounded(
            dataset.map, _Actor, fn_constructor_args=(work, dict(arguments)), compute=pool, num_cpus=placement.cpus,
            num_gpus=placement.gpus or None,
        )  # fmt: skip
    try:
        # Without prefetching: its threads outlive a failure, and one that asks Ray for something after the shutdown
        # ends the process without a word.
        for block in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in block.to_pylist():
                yield _unpacked(stage, row)
    except (DistillRayError, GeneratorExit):
        raise
    except Exception as error:
        raise runtime.as_run_error(stage, error, _DECIDES_MEMORY.get(stage)) from error


def bounded(mapping: Callable[..., Any], work: Any, **options: Any) -> Any:
    """A dataset's ``map`` or ``map_batches`` of ``work``, which ends where the processes that do it die each time."""
    limits: dict[str, Any] = {"max_retries": RETRIES}
    if "compute" in options:
        limits = {"max_restarts": RESTARTS, "max_task_retries": RETRIES}
    # Ray 2.60 says that 2.64 will not take them, and has nothing in their place yet.
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(mapping).parameters.values()):
        limits = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        return mapping(work, **options, **limits)


class _Task:
    """A function over items, as Ray Data tasks."""

    def __init__(self, work: Callable[..., Written | str] | type, arguments: Mapping[str, Any]) -> None:
        self._work, self._arguments = work, arguments

    def __call__(self, item: dict[str, Any]) -> dict[str, str]:
        return _packed(lambda: self._work(item, self._arguments))


class _Actor:
    """A class over items, one instance an actor."""

    def __init__(self, work: type, arguments: Mapping[str, Any]) -> None:
        try:
            self._work = work(**arguments)
        except Exception as error:  # told with the first item: Ray Data would try to start another actor
            self._work = _raiser(error)

    def __call__(self, item: dict[str, Any]) -> dict[str, str]:
        return _packed(lambda: self._work(item))


def _raiser(error: Exception) -> Callable[[Any], Written]:
    def work(item: Any) -> Written:
        raise error

    return work


def _packed(work: Callable[[], Written | str]) -> dict[str, str]:
    """The answer, or what went wrong, as a row: Ray Data wraps exceptions and loses their cause on the way."""
    try:
        answer = work()
        if isinstance(answer, str):
            return {"answer": answer, "notes": "{}", "error": ""}
        return {"answer": answer.record.model_dump_json(), "notes": json.dumps(answer.notes), "error": ""}
    except Exception as error:
        told = isinstance(error, DistillRayError)
        place = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        problem = {
            "user": isinstance(error, UserError),
            "told": told,
            "message": str(error) if told else f"{place}{reason or type(error).__name__}",
            "trace": traceback.format_exc(),
        }
        return {"answer": "", "notes": "", "error": json.dumps(problem)}


def _unpacked(stage: str, row: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    if not row["error"]:
        return row["answer"], json.loads(row["notes"])
    problem = json.loads(row["error"])
    if problem["user"]:
        failure: DistillRayError = UserError(f"{stage}: {problem['message']}")
    else:
        kept = "" if problem["told"] else "; finished work is kept, the same command continues"
        failure = RunError(f"{stage}: {problem['message']}{kept}")
    failure.add_note(problem["trace"])  # shown with --debug
    raise failure


def commit(target: Stage, manifest: StoreManifest) -> StoreManifest:
    """Make the store whole and sweep what does not belong to it; the manifest that stands, which may be another's.

    The first of several writers wins: a writer that finds a whole store in its place leaves it be, since readers may
    have opened it. Under a shared lock (see artifacts.exclusive) that cannot happen; object stores, and mounts that do
    not share their locks, have none.

    Raises:
        RunError: another writer took shards of this store away. The same command makes them again.
    """
    if not opening.store_is_whole(target):
        _require_shards(target, manifest)
        manifests.write(target.folder, manifest)
    standing = manifests.read(target.folder)
    # Also before the sweep: where another took ours away, its own are what is left of the work.
    _require_shards(target, standing)
    sweep_orphans(target.folder, standing)
    _require_shards(target, standing)
    return standing


def _require_shards(target: Stage, manifest: StoreManifest) -> None:
    sizes = target.folder.sizes()
    gone = next((record.file for record in manifest.shards if sizes.get(record.file) != record.bytes), None)
    if gone is not None:
        raise RunError(
            f"{target.folder.location(gone)}: another run took it away while this one was at work: the same command "
            "makes it again"
        )


def sweep_orphans(folder: Folder, standing: StoreManifest, *, remote_age_s: float = _REMOTE_ORPHAN_S) -> None:
    """Delete shards that the standing manifest does not name: leftovers of killed or superseded writers.

    Where there are no locks (object stores) only those older than a day: another writer may be about to commit younger
    ones.
    """
    named = {record.file for record in standing.shards}
    for name in folder.names() if has_locks(folder) else folder.names_older_than(remote_age_s):
        if SHARD_NAME.match(name) and name not in named:
            folder.delete(name)
