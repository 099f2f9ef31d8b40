"""Runs the real command in a process group of its own, and stops it at a given point."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

COMMAND = (sys.executable, "-m", "distill_ray.cli")
RUN_TIMEOUT_S = 300  # a bound for a hang, not a measure of speed

SMALL_RUN: dict[str, Any] = {
    "name": "small",
    "data": {"source": "glyph62", "rows": 1860, "shard_rows": 32},
    "teacher": {
        "model": {"name": "char_cnn", "channels": [8, 16], "hidden": [64]},
        "train": {"epochs": 6, "batch_size": 64, "precision": "fp32", "lr": 0.002},
    },
    "labels": {"precision": "fp32", "batch_size": 2},  # slow, so that a kill in the middle of labelling finds it there
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
    return kept | {"WANDB_MODE": "offline"} | extra  # whatever account the person who runs the tests has


def distill_ray(*arguments: str | Path, **env: str) -> Finished:
    """Run the command to its end, with these environment variables."""
    return distill_ray_in(Path.cwd(), *arguments, **env)


def distill_ray_in(cwd: Path, /, *arguments: str | Path, **env: str) -> Finished:
    """The same, typed in the folder ``cwd``."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=RUN_TIMEOUT_S,
        env=environment(**env), cwd=cwd,
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, done.stderr)


def with_processes(arguments: Sequence[str | Path], act: Callable[[int, str], None]) -> Finished:
    """Run the command to its end, calling ``act(pid, title)`` for each process that appears below it."""
    seen: set[tuple[int, str]] = set()
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment(),
    ) as process:  # fmt: skip
        deadline = time.monotonic() + RUN_TIMEOUT_S
        try:
            while process.poll() is None and time.monotonic() < deadline:
                for pid, title in set(descendants(process.pid)) - seen:
                    seen.add((pid, title))
                    with suppress(ProcessLookupError):
                        act(pid, title)
                time.sleep(0.005)
            out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return Finished(process.returncode, out, err)


def kill_workers(
    arguments: Sequence[str | Path], victims: Sequence[tuple[Callable[[], bool], str]], **env: str
) -> tuple[Finished, list[str]]:
    """Run the command to its end; at each point of ``victims`` SIGKILL one of its processes whose title has the text.

    Returns also the titles of the processes that were killed.
    """
    killed: list[str] = []
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment(**env),
    ) as process:  # fmt: skip
        deadline = time.monotonic() + RUN_TIMEOUT_S
        try:
            for reached, title in victims:
                while process.poll() is None and time.monotonic() < deadline:
                    found = [(pid, t) for pid, t in descendants(process.pid) if title in t] if reached() else []
                    if found:
                        os.kill(found[0][0], signal.SIGKILL)
                        killed.append(found[0][1])
                        break
                    time.sleep(0.01)
            out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return Finished(process.returncode, out, err), killed


def descendants(root: int) -> list[tuple[int, str]]:
    """(pid, title) of all processes below ``root``, from /proc."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue  # ended meanwhile
    below = {root}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return [(pid, title) for pid in sorted(below - {root}) if (title := _title(pid))]


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def stop_when(
    arguments: Sequence[str | Path], reached: Callable[[], bool], how: signal.Signals, **env: str
) -> Finished:
    """Start the command and stop it once ``reached``: SIGKILL goes to the whole group, others to the command."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment(**env),
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


def act_when(
    arguments: Sequence[str | Path], reached: Callable[[], bool], act: Callable[[], None], **env: str
) -> Finished:
    """Run the command to its end, and once ``reached`` do something to the world around it."""
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment(**env),
    ) as process:  # fmt: skip
        deadline = time.monotonic() + RUN_TIMEOUT_S
        try:
            while not reached():
                assert process.poll() is None, f"ended before it could be disturbed: {process.communicate()}"
                assert time.monotonic() < deadline, "never reached the point where it was to be disturbed"
                time.sleep(0.01)
            act()
            out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
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


def session_processes(session: int) -> list[tuple[int, str]]:
    """(pid, title) of the processes of a session, also of those whose parents are gone; without zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of_session = stat.read_text().rsplit(")", 1)[1].split()[:4]
        except (OSError, IndexError):
            continue  # ended meanwhile
        if int(of_session) == session and state != "Z":
            found.append((int(stat.parent.name), _title(int(stat.parent.name))))
    return found
