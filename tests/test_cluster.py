"""The same command on a cluster that is already there: two raylets, found by RAY_ADDRESS."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.conftest import SmallRun
from tests.harness import SMALL_RUN, act_when, distill_ray, distill_ray_in, environment, epochs_done, only, write_config

RAY = str(Path(sys.executable).with_name("ray"))
START_TIMEOUT_S = 120
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # as Ray wants it since 2.60


NETS = """
from pathlib import Path

from torch import nn


def flat(note):
    Path(note, Path(__file__).parent.name).write_text(__file__)
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 62))
"""


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@dataclass(frozen=True)
class TwoNodes:
    """The head's address, and the process group of the second node."""

    address: str
    second: int


@pytest.fixture
def two_nodes() -> Iterator[TwoNodes]:
    """A head and a second node of one CPU each, as processes of this machine."""
    address = f"127.0.0.1:{_free_port()}"
    # Of its own and short (sockets lie in it): `ray start` writes the cluster's address there for others to find.
    scratch = tempfile.mkdtemp(prefix="ray-")
    common = ["--num-cpus=1", "--object-store-memory=200000000", "--disable-usage-stats", "--block"]
    head = [
        "--head",
        f"--port={address.split(':')[1]}",
        "--node-ip-address=127.0.0.1",
        "--include-dashboard=false",
        f"--temp-dir={scratch}",
    ]
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for role in (head, [f"--address={address}"]):
            nodes.append(
                subprocess.Popen(
                    [RAY, "start", *role, *common],
                    env=environment(**TOKEN), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )  # fmt: skip
            _wait_for_port(address)  # the second node gives up at once where there is no head
        _wait_for_nodes(address, len(nodes))
        yield TwoNodes(address, nodes[1].pid)
    finally:
        for node in nodes:
            with suppress(ProcessLookupError):  # a test has killed it
                os.killpg(node.pid, signal.SIGKILL)  # `ray start --block` takes half a minute to end by itself
            node.wait()
        shutil.rmtree(scratch, ignore_errors=True)


def _wait_for_port(address: str) -> None:
    host, port = address.split(":")
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError(f"no head at {address} within {START_TIMEOUT_S} s")


def _wait_for_nodes(address: str, count: int) -> None:
    probe = (
        f"import ray, time; ray.init('{address}', logging_level='ERROR'); end = time.time() + {START_TIMEOUT_S}\n"
        f"while sum(n['Alive'] for n in ray.nodes()) < {count} and time.time() < end: time.sleep(0.2)\n"
        f"assert sum(n['Alive'] for n in ray.nodes()) == {count}"
    )
    command = [sys.executable, "-c", probe]
    seen = subprocess.run(
        command, capture_output=True, text=True, env=environment(**TOKEN), timeout=2 * START_TIMEOUT_S
    )
    assert seen.returncode == 0, seen.stderr


def test_a_run_on_two_nodes_is_the_run_on_one(small_run: SmallRun, tmp_path: Path, two_nodes: TwoNodes) -> None:
    config, out = write_config(tmp_path, SMALL_RUN), tmp_path / "runs"
    done = distill_ray("run", config, "--out", out, "--json", RAY_ADDRESS=two_nodes.address, **TOKEN)
    assert done.code == 0, done.stderr
    assert f"Ray: {two_nodes.address}, 2 nodes, 2 CPUs, 0 GPUs" in done.stderr
    teacher = only(out, "artifacts/teacher-*")
    # One worker a node where there are no GPUs, one CPU and so one thread each.
    resolved = yaml.safe_load((teacher / "config.yaml").read_text())["resolved"]
    assert (resolved["workers"], resolved["threads"]) == (2, 1)
    here, there = (
        [json.loads(line)["train_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (teacher, only(small_run.out, "artifacts/teacher-*"))
    )
    assert np.allclose(here, there, rtol=1e-3)
    # The cluster outlives the command, and to whoever has no token it says so in one line.
    refused = distill_ray("prepare", config, "data.seed=1", "--out", out, RAY_ADDRESS=two_nodes.address)
    assert refused.code == 2, refused.stderr
    assert "RAY_AUTH_TOKEN" in refused.stderr.splitlines()[-1]


@pytest.mark.slow
def test_own_code_travels_to_the_workers(tmp_path: Path, two_nodes: TwoNodes) -> None:
    """Their copy is one that Ray has brought them: they need not see the folder that the command is typed in."""
    place, notes = tmp_path / "user", tmp_path / "notes"
    place.mkdir()
    notes.mkdir()
    (place / "my_nets.py").write_text(NETS)
    (place / "large.bin").write_bytes(b"0" * 1000)  # what the module does not import stays here
    own = {"model": {"import": "my_nets:flat", "kwargs": {"note": str(notes)}}, "train": {"epochs": 1}}
    raw = {"name": "x", "data": {"source": "glyph62", "rows": 620}, "teacher": own, "student": own}
    config = write_config(tmp_path, raw)
    done = distill_ray_in(
        place, "student", config, "--out", tmp_path / "runs", "--allow-import", RAY_ADDRESS=two_nodes.address, **TOKEN
    )
    assert done.code == 0, done.stderr
    ran_from = {Path(note.read_text()) for note in notes.iterdir()}
    assert place / "my_nets.py" in ran_from  # the command's own look at it, before anything was trained
    theirs = [path for path in ran_from if path != place / "my_nets.py"]
    assert theirs
    assert all("working_dir_files" in path.parts for path in theirs)
    assert not any(path.with_name("large.bin").exists() for path in theirs)


@pytest.mark.slow
def test_an_elastic_group_goes_on_with_the_node_that_is_left(tmp_path: Path, two_nodes: TwoNodes) -> None:
    """Two workers on two nodes; one node is killed between epochs, and the other ends the training alone."""
    longer = SMALL_RUN["teacher"] | {"train": SMALL_RUN["teacher"]["train"] | {"epochs": 40}}
    config = write_config(tmp_path, SMALL_RUN | {"teacher": longer, "cluster": {"workers": [1, 2]}})
    out = tmp_path / "runs"
    recorded: list[dict[str, Any]] = []

    def two_epochs_done() -> bool:
        if epochs_done(out, "teacher") < 2:
            return False
        recorded.append(yaml.safe_load(only(out, "artifacts/teacher-*/config.yaml").read_text())["resolved"])
        return True

    done = act_when(
        ["teacher", config, "--out", out, "--json"], two_epochs_done,
        lambda: os.killpg(two_nodes.second, signal.SIGKILL), RAY_ADDRESS=two_nodes.address, **TOKEN,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert [resolved["workers"] for resolved in recorded] == [2]
    teacher = only(out, "artifacts/teacher-*")
    assert json.loads((teacher / "summary.json").read_text())["workers"] == 1
    epochs = [json.loads(line)["epoch"] for line in (teacher / "metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(1, 41))
