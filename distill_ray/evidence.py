"""How sure a difference is: means over seeds, and the interval of a paired difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any


def mean_std(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds; a single seed has no deviation."""
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None, "values": list(values)}


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Mean of ``ours - theirs`` seed by seed, with its 95 % interval from Student's t.

    Paired, since a seed's initial weights and batch order are shared: that part of the spread cancels. An interval that
    spans 0, or the lack of one, is "not resolved".
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, count = fmean(differences), len(differences)
    if count < 2:
        return {"mean": mean, "low": None, "high": None, "seeds": count, "verdict": "not resolved"}
    half = t_quantile_95(count - 1) * stdev(differences) / math.sqrt(count)
    low, high = mean - half, mean + half
    verdict = "not resolved" if low <= 0 <= high else "better" if mean > 0 else "worse"
    return {"mean": mean, "low": low, "high": high, "seeds": count, "verdict": verdict}


def t_quantile_95(degrees: int) -> float:
    """The t with P(|T| <= t) = 0.95: 12.706 at 1 degree of freedom, 1.960 in the limit."""
    low, high = 0.0, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, degrees) < 0.95 else (low, middle)
    return (low + high) / 2


def _t_within(t: float, degrees: int) -> float:
    """P(|T| <= t) for whole degrees of freedom: a finite sum (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1, (degrees - odd) // 2 + 1):
        total += term
        term *= cosine**2 * (2 * k if odd else 2 * k - 1) / (2 * k + 1 if odd else 2 * k)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total
