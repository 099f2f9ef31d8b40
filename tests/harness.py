"""Runs the real command in a process group of its own, and stops it at a given point."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

COMMAND = (sys.executable, "-m", "distill_ray.cli")
RUN_TIMEOUT_S = 300  # a bound for a hang, not a measure of speed

SMALL_RUN: dict[str, Any] = {
    "name": "small",
    "data": {"source": "glyph62", "rows": 1860, "shard_rows": 64},
    "teacher": {
        "model": {"name": "char_cnn", "channels": [8, 16], "hidden": [64]},
        "train": {"epochs": 6, "batch_size": 64, "precision": "fp32", "lr": 0.002},
    },
    "labels": {"precision": "fp32", "batch_size": 64},
    "student": {
        "model": {"name": "char_cnn", "channels": [4, 8], "hidden": [16]},
        "train": {"epochs": 8, "batch_size": 32, "precision": "fp32"},
    },
}


@dataclass(frozen=True)
class Finished:
    """What a command left."""

    code: int
    stdout: str
    stderr: str

    @property
    def answer(self) -> dict[str, Any]:
        """The JSON object on the last line of stdout."""
        value = json.loads(self.stdout.splitlines()[-1])
        assert isinstance(value, dict)
        return value


def write_config(folder: Path, config: dict[str, Any], name: str = "config.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(yaml.safe_dump(config))
    return path


def environment(**extra: str) -> dict[str, str]:
    """Ours, without what could make W&B or Ray look elsewhere."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "RAY_")) and k != "DISTILL_RAY_DEBUG"}
    return kept | extra


def distill_ray(*arguments: str | Path, timeout_s: float = RUN_TIMEOUT_S, **env: str) -> Finished:
    """Run the command to its end."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=timeout_s, env=environment(**env)
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def stop_when(arguments: Sequence[str | Path], reached: Callable[[], bool], how: signal.Signals) -> Finished:
    """Start the command and stop it once ``reached``: SIGKILL goes to the whole group, others to the command."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment(),
    )  # fmt: skip
    deadline = time.monotonic() + RUN_TIMEOUT_S
    try:
        while not reached():
            if process.poll() is not None:
                out, err = process.communicate()
                raise AssertionError(f"ended (exit {process.returncode}) before it could be stopped: {out}{err}")
            assert time.monotonic() < deadline, "never reached the point where it was to be stopped"
            time.sleep(0.01)
        if how is signal.SIGKILL:
            os.killpg(process.pid, how)
        else:
            process.send_signal(how)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Finished(process.returncode, out, err)


def only(folder: Path, pattern: str) -> Path:
    """The single match of a pattern."""
    matches = sorted(folder.glob(pattern))
    assert len(matches) == 1, f"{pattern}: {matches}"
    return matches[0]


def epochs_done(folder: Path, stage: str) -> int:
    """Finished epochs over all folders of a stage."""
    return sum(len(path.read_text().splitlines()) for path in folder.glob(f"artifacts/{stage}-*/metrics.jsonl"))
