"""init: a config that is ready to run, from data that others made; and what it says where it cannot tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits, load_wine

from distill_ray import config as configs
from distill_ray.errors import UserError
from distill_ray.sources import SPLITS, info_of, open_source
from distill_ray.starting import Wishes, first_config
from tests.harness import distill_ray, only
from tests.own_data import pixels, png, write_parquet


def started(path: Path, **wishes: Any) -> dict[str, Any]:
    text = first_config(str(path), "first", Wishes(**wishes))
    configs.from_dict(yaml.safe_load(text))
    answer = yaml.safe_load(text)
    assert isinstance(answer, dict)
    return answer


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """scikit-learn's digits: 1,797 rows of 64 numbers, ten classes."""
    found = load_digits()
    pixels = pa.FixedSizeListArray.from_arrays(pa.array(found.data.astype(np.float32).ravel()), 64)
    ids = [f"d{n}" for n in range(len(found.data))]
    pq.write_table(pa.table({"id": ids, "pixels": pixels, "label": found.target}), tmp_path / "digits.parquet")
    return tmp_path / "digits.parquet"


def test_a_list_column_is_the_input(digits: Path) -> None:
    config = started(digits)
    assert config["data"]["columns"] == {"input": "pixels", "label": "label", "id": "id"}
    assert config["data"]["input"] == {"mean": "auto", "std": "auto"}
    assert config["teacher"]["model"]["name"] == "mlp"


def test_a_table_is_all_its_numbers_but_the_label(tmp_path: Path) -> None:
    frame = load_wine(as_frame=True).frame
    frame["note"] = "text that is no input"
    frame.to_parquet(tmp_path / "wine.parquet")
    text = first_config(str(tmp_path / "wine.parquet"), "wine", Wishes())
    columns = yaml.safe_load(text)["data"]["columns"]
    assert len(columns["input"]) == 13
    assert columns["label"] == "target"
    assert "# not used: note" in text
    assert "from 48 rows (2) to 71 (1)" in text
    assert "# about 200 steps" in text  # 100 epochs of 2 batches: 142 of 178 rows, 128 at a time


@pytest.mark.parametrize(
    ("columns", "label", "inputs"),
    [
        ({"a": 0.5, "b": 1, "label": "cat", "target": 1, "class": 2, "Y": 1}, "label", ["a", "b"]),
        ({"a": 0.5, "b": 1, "class": "cat", "y": 1.0}, "class", ["a", "b"]),
        ({"a": 0.5, "b": 1, "label": 0, "__index_level_0__": 3, "Unnamed: 0": 3, "index": 3}, "label", ["a", "b"]),
        ({"id": 3, "sample_id": 3, "image id": 3, "PassengerId": 3, "a": 0.5, "paid": 1, "label": 0}, "label",
         ["a", "paid"]),
        ({"kind": "cat", "kind_code": 1, "label_encoded": 1, "true_label": 1, "a": 0.5, "b": 1}, "kind",
         ["a", "b"]),
        ({"x": 0.5, "y": 0.5, "label": "cat"}, "label", ["x", "y"]),  # coordinates
    ],
)  # fmt: skip
def test_what_may_say_the_class_or_the_row_is_no_input_of_a_table(
    tmp_path: Path, columns: dict[str, Any], label: str, inputs: list[str]
) -> None:
    made = {name: [f"{value}{n % 2}" if isinstance(value, str) else value + n for n in range(40)]
            for name, value in columns.items()}  # fmt: skip
    made[label] = [n % 2 for n in range(40)]
    path = write_parquet(tmp_path / "own.parquet", made)
    text = first_config(str(path), "own", Wishes(label=label))
    assert yaml.safe_load(text)["data"]["columns"]["input"] == inputs
    left = [name for name in columns if name not in (*inputs, label, "id")]
    said = f"by its name each of {', '.join(left)} is another label, id or row number"
    assert (said in text) == bool(left), text
    for name in left:  # who means it, says so
        assert started(path, label=label, input=(name, inputs[0]))["data"]["columns"]["input"] == [name, inputs[0]]


def test_the_label_is_no_input(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "own.parquet", {"x": np.arange(40.0), "label": [0, 1] * 20})
    with pytest.raises(UserError, match="init: --input label: it is the column of the labels"):
        started(path, input=("x", "label"))
    config = started(path)
    for names in ("label", ["x", "label"]):
        config["data"]["columns"]["input"] = names
        with pytest.raises(UserError, match=r"columns.*'label' is the column of the labels: what is to be learned is"):
            configs.from_dict(config)


def test_a_folder_a_class_under_its_own_splits(tmp_path: Path) -> None:
    for number, (image, label) in enumerate(zip(*load_digits(return_X_y=True), strict=True)):
        if number == 200:
            break
        folder = tmp_path / ("test" if number % 4 == 0 else "train") / f"digit {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image.reshape(8, 8) * 15).astype(np.uint8)).save(folder / f"{number}.png")
    text = first_config(str(tmp_path), "png", Wishes())
    config = yaml.safe_load(text)
    # Validation rows are cut from the training rows, of every class some.
    split = {"fractions": [0.9, 0.1], "stratify": True}
    assert config["data"] == {"source": "images", "path": str(tmp_path), "split": split}
    assert config["teacher"]["model"]["name"] == "char_cnn"
    assert "the data's own (test, train)" in text


def test_a_column_of_splits_is_taken(tmp_path: Path) -> None:
    rows = {
        "x": np.arange(90.0),
        "z": np.arange(90.0),
        "y": np.arange(90) // 3 % 3,
        "split": ["train", "val", "test"] * 30,
    }
    pq.write_table(pa.table(rows), tmp_path / "own.parquet")
    config = started(tmp_path / "own.parquet")
    assert config["data"]["split"] == {"column": "split"}
    assert config["data"]["columns"] == {"input": ["x", "z"], "label": "y"}


def written_images(root: Path, folders: tuple[str, ...], side: int = 8) -> Path:
    """60 images of two classes below these folders."""
    for number in range(60):
        folder = root / folders[number % len(folders)] / ("cat", "dog")[number // len(folders) % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(pixels(1, side, side, seed=number)[0]))
    return root


def written_table(root: Path, parts: tuple[str, ...]) -> Path:
    """60 rows of two numbers with a column of splits."""
    columns = {"x": np.arange(60.0), "z": np.arange(60.0), "y": np.arange(60) // len(parts) % 2}
    return write_parquet(root / "rows.parquet", columns | {"split": [parts[n % len(parts)] for n in range(60)]})


def written_dataset(root: Path, parts: tuple[str, ...]) -> Path:
    """A dataset of 30 rows for each of these splits."""
    import datasets

    rows = {"row": [[float(n), 1.0] for n in range(30)], "label": [n % 2 for n in range(30)]}
    datasets.DatasetDict({part: datasets.Dataset.from_dict(rows) for part in parts}).save_to_disk(root)
    return root


OWN_SPLITS = [
    (("train", "val", "test"), None, ""),
    (("train", "test"), {"fractions": [0.9, 0.1], "stratify": True}, "validation cut from train"),
    (
        ("train", "val"),
        {"values": {"train": ["train"], "test": ["val"]}, "fractions": [0.9, 0.1], "stratify": True},
        "its val is our test; validation cut from train",
    ),
    (("train",), {"fractions": [0.8, 0.1, 0.1], "stratify": True}, "validation and test cut from train"),
    (
        ("test",), {"values": {"train": ["test"]}, "fractions": [0.8, 0.1, 0.1], "stratify": True},
        "its test is our train; validation and test cut from train",
    ),
    (
        ("validation", "test"),
        {"values": {"train": ["validation"], "test": ["test"]}, "fractions": [0.9, 0.1], "stratify": True},
        "its validation is our train; validation cut from train",
    ),
]  # fmt: skip


@pytest.mark.parametrize("write", [written_images, written_table, written_dataset])
@pytest.mark.parametrize(("parts", "split", "said"), OWN_SPLITS)
def test_whatever_splits_the_data_has_every_one_of_ours_gets_rows(
    tmp_path: Path, write: Callable[..., Path], parts: tuple[str, ...], split: dict[str, Any] | None, said: str
) -> None:
    text = first_config(str(write(tmp_path / "own", parts)), "own", Wishes())
    found = yaml.safe_load(text)["data"].get("split", {})
    assert {key: value for key, value in found.items() if key != "column"} == (split or {})
    assert said in text
    info = info_of(open_source(configs.from_dict(yaml.safe_load(text)).data))
    assert {name: len(rows) > 0 for name, rows in info.splits.items()} == dict.fromkeys(SPLITS, True)


@pytest.mark.parametrize("write", [written_images, written_table, written_dataset])
def test_data_without_a_test_split_is_prepared_as_init_has_written(tmp_path: Path, write: Callable[..., Path]) -> None:
    config = tmp_path / "own.yaml"
    assert distill_ray("init", write(tmp_path / "own", ("train", "val")), "--config", config).code == 0
    done = distill_ray("prepare", config, "--out", tmp_path / "runs")
    assert done.code == 0, done.stderr
    assert only(tmp_path, "runs/artifacts/data-*/manifest.json")


def test_splits_whose_names_say_nothing_are_left_out_or_all_are_train(tmp_path: Path) -> None:
    some = started(written_dataset(tmp_path / "some", ("train", "test", "extra")))
    assert some["data"]["split"]["values"] == {"train": ["train"], "test": ["test"]}
    none = started(written_dataset(tmp_path / "none", ("2019", "2020")))
    assert none["data"]["split"]["values"] == {"train": ["2019", "2020"]}
    table = first_config(str(written_table(tmp_path / "table", ("a", "b"))), "table", Wishes())
    assert "column" not in yaml.safe_load(table)["data"]["split"]
    assert "# not used: split" in table
    with pytest.raises(UserError, match=r"init: --split split: it holds 'a', which means no split"):
        started(tmp_path / "table" / "rows.parquet", split="split")


def test_rare_classes_are_divided_such_that_each_is_in_train(tmp_path: Path) -> None:
    """By chance one in five of the classes of one row would have it in another split."""
    labels = ["common"] * 60 + [f"rare {n}" for n in range(40)]
    write_parquet(tmp_path / "rows.parquet", {"x": np.arange(100.0), "label": labels})
    config = configs.from_dict(started(tmp_path / "rows.parquet"))
    assert set(info_of(open_source(config.data)).splits) == set(SPLITS)
    write_parquet(tmp_path / "few.parquet", {"x": np.arange(30.0), "label": [0] * 15 + [1] * 15})
    assert started(tmp_path / "few.parquet")["data"]["split"]["stratify"] is True


@pytest.mark.parametrize(
    ("parts", "split"),
    [
        (("Training", "Testing"), {"fractions": [0.9, 0.1], "stratify": True}), (("TRAIN", "Val", "Test"), None),
    ],
)  # fmt: skip
def test_splits_may_be_spelled_otherwise(tmp_path: Path, parts: tuple[str, ...], split: dict[str, Any] | None) -> None:
    writers: list[Callable[..., Path]] = [written_images, written_table, written_dataset]
    for number, write in enumerate(writers):
        config = started(write(tmp_path / str(number), parts))
        found = config["data"].get("split", {})
        assert {key: value for key, value in found.items() if key != "column"} == (split or {})
        info = info_of(open_source(configs.from_dict(config).data))
        assert info.class_names == (("cat", "dog") if number == 0 else ("0", "1"))
        assert len(info.splits["test"]) >= 20


@pytest.mark.parametrize(
    ("shape", "dtype", "auto"),
    [((12,), "uint8", True), ((4, 3), "uint8", True), ((3, 4, 4), "uint8", False), ((1, 4, 4), "float32", True)],
)
def test_inputs_that_are_no_pictures_are_brought_to_one_scale(
    tmp_path: Path, shape: tuple[int, ...], dtype: str, auto: bool
) -> None:
    values = np.random.default_rng(0).integers(0, 256, (40, *shape)).astype(dtype)
    kind = pa.from_numpy_dtype(dtype)
    for _ in shape:
        kind = pa.list_(kind)
    path = write_parquet(tmp_path / "own.parquet", {"x": pa.array(values.tolist(), kind), "label": [0, 1] * 20})
    assert started(path)["data"].get("input") == ({"mean": "auto", "std": "auto"} if auto else None)


def test_images_of_several_sizes_are_resized_and_large_ones_lie_in_small_shards(tmp_path: Path) -> None:
    written_images(tmp_path / "mixed", ("",), 8)
    (tmp_path / "mixed" / "dog" / "59.png").write_bytes(png(pixels(1, 10, 12)[0]))
    text = first_config(str(tmp_path / "mixed"), "mixed", Wishes())
    assert yaml.safe_load(text)["data"]["input"] == {"resize": [8, 8]}
    assert "those looked at have 8 to 10 by 8 to 12" in text
    for name in ("1", "2"):
        for number in range(10):
            place = tmp_path / "large" / name / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(png(np.full((300, 300, 3), number, np.uint8)))
    data = started(tmp_path / "large")["data"]
    assert "input" not in data
    assert data["shard_rows"] == 128
    assert data["shard_rows"] * 3 * 300 * 300 <= 100 * 2**20


def test_what_is_taken_by_its_name_can_be_left_out(tmp_path: Path) -> None:
    columns = {"x": np.arange(60.0), "z": np.arange(60.0), "y": np.arange(60) // 3 % 2, "key": [7, 8] * 30}
    path = write_parquet(tmp_path / "own.parquet", columns | {"split": ["train", "val", "test"] * 20})
    with pytest.raises(UserError, match=r"is the id of two rows.*\(init took the column by its name: --no-id leaves"):
        started(path)
    found = started(path, no_id=True)["data"]
    assert found["columns"] == {"input": ["x", "z"], "label": "y"}  # the ids are no input, either
    assert found["split"] == {"column": "split"}
    assert started(path, no_id=True, no_split=True)["data"]["split"] == {
        "fractions": [0.8, 0.1, 0.1], "stratify": True
    }  # fmt: skip
    done = distill_ray("init", path, "--id", "key", "--no-id", "--config", tmp_path / "own.yaml")
    assert (done.code, "--id key and --no-id contradict each other" in done.stderr) == (2, True)
    done = distill_ray("init", path, "--no-id", "--no-split", "--config", tmp_path / "own.yaml")
    assert done.code == 0, done.stderr


@pytest.mark.parametrize(
    "odd",
    [
        "two\nlines", "x\nteacher: {model: {name: evil}}", "#", "a: b", "tab\t", "\u2028line", "\x85next", "'\"", "🦊",
        "-", "]}", "\ufeff",
    ],
)  # fmt: skip
def test_names_may_hold_anything(tmp_path: Path, odd: str) -> None:
    """Of columns and of classes: each is in the YAML as a value or in a comment, and neither ends early."""
    columns = {odd: np.arange(60.0), f"{odd}2": np.arange(60.0), f"{odd}3": ["text"] * 60}
    path = write_parquet(tmp_path / "own.parquet", columns | {f"{odd}4": [odd, "other"] * 30})
    text = first_config(str(path), "own", Wishes(label=f"{odd}4"))
    config = yaml.safe_load(text)
    assert list(config) == ["name", "data", "teacher", "student"]
    assert config["data"]["columns"] == {"input": [odd, f"{odd}2"], "label": f"{odd}4"}
    assert config["teacher"]["model"]["name"] == "mlp"
    assert len(text.splitlines()) == text.count("\n")  # whatever else may be taken as the end of a line


def test_without_a_column_of_labels_it_says_which_there_are(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "own.parquet", {"x": np.arange(60.0), "which": ["a", "b"] * 30})
    with pytest.raises(UserError, match=r"no column is known to hold the classes \(there are: x, which\).*--label"):
        started(path)


def test_uneven_classes_are_told(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"x": np.arange(200.0), "label": ["rare"] * 20 + ["often"] * 180}), tmp_path / "own.parquet"
    )
    assert "class_weights: balanced" in first_config(str(tmp_path / "own.parquet"), "own", Wishes())


@pytest.mark.parametrize(
    ("columns", "wishes", "told"),
    [
        (
            {"a": [[1.0, 2.0]] * 4, "b": [[1.0, 2.0]] * 4, "label": [0, 1] * 2},
            {},
            "2 columns could be the input (a, b)",
        ),
        ({"when": pa.array([0, 1], pa.timestamp("s")), "label": [0, 1]}, {}, "no column can be the input"),
        ({"pixels": [[1.0, 2.0]] * 2, "label": [0, 1]}, {"label": "lable"}, "no column 'lable': did you mean 'label'?"),
        (
            {"pixels": [[1.0, 2.0]] * 2, "label": [0, 1]},
            {"source": "images", "input": ("pixels",)},
            "no columns to name",
        ),
    ],
)
def test_what_it_cannot_tell_it_asks_for(
    tmp_path: Path, columns: dict[str, Any], wishes: dict[str, Any], told: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "own.parquet")
    with pytest.raises(UserError) as caught:
        started(tmp_path / "own.parquet", **wishes)
    assert told in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more"])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "own.parquet").write_bytes(content)
    with pytest.raises(UserError, match="own.parquet"):
        started(tmp_path / "own.parquet")


def test_nothing_there_and_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        started(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="name what it is with --source"):
        started(tmp_path)


def test_written_and_run_as_it_says(digits: Path, tmp_path: Path) -> None:
    """The ten minutes of the documentation, with fewer epochs: two commands, a student of one's own data."""
    config = tmp_path / "digits.yaml"
    written = distill_ray("init", digits, "--config", config)
    assert (written.code, written.stderr) == (0, "")
    assert f"distill-ray run {config}" in written.stdout
    refused = distill_ray("init", digits, "--config", config)
    assert refused.code == 2
    assert "is there already" in refused.stderr
    fewer = ["teacher.train.epochs=15", "student.train.epochs=30", "student.seeds=[0]"]
    done = distill_ray("run", config, *fewer, "--out", tmp_path / "runs", "--json")
    assert done.code == 0, done.stderr
    teacher, student, control = done.answer["rows"]
    assert min(row["accuracy"] for row in (teacher, student, control)) > 0.85
    assert student["parameters"] < teacher["parameters"] / 20
    assert only(tmp_path, "runs/artifacts/labels-*/manifest.json")
