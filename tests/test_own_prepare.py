"""Rows of one's own into a data store, through the real command on a real local Ray."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from distill_ray.config import from_dict
from distill_ray.errors import RunError
from distill_ray.stages import prepare as stage
from distill_ray.storage import Folder
from distill_ray.store import Store, open_store
from tests.harness import Finished, distill_ray, only, stop_when, write_config
from tests.own_data import Array, fixed_list, pixels, png, write_parquet
from tests.report_fixtures import context_of
from tests.test_cluster import TOKEN, Cluster, head, two_nodes

__all__ = ["head", "two_nodes"]  # fixtures

ROWS, SHARD_ROWS = 1000, 64
MODELS: dict[str, Any] = {
    "teacher": {
        "model": {"name": "mlp", "hidden": [16]},
        "train": {"epochs": 2, "batch_size": 64, "precision": "fp32"},
    },
    "labels": {"precision": "fp32"},
    "student": {"model": {"name": "mlp", "hidden": [8]}, "train": {"epochs": 2, "batch_size": 64, "precision": "fp32"}},
    "tracking": {"wandb": {"mode": "disabled"}},
}


def inputs() -> Array:
    return np.random.default_rng(0).normal(3.0, 2.0, (ROWS, 6)).astype(np.float32)


def columns() -> dict[str, Any]:
    """Ids that are not the rows' numbers, labels as words, some of them missing."""
    words = [None if n % 10 == 0 else ("ant", "bee", "cow")[n * 7 % 3] for n in range(ROWS)]
    return {"x": fixed_list(inputs()), "y": words, "key": [f"k{n * 13 % ROWS:04d}" for n in range(ROWS)]}


def run_of(path: Path, **keys: Any) -> dict[str, Any]:
    data = {"source": "parquet", "path": str(path), "columns": {"input": "x", "label": "y", "id": "key"},
            "shard_rows": SHARD_ROWS} | keys  # fmt: skip
    return {"name": "own", "data": data, **MODELS}


def prepare(config: Path, out: Path, *more: str) -> Finished:
    return distill_ray("prepare", config, "--out", out, "--json", *more)


def store_in(out: Path) -> Store:
    return open_store(Folder.at(only(out / "artifacts", "data-*")))


def rows_of(store: Store) -> dict[str, tuple[str, int, Array, int | None]]:
    """source id -> split, row id, input and label."""
    found = {}
    for record in store.manifest.shards:
        batch = store.batch(record)
        shard = store.data_shard(record)
        for key, row_id, values, label in zip(
            batch.column("source_id").to_pylist(), shard.row_ids.tolist(), shard.inputs, batch["label"].to_pylist(),
            strict=True,
        ):  # fmt: skip
            found[key] = (record.split, row_id, values, label)
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Finished]:
    """A data store of seven files of small row groups, made undisturbed."""
    root = tmp_path_factory.mktemp("own")
    path = write_parquet(root / "set", columns(), row_group_size=40, files=7)
    config = write_config(root, run_of(path, input={"mean": "auto", "std": "auto"}, split={"stratify": True}))
    done = prepare(config, root / "runs")
    assert done.code == 0, done.stderr
    return config, root / "runs", done


def test_every_row_is_in_the_store_once_with_its_input_and_label(prepared: tuple[Path, Path, Finished]) -> None:
    store = store_in(prepared[1])
    found = rows_of(store)
    made = columns()
    assert set(found) == set(made["key"])
    names = store.manifest.class_names
    assert names == ("ant", "bee", "cow")
    for number, (key, word) in enumerate(zip(made["key"], made["y"], strict=True)):
        _, _, values, label = found[key]
        assert np.array_equal(values, inputs()[number])
        assert (None if label is None else names[label]) == word
    assert sorted(row_id for _, row_id, _, _ in found.values()) == list(range(ROWS))
    # Rows lie in another order than in the files, and so in every shard.
    order = [int(key[1:]) * 77 % ROWS for key, _ in sorted(found.items(), key=lambda item: item[1][1])]
    assert np.abs(np.diff(order)).mean() > ROWS / 6


def test_the_manifest_says_what_the_rows_are(prepared: tuple[Path, Path, Finished]) -> None:
    manifest = store_in(prepared[1]).data_manifest
    found = rows_of(store_in(prepared[1]))
    assert {name: split.rows for name, split in manifest.splits.items()} == {
        "train": 800, "validation": 100, "test": 100
    }  # fmt: skip
    assert manifest.class_counts is not None
    for split, counts in manifest.class_counts.items():
        labels = [label for where, _, _, label in found.values() if where == split]
        assert list(counts) == [labels.count(number) for number in range(3)]
    train = np.stack([values for where, _, values, _ in found.values() if where == "train"]).astype(np.float64)
    assert manifest.input.mean == pytest.approx(train.mean(axis=0))
    assert manifest.input.std == pytest.approx(train.std(axis=0))
    assert manifest.input.scale == 1
    assert (manifest.shape, manifest.dtype, manifest.synthetic, manifest.bad_rows) == ((6,), "float32", False, None)


def test_the_classes_of_each_split_are_shown(prepared: tuple[Path, Path, Finished]) -> None:
    told = prepared[2].stderr
    for name, *cells in (("class", "train", "validation", "test"), ("without a label", "80", "10", "10")):
        assert f"  {name:15}" + "".join(f" {cell:>12}" for cell in cells) in told, told


def test_neither_workers_nor_their_order_change_a_byte(
    prepared: tuple[Path, Path, Finished], tmp_path: Path, two_nodes: Cluster
) -> None:
    """The shards are named by the checksum of their content; here two nodes of one CPU each make them."""
    done = distill_ray("prepare", prepared[0], "--out", tmp_path / "runs", RAY_ADDRESS=two_nodes.address, **TOKEN)
    assert done.code == 0, done.stderr
    assert {record.file for record in store_in(tmp_path / "runs").manifest.shards} == {
        record.file for record in store_in(prepared[1]).manifest.shards
    }


def test_a_killed_prepare_keeps_its_shards_and_makes_the_others(
    prepared: tuple[Path, Path, Finished], tmp_path: Path
) -> None:
    out = tmp_path / "runs"

    def reached() -> bool:
        return len(list(out.glob("artifacts/data-*/[!.]*.arrow"))) >= 3

    stop_when(["prepare", prepared[0], "--out", out], reached, signal.SIGKILL)
    folder = only(out / "artifacts", "data-*")
    assert not (folder / "manifest.json").exists()
    left = {path.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*.arrow")}
    # One shard is damaged, and one is gone: both are made again, and no other.
    damaged, gone, *kept = sorted(left)
    (folder / damaged).write_bytes(b"damaged")
    (folder / gone).unlink()
    done = prepare(prepared[0], out)
    assert done.code == 0, done.stderr
    assert {record.file for record in store_in(out).manifest.shards} == {
        record.file for record in store_in(prepared[1]).manifest.shards
    }
    assert all((folder / name).stat().st_mtime_ns == left[name] for name in kept)
    assert (folder / damaged).stat().st_mtime_ns != left[damaged]


def test_what_a_task_meets_is_one_line_and_tolerated_where_allowed(tmp_path: Path) -> None:
    images = pixels(120, 8, 8)
    data = [png(image) for image in images]
    for row in (17, 90):
        data[row] = data[row][: len(data[row]) // 2]
    path = write_parquet(tmp_path / "rows.parquet", {"x": data, "y": [n % 2 for n in range(120)]}, row_group_size=30)
    columns = {"input": "x", "label": "y"}
    config = write_config(tmp_path, run_of(path, columns=columns))
    done = prepare(config, tmp_path / "runs")
    assert done.code == 2
    line = done.stderr.splitlines()[-1]
    assert f"distill-ray: prepare: {path}, row " in line
    assert "its image cannot be decoded" in line
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["exit_code"] == 2
    more = prepare(config, tmp_path / "runs", "data.max_bad_rows=1")
    assert more.code == 2
    assert f"{path}, row 17: its image cannot be decoded" in more.stderr
    assert "(2 such rows)" in more.stderr
    done = prepare(config, tmp_path / "runs", "data.max_bad_rows=2")
    assert done.code == 0, done.stderr
    assert "warning: 2 row(s) are left out" in done.stderr
    # A store of its own: what the runs before it left holds other rows under the same row ids.
    store = open_store(Folder.at(only(tmp_path / "runs", "artifacts/data-*/manifest.json").parent))
    assert store.data_manifest.bad_rows == 2
    assert store.manifest.rows == 118
    assert {"rows.parquet/17", "rows.parquet/90"}.isdisjoint(rows_of(store))


def test_what_is_wrong_with_labels_is_told_before_an_input_is_read(tmp_path: Path) -> None:
    labels = [*range(3)] * 40
    path = write_parquet(tmp_path / "rows.parquet", {"x": fixed_list(np.zeros((120, 2), np.float32)), "y": labels})
    config = write_config(tmp_path, run_of(path, columns={"input": "x", "label": "y"}, class_names=["a", "b"]))
    done = prepare(config, tmp_path / "runs")
    assert done.code == 2
    assert f"{path}, row 2 has the label 2, out of range for 2 classes" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "runs").glob("artifacts/data-*/*.arrow"))


def test_a_file_without_any_label_beside_others_that_have_them(tmp_path: Path) -> None:
    """Small enough for one task, whose rows Ray puts together to one block."""
    made = columns()
    for number, name in enumerate("abcd"):
        at = slice(number * 100, number * 100 + 100)
        part = {"x": made["x"][at], "y": made["y"][at], "key": made["key"][at]}
        write_parquet(tmp_path / "set" / f"{name}.parquet", part | ({} if number % 2 else {"y": pa.nulls(100)}))
    done = prepare(write_config(tmp_path, run_of(tmp_path / "set")), tmp_path / "runs")
    assert done.code == 0, done.stderr
    store = store_in(tmp_path / "runs")
    names, found = store.manifest.class_names, rows_of(store)
    assert len(found) == 400
    for number in range(400):
        label = found[made["key"][number]][3]
        assert (None if label is None else names[label]) == (made["y"][number] if number // 100 % 2 else None)


def test_files_that_changed_before_they_were_opened_are_not_stored_under_the_old_name(tmp_path: Path) -> None:
    """While Ray starts, or another run is waited for, a table may be replaced by one with as many rows."""
    path = write_parquet(tmp_path / "rows.parquet", columns())
    context = context_of(tmp_path / "runs", from_dict(run_of(path)))
    target = stage.locate(context.config, context.out)
    write_parquet(path, columns() | {"x": fixed_list(inputs() + 1)})
    with pytest.raises(RunError, match="its files changed since the command began: the same command reads them anew"):
        stage._make(context, target)
    assert not context.session.started
