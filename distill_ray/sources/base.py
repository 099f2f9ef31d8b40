"""What every source offers to the prepare stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distill_ray.config import OwnData
from distill_ray.errors import UserError
from distill_ray.sources.annotations import Annotations, check_classes
from distill_ray.sources.decoding import Layout
from distill_ray.sources.files import nearest
from distill_ray.sources.splitting import SPLITS, Indices, split_by_fractions

__all__ = [
    "SPLITS",
    "BadRow",
    "Examples",
    "Indices",
    "OwnSource",
    "Piece",
    "Source",
    "SourceInfo",
    "StreamedSource",
    "described",
    "in_steps",
    "refuse_absent",
    "split_by_fractions",
]

_NAMED = 5  # bad rows that are named one by one
_STEP_BYTES = 8 * 2**20  # of decoded rows that are only looked at


@dataclass(frozen=True)
class SourceInfo:
    """What is known of a source before its rows are read.

    ``labels`` are by row number, -1 where there is none; None where the source does not tell them beforehand.
    """

    shape: tuple[int, ...]
    dtype: str
    class_names: tuple[str, ...]
    synthetic: bool
    splits: Mapping[str, Indices]  # split -> the source's own row numbers
    warnings: tuple[str, ...] = ()  # what looks wrong but may be meant
    labels: npt.NDArray[np.int64] | None = None
    bad_rows: int = 0


@dataclass(frozen=True)
class Examples:
    """N rows: ``inputs`` [N, *shape], ``labels`` int64 [N], ``source_ids``: the user's own ids, [N]."""

    inputs: npt.NDArray[Any]
    labels: npt.NDArray[np.int64]
    source_ids: Sequence[str] | pa.Array


@dataclass(frozen=True)
class BadRow:
    """A row whose input cannot be used."""

    row: int
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Source(Protocol):
    """Rows by number. A source is cheap to open in every worker and reads only the rows asked for."""

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able description of the source files' state, part of the data digest."""
        ...

    def info(self) -> SourceInfo:
        """Shape, classes and splits."""
        ...

    def read(self, indices: Indices) -> Examples:
        """The rows of these numbers, in this order."""
        ...


class OwnSource(Source, Protocol):
    """Rows of the user's own, by number, some of which may be bad."""

    rows: int

    def info(self, bad: Sequence[BadRow] = ()) -> SourceInfo:
        """Shape, classes and splits, without the bad rows."""
        ...

    def layout(self) -> Layout:
        """Shape and dtype of the rows, from the first that can be used."""
        ...

    def sample(self) -> Iterator[bytes]:
        """Some image files, from the first row to the last, of a source of images; none of rows without one."""
        ...

    def bad_rows(self, indices: Indices) -> list[BadRow]:
        """Those of these rows whose input cannot be used."""
        ...


@dataclass(frozen=True)
class Piece:
    """A part of a streamed source that one task reads: ``rows`` rows from ``first_row`` on.

    ``parts`` says where they are: (file number, row groups, rows in them).
    """

    first_row: int
    rows: int
    parts: tuple[tuple[int, tuple[int, ...], int], ...] = field(default=())


class StreamedSource(Protocol):
    """Rows that are read piece by piece, each piece from its beginning to its end."""

    rows: int

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able description of the source files' state, part of the data digest."""
        ...

    def pieces(self) -> Sequence[Piece]:
        """All of the rows, in order."""
        ...

    def annotated(self) -> bool:
        """Whether there is anything for ``annotations`` to read."""
        ...

    def annotations(self, piece: Piece) -> Iterator[tuple[int, pa.Table]]:
        """The condensed small columns of a piece: the offset in it, and some rows."""
        ...

    def info(self, small: Iterable[tuple[int, pa.Table]], bad: Sequence[BadRow] = ()) -> SourceInfo:
        """Shape, classes and splits, from the small columns of all rows: the number of the first, and some rows."""
        ...

    def layout(self) -> Layout:
        """Shape and dtype of the rows, from the first that can be used."""
        ...

    def stream(
        self, piece: Piece, layout: Layout, wanted: npt.NDArray[np.bool_]
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[Any], pa.Array, list[BadRow]]]:
        """The ``wanted`` rows of a piece, some at a time: their offsets in it, inputs, ids, and those that are bad."""
        ...


def described(
    config: OwnData, annotations: Annotations, layout: Layout, bad: Sequence[BadRow], *, stratify_mend: bool = True
) -> SourceInfo:
    """What the small columns of all rows and the layout of the inputs say of a source.

    Raises:
        UserError: labels or splits that cannot be; more bad rows than allowed.
    """
    check_bad_rows(config, bad)
    labels, names = annotations.classes()
    splits = annotations.splits(labels, [row.row for row in bad])
    mend = "leave it out, or set data.split.stratify=true" if config.split.column is None else "leave its rows out"
    warnings = check_classes(labels, names, splits, mend)
    if config.input.shape is None and _has_channels_last(layout.shape):
        first, *others = layout.shape
        warnings = (
            *warnings,
            f"data.columns.input: rows of {list(layout.shape)} are read as {first} channels of {others}: write "
            "pictures [height, width, channels] as [channels, height, width]; data.input.shape says that they are none",
        )
    if bad:
        named = "; ".join(str(row) for row in bad[:_NAMED])
        warnings = (*warnings, f"{len(bad)} row(s) are left out, whose input cannot be used: {named}")
    return SourceInfo(layout.shape, layout.dtype, names, False, splits, warnings, labels, len(bad))


def _has_channels_last(shape: tuple[int, ...]) -> bool:
    counts = (1, 3, 4)
    return len(shape) == 3 and shape[2] in counts and shape[0] not in counts


def refuse_absent(config: OwnData, names: Sequence[str], what: str) -> None:
    """Refuse a value of data.split.values that is none of the ``names`` of the data's own splits, or of its folders.

    Raises:
        UserError: its rows would be left out, or be divided by chance, without a word.
    """
    for value in config.split.split_of_value() if config.split.values is not None else ():
        if value not in names:
            raise UserError(f"data.split.values: {value!r} is none of the {what} of the data: {nearest(value, names)}")


def in_steps(indices: Indices, row_bytes: int) -> Iterator[Indices]:
    """The rows, as many at a time as take little memory once they are decoded."""
    rows = max(1, _STEP_BYTES // max(1, row_bytes))
    for start in range(0, len(indices), rows):
        yield indices[start : start + rows]


def check_bad_rows(config: OwnData, bad: Sequence[BadRow]) -> None:
    """Refuse more bad rows than the config allows.

    Raises:
        UserError: names the first of them.
    """
    if len(bad) <= config.max_bad_rows:
        return
    first = min(bad, key=lambda row: row.row)
    count = "" if len(bad) == 1 else f" ({len(bad)} such rows)"
    raise UserError(
        f"{first}{count}: mend or remove it, or let data.max_bad_rows ({config.max_bad_rows}) leave some out"
    )
