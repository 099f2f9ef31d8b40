"""The label store on S3: a real server (moto) behind a proxy that can refuse, and two writers where nothing locks."""

from __future__ import annotations

import random
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.campaign import ledger
from tests.campaign.ground import Ground, Running, Tally, last_line
from tests.harness import only
from tests.object_store import BUCKET, ObjectStore, object_store

_REFUSES_S = 20.0
_LISTING_S = 0.2  # listings are the server's work too
_CHUNK = 65536


def refusals(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """All requests refused for 20 s from a random shard on: connections are reset, and new ones too."""
    tally = Tally(f"S3 refuses every request for {_REFUSES_S:.0f} s")
    with object_store() as server, _proxy(server.port) as proxy:
        bucket = Bucket(server)
        for number in range(count):
            _refuse_a_while(tally, ground, bucket, proxy, f"refusals-{number}", rng.randint(2, ground.shards // 2))
    return [tally]


def _refuse_a_while(tally: Tally, ground: Ground, bucket: Bucket, proxy: Proxy, name: str, at_least: int) -> None:
    bucket.upload(ground, name)
    with bucket.label(ground, name, proxy.port) as command:
        reached = command.until(lambda: bucket.label_shards(name) >= at_least, every_s=_LISTING_S)
        before = bucket.label_shards(name)
        proxy.refusing = True
        time.sleep(_REFUSES_S)
        during = bucket.label_shards(name) - before
        proxy.refusing = False
        done = command.wait()
    tally.injected += 1
    tally.expect(reached and before < ground.shards, "labelling was over before S3 refused")
    tally.expect(during <= 2, f"{during} shards were written while S3 refused")  # two were on their way already
    tally.expect(proxy.refused > 0, "nothing was refused")
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


class Proxy:
    """Hands TCP connections on to a port; while ``refusing``, resets those that are open and those that come."""

    def __init__(self, to_port: int) -> None:
        self.refusing, self.refused = False, 0
        self._to_port, self._closed = to_port, False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """End all connections."""
        self._closed = True
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()  # wakes the listener
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            client, _ = self._listener.accept()
            thread = threading.Thread(target=self._serve, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            if not self.refusing and not self._closed:
                with socket.create_connection(("127.0.0.1", self._to_port)) as server:
                    self._pump(client, server)
            if self.refusing:
                self.refused += 1
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close is a reset

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        """Both directions until one side ends, or everything is refused."""
        with selectors.DefaultSelector() as ready:
            ready.register(client, selectors.EVENT_READ, server)
            ready.register(server, selectors.EVENT_READ, client)
            while not self.refusing and not self._closed:
                for key, _ in ready.select(timeout=0.05):
                    received = key.fileobj.recv(_CHUNK)  # type: ignore[union-attr]
                    if not received:
                        return
                    key.data.sendall(received)


@contextmanager
def _proxy(to_port: int) -> Iterator[Proxy]:
    proxy = Proxy(to_port)
    try:
        yield proxy
    finally:
        proxy.close()
