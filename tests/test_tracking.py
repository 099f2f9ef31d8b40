"""W&B never asks, never hangs, never fails a run. With the real client; servers are sockets of the test's own."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill_ray import tracking
from distill_ray.config import WandbConfig
from distill_ray.tracking import Tracker

KEY = "0123456789abcdef" * 2 + "01234567"  # of the right form, belongs to nobody
CANARY = "canary-secret-value"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # no netrc of the person who runs the tests


def _one_run(config: WandbConfig, directory: Path) -> list[str]:
    warnings: list[str] = []
    tracker = Tracker(config, "group", directory, warnings.append)
    tracker.start("a", run_id="abc123", name="a", job_type="student", config={"lr": 0.1})
    for epoch in (1, 2):
        tracker.log("a", {"epoch": epoch, "train_ce": 1.0 / epoch, "train_kd": 0.5})
    tracker.finish("a", {"accuracy": 0.5})
    tracker.close()
    return warnings


def _offline_runs(directory: Path) -> list[Path]:
    return list(directory.glob("wandb/offline-run-*/run-*.wandb"))


def test_without_a_key_runs_are_offline(tmp_path: Path) -> None:
    assert _one_run(WandbConfig(), tmp_path) == []
    (run,) = _offline_runs(tmp_path)
    assert "abc123" in run.name
    content = run.read_bytes()
    assert b"train_kd" in content
    assert b"accuracy" in content


def test_disabled_starts_nothing(tmp_path: Path) -> None:
    assert _one_run(WandbConfig(mode="disabled"), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_secrets_of_the_environment_do_not_reach_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MY_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, CANARY)
    _one_run(WandbConfig(), tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]


def test_a_server_that_refuses_makes_the_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(tracking, "_INIT_TIMEOUT_S", 3.0)
    warnings = _one_run(WandbConfig(), tmp_path)
    assert len(warnings) == 1
    assert "offline" in warnings[0]
    assert len(_offline_runs(tmp_path)) == 1


@pytest.fixture
def silent_server() -> Iterator[int]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    kept.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=10)
        for connection in kept:
            connection.close()


def test_a_server_that_never_answers_delays_nothing_but_the_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_server: int
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent_server}")
    monkeypatch.setattr(tracking, "_CLOSE_TIMEOUT_S", 4.0)
    warnings: list[str] = []
    tracker = Tracker(WandbConfig(mode="online"), "group", tmp_path, warnings.append)
    started = time.monotonic()
    tracker.start("a", run_id="abc", name="a", job_type="teacher", config={})
    for epoch in range(2000):
        tracker.log("a", {"epoch": epoch})
    logged = time.monotonic() - started
    tracker.close()
    assert logged < 15  # the work itself never waits for W&B, whose start alone would take 20 s
    assert time.monotonic() - started < 60
    assert warnings


def test_a_child_that_cannot_start_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-such-python"))
    warnings = _one_run(WandbConfig(), tmp_path)
    assert len(warnings) == 1
    assert "off for the rest" in warnings[0]
