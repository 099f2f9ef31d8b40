"""FORMAT.md holds: a reader made from it reads our stores, its snippets run, stores of each version stay readable.

The golden stores under golden/ were written once, one pair a version, see golden/make.py. They hold the same rows,
which stand here as literals.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from distill_ray import replay, storage
from distill_ray.config import ClusterConfig
from distill_ray.console import Reporter
from distill_ray.errors import UserError
from distill_ray.stages import shard_job
from distill_ray.storage import Folder
from distill_ray.store import manifest as manifests
from distill_ray.store import open_store, read_split, shards
from distill_ray.store.verify import verify
from tests.conftest import SmallRun
from tests.golden import make
from tests.harness import only

VERSIONS = ("1.0", "1.1", "1.2")
PAGE = (Path(manifests.__file__).parent / "FORMAT.md").read_text()
SPLITS = ("train", "validation", "test")
QUIET = Reporter(quiet=True)


class Rows(NamedTuple):
    """A split as some reader has it: inputs [N, *shape], None where a row has no label, logits float16 [N, C]."""

    ids: list[int]
    inputs: npt.NDArray[Any]
    labels: list[int | None]
    logits: npt.NDArray[np.float16]


class Stores(NamedTuple):
    """The folders of a data store and of its label store."""

    data: Path
    labels: Path


def stores_in(folder: Path) -> Stores:
    return Stores(only(folder, "data-*"), only(folder, "labels-*"))


def golden_of(version: str) -> Stores:
    return stores_in(Path(__file__).parent / "golden" / f"store-{version}")


# row id, input, label, logits as stored. Every logit is a float16 number, written out exactly.
EXPECTED: dict[str, list[tuple[int, list[int], int | None, list[float]]]] = {
    "train": [
        (0, [0, 64, 128, 255], 1, [-2.0, 0.0, -3.0]),
        (1, [255, 254, 253, 252], None, [0.0, -0.0999755859375, -2.0]),
        (2, [1, 2, 3, 4], 0, [0.0, -65504.0, -1.1920928955078125e-07]),
        (3, [0, 0, 0, 0], 2, [0.0, 0.0, 0.0]),
        (4, [9, 8, 7, 6], 2, [-0.5, -1.75, 0.0]),
    ],
    "validation": [
        (5, [16, 32, 48, 64], 0, [0.0, -10000.0, -20000.0]),
        (6, [200, 100, 50, 25], 1, [-0.60009765625, 0.0, -0.5]),
    ],
    "test": [
        (7, [255, 0, 255, 0], 2, [-4.0, -5.0, 0.0]),
        (8, [0, 255, 0, 255], None, [-2.0, -1.0, 0.0]),
        (9, [127, 128, 129, 130], 1, [0.0, 0.0, -12.0]),
    ],
}


def expected(split: str) -> Rows:
    ids, inputs, labels, logits = zip(*EXPECTED[split], strict=True)
    return Rows(
        list(ids), np.array(inputs, dtype=np.uint8).reshape(-1, 1, 2, 2), list(labels), np.array(logits, np.float16)
    )


def assert_same(found: Rows, wanted: Rows) -> None:
    """The same to the bit."""
    assert found.ids == wanted.ids
    assert found.labels == wanted.labels
    for ours, theirs in ((found.inputs, wanted.inputs), (found.logits, wanted.logits)):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.tobytes() == theirs.tobytes()


def read_by_our_code(stores: Stores, split: str) -> Rows:
    found = read_split(open_store(str(stores.data)), split, open_store(str(stores.labels)))
    assert found.logits is not None
    labels = [None if label == -1 else label for label in found.labels.tolist()]
    return Rows(found.row_ids.tolist(), found.inputs, labels, found.logits)


# --- a reader written from the page alone: nothing of ours in it -----------------------------------------------------


def read_by_the_page(stores: Stores, split: str) -> Rows:
    """One split, joined. Raises ValueError for what FORMAT.md says that a reader refuses."""
    data, labels = manifest_by_the_page(stores.data, "data"), manifest_by_the_page(stores.labels, "labels")
    if labels["data_digest"] != data["digest"]:
        raise ValueError(f"labels of {labels['data_digest']}, not of {data['digest']}")
    if labels["classes"] != data["classes"] or labels["class_names"] != data["class_names"]:
        raise ValueError("classes differ")
    if shards_by_split(labels) != shards_by_split(data):
        raise ValueError("splits differ")
    ids: list[int] = []
    known: list[int | None] = []
    inputs, logits = [], []
    for record, twin in zip(data["splits"][split]["shards"], labels["splits"][split]["shards"], strict=True):
        batch, twins = shard_by_the_page(stores.data, data, record), shard_by_the_page(stores.labels, labels, twin)
        if batch["row_id"].to_pylist() != twins["row_id"].to_pylist():
            raise ValueError("row ids differ")
        ids += batch["row_id"].to_pylist()
        known += batch["label"].to_pylist()
        inputs.append(batch["input"].flatten().to_numpy().reshape(-1, *data["shape"]))
        logits.append(twins["logits"].flatten().to_numpy().reshape(-1, labels["classes"]))
    if not len(ids) == data["splits"][split]["rows"] == labels["splits"][split]["rows"]:
        raise ValueError(f"split {split} has {len(ids)} rows")
    return Rows(ids, np.concatenate(inputs), known, np.concatenate(logits))


def shards_by_split(manifest: dict[str, Any]) -> dict[str, int]:
    return {name: len(split["shards"]) for name, split in manifest["splits"].items()}


def manifest_by_the_page(folder: Path, kind: str) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    major = int(manifest["format_version"].split(".")[0])
    if manifest["format"] != "distill_ray.store" or major > 1:
        raise ValueError(f"{manifest['format']}, format version {manifest['format_version']}")
    if manifest["kind"] != kind or (kind == "labels" and (manifest["dtype"], manifest["views"]) != ("float16", 1)):
        raise ValueError(f"another kind than {kind}")
    (name,) = re.findall(r"As a regular expression: `(.+)`\.\n", PAGE)
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            if not re.fullmatch(name, shard["file"]):
                raise ValueError(f"{shard['file']} is not a shard's name")
    return manifest


def shard_by_the_page(folder: Path, manifest: dict[str, Any], record: dict[str, Any]) -> pa.RecordBatch:
    raw = (folder / record["file"]).read_bytes()
    if len(raw) != record["bytes"] or hashlib.sha256(raw).hexdigest() != record["sha256"]:
        raise ValueError(f"{record['file']} is damaged")
    reader = pa.ipc.open_file(raw)
    if reader.num_record_batches != 1:
        raise ValueError(f"{reader.num_record_batches} batches")
    batch = reader.get_batch(0)
    metadata = {key.decode(): value.decode() for key, value in (batch.schema.metadata or {}).items()}
    if metadata.get("store", manifest["digest"]) != manifest["digest"]:
        raise ValueError(f"a shard of {metadata['store']} in {manifest['digest']}")
    if manifest["kind"] == "data" and metadata["shape"] != ",".join(map(str, manifest["shape"])):
        raise ValueError(f"shape {metadata['shape']}")
    check_columns_by_the_page(batch, manifest)
    ids = batch["row_id"].to_pylist()
    if len(ids) != record["rows"] or ids != list(range(record["first_id"], record["last_id"] + 1)):
        raise ValueError(f"row ids {ids}")
    if manifest["kind"] == "data" and any(
        not 0 <= n < manifest["classes"] for n in batch["label"].drop_null().tolist()
    ):
        raise ValueError("label out of range")
    return batch


def check_columns_by_the_page(batch: pa.RecordBatch, manifest: dict[str, Any]) -> None:
    types = {"uint8": pa.uint8(), "int32": pa.int32(), "float16": pa.float16(), "float32": pa.float32()}
    element = types[manifest["dtype"]]
    if manifest["kind"] == "data":
        wanted = {"row_id": pa.int64(), "input": (element, int(np.prod(manifest["shape"]))), "label": pa.int64()}
    else:
        wanted = {"row_id": pa.int64(), "logits": (element, manifest["classes"])}
    for name, kind in wanted.items():
        if batch.schema.names.count(name) != 1:
            raise ValueError(f"{batch.schema.names.count(name)} columns {name}")
        column = batch[name]
        listed = pa.types.is_fixed_size_list(column.type)
        if ((column.type.value_type, column.type.list_size) if listed else column.type) != kind:
            raise ValueError(f"column {name} is {column.type}")
        if name != "label" and (column.null_count or (listed and column.flatten().null_count)):
            raise ValueError(f"nulls in {name}")


# --- the golden stores -----------------------------------------------------------------------------------------------


@pytest.fixture
def golden() -> Stores:
    """Of the present version."""
    return golden_of(VERSIONS[-1])


@pytest.fixture
def own_golden(golden: Stores, tmp_path: Path) -> Stores:
    """Copies that a test may change."""
    return Stores(*(Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in golden))


def test_the_newest_golden_stores_and_the_page_are_of_the_present_version() -> None:
    assert VERSIONS[-1] == manifests.FORMAT_VERSION
    assert PAGE.startswith(f"# The store format, version {manifests.FORMAT_VERSION}\n")
    for version in VERSIONS:
        for folder in golden_of(version):
            assert json.loads((folder / "manifest.json").read_text())["format_version"] == version


@pytest.mark.parametrize("read", [read_by_our_code, read_by_the_page])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("version", VERSIONS)
def test_golden_stores_give_the_expected_rows(version: str, split: str, read: Callable[[Stores, str], Rows]) -> None:
    assert_same(read(golden_of(version), split), expected(split))


@pytest.mark.parametrize("version", VERSIONS)
def test_verify_finds_no_fault_in_the_golden_stores(version: str) -> None:
    golden = golden_of(version)
    data, labels = (verify(Folder.at(folder), QUIET) for folder in golden)
    assert (data["rows"], data["shards"], data["unlabelled"], data["orphans"]) == (10, 4, 2, 0)
    assert (labels["rows"], labels["shards"], labels["accuracy"], labels["orphans"]) == (10, 4, 0.5, 0)
    assert labels["data"] == str(golden.data)  # it compared the two


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_folders_hold_nothing_else_and_are_small(version: str) -> None:
    golden = golden_of(version)
    named = {folder / record["file"] for folder in golden for record in records(folder)}
    files = {path for path in golden.data.parent.rglob("*") if path.is_file()}
    assert files == named | {folder / "manifest.json" for folder in golden}
    assert sum(path.stat().st_size for path in files) < 60_000


def records(folder: Path) -> list[dict[str, Any]]:
    """What a manifest says of its shards."""
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    return [shard for split in splits.values() for shard in split["shards"]]


def only_batch(path: Path) -> pa.RecordBatch:
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        assert reader.num_record_batches == 1
        return reader.get_batch(0)


def test_the_present_writer_writes_what_the_newest_version_wrote(golden: Stores, tmp_path: Path) -> None:
    """The same columns, types, metadata and values. The bytes around them are pyarrow's and may change with it."""
    for old, new in zip(golden, make.make(tmp_path), strict=True):
        for was, now in zip(records(old), records(new), strict=True):
            before, after = only_batch(old / was["file"]), only_batch(new / now["file"])
            assert after.schema.equals(before.schema, check_metadata=True)
            assert after.equals(before)
        assert without_bytes(new) == without_bytes(old)


def test_version_1_1_added_the_store_to_each_shard_and_nothing_else() -> None:
    for old, new in zip(golden_of("1.0"), golden_of("1.1"), strict=True):
        manifest = without_bytes(new)
        for was, now in zip(records(old), records(new), strict=True):
            before, after = only_batch(old / was["file"]), only_batch(new / now["file"])
            assert after.equals(before)
            added = {b"store": manifest["digest"].encode()}
            assert after.schema.metadata == (before.schema.metadata or {}) | added
            assert b"store" not in (before.schema.metadata or {})
        assert manifest == without_bytes(old) | {"format_version": "1.1"}


def test_version_1_2_added_the_precision_to_each_label_shard_and_nothing_else() -> None:
    for old, new in zip(golden_of("1.1"), golden_of("1.2"), strict=True):
        manifest = without_bytes(new)
        for was, now in zip(records(old), records(new), strict=True):
            before, after = only_batch(old / was["file"]), only_batch(new / now["file"])
            assert after.equals(before)
            added = {b"precision": b"fp32"} if manifest["kind"] == "labels" else {}
            assert after.schema.metadata == before.schema.metadata | added
            assert b"precision" not in before.schema.metadata
        assert manifest == without_bytes(old) | {"format_version": "1.2"}


@pytest.mark.parametrize(("version", "kept"), [("1.1", False), ("1.2", True)])
def test_an_unfinished_label_store_keeps_shards_of_its_own_precision_from_version_1_2_on(
    version: str, kept: bool
) -> None:
    labels = golden_of(version).labels
    digest = json.loads((labels / "manifest.json").read_text())["digest"]
    for record in records(labels):
        found = shards.recover(Folder.at(labels), record["file"], store=digest, precision="fp32")
        assert (found is not None and found.model_dump() == record) == kept
        assert shards.recover(Folder.at(labels), record["file"], store=digest, precision="bf16") is None


@pytest.mark.parametrize(("version", "kept"), [("1.0", False), ("1.1", True), ("1.2", True)])
def test_an_unfinished_store_keeps_its_shards_from_version_1_1_on(version: str, kept: bool) -> None:
    for folder in golden_of(version):
        digest = json.loads((folder / "manifest.json").read_text())["digest"]
        for record in records(folder):
            found = shards.recover(Folder.at(folder), record["file"], store=digest)
            assert (found is not None and found.model_dump() == record) == kept
            assert shards.recover(Folder.at(folder), record["file"], store="0123" * 4) is None


def without_bytes(folder: Path) -> dict[str, Any]:
    """The manifest, less what depends on the bytes of the files."""
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            del shard["file"], shard["bytes"], shard["sha256"]
    return manifest


def test_columns_are_used_in_place(tmp_path: Path) -> None:
    """Every buffer lies inside the mapped file: nothing is compressed, nothing is copied."""
    for folder in make.make(tmp_path):
        for record in records(folder):
            with pa.memory_map(str(folder / record["file"])) as file:
                mapped = file.read_buffer()
            batch = pa.ipc.open_file(mapped).get_batch(0)
            for buffer in (buffer for column in batch.columns for buffer in column.buffers() if buffer is not None):
                assert mapped.address <= buffer.address < mapped.address + mapped.size


# --- versions and refusals: test_store.py has those of the data manifest ---------------------------------------------


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


Edit = Callable[[pa.Table], pa.Table]


def rewrite(folder: Path, shard: dict[str, Any], edit: Edit) -> None:
    """Write a shard again, changed, and enter what came out in its record: name, size and checksum are right."""
    table = edit(pa.Table.from_batches([only_batch(folder / shard["file"])]))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    raw = sink.getvalue().to_pybytes()
    sha256 = hashlib.sha256(raw).hexdigest()
    name = f"{shard['split']}-{shard['index']:05d}-{sha256[:16]}.arrow"
    (folder / name).write_bytes(raw)
    shard.update(file=name, bytes=len(raw), sha256=sha256)


def add_a_column(table: pa.Table) -> pa.Table:
    return table.add_column(0, "of_tomorrow", pa.array([f"new {row}" for row in range(table.num_rows)]))


@pytest.mark.parametrize("read", [read_by_our_code, read_by_the_page])
def test_columns_and_keys_of_a_newer_minor_version_are_ignored(
    own_golden: Stores, read: Callable[[Stores, str], Rows]
) -> None:
    for folder in own_golden:

        def renew(manifest: dict[str, Any], folder: Path = folder) -> None:
            manifest.update(format_version="1.7", a_key_of_tomorrow={"x": 1})
            for split in manifest["splits"].values():
                split["a_key_of_tomorrow"] = []
                for shard in split["shards"]:
                    rewrite(folder, shard, add_a_column)
                    shard["a_key_of_tomorrow"] = 1

        change(folder, renew)
    for split in SPLITS:
        assert_same(read(own_golden, split), expected(split))
    for folder in own_golden:
        assert verify(Folder.at(folder), QUIET)["rows"] == 10


def edit_shard(**changes: Any) -> Callable[[dict[str, Any]], object]:
    """An edit of what a manifest says of the test split's shard."""
    return lambda manifest: manifest["splits"]["test"]["shards"][0].update(changes)


# An edit of the label store's manifest; what our code says of it, what the reader above says.
REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str, str]] = {
    "another format": (
        lambda manifest: manifest.update(format="x"), "is not the manifest of a distill_ray.store", "x, format version",
    ),
    "a newer major version": (
        lambda manifest: manifest.update(format_version="2.0"),
        "has format version '2.0', this code reads up to 1.x", "format version 2.0",
    ),
    "another kind": (lambda manifest: manifest.update(kind="data"), "source: Field required", "another kind"),
    "another dtype": (
        lambda manifest: manifest.update(dtype="float32"), "dtype: Input should be 'float16'", "another kind",
    ),
    "more views": (lambda manifest: manifest.update(views=2), "views: Input should be 1", "another kind"),
    "another data digest": (
        lambda manifest: manifest.update(data_digest="0123" * 4),
        f"made from data {'0123' * 4}, the config's data is {'da7a' * 4}", f"labels of {'0123' * 4}",
    ),
    "other classes": (
        lambda manifest: manifest.update(classes=4), "has 4 classes, the data da7ada7ada7ada7a has 3", "classes differ",
    ),
    "other names of classes": (
        lambda manifest: manifest.update(class_names=["a", "b", "c"]), "its classes have other names", "classes differ",
    ),
    "fewer splits": (
        lambda manifest: manifest["splits"].pop("validation"), "has the splits train, test", "splits differ",
    ),
    "fewer shards": (
        lambda manifest: manifest["splits"]["test"]["shards"].clear(), "split test has 3 rows, but its shards hold 0",
        "splits differ",
    ),
    "a file above the folder": (
        edit_shard(file="../x.arrow"), "'../x.arrow' is not a shard's name", "../x.arrow is not a shard's name",
    ),
    "a file below the folder": (
        edit_shard(file="a/b.arrow"), "'a/b.arrow' is not a shard's name", "a/b.arrow is not a shard's name",
    ),
    "another size": (edit_shard(bytes=811), "damaged shard", "is damaged"),
    "another checksum": (edit_shard(sha256="0" * 64), "damaged shard", "is damaged"),
    "more rows": (edit_shard(rows=4), "split test has 3 rows, but its shards hold 4", "row ids [7, 8, 9]"),
    "other ids": (edit_shard(first_id=6, last_id=8), "its row ids are not 6 to 8", "row ids [7, 8, 9]"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_both_readers_refuse_what_the_page_says_is_refused(own_golden: Stores, what: str) -> None:
    edit, ours, the_page = REFUSED[what]
    change(own_golden.labels, edit)
    with pytest.raises(UserError, match=re.escape(ours)):
        read_by_our_code(own_golden, "test")
    with pytest.raises(ValueError, match=re.escape(the_page)):
        read_by_the_page(own_golden, "test")


def test_both_readers_refuse_a_split_of_another_size(own_golden: Stores) -> None:
    change(own_golden.data, lambda manifest: manifest["splits"]["test"].update(rows=4))
    with pytest.raises(UserError, match="split test has 4 rows, but its shards hold 3"):
        read_by_our_code(own_golden, "test")
    with pytest.raises(ValueError, match="split test has 3 rows"):
        read_by_the_page(own_golden, "test")


def told(key: bytes, value: str) -> Edit:
    """An edit of what the schema says."""
    return lambda table: table.replace_schema_metadata({**table.schema.metadata, key: value})


def recast(column: str, kind: pa.DataType) -> Edit:
    return lambda table: table.set_column(table.schema.get_field_index(column), column, table[column].cast(kind))


def refill(column: str, values: list[Any]) -> Edit:
    """Other values in a column, of the same type."""

    def edit(table: pa.Table) -> pa.Table:
        number = table.schema.get_field_index(column)
        return table.set_column(number, column, pa.array(values, type=table.schema.field(number).type))

    return edit


def halve(table: pa.Table) -> pa.Table:
    """Two record batches."""
    return pa.concat_tables([table.slice(0, 1), table.slice(1)])


OTHER = "0123" * 4
# An edit of the test split's shard, which has 3 rows; what our code and verify say, what the reader above says.
FAULTY: dict[str, tuple[str, Edit, str, str]] = {
    "data of another store": (
        "data", told(b"store", OTHER), f"belongs to the store {OTHER}, this is {make.DATA_DIGEST}",
        f"a shard of {OTHER} in {make.DATA_DIGEST}",
    ),
    "labels of another store": (
        "labels", told(b"store", OTHER), f"belongs to the store {OTHER}, this is {make.LABELS_DIGEST}",
        f"a shard of {OTHER} in {make.LABELS_DIGEST}",
    ),
    "another shape": (
        "data", told(b"shape", "2,2,1"), "its metadata has shape 2,2,1, the manifest 1,2,2", "shape 2,2,1",
    ),
    "two batches": ("labels", halve, "holds 2 record batches", "2 batches"),
    "no label": ("data", lambda table: table.drop_columns("label"), "has 0 columns 'label'", "0 columns label"),
    "ids twice": (
        "labels", lambda table: table.append_column("row_id", table["row_id"]), "has 2 columns 'row_id'",
        "2 columns row_id",
    ),
    "narrow ids": (
        "data", recast("row_id", pa.int32()), "column 'row_id' is int32, expected int64", "column row_id is int32",
    ),
    "wide logits": (
        "labels", recast("logits", pa.list_(pa.float32(), 3)), "column 'logits' is fixed_size_list<item: float>[3]",
        "column logits is fixed_size_list<item: float>[3]",
    ),
    "more pixels": (
        "data", lambda table: table.set_column(2, "input", pa.array([[0] * 5] * 3, pa.list_(pa.uint8(), 5))),
        "column 'input' is fixed_size_list<item: uint8>[5]", "column input is fixed_size_list<item: uint8>[5]",
    ),
    "a null id": ("labels", refill("row_id", [7, None, 9]), "column 'row_id' holds nulls", "nulls in row_id"),
    "a null input": ("data", refill("input", [[0] * 4, None, [0] * 4]), "column 'input' holds nulls", "nulls in input"),
    "a null logit": (
        "labels", refill("logits", [[0, -1, -2], [0, None, -2], [0, -1, -2]]), "column 'logits' holds nulls",
        "nulls in logits",
    ),
    "ids of other rows": (
        "data", refill("row_id", [4, 5, 6]), "its row ids are not 7 to 9, one by one", "row ids [4, 5, 6]",
    ),
    "ids in another order": (
        "labels", refill("row_id", [7, 9, 8]), "its row ids are not 7 to 9, one by one", "row ids [7, 9, 8]",
    ),
    "a label too many": (
        "data", refill("label", [0, None, 3]), "label 3 is out of range for 3 classes", "label out of range",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTY)
def test_both_readers_and_verify_refuse_a_whole_shard_with_other_content(own_golden: Stores, what: str) -> None:
    """Its checksum is the manifest's: only what is in it tells."""
    kind, edit, ours, the_page = FAULTY[what]
    folder = own_golden.data if kind == "data" else own_golden.labels
    change(folder, lambda manifest: rewrite(folder, manifest["splits"]["test"]["shards"][0], edit))
    with pytest.raises(UserError, match=re.escape(ours)):
        read_by_our_code(own_golden, "test")
    with pytest.raises(UserError, match=re.escape(ours)):
        verify(Folder.at(folder), QUIET)
    with pytest.raises(ValueError, match=re.escape(the_page)):
        read_by_the_page(own_golden, "test")


def test_a_list_may_call_its_inner_field_anything(own_golden: Stores) -> None:
    kind = pa.list_(pa.field("logit", pa.float16()), 3)
    change(
        own_golden.labels,
        lambda manifest: rewrite(
            own_golden.labels, manifest["splits"]["test"]["shards"][0],
            lambda table: table.set_column(1, "logits", pa.array(table["logits"].to_pylist(), kind)),
        ),
    )  # fmt: skip
    for read in (read_by_our_code, read_by_the_page):
        assert_same(read(own_golden, "test"), expected("test"))


def test_twins_must_have_the_same_ids(own_golden: Stores) -> None:
    """Each shard agrees with its own manifest here."""

    def renumber(manifest: dict[str, Any]) -> None:
        (shard,) = manifest["splits"]["test"]["shards"]
        rewrite(own_golden.labels, shard, refill("row_id", [17, 18, 19]))
        shard.update(first_id=17, last_id=19)

    change(own_golden.labels, renumber)
    with pytest.raises(UserError, match="its row ids are not those of"):
        read_by_our_code(own_golden, "test")
    with pytest.raises(ValueError, match="row ids differ"):
        read_by_the_page(own_golden, "test")


# --- numbers on the page ---------------------------------------------------------------------------------------------


def test_the_page_states_the_numbers_of_the_code() -> None:
    assert (storage._STALE_TEMPORARY_S, shard_job._REMOTE_ORPHAN_S) == (3600, 24 * 3600)
    text = " ".join(PAGE.split())
    for stated in (
        f"at most {shards.MAX_SHARD_BYTES >> 20} MiB", "are removed when they are older than an hour",
        "on object stores only what is older than a day", f"for up to {storage._PATIENCE_S:.0f} s;",
        f"`cluster.cache_gib` ({ClusterConfig().cache_gib:g}; 0 keeps none)",
        f"{replay.SAMPLE_ROWS} rows (`--sample ROWS`; 0 leaves it out) from {replay._SHARDS} shards, more",
        f"`|stored| / {1 / replay._FLOAT16_ROUNDING:g} + (1 + range) / {1 / replay._FP32_SLACK:g}`",
        f"by {replay._REDUCED_SLACK:g} times `precision_check.max_abs_difference` more",
    ):  # fmt: skip
        assert stated in text


def test_the_page_bounds_the_error_of_float16() -> None:
    """The bounds hold, and no smaller ones would: the worst logit comes within 1 % of each."""
    below = np.geomspace(2.0**-30, 65504, 200_000).astype(np.float32)
    logits = np.stack([np.zeros_like(below), -below], axis=1)
    stored = shards.decode_logits(shards.encode_logits(np.arange(len(below)), logits, precision="fp32"), 2).logits[:, 1]
    error = np.abs(stored.astype(np.float64) + below)
    normal = below >= 2.0**-14
    assert 0.99 / 2048 < (error / below)[normal].max() <= 1 / 2048
    assert 0.99 * 2.0**-25 < error[~normal].max() <= 2.0**-25
    assert np.exp(-65504.0 / 80) == 0 < np.exp(-65504.0 / 100)  # float64, which has the smallest numbers
    for stated in (
        "at most 1/2048 of the",
        "where that is 2^-14 or more",
        "at most 2^-25 where",
        "temperature up to 80",
    ):
        assert stated in PAGE


# --- the snippets of "Reading it with other tools" -------------------------------------------------------------------

TOOLS = ("files", "pyarrow", "polars", "duckdb", "datasets")


def section(title: str) -> str:
    """The text below a heading of FORMAT.md."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def snippets() -> dict[str, str]:
    """The Python blocks by the tool they show, exactly as printed; ``files`` goes before each."""
    blocks = re.findall(r"^```python\n(.*?)^```$", section("Reading it with other tools"), re.MULTILINE | re.DOTALL)
    return dict(zip(TOOLS, blocks, strict=True))


def run_snippet(tool: str, stores: Stores) -> dict[str, Any]:
    """The names that the snippet leaves."""
    names: dict[str, Any] = {"DATA": str(stores.data), "LABELS": str(stores.labels)}
    for block in ("files", tool):
        exec(compile(snippets()[block], f"FORMAT.md ({block})", "exec"), names)
    return names


def from_arrow(table: pa.Table, shape: tuple[int, ...]) -> Rows:
    """The rows of an Arrow table whose logits may have been widened."""
    flat = {name: table[name].combine_chunks().flatten().to_numpy() for name in ("input", "logits")}
    logits = flat["logits"].reshape(table.num_rows, -1)
    narrow = logits.astype(np.float16)
    assert np.array_equal(narrow.astype(logits.dtype), logits)
    inputs = flat["input"].reshape(-1, *shape)
    return Rows(table["row_id"].to_pylist(), inputs, table["label"].to_pylist(), narrow)


@pytest.fixture(params=[*VERSIONS, "glyph62"])
def stores(request: pytest.FixtureRequest) -> Stores:
    """The golden stores, which have rows without a label; and those of a real run, 62 classes of 1x32x32 pixels."""
    if request.param in VERSIONS:
        return golden_of(request.param)
    run: SmallRun = request.getfixturevalue("small_run")
    return stores_in(run.out / "artifacts")


def hits(rows: Rows) -> list[tuple[int, bool]]:
    """The class of each row that has one, and whether the teacher's first largest logit is it."""
    winners = rows.logits.argmax(axis=1).tolist()
    return [(label, winner == label) for label, winner in zip(rows.labels, winners, strict=True) if label is not None]


def test_the_snippets_need_none_of_our_code() -> None:
    for tool, code in snippets().items():
        assert tool == "files" or f"import {tool}" in code or f"from {tool} import" in code
        assert "distill_ray" not in code


@pytest.mark.parametrize("split", SPLITS)
def test_the_page_is_enough_to_read_a_store(stores: Stores, split: str) -> None:
    assert_same(read_by_the_page(stores, split), read_by_our_code(stores, split))


def test_snippet_pyarrow(stores: Stores) -> None:
    names, ours = run_snippet("pyarrow", stores), read_by_our_code(stores, "test")
    assert_same(from_arrow(names["rows"], ours.inputs.shape[1:]), ours)
    assert names["rows"].schema.field("logits").type.value_type == pa.float16()
    assert (names["inputs"].dtype, names["inputs"].shape) == (ours.inputs.dtype, ours.inputs.shape)
    assert np.array_equal(names["inputs"], ours.inputs)


def test_snippet_polars(stores: Stores) -> None:
    names, ours = run_snippet("polars", stores), read_by_our_code(stores, "test")
    frame = names["rows"]
    inputs = frame["input"].to_numpy().reshape(ours.inputs.shape)
    assert_same(Rows(frame["row_id"].to_list(), inputs, frame["label"].to_list(), frame["logits"].to_numpy()), ours)
    assert names["teacher_accuracy"] == pytest.approx(np.mean([hit for _, hit in hits(ours)]))


def test_snippet_duckdb(stores: Stores) -> None:
    names, ours = run_snippet("duckdb", stores), read_by_our_code(stores, "test")
    assert_same(from_arrow(names["rows"], ours.inputs.shape[1:]), ours)
    of_class: dict[int, list[bool]] = {}
    for label, hit in hits(ours):
        of_class.setdefault(label, []).append(hit)
    assert dict(names["accuracy_of_class"]) == pytest.approx({label: np.mean(hit) for label, hit in of_class.items()})


def test_snippet_hugging_face(stores: Stores, tmp_path: Path) -> None:
    """In a process of its own: where its cache is and whether it may use the network are settled at its import."""
    script, home, table = tmp_path / "snippet.py", tmp_path / "home", tmp_path / "rows.arrow"
    parts = [
        f"DATA, LABELS = {str(stores.data)!r}, {str(stores.labels)!r}", snippets()["files"], snippets()["datasets"],
        "import pyarrow as pa", f"with pa.ipc.new_file({str(table)!r}, rows[:].schema) as writer:",
        "    writer.write_table(rows[:])",
    ]  # fmt: skip
    script.write_text("\n".join(parts))
    home.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    env |= {"HOME": str(home), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    with pa.memory_map(str(table)) as file:
        rows = pa.ipc.open_file(file).read_all()
    ours = read_by_our_code(stores, "test")
    assert rows.schema.field("logits").type.value_type == pa.float16()
    assert_same(from_arrow(rows, ours.inputs.shape[1:]), ours)
    assert list((tmp_path / "hf").rglob("*.arrow"))  # its cache was where we put it
    assert list(home.iterdir()) == []


# --- "A worked example" is the golden store --------------------------------------------------------------------------


def table_rows(text: str, columns: int) -> list[list[str]]:
    """The cells of the Markdown table with so many columns, without its head."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [cells for cells in lines if len(cells) == columns][2:]


def printed_blocks(text: str) -> list[str]:
    """The indented blocks."""
    return [textwrap.dedent(block) for block in re.findall(r"(?:^ {4}.*\n(?:\n(?= {4}))?)+", text, re.MULTILINE)]


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]


@pytest.fixture
def example() -> str:
    return section("A worked example")


def test_the_example_names_the_files(golden: Stores, example: str) -> None:
    assert "10 rows of 1x2x2 pixels, 3 classes, 4 shards" in example
    printed = [
        (data.strip("`"), int(data_bytes), labels.strip("`"), int(label_bytes), numbers(ids))
        for data, data_bytes, labels, label_bytes, ids in table_rows(example, 5)
    ]
    assert printed == [
        (
            data["file"], (golden.data / data["file"]).stat().st_size, twin["file"],
            (golden.labels / twin["file"]).stat().st_size, [twin["first_id"], twin["last_id"]],
        )
        for data, twin in zip(records(golden.data), records(golden.labels), strict=True)
    ]  # fmt: skip
    assert printed_blocks(example)[0].split() == [f"{folder.name}/manifest.json" for folder in golden]


def is_part(printed: Any, whole: Any) -> bool:
    """Whether every key and value is in the other, lists from their start."""
    if isinstance(printed, dict):
        return all(key in whole and is_part(value, whole[key]) for key, value in printed.items())
    if isinstance(printed, list):
        return len(printed) <= len(whole) and all(map(is_part, printed, whole))
    return bool(printed == whole)


def test_the_example_prints_the_manifests(golden: Stores, example: str) -> None:
    printed = [json.loads(block) for block in printed_blocks(example) if block.startswith("{")]
    for manifest, folder in zip(printed, golden, strict=True):
        assert is_part(manifest, json.loads((folder / "manifest.json").read_text()))
        assert manifest["splits"]["train"]["shards"][0]["sha256"]


def test_the_example_prints_the_columns(golden: Stores, example: str) -> None:
    printed = [block.splitlines() for block in printed_blocks(example) if block.startswith("row_id: ")]
    for lines, folder in zip(printed, golden, strict=True):
        schema = only_batch(folder / records(folder)[0]["file"]).schema
        metadata = [f"{key.decode()} = {value.decode()}" for key, value in (schema.metadata or {}).items()]
        assert lines == [*(f"{field.name}: {field.type}" for field in schema), *metadata]


def test_the_example_prints_every_row(golden: Stores, example: str) -> None:
    printed = [(cells[0], [json.loads(cell) for cell in cells[1:6]]) for cells in table_rows(example, 7)]
    stored = []
    for record, twin in zip(records(golden.data), records(golden.labels), strict=True):
        batch, twins = only_batch(golden.data / record["file"]), only_batch(golden.labels / twin["file"])
        columns = [*(batch[name] for name in ("row_id", "source_id", "input", "label")), twins["logits"]]
        rows = zip(*(column.to_pylist() for column in columns), strict=True)
        stored += [(f"{record['split']}, {record['index']}", list(row)) for row in rows]
    assert printed == stored


def test_the_example_says_what_the_logits_were_made_from(example: str) -> None:
    printed = [json.loads(cells[6]) for cells in table_rows(example, 7)]
    assert printed == [list(row.logits) for rows in make.SHARDS.values() for row in rows]
    given = np.array(printed, dtype=np.float32)
    by_the_page = np.maximum(given - given.max(axis=1, keepdims=True), np.float32(-65504)).astype(np.float16)
    stored = np.concatenate([expected(split).logits for split in SPLITS])
    assert by_the_page.tobytes() == stored.tobytes()


def test_the_example_prints_the_bytes_of_the_logits(golden: Stores, example: str) -> None:
    (printed,) = (block for block in printed_blocks(example) if re.fullmatch(r"[0-9a-f\s]+", block))
    raw = (golden.labels / records(golden.labels)[0]["file"]).read_bytes()
    assert len(bytes.fromhex(printed)) == 18
    assert raw.count(bytes.fromhex(printed)) == 1


def test_the_example_computes_a_softmax(golden: Stores, example: str) -> None:
    rows, contract = read_by_the_page(golden, "train"), manifest_by_the_page(golden.data, "data")["input"]
    (printed,) = (block for block in printed_blocks(example) if "softmax" in block)
    found = dict(re.findall(r"^(.*?) {2,}(\[.*?\])", printed, re.MULTILINE))
    divided = rows.logits[0].astype(np.float64) / 2
    powers = np.exp(divided)
    calculated = {
        "input, as the model sees it": (rows.inputs[0] * contract["scale"] - contract["mean"]) / contract["std"],
        "logits": rows.logits[0], "logits / T": divided, "exp": powers, "softmax": powers / powers.sum(),
    }  # fmt: skip
    assert list(found) == list(calculated)
    for name, values in calculated.items():
        assert json.loads(found[name]) == [round(float(value), 6) for value in values.reshape(-1)], name
    assert f"their sum is {powers.sum():.6f}\n" in printed
    (given,) = re.findall(r"the same as of (\[.*\]) / T", printed)
    teacher = np.exp(np.array(json.loads(given)) / 2)
    assert teacher / teacher.sum() == pytest.approx(powers / powers.sum())
    assert json.loads(given) == json.loads(table_rows(example, 7)[0][6])


def test_the_example_states_the_accuracy(golden: Stores, example: str) -> None:
    (stated,) = re.findall(r"The teacher's accuracy on `test` is (\d\.\d)", example)
    rows = read_by_the_page(golden, "test")
    assert hits(rows) == [(2, True), (1, False)]
    assert verify(Folder.at(golden.labels), QUIET)["accuracy"] == float(stated)
