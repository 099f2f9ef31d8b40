"""init: a config that is ready to run, from data that others made; and what it says where it cannot tell."""

from __future__ import annotations

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
from distill_ray.starting import Wishes, first_config
from tests.harness import distill_ray, only


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


def test_a_folder_a_class_under_its_own_splits(tmp_path: Path) -> None:
    for number, (image, label) in enumerate(zip(*load_digits(return_X_y=True), strict=True)):
        if number == 200:
            break
        folder = tmp_path / ("test" if number % 4 == 0 else "train") / f"digit {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image.reshape(8, 8) * 15).astype(np.uint8)).save(folder / f"{number}.png")
    text = first_config(str(tmp_path), "png", Wishes())
    config = yaml.safe_load(text)
    assert config["data"] == {"source": "images", "path": str(tmp_path)}
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
