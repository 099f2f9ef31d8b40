"""What every source offers to the prepare stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

SPLITS = ("train", "validation", "test")
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SourceInfo:
    """What is known of a source before its rows are read."""

    shape: tuple[int, ...]
    dtype: str
    class_names: tuple[str, ...]
    synthetic: bool
    splits: Mapping[str, Indices]  # split -> the source's own row numbers
    warnings: tuple[str, ...] = ()  # what looks wrong but may be meant


@dataclass(frozen=True)
class Examples:
    """N rows: ``inputs`` [N, *shape], ``labels`` int64 [N], ``source_ids``: the user's own ids, [N]."""

    inputs: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]
    source_ids: Sequence[str]


class Source(Protocol):
    """Rows by number. A source is cheap to open in every worker and reads only the rows asked for."""

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able description of the source files' state, part of the data digest."""
        ...

    def info(self) -> SourceInfo:
        """Shape, classes and splits."""
        ...

    def read(self, indices: Indices) -> Examples:
        """The rows of these numbers, in this order."""
        ...


def split_by_fractions(rows: Indices, fractions: Sequence[float], seed: int) -> dict[str, Indices]:
    """Divide ``rows`` at random into train, validation (and test, where three fractions are given).

    Every split whose fraction is above 0 gets at least one row.
    """
    order = np.random.default_rng((seed, 1)).permutation(rows)
    counts = [max(1, round(f * len(rows))) if f > 0 else 0 for f in fractions[1:]]
    splits: dict[str, Indices] = {}
    start = 0
    for name, count in zip(SPLITS[1:], counts, strict=False):
        splits[name] = np.sort(order[start : start + count])
        start += count
    return {"train": np.sort(order[start:]), **splits}
