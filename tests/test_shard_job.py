"""Work on shards whose process dies each time: it ends, in one line, on a real Ray."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill_ray.config import from_dict
from distill_ray.errors import RunError
from distill_ray.placing import Placement
from distill_ray.runtime import Session
from distill_ray.stages import shard_job
from distill_ray.storage import Folder
from tests.report_fixtures import RUN


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    session = Session(from_dict(RUN), Folder.at(tmp_path_factory.mktemp("runs")))
    session.start()
    yield session
    session.close()


@pytest.fixture
def few_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_job, "RETRIES", 1)
    monkeypatch.setattr(shard_job, "RESTARTS", 2)


def test_a_task_whose_process_dies_each_time(session: Session, few_retries: None) -> None:
    def die(item: Any, arguments: Any) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    with pytest.raises(
        RunError, match="prepare failed: a worker was killed.*: lower data.shard_rows; finished work is kept"
    ):
        list(shard_job.run_items("prepare", [{"n": 1}], die, {}))


@pytest.mark.parametrize("when", ["made", "called"])
def test_an_actor_whose_process_dies_each_time(session: Session, few_retries: None, tmp_path: Path, when: str) -> None:
    class Deadly:
        def __init__(self, place: str, when: str) -> None:
            with open(place, "a") as lives:
                lives.write("x")
            if when == "made":
                os.kill(os.getpid(), signal.SIGKILL)

        def __call__(self, item: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

    lives = tmp_path / "lives"
    arguments = {"place": str(lives), "when": when}
    with pytest.raises(RunError, match="label failed: .*: lower labels.batch_size; finished work is kept, the same"):
        list(shard_job.run_shards("label", [{"n": 1}], Deadly, arguments, Placement(1, 1, 0)))
    assert len(lives.read_text()) > 1  # it was tried again
