"""Student's t and paired differences, against the density's own formula and worked examples."""

from __future__ import annotations

import math

import pytest

from distill_ray import evidence


def inside(t: float, degrees: int, steps: int = 2000) -> float:
    """The share of Student's t within [-t, t], from the density's formula by Simpson's rule."""
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    heights = [scale * (1 + (i * t / steps) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(steps + 1)]
    area: float = (heights[0] + 4 * sum(heights[1::2]) + 2 * sum(heights[2:-1:2]) + heights[-1]) * t / steps / 3
    return 2 * area


@pytest.mark.parametrize("degrees", [*range(1, 31), 100, 1000])
def test_95_percent_of_the_distribution_lie_within_the_quantile(degrees: int) -> None:
    assert inside(evidence.t_quantile_95(degrees), degrees) == pytest.approx(0.95, abs=1e-6)


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (4, 2.776), (9, 2.262), (29, 2.045), (10_000, 1.960)])
def test_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert evidence.t_quantile_95(degrees) == pytest.approx(quantile, abs=5e-4)


def test_paired_differences() -> None:
    # Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(2) = 4.303: 2 +- 2.484.
    wide = evidence.paired_difference([2, 4, 6], [1, 2, 3])
    assert (wide["low"], wide["high"]) == pytest.approx((-0.484, 4.484), abs=1e-3)
    assert wide["verdict"] == "not resolved"
    assert evidence.paired_difference([2.0, 2.1, 2.2], [1, 1.1, 1.1])["verdict"] == "better"
    assert evidence.paired_difference([1, 1.1, 1.1], [2.0, 2.1, 2.2])["verdict"] == "worse"
    assert evidence.paired_difference([2.0], [1.0]) == {
        "mean": 1.0, "low": None, "high": None, "seeds": 1, "verdict": "not resolved",
    }  # fmt: skip
