"""Where the time of a run goes: phases, measured where the work is done, gathered into a table by the driver.

A phase costs two reads of a clock; whether anybody asked for the table makes no difference to what is run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

Phase = Literal["start-up", "reading", "compute", "evaluation", "checkpoints", "writing"]
PHASES: tuple[Phase, ...] = ("start-up", "reading", "compute", "evaluation", "checkpoints", "writing")
WAITING = "waiting"  # what no phase explains: schedulers, polls, other processes on the same CPUs

_here = threading.local()


@dataclass
class Profile:
    """The seconds of one piece of work by phase. ``began`` is wall-clock time, so that processes can be compared."""

    began: float = field(default_factory=time.time)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For the way to the driver."""
        return {"began": self.began, "seconds": self.seconds}


@contextmanager
def measured() -> Iterator[Profile]:
    """Measure the phases of what this thread does within."""
    profile = Profile()
    before, _here.stack = getattr(_here, "stack", None), [(profile, 0.0)]
    try:
        yield profile
    finally:
        _here.stack = before


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """A phase of the work that is being measured, if it is. Of phases within phases each counts its own time alone."""
    stack: list[tuple[Profile, float]] | None = getattr(_here, "stack", None)
    if not stack:
        yield
        return
    profile = stack[0][0]
    stack.append((profile, 0.0))
    started = time.perf_counter()
    try:
        yield
    finally:
        spent = time.perf_counter() - started
        _, within = stack.pop()
        profile.seconds[name] = profile.seconds.get(name, 0.0) + spent - within
        outer, others = stack[-1]
        stack[-1] = (outer, others + spent)


@dataclass
class Table:
    """A row a stage, in the order of work: its wall-clock seconds by phase, those of side-by-side workers averaged."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    _workers: dict[str, dict[str, float]] = field(default_factory=dict)

    def add_workers(self, stage: str, asked_at: float, workers: Sequence[Mapping[str, Any]], side_by_side: int) -> None:
        """The profiles of a stage's workers, ``side_by_side`` of which ran at a time; they were asked for at a time.

        A worker that began while others ran already was not waited for: its start-up is that of the first ones.
        """
        sums = self._workers.setdefault(stage, {})
        first = sorted(float(worker["began"]) for worker in workers)[: max(1, side_by_side)]
        if first:
            waited = sum(max(0.0, began - asked_at) for began in first) / len(first)
            sums["start-up"] = sums.get("start-up", 0.0) + waited
        for worker in workers:
            for name, seconds in worker["seconds"].items():
                sums[name] = sums.get(name, 0.0) + seconds / max(1, side_by_side)

    def add_stage(self, stage: str, seconds: float) -> None:
        """A stage is over."""
        phases = self._workers.pop(stage, {})
        row: dict[str, Any] = {"stage": stage, **{name: phases.get(name, 0.0) for name in PHASES}}
        row[WAITING] = max(0.0, seconds - sum(phases.values()))
        self.rows.append(row | {"seconds": seconds})

    def total(self, seconds: float) -> dict[str, Any]:
        """The sums; ``seconds`` is the whole command's, and what no row explains is waiting."""
        sums = {name: sum(row[name] for row in self.rows) for name in (*PHASES, WAITING)}
        sums[WAITING] += max(0.0, seconds - sum(row["seconds"] for row in self.rows))
        return {"stage": "all", **sums, "seconds": seconds}
