"""Files of one's own, wherever they are: a local path, or a URI of pyarrow's filesystems such as ``s3://bucket/x``."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.utils import glob_translate

from distill_ray.errors import UserError
from distill_ray.storage import PLAIN_IN_URIS, Folder, filesystem_of, reason_of

_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class File:
    """One file: its location, ``name`` (relative to the folder that was searched), bytes and time of the last write."""

    uri: str
    name: str
    size: int
    mtime_ns: int

    def state(self) -> list[str | int]:
        """What tells whether the file is still the same; part of the data digest."""
        return [self.uri, self.size, self.mtime_ns]


def find(
    key: str, location: str, suffixes: Sequence[str], *, hidden: tuple[str, ...] = (".", "_"),
    others: Counter[str] | None = None,
) -> list[File]:  # fmt: skip
    """The files at a path, a folder (searched with all below it) or a pattern, sorted by name.

    In a folder only files with one of ``suffixes`` count, and none whose path has a part that starts with one
    of ``hidden``, such as ``_SUCCESS``. ``key`` names the config key in errors. ``others`` counts, by suffix, the files
    of a folder that are left out and not hidden.

    Raises:
        UserError: there is nothing, or it cannot be read.
    """
    base, pattern, options = split_location(location)
    try:
        found = list(_below(base + options, pattern, suffixes, hidden, others))
    except FileNotFoundError:
        raise UserError(f"{key} {location}: no such file or folder") from None
    except (OSError, pa.ArrowException, ValueError) as error:
        raise UserError(f"{key} {location}: cannot be read ({reason_of(error)})") from None
    if not found:
        what = "no file matches it" if pattern else f"holds no {' or '.join(suffixes)} file"
        raise UserError(f"{key} {location}: {what}")
    return sorted(found, key=lambda file: file.name)


def split_location(location: str) -> tuple[str, str, str]:
    """A location as the folder (or file) that surely exists, the pattern below it, and a URI's options."""
    # In a URI ? starts the options; a local path may have it as a wildcard.
    place, options = location, ""
    if "://" in location:
        place, mark, rest = location.partition("?")
        options = mark + rest
    wild = _WILD.search(place)
    if wild is None:
        return place.rstrip("/") or "/", "", options
    cut = place.rindex("/", 0, wild.start())
    return place[:cut] or "/", place[cut + 1 :], options


def _below(
    base: str, pattern: str, suffixes: Sequence[str], hidden: tuple[str, ...], others: Counter[str] | None
) -> Iterator[File]:
    filesystem, root = filesystem_of(base)
    info = filesystem.get_file_info(root)
    if info.type == pafs.FileType.NotFound:
        raise FileNotFoundError(root)
    if info.type == pafs.FileType.File:
        if not pattern:
            yield File(base, PurePosixPath(root).name, int(info.size), int(info.mtime_ns or 0))
        return
    wanted = re.compile(glob_translate(pattern)) if pattern else None
    selector = pafs.FileSelector(root, recursive=not pattern or "/" in pattern or "**" in pattern)
    for entry in filesystem.get_file_info(selector):
        name = entry.path[len(root) :].lstrip("/") if entry.path.startswith(root) else entry.path
        if entry.type != pafs.FileType.File or (wanted is None and _is_hidden(name, hidden)):
            continue
        if name.lower().endswith(tuple(suffixes)) if wanted is None else wanted.match(name):
            yield File(join(base, name), name, int(entry.size), int(entry.mtime_ns or 0))
        elif others is not None and wanted is None:
            others[PurePosixPath(name).suffix.lower()] += 1


def _is_hidden(name: str, hidden: tuple[str, ...]) -> bool:
    return any(part.startswith(hidden) for part in name.split("/"))


def join(base: str, name: str) -> str:
    """``name`` below the folder ``base``; a name that is absolute, or a URI, as it is."""
    if "://" in name or name.startswith("/"):
        return name.removeprefix("file://")
    if "://" not in base:
        return f"{base.rstrip('/')}/{name}"
    place, mark, options = base.partition("?")
    return f"{place.rstrip('/')}/{quote(name, safe=PLAIN_IN_URIS)}{mark}{options}"


def parent(uri: str) -> str:
    """The folder that a file lies in."""
    return Folder(uri).parent.uri


def read(uri: str) -> bytes:
    """A whole file.

    Raises:
        OSError: it cannot be read.
    """
    name = Folder(uri).name
    return _folder(parent(uri)).read_bytes(unquote(name) if "://" in uri else name)


@lru_cache(maxsize=1024)
def _folder(uri: str) -> Folder:
    return Folder(uri)


def nearest(name: str, names: Sequence[str]) -> str:
    """``, did you mean ...?`` where a name is close, else what there is."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"there are: {shown}"
