"""Kills in the middle of each stage: the same command finishes, and ends where an undisturbed run ends."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SmallRun
from tests.harness import SMALL_RUN, distill_ray, epochs_done, kill_workers, only, stop_when, write_config


def _weights(out: Path) -> dict[str, str]:
    summaries = [*out.glob("artifacts/teacher-*/summary.json"), *out.glob("artifacts/student-*/summary.json")]
    return {path.parent.name: json.loads(path.read_text())["weights_sha256"] for path in summaries}


def _label_shards(out: Path) -> dict[str, int]:
    """Whole shards by name; a file that a killed writer had not yet renamed starts with a dot."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("artifacts/labels-*/[!.]*.arrow")}


def test_killed_in_every_stage_and_finished_by_the_same_command(small_run: SmallRun, tmp_path: Path) -> None:
    config, out = write_config(tmp_path, SMALL_RUN), tmp_path / "runs"
    arguments: list[str | Path] = ["run", config, "--out", out]

    stop_when(arguments, lambda: epochs_done(out, "teacher") >= 2, signal.SIGKILL)
    trained = epochs_done(out, "teacher")
    assert 2 <= trained < 6
    assert not list(out.glob("artifacts/teacher-*/summary.json"))

    lines_before = only(out, "artifacts/teacher-*/metrics.jsonl").read_text().splitlines()
    stop_when(arguments, lambda: len(_label_shards(out)) >= 3, signal.SIGKILL)
    lines_after = only(out, "artifacts/teacher-*/metrics.jsonl").read_text().splitlines()
    # With their seconds: finished epochs were not trained again.
    assert lines_after[: len(lines_before)] == lines_before
    written = _label_shards(out)
    assert not list(out.glob("artifacts/labels-*/manifest.json"))

    stop_when(arguments, lambda: epochs_done(out, "student") >= 3, signal.SIGKILL)
    kept = _label_shards(out)
    assert {name: kept.get(name) for name in written} == written  # not written again
    students = {path: path.read_text().splitlines() for path in out.glob("artifacts/student-*/metrics.jsonl")}

    finished = distill_ray(*arguments, "--json")
    assert finished.code == 0, finished.stderr
    for path, lines in students.items():
        assert path.read_text().splitlines()[: len(lines)] == lines
    # fp32 on the CPU at one worker count: bitwise the weights of the run that nobody disturbed.
    assert _weights(out) == _weights(small_run.out)
    for ours, theirs in zip(finished.answer["rows"], small_run.finished.answer["rows"], strict=True):
        assert ours["accuracy"] == theirs["accuracy"]
        assert ours["kl_to_teacher"] == pytest.approx(theirs["kl_to_teacher"], abs=1e-6)


def test_a_worker_killed_in_every_stage_costs_no_more_than_its_epoch_or_shard(
    small_run: SmallRun, tmp_path: Path
) -> None:
    """Ray starts the process again within the same command, and the end is that of the run that nobody disturbed."""
    config, out = write_config(tmp_path, SMALL_RUN), tmp_path / "runs"
    finished, killed = kill_workers(
        ["run", config, "--out", out, "--json"],
        [
            (lambda: epochs_done(out, "teacher") >= 2, "RayTrainWorker"),
            (lambda: len(_label_shards(out)) >= 2, "MapWorker"),
            (lambda: epochs_done(out, "student") >= 2, "train_student"),
        ],
    )
    assert finished.code == 0, finished.stderr
    assert len(killed) == 3, killed
    assert _weights(out) == _weights(small_run.out)
    assert {s["name"]: s["status"] for s in finished.answer["stages"]} == dict.fromkeys(
        ("prepare", "teacher", "label", "student"), "ran"
    )


def _teacher_has_begun(out: Path) -> bool:
    return epochs_done(out, "teacher") >= 1


def _prepare_has_begun(out: Path) -> bool:
    return any(out.glob("artifacts/data-*/*.arrow"))


@pytest.mark.parametrize(
    ("how", "reached"), [(signal.SIGINT, _teacher_has_begun), (signal.SIGTERM, _prepare_has_begun)]
)
def test_interrupted_says_so_in_one_line_and_leaves_what_continues(
    tmp_path: Path, how: signal.Signals, reached: Callable[[Path], bool]
) -> None:
    config, out = write_config(tmp_path, SMALL_RUN), tmp_path / "runs"
    # More epochs than it will do: while Ray is being shut down after the last, nothing is left to interrupt.
    many = "teacher.train.epochs=2000"
    stopped = stop_when(["teacher", config, many, "--out", out], lambda: reached(out), how)
    assert stopped.code == 130
    assert stopped.stderr.splitlines()[-1].startswith("distill-ray: interrupted")
    assert "Traceback" not in stopped.stderr
    assert list(out.glob("artifacts/data-*/*.arrow"))
    assert bool(list(out.glob("artifacts/teacher-*/checkpoints/*.safetensors"))) == (how is signal.SIGINT)


@pytest.mark.slow
def test_a_head_that_is_gone_ends_the_run_in_one_line(tmp_path: Path) -> None:
    """Ray itself would end the process without a word, a minute later."""
    config, out = write_config(tmp_path, SMALL_RUN), tmp_path / "runs"
    finished, killed = kill_workers(
        ["run", config, "student.train.epochs=2000", "--out", out],
        [(lambda: epochs_done(out, "student") >= 2, "gcs_server")],
    )
    assert len(killed) == 1
    assert finished.code == 1
    assert "the Ray head at" in finished.stderr.splitlines()[-1]
    assert finished.stderr.splitlines()[-1].startswith("distill-ray: ")


def test_a_diverging_teacher_ends_in_one_line_also_on_two_workers(tmp_path: Path) -> None:
    """Every rank fails, and Ray Train must not try again what will fail again."""
    config = write_config(tmp_path, SMALL_RUN | {"cluster": {"workers": 2, "cpus_per_worker": 1}})
    done = distill_ray("teacher", config, "teacher.train.lr=1e30", "--out", tmp_path / "runs")
    assert done.code == 1, done.stderr
    assert "distill-ray: teacher: the loss is not finite at step" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("runs/artifacts/teacher-*/failure.json"))
    assert list(tmp_path.glob("runs/artifacts/data-*/manifest.json"))


def test_a_damaged_stage_folder_is_made_again_and_the_others_are_not(own_copy: SmallRun) -> None:
    """A truncated manifest, as a disk that lost its tail would leave it, in a copy of the finished run."""
    out = own_copy.out
    manifest = only(out, "artifacts/labels-*/manifest.json")
    manifest.write_bytes(manifest.read_bytes()[:100])
    shards = _label_shards(out)
    done = distill_ray("label", own_copy.config, "--out", out, "--json")
    assert done.code == 0, done.stderr
    assert [(s["name"], s["status"]) for s in done.answer["stages"]] == [
        ("prepare", "reused"),
        ("teacher", "reused"),
        ("label", "ran"),
    ]
    assert _label_shards(out) == shards  # every shard still passed its checksum and was kept
    assert json.loads(manifest.read_bytes())["kind"] == "labels"
