"""Folders on any storage that pyarrow's filesystems reach: a local path or a URI such as ``s3://bucket/runs``.

A file appears whole or not at all: on local disks through a temporary file, fsync and rename, on object stores because
an upload only counts once it is complete. Requests that a remote store refuses are made again for a bounded time.
Nothing here locks; see :mod:`distill_ray.artifacts` for who may write.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs
import tenacity

from distill_ray.errors import RunError, UserError

_TEMPORARY = ".tmp-"  # prefix of files that are being written
_STALE_TEMPORARY_S = 3600.0
_MAPPED_BYTES = 2**20  # a smaller file is read in less time than its pages are mapped
_PATIENCE_S = 120.0  # a remote store that refuses requests gets this long, each time
_LONGEST_PAUSE_S = 5.0
# What asking again does not change, in the words of pyarrow's S3 and GCS filesystems.
_FINAL = (
    "ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN",
    "UNRECOGNIZED_CLIENT", "MISSING_AUTHENTICATION", "INVALID_PARAMETER", "VALIDATION", "HTTP status 301",
    "HTTP status 400", "HTTP status 403", "PERMISSION_DENIED", "UNAUTHENTICATED",
)  # fmt: skip
PLAIN_IN_URIS = "/!$&'()*+,;=:@~"  # beside letters, digits, - . and _, what stands for itself in the path of a URI
_NO_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_CREDENTIALS = re.compile(r"(key|secret|token|password)[^=&]*=", re.IGNORECASE)
T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Folder:
    """A folder by URI or absolute local path. It need not exist yet."""

    uri: str

    @classmethod
    def at(cls, location: str | Path) -> Folder:
        """The folder at a path (made absolute) or URI.

        Raises:
            UserError: a URI without a place in it, or one that carries a user name or password, which would stand in
                logs, tables and artifacts.
        """
        text = str(location).removeprefix("file://")
        if "://" in text:
            place, _, options = text.split("://", 1)[1].partition("?")
            if "@" in place or _CREDENTIALS.search(options):
                raise UserError("a URI with credentials in it: leave them out, and set them in the environment")
            if not place.strip("/"):
                raise UserError(f"{text}: a URI without a bucket or path")
            return cls(text.rstrip("/"))
        return cls(str(Path(text).expanduser().absolute()))

    @property
    def is_local(self) -> bool:
        """Whether this is a plain path of this machine (possibly a network mount)."""
        return "://" not in self.uri

    @property
    def path(self) -> Path:
        """The local path; only for local folders."""
        if not self.is_local:
            raise ValueError(f"{self.uri} is not a local folder")
        return Path(self.uri)

    @property
    def name(self) -> str:
        """The last part of the location."""
        return self._parts()[0].rsplit("/", 1)[-1]

    @property
    def parent(self) -> Folder:
        """The folder that this one lies in."""
        base, options = self._parts()
        return Folder(base.rsplit("/", 1)[0] + options)

    def __truediv__(self, name: str) -> Folder:
        return Folder(self.location(name))

    def __str__(self) -> str:
        return self.uri

    def location(self, name: str) -> str:
        """Where the file ``name`` of this folder is."""
        base, options = self._parts()
        return f"{base}/{name}{options}"

    def _parts(self) -> tuple[str, str]:
        """The URI without and with its options, such as ``?endpoint_override=...``; a local path has none."""
        if self.is_local:
            return self.uri, ""
        base, mark, options = self.uri.partition("?")
        return base.rstrip("/"), mark + options

    def exists(self, name: str) -> bool:
        """Whether this folder has a file called ``name``."""
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Bytes of the file ``name``, None where there is none."""
        if self.is_local:
            target = self.path / name
            return target.stat().st_size if target.is_file() else None
        filesystem, base = _remote(self.uri)
        info = self._asked(lambda: filesystem.get_file_info(f"{base}/{name}"))
        return int(info.size) if info.type == pafs.FileType.File else None

    def state(self, name: str) -> tuple[Any, ...] | None:
        """What the storage says of the file: where its content has changed, its state has. None where there is none.

        On object stores with the entity tag, where there is one: times there are in whole seconds.
        """
        if self.is_local:
            try:
                found = (self.path / name).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
        filesystem, base = _remote(self.uri)
        info = self._asked(lambda: filesystem.get_file_info(f"{base}/{name}"))
        if info.type != pafs.FileType.File:
            return None

        def tag() -> Any:
            with filesystem.open_input_stream(f"{base}/{name}", compression=None) as stream:
                return (stream.metadata() or {}).get("ETag")

        return int(info.size), info.mtime_ns, self._asked(tag)

    def sizes(self) -> dict[str, int]:
        """Bytes of each finished file of this folder by name; empty where the folder does not exist. One listing."""
        return {name: size for name, size, _ in self._entries()}

    def names(self) -> list[str]:
        """Names of the finished files in this folder, sorted; empty where the folder does not exist."""
        return sorted(name for name, _, _ in self._entries())

    def names_older_than(self, age_s: float) -> list[str]:
        """Names of the finished files that were last written so long ago, sorted."""
        limit = time.time() - age_s
        return sorted(name for name, _, written in self._entries() if written < limit)

    def _entries(self) -> list[tuple[str, int, float]]:
        """(name, bytes, time of the last write in Unix seconds) of each finished file."""
        if self.is_local:
            return _local_entries(self.path)
        filesystem, base = _remote(self.uri)
        infos = self._asked(lambda: filesystem.get_file_info(pafs.FileSelector(base, allow_not_found=True)))
        return [
            (info.base_name, int(info.size), (info.mtime_ns or 0) / 1e9)
            for info in infos
            if info.type == pafs.FileType.File and not info.base_name.startswith(_TEMPORARY)
        ]

    def read_bytes(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        if self.is_local:
            return (self.path / name).read_bytes()
        return bytes(self._download(name))

    def buffer(self, name: str) -> pa.Buffer:
        """The whole file as an Arrow buffer: memory-mapped where it is local and large, read where it is not."""
        if self.is_local:
            path = os.path.join(self.uri, name)
            large = os.path.getsize(path) >= _MAPPED_BYTES
            with pa.memory_map(path) if large else pa.OSFile(path) as source:
                return source.read_buffer()
        return self._download(name)

    def _download(self, name: str) -> pa.Buffer:
        filesystem, base = _remote(self.uri)

        def get() -> pa.Buffer:
            with filesystem.open_input_file(f"{base}/{name}") as file:
                return file.read_buffer()

        return self._asked(get)

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write the file so that a reader sees all of it or nothing."""
        if self.is_local:
            _write_locally(self.path, name, data)
            return
        filesystem, base = _remote(self.uri)

        def put() -> None:
            with filesystem.open_output_stream(f"{base}/{name}") as stream:
                stream.write(data)

        self._asked(put)

    def _asked(self, request: Callable[[], T]) -> T:
        return _patiently(self.uri, request)

    def write_text(self, name: str, text: str) -> None:
        """``write_bytes`` of UTF-8 text."""
        self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """``write_bytes`` of readable JSON; NaN is refused, since JSON has none."""
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """The parsed JSON file. Raises FileNotFoundError or ValueError."""
        return json.loads(self.read_bytes(name))

    def delete(self, name: str) -> None:
        """Remove the file; not an error where there is none."""
        if self.is_local:
            (self.path / name).unlink(missing_ok=True)
            return
        filesystem, base = _remote(self.uri)
        with suppress(FileNotFoundError):
            self._asked(lambda: filesystem.delete_file(f"{base}/{name}"))

    def sweep_temporaries(self) -> None:
        """Remove what killed writers left behind; files of the last hour may still be in use and stay."""
        if not self.is_local or not self.path.is_dir():
            return
        for entry in self.path.glob(f"{_TEMPORARY}*"):
            with suppress(FileNotFoundError):  # another writer just renamed or swept it
                if time.time() - entry.stat().st_mtime > _STALE_TEMPORARY_S:
                    entry.unlink(missing_ok=True)


def check_writable(folder: Folder) -> None:
    """Write a token and read it back, once: what is refused now is a wrong address or a missing right.

    Raises:
        UserError: the folder cannot be written, naming it and the reason.
    """
    token = f"write-check-{secrets.token_hex(4)}"
    try:
        with impatience():
            folder.write_text(token, token)
            if folder.read_bytes(token).decode() != token:
                raise OSError("what was written does not read back")
            folder.delete(token)
    except (OSError, pa.ArrowException, ValueError) as error:
        mend = "check the address, and the credentials in the environment"
        if folder.is_local:
            mend = "choose a folder that you may write"
        raise UserError(f"--out {folder}: cannot be written ({reason_of(error)}): {mend}") from None


def reason_of(error: BaseException) -> str:
    """What went wrong with a file, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


_patience_s: ContextVar[float] = ContextVar("patience_s", default=_PATIENCE_S)


@contextmanager
def impatience() -> Iterator[None]:
    """Within it a refused request is not made again: for checks that somebody waits for."""
    before = _patience_s.set(0.0)
    try:
        yield
    finally:
        _patience_s.reset(before)


def _patiently(uri: str, request: Callable[[], T]) -> T:
    """Make the request, again where it is refused, with growing pauses and for a bounded time.

    Raises:
        RunError: the store did not answer for as long as that. Not where nobody waits (see :func:`impatience`).
        OSError: the answer is final.
    """
    patience_s = _patience_s.get()

    def tell(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            reason = reason_of(state.outcome.exception() or OSError())
            _log.warning("%s: refused (%s); trying again for up to %.0f s", uri, reason, patience_s)

    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=_LONGEST_PAUSE_S),
        stop=tenacity.stop_after_delay(patience_s),
        before_sleep=tell,
        reraise=True,
    )
    try:
        return attempts(request)
    except OSError as error:
        if patience_s and may_pass(error):
            raise RunError(
                f"{uri}: does not answer for {patience_s:.0f} s ({reason_of(error)}); finished work is kept, the same "
                "command continues"
            ) from None
        raise


def may_pass(error: BaseException) -> bool:
    """Whether the same request may be answered a little later."""
    if not isinstance(error, OSError) or isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
        return False
    text = str(error)
    return not any(mark in text for mark in _FINAL)


def filesystem_of(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a local path or URI, and the path in it."""
    return _remote(uri) if "://" in uri else (_LOCAL, uri)


_LOCAL = pafs.LocalFileSystem()


@lru_cache(maxsize=256)
def _remote(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a URI, with its open connections, and the path in it."""
    place, mark, options = uri.partition("?")
    # Names may have spaces and letters beyond ASCII, and a % that begins no escape; pyarrow parses none of them.
    place = quote(_NO_ESCAPE.sub("%25", place), safe=f"{PLAIN_IN_URIS}%[]")
    filesystem, path = pafs.FileSystem.from_uri(f"{place}{mark}{options}")
    return filesystem, path.rstrip("/")


def _local_entries(path: Path) -> list[tuple[str, int, float]]:
    if not path.is_dir():
        return []
    found = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith(_TEMPORARY) or not entry.is_file():
                continue
            with suppress(FileNotFoundError):  # deleted meanwhile
                status = entry.stat()
                found.append((entry.name, status.st_size, status.st_mtime))
    return found


def _write_locally(folder: Path, name: str, data: bytes | pa.Buffer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{_TEMPORARY}{secrets.token_hex(6)}-{name}"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / name)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a refused write says why, but not where
            error.filename = str(folder / name)
        raise
    _sync_directory(folder)


def _sync_directory(path: Path) -> None:
    # The rename itself must survive a power cut, not only the bytes.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
