"""The whole pipeline by the real command, on data that tools of others made."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_breast_cancer, load_digits

from distill_ray import load_model
from tests.harness import distill_ray, only, write_config
from tests.own_data import write_parquet

TRAIN = {"epochs": 20, "batch_size": 64, "precision": "fp32", "lr": 0.005}
MODELS: dict[str, Any] = {
    "teacher": {"model": {"name": "mlp", "hidden": [64]}, "train": TRAIN},
    "labels": {"precision": "fp32"},
    "student": {"model": {"name": "mlp", "hidden": [16]}, "train": TRAIN},
    "tracking": {"wandb": {"mode": "disabled"}},
}
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """UCI's handwritten digits as scikit-learn bundles them: 1,797 images [8, 8] of 0 to 16, and what they show."""
    found = load_digits()
    return (found.images * 15).astype(np.uint8), found.target.astype(np.int64)


def run(tmp_path: Path, data: dict[str, Any], **more: Any) -> dict[str, Any]:
    config = write_config(tmp_path, {"name": "own", "data": {"shard_rows": 256, **data}, **MODELS, **more})
    done = distill_ray("run", config, "--out", tmp_path / "runs", "--json")
    assert done.code == 0, done.stderr
    assert "macro F1" in done.stdout
    assert "warning" not in done.stderr, done.stderr
    verified = distill_ray("verify", only(tmp_path / "runs" / "artifacts", "labels-*"))
    assert verified.code == 0, verified.stderr
    return done.answer


def test_digits_as_parquet(tmp_path: Path) -> None:
    images, labels = digits()
    columns = {"pixels": images.tolist(), "digit": [NAMES[label] for label in labels]}
    path = write_parquet(tmp_path / "digits.parquet", columns, row_group_size=200)
    weights = {"class_weights": "balanced"}
    answer = run(
        tmp_path,
        {"source": "parquet", "path": str(path), "columns": {"input": "pixels", "label": "digit"},
         "split": {"stratify": True}, "input": {"mean": "auto", "std": "auto", "shape": [1, 8, 8]}},
        teacher=MODELS["teacher"] | {"loss": weights}, student=MODELS["student"] | {"loss": weights},
    )  # fmt: skip
    teacher, student, control = answer["rows"]
    assert teacher["accuracy"] > 0.9
    assert student["accuracy"] > 0.8
    assert control["loss"]["class_weights"] == "balanced"
    model = load_model(teacher["folder"])
    guess = model(torch.from_numpy(images[:200].astype(np.int64)[:, np.newaxis])).argmax(dim=1)
    names = tuple(sorted(NAMES))
    assert np.mean([names[g] == NAMES[label] for g, label in zip(guess.tolist(), labels[:200], strict=True)]) > 0.9


@pytest.mark.slow
def test_a_table_of_measurements(tmp_path: Path) -> None:
    """UCI's breast cancer data: 569 rows of 30 numbers of very different size; unscaled, nothing is learnt."""
    found = load_breast_cancer(as_frame=True)
    frame = found.frame
    path = tmp_path / "cancer.parquet"
    pa.parquet.write_table(pa.Table.from_pandas(frame, preserve_index=False), path)
    data = {
        "source": "parquet", "path": str(path),
        "columns": {"input": [str(name) for name in found.feature_names], "label": "target"},
        "input": {"mean": "auto", "std": "auto"}, "split": {"stratify": True}, "class_names": ["malignant", "benign"],
    }  # fmt: skip
    answer = run(tmp_path, data)
    assert answer["rows"][0]["accuracy"] > 0.85


def letters(folder: Path) -> pd.DataFrame:
    """UCI's letter recognition: 20,000 rows of 16 numbers and a letter, from Debian's package of R's mlbench."""
    import pyreadr

    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("UCI Letter comes from a Debian package, and there is no apt-get here")
    for command in (["apt-get", "-qq", "download", "r-cran-mlbench"], ["dpkg-deb", "-x", "mlbench.deb", "."]):
        for package in folder.glob("r-cran-mlbench_*.deb"):
            package.rename(folder / "mlbench.deb")
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"UCI Letter: {' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}")
    frame = pyreadr.read_r(str(only(folder, "usr/lib/R/site-library/mlbench/data/LetterRecognition.rda")))
    return frame["LetterRecognition"]


@pytest.mark.slow
def test_letters_as_a_table(tmp_path: Path) -> None:
    frame = letters(tmp_path)
    assert len(frame) == 20_000
    frame["lettr"] = frame["lettr"].astype(str)
    frame["set"] = ["train"] * 16_000 + ["test"] * 4_000  # as the data's own description divides them
    path = tmp_path / "letters.parquet"
    frame.to_parquet(path)
    measured = [name for name in frame.columns if name not in ("lettr", "set")]
    data = {
        "source": "parquet", "path": str(path), "columns": {"input": measured, "label": "lettr"},
        "input": {"mean": "auto", "std": "auto"}, "split": {"column": "set", "stratify": True}, "shard_rows": 2048,
    }  # fmt: skip
    answer = run(tmp_path, data)
    assert answer["rows"][0]["accuracy"] > 0.85
    assert answer["rows"][1]["accuracy"] > 0.6


@pytest.mark.slow
def test_digits_as_png_files_in_a_folder_a_class(tmp_path: Path) -> None:
    images, labels = digits()
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "set" / ("test" if number % 5 == 0 else "train") / NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    data = {"source": "images", "path": str(tmp_path / "set"), "input": {"resize": [12, 12]}}
    answer = run(tmp_path, data)
    assert answer["rows"][0]["accuracy"] > 0.85


@pytest.mark.slow
def test_digits_as_a_saved_hugging_face_dataset(tmp_path: Path) -> None:
    import datasets

    images, labels = digits()
    features = datasets.Features(image=datasets.Image(), digit=datasets.ClassLabel(names=list(NAMES)))
    whole = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in images], "digit": labels.tolist()}, features=features
    )
    whole.train_test_split(test_size=0.2, seed=0, stratify_by_column="digit").save_to_disk(tmp_path / "saved")
    data = {
        "source": "huggingface", "path": str(tmp_path / "saved"), "columns": {"input": "image", "label": "digit"},
        "split": {"stratify": True},
    }  # fmt: skip
    answer = run(tmp_path, data)
    assert answer["rows"][0]["accuracy"] > 0.85
