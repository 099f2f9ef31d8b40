"""Weights & Biases, in a process of its own: online with a key, offline without one, off on request.

W&B must never ask, hang or fail a run. So the driver only writes events to the pipe of a child process; the child
(``python -m distill_ray.tracking``) talks to W&B. If W&B fails, the run says so once and goes on; if it hangs, the
child is
killed at the end of the run after a bounded wait. When the driver is killed, the pipe closes and the child finishes
its runs. There is one W&B run per stage folder, logged by the driver alone, however many workers train.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, TypeAlias, cast

from distill_ray.config import WandbConfig

_CLOSE_TIMEOUT_S = 60.0  # what an upload may take after the run's own work is done
_ABANDON_TIMEOUT_S = 3.0
_INIT_TIMEOUT_S = 20.0
_RESULT_PREFIX = "@distill_ray "  # our lines on the child's stdout, told from anything W&B may print

Warn: TypeAlias = Callable[[str], None]
_Mode: TypeAlias = Literal["online", "offline"]


class Tracker:
    """The driver's side. Methods return at once and never raise; ``close`` waits at most a minute."""

    def __init__(self, config: WandbConfig, group: str, directory: Path, warn: Warn) -> None:
        self._config, self._group, self._directory, self._warn = config, group, directory, warn
        self._off = config.mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled"
        self._child: _Child | None = None

    def start(self, key: str, *, run_id: str, name: str, job_type: str, config: Mapping[str, Any]) -> None:
        """Open, or continue, the W&B run of a stage folder. ``key`` names it in later calls."""
        self._send(op="start", key=key, id=run_id, name=name, job_type=job_type, config=dict(config))

    def log(self, key: str, row: Mapping[str, float]) -> None:
        """One epoch's numbers."""
        self._send(op="log", key=key, row=dict(row))

    def finish(self, key: str, summary: Mapping[str, Any]) -> None:
        """Final numbers; the run is done."""
        self._send(op="finish", key=key, summary=dict(summary))

    def close(self) -> None:
        """Let the child finish, within bounds."""
        if self._child is not None and not self._child.close(_CLOSE_TIMEOUT_S):
            self._warn(f"W&B did not finish within {_CLOSE_TIMEOUT_S:.0f} s and was stopped: see {self._log_path}")
        self._child = None

    def abandon(self) -> None:
        """Stop soon: the run was interrupted. What was logged is still written, nobody waits for an upload."""
        if self._child is not None:
            self._child.close(_ABANDON_TIMEOUT_S)
        self._child = None

    @property
    def _log_path(self) -> Path:
        return self._directory / "wandb" / "distill-ray.log"

    def _send(self, **event: Any) -> None:
        if self._off:
            return
        try:
            if self._child is None:
                settings = self._config.model_dump() | {
                    "group": self._group, "dir": str(self._directory), "init_timeout_s": _INIT_TIMEOUT_S,
                }  # fmt: skip
                self._child = _Child(settings, self._log_path, self._warn)
            self._child.events.put(json.dumps(event, default=str) + "\n")
        except (OSError, ValueError) as error:
            self._off = True
            self._warn(f"W&B logging is off for the rest of this run: {error}")


class _Child:
    """The child process, the thread that feeds it (a pipe can be full), and the thread that reads its warnings."""

    def __init__(self, settings: Mapping[str, Any], log_path: Path, warn: Warn) -> None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._warn = warn
        self.events: SimpleQueue[str | None] = SimpleQueue()
        with log_path.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "distill_ray.tracking", json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is the driver's to handle
            )
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._feed, self._read)]
        for thread in self._threads:
            thread.start()

    def close(self, timeout_s: float) -> bool:
        """Whether the child took all events and ended in time; it is gone in either case."""
        self.events.put(None)
        try:
            self._process.wait(timeout_s)
            ended = True
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            ended = False
        for thread in self._threads:
            thread.join(timeout=5)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return ended

    def _feed(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            with pipe:
                while (line := self.events.get()) is not None:
                    pipe.write(line)
                    pipe.flush()
        except OSError:
            return  # the child is gone; what it said before stands in its log and in its warnings

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_RESULT_PREFIX):
                self._warn(line.removeprefix(_RESULT_PREFIX).strip())


# --- the child ------------------------------------------------------------------------------------------------------


def _main(settings_json: str) -> int:
    """Read events until the pipe closes. W&B's own failures are told in one line and end the logging, not the run."""
    settings = json.loads(settings_json)
    runs: dict[str, Any] = {}
    try:
        mode = _mode(settings["mode"])
        for line in sys.stdin:
            event = json.loads(line)
            if event["op"] == "start":
                runs[event["key"]], mode = _open_run(settings, event, mode)
            elif event["op"] == "log":
                runs[event["key"]].log(event["row"])
            elif event["op"] == "finish":
                run = runs.pop(event["key"])
                run.summary.update(event["summary"])
                run.finish()
        for run in runs.values():
            run.finish(exit_code=1)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        _tell(f"W&B logging stopped ({type(error).__name__}: {reason}); the run goes on")
        for _ in sys.stdin:  # drain, so that the driver's pipe never fills
            pass
    return 0


def _mode(asked: str) -> _Mode:
    for wanted in (asked, os.environ.get("WANDB_MODE")):
        if wanted in ("online", "offline"):
            return cast(_Mode, wanted)
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    import wandb

    return bool(wandb.Settings().api_key or os.environ.get("WANDB_API_KEY") or _netrc_key(wandb.Settings().base_url))


def _netrc_key(base_url: str) -> bool:
    from netrc import NetrcParseError, netrc
    from urllib.parse import urlparse

    try:
        return netrc().authenticators(urlparse(base_url).hostname or "") is not None
    except (OSError, NetrcParseError):
        return False


def _open_run(settings: Mapping[str, Any], event: Mapping[str, Any], mode: _Mode) -> tuple[Any, _Mode]:
    """Start a run; where the server does not answer, this and all later runs are offline."""
    try:
        return _init(settings, event, mode), mode
    except Exception as error:
        if mode == "offline":
            raise
        _tell(f"W&B cannot be reached ({type(error).__name__}); logging offline: `wandb sync` uploads later")
        # The failed attempt keeps its id in use until the process ends.
        return _init(settings, {**event, "id": f"{event['id']}-offline"}, "offline"), "offline"


def _init(settings: Mapping[str, Any], event: Mapping[str, Any], mode: _Mode) -> Any:
    import wandb

    run = wandb.init(
        project=settings["project"], entity=settings["entity"], group=settings["group"], dir=settings["dir"],
        id=event["id"], name=event["name"], job_type=event["job_type"], config=event["config"], mode=mode,
        resume="allow" if mode == "online" else None, reinit="create_new",
        settings=wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True, x_disable_meta=True,
            init_timeout=settings["init_timeout_s"],
        ),
    )  # fmt: skip
    run.define_metric("epoch")
    run.define_metric("*", step_metric="epoch")  # a continued run's own step counter lags
    return run


def _tell(message: str) -> None:
    print(f"{_RESULT_PREFIX}{message}", flush=True)


@contextmanager
def closing(tracker: Tracker) -> Iterator[Tracker]:
    """Close the tracker at the end of a run; abandon it when the run is interrupted."""
    try:
        yield tracker
    except KeyboardInterrupt:
        tracker.abandon()
        raise
    finally:
        tracker.close()


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
