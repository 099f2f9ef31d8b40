"""verify: every kind of damage is found, all of it is counted, and a sound store passes."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from distill_ray.console import Reporter
from distill_ray.errors import UserError
from distill_ray.storage import Folder
from distill_ray.store import Store, open_store, shards
from distill_ray.store import manifest as manifests
from distill_ray.store.verify import verify
from tests import stores

ROWS, SHARDS = sum(stores.SPLITS.values()), len(stores.plan())
QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stores, made once and copied for each test: the writer syncs every file to the disk."""
    artifacts = tmp_path_factory.mktemp("made")
    stores.make_data(artifacts)
    stores.make_labels(artifacts)
    return artifacts


def copied(made: Path, kind: str, tmp_path: Path) -> Store:
    found = next(made.glob(f"{kind}-*"))
    return open_store(str(shutil.copytree(found, tmp_path / "artifacts" / found.name)))


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Store:
    return copied(made, "data", tmp_path)


@pytest.fixture
def labels(made: Path, data: Store, tmp_path: Path) -> Store:
    return copied(made, "labels", tmp_path)


def fault_of(store: Store | Folder) -> str:
    with pytest.raises(UserError) as caught:
        verify(store.folder if isinstance(store, Store) else store, QUIET)
    message = str(caught.value)
    assert "\n" not in message
    return message


def swap(store: Store, number: int, batch: pa.RecordBatch) -> Store:
    """Replace a shard by one with other content, in the folder and in the manifest; its row range stays as it was."""
    records = list(store.manifest.shards)
    old = records[number]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    raw = sink.getvalue().to_pybytes()
    sha256 = hashlib.sha256(raw).hexdigest()
    name = f"{old.split}-{old.index:05d}-{sha256[:16]}.arrow"
    (store.folder.path / name).write_bytes(raw)
    records[number] = old.model_copy(update={"file": name, "sha256": sha256, "bytes": len(raw)})
    commit = stores.commit_data if store.manifest.kind == "data" else stores.commit_labels
    return commit(store.folder, records)


def edit(store: Store, change: Callable[[dict[str, Any]], None]) -> None:
    raw = store.folder.read_json(manifests.FILE)
    change(raw)
    store.folder.write_json(manifests.FILE, raw)


# --- sound stores ---------------------------------------------------------------------------------------------------


def test_a_sound_data_store(data: Store) -> None:
    answer = verify(data.folder, QUIET)
    assert json.loads(json.dumps(answer)) == answer
    assert answer | {"bytes": 0} == {
        "folder": str(data.folder), "kind": "data", "digest": stores.DATA_DIGEST, "rows": ROWS, "splits":
        stores.SPLITS, "shards": SHARDS, "bytes": 0, "classes": stores.CLASSES, "missing": 0, "double": 0, "orphans": 0,
        "unlabelled": 0,
    }  # fmt: skip
    assert answer["bytes"] == sum(path.stat().st_size for path in data.folder.path.glob("*.arrow"))


def test_rows_without_a_label_and_orphans_are_counted_but_no_fault(data: Store) -> None:
    ids = np.arange(8, dtype=np.int64)
    batch = shards.encode_data(ids, np.zeros((8, *stores.SHAPE), np.uint8), np.array([0, -1, 1, -1, 2, 3, 4, -1]), ids)
    answer = verify(swap(data, 0, batch).folder, QUIET)
    assert (answer["unlabelled"], answer["orphans"]) == (3, 1)


@pytest.mark.parametrize(("wrong", "accuracy"), [(0, 1.0), (2, 0.5), (4, 0.75)])
def test_a_sound_label_store_gives_the_teachers_accuracy(data: Store, wrong: int, accuracy: float) -> None:
    labels = stores.make_labels(data.folder.path.parent, digest="12" * 8, wrong=wrong)
    answer = verify(labels.folder, QUIET)
    assert json.loads(json.dumps(answer)) == answer
    assert (answer["kind"], answer["rows"], answer["missing"], answer["double"]) == ("labels", ROWS, 0, 0)
    assert (answer["data"], answer["teacher"], answer["summary_accuracy"]) == (str(data.folder), None, None)
    assert answer["accuracy"] == accuracy


def test_a_label_store_alone_is_checked_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = verify(stores.make_labels(tmp_path).folder, Reporter())
    assert (answer["data"], answer["accuracy"], answer["shards"]) == (None, None, SHARDS)
    assert "its row ids were not compared" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("summary", "warning"),
    [
        ({"accuracy": 0.51, "weights_sha256": stores.WEIGHTS}, None),
        ({"accuracy": 0.6, "weights_sha256": stores.WEIGHTS}, None),  # of 12 test rows one may fall either way
        ({"accuracy": 0.9, "weights_sha256": "cd" * 32}, "holds other weights"),
    ],
)
def test_the_accuracy_is_compared_with_the_teachers_summary(
    data: Store, capsys: pytest.CaptureFixture[str], summary: dict[str, Any], warning: str | None
) -> None:
    labels = stores.make_labels(data.folder.path.parent, wrong=2)
    teacher = Folder.at(data.folder.path.parent / f"teacher-{stores.TEACHER_DIGEST}")
    teacher.write_json("summary.json", summary)
    answer = verify(labels.folder, QUIET)
    assert (answer["accuracy"], answer["summary_accuracy"]) == (0.5, summary["accuracy"])
    assert answer["teacher"] == str(teacher)
    said = capsys.readouterr().err
    assert (warning in said) if warning else said == ""


def test_an_accuracy_that_is_not_the_teachers_is_a_fault(data: Store) -> None:
    labels = stores.make_labels(data.folder.path.parent, wrong=2)
    teacher = Folder.at(data.folder.path.parent / f"teacher-{stores.TEACHER_DIGEST}")
    teacher.write_json("summary.json", {"accuracy": 0.9, "weights_sha256": stores.WEIGHTS})
    with pytest.raises(UserError, match=r"score 0.5000 on the test split, the teacher's summary.json says 0.9000"):
        verify(labels.folder, QUIET)


def test_a_damaged_summary_is_not_taken_for_none(data: Store, labels: Store) -> None:
    teacher = Folder.at(data.folder.path.parent / f"teacher-{stores.TEACHER_DIGEST}")
    teacher.write_text("summary.json", "{")
    with pytest.raises(UserError, match=r"summary.json: is damaged"):
        verify(labels.folder, QUIET)


# --- damaged files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(SHARDS))
@pytest.mark.parametrize("kind", ["data", "labels"])
def test_a_flipped_byte_in_any_shard_is_found(data: Store, labels: Store, kind: str, number: int) -> None:
    store = data if kind == "data" else labels
    stores.flip_byte(stores.file_of(store, number), -1 - number * 3)
    message = fault_of(store)
    rows = store.manifest.shards[number].rows
    assert message.startswith(f"{store.folder}: 1 fault ({rows} rows missing, 0 double); first: ")
    assert f"{stores.file_of(store, number)}: damaged shard" in message


def test_all_faults_are_collected_and_the_first_is_named(data: Store, capsys: pytest.CaptureFixture[str]) -> None:
    stores.flip_byte(stores.file_of(data, 1))
    stores.file_of(data, 4).unlink()
    path = stores.file_of(data, 6)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"3 faults \(16 rows missing, 0 double\); first: .*damaged shard") as caught:
        verify(data.folder, Reporter())
    assert data.manifest.shards[1].file in str(caught.value)
    told = capsys.readouterr().err
    assert f"{data.manifest.shards[4].file}: missing shard" in told
    assert f"{data.manifest.shards[6].file}: damaged shard" in told


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_truncated_shard_is_found(data: Store, kept: int) -> None:
    path = stores.file_of(data)
    path.write_bytes(path.read_bytes()[:kept])
    assert f"1 fault (8 rows missing, 0 double); first: {path}: damaged shard" in fault_of(data)


def test_bytes_past_the_end_are_found(data: Store) -> None:
    path = stores.file_of(data)
    path.write_bytes(path.read_bytes() + b"\0")
    assert f"{path}: damaged shard" in fault_of(data)


def test_a_deleted_shard_is_found(labels: Store) -> None:
    stores.file_of(labels, 8).unlink()
    assert f"1 fault (4 rows missing, 0 double); first: {stores.file_of(labels, 8)}: missing shard" in fault_of(labels)


# --- right checksums, wrong content ---------------------------------------------------------------------------------


def test_a_foreign_shard_under_our_name_is_found(data: Store) -> None:
    foreign = stores.make_data(data.folder.path.parent, digest="f0" * 8, seed=5)
    stores.file_of(data, 2).write_bytes(stores.file_of(foreign, 2).read_bytes())
    assert f"{stores.file_of(data, 2)}: damaged shard" in fault_of(data)


def test_a_foreign_shard_under_its_own_name_is_found(data: Store) -> None:
    store = swap(data, 1, stores.data_batch(np.arange(16, 24)))  # rows of shard 2 a second time
    message = fault_of(store)
    assert "2 faults (8 rows missing, 8 double)" in message
    assert "its row ids are not 8 to 15, one by one" in message


def test_a_label_shard_of_other_rows_is_no_twin(data: Store, labels: Store) -> None:
    ids = np.arange(15, 7, -1, dtype=np.int64)  # the right rows in another order
    message = fault_of(swap(labels, 1, stores.label_batch(ids)))
    assert "2 faults; first: " in message
    assert "its row ids are not 8 to 15, one by one" in message


def test_duplicate_ids_are_counted(data: Store) -> None:
    ids = np.array([0, 1, 1, 3, 4, 4, 6, 7])
    message = fault_of(swap(data, 0, stores.data_batch(ids)))
    assert "(2 rows missing, 2 double)" in message
    assert "its row ids are not 0 to 7, one by one" in message


def test_ids_outside_the_store_are_found(data: Store, capsys: pytest.CaptureFixture[str]) -> None:
    ids = np.array([0, 1, 2, 3, 4, 5, 6, ROWS])
    store = swap(data, 0, stores.data_batch(ids))
    with pytest.raises(UserError, match="1 rows missing, 0 double"):
        verify(store.folder, Reporter())
    assert f"the row ids are not 0 to {ROWS - 1}, each once: 1 missing, 0 double, 1 outside" in capsys.readouterr().err


def test_a_shard_with_fewer_rows_than_the_manifest_says_is_found(labels: Store) -> None:
    ids = np.arange(6)
    message = fault_of(swap(labels, 0, stores.label_batch(ids)))
    assert "holds 6 rows, the manifest says 8" in message


def test_a_label_out_of_range_is_found(data: Store) -> None:
    ids = np.arange(8)
    batch = shards.encode_data(ids, np.zeros((8, *stores.SHAPE), np.uint8), np.array([0, 1, 5, 3, 4, 7, 0, 0]), ids)
    assert "label 5 is out of range for 5 classes (2 such rows)" in fault_of(swap(data, 0, batch))


def test_a_negative_label_is_found(data: Store) -> None:
    batch = stores.data_batch(np.arange(8))
    batch = batch.set_column(3, "label", pa.array([-1, *range(5), 0, 0], type=pa.int64()))
    assert "label -1 is out of range" in fault_of(swap(data, 0, batch))


def logits_batch(values: Any, kind: Any = np.float16) -> pa.RecordBatch:
    stored = np.asarray(values, dtype=kind)
    column = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), stored.shape[1])
    return pa.record_batch({"row_id": pa.array(np.arange(8)), "logits": column})


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((3, 2), np.nan, "row 3 has a logit that is not finite (1 such rows)"),
        ((5, 4), -np.inf, "row 5 has a logit that is not finite"),
        ((2, 1), 0.5, "the largest logit of row 2 is not 0"),
        ((4, slice(None)), -1.0, "the largest logit of row 4 is not 0"),
    ],
)
def test_logits_that_break_the_rules_are_found(labels: Store, place: Any, value: float, message: str) -> None:
    values = np.zeros((8, stores.CLASSES))
    values[place] = value
    assert message in fault_of(swap(labels, 0, logits_batch(values)))


def without(name: str) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    return lambda batch: batch.select([column for column in batch.schema.names if column != name])


def with_column(name: str, column: pa.Array) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    return lambda batch: batch.set_column(batch.schema.names.index(name), name, column)


WIDTH = int(np.prod(stores.SHAPE))
NULL_INSIDE = pa.array([None, *[0] * (8 * WIDTH - 1)], type=pa.uint8())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("label"), "has 0 columns 'label' instead of one"),
        (without("row_id"), "has 0 columns 'row_id' instead of one"),
        (lambda batch: batch.append_column("label", batch.column("label")), "has 2 columns 'label' instead of one"),
        (with_column("label", pa.array(range(8), type=pa.int32())), "column 'label' is int32, expected int64"),
        (with_column("row_id", pa.array([None, *range(1, 8)], type=pa.int64())), "column 'row_id' holds nulls"),
        (
            with_column("input", pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(8 * WIDTH, np.int32)), WIDTH)),
            "column 'input' is fixed_size_list<item: int32>[16], expected fixed_size_list<item: uint8>[16]",
        ),
        (
            with_column("input", pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(32, np.uint8)), 4)),
            "column 'input' is fixed_size_list<item: uint8>[4]",
        ),
        (with_column("input", pa.FixedSizeListArray.from_arrays(NULL_INSIDE, WIDTH)), "column 'input' holds nulls"),
        (lambda batch: batch.replace_schema_metadata({"shape": "4,4"}), "has shape 4,4, the manifest 1,4,4"),
        (lambda batch: batch.replace_schema_metadata(None), "its metadata has shape none"),
    ],
)  # fmt: skip
def test_a_data_shard_with_other_columns_is_found(
    data: Store, change: Callable[[pa.RecordBatch], pa.RecordBatch], message: str
) -> None:
    batch = change(stores.data_batch(np.arange(8)))
    assert message in fault_of(swap(data, 0, batch))


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (np.zeros((8, 5)), np.float32, "column 'logits' is fixed_size_list<item: float>[5]"),
        (np.zeros((8, 4)), np.float16, "column 'logits' is fixed_size_list<item: halffloat>[4]"),
    ],
)
def test_a_label_shard_with_other_columns_is_found(labels: Store, values: Any, kind: Any, message: str) -> None:
    assert message in fault_of(swap(labels, 0, logits_batch(values, kind)))


def test_a_column_of_a_newer_minor_version_is_no_fault(data: Store) -> None:
    batch = stores.data_batch(np.arange(8)).append_column("weight", pa.array(np.ones(8)))
    assert verify(swap(data, 0, batch).folder, QUIET)["rows"] == ROWS


# --- the manifest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["splits"]["train"].update(rows=40), "split train has 40 rows, but its shards hold 36"),
        (lambda raw: raw["splits"]["train"]["shards"].pop(), "split train has 36 rows, but its shards hold 32"),
        (lambda raw: raw["splits"]["train"]["shards"].reverse(), "stands as shard 0 of split train"),
        (lambda raw: raw["splits"]["train"]["shards"][0].update(index=1), "stands as shard 0 of split train"),
        (lambda raw: raw["splits"].update(dev=raw["splits"].pop("test")), "stands as shard 0 of split dev"),
        (lambda raw: raw["splits"]["train"]["shards"][1].update(sha256="0" * 64), "should be called train-00001-0000"),
        (lambda raw: raw["splits"]["train"]["shards"][1].update(first_id=9), "its row ids are not 9 to 15"),
        (lambda raw: raw["class_names"].pop(), "names 4 classes of 5"),
        (lambda raw: raw.update(dtype="float64"), "dtype 'float64' is none of uint8"),
        (lambda raw: raw.update(shape=[4, 4]), "its metadata has shape 1,4,4, the manifest 4,4"),
        (lambda raw: raw.update(classes=3, class_names=["a", "b", "c"]), "is out of range for 3 classes"),
        (lambda raw: raw.update(format_version="2.0"), "has format version '2.0'"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_wrong_is_found(data: Store, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit(data, change)
    assert message in fault_of(data)


def test_a_double_entry_counts_its_rows_double(data: Store) -> None:
    def repeat(raw: dict[str, Any]) -> None:
        train = raw["splits"]["train"]
        train["shards"].append(train["shards"][0])
        train["rows"] += 8

    edit(data, repeat)
    assert "(8 rows missing, 8 double)" in fault_of(data)


def test_labels_that_miss_a_shard_of_the_data_are_found(labels: Store) -> None:
    few = [record for record in labels.manifest.shards if (record.split, record.index) != ("test", 1)]
    message = fault_of(stores.commit_labels(labels.folder, few))
    assert "1 fault; first: " in message
    assert "shard 1 of split test has no labels" in message


def test_labels_for_a_shard_that_the_data_lacks_are_found(data: Store, labels: Store) -> None:
    few = [record for record in data.manifest.shards if (record.split, record.index) != ("test", 1)]
    stores.commit_data(data.folder, few)
    assert f"{data.folder.name} has no shard 1 of split test" in fault_of(labels)


def test_labels_beside_a_data_folder_of_another_digest_are_found(data: Store, labels: Store) -> None:
    edit(data, lambda raw: raw.update(digest="0" * 16))
    assert f"was made from data {stores.DATA_DIGEST}, the config's data is {'0' * 16}" in fault_of(labels)


def test_labels_whose_data_shard_is_gone_are_told_where_to_look(data: Store, labels: Store) -> None:
    stores.file_of(data, 2).unlink()
    message = fault_of(labels)
    assert f"{stores.file_of(data, 2)}: cannot be read: run verify on {data.folder}" in message


# --- no store at all ------------------------------------------------------------------------------------------------


def test_what_is_no_store_is_told_in_one_line(data: Store, tmp_path: Path) -> None:
    assert "nowhere: no such folder" in fault_of(Folder.at(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "empty: holds no files" in fault_of(Folder.at(tmp_path / "empty"))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "notes.txt").write_text("x")
    assert "plain: is not a store: it has no manifest.json" in fault_of(Folder.at(tmp_path / "plain"))
    assert "notes.txt: is a file, not the folder of a store" in fault_of(Folder.at(tmp_path / "plain" / "notes.txt"))
    data.folder.delete(manifests.FILE)
    assert "has shards but no manifest.json: unfinished" in fault_of(data)
    assert "foo://bucket/data: cannot be read" in fault_of(Folder.at("foo://bucket/data"))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.999])
def test_a_manifest_cut_anywhere_is_told_in_one_line(data: Store, share: float) -> None:
    raw = data.folder.read_bytes(manifests.FILE).rstrip()
    data.folder.write_bytes(manifests.FILE, raw[: int(share * len(raw))])
    message = fault_of(data)
    assert message.startswith(f"{data.folder}/manifest.json: cannot be read as JSON")


def test_any_uri_that_arrow_takes_will_do(labels: Store) -> None:
    answer = verify(Folder(f"file://{labels.folder.path}"), QUIET)
    assert answer["accuracy"] == 1.0
    assert answer["data"] == f"file://{labels.folder.path.parent}/data-{stores.DATA_DIGEST}"


# --- the command ----------------------------------------------------------------------------------------------------


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-W", "error", "-m", "distill_ray.cli", "verify", *arguments]
    return subprocess.run(call, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_passes_a_sound_store(labels: Store) -> None:
    done = command(labels.folder.name, "--json", "--quiet", cwd=labels.folder.path.parent)
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer.pop("replay") is None  # there is no teacher beside it
    assert answer == verify(labels.folder, QUIET)

    plain = command(".", cwd=labels.folder.path)
    assert plain.returncode == 0
    told = f"{ROWS} rows in {SHARDS} shards, teacher accuracy 1.0000, no row run through the teacher again"
    assert f"{told}: no fault found" in plain.stdout
    assert f"verify: {SHARDS}/{SHARDS}" in plain.stderr  # the bar, as plain lines


@pytest.mark.parametrize("case", ["flipped", "cut", "nowhere"])
def test_the_command_fails_with_2_and_one_line(data: Store, case: str) -> None:
    target = str(data.folder)
    if case == "flipped":
        stores.flip_byte(stores.file_of(data))
        stores.flip_byte(stores.file_of(data, 1))
    elif case == "cut":
        (data.folder.path / manifests.FILE).write_text("{")
    else:
        target += "-nowhere"
    done = command(target, "--json", "--quiet", cwd=data.folder.path)
    assert done.returncode == 2
    answer = json.loads(done.stdout)  # one object and nothing else
    assert answer["exit_code"] == 2
    assert done.stderr == f"distill-ray: {answer['error']}\n"
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("distill-ray: ")
    assert target in done.stderr


def test_verify_needs_neither_torch_nor_ray(data: Store) -> None:
    code = (
        "import sys; from distill_ray.console import Reporter; from distill_ray.storage import Folder; "
        "from distill_ray.store.verify import verify; verify(Folder.at(sys.argv[1]), Reporter(quiet=True)); "
        "print([name for name in ('torch', 'ray') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(data.folder)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_fixtures_are_stores_that_the_reader_takes(data: Store, labels: Store) -> None:
    assert open_store(str(data.folder)).manifest.rows == open_store(str(labels.folder)).manifest.rows == ROWS
