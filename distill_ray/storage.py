"""Folders on any storage that pyarrow's filesystems reach: a local path or a URI such as ``s3://bucket/runs``.

A file appears whole or not at all: on local disks through a temporary file, fsync and rename, on object stores through
one PUT. Nothing here locks; see :mod:`distill_ray.artifacts` for who may write.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from distill_ray.errors import UserError

_TEMPORARY = ".tmp-"  # prefix of files that are being written
_STALE_TEMPORARY_S = 3600.0


@dataclass(frozen=True)
class Folder:
    """A folder by URI or absolute local path. It need not exist yet."""

    uri: str

    @classmethod
    def at(cls, location: str | Path) -> Folder:
        """The folder at a path (made absolute) or URI.

        Raises:
            UserError: a URI that carries a user name or password: it would stand in logs, tables and artifacts.
        """
        text = str(location).removeprefix("file://")
        if "://" in text:
            if "@" in text.split("://", 1)[1].split("/", 1)[0]:
                raise UserError("a URI with credentials in it: leave them out, and set them in the environment")
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
        return self.uri.rsplit("/", 1)[-1]

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.uri}/{name}")

    def __str__(self) -> str:
        return self.uri

    def location(self, name: str) -> str:
        """Where the file ``name`` of this folder is, for messages."""
        return f"{self.uri}/{name}"

    def exists(self, name: str) -> bool:
        """Whether this folder has a file called ``name``."""
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Bytes of the file ``name``, None where there is none."""
        if self.is_local:
            target = self.path / name
            return target.stat().st_size if target.is_file() else None
        filesystem, base = _remote(self.uri)
        info = filesystem.get_file_info(f"{base}/{name}")
        return int(info.size) if info.type == pafs.FileType.File else None

    def names(self) -> list[str]:
        """Names of the finished files in this folder, sorted; empty where the folder does not exist."""
        if self.is_local:
            found = [entry.name for entry in self.path.iterdir() if entry.is_file()] if self.path.is_dir() else []
        else:
            filesystem, base = _remote(self.uri)
            infos = filesystem.get_file_info(pafs.FileSelector(base, allow_not_found=True))
            found = [info.base_name for info in infos if info.type == pafs.FileType.File]
        return sorted(name for name in found if not name.startswith(_TEMPORARY))

    def read_bytes(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        if self.is_local:
            return (self.path / name).read_bytes()
        filesystem, base = _remote(self.uri)
        with filesystem.open_input_stream(f"{base}/{name}") as stream:
            return bytes(stream.read())

    def buffer(self, name: str) -> pa.Buffer:
        """The whole file as an Arrow buffer: memory-mapped where it is local, read where it is not."""
        if self.is_local:
            with pa.memory_map(str(self.path / name)) as source:
                return source.read_buffer()
        return pa.py_buffer(self.read_bytes(name))

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write the file so that a reader sees all of it or nothing."""
        if not self.is_local:
            filesystem, base = _remote(self.uri)
            with filesystem.open_output_stream(f"{base}/{name}") as stream:
                stream.write(data)
            return
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / f"{_TEMPORARY}{secrets.token_hex(6)}-{name}"
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(self.path)

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
        if self.exists(name):
            filesystem, base = _remote(self.uri)
            filesystem.delete_file(f"{base}/{name}")

    def sweep_temporaries(self) -> None:
        """Remove what killed writers left behind; files of the last hour may still be in use and stay."""
        if not self.is_local or not self.path.is_dir():
            return
        for entry in self.path.glob(f"{_TEMPORARY}*"):
            with suppress(FileNotFoundError):  # another writer just renamed or swept it
                if time.time() - entry.stat().st_mtime > _STALE_TEMPORARY_S:
                    entry.unlink(missing_ok=True)


def check_writable(folder: Folder) -> None:
    """Write a token and read it back.

    Raises:
        UserError: the folder cannot be written, naming it and the reason.
    """
    token = f"write-check-{secrets.token_hex(4)}"
    try:
        folder.write_text(token, token)
        if folder.read_bytes(token).decode() != token:
            raise OSError("what was written does not read back")
        folder.delete(token)
    except (OSError, pa.ArrowException, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise UserError(f"--out {folder}: cannot be written ({reason}): choose a folder that you may write") from None


def _remote(uri: str) -> tuple[pafs.FileSystem, str]:
    filesystem, path = pafs.FileSystem.from_uri(uri)
    return filesystem, path.rstrip("/")


def _sync_directory(path: Path) -> None:
    # The rename itself must survive a power cut, not only the bytes.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
