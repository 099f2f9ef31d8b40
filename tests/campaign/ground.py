"""What every case stands on: a finished run to copy, commands that leave no process behind, and the tally."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from tests.campaign import ledger
from tests.harness import COMMAND, RUN_TIMEOUT_S, SMALL_RUN, Finished, environment, only, session_processes

POLL_S = 0.005
ROOT = Path(__file__).parents[2]
# The whole campaign's teacher is wide (8 ms a row on one thread) so that kills land inside a shard too, and trains on
# few rows, which costs little; gently, so that it tells the rows apart afterwards (see Ground.reference).
WHOLE_RUN: dict[str, Any] = SMALL_RUN | {
    "name": "campaign",
    "data": {"source": "glyph62", "rows": 1860, "shard_rows": 16, "split": {"fractions": [0.2, 0.1, 0.7]}},
    "teacher": {
        "model": {"name": "char_cnn", "channels": [256, 256, 64], "hidden": [64]},
        "train": {"epochs": 1, "batch_size": 64, "precision": "auto", "lr": 0.0003},
    },
}


class Overran(BaseException):
    """A case took longer than its bound. No ``except Exception`` may swallow it."""


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise Overran in the block when it takes longer; for the main thread."""

    def ring(signum: int, frame: FrameType | None) -> None:
        raise Overran(f"overran its bound of {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Tally:
    """One row of the table."""

    fault: str
    injected: int = 0
    lost: int = 0
    doubled: int = 0
    counted: bool = False  # whether lost and doubled were counted by the ledger
    said: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    skipped: str = ""  # why the fault could not be made here

    def say(self, text: str) -> None:
        """How a fault was reported; the same words are counted."""
        self.said[text] = self.said.get(text, 0) + 1

    def expect(self, holds: bool, problem: str) -> None:
        """What must hold; otherwise the campaign fails with this line."""
        if not holds:
            self.problems.append(problem)

    def add(self, counted: ledger.Count) -> None:
        """Rows that are not what they were in the undisturbed run."""
        self.counted = True
        self.lost += counted.lost
        self.doubled += counted.doubled

    @property
    def numbers(self) -> tuple[str, str]:
        """Rows lost and doubled as the table shows them: a dash where nothing was counted."""
        return (str(self.lost), str(self.doubled)) if self.counted else ("-", "-")

    @property
    def failures(self) -> list[str]:
        """Everything that makes the campaign fail, in words."""
        found = [f"{self.fault}: {problem}" for problem in self.problems]
        if self.lost or self.doubled:
            found.append(f"{self.fault}: {self.lost} rows lost, {self.doubled} doubled")
        if not self.injected and not self.skipped:
            found.append(f"{self.fault}: was never injected")
        elif self.injected and not self.said:
            found.append(f"{self.fault}: was not reported")
        return found


def merged(tallies: Sequence[Tally]) -> list[Tally]:
    """One row a fault: the tallies of the same fault added up."""
    rows: dict[str, Tally] = {}
    for tally in tallies:
        if (row := rows.setdefault(tally.fault, tally)) is tally:
            continue
        row.injected += tally.injected
        row.lost += tally.lost
        row.doubled += tally.doubled
        row.counted |= tally.counted
        row.problems += tally.problems
        for text, times in tally.said.items():
            row.said[text] = row.said.get(text, 0) + times
    return list(rows.values())


@dataclass(frozen=True)
class Ground:
    """A finished run that no case changes, and a folder for the cases' copies of it."""

    config: Path
    out: Path
    work: Path
    ray: Path  # Ray's sockets and logs; their paths may not be long
    leftovers: ExitStack = field(default_factory=ExitStack)  # what killed commands left running; closed after a case

    @property
    def labels(self) -> Path:
        """The label store of the undisturbed run."""
        return only(self.out, "artifacts/labels-*")

    @property
    def data(self) -> Path:
        """The data store of the undisturbed run."""
        return only(self.out, "artifacts/data-*")

    @cached_property
    def reference(self) -> ledger.Rows:
        """The undisturbed run's logits by row id, no two alike: otherwise a row could stand for another."""
        rows = ledger.rows_of(self.labels)
        if len(set(rows.values())) < len(rows):
            raise RuntimeError("the undisturbed run's teacher gives several rows the same logits")
        return rows

    @cached_property
    def data_reference(self) -> ledger.Rows:
        """The undisturbed run's inputs and labels by row id."""
        return ledger.rows_of(self.data)

    @cached_property
    def names(self) -> frozenset[str]:
        """The label shards of the undisturbed run: in fp32 on one thread an actor, any run writes these very files."""
        return frozenset(path.name for path in self.labels.glob("[!.]*.arrow"))

    @property
    def shards(self) -> int:
        """How many label shards there are in the end."""
        return len(self.names)

    @cached_property
    def seconds_per_shard(self) -> float:
        """Of the undisturbed labelling."""
        times = [path.stat().st_mtime for path in self.labels.glob("[!.]*.arrow")]
        return (max(times) - min(times)) / len(times)

    def copy(self, name: str, *, labels: bool, place: Path | None = None) -> Path:
        """Data and teacher, with or without the labels, in a folder of the case's own; returns ``--out``."""
        out = (place or self.work / name) / "runs"
        kept = ("data-*", "teacher-*", *(("labels-*",) if labels else ()))
        for folder in sorted(path for pattern in kept for path in self.out.glob(f"artifacts/{pattern}")):
            leave = shutil.ignore_patterns("checkpoints", ".tmp-*")
            shutil.copytree(folder, out / "artifacts" / folder.name, ignore=leave)
        return out

    def count(self, out: Path) -> ledger.Count:
        """The rows of the label store under ``out``."""
        stores = list(out.glob("artifacts/labels-*"))
        if len(stores) != 1:
            return ledger.Count(len(self.reference), 0)
        return ledger.count(stores[0], only(out, "artifacts/data-*"), self.reference)

    def start(self, stage: str, out: Path | str, *more: str, **env: str) -> Running:
        """The real command on the campaign's config, running."""
        quiet = ("tracking.wandb.mode=disabled", "--json")
        return Running([stage, str(self.config), "--out", str(out), *quiet, *more], self.ray, env)

    def run(self, stage: str, out: Path | str, *more: str, **env: str) -> Finished:
        """The real command on the campaign's config, to its end."""
        with self.start(stage, out, *more, **env) as command:
            return command.wait()

    def verify(self, store: Path) -> Finished:
        """`distill-ray verify` of a store; without the teacher, which the ledger makes unnecessary."""
        with Running(["verify", str(store), "--json", "--sample", "0"], self.ray, {}) as command:
            return command.wait()


class Running:
    """A command in a session of its own; when the block ends, nothing of that session is left."""

    def __init__(self, arguments: list[str], ray_folder: Path, env: Mapping[str, str]) -> None:
        self._out, self._err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*COMMAND, *arguments], cwd=ROOT, stdout=self._out, stderr=self._err, start_new_session=True,
            env=environment(RAY_TMPDIR=str(ray_folder), **env),
        )  # fmt: skip

    def __enter__(self) -> Running:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while left := session_processes(self.pid):
            for pid, _ in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()
            time.sleep(POLL_S)
        self._process.wait()
        self._out.close()
        self._err.close()

    @property
    def pid(self) -> int:
        """Of the command itself; also the number of its session."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the command has not ended."""
        return self._process.poll() is None

    def processes(self, title: str) -> list[int]:
        """Those of the session whose title holds the text."""
        return [pid for pid, found in session_processes(self.pid) if title in found]

    def until(self, reached: Callable[[], bool], every_s: float = POLL_S) -> bool:
        """Wait for a point of the command's work; False where the command ended before."""
        while not reached():
            if not self.alive:
                return False
            time.sleep(every_s)
        return self.alive

    def kill_group(self) -> None:
        """SIGKILL to the command and all that is in its process group: the driver, Ray's head, the raylet."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self) -> Finished:
        """The end of the command."""
        code = self._process.wait(RUN_TIMEOUT_S)
        for file in (self._out, self._err):
            file.seek(0)
        return Finished(code, self._out.read(), self._err.read())


def last_line(done: Finished) -> str:
    """What the command said last, without the folders of this machine."""
    lines = done.stderr.splitlines() or [""]
    words = lines[-1].removeprefix("distill-ray: ").split()
    return " ".join(word.rsplit("/", 1)[-1] if word.startswith("/") else word for word in words)


def shards_in(out: Path) -> dict[str, int]:
    """Whole label shards by name, with the time of their writing; without files that are still being written."""
    found: dict[str, int] = {}
    for path in out.glob("artifacts/labels-*/[!.]*.arrow"):
        with suppress(FileNotFoundError):
            found[path.name] = path.stat().st_mtime_ns
    return found


def is_committed(out: Path) -> bool:
    """Whether a label store has its manifest."""
    return any(out.glob("artifacts/labels-*/manifest.json"))


@dataclass
class Trail:
    """One label store that suffers fault after fault, each followed by the same command."""

    ground: Ground
    out: Path
    tallies: list[Tally] = field(default_factory=list)
    written: dict[str, int] = field(default_factory=dict)  # shards that must not be written again
    _sound: set[tuple[str, int]] = field(default_factory=set)  # files whose content has been seen to be right

    def label(self) -> Running:
        """The same command once more; nothing of it outlives the block."""
        return self.ground.start("label", self.out)

    def label_to_be_killed(self) -> Running:
        """The same command once more; what outlives its end is left alone until the case is over, as users leave it."""
        return self.ground.leftovers.enter_context(self.label())

    def suffer(self, tally: Tally) -> Tally:
        """The next fault of this store."""
        self.tallies.append(tally)
        return tally

    def whole(self) -> dict[str, int]:
        """The right shards that are there, with the time of their writing; a spoilt file is none."""
        return {
            name: at for name, at in shards_in(self.out).items() if name in self.ground.names and self._ok(name, at)
        }

    def _ok(self, name: str, at: int) -> bool:
        if (name, at) not in self._sound:
            checksum = hashlib.sha256(only(self.out, f"artifacts/labels-*/{name}").read_bytes()).hexdigest()
            if not name.endswith(f"-{checksum[:16]}.arrow"):
                return False
            self._sound.add((name, at))
        return True

    def note(self) -> None:
        """What is whole now has to stay as it is."""
        self.written = self.whole() | self.written

    def finish(self) -> Finished:
        """The same command to its end; what came before must have cost no row and no finished shard."""
        with self.label() as command:
            done = command.wait()
        left, counted = shards_in(self.out), self.ground.count(self.out)
        again = [name for name, at in self.written.items() if left.get(name) != at]
        for tally in self.tallies:
            tally.expect(done.code == 0, f"the same command ended with exit {done.code}: {last_line(done)}")
            tally.expect(not again, f"{len(again)} finished shards were written again, such as {again[:1]}")
            tally.expect(
                left.keys() == self.ground.names, "the shards that are left are not those of the undisturbed run"
            )
            tally.add(counted)
        return done
