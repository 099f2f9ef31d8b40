"""A real S3-compatible server in a process of its own (moto's), the environment that points a command at it, and a
proxy before it that can refuse.
"""

from __future__ import annotations

import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

import boto3  # type: ignore[import-untyped]

BUCKET = "shared"
_START_TIMEOUT_S = 60
_CHUNK, _LOOK_EVERY_S, _DRAIN_S = 65536, 0.05, 5.0
_SLOW_DOWN_BODY = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>SlowDown</Code><Message>Please reduce your request rate.'
    b"</Message><RequestId>0</RequestId></Error>"
)
_SLOW_DOWN = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n" % len(_SLOW_DOWN_BODY)
)


@dataclass(frozen=True)
class ObjectStore:
    """Where the server listens."""

    port: int

    def environment(self, port: int | None = None) -> dict[str, str]:
        """For a command that is to use it, by way of another ``port`` where a proxy listens."""
        return {
            "AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
        }  # fmt: skip

    def client(self) -> boto3.client:
        """Another's view of the same objects."""
        return boto3.client(
            "s3", endpoint_url=f"http://127.0.0.1:{self.port}", region_name="us-east-1", aws_access_key_id="test-key",
            aws_secret_access_key="test-secret",
        )  # fmt: skip

    def keys(self, prefix: str) -> dict[str, int]:
        """Bytes of each object below ``prefix``, by the rest of its key."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return {item["Key"].removeprefix(prefix): item["Size"] for page in pages for item in page.get("Contents", [])}


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A server with one empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(port)
            store = ObjectStore(port)
            store.client().create_bucket(Bucket=BUCKET)
            yield store
        finally:
            server.kill()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline, "the S3 server did not start"
            time.sleep(0.05)
        else:
            return


class Proxy:
    """Hands TCP connections on to a port, unless its ``mode`` is another than "open".

    "refuse" resets the connections that are open and those that come; "slow_down" closes those that are open and
    answers each request that comes with 503 SlowDown, as S3 does where too many come.
    """

    def __init__(self, to_port: int) -> None:
        self.mode: Literal["open", "refuse", "slow_down"] = "open"
        self.refused = 0  # connections and requests
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
            if self._closed:
                return
            if self.mode == "open":
                with socket.create_connection(("127.0.0.1", self._to_port)) as server:
                    self._pump(client, server)
            elif self.mode == "slow_down":
                self._slow_down(client)
            if self.mode == "refuse":
                self.refused += 1
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close is a reset

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        """Both directions until one side ends, or the proxy is open no longer."""
        with selectors.DefaultSelector() as ready:
            ready.register(client, selectors.EVENT_READ, server)
            ready.register(server, selectors.EVENT_READ, client)
            while self.mode == "open" and not self._closed:
                for key, _ in ready.select(timeout=_LOOK_EVERY_S):
                    received = key.fileobj.recv(_CHUNK)  # type: ignore[union-attr]
                    if not received:
                        return
                    key.data.sendall(received)

    def _slow_down(self, client: socket.socket) -> None:
        """Answer one request; its body, which may still be on its way, is read and dropped."""
        client.settimeout(_DRAIN_S)
        head = b""
        while b"\r\n\r\n" not in head:
            received = client.recv(_CHUNK)
            if not received:
                return
            head += received
        self.refused += 1
        client.sendall(_SLOW_DOWN if head.startswith(b"HEAD ") else _SLOW_DOWN + _SLOW_DOWN_BODY)
        client.shutdown(socket.SHUT_WR)
        while client.recv(_CHUNK):
            pass


@contextmanager
def proxy(to_port: int) -> Iterator[Proxy]:
    """A proxy before the server at ``to_port``."""
    made = Proxy(to_port)
    try:
        yield made
    finally:
        made.close()
