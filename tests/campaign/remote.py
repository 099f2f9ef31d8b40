"""The label store on S3: a real server (moto) behind a proxy that can refuse, and two writers where nothing locks."""

from __future__ import annotations

import random
import time
from typing import Literal

from tests.campaign import ledger
from tests.campaign.ground import Ground, Running, Tally, last_line
from tests.harness import only
from tests.object_store import BUCKET, ObjectStore, Proxy, object_store, proxy

_REFUSES_S = 20.0
_LISTING_S = 0.2  # listings are the server's work too
_REFUSALS: dict[Literal["refuse", "slow_down"], str] = {
    "refuse": "S3 resets every connection",
    "slow_down": "S3 answers 503 SlowDown to every request",
}


def refusals(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """All requests refused for 20 s from a random shard on: by resetting the connections, and by 503 SlowDown."""
    tallies = []
    with object_store() as server, proxy(server.port) as door:
        bucket = Bucket(server)
        for mode, fault in _REFUSALS.items():
            tally = Tally(f"{fault} for {_REFUSES_S:.0f} s")
            for number in range(count):
                at_least = rng.randint(2, ground.shards // 2)
                _refuse_a_while(tally, ground, bucket, door, mode, f"{mode}-{number}", at_least)
            tallies.append(tally)
    return tallies


def _refuse_a_while(
    tally: Tally, ground: Ground, bucket: Bucket, door: Proxy, mode: Literal["refuse", "slow_down"], name: str,
    at_least: int,
) -> None:  # fmt: skip
    bucket.upload(ground, name)
    refused_before = door.refused
    with bucket.label(ground, name, door.port) as command:
        reached = command.until(lambda: bucket.label_shards(name) >= at_least, every_s=_LISTING_S)
        before = bucket.label_shards(name)
        door.mode = mode
        time.sleep(_REFUSES_S)
        during = bucket.label_shards(name) - before
        door.mode = "open"
        done = command.wait()
    tally.injected += 1
    tally.expect(reached and before < ground.shards, "labelling was over before S3 refused")
    tally.expect(during <= 2, f"{during} shards were written while S3 refused")  # two were on their way already
    tally.expect(door.refused > refused_before, "nothing was refused")
    tally.expect(done.code == 0, f"exit {done.code}: {last_line(done)}")
    tally.add(bucket.count(ground, name))
    tally.say(f"exit {done.code} by itself: requests are made again")


def two_writers(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """The same command twice on S3, started together: there is no lock there, and both label."""
    tally = Tally("two `distill-ray label` at once on S3")
    with object_store() as server:
        bucket = Bucket(server)
        for name in (f"two-{number}" for number in range(count)):
            bucket.upload(ground, name)
            with bucket.label(ground, name) as one, bucket.label(ground, name) as two:
                dones = (one.wait(), two.wait())
            tally.injected += 1
            for done in dones:
                tally.expect(done.code == 0, f"exit {done.code}: {last_line(done)}")
            tally.add(bucket.count(ground, name))
            tally.say("exit 0 of both: " + " and ".join(d.answer["stages"][-1]["status"] for d in dones if not d.code))
    return [tally]


class Bucket:
    """The campaign's stores on the server, seen directly."""

    def __init__(self, server: ObjectStore) -> None:
        self.server, self._client = server, server.client()

    def label(self, ground: Ground, name: str, port: int | None = None) -> Running:
        """The real command on the store ``name``, by way of a proxy's ``port``."""
        own_cache = f"cluster.cache_dir={ground.work / 'cache'}"
        return ground.start("label", f"s3://{BUCKET}/{name}", own_cache, **self.server.environment(port))

    def upload(self, ground: Ground, name: str) -> None:
        """Data and teacher of the undisturbed run."""
        out = ground.copy(f"upload-{name}", labels=False)
        for path in sorted(path for path in out.rglob("*") if path.is_file()):
            self._client.upload_file(str(path), BUCKET, f"{name}/{path.relative_to(out)}")

    def label_shards(self, name: str) -> int:
        """How many label shards there are."""
        return sum(key.endswith(".arrow") for key in self._labels(name))

    def _labels(self, name: str) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET, Prefix=f"{name}/artifacts/labels-"
        )
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def count(self, ground: Ground, name: str) -> ledger.Count:
        """The rows of the label store, downloaded."""
        out = ground.work / "download"
        for key in self._labels(name):
            (out / key).parent.mkdir(parents=True, exist_ok=True)
            self._client.download_file(BUCKET, key, str(out / key))
        return ledger.count(only(out, f"{name}/artifacts/labels-*"), ground.data, ground.reference)
