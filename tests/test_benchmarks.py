"""The benchmarks run, on small sizes, and what they print agrees with itself. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tests.benchmarks import label, store
from tests.benchmarks.common import Figure, Settings
from tests.harness import RUN_TIMEOUT_S, environment

KEYS = ["name", "ratio", "target", "met", "ours", "reference", "unit", "pairs"]
SHARE_OF_A_ROW = 0.1  # of its bytes: what a row more may add to the memory
AT_MOST = {"label.memory", "store.bytes", "store.memory", "store.open", "sweep.cost"}


def _benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.benchmarks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, env=environment())


def _rows(*arguments: str) -> dict[str, dict[str, Any]]:
    done = _benchmarks(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        _agrees(row)
    return {row["name"]: row for row in rows}


def _agrees(row: dict[str, Any]) -> None:
    assert list(row) == KEYS
    ours, references = [pair[0] for pair in row["pairs"]], [pair[1] for pair in row["pairs"]]
    assert row["ours"] == median(ours) > 0
    if row["ratio"] is None:
        assert row["reference"] is None
        assert set(references) == {None}
    else:
        assert row["reference"] == median(references)
        assert row["ratio"] == median(mine / other for mine, other in row["pairs"])
    value = row["ours"] if row["ratio"] is None else row["ratio"]
    if row["target"] is None:
        assert row["met"] is None
    else:
        reached = value <= row["target"] if row["name"] in AT_MOST else value >= row["target"]
        assert row["met"] is reached


def _bytes_a_row(figure: dict[str, Any], rows: tuple[int, int]) -> float:
    """What each row more added to the peak: beside the processes themselves even all rows could vanish in a ratio."""
    large, small = rows
    return float(median(peak - other for peak, other in figure["pairs"])) / (large - small)


@pytest.mark.parametrize(
    ("pairs", "at_most", "met"),
    [
        (((9.0, 10.0), (1.0, 10.0), (30.0, 10.0)), False, True),  # the median pair, not the mean, nor ours by reference
        (((7.9, 10.0),), False, False),
        (((7.9, 10.0),), True, True),
        (((0.9, None), (0.7, None), (0.1, None)), True, True),
        (((0.9, None),), True, False),
    ],
)
def test_a_figure_is_the_median_of_its_pairs_and_knows_which_way_is_good(
    pairs: tuple[tuple[float, float | None], ...], at_most: bool, met: bool
) -> None:
    assert Figure("x", "rows/s", pairs, target=0.8, at_most=at_most).met is met


def test_store_figures() -> None:
    settings = Settings(Path(), pairs=2, scale=0.01)
    rows = _rows("store", "--pairs", str(settings.pairs), "--scale", str(settings.scale))
    assert set(rows) == {"store.read", "store.verified_read", "store.bytes", "store.memory", "store.open"}
    assert rows["store.bytes"]["met"]
    assert rows["store.memory"]["met"]
    assert _bytes_a_row(rows["store.memory"], store.memory_rows(settings)) < SHARE_OF_A_ROW * store.PAYLOAD
    assert rows["store.verified_read"]["target"] is None
    assert [len(row["pairs"]) for row in rows.values()] == [2, 2, 1, 2, 2]


def test_label_figures_come_from_the_same_runs_of_the_command() -> None:
    rows = _rows("label.steady", "label.cold", "--pairs", "1", "--seconds", "0.1", "--scale", "0.05")
    assert list(rows) == ["label.steady", "label.cold"]
    steady, cold = rows["label.steady"], rows["label.cold"]
    assert steady["reference"] == cold["reference"]
    assert steady["ours"] > cold["ours"]  # the start of Ray is in one of them


@pytest.mark.slow
def test_sweep_figures() -> None:
    rows = _rows("sweep", "--pairs", "1", "--seconds", "0.1", "--scale", "0.05")
    assert list(rows) == ["sweep.trials", "sweep.cost"]
    assert rows["sweep.trials"]["unit"] == "rows/s"
    assert rows["sweep.cost"]["reference"] is None


@pytest.mark.slow
def test_memory_of_labelling_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    figure = _rows("label.memory", "--pairs", "1", "--out", str(tmp_path))["label.memory"]
    assert figure["unit"] == "bytes"
    assert figure["reference"] > 100e6  # at least two processes with torch in them
    assert figure["met"]
    assert _bytes_a_row(figure, label.memory_rows(Settings(tmp_path))) < SHARE_OF_A_ROW * label.PAYLOAD
    assert (tmp_path / "memory-large").is_dir()  # a folder that was asked for stays


def test_without_names_they_are_listed() -> None:
    done = _benchmarks()
    assert done.returncode == 0
    assert {line.split()[0] for line in done.stdout.splitlines()} >= {"label.steady", "label.cold", "store.open"}
    assert all(len(line.split()) > 3 for line in done.stdout.splitlines())


def test_an_unknown_name_is_one_line_and_exit_2() -> None:
    done = _benchmarks("store", "labels")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "'labels'" in done.stderr
