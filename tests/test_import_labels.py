"""Logits from files: every row in its place, by the user's ids; what does not cover the data is refused with counts."""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_ray import config as configs
from distill_ray import logit_files
from distill_ray.errors import UserError
from distill_ray.placing import Node
from distill_ray.sources import info_of, open_source
from distill_ray.stages import import_labels, label, prepare, teacher
from distill_ray.stages.context import Context
from distill_ray.storage import Folder
from distill_ray.store import Store, open_store
from distill_ray.store.verify import verify
from tests.report_fixtures import context_of
from tests.unlabelled import write_data

CLASSES = 62
RAW: dict[str, Any] = {
    "name": "r", "data": {"source": "glyph62", "rows": 310, "shard_rows": 100}, "student": {"model": {"name": "mlp"}},
    "tracking": {"wandb": {"mode": "disabled"}},
}  # fmt: skip


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def context(out: Path, **labels: Any) -> Context:
    made = context_of(out, configs.from_dict(RAW | {"labels": labels}))
    made.announce_ray = lambda ahead=None: None  # type: ignore[method-assign]  # nothing here needs Ray
    made.session.start = lambda: [Node(2, 0)]  # type: ignore[method-assign]
    return made


@pytest.fixture
def data(out: Path) -> Store:
    return write_data(configs.from_dict(RAW | {"labels": {"from": "/x.npy"}}), out, lambda split, ids: ids >= 0)


def ids_of(data: Store) -> list[str]:
    return [name for record in data.manifest.shards for name in data.batch(record).column("source_id").to_pylist()]


def values(seed: int = 0, rows: int = 310) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 3, (rows, CLASSES)).astype(np.float32)


def parquet(path: Path, names: Any, logits: npt.NDArray[np.float32], by: str = "source_id", **columns: Any) -> Path:
    column = pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1)), logits.shape[1])
    pq.write_table(pa.table({by: names, "logits": column, **columns}), path, row_group_size=64)
    return path


def stored(context: Context) -> npt.NDArray[np.float32]:
    """Run both stages; the logits of all rows by row id."""
    labels = open_store(label.run(context).folder)
    assert verify(labels.folder, context.reporter)["rows"] == 310
    found = [labels.label_shard(record).logits.astype(np.float32) for record in labels.manifest.shards]
    return np.concatenate(found)


def same(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> bool:
    shifted = expected - expected.max(axis=1, keepdims=True)
    return np.allclose(found, shifted, rtol=2**-10, atol=1e-3)


def test_parquet_in_any_order_by_the_users_ids(out: Path, data: Store, tmp_path: Path) -> None:
    names, logits = ids_of(data), values()
    order = np.random.default_rng(1).permutation(310)
    path = parquet(tmp_path / "l.parquet", [names[i] for i in order], logits[order], note=["x"] * 310)
    made = context(out, **{"from": str(path)})
    assert same(stored(made), logits)
    summary = teacher.locate(made.config, made.out, prepare.run(made)).finished()
    assert summary is not None
    labels = np.concatenate([data.data_shard(record).labels for record in data.manifest.shards])
    assert summary["measured"]["accuracy"] == pytest.approx((logits.argmax(axis=1) == labels).mean())
    assert summary["imported"]["from"] == str(path)
    assert {o.status for o in made.outcomes.values()} == {"reused", "ran"}
    again = context(out, **{"from": str(path)})
    label.run(again)
    assert {o.status for o in again.outcomes.values()} == {"reused"}


def test_the_forms_that_a_file_may_have(out: Path, data: Store, tmp_path: Path) -> None:
    names, logits = ids_of(data), values()
    classes = data.manifest.class_names
    scalars = pa.table({"source_id": names} | {classes[c]: logits[:, c] for c in reversed(range(CLASSES))})
    pq.write_table(scalars, tmp_path / "scalars.parquet")
    lists = pa.table({"source_id": names, "scores": [list(map(float, row)) for row in logits]})
    (tmp_path / "parts").mkdir()
    pq.write_table(lists.slice(0, 200), tmp_path / "parts" / "0.parquet")
    pq.write_table(lists.slice(200), tmp_path / "parts" / "1.parquet")
    parquet(tmp_path / "rows.parquet", np.arange(310)[::-1], logits[::-1].copy(), by="row_id")
    np.save(tmp_path / "n.npy", logits[::-1])
    np.save(tmp_path / "ids.npy", np.array(names[::-1]))
    np.save(tmp_path / "by_row.npy", logits)
    for number, labels in enumerate(
        [
            {"from": str(tmp_path / "scalars.parquet")}, {"from": str(tmp_path / "parts")},
            {"from": str(tmp_path / "rows.parquet"), "by": "row_id"},
            {"from": str(tmp_path / "n.npy"), "ids": str(tmp_path / "ids.npy")},
            {"from": str(tmp_path / "by_row.npy"), "by": "row_id"},
        ]
    ):  # fmt: skip
        assert same(stored(context(out, **labels)), logits), number


def test_a_npy_without_ids_is_in_the_order_of_the_sources_rows(out: Path, data: Store, tmp_path: Path) -> None:
    """Glyph62 numbers its rows through; the prepared store permutes them, this fixture's does not."""
    made = context(out, **{"from": str(tmp_path / "n.npy")})
    plans = prepare._plan(made.config, info_of(open_source(made.config.data)))
    numbers = np.concatenate([plan.payload["indices"] for plan in plans])
    logits = values()
    np.save(tmp_path / "n.npy", logits)
    assert same(stored(made), logits[numbers])


def test_probabilities_are_recognised(out: Path, data: Store, tmp_path: Path) -> None:
    logits = values()
    soft = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    path = parquet(tmp_path / "p.parquet", ids_of(data), soft.astype(np.float32))
    assert same(stored(context(out, **{"from": str(path)})), logits)
    soft[300] *= 2
    path = parquet(tmp_path / "q.parquet", ids_of(data), soft.astype(np.float32))
    told = f"{ids_of(data)[300]}' has no probabilities .they sum to 2.: set labels.output"
    with pytest.raises(UserError, match=told):
        stored(context(out, **{"from": str(path)}))


def test_a_column_says_its_class_by_its_name_or_its_number(out: Path, data: Store, tmp_path: Path) -> None:
    """Whatever the order of the columns: logit_10 comes before logit_2 in a sorted table."""
    names, logits = ids_of(data), values()
    classes, confidence = data.manifest.class_names, {"confidence": logits[:, 0]}
    by_name = {f"prob_{name}_raw": logits[:, c] for c, name in reversed(list(enumerate(classes)))}
    by_number = {f"logit_{name}": logits[:, int(name)] for name in sorted(map(str, range(CLASSES)))}
    from_one = {f"f{c + 1}": logits[:, c] for c in reversed(range(CLASSES))}
    for columns in (by_name, by_number, from_one):
        path = tmp_path / f"{next(iter(columns))}.parquet"
        pq.write_table(pa.table({"source_id": names, **columns, **confidence}), path)
        assert same(stored(context(out, **{"from": str(path)})), logits)
    others = {f"other_{name}_raw": logits[:, c] for c, name in enumerate(classes)}
    pq.write_table(pa.table({"source_id": names, **by_name, **others}), tmp_path / "two.parquet")
    with refused(out, r"two.parquet: has several columns of floats for one class \(.*\): remove all but one"):
        stored(context(out, **{"from": str(tmp_path / "two.parquet")}))
    unnamed = {f"{'x' * (c + 1)}": logits[:, c] for c in range(CLASSES)}
    pq.write_table(pa.table({"source_id": names, **unnamed}), tmp_path / "unnamed.parquet")
    with refused(out, r"unnamed.parquet: has 62 columns of floats .* the data has 62 classes: name the columns as"):
        stored(context(out, **{"from": str(tmp_path / "unnamed.parquet")}))
    said = {"from": str(tmp_path / "unnamed.parquet"), "classes": list(classes[::-1])}
    assert same(stored(context(out, **said)), logits[:, ::-1])


def test_swapped_columns_of_two_classes() -> None:
    schema = pa.schema([("id", pa.string()), ("prob_dog", pa.float32()), ("prob_cat", pa.float32())])
    found = logit_files._columns(schema, "x", "id", logit_files.Outputs(("cat", "dog")))
    assert found == ["prob_cat", "prob_dog"]


def test_the_classes_of_a_row_may_be_said(out: Path, data: Store, tmp_path: Path) -> None:
    """In another order, and more of them; they are part of what names the labels."""
    names, logits = ids_of(data), values()
    classes = data.manifest.class_names
    wider = np.concatenate([logits[:, ::-1], np.full((310, 1), 2.0, np.float32)], axis=1)
    said = [*classes[::-1], "none of them"]
    soft = np.exp(wider) / np.exp(wider).sum(axis=1, keepdims=True)
    np.save(tmp_path / "n.npy", wider)
    parquet(tmp_path / "l.parquet", names, soft.astype(np.float32))
    for labels in ({"from": str(tmp_path / "n.npy"), "by": "row_id"}, {"from": str(tmp_path / "l.parquet")}):
        assert same(stored(context(out, **labels, classes=said)), logits)
    for wrong, told in (
        ([*said, "more"], r"n.npy: has 63 numbers a row, labels.classes names 64: give one number for each"),
        (said[1:], rf"labels.classes: '{classes[-1]}' is a class of the data, but none"),
        (None, r"n.npy: has 63 numbers a row, the data has 62 classes: .* or name what they stand for"),
    ):
        with refused(out, told):
            rest = {} if wrong is None else {"classes": wrong}
            stored(context(out, **{"from": str(tmp_path / "n.npy"), "by": "row_id"}, **rest))
    config = configs.from_dict(RAW | {"labels": {"from": str(tmp_path / "n.npy")}})
    stage = prepare.locate(config, Folder.at(out))
    plain = import_labels.locate_teacher(config, Folder.at(out), stage).digest
    config = configs.from_dict(RAW | {"labels": {"from": str(tmp_path / "n.npy"), "classes": said}})
    assert import_labels.locate_teacher(config, Folder.at(out), stage).digest != plain


def test_a_folder_may_hold_more_than_its_parquet_files(out: Path, data: Store, tmp_path: Path) -> None:
    names, logits = ids_of(data), values()
    (tmp_path / "set").mkdir()
    parquet(tmp_path / "set" / "a.parquet", names[:100], logits[:100])
    parquet(tmp_path / "set" / "b.PARQUET", names[100:], logits[100:])
    (tmp_path / "set" / "README.md").write_text("Logits of a model.")
    (tmp_path / "set" / "_SUCCESS").write_text("")
    assert same(stored(context(out, **{"from": str(tmp_path / "set")})), logits)


def test_the_logarithm_of_a_zero_is_a_label_where_all_are_logarithms(out: Path, data: Store, tmp_path: Path) -> None:
    names = ids_of(data)
    sure = np.eye(CLASSES, dtype=np.float32)[np.arange(310) % CLASSES]
    with np.errstate(divide="ignore"):
        logs = np.log(sure)
    path = parquet(tmp_path / "l.parquet", names, logs)
    floor = np.where(sure == 1, 0, np.log(np.finfo(np.float32).tiny)).astype(np.float32)
    for output in ("auto", "log_probabilities"):
        assert np.allclose(stored(context(out, **{"from": str(path), "output": output})), floor, atol=0.05)
    with refused(out, rf"'{names[0]}' has a number that is not finite"):
        stored(context(out, **{"from": str(path), "output": "logits"}))


def test_the_outputs_of_sigmoids_are_asked_about(out: Path, data: Store, tmp_path: Path) -> None:
    flat = (1 / (1 + np.exp(-values()))).astype(np.float32)
    path = parquet(tmp_path / "l.parquet", ids_of(data), flat)
    with refused(out, "labels.output: its outputs lie within .0, 1. and do not sum to 1, .* or say logits"):
        stored(context(out, **{"from": str(path)}))
    assert same(stored(context(out, **{"from": str(path), "output": "logits"})), flat)


def test_a_student_that_cannot_be_trained_is_told_before_the_file_is_read(out: Path, tmp_path: Path) -> None:
    path = tmp_path / "l.parquet"
    path.write_bytes(b"no Parquet")
    labels = {"from": str(path)}
    write_data(configs.from_dict(RAW | {"labels": labels}), out, lambda split, ids: ids < 0)
    made = context(out, **labels)
    made.session.start = lambda: [Node(2, 0, 2**20)]  # type: ignore[method-assign]
    with refused(out, "student.train.batch_size 128: a step takes at least"):
        label.run(made)
    for section, told in (
        ({"loss": {"name": "ce"}}, "student.loss ce: learns from hard labels alone"),
        ({}, "l.parquet: is no whole Parquet file"),
    ):
        made = context(out, **labels)
        made.config = configs.from_dict(RAW | {"labels": labels, "student": RAW["student"] | section})
        with refused(out, told):
            label.run(made)


@contextmanager
def refused(out: Path, told: str) -> Any:
    before = sorted(out.glob("artifacts/labels-*/manifest.json"))
    with pytest.raises(UserError, match=told) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert sorted(out.glob("artifacts/labels-*/manifest.json")) == before


def test_partial_coverage_is_refused_with_counts_and_the_first_of_each(out: Path, data: Store, tmp_path: Path) -> None:
    names = ids_of(data)
    given = [*names[3:], names[7], names[9], "nobody/1", "nobody/2", "nobody/3"]
    path = parquet(tmp_path / "l.parquet", given, values(rows=len(given)))
    told = (
        rf"is not one row of logits for each row of the data: 3 of 310 rows missing \(the first: '{names[0]}'\), "
        rf"2 double \(the first: '{names[7]}'\), 3 unknown \(the first: 'nobody/1'\)"
    )
    with refused(out, told):
        stored(context(out, **{"from": str(path)}))


def test_what_is_no_logit_is_refused(out: Path, data: Store, tmp_path: Path) -> None:
    names, logits = ids_of(data), values()
    logits[12, 5] = np.inf
    path = parquet(tmp_path / "l.parquet", names, logits)
    with refused(out, rf"'{names[12]}' has a number that is not finite"):
        stored(context(out, **{"from": str(path)}))
    path.write_bytes(path.read_bytes()[:-30])
    with refused(out, "l.parquet: is no whole Parquet file"):
        stored(context(out, **{"from": str(path)}))
    parquet(path, names, values()[:, :7])
    with refused(out, rf"row 0 \(source_id '{names[0]}'\) has 7 numbers in column 'logits', the data has 62 classes"):
        stored(context(out, **{"from": str(path)}))
    parquet(path, names, values(), by="id")
    with refused(out, "has no column 'source_id', only id, logits"):
        stored(context(out, **{"from": str(path)}))
    pq.write_table(pa.table({"source_id": names, "a": values()[:, 0], "b": values()[:, 1]}), path)
    with refused(out, r"has 2 columns of floats \(a, b\), the data has 62 classes"):
        stored(context(out, **{"from": str(path)}))
    np.save(tmp_path / "n.npy", values()[:, :9])
    with refused(out, "n.npy: has 9 numbers a row, the data has 62 classes"):
        stored(context(out, **{"from": str(tmp_path / "n.npy")}))
    (tmp_path / "n.npy").write_bytes((tmp_path / "n.npy").read_bytes()[:-5])
    with refused(out, "n.npy: is no whole .npy array of numbers or text"):
        stored(context(out, **{"from": str(tmp_path / "n.npy")}))
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with refused(out, "o.npy: is no whole .npy array of numbers or text"):
        stored(context(out, **{"from": str(tmp_path / "o.npy")}))
    np.save(tmp_path / "m.npy", values(rows=300))
    with refused(out, "10 of 310 rows missing"):
        stored(context(out, **{"from": str(tmp_path / "m.npy")}))


def test_numbers_that_cannot_be_read_are_told_by_file_column_and_row(out: Path, data: Store, tmp_path: Path) -> None:
    names, logits = ids_of(data), values()
    (tmp_path / "parts").mkdir()
    path = tmp_path / "parts" / "1.parquet"
    parquet(tmp_path / "parts" / "0.parquet", names[:9], logits[:9])
    whole = [[int(number) for number in row] for row in logits]
    whole[200][3] = 2**24 + 1
    outputs = logit_files.Outputs(data.manifest.class_names)
    for column, told in (
        ([["a"] * CLASSES] * 301, r"1.parquet: column 'logits' holds string, expected numbers: cast it to float32"),
        (whole[9:], rf"1.parquet: row 200 \(source_id '{names[200]}'\) has 16777217 \(int64\) in column 'logits', "),
    ):
        pq.write_table(pa.table({"source_id": names[9:], "logits": column}), path)
        with refused(out, told):
            for _ in logit_files._read_parquet(str(tmp_path / "parts"), "source_id", outputs):
                pass
    classes = list(data.manifest.class_names)
    columns: dict[str, Any] = {name: logits[:, c] for c, name in enumerate(classes)}
    columns[classes[4]] = [row[4] for row in whole]
    columns[classes[4]][7] = 2**24 + 1
    pq.write_table(pa.table({"source_id": names, **columns}), tmp_path / "scalars.parquet")
    with refused(out, rf"scalars.parquet: row 7 \(source_id '{names[7]}'\) has 16777217 .* in column '{classes[4]}'"):
        stored(context(out, **{"from": str(tmp_path / "scalars.parquet")}))


def test_ids_that_are_not_those_of_the_data_are_told_by_file_and_row(out: Path, data: Store, tmp_path: Path) -> None:
    path = tmp_path / "l.parquet"
    numbers: list[Any] = list(map(str, range(310)))
    numbers[8] = "eight"
    for given, told in (
        (numbers, r"labels.from .*l.parquet: row_id 'eight' \(row 8, string\) is no int64, which the data's ids are"),
        ([*numbers[:5], None, *numbers[6:]], r"labels.from .*l.parquet: row 5 of the file has no row_id"),
    ):
        parquet(path, given, values(), by="row_id")
        with refused(out, told):
            stored(context(out, **{"from": str(path), "by": "row_id"}))
    np.save(tmp_path / "n.npy", values())
    np.save(tmp_path / "ids.npy", np.zeros(310, dtype=bool))
    with refused(out, r"labels.ids .*ids.npy: holds bool: save the ids as numbers or text"):
        stored(context(out, **{"from": str(tmp_path / "n.npy"), "ids": str(tmp_path / "ids.npy")}))


def test_the_scratch_lies_beside_the_runs_and_its_room_is_taken_at_once(
    out: Path, data: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "n.npy", values())
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    asked: list[int] = []

    def full(descriptor: int, start: int, size: int) -> None:
        asked.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with refused(out, rf"import-labels: {out}: no room for 0.1 MiB of logits .*No space left.*another --out"):
            stored(context(out, **{"from": str(tmp_path / "n.npy"), "by": "row_id"}))
    assert asked == [4 * 310 * CLASSES]
    before = sorted(path.name for path in out.iterdir())
    assert same(stored(context(out, **{"from": str(tmp_path / "n.npy"), "by": "row_id"})), values())
    assert sorted(path.name for path in out.iterdir()) == before
    with (
        pytest.raises(UserError, match=r"import-labels: /nowhere: no room for .*: make room there, or set TMPDIR"),
        import_labels._scratch((2, 3), Folder("s3://bucket/runs")),
    ):
        pass


def test_a_file_that_changes_between_measuring_and_writing_is_refused(out: Path, data: Store, tmp_path: Path) -> None:
    made = context(out, **{"from": str(tmp_path / "n.npy"), "by": "row_id"})
    np.save(tmp_path / "n.npy", values())
    store, model = prepare.run(made), teacher.run(made)
    target = label.locate(made.config, made.out, store, model)
    np.save(tmp_path / "n.npy", values(seed=1))
    with refused(out, "n.npy: changed while it was read"):
        import_labels.make(made, store, model, target)


def test_a_file_that_is_not_there(out: Path, tmp_path: Path) -> None:
    from distill_ray.stages.given import check_present

    for keys, told in (
        ({"from": "/no/x.npy"}, "labels.from /no/x.npy"),
        ({"ids": "/no/i.npy"}, "labels.ids /no/i.npy"),
    ):
        config = configs.from_dict(RAW | {"labels": {"from": str(tmp_path)} | keys})
        with pytest.raises(UserError, match=f"{told}: no such file or folder"):
            check_present(config)
    with pytest.raises(UserError, match=r"labels.from file:///no/x.parquet: no such file or folder"):
        logit_files.fingerprint("file:///no/x.parquet")


def test_the_config_says_one_place_that_logits_come_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labels.from and teacher: the logits come from one of them"):
        configs.from_dict(RAW | {"labels": {"from": "/x.npy"}, "teacher": {"model": {"name": "mlp"}}})
    with pytest.raises(
        UserError, match=r"labels: ids, by, output and classes describe labels that are read from a file"
    ):
        configs.from_dict(RAW | {"labels": {"ids": "/x.npy"}, "teacher": {"model": {"name": "mlp"}}})
    assert Folder.at(tmp_path).names() == []
