"""What all benchmarks share: the settings of a run, a figure and its verdict, alternating pairs, the registry."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Pairs = tuple[tuple[float, float | None], ...]


@dataclass(frozen=True)
class Settings:
    """How long to measure. ``scale`` shrinks what has a size of its own (stores, row counts), for a quick look."""

    out: Path
    pairs: int = 5
    seconds: float = 60.0
    scale: float = 1.0

    def sized(self, full: int, least: int) -> int:
        """``full`` at scale 1, never below ``least``."""
        return max(least, round(full * self.scale))


@dataclass(frozen=True)
class Figure:
    """One measured figure: ``pairs`` of (ours, reference), in ``unit``.

    Rates and sizes alike are given so that ``ratio`` is ours / reference: a rate has to reach the target, a size or a
    time (``at_most``) has to stay below it. Where there is no reference, the target is for ours itself.
    """

    name: str
    unit: str
    pairs: Pairs
    target: float | None
    at_most: bool = False

    @property
    def ours(self) -> float:
        """The median of ours."""
        return median(ours for ours, _ in self.pairs)

    @property
    def reference(self) -> float | None:
        """The median of the references, None where there are none."""
        found = [reference for _, reference in self.pairs if reference is not None]
        return median(found) if found else None

    @property
    def ratio(self) -> float | None:
        """The median of the pairs' own ratios: what slows the machine for a while slows both of a pair."""
        found = [ours / reference for ours, reference in self.pairs if reference is not None]
        return median(found) if found else None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached, None where there is none."""
        if self.target is None:
            return None
        value = self.ours if self.ratio is None else self.ratio
        return value <= self.target if self.at_most else value >= self.target

    def row(self) -> dict[str, Any]:
        """What --json prints."""
        return {
            "name": self.name, "ratio": self.ratio, "target": self.target, "met": self.met, "ours": self.ours,
            "reference": self.reference, "unit": self.unit, "pairs": [list(pair) for pair in self.pairs],
        }  # fmt: skip


Benchmark = Callable[[Settings], Figure]
REGISTRY: dict[str, Benchmark] = {}


def benchmark(name: str) -> Callable[[Benchmark], Benchmark]:
    """Register a function as the figure ``name``, ``<group>.<what>``; its docstring's first line goes to the list."""

    def register(function: Benchmark) -> Benchmark:
        REGISTRY[name] = function
        return function

    return register


def summary_of(function: Benchmark) -> str:
    """The first line of the docstring."""
    return (function.__doc__ or "").strip().splitlines()[0]


def alternate(name: str, pairs: int, ours: Callable[[], float], reference: Callable[[], float]) -> Pairs:
    """Measure in pairs; every second pair starts with the reference, so that a drift favours neither."""
    measured = []
    for number in range(pairs):
        if number % 2:
            other, mine = reference(), ours()
        else:
            mine, other = ours(), reference()
        measured.append((mine, other))
        say(f"{name}: pair {number + 1} of {pairs}: {mine:,.4g} to {other:,.4g}, ratio {mine / other:.3f}")
    return tuple(measured)


def say(text: str) -> None:
    """Progress, on stderr: the benchmarks take minutes."""
    print(text, file=sys.stderr, flush=True)
