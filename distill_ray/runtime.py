"""The Ray edge: connect, look at what is there, place work. Ray is imported here and in the stages, nowhere else."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from distill_ray.config import ClusterConfig
from distill_ray.errors import RunError, UserError

DEBUG_VARIABLE = "DISTILL_RAY_DEBUG"  # set by --debug, for what has no other way to know
_CONNECT_TIMEOUT_S = 10.0
_MAX_CPUS_PER_MODEL = 8  # beyond this, more threads do not speed up models of the sizes trained here


@dataclass(frozen=True)
class Node:
    """What one live node offers."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Placement:
    """``workers`` processes, each with so many CPUs (its threads) and GPUs."""

    workers: int
    cpus: int
    gpus: float

    def resources(self) -> dict[str, float]:
        """As Ray's schedulers want it."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


class Session:
    """One Ray session for all stages of a run, started by the first stage that needs it."""

    def __init__(self, cluster: ClusterConfig, *, debug: bool = False) -> None:
        self.cluster = cluster
        self._debug = debug
        self._nodes: list[Node] | None = None

    def start(self) -> list[Node]:
        """Connect, or start a private local cluster; returns the live nodes.

        Raises:
            UserError: no cluster answers at the address, or it does not have what the config asks for. Ray itself would
                wait for such resources without end.
        """
        if self._nodes is None:
            ray = _import_ray()
            address = self.address
            if not self._debug:
                _silence_native_stderr()
            if address != "local":
                _check_answers(address)
            on_sigterm = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(
                    address=address, log_to_driver=self._debug, include_dashboard=False if address == "local" else None,
                    logging_level=logging.INFO if self._debug else logging.ERROR, configure_logging=True,
                )  # fmt: skip
            except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UserError(f"cluster.address {address}: no Ray session could be started ({reason})") from error
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # ray.init puts its own in place, which exits with 15
            self._nodes = _live_nodes()
            preflight(self.cluster, self._nodes)
        return self._nodes

    @property
    def address(self) -> str:
        """Where Ray is: the config's address; for ``auto`` RAY_ADDRESS where it is set, else a private local cluster.

        Inside a submitted job RAY_ADDRESS is set: "local" would leave the job on the head node, silently.
        """
        return (os.environ.get("RAY_ADDRESS") or "local") if self.cluster.address == "auto" else self.cluster.address

    @property
    def started(self) -> bool:
        """Whether a stage has needed Ray so far."""
        return self._nodes is not None

    def close(self) -> None:
        """Leave the cluster, ending a private one."""
        if self._nodes is not None:
            self._nodes = None
            _import_ray().shutdown()

    def describe(self) -> str:
        """One line for the reader: where the work runs."""
        nodes = self.start()
        cpus, gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
        where = "private local cluster" if self.address == "local" else self.address
        return f"Ray: {where}, {len(nodes)} node{'s'[: len(nodes) != 1]}, {cpus:g} CPUs, {gpus:g} GPUs"


def data() -> Any:
    """``ray.data``, without bars or lines of its own unless the run is a debug one."""
    import ray.data

    if not os.environ.get(DEBUG_VARIABLE):
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # set up anew by the import of ray.data
    options = ray.data.DataContext.get_current()
    options.enable_progress_bars = False
    options.print_on_execution_start = False
    return ray.data


def preflight(cluster: ClusterConfig, nodes: Sequence[Node]) -> None:
    """Refuse, before any work, what no stage could be given.

    Raises:
        UserError: says what is asked for, what is there, and which key to change.
    """
    training_placement(cluster, nodes)
    labelling_placement(cluster, nodes, shards=1)
    student_placement(cluster, nodes, students=1)


def training_placement(cluster: ClusterConfig, nodes: Sequence[Node]) -> Placement:
    """Where the workers of one data-parallel model go: a GPU each, or else a node each.

    Raises:
        UserError: the nodes do not have what the config asks for.
    """
    gpus = _gpus_per_worker(cluster, nodes)
    if gpus:
        usable = [node for node in nodes if node.gpus >= gpus]
        workers = cluster.workers if cluster.workers != "auto" else max(1, sum(int(n.gpus // gpus) for n in usable))
    else:
        usable = [node for node in nodes if node.cpus >= 1]
        workers = cluster.workers if cluster.workers != "auto" else max(1, len(usable))
    cpus = cluster.cpus_per_worker if cluster.cpus_per_worker != "auto" else _most_cpus(usable, workers, gpus)
    _require(nodes, Placement(workers, cpus, gpus))
    return Placement(workers, cpus, gpus)


def labelling_placement(cluster: ClusterConfig, nodes: Sequence[Node], shards: int) -> Placement:
    """Labelling actors: one a GPU (or fraction of it), else one a CPU with one thread each, at most one a shard."""
    gpus = _gpus_per_worker(cluster, nodes)
    per_node = [int(node.gpus // gpus) if gpus else int(node.cpus) for node in nodes]
    placement = Placement(max(1, min(shards, sum(per_node))), 1, gpus)
    _require(nodes, placement)
    return placement


def student_placement(cluster: ClusterConfig, nodes: Sequence[Node], students: int) -> Placement:
    """One worker a student; the CPUs are divided over the students that the config asks for, trained side by side.

    Deliberately not a function of how many are left to train: the thread count must not change when a run continues.
    """
    gpus = _gpus_per_worker(cluster, nodes)
    total = int(sum(node.cpus for node in nodes))
    share = max(1, min(total // max(1, students), int(max(node.cpus for node in nodes)), _MAX_CPUS_PER_MODEL))
    cpus = cluster.cpus_per_worker if cluster.cpus_per_worker != "auto" else share
    _require(nodes, Placement(1, cpus, gpus))
    return Placement(1, cpus, gpus)


def as_run_error(stage: str, error: BaseException) -> RunError | UserError:
    """What a failed stage tells the user, in one line.

    Ray wraps what a worker raised, sometimes twice; the innermost cause is what happened. Our own errors keep their
    class, so also their exit code.
    """
    chain = list(_causes(error))
    for cause in reversed(chain):
        if type(cause) in (UserError, RunError):
            return type(cause)(f"{stage}: {cause}")  # type: ignore[return-value]
    lines = [line.strip() for line in str(chain[-1]).splitlines() if line.strip()]
    reason = f"{type(chain[-1]).__name__}: {lines[-1]}" if lines else type(chain[-1]).__name__
    return RunError(f"{stage} failed: {reason}; finished work is kept, the same command continues")


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = getattr(current, "cause", None) or current.__cause__ or _first_worker_failure(current)


def _first_worker_failure(error: BaseException) -> BaseException | None:
    failures = getattr(error, "worker_failures", None)
    return next(iter(failures.values()), None) if isinstance(failures, dict) else None


def _gpus_per_worker(cluster: ClusterConfig, nodes: Sequence[Node]) -> float:
    if cluster.gpus_per_worker != "auto":
        return cluster.gpus_per_worker
    return 1.0 if any(node.gpus >= 1 for node in nodes) else 0.0


def _most_cpus(nodes: Sequence[Node], workers: int, gpus: float) -> int:
    """The most CPUs each of ``workers`` can have."""
    most = int(max((node.cpus for node in nodes), default=1))
    fitting = [cpus for cpus in range(1, most + 1) if _fits(nodes, Placement(workers, cpus, gpus)) >= workers]
    return max(fitting, default=1)


def _fits(nodes: Sequence[Node], placement: Placement) -> int:
    return sum(
        int(min(node.cpus // placement.cpus, node.gpus // placement.gpus if placement.gpus else float("inf")))
        for node in nodes
    )


def _require(nodes: Sequence[Node], placement: Placement) -> None:
    if _fits(nodes, placement) >= placement.workers:
        return
    each = f"{placement.cpus} CPUs" + (f" and {placement.gpus:g} GPUs" if placement.gpus else "")
    there = ", ".join(f"{node.cpus:g} CPUs / {node.gpus:g} GPUs" for node in nodes) or "no nodes"
    raise UserError(
        f"cluster: {placement.workers} worker(s) with {each} each are asked for, the cluster has {there}: lower "
        "cluster.workers, cluster.cpus_per_worker or cluster.gpus_per_worker"
    )


@cache
def _silence_native_stderr() -> None:
    """Send what C++ code writes to file descriptor 2 to /dev/null; Python's ``sys.stderr`` keeps its place.

    Ray's core prints harmless errors of its own there, one for each actor pool. With --debug they are shown.
    """
    ours = sys.__stderr__
    if ours is None or sys.stderr is not ours:
        return  # captured by a notebook or a test: not ours to move
    ours.flush()
    kept = os.fdopen(os.dup(2), "w", buffering=1, encoding=ours.encoding, errors="backslashreplace")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    sys.stderr = kept


def worker_device() -> Any:
    """The torch device of this Ray task or actor: a GPU only where Ray has assigned one, whatever the node has."""
    import torch

    return torch.device("cuda" if _import_ray().get_gpu_ids() else "cpu")


def _live_nodes() -> list[Node]:
    found = [node["Resources"] for node in _import_ray().nodes() if node["Alive"]]
    return [Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in found]


def _check_answers(address: str) -> None:
    """Ray itself retries an address where nobody listens for a long time."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto": Ray looks it up itself, and fails at once where there is none
    try:
        socket.create_connection((host or "127.0.0.1", int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(f"cluster.address {address}: nothing answers there ({error.strerror or error})") from None


def _import_ray() -> Any:
    # Read by ray at import or at the start of its processes. setdefault: the user's own choice stands.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")  # reports wait for this poll; the default is 2 s
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    return ray
