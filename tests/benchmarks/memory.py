"""Anonymous memory of processes, from /proc: what a process holds for itself.

Shared memory (Ray's object store) and mapped files (shards) are not counted: the kernel takes those back, or counts
them once for all.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.harness import descendants

_SAMPLE_EVERY_S = 0.05
_LOOK_FOR_PROCESSES_EVERY = 10  # samples


def anonymous_bytes(pid: int | str = "self") -> int:
    """RssAnon of a process now, 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


@dataclass
class Peak:
    """The largest value seen."""

    bytes: int = 0

    def see(self, value: int) -> None:
        """Take a sample."""
        self.bytes = max(self.bytes, value)


@contextmanager
def own_peak(every_s: float = 0.002) -> Iterator[Peak]:
    """The peak of this process, sampled by a thread, and by whoever calls ``see``."""
    peak, done = Peak(anonymous_bytes()), threading.Event()

    def sample() -> None:
        while not done.wait(every_s):
            peak.see(anonymous_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak.see(anonymous_bytes())


def peak_of_command(command: Sequence[str], env: Mapping[str, str], counts: Callable[[str], bool]) -> tuple[int, int]:
    """Run ``command`` to its end: peak bytes of its process and those below it whose title ``counts``, summed at each
    instant; and how many such processes there were.

    Raises:
        RuntimeError: the command failed.
    """
    peak, workers = Peak(), set[int]()
    with subprocess.Popen(
        command, env=dict(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        output: list[str] = []
        reader = threading.Thread(target=lambda: output.extend(process.stdout or ()), daemon=True)
        reader.start()
        sample = 0
        while process.poll() is None:
            if sample % _LOOK_FOR_PROCESSES_EVERY == 0:
                workers |= {pid for pid, title in descendants(process.pid) if counts(title)}
            peak.see(anonymous_bytes(process.pid) + sum(anonymous_bytes(pid) for pid in workers))
            sample += 1
            time.sleep(_SAMPLE_EVERY_S)
        reader.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {''.join(output)[-2000:]}")
    return peak.bytes, len(workers)
