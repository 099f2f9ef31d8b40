"""Which row goes into which split: by fractions, class by class, group by group, or as a column says.

Everything is a function of the rows' numbers, labels and groups, the fractions and the seed; nothing of the order in
which the rows were read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from distill_ray.errors import UserError

SPLITS = ("train", "validation", "test")
Indices = npt.NDArray[np.int64]
_STREAM = 1  # of the seed's random streams


def split_by_fractions(rows: Indices, fractions: Sequence[float], seed: int) -> dict[str, Indices]:
    """Divide ``rows`` at random into train, validation (and test, where three fractions are given).

    Every split whose fraction is above 0 gets at least one row.
    """
    order = np.random.default_rng((seed, _STREAM)).permutation(rows)
    counts = [max(1, round(f * len(rows))) if f > 0 else 0 for f in fractions[1:]]
    splits: dict[str, Indices] = {}
    start = 0
    for name, count in zip(SPLITS[1:], counts, strict=False):
        splits[name] = np.sort(order[start : start + count])
        start += count
    return {"train": np.sort(order[start:]), **splits}


def split_by_class(
    rows: Indices, labels: npt.NDArray[np.int64], fractions: Sequence[float], seed: int
) -> dict[str, Indices]:
    """Divide each class (``labels`` of ``rows``; -1 is a class, too) by the fractions.

    What does not divide evenly in one class is made up for in the next, so that the splits' sizes are right as well;
    every class has at least one row in train.
    """
    order = np.random.default_rng((seed, _STREAM)).permutation(len(rows))
    order = order[np.argsort(labels[order], kind="stable")]
    starts = np.flatnonzero(np.r_[True, np.diff(labels[order]) != 0])
    parts: dict[str, list[Indices]] = {name: [] for name in SPLITS[: len(fractions)]}
    owed = np.zeros(len(fractions) - 1)
    for members in np.split(order, starts[1:]):
        counts, owed = _shares(len(members), fractions[1:], owed)
        cuts = np.cumsum(counts)
        for name, part in zip(SPLITS[1:], np.split(members, cuts)[:-1], strict=False):
            parts[name].append(part)
        parts["train"].append(members[cuts[-1] :])
    return {name: np.sort(rows[np.concatenate(part)]) for name, part in parts.items()}


def _shares(
    count: int, fractions: Sequence[float], owed: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """How many of ``count`` rows go to each split but train, and what is owed to each of them afterwards."""
    wanted = np.asarray(fractions) * count + owed
    given = np.clip(np.rint(wanted), 0, None).astype(np.int64)
    while given.sum() > count - 1:  # one stays in train
        given[np.argmax(given)] -= 1
    return given, np.clip(wanted - given, -1, 1)  # many classes of one row must not take another class apart


def split_by_group(
    rows: Indices, groups: npt.NDArray[np.uint64], fractions: Sequence[float], seed: int
) -> dict[str, Indices]:
    """Give whole groups to splits, the largest first, each to the split that misses most of its share.

    Raises:
        UserError: there are fewer groups than splits.
    """
    _, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    wanted = np.asarray([f for f in fractions if f > 0])
    names = [name for name, f in zip(SPLITS, fractions, strict=False) if f > 0]
    if len(sizes) < len(names):
        raise UserError(
            f"data.split.group_by: {len(sizes)} group(s) cannot be divided over {len(names)} splits: a group stays in "
            "one; name a column with more values"
        )
    order = np.random.default_rng((seed, _STREAM)).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    missing = wanted * len(rows)
    owner = np.zeros(len(sizes), dtype=np.int64)
    for done, group in enumerate(order):
        empty = (
            [number for number in range(len(names)) if not (owner[order[:done]] == number).any()]
            if (len(order) - done <= len(names))
            else []
        )
        to = empty[0] if len(empty) == len(order) - done else int(np.argmax(missing))
        owner[group] = to
        missing[to] -= sizes[group]
    return {name: np.sort(rows[owner[member] == number]) for number, name in enumerate(names)}


def divide(
    given: Mapping[str, Indices],
    fractions: Sequence[float] | None,
    seed: int,
    *,
    labels: npt.NDArray[np.int64] | None = None,
    groups: npt.NDArray[np.uint64] | None = None,
) -> dict[str, Indices]:
    """The final splits, where the data itself says of some rows which split they are in (``given``; {train: all}).

    Validation rows are cut from the training rows where the data names none, test rows where three fractions are
    given. ``labels`` (by row number) asks for the classes to be divided alike, ``groups`` for whole groups.

    Raises:
        UserError: the fractions contradict what the data says.
    """
    own = {name: rows for name, rows in given.items() if len(rows)}
    if "train" not in own:
        raise UserError(
            f"data.split: the data names no training rows, only {', '.join(own)}: data.split.values says what means "
            "which"
        )
    if fractions is None:
        if "validation" in own:
            _refuse_shared(own, groups)
            return _in_order(own)
        fractions = (0.9, 0.1) if "test" in own else (0.8, 0.1, 0.1)
    clash = "validation" if "validation" in own else "test" if len(fractions) == 3 and "test" in own else None
    if clash is not None:
        mend = "leave out the fractions" if clash == "validation" else "give two (train, validation) that sum to 1"
        raise UserError(f"data.split.fractions {list(fractions)}: the data says itself which rows are {clash}: {mend}")
    train = own.pop("train")
    if len(train) < sum(f > 0 for f in fractions):
        raise UserError(
            f"data.split: {len(train)} training row(s) cannot be divided by the fractions {list(fractions)}"
        )
    if groups is not None:
        cut = split_by_group(train, groups[train], fractions, seed)
    elif labels is not None:
        cut = split_by_class(train, labels[train], fractions, seed)
    else:
        cut = split_by_fractions(train, fractions, seed)
    if not len(cut["train"]):
        raise UserError(f"data.split.fractions {list(fractions)}: leave none of the {len(train)} rows to train")
    own |= {name: rows for name, rows in cut.items() if len(rows)}
    _refuse_shared(own, groups)
    return _in_order(own)


def _refuse_shared(splits: Mapping[str, Indices], groups: npt.NDArray[np.uint64] | None) -> None:
    """Where the data has splits of its own, only part of them is cut by groups: the rest must have kept to them."""
    for one, other in combinations(splits, 2) if groups is not None else ():
        assert groups is not None
        shared = np.intersect1d(groups[splits[one]], groups[splits[other]])
        if len(shared):
            rows = [int(splits[name][np.flatnonzero(groups[splits[name]] == shared[0])[0]]) for name in (one, other)]
            raise UserError(
                f"data.split.group_by: {len(shared)} group(s) have rows in {one} and in {other}, as the data says "
                f"(rows {rows[0]} and {rows[1]}, for one): leave group_by out, or the data's splits"
            )


def _in_order(splits: Mapping[str, Indices]) -> dict[str, Indices]:
    return {name: splits[name] for name in SPLITS if name in splits}
