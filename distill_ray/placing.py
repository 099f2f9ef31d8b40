"""Which work goes where, from what the nodes of a cluster have. Plain arithmetic: Ray does the placing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from distill_ray.config import ClusterConfig, Config
from distill_ray.errors import UserError

_MAX_CPUS_PER_MODEL = 8  # beyond this, more threads do not speed up models of the sizes trained here
_ROUNDING = 1e-9  # 1 // 0.1 is 9.0 in floating point


@dataclass(frozen=True)
class Node:
    """What one live node offers; ``memory_bytes`` as Ray counts it, without its object store."""

    cpus: float
    gpus: float
    memory_bytes: float = math.inf


@dataclass(frozen=True)
class Placement:
    """``workers`` processes, each with so many CPUs (its threads) and GPUs.

    ``room_bytes`` is the memory that each can count on where its node is full of such workers, ``share_bytes`` what it
    can count on whatever else there is: on any number of workers the same. ``most_workers`` is 0, or how many there may
    become while the work runs. ``key`` of the config says how many.
    """

    workers: int
    cpus: int
    gpus: float
    room_bytes: float = math.inf
    share_bytes: float = math.inf
    most_workers: int = 0
    key: str = "cluster.workers"

    def resources(self) -> dict[str, float]:
        """As Ray's schedulers want it."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def preflight(config: Config, nodes: Sequence[Node]) -> None:
    """Refuse, before any work, what a stage could never be given; Ray itself would wait for it without end.

    Raises:
        UserError: says what is asked for, what is there, and which key to change.
    """
    trained = training(config.cluster, nodes)
    single = independent(config.cluster, nodes, 1)
    student(config.cluster, nodes, 1)
    for key, asked, gpus in (
        ("teacher.train.precision", config.teacher.train.precision, trained.gpus),
        ("labels.precision", config.labels.precision, single.gpus),
        ("student.train.precision", config.student.train.precision, single.gpus),
    ):
        if asked == "fp16" and not gpus:
            raise UserError(f"{key}: fp16 needs a GPU, and the workers get none here: use auto, bf16 or fp32")


def training(cluster: ClusterConfig, nodes: Sequence[Node]) -> Placement:
    """The workers of one data-parallel model: a whole GPU each (NCCL takes no two ranks on one), or else a node each.

    Raises:
        UserError: the nodes do not have what the config asks for.
    """
    return _group(cluster, nodes, cluster.workers, "cluster.workers")


def _group(
    cluster: ClusterConfig, nodes: Sequence[Node], asked: Literal["auto"] | int | tuple[int, int], key: str
) -> Placement:
    gpus = 1.0 if 0 < (part := _gpus_per_worker(cluster, nodes)) < 1 else part
    usable = [node for node in nodes if node.cpus >= 1 and node.gpus >= gpus]
    least = most = max(1, room_for(usable, Placement(1, 1, gpus)) if gpus else len(usable))
    if isinstance(asked, tuple):
        least, most = asked
    elif asked != "auto":
        least = most = asked
    present = max(least, min(most, room_for(usable, Placement(1, 1, gpus))))  # of an elastic group, now
    cpus = cluster.cpus_per_worker if cluster.cpus_per_worker != "auto" else _most_cpus(usable, present, gpus)
    return _required(nodes, Placement(least, cpus, gpus, most_workers=most if most > least else 0, key=key))


def independent(cluster: ClusterConfig, nodes: Sequence[Node], most: int) -> Placement:
    """Workers that need nothing of each other: one a GPU or fraction of it, else one a CPU; at most ``most``.

    One thread each: on CPUs two processes of one thread label faster than one of two.

    Raises:
        UserError: there is no room for one.
    """
    gpus = _gpus_per_worker(cluster, nodes)
    room = room_for(nodes, Placement(1, 1, gpus))
    return _required(nodes, Placement(max(1, min(most, room)), 1, gpus))


def student(cluster: ClusterConfig, nodes: Sequence[Node], students: int) -> Placement:
    """One worker a student; the CPUs are divided over the students that the config asks for, trained side by side.
    With ``cluster.student_workers`` above 1 the group of each, trained one after another.

    Deliberately not a function of how many are left to train: the thread count must not change when a run continues.

    Raises:
        UserError: there is no room for one.
    """
    if cluster.student_workers > 1:
        return _group(cluster, nodes, cluster.student_workers, "cluster.student_workers")
    gpus = _gpus_per_worker(cluster, nodes)
    usable = [node.cpus for node in nodes if node.cpus >= 1 and node.gpus >= gpus] or [1.0]
    share = max(1, min(int(sum(usable)) // max(1, students), int(max(usable)), _MAX_CPUS_PER_MODEL))
    cpus = cluster.cpus_per_worker if cluster.cpus_per_worker != "auto" else share
    return _required(nodes, Placement(1, cpus, gpus))


def groups(cluster: ClusterConfig, nodes: Sequence[Node], most: int) -> tuple[Placement, int]:
    """The workers of each student of a search, and how many students, ``most`` at most, have room at once: all of
    theirs, since groups that have a part each would wait for each other without end. They share the CPUs.

    Raises:
        UserError: there is no room for one.
    """
    one = _group(cluster, nodes, cluster.student_workers, "cluster.student_workers")
    fixed = cluster.cpus_per_worker if cluster.cpus_per_worker != "auto" else None
    at_once = max(1, min(most, room_for(nodes, replace(one, cpus=fixed or 1)) // one.workers))
    together = at_once * one.workers
    cpus = fixed or _most_cpus(nodes, together, one.gpus)
    return replace(_required(nodes, replace(one, workers=together, cpus=cpus)), workers=one.workers), at_once


def _gpus_per_worker(cluster: ClusterConfig, nodes: Sequence[Node]) -> float:
    if cluster.gpus_per_worker != "auto":
        return cluster.gpus_per_worker
    return 1.0 if any(node.gpus >= 1 for node in nodes) else 0.0


def _most_cpus(nodes: Sequence[Node], workers: int, gpus: float) -> int:
    """The most CPUs each of ``workers`` can have."""
    most = int(max((node.cpus for node in nodes), default=1))
    fitting = [cpus for cpus in range(1, most + 1) if room_for(nodes, Placement(workers, cpus, gpus)) >= workers]
    return max(fitting, default=1)


def room_for(nodes: Sequence[Node], placement: Placement) -> int:
    """How many such workers the nodes have room for, were they all free."""
    by_cpu = [int(node.cpus / placement.cpus + _ROUNDING) for node in nodes]
    if not placement.gpus:
        return sum(by_cpu)
    by_gpu = [int(node.gpus / placement.gpus + _ROUNDING) for node in nodes]
    return sum(min(pair) for pair in zip(by_cpu, by_gpu, strict=True))


def _room(nodes: Sequence[Node], placement: Placement) -> float:
    shares = []
    for node in nodes:
        here = min(placement.workers, room_for([node], placement))
        if here:
            shares.append(node.memory_bytes / here)
    return min(shares)


def _share(nodes: Sequence[Node]) -> float:
    """Of a worker on each CPU, where that is least. No key of the config moves it: what is decided by it is the same
    for any number of workers of a model, and of models side by side."""
    return min((node.memory_bytes / int(node.cpus) for node in nodes if node.cpus >= 1), default=math.inf)


def _required(nodes: Sequence[Node], placement: Placement) -> Placement:
    if room_for(nodes, placement) >= placement.workers:
        return replace(placement, room_bytes=_room(nodes, placement), share_bytes=_share(nodes))
    each = f"{placement.cpus} CPUs" + (f" and {placement.gpus:g} GPUs" if placement.gpus else "")
    there = ", ".join(f"{node.cpus:g} CPUs / {node.gpus:g} GPUs" for node in nodes) or "no nodes"
    raise UserError(
        f"cluster: {placement.workers} worker(s) with {each} each are asked for, the cluster has {there}: lower "
        f"{placement.key}, cluster.cpus_per_worker or cluster.gpus_per_worker"
    )
