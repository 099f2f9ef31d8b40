"""The Ray edge where it can be seen without a cluster: what is checked, how long is waited, what a failure says."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from distill_ray import runtime
from distill_ray.errors import RunError, UserError
from distill_ray.placing import Placement
from distill_ray.stages.data_parallel import Shortage


def _node(name: str, cpus: float, *, alive: bool = True) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": cpus} if cpus else {}}


@pytest.mark.parametrize(
    ("nodes", "checked"),
    [
        ([_node("here", 2)], []),
        ([_node("here", 2), _node("there", 2)], ["here", "there"]),
        ([_node("here", 0), _node("there", 2)], ["there"]),  # a head that takes no work shares nothing by being there
        ([_node("here", 2), _node("there", 0)], []),
        ([_node("here", 2), _node("there", 2, alive=False)], []),
    ],
)
def test_paths_are_checked_wherever_another_node_works(nodes: list[dict[str, Any]], checked: list[str]) -> None:
    assert [node["NodeID"] for node in runtime.nodes_to_check(nodes, "here")] == checked


def test_a_group_that_has_lost_its_room_is_told_and_ends() -> None:
    """Ray's own elastic policy waits for ever; the clock starts anew where a node came back meanwhile."""
    shortage = Shortage("teacher", Placement(2, 4, 0, most_workers=3))
    looks = [(0, 2), (10, 1), (65, 1), (71, 1), (75, 1), (100, 2), (200, 1), (259, 1)]
    told = [shortage.look(room, now) for now, room in looks]
    assert [now for (now, _), text in zip(looks, told, strict=True) if text] == [71]
    assert told[3] is not None
    assert told[3].startswith("teacher: waiting for room for 2 workers (cluster.workers), the cluster has it for 1; ")
    assert shortage.look(1, 260) is not None
    with pytest.raises(RunError, match=r"teacher: cluster\.workers needs room for 2, and for 10 minutes .* for 1: "):
        shortage.look(1, 801)


def _of_a_group(failure: Exception) -> Exception:
    """As Ray Train hands on what became of a worker."""
    lost_sight = RuntimeError("Connection closed by peer")
    error: Exception = WorkerGroupError("text", {0: lost_sight, 1: WorkerHealthCheckFailedError("text", failure)})
    return error


def _died(text: str) -> Exception:
    error: Exception = ActorDiedError()
    RayActorError.__init__(error, error_msg=text)
    return error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OutOfMemoryError("Task was killed due to the node running low on memory.\nTo adjust ..."),
            "out of memory, Ray",
        ),
        (WorkerCrashedError(), "a worker was killed, most likely by the kernel"),
        (_of_a_group(OutOfMemoryError("text")), "out of memory, Ray"),
        (
            _of_a_group(_died("end of file: (1) the process was killed by the OOM killer due to ...")),
            "a worker was killed",
        ),
    ],
)
def test_memory_that_ran_out_names_the_key_to_lower(error: Exception, told: str) -> None:
    """The kernel gives memory that it does not have: then no allocation fails, a process is killed."""
    text = str(runtime.as_run_error("student", error, "student.train.batch_size"))
    assert text.startswith(f"student failed: {told}")
    assert ": lower student.train.batch_size; finished work is kept" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "error",
    [NodeDiedError("the node was drained"), _of_a_group(_died("its node has died")), ValueError("of another kind")],
)
def test_other_failures_do_not_blame_the_memory(error: Exception) -> None:
    text = str(runtime.as_run_error("student", error, "student.train.batch_size"))
    assert "memory" not in text
    assert "batch_size" not in text


def test_our_own_error_from_a_group_keeps_its_words_and_its_class() -> None:
    kept = runtime.as_run_error("teacher", _of_a_group(UserError("data.path: is gone: bring it back")))
    assert (type(kept), str(kept)) == (UserError, "teacher: data.path: is gone: bring it back")
