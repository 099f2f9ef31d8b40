"""Trials on a cluster: rows that all of them share, and students that several workers train."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from distill_ray import placing
from distill_ray.artifacts import Stage
from distill_ray.config import ClusterConfig, from_dict
from distill_ray.errors import UserError
from distill_ray.placing import Node, Placement
from distill_ray.stages import data_parallel, search_space, search_trial, shared_rows
from distill_ray.storage import Folder
from tests.harness import RUN_TIMEOUT_S, Finished, act_when, distill_ray, environment, only, write_config
from tests.test_cluster import TOKEN, started_head

# Two of the three learn nothing, so that at least one is stopped after 3 epochs. Some more may pass until it ends.
SEARCH: dict[str, Any] = {
    "name": "groups",
    "data": {"source": "glyph62", "rows": 620, "shard_rows": 155},
    "teacher": {"model": {"name": "mlp", "hidden": [32]}, "train": {"epochs": 1, "batch_size": 64}},
    "labels": {"precision": "fp32"},
    "student": {
        "model": {"name": "char_cnn", "channels": [4, 8], "hidden": [32]},
        "loss": {"name": "ce"},
        "train": {"epochs": 12, "batch_size": 8, "precision": "fp32"},
    },
    "tune": {
        "space": {"train.lr": {"grid": [0.005, 1e-9, 1e-8]}}, "search": "grid", "scheduler": "asha", "seeds": 1,
    },
    "cluster": {"workers": 1, "student_workers": 2, "cpus_per_worker": 1},
    "tracking": {"wandb": {"mode": "disabled"}},
}  # fmt: skip
OF_RAY_DATA = {"_AutoscalingCoordinatorActor", "ActorLocationTracker", "_StatsActor"}  # they stay with the cluster
ALIVE = """
import collections, json, sys
import ray
from ray._private import state

ray.init(sys.argv[1], logging_level="ERROR")
actors = collections.Counter(a["ActorClassName"] for a in state.actors().values() if a["State"] != "DEAD")
groups = [g["name"] for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
print(json.dumps({"actors": actors, "groups": len(groups)}))
"""


# --- a search on four CPUs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    config: Path
    out: Path
    cluster: dict[str, str]
    finished: Finished
    meanwhile: dict[str, Any]

    @property
    def trials(self) -> dict[float, dict[str, Any]]:
        """By their learning rate."""
        rows: list[dict[str, Any]] = pq.read_table(only(self.out, "artifacts/tune-*/trials.parquet")).to_pylist()
        return {row["train.lr"]: row for row in rows}


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Search]:
    """Of three students of two workers each; ``meanwhile`` is what is alive when the last trial has just ended."""
    root = tmp_path_factory.mktemp("groups")
    config, out = write_config(root, SEARCH), root / "runs"
    with started_head(cpus=4) as head:
        cluster, meanwhile = {"RAY_ADDRESS": head.address, **TOKEN}, {}
        finished = act_when(
            ["tune", config, "--out", out, "--json"],
            lambda: bool(list(out.glob("artifacts/tune-*/trials.parquet"))),
            lambda: meanwhile.update(alive(cluster)),
            **cluster,
        )
        assert finished.code == 0, finished.stderr
        yield Search(config, out, cluster, finished, meanwhile)


def alive(cluster: dict[str, str]) -> dict[str, Any]:
    """How many actors of each class, and how many placement groups."""
    found: dict[str, Any] = in_ray(cluster, ALIVE)
    return found


def in_ray(cluster: dict[str, str], script: str, *arguments: str | Path) -> Any:
    """The JSON that a driver of its own prints."""
    command = [sys.executable, "-c", script, cluster["RAY_ADDRESS"], *map(str, arguments)]
    env = environment(**cluster) | {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=RUN_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_trial_is_a_group_and_has_its_row(search: Search) -> None:
    rows = search.trials
    assert sorted(rows) == [1e-9, 1e-8, 0.005]
    assert (rows[0.005]["status"], rows[0.005]["epochs"]) == ("completed", 12)
    stopped = [row for row in rows.values() if row["status"] == "stopped"]
    assert stopped, rows
    assert all(3 <= row["epochs"] < 12 for row in stopped)
    for row in rows.values():
        resolved = yaml.safe_load((Path(row["folder"]) / "config.yaml").read_text())["resolved"]
        assert (resolved["workers"], resolved["threads"], resolved["shuffle"]) == (2, 1, "whole")
        assert not list(Path(row["folder"]).glob("stop-*.json"))


def test_groups_leave_nothing_behind(search: Search) -> None:
    """While the driver is still there at most the finalist's own group, afterwards nothing."""
    actors = search.meanwhile["actors"]
    assert "ImplicitFunc" not in actors, "a trial's actor"
    assert all(actors.get(name, 0) <= 1 for name in ("TrainController", "PlacementGroupCleaner")), actors
    assert actors.get("RayTrainWorker", 0) <= 2, actors
    assert search.meanwhile["groups"] <= 1
    left = alive(search.cluster)
    assert set(left["actors"]) <= OF_RAY_DATA
    assert left["groups"] == 0


def test_a_trial_is_the_student_of_the_same_values(search: Search, tmp_path: Path) -> None:
    """The very folder; and trained anew, from rows that it reads itself, the very same weights."""
    override, best = "student.train.lr=0.005", Path(search.trials[0.005]["folder"])
    again = distill_ray("student", search.config, override, "--out", search.out, "--json", **search.cluster)
    assert again.code == 0, again.stderr
    students = {s["role"]: s for s in again.answer["stages"] if s["name"] == "student"}
    assert {s["status"] for s in students.values()} == {"reused"}
    assert students["student"]["folder"] == str(best)
    shutil.copytree(search.out, tmp_path / "runs", ignore=shutil.ignore_patterns("student-*", "tune-*"))
    anew = distill_ray("student", search.config, override, "--out", tmp_path / "runs", "--json", **search.cluster)
    assert anew.code == 0, anew.stderr
    there = tmp_path / "runs" / "artifacts" / best.name
    assert (there / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()
    assert losses(there) == losses(best)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- rows in the object store -----------------------------------------------------------------------------------------

SHARED = """
import json, os, sys
import numpy as np
import ray
from distill_ray.artifacts import Stage
from distill_ray.config import load
from distill_ray.errors import UserError
from distill_ray.stages import shared_rows
from distill_ray.storage import Folder
from distill_ray.store import open_store, read_split

def stage(name, out):
    folder = next(Folder.at(out).path.glob(f"artifacts/{name}-*"))
    return Stage(name, folder.name.partition("-")[2], Folder.at(folder))

class Trial:
    def look(self, rows):
        split = rows.open("train")
        arrays = [split.row_ids, split.inputs, split.labels, split.logits]
        own = read_split(open_store(DATA.folder), "train", open_store(LABELS.folder))
        same = all(np.array_equal(a, b) for a, b in zip(arrays, (own.row_ids, own.inputs, own.labels, own.logits)))
        return os.getpid(), [bool(a.flags.writeable) for a in arrays], bool(same)

ray.init(sys.argv[1], logging_level="ERROR")
config = load(sys.argv[2], [])
DATA, LABELS = stage("data", sys.argv[3]), stage("labels", sys.argv[3])
rows = shared_rows.share(config, DATA, LABELS)
trials = [ray.remote(num_cpus=1)(Trial).remote() for _ in range(2)]
seen = ray.get([trial.look.remote(rows) for trial in trials])
damaged = shared_rows.share(config, stage("data", sys.argv[4]), stage("labels", sys.argv[4]))
try:
    damaged.open("validation")
    told = None
except UserError as error:
    told = str(error)
print(json.dumps({"seen": seen, "told": told}))
"""


def test_rows_are_mapped_not_copied(search: Search, tmp_path: Path) -> None:
    damaged = tmp_path / "runs"
    shutil.copytree(search.out, damaged, ignore=shutil.ignore_patterns("student-*", "tune-*"))
    shard = min(only(damaged, "artifacts/labels-*").glob("**/validation*"))
    shard.write_bytes(shard.read_bytes()[:-200] + bytes(200))
    found = in_ray(search.cluster, SHARED, search.config, search.out, damaged)
    assert len({pid for pid, _, _ in found["seen"]}) == 2
    assert all(writeable == [False] * 4 and same for _, writeable, same in found["seen"])
    assert str(shard.name) in found["told"]
    assert "\n" not in found["told"]


def test_what_does_not_fit_is_not_shared() -> None:
    node = {"Alive": True, "Resources": {"object_store_memory": 100.0}}
    gone = {"Alive": False, "Resources": {"object_store_memory": 1.0}}
    larger = {"Alive": True, "Resources": {"object_store_memory": 400.0}}
    assert shared_rows.free_bytes([node, gone, larger], {"object_store_memory": 470.0}) == 70.0
    assert shared_rows.free_bytes([node], {}) == 0.0


# --- plain functions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "cluster", "most", "expected"),
    [
        ([Node(4, 0)], {}, 3, (1, 2)),  # two groups of two workers on four CPUs
        ([Node(4, 0)], {}, 1, (2, 1)),  # one student alone has all of them
        ([Node(4, 0)], {"cpus_per_worker": 2}, 3, (2, 1)),
        ([Node(3, 0), Node(1, 0)], {}, 9, (1, 2)),
        ([Node(16, 4), Node(64, 0)], {}, 9, (4, 2)),
        ([Node(16, 4)], {"gpus_per_worker": 0.25}, 9, (4, 2)),  # NCCL takes no two ranks on one GPU
    ],
)
def test_as_many_groups_as_have_all_of_their_workers(
    nodes: list[Node], cluster: dict[str, Any], most: int, expected: tuple[int, int]
) -> None:
    section = ClusterConfig.model_validate({"student_workers": 2, **cluster})
    placement, at_once = placing.groups(section, nodes, most)
    assert (placement.cpus, at_once) == expected
    assert placement.workers == 2


def test_only_a_trial_that_trains_itself_takes_a_cpu() -> None:
    """What follows a group must not take what the group needs."""
    assert search_trial.resources(Placement(1, 1, 0.5)) == {"cpu": 1, "gpu": 0.5}
    following = search_trial.resources(Placement(2, 3, 1.0))
    assert (following["cpu"], set(following)) == (0, {"cpu", "memory"})


def test_a_group_without_room_is_refused() -> None:
    with pytest.raises(UserError, match="lower cluster.student_workers"):
        placing.groups(ClusterConfig.model_validate({"student_workers": 3}), [Node(2, 0)], 5)


def test_a_group_is_asked_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Stage("student", "0", Folder.at(tmp_path))
    inputs = search_space.Inputs(from_dict(SEARCH), Folder.at(tmp_path), place, place)
    monkeypatch.setattr(search_trial, "_planned", lambda *_: SimpleNamespace(stage=place))
    decisions = iter(["CONTINUE", "STOP"])
    scheduler = SimpleNamespace(on_trial_result=lambda *_: next(decisions))
    search_trial.ask_instead_of_stopping(scheduler, inputs)
    trial = SimpleNamespace(trial_id="a_1", config={})
    assert scheduler.on_trial_result(None, trial, {}) == "CONTINUE"
    assert not data_parallel.must_stop(place.folder, "a_1")
    assert scheduler.on_trial_result(None, trial, {}) == "CONTINUE"
    assert data_parallel.must_stop(place.folder, "a_1")
    assert not data_parallel.must_stop(place.folder, "a_2")
    assert not data_parallel.must_stop(place.folder, None)
    data_parallel.forget_stop(place.folder, "a_1")
    assert not list(tmp_path.iterdir())
