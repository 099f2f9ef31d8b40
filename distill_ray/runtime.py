"""The Ray edge: connect, look at what is there, tell what failed. Ray is imported here and in the stages alone."""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from distill_ray import placing, usercode
from distill_ray.config import Config, DataBase, imports_of, to_dict
from distill_ray.errors import RunError, UserError
from distill_ray.memory import ONE_HEAP
from distill_ray.placing import Node
from distill_ray.sources.files import split_location
from distill_ray.storage import Folder, impatience

DEBUG_VARIABLE = "DISTILL_RAY_DEBUG"  # set by --debug, for what has no other way to know
_HEAD_POLL_S, _HEAD_LOST_S = 5.0, 45.0  # Ray's own patience is 60 s
_CONNECT_TIMEOUT_S = 10.0
# Of a task that Ray kills since its node runs out of memory, with pauses that grow to a minute: about five minutes, in
# which other work on the node may end. Ray's own default is to try again for ever, silently.
_OOM_RETRIES = ("RAY_task_oom_retries", "10")
_CHECKS_TIMEOUT_S = 20.0  # all checks together: worker processes to start; a mistake is told within half a minute


class Session:
    """One Ray session for all stages of a run, started by the first stage that needs it."""

    def __init__(self, config: Config, out: Folder, *, debug: bool = False, in_command: bool = False) -> None:
        self._config, self._out, self._debug, self._in_command = config, out, debug, in_command
        self._ours = False  # whether Ray is ours to leave
        self._nodes: list[Node] | None = None
        self._staged: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> list[Node]:
        """Connect, or start a private local cluster; returns the live nodes.

        Raises:
            UserError: no cluster answers at the address, it does not have what the config asks for, or one of its nodes
                does not see ``--out`` or the source.
        """
        if self._nodes is None:
            os.environ.setdefault(*_OOM_RETRIES)  # before Ray is imported
            if self._in_command and not self._debug:
                _silence_native_stderr()
            if not _import_ray().is_initialized():  # a notebook may have its own
                if self.address != "local":
                    _check_answers(self.address)
                self._ours = True
                self._init()
            self._nodes = live_nodes()
            if self._in_command:
                _watch_head()
            placing.preflight(self._config, self._nodes)
            self._check(self._nodes)
        return self._nodes

    def _check(self, nodes: Sequence[Node]) -> None:
        """What only the nodes themselves can tell, all of it asked for at once: torch takes its time to be imported."""
        until = time.monotonic() + _CHECKS_TIMEOUT_S
        cuda = ask_for_cuda(placing.independent(self._config.cluster, nodes, 1).gpus)
        check_every_node(self._out, local_sources(self._config.data), until)
        check_cuda(cuda, until)
        if not self._ours:
            check_code(self._modules(), until)

    def _init(self) -> None:
        """``ray.init``, which replaces the handler of SIGTERM by one that exits with 15, at once and for good."""
        ray = _import_ray()
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            with _one_heap_for_threads():
                ray.init(
                    address=self.address, log_to_driver=self._debug, configure_logging=True,
                    include_dashboard=False if self.address == "local" else None,
                    logging_level=logging.INFO if self._debug else logging.ERROR,
                    runtime_env=self._code_for_workers(),
                )  # fmt: skip
        except SystemExit:
            _shutdown()
            raise KeyboardInterrupt from None
        except Exception as error:  # a raylet that does not start is a plain Exception
            _shutdown()
            raise UserError(f"cluster.address {self.address}: {_why_not(error)}") from error
        except KeyboardInterrupt:
            _shutdown()
            raise
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)

    def _code_for_workers(self) -> dict[str, str] | None:
        """What must travel where the config names code: the modules of the current folder that this code is made of.

        A private cluster's workers see the current folder itself, and those of a submitted job its working directory.
        """
        if self.address == "local" or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
            return None
        files = {name: file for module in self._modules() for name, file in usercode.local_files(module).items()}
        if not files:
            return None
        self._staged = tempfile.TemporaryDirectory(prefix="distill-ray-code-")
        for name, file in files.items():
            copy = Path(self._staged.name) / usercode.relative_path(name, file)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
        return {"working_dir": self._staged.name}

    def _modules(self) -> list[str]:
        """That the config names code in."""
        named = " ".join(code for _, code in imports_of(to_dict(self._config)))
        return sorted(set(re.findall(r"([A-Za-z_][\w.]*):[A-Za-z_]", named)))

    @property
    def address(self) -> str:
        """Where Ray is: the config's address; for ``auto`` RAY_ADDRESS where it is set, else a private local cluster.

        Inside a submitted job RAY_ADDRESS is set: "local" would leave the job on the head node, silently.
        """
        asked = self._config.cluster.address
        return (os.environ.get("RAY_ADDRESS") or "local") if asked == "auto" else asked

    @property
    def started(self) -> bool:
        """Whether a stage has needed Ray so far."""
        return self._nodes is not None

    @property
    def cpus(self) -> int:
        """Of all nodes; 1 before a stage has needed Ray."""
        return max(1, int(sum(node.cpus for node in self._nodes or ())))

    def close(self) -> None:
        """Leave the cluster, ending a private one; one that was there before the session stays."""
        self._nodes = None
        if self._ours:
            self._ours = False
            _shutdown()

    def describe(self) -> str:
        """One line for the reader: where the work runs."""
        nodes = self.start()
        cpus, gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
        where = "private local cluster" if self.address == "local" else self.address
        return f"Ray: {where}, {len(nodes)} node{'s'[: len(nodes) != 1]}, {cpus:g} CPUs, {gpus:g} GPUs"


def _shutdown() -> None:
    """``ray.shutdown``, which a further Ctrl-C must not cut short: it would leave Ray's processes behind."""
    if threading.current_thread() is not threading.main_thread():
        _import_ray().shutdown()
        return
    on_sigint = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _import_ray().shutdown()
    finally:
        signal.signal(signal.SIGINT, on_sigint)


def _watch_head() -> None:
    """Tell when Ray's head is gone. Ray itself ends the process after a minute without it, without a word."""
    host, _, port = str(_import_ray().get_runtime_context().gcs_address).rpartition(":")

    def answers() -> bool:
        try:
            socket.create_connection((host, int(port)), timeout=_HEAD_POLL_S).close()
        except OSError:
            return False
        return True

    def watch() -> None:
        silent_s = 0.0
        while silent_s < _HEAD_LOST_S:
            time.sleep(_HEAD_POLL_S)
            if not _import_ray().is_initialized():
                return
            silent_s = 0.0 if answers() else silent_s + _HEAD_POLL_S
        text = f"the Ray head at {host}:{port} is gone; finished work is kept, the same command continues"
        print(f"distill-ray: {text}", file=sys.stderr, flush=True)
        os._exit(RunError.exit_code)  # nothing that needs Ray can be cleaned up any more

    threading.Thread(target=watch, name="watch-ray-head", daemon=True).start()


def _why_not(error: BaseException) -> str:
    home = str(Path.home())
    if isinstance(error, OSError) and str(error.filename or "").startswith(home):
        return f"HOME {home} cannot be written ({error.strerror}), and Ray keeps its token there: set HOME"
    if any("auth" in str(cause).lower() and "token" in str(cause).lower() for cause in _causes(error)):
        return (
            "the cluster refuses the token, or misses one: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or "
            "RAY_AUTH_TOKEN_PATH) to what the cluster was started with"
        )
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"no Ray session could be started ({reason})"


def local_sources(data: DataBase) -> dict[str, str]:
    """Which local files and folders the data is read from, by the key that names them; of a pattern its folder."""
    named = {key: getattr(data, key, None) for key in ("path", "root", "table")}
    found = {key: place for key, place in named.items() if place is not None and "://" not in place}
    if "path" in found:
        found["path"] = split_location(found["path"])[0]
    if not Path(found.get("table", "")).is_absolute():  # then it lies in data.path
        found.pop("table", None)
    return {f"data.{key}": place for key, place in found.items()}


def nodes_to_check(nodes: Sequence[Mapping[str, Any]], here: str) -> list[Mapping[str, Any]]:
    """Of ``ray.nodes()`` those that will work; none where that is the node ``here`` alone, which needs no proof.

    A head that takes no work leaves one such node, which is not here.
    """
    working = [node for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    return [] if [node["NodeID"] for node in working] == [here] else working


def check_every_node(out: Folder, sources: Mapping[str, str], until: float) -> None:
    """Where other nodes work than this one: each must read a token from ``out``, write one back, and read the sources.

    ``until`` is of ``time.monotonic()``: a mount that hangs answers never.

    Raises:
        UserError: names the node and the path that it does not share, or the node that is silent.
    """
    ray = _import_ray()
    nodes = nodes_to_check(ray.nodes(), ray.get_runtime_context().get_node_id())
    if not nodes:
        return
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token = f"node-check-{secrets.token_hex(4)}"
    out.write_text(token, token)
    task = ray.remote(num_cpus=0, max_retries=0)(_sees)
    names = {}
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answer = task.options(scheduling_strategy=here).remote(out, token, f"{token}-{node['NodeID']}", sources)
        names[answer] = (node["NodeManagerAddress"], f"{token}-{node['NodeID']}")
    try:
        done, late = ray.wait(list(names), num_returns=len(names), timeout=_left(until))
        for answer in done:
            address, written = names[answer]
            problem = ray.get(answer) or (None if out.exists(written) else f"--out {out}: is a folder of its own there")
            if problem:
                raise UserError(f"node {address}: {problem}: use storage that every node sees under the same path")
        if late:
            places = ", ".join([f"--out {out}", *(f"{key} {place}" for key, place in sources.items())])
            raise UserError(
                f"cluster: node {names[late[0]][0]} did not say within {_CHECKS_TIMEOUT_S:.0f} s whether it sees "
                f"{places}: look there whether a mount hangs, or run the command again"
            )
    finally:
        for name in (token, *(written for _, written in names.values())):
            out.delete(name)


def _sees(out: Folder, token: str, written: str, sources: Mapping[str, str]) -> str | None:
    """Runs on a node: what it does not see, None where all is well."""
    try:
        with impatience():  # somebody waits for the answer
            if out.read_bytes(token).decode() != token:
                return f"--out {out}: reads back differently there"
            out.write_text(written, written)
    except OSError as error:
        return f"--out {out}: is not shared with it ({error.strerror or error})"
    for key, place in sources.items():
        try:
            if Path(place).is_dir():
                os.scandir(place).close()
            else:
                Path(place).open("rb").close()
        except FileNotFoundError:
            return f"{key} {place}: is not there"
        except OSError as error:
            return f"{key} {place}: cannot be read there ({error.strerror or error})"
    return None


def _left(until: float) -> float:
    return max(0.0, until - time.monotonic())


def ask_for_cuda(gpus: float) -> Any:
    """Where workers get GPUs, the task that looks at their torch, for ``check_cuda``; else None."""
    return _import_ray().remote(num_cpus=1, num_gpus=gpus)(worker_device).remote() if gpus else None


def check_cuda(asked: Any, until: float) -> None:
    """Where workers get GPUs: their torch must be a CUDA build.

    Raises:
        UserError: it is not.
    """
    if asked is not None:
        ray = _import_ray()
        try:
            ray.get(asked, timeout=_left(until))
        except ray.exceptions.GetTimeoutError:
            return  # the GPUs are busy with other work: the stages wait for them as anyone does
        except Exception as error:
            raise as_run_error("cluster", error) from error


def check_code(modules: Sequence[str], until: float) -> None:
    """Where Ray was there before the run, so that no code travelled with it: its workers must see the same code.

    Raises:
        UserError: they see none, or an older copy; results would stand under the digest of code that did not make them.
    """
    if not modules:
        return
    ray = _import_ray()
    here = [usercode.fingerprint(module, "import") for module in modules]
    try:
        there = ray.get(ray.remote(num_cpus=0)(_seen).remote(modules), timeout=_left(until))
    except ray.exceptions.GetTimeoutError:
        late = f"no worker said within {_CHECKS_TIMEOUT_S:.0f} s what it sees of {modules[0]}"
        raise UserError(f"cluster: {late}: run the command again") from None
    for module, ours, theirs in zip(modules, here, there, strict=True):
        if ours != theirs:
            what = "do not find it" if theirs is None else "have other source of it than is here"
            raise UserError(
                f"{module}: the workers of the Ray that was running before {what}: call ray.shutdown(), the run starts "
                "its own"
            )


def _seen(modules: Sequence[str]) -> list[str | None]:
    """Runs in a Ray task."""
    return [usercode.fingerprint(m, "import") if usercode.find(m) is not None else None for m in modules]


def data() -> Any:
    """``ray.data``, without bars or lines of its own unless the run is a debug one."""
    import ray.data

    if not os.environ.get(DEBUG_VARIABLE):
        # Set up anew by the import of ray.data. A failure is told by our own line; Ray's report of it has pages.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    options = ray.data.DataContext.get_current()
    options.enable_progress_bars = False
    options.print_on_execution_start = False
    return ray.data


def as_run_error(stage: str, error: BaseException, lower: str | None = None) -> RunError | UserError:
    """What a failed stage tells the user, in one line.

    Ray wraps what a worker raised, sometimes twice; the innermost cause is what happened. Our own errors keep their
    class, so also their exit code. ``lower`` is the key that decides how much memory a worker takes: on Linux memory
    that is not there is given all the same, and whoever uses it is killed, by Ray or by the kernel.
    """
    chain = list(_causes(error))
    for cause in reversed(chain):
        if type(cause) in (UserError, RunError):
            ours = str(cause).partition("\n")[0].rstrip()  # Ray Data adds lines about its own retries
            return type(cause)(f"{stage}: {ours}")  # type: ignore[return-value]
    if killed := _why_killed(chain):
        mend = f"lower {lower}" if lower is not None else "give the node more memory"
        return RunError(f"{stage} failed: {killed}: {mend}; finished work is kept, the same command continues")
    last = next((cause for cause in reversed(chain) if str(cause).strip()), chain[-1])  # Ray Data's own says nothing
    lines = [line.strip() for line in str(last).splitlines() if line.strip()]
    reason = f"{type(last).__name__}: {lines[-1]}" if lines else type(last).__name__
    return RunError(f"{stage} failed: {reason}; finished work is kept, the same command continues")


def _why_killed(chain: Sequence[BaseException]) -> str | None:
    """Where a worker's process ended without a word, what has most likely happened; else None."""
    from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, WorkerCrashedError

    if any(isinstance(cause, OutOfMemoryError) for cause in chain):
        return "out of memory, Ray killed a worker before its node had none left"
    # Ray's words for a process whose connection broke; those of an actor that failed or whose node died are others.
    silent = any(isinstance(c, ActorDiedError) and "OOM killer" in str(c) for c in chain)
    if silent or any(isinstance(cause, WorkerCrashedError | ActorUnavailableError) for cause in chain):
        return "a worker was killed, most likely by the kernel for want of memory (dmesg says so), or it crashed"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = getattr(current, "cause", None) or current.__cause__ or _failure_within(current)


def _failure_within(error: BaseException) -> BaseException | None:
    """What Ray Train keeps beside its errors' texts; of a group a lost worker, of which the others only lost sight."""
    failures = getattr(error, "worker_failures", None)
    if isinstance(failures, dict):
        lost = [failure for failure in failures.values() if hasattr(failure, "health_check_failure")]
        return next(iter([*lost, *failures.values()]), None)
    within = getattr(error, "health_check_failure", None) or getattr(error, "controller_failure", None)
    return within if isinstance(within, BaseException) else None


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

    if not _import_ray().get_gpu_ids():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "this node has GPUs, but its torch sees none: install its CUDA build, or set cluster.gpus_per_worker=0"
        )
    return torch.device("cuda")


def live_nodes() -> list[Node]:
    """What the cluster has now."""
    found = [node["Resources"] for node in _import_ray().nodes() if node["Alive"]]
    return [
        Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0), resources.get("memory", math.inf))
        for resources in found
    ]


def _check_answers(address: str) -> None:
    """Ray itself retries an address where nobody listens for a long time."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto": Ray looks it up itself, and fails at once where there is none
    try:
        socket.create_connection((host or "127.0.0.1", int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(f"cluster.address {address}: nothing answers there ({error.strerror or error})") from None


@contextmanager
def _one_heap_for_threads() -> Iterator[None]:
    """For the processes that are started meanwhile, a private cluster's: memory.ONE_HEAP. The user's choice stands."""
    if any(name in os.environ for name in (ONE_HEAP, "GLIBC_TUNABLES")):
        yield
        return
    os.environ[ONE_HEAP] = "1"
    try:
        yield
    finally:
        os.environ.pop(ONE_HEAP, None)


def _import_ray() -> Any:
    # Read by ray at import or at the start of its processes. setdefault: the user's own choice stands.
    # Ray Train's end waits for this poll, 2 s by default; at 0.1 s the polls took 4 % of two CPUs.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    return ray
