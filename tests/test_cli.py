"""The command line with bad input: one line on stderr, exit 2, nothing lost. Through the real command."""

from __future__ import annotations

import gzip
import os
import pty
import resource
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import SmallRun
from tests.harness import (
    COMMAND,
    RUN_TIMEOUT_S,
    SMALL_RUN,
    distill_ray,
    environment,
    only,
    with_processes,
    write_config,
)

TINY: dict[str, Any] = {**SMALL_RUN, "name": "tiny"}


def _assert_one_line(code: int, stderr: str, expected_code: int, *parts: str) -> None:
    assert code == expected_code, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("distill-ray: ")]
    assert len(lines) == 1, stderr
    assert stderr.splitlines()[-1] == lines[0]
    assert "Traceback" not in stderr
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("student.loss.temprature=3", ["student.loss.temprature", "did you mean 'temperature'"]),
        ("student.loss.temperature=warm", ["student.loss.temperature", "number", "'warm'"]),
        ("data.split.fractions=[0.5, 0.6]", ["data.split.fractions", "sum to 1"]),
        ("data={source: idx, path: /no/such/folder}", ["/no/such/folder", "no such folder"]),
        ("data.shard_rows=1000000", ["data.shard_rows", "100 MiB", "at most"]),
        ("data.input.shape=[3, 32, 32]", ["data.input.shape", "[3, 32, 32]", "[1, 32, 32]"]),
        ("data.rows=61", ["data.rows", "62"]),
        ("data.split.fractions=[0.9, 0.1, 0.0]", ["data.split.fractions", "no rows", "test"]),
        ("teacher.train.epochs=true", ["teacher.train", "epochs must be", "true"]),
        ("data={source: idx, path: s3://bucket/images}", ["data.path", "URI"]),
        ("teacher={checkpoint: /no/such.pt}", ["teacher.checkpoint /no/such.pt", "no such file"]),
        ("teacher={}", ["teacher: needs a model to train", "checkpoint", "labels.from"]),
        ("labels.from=/no/such.npy", ["labels.from and teacher", "remove the other"]),
        (
            "student.model={import: 'no_pkg.nets:build'}",
            ["student.model.import", "no_pkg.nets:build", "--allow-import"],
        ),
    ],
)
def test_a_bad_config_is_one_line_and_exit_2(tmp_path: Path, override: str, parts: list[str]) -> None:
    done = distill_ray("run", write_config(tmp_path, TINY), override, "--out", tmp_path / "runs")
    _assert_one_line(done.code, done.stderr, 2, *parts)


def test_unknown_command_flag_and_missing_config(tmp_path: Path) -> None:
    for arguments in (["rum", "x.yaml"], ["run"], ["run", "x.yaml", "--bogus"], ["run", str(tmp_path / "none.yaml")]):
        done = distill_ray(*arguments)
        _assert_one_line(done.code, done.stderr, 2)
    done = distill_ray("--help")
    assert done.code == 0


def test_out_that_cannot_be_written(tmp_path: Path) -> None:
    config = write_config(tmp_path, TINY)
    (tmp_path / "file").write_text("not a folder")
    for out in (tmp_path / "file", "/proc/no-such-place"):
        done = distill_ray("run", config, "--out", out)
        _assert_one_line(done.code, done.stderr, 2, str(out), "cannot be written")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("cluster.gpus_per_worker=1", ["1 GPUs", "0 GPUs", "cluster.gpus_per_worker"]),
        ("cluster.cpus_per_worker=4096", ["4096 CPUs", "cluster.cpus_per_worker"]),
        ("cluster.workers=4096", ["4096 worker(s)", "cluster.workers"]),
        ("student.train.precision=fp16", ["student.train.precision", "fp16 needs a GPU"]),
        ("cluster.address=127.0.0.1:1", ["127.0.0.1:1", "nothing answers"]),
    ],
)
def test_resources_that_are_not_there_are_refused_before_any_wait(
    tmp_path: Path, override: str, parts: list[str]
) -> None:
    started = time.monotonic()
    done = distill_ray("teacher", write_config(tmp_path, TINY), override, "--out", tmp_path / "runs")
    _assert_one_line(done.code, done.stderr, 2, *parts)
    assert time.monotonic() - started < 90  # on a busy machine; a wait for resources would have no end
    assert not list(tmp_path.glob("runs/artifacts/teacher-*"))


def _idx(path: Path, values: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    header = bytes((0, 0, 8, values.ndim)) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(header + values.tobytes())


def _idx_folder(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        _idx(folder / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (count, 8, 8), dtype=np.uint8))
        _idx(folder / f"{part}-labels-idx1-ubyte", (np.arange(count) % 5).astype(np.uint8))
    return folder


def _truncate(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-9])


def _not_gzip(folder: Path) -> None:
    path = folder / "t10k-images-idx3-ubyte"
    path.rename(path.with_name(path.name + ".gz"))


def _half_gzip(folder: Path) -> None:
    path = folder / "t10k-images-idx3-ubyte"
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes())[:-20])
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda folder: (folder / "t10k-labels-idx1-ubyte").unlink(), ["t10k-labels-idx1-ubyte", "no such file"]),
        (lambda folder: (folder / "train-images-idx3-ubyte").write_bytes(b""), ["train-images-idx3-ubyte", "is empty"]),
        (_truncate, ["train-images-idx3-ubyte", "truncated"]),
        (_not_gzip, ["t10k-images-idx3-ubyte.gz", "gzip"]),
        (_half_gzip, ["t10k-images-idx3-ubyte.gz", "gzip"]),
        (
            lambda folder: _idx(folder / "t10k-labels-idx1-ubyte", np.full(20, 9, dtype=np.uint8)),
            ["t10k-labels-idx1-ubyte", "label 9", "out of range", "5 classes"],
        ),
    ],
)
def test_a_damaged_source_names_the_file(tmp_path: Path, damage: Callable[[Path], Any], parts: list[str]) -> None:
    folder = _idx_folder(tmp_path / "images")
    damage(folder)
    config = write_config(tmp_path, TINY | {"data": {"source": "idx", "path": str(folder)}})
    done = distill_ray("prepare", config, "--out", tmp_path / "runs")
    _assert_one_line(done.code, done.stderr, 2, *parts)
    assert not list(tmp_path.glob("runs/artifacts/data-*/manifest.json"))


def test_a_disk_that_fills_up_is_one_line_and_the_next_run_continues(tmp_path: Path) -> None:
    """RLIMIT_FSIZE on Ray's worker processes stands for the full disk: the kernel refuses the write of the shard."""
    config = write_config(tmp_path, TINY | {"data": {"source": "glyph62", "rows": 1860, "shard_rows": 930}})

    def limit_workers(pid: int, title: str) -> None:
        if title.startswith("ray::"):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (930 * 1024 // 2, resource.RLIM_INFINITY))

    full = with_processes(["prepare", config, "--out", tmp_path / "runs"], limit_workers)
    _assert_one_line(full.code, full.stderr, 1, "File too large", "the same command continues")
    assert not list(tmp_path.glob("runs/artifacts/data-*/manifest.json"))
    assert not list(tmp_path.glob("runs/artifacts/data-*/train-*"))  # the small shards of the other splits fit
    assert not list(tmp_path.glob("runs/artifacts/data-*/.tmp-*"))
    done = distill_ray("prepare", config, "--out", tmp_path / "runs", "--json")
    assert done.code == 0, done.stderr
    assert done.answer["stages"][0]["status"] == "ran"


def test_quiet_prints_nothing_and_json_prints_one_object(tmp_path: Path) -> None:
    config = write_config(tmp_path, TINY)
    done = distill_ray("prepare", config, "--out", tmp_path / "runs", "--quiet", "--json")
    assert (done.code, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    assert [stage["name"] for stage in done.answer["stages"]] == ["prepare"]


def test_json_says_also_what_went_wrong(tmp_path: Path) -> None:
    done = distill_ray("run", write_config(tmp_path, TINY), "data.rows=61", "--json", "--out", tmp_path / "runs")
    _assert_one_line(done.code, done.stderr, 2)
    assert done.answer["exit_code"] == 2
    assert "data.rows" in done.answer["error"]
    done = distill_ray("run", write_config(tmp_path, TINY), "--out", "")
    _assert_one_line(done.code, done.stderr, 2, "--out")


def test_debug_shows_the_trace(tmp_path: Path) -> None:
    done = distill_ray("run", write_config(tmp_path, TINY), "data.rows=61", "--debug", "--out", tmp_path / "runs")
    assert done.code == 2
    assert "Traceback" in done.stderr


def test_a_terminal_sees_bars_and_a_pipe_sees_lines(small_run: SmallRun) -> None:
    """The same command under a real pseudo-terminal."""
    store = str(only(small_run.out, "artifacts/data-*"))
    piped = distill_ray("verify", store)
    assert piped.code == 0
    assert "\x1b[" not in piped.stderr
    shards = len(list(Path(store).glob("*.arrow")))
    assert f"{shards}/{shards}" in piped.stderr
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "verify", store], stdout=subprocess.PIPE, stderr=theirs, env=environment(TERM="xterm")
    ) as process:
        os.close(theirs)
        seen, deadline = b"", time.monotonic() + RUN_TIMEOUT_S
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 1.0)[0]:
                continue
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
        process.communicate(timeout=120)
    os.close(ours)
    assert process.returncode == 0
    assert b"\x1b[" in seen
    assert b"verify" in seen


def test_the_console_script_is_installed() -> None:
    script = Path(sys.executable).with_name("distill-ray")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for name in ("run", "prepare", "teacher", "label", "student", "tune", "report", "export", "verify"):
        assert name in done.stdout
