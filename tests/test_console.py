"""What a person sees."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time

import pytest

from distill_ray import console
from distill_ray.console import results_table
from tests.harness import environment

ROW = {
    "name": "student kd T=2 alpha=0.9, seed 0", "accuracy": 0.91515, "kl_to_teacher": 0.03832, "agreement": 0.9591,
    "ece": 0.0277, "parameters": 8_481_598, "bytes": 33_927_232, "latency_ms": 1.543, "seconds": 1054.7,
}  # fmt: skip
PRINT = f"from distill_ray.console import results_table; results_table('title', [{ROW!r}])"


def test_a_log_gets_every_column(capsys: pytest.CaptureFixture[str]) -> None:
    results_table("title", [ROW, {**ROW, "name": "unlabelled", "accuracy": None}])
    printed = capsys.readouterr().out
    for number in ("0.9152", "0.0383", "0.9591", "0.0277", "8,481,598", "33,927,232", "1.543", "1054.7", "n/a"):
        assert number in printed


@pytest.mark.parametrize("width", [70, 80, 100, 160])
def test_a_narrow_terminal_gets_fewer_columns_and_whole_numbers(width: int) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    done = subprocess.run([sys.executable, "-c", PRINT], stdout=theirs, env=environment(TERM="xterm"), timeout=60)
    os.close(theirs)
    printed = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode == 0
    assert "…" not in printed
    assert "0.9152" in printed
    assert "8,481,598" in printed
    assert ("33,927,232" in printed) == (width == 160)


def test_work_that_stands_still_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_SILENT_S", 0.2)
    monkeypatch.setattr(console, "_LOOK_EVERY_S", 0.02)
    with console.Reporter().progress("label", 40) as bar:
        bar.update(3, "rows")
        time.sleep(0.9)
        bar.update(4, "rows")
    told = [line for line in capsys.readouterr().err.splitlines() if "without news" in line]
    assert 1 <= len(told) <= 4
    assert told[0].startswith("label: 3/40 for 0 s without news; slow work, or storage that does not answer")


def test_work_that_moves_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Reporter().progress("label", 3) as bar:
        for done in range(4):
            bar.update(done)
    assert "without news" not in capsys.readouterr().err


WATCH = """
import time
from distill_ray.console import Reporter
with Reporter().progress("tune", 24) as bar:
    bar.table(("trial", "validation accuracy"), [("7", "0.8812"), ("8", "0.9001")])
    bar.update(5, "trials")
    time.sleep(0.5)
"""


def test_a_table_stands_above_the_bar_of_a_terminal_alone(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    done = subprocess.run([sys.executable, "-c", WATCH], stderr=theirs, env=environment(TERM="xterm"), timeout=60)
    os.close(theirs)
    printed = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert done.returncode == 0
    assert printed.index("validation accuracy") < printed.index("0.9001") < printed.rindex("tune")

    with console.Reporter().progress("tune", 24) as bar:
        bar.table(("trial",), [("7",)])
        bar.update(5, "trials")
    assert capsys.readouterr().err.splitlines() == ["tune: 5/24  trials"]


def test_epochs_within_a_step_are_news(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_SILENT_S", 0.4)
    monkeypatch.setattr(console, "_LOOK_EVERY_S", 0.02)
    with console.Reporter().progress("tune", 24) as bar:
        for epoch in range(10):
            bar.update(0, "trials", news=epoch)
            time.sleep(0.1)
    assert "without news" not in capsys.readouterr().err


FOUND = {
    "synthetic": True, "seeds": 5, "trials": 24, "students": 20, "control_trials": 24, "teacher_passes_saved": 399,
    "teacher_seconds_saved": 2817.7, "folder": "/out/tune-1",
    "front": [
        {
            "trial": 7, "parameters": 17_550, "latency_ms": 0.1499, "finalist": True,
            "values": {"train.lr": 0.0031274991, "model.hidden": [16]},
            "test_accuracy": {"mean": 0.8527, "std": 0.014, "values": []},
            "control": {"mean": 0.8594, "std": None, "values": []},
            "difference": {"mean": -0.0067, "low": -0.025, "high": 0.0117, "verdict": "not resolved"},
        },
        {"trial": 9, "finalist": False},
    ],
}  # fmt: skip


def test_finalists_stand_beside_their_controls(capsys: pytest.CaptureFixture[str]) -> None:
    console.search_table("run", FOUND)
    printed = capsys.readouterr().out
    assert "test split of synthetic data" in printed
    for told in (
        "17,550",
        "0.150",
        "train.lr=0.003127",
        "0.8527 ± 0.0140",
        "0.8594",
        "-0.67 [-2.50, +1.17]",
        "not resolved",
    ):
        assert told in printed
    assert "24 trials of 20 students" in printed
    assert "399 passes of the teacher saved, 2,818 s of its time" in printed
    assert "export CONFIG --trial N" in printed
