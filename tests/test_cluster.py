"""The same command on a cluster that is already there: two raylets, found by RAY_ADDRESS."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.conftest import SmallRun
from tests.harness import (
    SMALL_RUN,
    act_when,
    distill_ray,
    distill_ray_in,
    environment,
    epochs_done,
    only,
    stop_when,
    write_config,
)
from tests.own_data import pixels, png, write_parquet

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


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@dataclass
class Cluster:
    """Raylets of one CPU each, or as many as ``cpus``, as processes of this machine; the first is the head."""

    address: str
    cpus: int = 1
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start_node(self, *role: str) -> None:
        """A further node, or the one that ``role`` says."""
        common = [f"--num-cpus={self.cpus}", "--object-store-memory=200000000", "--disable-usage-stats", "--block"]
        self.nodes.append(
            subprocess.Popen(
                [RAY, "start", *(role or [f"--address={self.address}"]), *common],
                env=environment(**TOKEN), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            )
        )  # fmt: skip

    def start_blind_node(self, folder: Path) -> None:
        """A further node that finds this folder empty: it has a mount of its own there."""
        script = 'mount -t tmpfs none "$0" && exec "$@"'
        command = [
            "unshare", "--mount", "sh", "-c", script, str(folder), RAY, "start", f"--address={self.address}",
            "--num-cpus=1", "--object-store-memory=200000000", "--disable-usage-stats", "--block",
        ]  # fmt: skip
        self.nodes.append(
            subprocess.Popen(
                command, env=environment(**TOKEN), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )  # fmt: skip

    def kill_second(self) -> None:
        os.killpg(self.nodes[1].pid, signal.SIGKILL)

    def drain_second(self) -> None:
        """What a cloud's notice of preemption becomes: the node that is not the head will be gone in a minute."""
        probe = (
            f"import ray; ray.init('{self.address}', logging_level='ERROR')\n"
            "print(next(n['NodeID'] for n in ray.nodes() if 'node:__internal_head__' not in n['Resources']))"
        )
        asked = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment(**TOKEN))
        assert asked.returncode == 0, asked.stderr
        command = [
            RAY, "drain-node", f"--address={self.address}", f"--node-id={asked.stdout.split()[-1]}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=60",
        ]  # fmt: skip
        drained = subprocess.run(command, capture_output=True, text=True, env=environment(**TOKEN))
        assert drained.returncode == 0, drained.stderr


@pytest.fixture
def head() -> Iterator[Cluster]:
    """A head alone."""
    with started_head() as cluster:
        yield cluster


@contextmanager
def started_head(cpus: int = 1) -> Iterator[Cluster]:
    cluster = Cluster(f"127.0.0.1:{free_port()}", cpus)
    # Of its own and short (sockets lie in it): `ray start` writes the cluster's address there for others to find.
    scratch = tempfile.mkdtemp(prefix="ray-")
    port = cluster.address.split(":")[1]
    place = ["--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--temp-dir={scratch}"]
    try:
        cluster.start_node("--head", f"--port={port}", *place)
        wait_for_port(cluster.address)  # a second node gives up at once where there is no head
        yield cluster
    finally:
        for node in cluster.nodes:
            with suppress(ProcessLookupError):  # a test has killed it
                os.killpg(node.pid, signal.SIGKILL)  # `ray start --block` takes half a minute to end by itself
            node.wait()
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture
def two_nodes(head: Cluster) -> Cluster:
    """A head and a second node."""
    head.start_node()
    _wait_for_nodes(head.address, 2)
    return head


def wait_for_port(address: str) -> None:
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


def test_a_run_on_two_nodes_is_the_run_on_one(small_run: SmallRun, tmp_path: Path, two_nodes: Cluster) -> None:
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


def _may_mount() -> bool:
    tool = shutil.which("unshare")
    return tool is not None and subprocess.run([tool, "--mount", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not _may_mount(), reason="only root may mount")
def test_images_that_a_node_does_not_see_are_told_before_any_work(tmp_path: Path, head: Cluster) -> None:
    images = tmp_path / "seen here" / "png"
    images.mkdir(parents=True)
    names = [f"{number}.png" for number in range(20)]
    for name in names:
        (images / name).write_bytes(png(pixels(1)[0]))
    table = write_parquet(tmp_path / "rows.parquet", {"x": names, "y": [0, 1] * 10})
    data = {"source": "parquet", "path": str(table), "root": str(images), "columns": {"input": "x", "label": "y"}}
    config = write_config(tmp_path, SMALL_RUN | {"data": data})
    head.start_blind_node(images.parent)
    _wait_for_nodes(head.address, 2)
    done = distill_ray("prepare", config, "--out", tmp_path / "runs", RAY_ADDRESS=head.address, **TOKEN)
    assert done.code == 2, done.stderr
    told = rf"distill-ray: .*node \S+: data\.root {images}: is not there: use storage that every node sees .*"
    assert re.fullmatch(told, done.stderr.splitlines()[-1])
    assert not list((tmp_path / "runs").glob("artifacts/data-*/*"))


def test_own_code_travels_to_the_workers(tmp_path: Path, two_nodes: Cluster) -> None:
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
def test_an_elastic_group_goes_on_with_the_node_that_is_left(tmp_path: Path, two_nodes: Cluster) -> None:
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
        ["teacher", config, "--out", out, "--json"], two_epochs_done, two_nodes.kill_second,
        RAY_ADDRESS=two_nodes.address, **TOKEN,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert [resolved["workers"] for resolved in recorded] == [2]
    teacher = only(out, "artifacts/teacher-*")
    assert json.loads((teacher / "summary.json").read_text())["workers"] == 1
    epochs = [json.loads(line)["epoch"] for line in (teacher / "metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(1, 41))


@pytest.mark.slow
def test_an_elastic_group_takes_in_a_node_that_joins(tmp_path: Path, head: Cluster) -> None:
    """One worker on the only node; a second node joins, and the group goes on with two. No epoch is done twice."""
    config = _endless(tmp_path, {"epochs": 20_000}, [1, 2])
    out = tmp_path / "runs"
    workers: list[int] = []

    def grown() -> bool:
        if epochs_done(out, "teacher") < 2:
            return False
        resolved = yaml.safe_load(only(out, "artifacts/teacher-*/config.yaml").read_text())["resolved"]
        if not workers:
            head.start_node()
        if workers[-1:] != [resolved["workers"]]:
            workers.append(resolved["workers"])
        return workers == [1, 2] and epochs_done(out, "teacher") > at_growth(out)

    reached: list[int] = []

    def at_growth(out: Path) -> int:
        reached.append(epochs_done(out, "teacher"))
        return reached[0]

    stopped = stop_when(["teacher", config, "--out", out], grown, signal.SIGINT, RAY_ADDRESS=head.address, **TOKEN)
    assert stopped.code == 130, stopped.stderr
    lines = only(out, "artifacts/teacher-*/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, len(lines) + 1))


@pytest.mark.slow
def test_a_notice_of_preemption_saves_within_the_epoch(tmp_path: Path, two_nodes: Cluster) -> None:
    """Nothing else asks for a checkpoint within an epoch here."""
    config = _endless(tmp_path, {"epochs": 1000, "batch_size": 2}, [1, 2])
    out = tmp_path / "runs"
    drained: list[bool] = []

    def within() -> list[Path]:
        return list(out.glob("artifacts/teacher-*/checkpoints/epoch-*-steps-*.safetensors"))

    def saved() -> bool:
        if not drained and epochs_done(out, "teacher") >= 1:
            assert not within()
            two_nodes.drain_second()
            drained.append(True)
        return bool(drained and within())

    stopped = stop_when(["teacher", config, "--out", out], saved, signal.SIGINT, RAY_ADDRESS=two_nodes.address, **TOKEN)
    assert stopped.code == 130, stopped.stderr


def _endless(folder: Path, train: dict[str, Any], workers: list[int]) -> Path:
    """A training that goes on until the test stops it."""
    teacher = SMALL_RUN["teacher"] | {"train": SMALL_RUN["teacher"]["train"] | train}
    return write_config(folder, SMALL_RUN | {"teacher": teacher, "cluster": {"workers": workers}})
