"""What the stages of one run share: the config, where output goes, and the services they use."""

from __future__ import annotations

import importlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import yaml

from distill_ray import artifacts
from distill_ray.artifacts import Stage
from distill_ray.config import Config, to_dict, to_yaml
from distill_ray.console import Reporter
from distill_ray.profiling import Table
from distill_ray.runtime import Session
from distill_ray.storage import Folder
from distill_ray.tracking import Tracker

TRACKING_FILE = "tracking.json"
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Outcome:
    """One stage folder of a run and how it came to be finished."""

    name: str
    folder: str
    seconds: float
    status: Literal["ran", "reused"]
    role: str | None = None
    seed: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Without the keys that do not apply."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass
class Context:
    """Passed to every stage of a run; ``outcomes`` fills up in the order in which stages finish."""

    config: Config
    out: Folder
    reporter: Reporter
    session: Session
    tracker: Tracker
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    profile: Table = field(default_factory=Table)

    def once(
        self, stage_name: str, target: Stage, is_whole: Callable[[Stage], bool], work: Callable[[], None], *,
        ahead: Sequence[str] = (),
    ) -> Stage:  # fmt: skip
        """Run ``work`` unless the folder is finished and whole; record which of the two it was.

        ``ahead`` are modules that ``work`` needs, imported while Ray starts: torch takes as long.
        """
        if target.digest in self.outcomes:
            return target
        if not is_whole(target):
            with artifacts.exclusive(target, self.reporter.line):
                if not is_whole(target):  # another run may have finished it while this one waited
                    self.announce_ray(ahead)
                    with self.timed(stage_name, target):
                        work()
        if target.digest not in self.outcomes:
            self.reused(stage_name, target)
        return target

    @contextmanager
    def timed(self, stage_name: str, target: Stage, role: str | None = None, seed: int | None = None) -> Iterator[None]:
        """Record the stage as ``ran`` with its wall-clock seconds, if it does not fail."""
        self.announce_ray()
        started = time.perf_counter()
        self.reporter.line(f"{stage_name}: {target.folder.name}")
        yield
        seconds = round(time.perf_counter() - started, 3)
        self.profile.add_stage(stage_name, seconds)
        self.outcomes[target.digest] = Outcome(stage_name, str(target.folder), seconds, "ran", role, seed)

    def reused(self, stage_name: str, target: Stage, role: str | None = None, seed: int | None = None) -> None:
        """Record the stage as found finished."""
        self.reporter.line(f"{stage_name}: {target.folder.name} (finished before, reused)")
        self.outcomes[target.digest] = Outcome(stage_name, str(target.folder), 0.0, "reused", role, seed)

    def announce_ray(self, ahead: Sequence[str] = ()) -> None:
        """Start Ray where no stage has yet, importing the modules ``ahead`` meanwhile, and say where Ray is."""
        if not self.session.started:
            started = time.perf_counter()
            with ThreadPoolExecutor(1) as pool:
                imported = [pool.submit(importlib.import_module, module) for module in ahead]
                self.reporter.line(self.session.describe())
                for module in imported:
                    module.result()
            self.profile.add_stage("start of Ray", time.perf_counter() - started)


def write_stage_config(target: Stage, section: dict[str, Any], resolved: dict[str, Any]) -> None:
    """``config.yaml`` of a stage folder: its part of the config, and what ``auto`` values became."""
    target.folder.write_text(CONFIG_FILE, to_yaml({"stage": target.name, "config": section, "resolved": resolved}))


def recorded(folder: Folder) -> dict[str, Any]:
    """What ``auto`` values became when this folder was started, and what else was noted; empty where it was not."""
    try:
        resolved = yaml.safe_load(folder.read_bytes(CONFIG_FILE))["resolved"]
    except (FileNotFoundError, yaml.YAMLError, KeyError, TypeError):
        return {}
    return resolved if isinstance(resolved, dict) else {}


def tracking_id(folder: Folder) -> str:
    """The W&B id of a stage folder: random, since ids made from digests collide between colleagues, and kept."""
    try:
        return str(folder.read_json(TRACKING_FILE)["wandb_id"])
    except (FileNotFoundError, ValueError, KeyError):
        run_id = secrets.token_hex(8)
        folder.write_json(TRACKING_FILE, {"wandb_id": run_id})
        return run_id


def config_section(config: Config, name: str) -> dict[str, Any]:
    """One top-level section as plain data."""
    section = to_dict(config)[name]
    assert isinstance(section, dict)
    return section
