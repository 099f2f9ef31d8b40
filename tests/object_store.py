"""A real S3-compatible server in a process of its own (moto's), and the environment that points a command at it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import boto3  # type: ignore[import-untyped]

BUCKET = "shared"
_START_TIMEOUT_S = 60


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
