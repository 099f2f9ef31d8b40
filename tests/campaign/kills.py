"""Processes that are killed in the middle of labelling: actors, the whole command, the moment before the commit."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress

from tests.campaign.ground import POLL_S, Ground, Running, Tally, Trail, is_committed, last_line

_ACTOR = "MapWorker"  # in the title of Ray Data's actors
_BETWEEN_ACTORS_S = (0.2, 1.0)
_LEAST_ACTORS, _MOST_COMMANDS = 5, 3  # fewer kills prove little; a fast machine needs more than one command for them
_FIRST_SHARDS = 4  # something has to be there that a later fault can spoil
_SETTLE_S = 3.0  # for what the workers already hold while the driver is frozen


def actors(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """A random labelling actor again and again, at most ``count`` in a command, until the command ends."""
    tally, least = Tally("a labelling actor killed, again and again"), min(count, _LEAST_ACTORS)
    for number in range(_MOST_COMMANDS):
        trail = Trail(ground, ground.copy(f"actors-{number}", labels=False), [tally])
        with trail.label() as command:
            for _ in range(count):
                if not _kill_an_actor(command, trail, rng):
                    break
                tally.injected += 1
                pause = time.monotonic() + rng.uniform(*_BETWEEN_ACTORS_S)
                command.until(lambda until=pause: time.monotonic() >= until)  # type: ignore[misc]
            done = command.wait()
        tally.expect(done.code == 0, f"exit {done.code}: {last_line(done)}")
        tally.say("exit 0 by itself: Ray starts the actor again")
        tally.add(ground.count(trail.out))
        if tally.injected >= least:
            break
    tally.expect(tally.injected >= least, f"{tally.injected} actors were killed, at least {least} were to be")
    return [tally]


def _kill_an_actor(command: Running, trail: Trail, rng: random.Random) -> bool:
    """Once there is a shard that was not there at the last kill: a start that is always cut short proves nothing.

    False where the command ended before.
    """
    before = len(trail.whole())
    while command.until(lambda: len(trail.whole()) > before):
        if found := command.processes(_ACTOR):
            with suppress(ProcessLookupError):
                os.kill(rng.choice(found), signal.SIGKILL)
                return True
    return False


def kill_the_driver(trail: Trail, rng: random.Random, count: int, stop_at: int) -> None:
    """The command and its process group at points that are uniform over labelling, up to its shard ``stop_at``.

    As users meet it: the next command starts while the actors of the killed one may still write.
    """
    tally, outlived = trail.suffer(Tally("the command's process group killed in labelling")), 0
    for point in sorted(rng.uniform(_FIRST_SHARDS, stop_at) for _ in range(count)):
        at_least = max(int(point), len(trail.whole()) + 1)
        command = trail.label_to_be_killed()
        reached = command.until(lambda n=at_least: len(trail.whole()) >= n)  # type: ignore[misc]
        time.sleep((point % 1) * trail.ground.seconds_per_shard)
        trail.note()
        command.kill_group()
        done = command.wait()
        outlived += len(command.processes(_ACTOR))
        tally.expect(reached and done.code == -signal.SIGKILL, f"ended before it could be killed: exit {done.code}")
        tally.injected += 1
    tally.say(
        f"the shell says Killed ({outlived} actors outlived it a little); the same command continues with the shards "
        "that are there"
    )


def kill_before_the_commit(trail: Trail) -> None:
    """The command freezes just before its last shard; the workers write it; then the group is killed.

    The window between the last shard and the manifest is too short to be hit by looking.
    """
    tally = trail.suffer(Tally("killed between the last shard and the manifest"))
    planned = trail.ground.shards
    command = trail.label_to_be_killed()
    if command.until(lambda: len(trail.whole()) >= planned - 1):
        _freeze_until(command, trail, planned)
    trail.note()
    committed = is_committed(trail.out)
    command.kill_group()
    done = command.wait()
    missed = f"{len(trail.written)} of {planned} shards, manifest {'there' if committed else 'absent'}"
    tally.expect(len(trail.written) == planned and not committed and done.code == -signal.SIGKILL, missed)
    tally.injected += 1
    tally.say("the same command writes the manifest and no shard")


def _freeze_until(command: Running, trail: Trail, planned: int) -> None:
    """Let the driver run only in slices of a few milliseconds, so that it cannot get from the last shard to the end."""
    while command.alive and len(trail.whole()) < planned:
        os.kill(command.pid, signal.SIGSTOP)
        settled = time.monotonic() + _SETTLE_S
        while len(trail.whole()) < planned and time.monotonic() < settled:
            time.sleep(POLL_S)
        if len(trail.whole()) < planned:
            os.kill(command.pid, signal.SIGCONT)
            time.sleep(POLL_S)


def drivers(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """``count`` kills of one labelling, the last one just before the commit; and that last one twice more."""
    trail = Trail(ground, ground.copy("drivers", labels=False))
    kill_the_driver(trail, rng, count, ground.shards - 8)
    kill_before_the_commit(trail)
    trail.finish()
    for number in range(2):
        again = Trail(ground, ground.copy(f"commit-{number}", labels=False))
        kill_before_the_commit(again)
        again.finish()
        trail.tallies += again.tallies
    return trail.tallies
