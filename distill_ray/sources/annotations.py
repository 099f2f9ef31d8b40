"""What is said of each row beside its input: label, split, group and id, gathered piece by piece in any order.

From it follow the classes, the splits and what is wrong with them. A row takes 4 bytes for its label and up to 25 for
the rest; nothing here ever sees an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from distill_ray.config import OwnData
from distill_ray.errors import UserError
from distill_ray.sources.files import nearest
from distill_ray.sources.splitting import SPLITS, Indices, divide

UNLABELLED = -1
_MOST_CLASSES = 1_000_000  # a larger label is rather an id
_EXACT = 2.0**53  # up to it a float stands for one integer alone
# What the small columns are called on their way from the files.
LABEL, SPLIT, GROUP, ID = "label", "split", "group", "id"


def condensed(columns: Mapping[str, pa.ChunkedArray | pa.Array]) -> pa.Table:
    """The small columns of some rows, as little of each as is needed: ids and groups become 64-bit hashes.

    Raises:
        UserError: labels that are neither integers nor strings.
    """
    shrunk = {}
    for name, column in columns.items():
        column = _plain(column)
        shrunk[name] = hashes(column) if name in (GROUP, ID) else _labels(column) if name == LABEL else _text(column)
    return pa.table(shrunk)


def _plain(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One array, without dictionary encoding or extension types."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array.dictionary_decode() if isinstance(array, pa.DictionaryArray) else array


def _text(column: pa.Array) -> pa.Array:
    return column.cast(pa.large_string())


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type may be integers, of which pandas makes floats where some are missing."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _labels(column: pa.Array) -> pa.Array:
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        try:
            return column.cast(pa.uint8()).cast(pa.int64()) if pa.types.is_boolean(kind) else column.cast(pa.int64())
        except pa.ArrowInvalid:
            raise UserError("data.columns.label: a label exceeds 64 bits") from None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        text = column.cast(pa.large_string())
        return pc.if_else(pc.equal(text, ""), pa.scalar(None, text.type), text)  # as an empty field of a CSV
    if pa.types.is_null(kind):
        return column.cast(pa.int64())
    found = ""
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        numbers = column.cast(pa.float64())
        numbers = pc.if_else(pc.is_nan(numbers), pa.scalar(None, pa.float64()), numbers)
        broken = numbers.filter(pc.not_equal(numbers, pc.floor(numbers)).fill_null(False))
        huge = numbers.filter(pc.greater(pc.abs(numbers), _EXACT).fill_null(False))
        if not len(broken) and not len(huge):  # integers beside missing ones, as pandas writes them
            return numbers.cast(pa.int64())
        found = f" (there is {(broken if len(broken) else huge)[0].as_py():g})"
    raise UserError(
        f"data.columns.label: the column holds {kind}; labels are integers or strings, and null marks a row without "
        f"one{found}"
    )


def hashes(column: pa.Array) -> pa.Array:
    """64 bits that stand for each value, null where it is null; integers stand for themselves."""
    if pa.types.is_integer(column.type):
        values = column.fill_null(0).to_numpy(zero_copy_only=False)
        hashed = values.astype(np.int64 if values.dtype.kind == "i" else np.uint64).view(np.uint64)
    else:
        import pandas as pd

        hashed = pd.util.hash_array(column.to_numpy(zero_copy_only=False), categorize=False)
    nulls = column.is_null().to_numpy(zero_copy_only=False)
    return pa.array(hashed.astype(np.uint64), mask=nulls if nulls.any() else None)


class Annotations:
    """The small columns of ``rows`` rows. ``name_of`` says where a row is, for errors."""

    def __init__(self, config: OwnData, rows: int, name_of: Callable[[int], str]) -> None:
        self._config, self._rows, self._name_of = config, rows, name_of
        self._labels: npt.NDArray[np.int64] | None = None
        self._names: dict[str, int] | None = None  # of string labels, numbered as they came
        self._splits: npt.NDArray[np.int8] | None = None
        self._groups: npt.NDArray[np.uint64] | None = None
        self._ids: npt.NDArray[np.uint64] | None = None
        self._has_id: npt.NDArray[np.bool_] | None = None

    def add(self, first_row: int, table: pa.Table) -> None:
        """The ``condensed`` columns of the rows from ``first_row`` on."""
        at = slice(first_row, first_row + table.num_rows)
        for name in table.column_names:
            column = table.column(name).combine_chunks()
            if name == LABEL:
                self._add_labels(at, column)
            elif name == SPLIT:
                self._add_splits(at, column)
            elif name == GROUP:
                self._groups = self._room(self._groups, np.uint64)
                self._groups[at] = self._without_nulls(at, column, "data.split.group_by", "has no group")
            elif name == ID:
                self._ids = self._room(self._ids, np.uint64)
                self._ids[at] = column.fill_null(0).to_numpy(zero_copy_only=False)
                self._has_id = self._room(self._has_id, np.bool_)
                self._has_id[at] = column.is_valid().to_numpy(zero_copy_only=False)

    def _room(self, array: npt.NDArray[Any] | None, dtype: Any) -> npt.NDArray[Any]:
        return np.zeros(self._rows, dtype=dtype) if array is None else array

    def _without_nulls(self, at: slice, column: pa.Array, key: str, what: str) -> npt.NDArray[Any]:
        if column.null_count:
            row = at.start + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise UserError(f"{key}: {self._name_of(row)} {what}")
        values: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
        return values

    def _add_labels(self, at: slice, column: pa.Array) -> None:
        self._labels = self._room(self._labels, np.int64)
        text = pa.types.is_large_string(column.type)
        if column.null_count == len(column):  # of a column without one label the type says nothing
            self._labels[at] = UNLABELLED
            return
        if text:
            if self._names is None:
                self._names = {}
            encoded = pc.dictionary_encode(column)
            codes = [self._names.setdefault(name, len(self._names)) for name in encoded.dictionary.to_pylist()]
            places = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
            self._labels[at] = np.asarray([*codes, UNLABELLED], dtype=np.int64)[places]
            return
        values = column.fill_null(UNLABELLED).to_numpy(zero_copy_only=False)
        negative = np.flatnonzero((values < 0) & column.is_valid().to_numpy(zero_copy_only=False))
        if len(negative):
            row = int(negative[0])
            raise UserError(
                f"data.columns.label: {self._name_of(at.start + row)} has the label {values[row]}: labels count from 0 "
                "on, and null marks a row without one"
            )
        self._labels[at] = values

    def _add_splits(self, at: slice, column: pa.Array) -> None:
        self._splits = self._room(self._splits, np.int8)
        self._without_nulls(at, column, "data.split.column", "is in no split (null)")
        encoded = pc.dictionary_encode(column)
        config = self._config.split
        numbers = np.empty(len(encoded.dictionary), dtype=np.int8)
        places = encoded.indices.to_numpy(zero_copy_only=False)
        for number, value in enumerate(encoded.dictionary.to_pylist()):
            meant = config.split_of(value)
            if meant is None:
                row = at.start + int(np.flatnonzero(places == number)[0])
                raise UserError(
                    f"data.split.column: {self._name_of(row)} has {value!r}, which means no split: "
                    f"{nearest(value, list(config.split_of_value()))} (data.split.values says what means which)"
                )
            numbers[number] = SPLITS.index(meant)
        self._splits[at] = numbers[places]

    # --- what follows --------------------------------------------------------------------------------------------

    def duplicate_candidates(self) -> list[Indices]:
        """Rows whose ids have the same hash, together; whether the ids are the same is to be looked up."""
        if self._ids is None or self._has_id is None:
            return []
        rows = np.flatnonzero(self._has_id)
        order = rows[np.argsort(self._ids[rows], kind="stable")]
        same = np.flatnonzero(self._ids[order][1:] == self._ids[order][:-1])
        if not len(same):
            return []
        groups = np.split(same, np.flatnonzero(np.diff(same) > 1) + 1)
        return [np.sort(order[group[0] : group[-1] + 2]) for group in groups]

    def classes(self) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
        """The label of every row (-1: none), and the names of the classes.

        Raises:
            UserError: labels beyond the named classes, too few classes, or no labels and no names.
        """
        named = self._config.class_names
        labels = self._labels if self._labels is not None else np.full(self._rows, UNLABELLED, dtype=np.int64)
        if self._names is not None:
            labels, names = self._by_name(labels, named)
        else:
            largest = int(labels.max(initial=UNLABELLED))
            if largest == UNLABELLED and named is None:
                raise UserError(
                    "data: no row has a label: name their column in data.columns.label, or, where there are none, the "
                    "classes in data.class_names"
                )
            limit = len(named) if named is not None else _MOST_CLASSES
            if largest >= limit:
                row = int(np.flatnonzero(labels >= limit)[0])
                said = (
                    f"{limit} classes in data.class_names (0 to {limit - 1})" if named else f"{limit:,} classes at most"
                )
                raise UserError(
                    f"data.columns.label: {self._name_of(row)} has the label {labels[row]}, out of range for {said}"
                )
            names = named or tuple(str(number) for number in range(largest + 1))
        if len(names) < 2:
            raise UserError("data.columns.label: the rows are of one class only: nothing to learn")
        return labels, names

    def _by_name(
        self, labels: npt.NDArray[np.int64], named: tuple[str, ...] | None
    ) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
        assert self._names is not None
        found = list(self._names)
        names = named or tuple(sorted(found))
        places = {name: number for number, name in enumerate(names)}
        for code, name in enumerate(found):
            if name not in places:
                row = int(np.flatnonzero(labels == code)[0])
                raise UserError(
                    f"data.columns.label: {self._name_of(row)} has the label {name!r}, which is not in "
                    f"data.class_names: {nearest(name, names)}"
                )
        codes = np.asarray([*(places[name] for name in found), UNLABELLED], dtype=np.int64)
        return codes[labels], names

    def splits(self, labels: npt.NDArray[np.int64], without: Iterable[int] = ()) -> dict[str, Indices]:
        """The rows of each split, ascending; ``without`` are rows that are left out."""
        kept = np.ones(self._rows, dtype=np.bool_)
        kept[list(without)] = False
        if self._splits is None:
            given = {"train": np.flatnonzero(kept)}
        else:
            given = {name: np.flatnonzero(kept & (self._splits == number)) for number, name in enumerate(SPLITS)}
        split = self._config.split
        return divide(
            given, split.fractions, self._config.seed, labels=labels if split.stratify else None, groups=self._groups
        )


def check_classes(
    labels: npt.NDArray[np.int64], names: Sequence[str], splits: Mapping[str, Indices], mend: str
) -> tuple[str, ...]:
    """Warnings of classes without any row.

    Raises:
        UserError: a class has rows, but none of them in the training split.
    """
    counts = class_counts(labels, len(names), splits)
    total = sum(counts.values(), np.zeros(len(names), dtype=np.int64))
    if not total.sum():
        return ()
    missing = np.flatnonzero((total > 0) & (counts["train"] == 0))
    if len(missing):
        where = next(split for split in splits if counts[split][missing[0]])
        raise UserError(
            f"data.split: class {names[missing[0]]!r} has no training row, but {counts[where][missing[0]]} in {where} "
            f"({len(missing)} such class(es)): {mend}"
        )
    empty = np.flatnonzero(total == 0)
    if not len(empty):
        return ()
    said = f"{len(empty)} of {len(names)} classes have no row (the first: {names[empty[0]]!r})"
    if names[-1] == str(len(names) - 1) and not total[-2]:  # named by their numbers, and the last one is alone
        said += f"; where the label {names[-1]} means that there is none, write null in its place"
    return (said,)


def class_counts(
    labels: npt.NDArray[np.int64], classes: int, splits: Mapping[str, Indices]
) -> dict[str, npt.NDArray[np.int64]]:
    """Rows of each class in each split, unlabelled rows left out."""
    counted = {}
    for name, rows in splits.items():
        found = labels[rows]
        counted[name] = np.bincount(found[found >= 0], minlength=classes).astype(np.int64)
    return counted
