"""A disk that is full, and a teacher that is broken: the command ends in one line and leaves what continues."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.campaign.ground import Ground, Tally, Trail, is_committed, last_line
from tests.harness import Finished, only

_SHORTER_THAN_A_SHARD = 1024
_PAGE = 4096
_ROOM_FOR_THE_REST = 32 * _PAGE  # config, lock, write checks: what is no shard
_ENOUGH = "size=256m"


def limit_the_files(trail: Trail, rng: random.Random) -> None:
    """RLIMIT_FSIZE on the labelling actors from a random shard on: the kernel refuses to write the next one."""
    tally = trail.suffer(Tally("the kernel refuses to write a shard (RLIMIT_FSIZE)"))
    before = len(trail.whole())
    at_least = rng.randint(before + 1, max(before + 1, trail.ground.shards // 2))
    with trail.label() as command:
        command.until(lambda: len(trail.whole()) >= at_least)
        for pid in command.processes("MapWorker"):
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (_SHORTER_THAN_A_SHARD, resource.RLIM_INFINITY))
        done = command.wait()
    _judge(tally, trail, done, "File too large")


def _judge(tally: Tally, trail: Trail, done: Finished, reason: str) -> None:
    """Exit 1, and one line that names the file and the reason; nothing half-written, nothing committed."""
    tally.injected += 1
    line = last_line(done)
    tally.expect(done.code == 1, f"exit {done.code} instead of 1: {line}")
    tally.expect(reason in line, f"does not say {reason!r}: {line}")
    tally.expect(".arrow" in line, f"names no file: {line}")
    tally.expect("Traceback" not in done.stderr, "shows a trace")
    tally.expect(not is_committed(trail.out), "a manifest was written")
    tally.say(f"exit {done.code}: {line}")
    trail.note()


def file_limits(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """The limit ``count`` times in one labelling, then none."""
    trail = Trail(ground, ground.copy("file_limits", labels=False))
    for _ in range(count):
        limit_the_files(trail, rng)
    trail.finish()
    return trail.tallies


def small_disks(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """A real, small file system that fills up in the middle of labelling, and is then made larger."""
    tally = Tally("the disk of --out is full (tmpfs)")
    for number in range(count):
        place = ground.work / f"disk-{number}"
        with mounted(place) as refusal:
            if refusal:
                tally.skipped = refusal
                tally.say(f"not permitted here: {refusal}")
                return [tally]
            trail = Trail(ground, ground.copy(place.name, labels=False, place=place), [tally])
            pages = sum(-(-path.stat().st_size // _PAGE) for path in ground.labels.glob("*.arrow"))
            room = int(rng.uniform(0.2, 0.8) * pages) * _PAGE + _ROOM_FOR_THE_REST
            used = shutil.disk_usage(place).used
            _mount("-o", f"remount,size={used + room}", str(place))
            with trail.label() as command:
                done = command.wait()
            _judge(tally, trail, done, "No space left")
            tally.expect(bool(trail.written), "the disk was full before the first shard")
            _mount("-o", f"remount,{_ENOUGH}", str(place))
            trail.finish()
    return [tally]


@contextmanager
def mounted(place: Path) -> Iterator[str]:
    """A tmpfs at ``place``, unmounted at the end; yields why not where this is not permitted."""
    place.mkdir(parents=True)
    refusal = _mount("-t", "tmpfs", "-o", _ENOUGH, "tmpfs", str(place))
    try:
        yield refusal
    finally:
        if not refusal:
            subprocess.run(["umount", "--lazy", str(place)], check=True, timeout=60)


def _mount(*arguments: str) -> str:
    """Why the mount was refused, empty where it was not."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return "mounting needs root"
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, timeout=60)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["mount failed"])[-1]


def broken_teachers(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """A teacher whose files are consistent and whose logits are not finite: NaN in the weights, then infinities."""
    tally = Tally("the teacher gives logits that are not finite")
    for number, value in enumerate((np.nan, np.inf)[:count]):
        out = ground.copy(f"teacher-{number}", labels=False)
        _break(only(out, "artifacts/teacher-*"), rng, value)
        done = ground.run("label", out)
        line = last_line(done)
        tally.injected += 1
        tally.expect(done.code == 1, f"exit {done.code} instead of 1: {line}")
        tally.expect("non-finite logit for row " in line, f"names no row: {line}")
        tally.expect("Traceback" not in done.stderr, "shows a trace")
        tally.expect(not is_committed(out), "a manifest was written")
        tally.say(f"exit {done.code}: {line}")
    return [tally]


def _break(teacher: Path, rng: random.Random, value: float) -> None:
    """Put ``value`` into the last layer's weights, and the new checksum into the summary."""
    path = teacher / "model.safetensors"
    weights = load_file(path)
    last = [name for name in weights if name.endswith("weight")][-1]
    changed = weights[last].copy()
    row = rng.randrange(len(changed))
    changed[row] = value
    save_file(weights | {last: changed}, path)
    summary = json.loads((teacher / "summary.json").read_bytes())
    summary |= {"weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    (teacher / "summary.json").write_text(json.dumps(summary))
