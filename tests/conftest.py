"""Fixtures shared by the tests: one small undisturbed run through the real command, on a real local Ray."""

from __future__ import annotations

import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness import SMALL_RUN, Finished, distill_ray, write_config

# A shell without job control starts `make test &` with SIGINT ignored, nohup with SIGHUP: the commands that the tests
# start would inherit that, and no test could interrupt them.
for _stop in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_stop) is signal.SIG_IGN:
        signal.signal(_stop, signal.default_int_handler if _stop is signal.SIGINT else signal.SIG_DFL)


@dataclass(frozen=True)
class SmallRun:
    config: Path
    out: Path
    finished: Finished


@pytest.fixture
def own_copy(small_run: SmallRun, tmp_path: Path) -> SmallRun:
    """The finished small run in a folder that a test may change."""
    out = tmp_path / "own_copy"
    shutil.copytree(small_run.out, out)
    return SmallRun(small_run.config, out, small_run.finished)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """``distill-ray run`` of SMALL_RUN in a fresh folder, from cold. Tests must not change its folders."""
    root = tmp_path_factory.mktemp("small_run")
    config, out = write_config(root, SMALL_RUN), root / "runs"
    finished = distill_ray("run", config, "--out", out, "--json")
    assert finished.code == 0, finished.stderr
    return SmallRun(config, out, finished)
