"""Two writers of one label store at once: with the lock between them, without it, and with other content."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from distill_ray.console import Reporter
from distill_ray.errors import UserError
from distill_ray.storage import Folder
from distill_ray.store import open_store, read_split
from distill_ray.store.verify import verify
from tests.campaign import ledger
from tests.campaign.ground import ROOT, Ground, Tally, last_line
from tests.harness import Finished, environment, only


def two_commands(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """The same command twice, started together."""
    tally = Tally("two `distill-ray label` at once")
    for number in range(count):
        out = ground.copy(f"two-{number}", labels=False)
        with ground.start("label", out) as one, ground.start("label", out) as two:
            _judge(tally, ground, out, one.wait(), two.wait(), ["ran", "reused"])
    return [tally]


def two_hosts(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """The lock of the first is taken from the second's sight, as on a mount that does not share locks."""
    tally = Tally("two `distill-ray label` at once that do not see each other's lock")
    for number in range(count):
        out = ground.copy(f"hosts-{number}", labels=False)
        with ground.start("label", out) as one:
            locks = out / "artifacts" / ".locks"
            one.until(lambda locks=locks: any(locks.glob("labels-*.lock")))  # type: ignore[misc]
            only(locks, "labels-*.lock").unlink()
            with ground.start("label", out) as two:
                _judge(tally, ground, out, one.wait(), two.wait(), ["ran", "ran"])
    return [tally]


def _judge(tally: Tally, ground: Ground, out: Path, one: Finished, two: Finished, wanted: list[str]) -> None:
    tally.injected += 1
    codes = (one.code, two.code)
    tally.expect(codes == (0, 0), f"exits {codes}: {last_line(one)} / {last_line(two)}")
    if codes == (0, 0):
        status = sorted(done.answer["stages"][-1]["status"] for done in (one, two))
        tally.expect(status == wanted, f"the two {' and '.join(status)}, expected {' and '.join(wanted)}")
        tally.say(f"exit 0 of both: {' and '.join(status)}")
    tally.add(ground.count(out))
    problem = _fault_of(only(out, "artifacts/labels-*"))
    tally.expect(not problem, problem)


def _fault_of(store: Path) -> str:
    try:
        verify(Folder(str(store)), Reporter(quiet=True))
    except UserError as error:
        return f"verify: {error}"
    return ""


def rivals(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """Two processes write other logits for the same shards, and commit, ``count`` times each, while one reads."""
    tally = Tally("two writers of other content, with no lock, and a reader")
    out = ground.copy("rivals", labels=False)
    target, data = out / "artifacts" / ground.labels.name, only(out, "artifacts/data-*")
    possible = (ground.reference, _halved(ground.reference))
    reads = 0
    with ExitStack() as stack:
        both = [stack.enter_context(_rival(ground, target, content, count)) for content in ("ours", "halved")]
        while any(process.poll() is None for process in both):
            if (target / "manifest.json").exists():
                tally.expect(not (torn := _torn(data, target, possible)), torn)
                reads += 1
        tally.expect(all(process.wait() == 0 for process in both), "a writer failed")
    tally.injected += count
    tally.expect(reads > 0, "nothing was read meanwhile")
    tally.say("nothing to report: each read saw the whole store of one of the two")
    won = ledger.rows_of(target)
    tally.add(ledger.count(target, data, possible[won != possible[0]]))
    return [tally]


def _halved(rows: ledger.Rows) -> ledger.Rows:
    return {row: (np.frombuffer(logits, np.float16) / np.float16(2)).tobytes() for row, logits in rows.items()}


def _torn(data: Path, labels: Path, possible: tuple[ledger.Rows, ledger.Rows]) -> str:
    """What a reader sees that is neither the one writer's store nor the other's."""
    try:
        store = open_store(str(labels))
        read: dict[int, bytes] = {}
        for split in store.manifest.splits:
            rows = read_split(open_store(str(data)), split, store)
            assert rows.logits is not None
            read |= {int(row): logits.tobytes() for row, logits in zip(rows.row_ids, rows.logits, strict=True)}
    except UserError as error:
        return f"the reader: {error}"
    return "" if read in possible else "the reader: rows of both writers in one store"


@contextmanager
def _rival(ground: Ground, target: Path, content: str, rounds: int) -> Iterator[subprocess.Popen[bytes]]:
    call = [sys.executable, "-m", "tests.campaign.rival", str(ground.labels), str(target), content, str(rounds)]
    with subprocess.Popen(call, cwd=ROOT, env=environment()) as process:
        try:
            yield process
        finally:
            process.kill()
