"""The label store under faults: `python -m tests.campaign`, its short part here and the whole of it as a slow test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaign import plan
from tests.conftest import SmallRun

SEED = 20


def test_campaign_short(small_run: SmallRun, tmp_path: Path) -> None:
    with plan.ground_at(small_run.config, small_run.out, tmp_path) as ground:
        tallies = plan.run(ground, SEED, short=True)
    plan.show(tallies, SEED)
    assert plan.failures(tallies) == []


@pytest.mark.slow
def test_campaign_whole() -> None:
    with plan.fresh_ground(short=False) as ground:
        tallies = plan.run(ground, SEED, short=False)
    plan.show(tallies, SEED)
    assert plan.failures(tallies) == []
