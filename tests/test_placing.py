"""Where work goes, on clusters of every shape; no Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray import placing, runtime
from distill_ray.config import ClusterConfig, from_dict
from distill_ray.errors import UserError
from distill_ray.placing import Node, Placement
from tests.harness import SMALL_RUN


def _cluster(**keys: Any) -> ClusterConfig:
    return ClusterConfig.model_validate(keys)


@pytest.mark.parametrize(
    ("nodes", "keys", "expected"),
    [
        ([Node(2, 0)], {}, Placement(1, 2, 0)),
        ([Node(1, 0), Node(1, 0)], {}, Placement(2, 1, 0)),
        ([Node(0, 0), Node(8, 0)], {}, Placement(1, 8, 0)),  # a head that takes no work
        ([Node(8, 0)], {"workers": 4}, Placement(4, 2, 0)),
        ([Node(16, 4), Node(64, 0)], {}, Placement(4, 4, 1)),
        ([Node(16, 4)], {"gpus_per_worker": 0}, Placement(1, 16, 0)),
        ([Node(4, 1)], {"gpus_per_worker": 0.5}, Placement(1, 4, 1)),  # NCCL takes no two ranks on one GPU
        ([Node(2, 8)], {}, Placement(2, 1, 1)),  # fewer CPUs than GPUs
    ],
)
def test_training(nodes: list[Node], keys: dict[str, Any], expected: Placement) -> None:
    assert placing.training(_cluster(**keys), nodes) == expected


@pytest.mark.parametrize(
    ("nodes", "keys", "most", "workers", "gpus"),
    [
        ([Node(2, 0)], {}, 100, 2, 0),
        ([Node(2, 0)], {}, 1, 1, 0),
        ([Node(16, 2)], {}, 100, 2, 1),
        ([Node(16, 1)], {"gpus_per_worker": 0.25}, 100, 4, 0.25),
        ([Node(64, 1)], {"gpus_per_worker": 0.1}, 100, 10, 0.1),
        ([Node(4, 1)], {"gpus_per_worker": 0.1}, 100, 4, 0.1),  # as many as the CPUs allow
    ],
)
def test_independent(nodes: list[Node], keys: dict[str, Any], most: int, workers: int, gpus: float) -> None:
    assert placing.independent(_cluster(**keys), nodes, most) == Placement(workers, 1, gpus)


@pytest.mark.parametrize(
    ("nodes", "students", "expected"),
    [
        ([Node(2, 0)], 2, Placement(1, 1, 0)),
        ([Node(2, 0)], 6, Placement(1, 1, 0)),
        ([Node(16, 0)], 2, Placement(1, 8, 0)),
        ([Node(64, 0), Node(4, 1)], 2, Placement(1, 2, 1)),  # the CPUs that count are those beside a GPU
    ],
)
def test_students(nodes: list[Node], students: int, expected: Placement) -> None:
    assert placing.student(_cluster(), nodes, students) == expected


def test_students_of_several_workers_are_placed_as_a_teacher_is() -> None:
    nodes = [Node(8, 0, 64e9), Node(8, 0, 64e9)]
    group = placing.student(_cluster(student_workers=4), nodes, 6)
    assert group == replace(placing.training(_cluster(workers=4), nodes), key="cluster.student_workers")
    assert (group.workers, group.cpus) == (4, 4)
    # A whole GPU each: NCCL takes no two ranks on one.
    on_gpus = placing.student(_cluster(student_workers=2, gpus_per_worker=0.5), [Node(8, 2)], 6)
    assert (on_gpus.workers, on_gpus.gpus) == (2, 1)


def test_more_workers_a_student_than_there_is_room_for_are_refused_before_any_work() -> None:
    wanted = from_dict(SMALL_RUN | {"cluster": {"student_workers": 3}})
    with pytest.raises(UserError, match=r"cluster: 3 worker.* has 2 CPUs / 0 GPUs: lower cluster\.student_workers"):
        placing.preflight(wanted, [Node(2, 0)])
    placing.preflight(wanted, [Node(2, 0), Node(1, 0)])


def test_what_decides_the_order_of_rows_is_the_same_on_any_number_of_workers() -> None:
    """`shuffle: auto` weighs the data against this share of the memory, and its answer is no part of a digest."""
    nodes = [Node(8, 0, 64e9), Node(4, 0, 16e9), Node(0, 0, 1e9)]
    placements = [
        *(placing.training(_cluster(workers=workers), nodes) for workers in ("auto", 1, 2, 12, [1, 4])),
        *(placing.student(_cluster(student_workers=workers), nodes, 6) for workers in (1, 4)),
        *(placing.independent(_cluster(), nodes, trials) for trials in (1, 100)),
    ]
    assert {placement.share_bytes for placement in placements} == {4e9}
    assert {placement.room_bytes for placement in placements} > {4e9}


@settings(deadline=None)
@given(
    nodes=st.lists(st.builds(Node, st.integers(0, 16), st.integers(0, 4)), min_size=1, max_size=5),
    gpus=st.sampled_from(["auto", 0, 0.1, 0.25, 0.5, 1, 2]),
    workers=st.one_of(st.just("auto"), st.integers(1, 6)),
)
def test_what_is_given_always_fits(nodes: list[Node], gpus: Any, workers: Any) -> None:
    cluster = _cluster(gpus_per_worker=gpus, workers=workers)
    places: tuple[Callable[[], Placement], ...] = (
        lambda: placing.training(cluster, nodes),
        lambda: placing.independent(cluster, nodes, 10),
        lambda: placing.student(cluster, nodes, 3),
    )
    for place in places:
        try:
            given_placement = place()
        except UserError:
            continue
        assert given_placement.workers >= 1
        assert given_placement.workers * given_placement.cpus <= sum(node.cpus for node in nodes)
        assert given_placement.workers * given_placement.gpus <= sum(node.gpus for node in nodes) + 1e-6


@pytest.mark.parametrize("key", ["teacher.train.precision", "labels.precision", "student.train.precision"])
def test_fp16_without_a_gpu_is_refused_before_any_work(key: str) -> None:
    raw: dict[str, Any] = {name: dict(value) if isinstance(value, dict) else value for name, value in SMALL_RUN.items()}
    section = raw
    *path, last = key.split(".")
    for part in path:
        section[part] = dict(section[part])
        section = section[part]
    section[last] = "fp16"
    with pytest.raises(UserError, match=f"{key}: fp16 needs a GPU"):
        placing.preflight(from_dict(raw), [Node(8, 0)])
    placing.preflight(from_dict(raw), [Node(8, 1)])


def test_what_every_node_must_see_is_what_the_data_is_read_from() -> None:
    columns = {"input": "x", "label": "y"}

    def found(**data: Any) -> dict[str, str]:
        return runtime.local_sources(from_dict(SMALL_RUN | {"data": data}).data)

    assert found(source="glyph62") == {}
    assert found(source="parquet", path="/a/b/part-*.parquet", root="/a/png[1]", columns=columns) == {
        "data.path": "/a/b", "data.root": "/a/png[1]"
    }  # fmt: skip
    assert found(source="parquet", path="s3://a/b", root="/png", columns=columns) == {"data.root": "/png"}
    assert found(source="images", path="/a", table="t.csv", columns=columns) == {"data.path": "/a"}
    assert found(source="images", path="/a", table="/b/t.csv", columns=columns) == {
        "data.path": "/a", "data.table": "/b/t.csv"
    }  # fmt: skip
