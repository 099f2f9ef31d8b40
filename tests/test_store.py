"""The store: what is written is what is read, and what is not whole is never taken for whole."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distill_ray.artifacts import Stage
from distill_ray.errors import RunError, UserError
from distill_ray.stages import label, opening
from distill_ray.stages.context import write_stage_config
from distill_ray.stages.shard_job import ShardPlan, commit, keep_finished, sweep_orphans
from distill_ray.storage import Folder
from distill_ray.store import DataManifest, Store, StoredSplit, open_store, read_shards, read_split, shards
from distill_ray.store import manifest as manifests
from tests import stores

DTYPES = ("uint8", "int32", "float16", "float32")
shapes = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5)
finite_rows = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def through_a_file(batch: pa.RecordBatch, folder: Folder) -> pa.RecordBatch:
    return shards.read(folder, shards.write(folder, "train", 0, batch, store=stores.DATA_DIGEST), verify=True)


# --- round trips ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), shape=shapes, rows=st.integers(1, 6))
def test_data_round_trip(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: str, shape: tuple[int, ...], rows: int
) -> None:
    inputs = data.draw(hnp.arrays(dtype, (rows, *shape)))
    labels = data.draw(hnp.arrays(np.int64, rows, elements=st.integers(-1, 9)))
    ids = np.arange(40, 40 + rows, dtype=np.int64)
    batch = shards.encode_data(ids, inputs, labels, [str(row) for row in ids])

    stored = through_a_file(batch, Folder.at(tmp_path_factory.mktemp("shard")))
    found = shards.decode_data(stored, shape)

    assert found.row_ids.tolist() == ids.tolist()
    assert found.inputs.dtype == inputs.dtype
    assert found.inputs.shape == inputs.shape
    assert found.inputs.tobytes() == inputs.tobytes()  # NaN payloads too
    assert found.labels.tolist() == labels.tolist()
    assert stored.column("label").null_count == int((labels < 0).sum())
    assert stored.column("source_id").to_pylist() == [str(row) for row in ids]
    assert stored.schema.metadata == {
        b"shape": ",".join(map(str, shape)).encode(),
        b"store": stores.DATA_DIGEST.encode(),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous_inputs_are_stored_in_c_order(dtype: str) -> None:
    inputs = np.arange(2 * 3 * 4).reshape(2, 4, 3).astype(dtype).transpose(0, 2, 1)
    batch = shards.encode_data(np.arange(2), inputs, np.zeros(2, np.int64), ["a", "b"])
    assert np.array_equal(shards.decode_data(batch, (3, 4)).inputs, inputs)
    assert batch.column("input").type.value_type == pa.from_numpy_dtype(np.dtype(dtype))


def test_source_ids_may_be_of_any_type() -> None:
    batch = shards.encode_data(np.arange(2), np.zeros((2, 3), np.uint8), np.zeros(2, np.int64), [17, None])
    assert batch.column("source_id").to_pylist() == [17, None]


@settings(max_examples=100, deadline=None)
@given(logits=finite_rows)
def test_logits_are_stored_minus_the_row_maximum(logits: Any) -> None:
    ids = np.arange(len(logits), dtype=np.int64)
    found = shards.decode_logits(shards.encode_logits(ids, logits, precision="fp32"), logits.shape[1])

    exact = logits.astype(np.float64) - logits.astype(np.float64).max(axis=1, keepdims=True)
    assert found.row_ids.tolist() == ids.tolist()
    assert found.logits.dtype == np.float16
    assert np.isfinite(found.logits).all()
    assert (found.logits.max(axis=1) == 0).all()
    # Half a unit of float16's last place; below its normal range half of its smallest step.
    clipped = np.maximum(exact, -65504.0)
    assert (np.abs(found.logits.astype(np.float64) - clipped) <= np.abs(clipped) * 2**-11 * 1.001 + 2**-25).all()


def test_softmax_survives_a_large_offset() -> None:
    row = np.array([[3.0, 1.0, -2.0]], dtype=np.float32)
    plain, offset = (
        shards.decode_logits(shards.encode_logits(np.array([0]), values, precision="fp32"), 3).logits
        for values in (row, row + 60000)
    )
    assert plain.tolist() == [[0.0, -2.0, -5.0]]
    assert offset.tolist() == plain.tolist()


def test_logits_below_the_range_of_float16_are_clipped() -> None:
    row = np.array([[0.0, -65504.0, -1e6, -3e38], [3e38, -3e38, 0.0, 3e38]], dtype=np.float32)
    stored = shards.decode_logits(shards.encode_logits(np.arange(2), row, precision="fp32"), 4).logits
    assert stored.tolist() == [[0.0, -65504.0, -65504.0, -65504.0], [0.0, -65504.0, -65504.0, 0.0]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_logits_are_refused_by_row_id(bad: float) -> None:
    logits = np.zeros((4, 3), dtype=np.float32)
    logits[2, 1] = logits[3, 0] = bad
    with pytest.raises(RunError, match=r"non-finite logit for row 702 \(2 such rows"):
        shards.encode_logits(np.array([700, 701, 702, 703]), logits, precision="fp32")


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_shard_is_named_by_the_checksum_of_its_file(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    record = shards.write(folder, "test", 7, stores.data_batch(np.arange(8, 16)), store=stores.DATA_DIGEST)
    raw = (tmp_path / record.file).read_bytes()
    assert record.sha256 == hashlib.sha256(raw).hexdigest()
    assert record.file == f"test-00007-{record.sha256[:16]}.arrow"
    assert (record.bytes, record.rows, record.first_id, record.last_id) == (len(raw), 8, 8, 15)
    assert (record.split, record.index) == ("test", 7)


def test_writing_the_same_twice_changes_nothing(tmp_path: Path) -> None:
    folder, batch = Folder.at(tmp_path), stores.data_batch(np.arange(8))
    first = shards.write(folder, "train", 0, batch, store=stores.DATA_DIGEST)
    before = (tmp_path / first.file).stat()
    assert shards.write(folder, "train", 0, batch, store=stores.DATA_DIGEST) == first
    after = (tmp_path / first.file).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [path.name for path in tmp_path.iterdir()] == [first.file]


def test_writing_mends_a_damaged_file_of_the_same_size(tmp_path: Path) -> None:
    folder, batch = Folder.at(tmp_path), stores.data_batch(np.arange(8))
    record = shards.write(folder, "train", 0, batch, store=stores.DATA_DIGEST)
    stores.flip_byte(tmp_path / record.file)
    assert shards.write(folder, "train", 0, batch, store=stores.DATA_DIGEST) == record
    assert shards.read(folder, record, verify=True).equals(batch)


def test_other_content_gets_another_name(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    one, two = (
        shards.write(folder, "train", 0, stores.data_batch(np.arange(8), seed), store=stores.DATA_DIGEST)
        for seed in (0, 1)
    )
    assert one.file != two.file
    assert folder.names() == sorted([one.file, two.file])


def test_a_shard_above_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 2000)
    with pytest.raises(UserError, match=r"data\.shard_rows: .*use at most \d+"):
        shards.write(Folder.at(tmp_path), "train", 0, stores.data_batch(np.arange(64)), store=stores.DATA_DIGEST)
    assert list(tmp_path.iterdir()) == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def rename_checksum(path: Path) -> None:
    path.rename(path.with_name("train-00000-0123456789abcdef.arrow"))


def rename_away(path: Path) -> None:
    path.rename(path.with_name("shard.arrow"))


@pytest.mark.parametrize("damage", [truncate, empty, stores.flip_byte, rename_checksum, rename_away])
def test_recover_takes_only_whole_shards(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = Folder.at(tmp_path)
    record = shards.write(folder, "train", 0, stores.data_batch(np.arange(8)), store=stores.DATA_DIGEST)
    assert shards.recover(folder, record.file, store=stores.DATA_DIGEST) == record
    damage(tmp_path / record.file)
    assert [shards.recover(folder, name, store=stores.DATA_DIGEST) for name in folder.names()] == [None]


@settings(max_examples=40, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_recover_sees_any_flipped_bit(tmp_path_factory: pytest.TempPathFactory, where: float, bit: int) -> None:
    folder = Folder.at(tmp_path_factory.mktemp("flip"))
    record = shards.write(folder, "train", 0, stores.data_batch(np.arange(8)), store=stores.DATA_DIGEST)
    raw = bytearray(folder.read_bytes(record.file))
    raw[int(where * len(raw))] ^= 1 << bit
    (folder.path / record.file).write_bytes(raw)
    assert shards.recover(folder, record.file, store=stores.DATA_DIGEST) is None


def test_recover_takes_no_file_without_rows_or_ids(tmp_path: Path) -> None:
    for batch in (pa.record_batch({"other": pa.array([1])}), stores.data_batch(np.arange(8)).slice(0, 0)):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        raw = sink.getvalue().to_pybytes()
        name = f"train-00000-{hashlib.sha256(raw).hexdigest()[:16]}.arrow"
        (tmp_path / name).write_bytes(raw)
        assert shards.recover(Folder.at(tmp_path), name, store=stores.DATA_DIGEST) is None


# --- the manifest ---------------------------------------------------------------------------------------------------


def edit(store_folder: Folder, change: Callable[[dict[str, Any]], None]) -> None:
    raw = store_folder.read_json(manifests.FILE)
    change(raw)
    store_folder.write_json(manifests.FILE, raw)


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    for store in (stores.make_data(tmp_path), stores.make_labels(tmp_path)):
        assert open_store(str(store.folder)).manifest == store.manifest
        assert store.manifest.rows == sum(stores.SPLITS.values())
        assert [record.index for record in store.manifest.splits["train"].shards] == [0, 1, 2, 3, 4]


def test_a_newer_minor_version_is_read(tmp_path: Path) -> None:
    store = stores.make_data(tmp_path)

    def renew(raw: dict[str, Any]) -> None:
        raw.update(format_version="1.9", a_key_of_tomorrow=1)
        raw["splits"]["train"]["shards"][0]["another"] = [2]

    edit(store.folder, renew)
    assert len(read_split(open_store(store.folder), "train")) == stores.SPLITS["train"]


@pytest.mark.parametrize("version", ["2.0", "10.3", "²", "", "new"])
def test_a_newer_major_version_is_refused_by_name(tmp_path: Path, version: str) -> None:
    store = stores.make_data(tmp_path)
    edit(store.folder, lambda raw: raw.update(format_version=version))
    with pytest.raises(UserError, match=f"has format version '{version}', this code reads up to 1.x"):
        open_store(store.folder)


@pytest.mark.parametrize(
    "name",
    [
        "../data-secret/train-00000-0123456789abcdef.arrow", "/etc/passwd", "train-00000-0123456789abcdef.arrow/..",
        "..", "", "train-00000-0123456789abcdef.arrow\n", "train-0-0123456789abcdef.arrow",
    ],
)  # fmt: skip
def test_a_shard_name_may_not_leave_the_folder(tmp_path: Path, name: str) -> None:
    store = stores.make_data(tmp_path)
    edit(store.folder, lambda raw: raw["splits"]["train"]["shards"][0].update(file=name))
    with pytest.raises(UserError, match=r"splits\.train\.shards\.0\.file: .*is not a shard's name"):
        open_store(store.folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "distill_ray.store", "format_ver', "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ("[]", "is not the manifest of a distill_ray.store"),
        ('{"format": "parquet"}', "is not the manifest of a distill_ray.store"),
        ('{"format": "distill_ray.store", "format_version": "1.0"}', "kind: "),
        ('{"format": "distill_ray.store", "format_version": "1.0", "kind": "data"}', "digest: Field required"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / manifests.FILE).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        open_store(str(tmp_path))
    assert str(tmp_path / manifests.FILE) in str(caught.value)


def test_a_folder_without_a_manifest_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json: no such file: .* is not a finished store"):
        open_store(str(tmp_path / "nowhere"))


# --- the reader -----------------------------------------------------------------------------------------------------


def test_read_split_joins_inputs_labels_and_logits_by_id(tmp_path: Path) -> None:
    data, labels = stores.make_data(tmp_path), stores.make_labels(tmp_path)
    found = read_split(data, "test", labels)
    assert found.row_ids.tolist() == list(range(48, 60))
    assert found.labels.tolist() == stores.labels_of(np.arange(48, 60)).tolist()
    assert found.inputs.shape == (12, *stores.SHAPE)
    assert found.logits is not None
    assert found.logits.argmax(axis=1).tolist() == found.labels.tolist()
    assert read_split(data, "test").logits is None


def test_read_split_names_the_splits_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no split 'dev', only train, validation, test"):
        read_split(stores.make_data(tmp_path), "dev")


@pytest.mark.parametrize("damage", [truncate, stores.flip_byte, empty])
@pytest.mark.parametrize("make", [stores.make_data, stores.make_labels])
def test_a_damaged_shard_is_refused(tmp_path: Path, make: Any, damage: Callable[[Path], None]) -> None:
    made = make(tmp_path)
    data = stores.make_data(tmp_path)
    labels = made if made.folder != data.folder else stores.make_labels(tmp_path)
    damage(stores.file_of(made, 1))
    with pytest.raises(UserError, match="damaged shard") as caught:
        read_split(data, "train", labels)
    assert str(stores.file_of(made, 1)) in str(caught.value)


def test_a_shard_that_comes_over_the_network_again_is_checked_again(tmp_path: Path) -> None:
    data = stores.make_data(tmp_path)
    remote = open_store(Folder(f"file://{data.folder.path}"))
    split = StoredSplit(remote, "train", None, window_rows=8)
    assert len(split.load([0])) == 8
    stores.flip_byte(stores.file_of(data))
    with pytest.raises(UserError, match="damaged shard"):
        split.load([0])


@pytest.mark.parametrize("text", ["{}", '{"format": "another", "format_version": "9.0"}', "[]", '{"format": "dis'])
def test_a_manifest_that_is_none_is_made_again(tmp_path: Path, text: str) -> None:
    data = stores.make_data(tmp_path)
    (data.folder.path / manifests.FILE).write_text(text)
    assert not opening.store_is_whole(stage_of(data.folder))


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    data = stores.make_data(tmp_path)
    assert data.missing_shard() is None
    stores.file_of(data, 2).unlink()
    assert data.missing_shard() == data.manifest.shards[2].file
    with pytest.raises(UserError, match="missing shard"):
        read_split(data, "train")


def test_a_file_that_is_not_arrow_is_refused_in_one_line(tmp_path: Path) -> None:
    raw = b"ARROW1\0\0" + bytes(100) + b"ARROW1"  # right checksum, wrong content
    sha256 = hashlib.sha256(raw).hexdigest()
    (tmp_path / f"train-00000-{sha256[:16]}.arrow").write_bytes(raw)
    record = manifests.ShardRecord(
        split="train", index=0, file=f"train-00000-{sha256[:16]}.arrow", rows=1, first_id=0, last_id=0,
        bytes=len(raw), sha256=sha256,
    )  # fmt: skip
    with pytest.raises(UserError, match="is not an Arrow IPC file") as caught:
        shards.read(Folder.at(tmp_path), record, verify=True)
    assert "\n" not in str(caught.value)


def test_labels_of_other_data_are_refused_with_both_digests(tmp_path: Path) -> None:
    data, labels = stores.make_data(tmp_path), stores.make_labels(tmp_path, data_digest="0123" * 4)
    with pytest.raises(UserError, match=f"made from data {'0123' * 4}, the config's data is {stores.DATA_DIGEST}"):
        read_split(data, "train", labels)


def test_labels_that_do_not_fit_the_data_are_refused(tmp_path: Path) -> None:
    data, labels = stores.make_data(tmp_path), stores.make_labels(tmp_path)
    few = stores.commit_labels(labels.folder, [r for r in labels.manifest.shards if r.split != "test"])
    with pytest.raises(UserError, match="has the splits train, validation, the data has train, validation, test"):
        read_split(data, "test", few)
    other = stores.commit_labels(labels.folder, labels.manifest.shards, classes=4)
    with pytest.raises(UserError, match="has 4 classes, the data da7ada7ada7ada7a has 5"):
        read_split(data, "test", other)
    ids = np.arange(49, 57)
    moved = shards.write(labels.folder, "test", 0, stores.label_batch(ids), store=stores.LABELS_DIGEST)
    records = [moved if (r.split, r.index) == ("test", 0) else r for r in labels.manifest.shards]
    with pytest.raises(UserError, match=r"its row ids are not those of .*run distill-ray verify on both"):
        read_split(data, "test", stores.commit_labels(labels.folder, records))


def test_a_store_is_not_taken_for_the_other_kind(tmp_path: Path) -> None:
    data, labels = stores.make_data(tmp_path), stores.make_labels(tmp_path)
    with pytest.raises(UserError, match="is a label store, expected a data store"):
        read_split(labels, "train")
    with pytest.raises(UserError, match="is a data store, expected a label store"):
        read_split(data, "train", data)


# --- what a killed job leaves ---------------------------------------------------------------------------------------


def stage_of(folder: Folder, digest: str = stores.DATA_DIGEST) -> Stage:
    return Stage("data", digest, folder)


def plans() -> list[ShardPlan]:
    return [ShardPlan(split, index, int(ids[0]), len(ids)) for split, index, ids in stores.plan()]


def test_keep_finished_divides_whole_shards_from_the_rest(tmp_path: Path) -> None:
    data = stores.make_data(tmp_path)
    records = list(data.manifest.shards)
    stores.flip_byte(stores.file_of(data, 0))
    stores.file_of(data, 3).unlink()
    truncate(stores.file_of(data, 5))
    empty(stores.file_of(data, 6))
    kept, todo = keep_finished(stage_of(data.folder), plans())
    assert kept == [record for number, record in enumerate(records) if number not in (0, 3, 5, 6)]
    assert todo == [plans()[number] for number in (0, 3, 5, 6)]


def test_keep_finished_takes_no_shard_of_another_plan(tmp_path: Path) -> None:
    data = stores.make_data(tmp_path)
    shifted = [ShardPlan(plan.split, plan.index, plan.first_id + 1, plan.rows) for plan in plans()]
    assert keep_finished(stage_of(data.folder), shifted) == ([], shifted)
    assert keep_finished(stage_of(Folder.at(tmp_path / "nowhere")), plans()) == ([], plans())


def test_keep_finished_takes_no_shard_of_another_store(tmp_path: Path) -> None:
    """A whole shard with the right ids: only what it says of itself tells that it came from elsewhere."""
    data = stores.make_data(tmp_path)
    assert keep_finished(stage_of(data.folder, "0" * 16), plans()) == ([], plans())
    assert keep_finished(stage_of(data.folder), plans())[1] == []


def test_keep_finished_takes_no_label_shard_of_another_precision(tmp_path: Path) -> None:
    """Two machines may mean different things by ``auto``, and an object store has no lock to keep them apart."""
    labels = stores.make_labels(tmp_path)
    (labels.folder.path / manifests.FILE).unlink()
    assert keep_finished(stage_of(labels.folder, stores.LABELS_DIGEST), plans(), "fp32")[1] == []
    assert keep_finished(stage_of(labels.folder, stores.LABELS_DIGEST), plans(), "bf16") == ([], plans())


def test_nor_one_that_a_manifest_of_another_precision_names(tmp_path: Path) -> None:
    labels = stores.make_labels(tmp_path)
    assert keep_finished(stage_of(labels.folder, stores.LABELS_DIGEST), plans(), "bf16") == ([], plans())
    assert keep_finished(stage_of(labels.folder, stores.LABELS_DIGEST), plans(), "fp32")[1] == []


def test_a_store_that_lost_a_shard_goes_on_in_its_own_precision(tmp_path: Path) -> None:
    """Of two that began at once, one committed, the other wrote down its precision last; then a shard was lost."""
    labels = stores.make_labels(tmp_path)
    stage = Stage("labels", stores.LABELS_DIGEST, labels.folder)
    write_stage_config(stage, {}, {"precision": "bf16"})
    assert label.begun(stage) == {"precision": "fp32", "precision_check": {"rows": 8.0, "kl": 0.0}}
    (labels.folder.path / manifests.FILE).unlink()
    assert label.begun(stage) == {"precision": "bf16"}


def test_shards_that_were_left_without_a_record_say_their_precision(tmp_path: Path) -> None:
    labels = stores.make_labels(tmp_path)
    stage = Stage("labels", stores.LABELS_DIGEST, labels.folder)
    (labels.folder.path / manifests.FILE).unlink()
    labels.folder.write_bytes("test-00000-0123456789abcdef.arrow", b"no shard")
    assert label.begun(stage) == {"precision": "fp32"}
    assert label.begun(Stage("labels", "0" * 16, Folder.at(tmp_path / "nothing"))) == {}


def test_a_label_store_with_a_shard_of_another_precision_is_refused(tmp_path: Path) -> None:
    labels = stores.make_labels(tmp_path, precision="bf16")
    record = labels.manifest.shards[0]
    with pytest.raises(UserError, match=rf"{record.file}.* was made in fp32, the manifest says bf16"):
        labels.label_shard(record)


def test_keep_finished_takes_no_shard_whose_ids_are_shuffled(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    ids = np.array([0, 2, 1, 3, 4, 5, 6, 7])
    shards.write(folder, "train", 0, stores.data_batch(ids), store=stores.DATA_DIGEST)
    assert keep_finished(stage_of(folder), plans())[0] == []


def test_keep_finished_sweeps_only_old_temporaries(tmp_path: Path) -> None:
    old, young = tmp_path / ".tmp-old", tmp_path / ".tmp-young"
    for path in (old, young):
        path.write_bytes(b"half a shard")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    keep_finished(stage_of(Folder.at(tmp_path)), plans())
    assert not old.exists()
    assert young.exists()
    assert Folder.at(tmp_path).names() == []


def test_sweep_orphans_deletes_unnamed_shards_only(tmp_path: Path) -> None:
    data = stores.make_data(tmp_path)
    orphan = shards.write(data.folder, "train", 0, stores.data_batch(np.arange(8), seed=9), store=stores.DATA_DIGEST)
    data.folder.write_text("notes.txt", "the user's own")
    sweep_orphans(data.folder, data.manifest)
    named = [record.file for record in data.manifest.shards]
    assert data.folder.names() == sorted([*named, "manifest.json", "notes.txt"])
    assert orphan.file not in data.folder.names()


def test_the_manifest_example_in_format_md_is_read_by_the_code(tmp_path: Path) -> None:
    """The documentation's example is the format's: its keys are those that the code writes."""
    text = (Path(manifests.__file__).parent / "FORMAT.md").read_text()
    data, labels = (json.loads(part.split("```")[0]) for part in text.split("```json\n")[1:])
    assert list(data) == list(stores.make_data(tmp_path).folder.read_json(manifests.FILE))
    ours = stores.make_labels(tmp_path).folder.read_json(manifests.FILE)
    assert list(labels) == [key for key in ours if key not in data or key in ("kind", "dtype")]
    assert data["format_version"] == manifests.FORMAT_VERSION
    Folder.at(tmp_path / "example").write_json(manifests.FILE, data)
    assert open_store(str(tmp_path / "example")).manifest.classes == 62


# --- stores that are whole and wrong ----------------------------------------------------------------------------------


def with_first_shard(data: Store, batch: pa.RecordBatch, **changes: object) -> Store:
    """The store with another first shard, checksums and manifest to match."""
    written = shards.write(data.folder, "train", 0, batch, store=data.manifest.digest)
    records = [written.model_copy(update=changes), *data.manifest.shards[1:]]
    return stores.commit_data(data.folder, records)


def test_a_stored_minus_one_is_not_a_missing_label(tmp_path: Path) -> None:
    data = stores.make_data(tmp_path)
    batch = stores.data_batch(np.arange(8))
    labels = pa.array([-1, *range(5), 0, 1], type=pa.int64())
    batch = batch.set_column(batch.schema.get_field_index("label"), "label", labels)
    with pytest.raises(UserError, match=r"label -1 is out of range for 5 classes \(1 such rows\)"):
        read_split(with_first_shard(data, batch), "train")


def test_a_forged_range_of_ids_is_refused_without_making_it(tmp_path: Path) -> None:
    data = with_first_shard(stores.make_data(tmp_path), stores.data_batch(np.arange(8)), last_id=10**15)
    with pytest.raises(UserError, match="its row ids are not 0 to 1000000000000000, one by one"):
        read_split(data, "train")


def test_metadata_that_is_no_text_is_read_past(tmp_path: Path) -> None:
    data = stores.make_data(tmp_path)
    batch = stores.data_batch(np.arange(8))
    batch = batch.replace_schema_metadata({**batch.schema.metadata, b"\xff\xfe": b"\xff"})
    assert len(read_split(with_first_shard(data, batch), "train")) == stores.SPLITS["train"]


def test_labels_whose_split_claims_other_rows_are_refused(tmp_path: Path) -> None:
    data, labels = stores.make_data(tmp_path), stores.make_labels(tmp_path)
    splits = dict(labels.manifest.splits)
    splits["test"] = splits["test"].model_copy(update={"rows": 99})
    claimed = stores.commit_labels(labels.folder, list(labels.manifest.shards), splits=splits)
    with pytest.raises(UserError, match="split test has 99 rows, but its shards hold 12"):
        read_split(data, "test", claimed)


def test_read_shards_gives_the_rows_of_read_split(tmp_path: Path) -> None:
    data, labels = stores.make_data(tmp_path), stores.make_labels(tmp_path)
    parts, whole = list(read_shards(data, "train", labels)), read_split(data, "train", labels)
    assert [len(part) for part in parts] == [8, 8, 8, 8, 4]
    for name in ("row_ids", "inputs", "labels", "logits"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


# --- rival writers ----------------------------------------------------------------------------------------------------


def test_a_finished_store_that_lost_a_shard_keeps_the_others_also_of_version_1_0(tmp_path: Path) -> None:
    """Shards of 1.0 do not say whose they are; the manifest that names them does."""
    golden = Path(__file__).parent / "golden" / "store-1.0"
    place = Path(shutil.copytree(next(golden.glob("labels-*")), tmp_path / "labels"))
    store = open_store(str(place))
    records = list(store.manifest.shards)
    (place / records[1].file).unlink()
    plan = [ShardPlan(r.split, r.index, r.first_id, r.rows) for r in records]
    kept, todo = keep_finished(Stage("labels", store.manifest.digest, store.folder), plan)
    assert kept == [records[0], *records[2:]]
    assert todo == [plan[1]]
    assert keep_finished(Stage("labels", "0" * 16, store.folder), plan)[0] == []


def rival_store(folder: Folder, seed: int) -> DataManifest:
    """The shards of one of two writers whose content differs, and its manifest, not yet committed."""
    records = [
        shards.write(folder, split, index, stores.data_batch(ids, seed), store=stores.DATA_DIGEST)
        for split, index, ids in stores.plan()
    ]
    return stores.data_manifest(records)


def test_of_two_writers_the_first_commit_stands(tmp_path: Path) -> None:
    target = stage_of(Folder.at(tmp_path))
    one, two = rival_store(target.folder, 1), rival_store(target.folder, 2)
    assert commit(target, one) == one
    assert commit(target, two) == one  # the second finds it and leaves it be, without its own shards
    assert set(target.folder.names()) == {"manifest.json", *(record.file for record in one.shards)}


def test_two_commits_in_the_same_moment_lose_no_store_in_silence(tmp_path: Path) -> None:
    """Both have looked, both write their manifest, then both sweep: the one that stands keeps its shards."""
    target = stage_of(Folder.at(tmp_path))
    one, two = rival_store(target.folder, 1), rival_store(target.folder, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifests, "write", write_after(manifests.write, target.folder, two))
        standing = commit(target, one)
    assert standing == two
    assert open_store(target.folder).missing_shard() is None


def test_who_lost_its_shards_takes_none_of_the_others_away(tmp_path: Path) -> None:
    """The first has committed and swept between the second's look at its shards and its manifest."""
    target = stage_of(Folder.at(tmp_path))
    one, two = rival_store(target.folder, 1), rival_store(target.folder, 2)
    original = manifests.write

    def too_late(folder: Folder, manifest: DataManifest) -> None:
        original(folder, one)
        sweep_orphans(folder, one)
        original(folder, manifest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifests, "write", too_late)
        with pytest.raises(RunError, match="another run took it away while this one was at work"):
            commit(target, two)
    assert {record.file for record in one.shards} <= set(target.folder.names())
    commit(target, one)
    assert open_store(target.folder).missing_shard() is None


def test_a_mount_without_locks_is_swept_like_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    data = stores.make_data(tmp_path)
    orphans = [
        shards.write(data.folder, "train", 0, stores.data_batch(np.arange(8), seed=n), store=stores.DATA_DIGEST).file
        for n in (8, 9)
    ]
    os.utime(data.folder.path / orphans[0], (time.time() - 2 * 86_400,) * 2)
    monkeypatch.setattr(fcntl, "flock", flock)
    sweep_orphans(data.folder, data.manifest)
    assert orphans[0] not in data.folder.names()
    assert orphans[1] in data.folder.names()


def write_after(original: Callable[..., None], folder: Folder, other: DataManifest) -> Callable[..., None]:
    """``manifests.write``, at whose end another's manifest stands."""

    def write(target: Folder, manifest: DataManifest) -> None:
        original(target, manifest)
        original(folder, other)

    return write


def test_a_commit_whose_shards_were_swept_says_so(tmp_path: Path) -> None:
    target = stage_of(Folder.at(tmp_path))
    manifest = rival_store(target.folder, 1)
    target.folder.delete(manifest.shards[0].file)
    with pytest.raises(RunError, match="another run took it away while this one was at work"):
        commit(target, manifest)
    assert not target.folder.exists("manifest.json")
