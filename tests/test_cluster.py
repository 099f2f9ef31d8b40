"""The same command on a cluster that is already there: two raylets, found by RAY_ADDRESS."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.conftest import SmallRun
from tests.harness import SMALL_RUN, distill_ray, environment, only, write_config

RAY = str(Path(sys.executable).with_name("ray"))
START_TIMEOUT_S = 120


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture
def two_nodes() -> Iterator[str]:
    """A head and a second node of one CPU each, as processes of this machine; gives the head's address."""
    address = f"127.0.0.1:{_free_port()}"
    common = ["--num-cpus=1", "--object-store-memory=200000000", "--disable-usage-stats", "--block"]
    head = ["--head", f"--port={address.split(':')[1]}", "--node-ip-address=127.0.0.1", "--include-dashboard=false"]
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for role in (head, [f"--address={address}"]):
            command = [RAY, "start", *role, *common]
            nodes.append(
                subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
            _wait_for(address, len(nodes))
        yield address
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            try:
                node.wait(timeout=30)
            except subprocess.TimeoutExpired:
                node.kill()
                node.wait()


def _wait_for(address: str, nodes: int) -> None:
    count = f"import ray; ray.init('{address}', logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))"
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        seen = subprocess.run(
            [sys.executable, "-c", count], capture_output=True, text=True, env=environment(), timeout=100
        )
        if seen.stdout.strip().endswith(str(nodes)):
            return
        time.sleep(0.5)
    raise AssertionError(f"{nodes} nodes did not come up within {START_TIMEOUT_S} s: {seen.stderr}")


def test_a_run_on_two_nodes_is_the_run_on_one(small_run: SmallRun, tmp_path: Path, two_nodes: str) -> None:
    config, out = write_config(tmp_path, SMALL_RUN), tmp_path / "runs"
    done = distill_ray("run", config, "--out", out, "--json", RAY_ADDRESS=two_nodes)
    assert done.code == 0, done.stderr
    assert f"Ray: {two_nodes}, 2 nodes, 2 CPUs, 0 GPUs" in done.stderr
    teacher = only(out, "artifacts/teacher-*")
    # One worker a node where there are no GPUs, one CPU and so one thread each.
    resolved = yaml.safe_load((teacher / "config.yaml").read_text())["resolved"]
    assert (resolved["workers"], resolved["threads"]) == (2, 1)
    here, there = (
        [json.loads(line)["train_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (teacher, only(small_run.out, "artifacts/teacher-*"))
    )
    assert np.allclose(here, there, rtol=1e-3)
    # The cluster outlives the command.
    again = distill_ray("run", config, "student.loss.temperature=3", "--out", out, "--json", RAY_ADDRESS=two_nodes)
    assert again.code == 0, again.stderr
    assert [stage["status"] for stage in again.answer["stages"]] == ["reused", "reused", "reused", "ran", "reused"]
