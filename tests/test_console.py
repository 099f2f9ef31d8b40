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
