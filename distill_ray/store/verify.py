"""verify: is a store what its manifest says? Every shard is read once; every fault is found before the first is told.

A label store is also compared with the data store it was made from and with its teacher, where their folders lie
beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distill_ray.artifacts import SUMMARY_FILE
from distill_ray.console import Reporter
from distill_ray.errors import RunError, UserError
from distill_ray.storage import Folder, impatience, may_pass, reason_of
from distill_ray.store import manifest as manifests
from distill_ray.store import reader, shards
from distill_ray.store.manifest import SHARD_NAME, DataManifest, ShardRecord, StoreManifest
from distill_ray.store.reader import Store

_ACCURACY_TOLERANCE = 0.01  # the store's precision may differ from the summary's fp32
_ACCURACY_TOLERANCE_ROWS = 2  # of few rows, one is more than a point
_REMAKE = "delete it and manifest.json, then run the stage again"
_REMAKE_ALL = "delete this folder, then run the stage again"


def verify(folder: Folder, reporter: Reporter) -> dict[str, Any]:
    """Check a data or label store; what was counted, as JSON-able values.

    ``missing`` and ``double`` count row ids of 0..rows-1, ``unlabelled`` rows without a label. For a label store,
    ``data`` and ``teacher`` name the folders it was compared with (None where there is none), and ``accuracy`` is the
    teacher's on the test split as the stored logits have it, beside ``summary_accuracy``.

    Raises:
        UserError: the folder is no store, or has faults: their number and the first of them.
    """
    store = _open(folder)
    check = _Check(store)
    check.faults.extend(_manifest_faults(folder, store.manifest))
    twins = None if isinstance(store.manifest, DataManifest) else _Twins.beside(store, check.faults, reporter)
    records = store.manifest.shards
    with reporter.progress("verify", len(records)) as bar:
        for done, record in enumerate(records, start=1):
            batch = check.shard(record)
            if batch is not None and twins is not None:
                check.faults.extend(twins.faults(record, batch))
            bar.update(done, "shards")
    check.coverage()
    if check.faults:
        raise _summary(check, reporter)
    answer = check.answer()
    return answer if twins is None else answer | twins.answer(reporter)


def _open(folder: Folder) -> Store:
    """The store in ``folder``, or what it is instead."""
    try:
        with impatience():
            names = folder.names()
        if not names and folder.is_local and not folder.path.is_dir():
            what = "is a file, not the folder of a store" if folder.path.exists() else "no such folder"
            raise UserError(f"{folder}: {what}; give a folder data-... or labels-... of <out>/artifacts")
    except (OSError, pa.ArrowException) as error:
        if not folder.is_local and may_pass(error):  # it does not answer: that says nothing of the store
            raise RunError(f"{folder}: cannot be read ({reason_of(error)}): try again later") from None
        raise UserError(f"{folder}: cannot be read ({reason_of(error)})") from None
    if not names:
        raise UserError(f"{folder}: holds no files; give a folder data-... or labels-... of <out>/artifacts")
    if manifests.FILE not in names:
        if any(SHARD_NAME.match(name) for name in names):
            raise UserError(f"{folder}: has shards but no {manifests.FILE}: unfinished; run its command again")
        raise UserError(f"{folder}: is not a store: it has no {manifests.FILE}")
    return reader.open_store(folder)


def _manifest_faults(folder: Folder, manifest: StoreManifest) -> Iterator[str]:
    """What the manifest contradicts itself in."""
    place = folder.location(manifests.FILE)
    if len(manifest.class_names) != manifest.classes:
        yield f"{place}: names {len(manifest.class_names)} classes of {manifest.classes}: {_REMAKE_ALL}"
    if isinstance(manifest, DataManifest) and manifest.dtype not in shards.ARROW_TYPES:
        yield f"{place}: dtype {manifest.dtype!r} is none of {', '.join(shards.ARROW_TYPES)}: {_REMAKE_ALL}"
    for name, split in manifest.splits.items():
        held = sum(record.rows for record in split.shards)
        if split.rows != held:
            yield f"{place}: split {name} has {split.rows} rows, but its shards hold {held}: {_REMAKE_ALL}"
        for index, record in enumerate(split.shards):
            expected = f"{record.split}-{record.index:05d}-{record.sha256[:16]}.arrow"
            if (record.split, record.index) != (name, index):
                yield f"{place}: {record.file} stands as shard {index} of split {name}: {_REMAKE_ALL}"
            elif record.file != expected:
                yield f"{place}: {record.file} should be called {expected} by its checksum: {_REMAKE_ALL}"


@dataclass
class _Check:
    """What was found so far in one store."""

    store: Store
    faults: list[str] = field(default_factory=list)
    missing: int = 0
    double: int = 0
    outside: int = 0
    unlabelled: int = 0
    _unread_rows: int = 0

    def __post_init__(self) -> None:
        # One byte a row. A manifest may claim any number; the files hold at most one row in 8 bytes, its id.
        most = sum(self.store.folder.sizes().values()) // 8
        self._seen = np.zeros(min(self.store.manifest.rows, most), dtype=np.bool_)

    def shard(self, record: ShardRecord) -> pa.RecordBatch | None:
        """Check one shard; its batch, None where its columns cannot be trusted."""
        place = self.store.folder.location(record.file)
        try:
            batch = shards.read(self.store.folder, record, verify=True)
            batch.validate(full=True)
        except UserError as error:
            self._unread(record, str(error))
            return None
        except (OSError, pa.ArrowException) as error:
            if not self.store.folder.is_local:  # it does not answer: that says nothing of the shard
                raise RunError(f"{place}: cannot be read ({reason_of(error)}): try again later") from None
            self._unread(record, f"{place}: cannot be read ({reason_of(error)}): {_REMAKE}")
            return None
        wrong = shards.column_fault(batch, self.store.manifest)
        if wrong is not None:
            self._unread(record, f"{place}: {wrong}: {_REMAKE}")
            return None
        self._ids(record, batch, place)
        if isinstance(self.store.manifest, DataManifest):
            found = self._labels(batch, self.store.manifest)
        else:
            found = _logits_fault(batch, self.store.manifest.classes)
        if found is not None:
            self.faults.append(f"{place}: {found}: {_REMAKE}")
        return batch

    def _unread(self, record: ShardRecord, fault: str) -> None:
        self.faults.append(fault)
        self._unread_rows += record.rows

    def _ids(self, record: ShardRecord, batch: pa.RecordBatch, place: str) -> None:
        wrong = shards.ids_fault(batch, record)
        if wrong is not None:
            self.faults.append(f"{place}: {wrong}: {_REMAKE}")
        ids = batch.column("row_id").to_numpy(zero_copy_only=True)
        inside = ids[(ids >= 0) & (ids < len(self._seen))]
        unique = np.unique(inside)
        self.outside += len(ids) - len(inside)
        self.double += len(inside) - len(unique) + int(self._seen[unique].sum())
        self._seen[unique] = True

    def _labels(self, batch: pa.RecordBatch, manifest: DataManifest) -> str | None:
        self.unlabelled += batch.column("label").null_count
        return shards.labels_fault(batch, manifest.classes)

    def coverage(self) -> None:
        """Count the ids that no shard has; a shard that could not be read is a fault of its own already."""
        rows = self.store.manifest.rows
        self.missing = rows - int(self._seen.sum())
        if self.double or self.outside or self.missing > self._unread_rows:
            self.faults.append(
                f"{self.store.folder.location(manifests.FILE)}: the row ids are not 0 to {rows - 1}, each "
                f"once: {self.missing} missing, {self.double} double, {self.outside} outside: {_REMAKE_ALL}"
            )

    def answer(self) -> dict[str, Any]:
        """The counts."""
        manifest, folder = self.store.manifest, self.store.folder
        named = {record.file for record in manifest.shards}
        return {
            "folder": str(folder), "kind": manifest.kind, "digest": manifest.digest, "rows": manifest.rows,
            "splits": {name: split.rows for name, split in manifest.splits.items()}, "shards": len(named),
            "bytes": sum(record.bytes for record in manifest.shards), "classes": manifest.classes,
            "missing": self.missing, "double": self.double,
            "orphans": sum(1 for name in folder.names() if SHARD_NAME.match(name) and name not in named),
            **({"unlabelled": self.unlabelled} if isinstance(manifest, DataManifest) else {}),
        }  # fmt: skip


def _logits_fault(batch: pa.RecordBatch, classes: int) -> str | None:
    """Whether a row is not finite, or not minus its maximum."""
    shard = shards.decode_logits(batch, classes)
    broken = np.flatnonzero(~np.isfinite(shard.logits).all(axis=1))
    if len(broken):
        return f"row {shard.row_ids[broken[0]]} has a logit that is not finite ({len(broken)} such rows)"
    shifted = np.flatnonzero(shard.logits.max(axis=1) != 0)
    if len(shifted):
        return f"the largest logit of row {shard.row_ids[shifted[0]]} is not 0 ({len(shifted)} such rows)"
    return None


@dataclass
class _Twins:
    """The data store that a label store was made from: shard by shard the same ids; and the teacher's accuracy."""

    labels: Store
    data: Store | None
    right: int = 0
    counted: int = 0

    def __post_init__(self) -> None:
        known = self.data.manifest.shards if self.data else []
        self._records = {(record.split, record.index): record for record in known}

    @classmethod
    def beside(cls, labels: Store, faults: list[str], reporter: Reporter) -> _Twins:
        """Open the data store in the same artifacts folder."""
        folder = data_folder(labels)
        if not folder.exists(manifests.FILE):
            reporter.line(f"verify: there is no {folder.name} beside it: its row ids were not compared with the data")
            return cls(labels, None)
        try:
            data = reader.open_store(folder)
            reader.check_twins(data, labels)
        except UserError as error:
            faults.append(str(error))
            return cls(labels, None)
        twins = cls(labels, data)
        for split, index in sorted(twins._records.keys() - {(r.split, r.index) for r in labels.manifest.shards}):
            faults.append(f"{labels.folder}: shard {index} of split {split} has no labels: {_REMAKE_ALL}")
        return twins

    def faults(self, record: ShardRecord, batch: pa.RecordBatch) -> Iterator[str]:
        """Compare one label shard with its data shard."""
        if self.data is None:
            return
        place = self.labels.folder.location(record.file)
        twin = self._records.get((record.split, record.index))
        if twin is None:
            yield f"{place}: {self.data.folder.name} has no shard {record.index} of split {record.split}: {_REMAKE}"
            return
        try:
            rows = self.data.data_shard(twin, verify=False)  # where it is mapped, only ids and labels are read
        except (UserError, OSError, pa.ArrowException, KeyError, ValueError) as error:
            yield f"{self.data.folder.location(twin.file)}: cannot be read: run verify on {self.data.folder} ({error})"
            return
        logits = shards.decode_logits(batch, self.labels.manifest.classes)
        if not np.array_equal(rows.row_ids, logits.row_ids):
            yield f"{place}: its row ids are not those of its twin {self.data.folder.location(twin.file)}: {_REMAKE}"
        elif record.split == "test":
            self._count(rows.labels, logits.logits)

    def _count(self, labels_B: npt.NDArray[np.int64], logits_BC: npt.NDArray[np.float16]) -> None:
        known = labels_B >= 0
        self.counted += int(known.sum())
        self.right += int((logits_BC.argmax(axis=1) == labels_B)[known].sum())

    def answer(self, reporter: Reporter) -> dict[str, Any]:
        """What the stored logits score on the test split, beside what the teacher's summary says."""
        manifest = self.labels.label_manifest
        accuracy = self.right / self.counted if self.counted else None
        summary = _teacher_summary(self.labels)
        said = None if summary is None else summary.get("accuracy")
        if summary is not None and summary.get("weights_sha256") != manifest.teacher_weights_sha256:
            reporter.warn(f"teacher-{manifest.teacher_digest} holds other weights than those that made these labels")
        elif accuracy is not None and said is not None:
            allowed = max(_ACCURACY_TOLERANCE, _ACCURACY_TOLERANCE_ROWS / self.counted)
            if abs(accuracy - said) > allowed:
                raise UserError(
                    f"{self.labels.folder}: 1 fault; first: the stored logits score {accuracy:.4f} on the test split, "
                    f"the teacher's summary.json says {said:.4f}: {_REMAKE_ALL}"
                )
        return {
            "data": str(self.data.folder) if self.data else None, "data_digest": manifest.data_digest,
            "teacher": None if summary is None else str(teacher_folder(self.labels)),
            "teacher_digest": manifest.teacher_digest, "precision": manifest.precision, "accuracy": accuracy,
            "summary_accuracy": said, "same_weights": summary is not None and summary.get("weights_sha256") ==
            manifest.teacher_weights_sha256,
            "imported": None if summary is None else summary.get("imported", {}).get("from"),
        }  # fmt: skip


def data_folder(labels: Store) -> Folder:
    """Where the data store of a label store lies: in the same artifacts folder."""
    return _sibling(labels.folder, f"data-{labels.label_manifest.data_digest}")


def teacher_folder(labels: Store) -> Folder:
    """Where the teacher of a label store lies: in the same artifacts folder."""
    return _sibling(labels.folder, f"teacher-{labels.label_manifest.teacher_digest}")


def _teacher_summary(labels: Store) -> dict[str, Any] | None:
    """The summary of the teacher beside the store, None where there is no such folder."""
    place = teacher_folder(labels)
    try:
        summary = place.read_json(SUMMARY_FILE)
    except FileNotFoundError:
        return None
    except ValueError:
        summary = None
    if not isinstance(summary, dict):
        raise UserError(f"{place.location(SUMMARY_FILE)}: is damaged: delete it, the command that made it mends it")
    return summary


def _sibling(folder: Folder, name: str) -> Folder:
    at = Folder(str(folder.path.resolve())) if folder.is_local else folder
    return at.parent / name


def _summary(check: _Check, reporter: Reporter) -> UserError:
    """The first fault in one line; the others go to the reporter."""
    for fault in check.faults[1:]:
        reporter.line(f"verify: also {fault}")
    number = len(check.faults)
    lost = f" ({check.missing} rows missing, {check.double} double)" if check.missing or check.double else ""
    return UserError(f"{check.store.folder}: {number} fault{'s' * (number > 1)}{lost}; first: {check.faults[0]}")
