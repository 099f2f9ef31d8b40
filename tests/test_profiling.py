"""Where the time went: phases count once each, and rows add up to the whole."""

from __future__ import annotations

import time

import pytest

from distill_ray import profiling
from distill_ray.profiling import PHASES, WAITING, Table


def test_a_phase_within_a_phase_is_counted_once() -> None:
    with profiling.measured() as profile:
        with profiling.phase("compute"):
            time.sleep(0.02)
            with profiling.phase("checkpoints"):
                time.sleep(0.05)
            with profiling.phase("checkpoints"):
                time.sleep(0.05)
        with profiling.phase("reading"):
            time.sleep(0.03)
    spent = profile.seconds
    assert set(spent) == {"compute", "checkpoints", "reading"}
    assert spent["checkpoints"] >= 0.1
    assert spent["reading"] >= 0.03
    assert 0.02 <= spent["compute"] < 0.02 + 0.1  # none of the time of what is within it, which slept longer


def test_without_anybody_who_measures_a_phase_is_nothing() -> None:
    with profiling.phase("compute"):
        pass
    with profiling.measured() as profile:
        pass
    assert profile.seconds == {}


def test_workers_side_by_side_are_averaged_and_what_nobody_explains_is_waiting() -> None:
    table = Table()
    workers = [{"began": 103.0, "seconds": {"compute": 4.0}}, {"began": 105.0, "seconds": {"compute": 6.0}}]
    table.add_workers("student", 100.0, workers, 2)
    table.add_workers("student", 110.0, [{"began": 110.5, "seconds": {"evaluation": 1.0}}], 1)
    table.add_stage("student", 13.0)
    (row,) = table.rows
    assert row["start-up"] == pytest.approx(4.0 + 0.5)
    assert row["compute"] == pytest.approx(5.0)
    assert row["evaluation"] == pytest.approx(1.0)
    assert row[WAITING] == pytest.approx(13.0 - 4.5 - 5.0 - 1.0)


def test_later_shards_do_not_count_as_a_start() -> None:
    """Two actors, of which each has labelled two shards: only the first two began to be waited for."""
    table = Table()
    shards = [{"began": 100.0 + at, "seconds": {"compute": 1.0}} for at in (2.0, 4.0, 5.0, 6.0)]
    table.add_workers("label", 100.0, shards, 2)
    table.add_stage("label", 6.0)
    assert table.rows[0]["start-up"] == pytest.approx(3.0)
    assert table.rows[0]["compute"] == pytest.approx(2.0)


def test_the_rows_add_up_to_the_whole() -> None:
    table = Table()
    table.add_stage("prepare", 2.0)
    table.add_stage("teacher", 3.0)
    total = table.total(7.0)
    assert total["seconds"] == 7.0
    assert sum(total[key] for key in (*PHASES, WAITING)) == pytest.approx(7.0)
