"""Searches that are hurt: killed, with trials that cannot be trained, out of time. Real commands, real kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.harness import COMMAND, RUN_TIMEOUT_S, distill_ray, environment, only, write_config

SEARCH: dict[str, Any] = {
    "name": "faulty",
    "data": {"source": "glyph62", "rows": 1240, "shard_rows": 620},
    "teacher": {"model": {"name": "mlp", "hidden": [32]}, "train": {"epochs": 1, "batch_size": 64}},
    "labels": {"precision": "fp32"},
    "student": {
        "model": {"name": "mlp", "hidden": [8]},
        "train": {"epochs": 4, "batch_size": 8, "precision": "fp32"},
    },
    "tune": {
        "space": {"model.hidden": {"choice": [[4], [6], [8], [12]]}, "loss.temperature": {"uniform": [1, 8]}},
        "search": "random", "scheduler": "asha", "trials": 8, "seeds": 1, "finalists": 1,
    },
}  # fmt: skip


def searched(folder: Path, **tune: Any) -> tuple[Path, Path]:
    return write_config(folder, SEARCH | {"tune": SEARCH["tune"] | tune}), folder / "runs"


def trials_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(only(out, "artifacts/tune-*") / "trials.parquet").to_pylist()
    return rows


def test_a_killed_search_goes_on_with_the_same_command(tmp_path: Path) -> None:
    config, out = searched(tmp_path)
    trained = kill_when(["tune", config, "--out", out], lambda: finished_students(out), at_least=2)
    kept = {folder: (folder / "metrics.jsonl").read_bytes() for folder in trained}
    written = {folder: (folder / "metrics.jsonl").stat().st_mtime_ns for folder in trained}
    runs = {folder: (folder / "tracking.json").read_bytes() for folder in trained}
    labels = only(out, "artifacts/labels-*/manifest.json").stat().st_mtime_ns

    done = distill_ray("tune", config, "--out", out, "--json")
    assert done.code == 0, done.stderr
    rows = trials_of(out)
    assert [row["id"] for row in rows] == list(range(8)), "the number of trials that was asked for"
    assert trained <= {Path(row["folder"]) for row in rows}, "the same were sampled"
    for folder in trained:
        assert (folder / "metrics.jsonl").read_bytes() == kept[folder]
        assert (folder / "metrics.jsonl").stat().st_mtime_ns == written[folder], "trained again"
        assert (folder / "tracking.json").read_bytes() == runs[folder], "W&B keeps its run"
    assert only(out, "artifacts/labels-*/manifest.json").stat().st_mtime_ns == labels
    assert {row["status"] for row in rows} <= {"completed", "stopped"}


def kill_when(arguments: list[Any], found: Any, at_least: int) -> set[Path]:
    """SIGKILL the command and all below it once so many are found; what is found then."""
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)], start_new_session=True, env=environment(), stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + RUN_TIMEOUT_S
        try:
            while len(found()) < at_least:
                assert process.poll() is None, "it ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    there: set[Path] = found()
    return there


def finished_students(out: Path) -> set[Path]:
    """Folders of students that are trained to their last epoch."""
    return {
        path.parent
        for path in out.glob("artifacts/student-*/metrics.jsonl")
        if len(path.read_text().splitlines()) == SEARCH["student"]["train"]["epochs"]
        and (path.parent / "model.safetensors").exists()
    }


def test_a_trial_that_diverges_is_told_and_the_search_goes_on(tmp_path: Path) -> None:
    space = {"train.lr": {"grid": [0.001, 1e30]}, "loss.temperature": {"grid": [2.0, 4.0]}}
    config, out = searched(tmp_path, space=space, search="grid", scheduler="none")
    done = distill_ray("tune", config, "--out", out, "--json")
    assert done.code == 0, done.stderr
    rows = trials_of(out)
    assert {row["train.lr"]: row["status"] for row in rows} == {0.001: "completed", 1e30: "failed"}
    for row in rows:
        if row["status"] == "failed":
            assert "the loss is not finite at step" in row["reason"]
            assert "lower train.lr" in row["reason"]
    assert done.answer["tune"]["counts"] == {"completed": 2, "failed": 2}

    config, out = searched(tmp_path, space={"train.lr": {"choice": [1e30, 1e31]}}, trials=2)
    failed = distill_ray("tune", config, "--out", out, "--json")
    assert failed.code == 1
    told = json.loads(failed.stdout.splitlines()[-1])["error"]
    assert told.startswith("tune: none of 2 trials reached its last epoch")
    assert "the first: the loss is not finite" in told
    assert told.endswith("mend that, or leave such values out of tune.space")


def test_a_search_ends_when_its_minutes_are_over(tmp_path: Path) -> None:
    student = {**SEARCH["student"], "loss": {"name": "ce"}, "train": {"epochs": 2, "batch_size": 64}}
    space = {"train.lr": {"loguniform": [1e-4, 1e-2]}}
    section = SEARCH["tune"] | {"space": space, "trials": 5000, "minutes": 0.6}
    config, out = write_config(tmp_path, SEARCH | {"student": student, "tune": section}), tmp_path / "runs"
    done = distill_ray("tune", config, "--out", out, "--json")
    assert done.code == 0, done.stderr
    rows = trials_of(out)
    assert 0 < len(rows) < 5000
    assert {row["status"] for row in rows} <= {"completed", "stopped"}
    late = [row["id"] for row in rows if row["reason"] == "the minutes of tune.minutes were over"]
    assert all(number >= len(rows) - 4 for number in late), "the last that were begun, two at a time"
    assert done.answer["tune"]["trials"] == len(rows)
