"""Two writers of one label store at once: with the lock between them, without it, and with other content."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill_ray.console import Reporter
from distill_ray.errors import UserError
from distill_ray.storage import Folder
from distill_ray.store import manifest as manifests
from distill_ray.store import open_store, read_split
from distill_ray.store.verify import verify
from tests.campaign import ledger
from tests.campaign.ground import ROOT, Ground, Tally, last_line
from tests.harness import Finished, environment, only

_OTHER_BATCHES = "labels.batch_size=16"
_LONGEST_PAUSE_S = 0.05  # between two reads of a store whose manifest is taken away afterwards


def two_commands(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """The same command twice, started together."""
    tally = Tally("two `distill-ray label` at once")
    for number in range(count):
        out = ground.copy(f"two-{number}", labels=False)
        with ground.start("label", out) as one, ground.start("label", out) as two:
            _judge(tally, ground, out, one.wait(), two.wait(), ["ran", "reused"])
    return [tally]


def two_hosts(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """The lock of the first is taken from the second's sight, as on a mount that does not share locks.

    The second runs other batches, which round some of the logits in another way: the two write different shards for
    the same rows. Whichever ends with exit 1 is told to run again, and does.
    """
    tally = Tally("two `distill-ray label`, other batch sizes, that do not see each other's lock")
    others = _other_logits(tally, ground)
    for number in range(count):
        out = ground.copy(f"hosts-{number}", labels=False)
        with ground.start("label", out) as one:
            locks = out / "artifacts" / ".locks"
            one.until(lambda locks=locks: any(locks.glob("labels-*.lock")))  # type: ignore[misc]
            only(locks, "labels-*.lock").unlink()
            with ground.start("label", out, _OTHER_BATCHES) as two:
                dones = (one.wait(), two.wait())
        tally.injected += 1
        for done in dones:
            told = done.code == 1 and "another run took it away" in last_line(done)
            tally.expect(done.code == 0 or told, f"exit {done.code}: {last_line(done)}")
        tally.say(" and ".join(map(_outcome, dones)))
        _finish(tally, ground, out, others)
    return [tally]


def _outcome(done: Finished) -> str:
    """Without the shard's name, which is another each time."""
    if done.code:
        return f"exit {done.code}: {last_line(done).split('.arrow: ')[-1]}"
    return f"exit 0: {done.answer['stages'][-1]['status']}"


def _other_logits(tally: Tally, ground: Ground) -> ledger.Rows:
    """What the other batch size gives, undisturbed."""
    out = ground.copy("other-batches", labels=False)
    done = ground.run("label", out, _OTHER_BATCHES)
    if done.code:
        raise RuntimeError(f"labelling with {_OTHER_BATCHES} ended with exit {done.code}: {last_line(done)}")
    others = ledger.rows_of(only(out, "artifacts/labels-*"))
    differing = sum(others[row] != logits for row, logits in ground.reference.items())
    tally.expect(differing > 0, f"{_OTHER_BATCHES} gives the same logits: the two writers would agree by nature")
    return others


def _finish(tally: Tally, ground: Ground, out: Path, others: ledger.Rows) -> None:
    """The same command once more; then each row is there once, as the one writer or the other made it."""
    done = ground.run("label", out)
    tally.expect(done.code == 0, f"the same command ended with exit {done.code}: {last_line(done)}")
    store, ours = only(out, "artifacts/labels-*"), ground.reference
    held = ledger.rows_of(store) if done.code == 0 else {}
    as_held = {row: others[row] if held.get(row) == others[row] else ours[row] for row in ours}
    tally.add(ledger.count(store, only(out, "artifacts/data-*"), as_held))
    problem = _fault_of(store)
    tally.expect(not problem, problem)


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
    """Two processes write other logits for the same shards, and commit, ``count`` times each, while one reads.

    The reader takes the manifest away every now and then, so that both commit anew: a store that is whole stays as it
    is. What a reader sees is a whole store of one of the two, or it is told. In the end the command runs once more: it
    keeps whole shards of either, since both say that they are of this store.
    """
    tally = Tally("two writers of other content, with no lock, and a reader")
    out = ground.copy("rivals", labels=False)
    target, others = out / "artifacts" / ground.labels.name, _halved(ground.reference)
    with ExitStack() as stack:
        both = [stack.enter_context(_rival(ground, target, content, count)) for content in ("ours", "halved")]
        reader = _Reader(tally, only(out, "artifacts/data-*"), target, (ground.reference, others))
        reader.read_while(both, rng)
        written = [json.loads(process.communicate()[0] or "{}") for process in both]
    tally.expect(all(process.returncode == 0 for process in both), "a writer failed")
    tally.expect(all(answer.get("committed") for answer in written), f"a writer never committed: {written}")
    tally.expect(reader.whole > 0, "no whole store was read meanwhile")
    tally.injected += count
    told = sum(sum(answer.get("refused", {}).values()) for answer in written)
    tally.say(
        f"{reader.whole} reads saw the whole store of one of the two, {reader.refused} were refused; {told} of "
        f"{2 * count} commits were"
    )
    _finish(tally, ground, out, others)
    return [tally]


@dataclass
class _Reader:
    """Reads a label store that others write, and counts what it saw."""

    tally: Tally
    data: Path
    labels: Path
    possible: tuple[ledger.Rows, ledger.Rows]
    whole: int = 0
    refused: int = 0

    def read_while(self, writers: Sequence[subprocess.Popen[str]], rng: random.Random) -> None:
        """Again and again; the manifest of a store that was whole is taken away some time later."""
        while any(writer.poll() is None for writer in writers):
            read = self._read()
            time.sleep(rng.uniform(0, _LONGEST_PAUSE_S))
            if read is None:
                self.refused += 1
                continue
            self.whole += 1
            self.tally.expect(read in self.possible, "a reader took rows of both writers, or of none, as one store")
            (self.labels / manifests.FILE).unlink(missing_ok=True)

    def _read(self) -> dict[int, bytes] | None:
        """What is taken as the whole store, None where it is refused."""
        read: dict[int, bytes] = {}
        try:
            store = open_store(str(self.labels))
            for split in store.manifest.splits:
                rows = read_split(open_store(str(self.data)), split, store)
                assert rows.logits is not None
                read |= {int(row): logits.tobytes() for row, logits in zip(rows.row_ids, rows.logits, strict=True)}
        except UserError:
            return None
        return read


def _halved(rows: ledger.Rows) -> ledger.Rows:
    return {row: (np.frombuffer(logits, np.float16) / np.float16(2)).tobytes() for row, logits in rows.items()}


@contextmanager
def _rival(ground: Ground, target: Path, content: str, rounds: int) -> Iterator[subprocess.Popen[str]]:
    call = [sys.executable, "-m", "tests.campaign.rival", str(ground.labels), str(target), content, str(rounds)]
    with subprocess.Popen(call, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
