"""The cases of the campaign, how often each is injected, how long it may take; running them, and the table."""

from __future__ import annotations

import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.campaign import damage, kills, limits, remote, writers
from tests.campaign.ground import WHOLE_RUN, Ground, Overran, Tally, Trail, bounded, merged
from tests.harness import RUN_TIMEOUT_S, SMALL_RUN, distill_ray, write_config

_WIDTH = 160  # where the output is no terminal


@dataclass(frozen=True)
class Case:
    """Faults of one kind, injected ``whole`` times, or ``short`` times in the short campaign (0: left out there)."""

    run: Callable[[Ground, random.Random, int], list[Tally]]
    whole: int
    short: int
    bound_s: float

    @property
    def name(self) -> str:
        """Of its function: also what its random numbers derive from, so that cases do not depend on each other."""
        return self.run.__name__


def one_store(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """What the short campaign does to one store, fault after fault: each command that follows is the next one's."""
    trail = Trail(ground, ground.copy("one_store", labels=False))
    kills.kill_the_driver(trail, rng, count, ground.shards // 2)
    limits.limit_the_files(trail, rng)
    damage.spoil_what_was_left(trail, rng)
    kills.kill_before_the_commit(trail)
    trail.finish()
    return trail.tallies


# The bounds are for a hang, not a measure of speed: several times what a case takes on two idle cores.
CASES = (
    Case(one_store, whole=0, short=1, bound_s=300),
    Case(kills.actors, whole=20, short=1, bound_s=300),
    Case(kills.drivers, whole=20, short=0, bound_s=1200),
    Case(limits.file_limits, whole=2, short=0, bound_s=300),
    Case(limits.small_disks, whole=1, short=0, bound_s=240),
    Case(writers.two_commands, whole=1, short=0, bound_s=240),
    Case(writers.two_hosts, whole=1, short=0, bound_s=240),
    Case(writers.rivals, whole=50, short=10, bound_s=120),
    Case(damage.flips, whole=50, short=50, bound_s=120),
    Case(damage.flip_before_a_student, whole=1, short=0, bound_s=180),
    Case(damage.broken_shards, whole=5, short=2, bound_s=120),
    Case(damage.leftovers, whole=2, short=0, bound_s=300),
    Case(damage.broken_manifests, whole=10, short=3, bound_s=120),
    Case(damage.manifests_made_again, whole=2, short=0, bound_s=240),
    Case(limits.broken_teachers, whole=2, short=1, bound_s=240),
    Case(remote.refusals, whole=1, short=0, bound_s=600),
    Case(remote.two_writers, whole=1, short=0, bound_s=300),
)


def run(ground: Ground, seed: int, *, short: bool) -> list[Tally]:
    """Every case, each within its bound, whatever became of the one before."""
    tallies: list[Tally] = []
    for case in CASES:
        if count := case.short if short else case.whole:
            started = time.monotonic()
            tallies += _bounded_case(case, ground, seed, count)
            took = time.monotonic() - started
            print(f"campaign: {case.name}: {took:.0f} s of at most {case.bound_s:.0f}", file=sys.stderr, flush=True)
    return tallies


def _bounded_case(case: Case, ground: Ground, seed: int, count: int) -> list[Tally]:
    failed = Tally(case.name, injected=count)
    try:
        with bounded(case.bound_s):
            return merged(case.run(ground, random.Random(f"{seed}/{case.name}"), count))
    except Overran as error:
        failed.problems.append(str(error))
    except Exception as error:
        traceback.print_exc()
        failed.problems.append(f"{type(error).__name__}: {error}")
    finally:
        ground.leftovers.close()
    failed.say("the case itself broke off")
    return [failed]


def failures(tallies: Sequence[Tally]) -> list[str]:
    """Why the campaign failed; empty where it passed."""
    return [failure for tally in tallies for failure in tally.failures]


def show(tallies: Sequence[Tally], seed: int) -> None:
    """The table on stdout."""
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, width=_WIDTH)
    table = Table(title=f"label store under faults, seed {seed}", title_justify="left", header_style="bold")
    table.add_column("fault", ratio=2)
    for heading in ("times injected", "rows lost", "rows doubled"):
        table.add_column(heading, justify="right")
    table.add_column("how it was reported", ratio=5)
    for tally in tallies:
        said = [f"{text} (x{times})" if times > 1 else text for text, times in tally.said.items()]
        wrong = [f"[red]FAILED: {escape(problem)}[/red]" for problem in dict.fromkeys(tally.problems)]
        numbers = (f"[red]{n}[/red]" if n not in ("0", "-") else n for n in tally.numbers)
        table.add_row(tally.fault, str(tally.injected), *numbers, "\n".join([*map(escape, said), *wrong]))
    console.print(table)


@contextmanager
def ground_at(config: Path, out: Path, work: Path) -> Iterator[Ground]:
    """The finished run under ``out`` as ground; Ray's own files go with it, at a path that its sockets can have."""
    with tempfile.TemporaryDirectory(prefix="campaign-", dir="/tmp", ignore_cleanup_errors=True) as ray:
        work.mkdir(parents=True, exist_ok=True)
        yield Ground(config, out, work, Path(ray))


@contextmanager
def fresh_ground(*, short: bool) -> Iterator[Ground]:
    """An undisturbed run, made now in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="campaign-ground-") as folder:
        root = Path(folder)
        config, out = write_config(root, SMALL_RUN if short else WHOLE_RUN), root / "runs"
        with bounded(RUN_TIMEOUT_S):
            done = distill_ray("label", config, "tracking.wandb.mode=disabled", "--out", out)
        if done.code:
            raise SystemExit(f"the undisturbed run failed with exit {done.code}: {done.stderr}")
        with ground_at(config, out, root / "work") as ground:
            yield ground
