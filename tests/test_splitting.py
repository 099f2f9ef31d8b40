"""Splits: every row once, and what each way of dividing promises."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray.errors import UserError
from distill_ray.sources.splitting import SPLITS, divide, split_by_class, split_by_group

FRACTIONS = st.sampled_from([(0.8, 0.1, 0.1), (0.9, 0.1), (0.5, 0.25, 0.25), (0.98, 0.01, 0.01)])


def is_a_division(splits: dict[str, Any], rows: Any) -> bool:
    return bool(np.array_equal(np.sort(np.concatenate(list(splits.values()))), np.sort(rows)))


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 60), min_size=1, max_size=30), fractions=FRACTIONS, seed=st.integers(0, 99))
def test_each_class_is_divided_by_the_fractions(counts: list[int], fractions: tuple[float, ...], seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)) - 1, counts))  # -1: unlabelled
    rows = np.arange(len(labels), dtype=np.int64)
    splits = split_by_class(rows, labels, fractions, seed)
    assert is_a_division(splits, rows)
    for number, count in enumerate(counts):
        held = [int((labels[splits[name]] == number - 1).sum()) for name in splits]
        assert held[0] >= 1
        if count > 20:  # of few rows a split may have none, or one too many
            assert all(abs(n - f * count) < 3 for n, f in zip(held, fractions, strict=True))
    if min(counts) > 20:
        assert all(abs(len(splits[n]) - f * len(rows)) < 3 for n, f in zip(splits, fractions, strict=True))


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=3, max_size=40), fractions=FRACTIONS, seed=st.integers(0, 99))
def test_no_group_is_in_two_splits(sizes: list[int], fractions: tuple[float, ...], seed: int) -> None:
    groups = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes), dtype=np.uint64) * 1000, sizes))
    rows = np.arange(len(groups), dtype=np.int64) + 7
    splits = split_by_group(rows, groups, fractions, seed)
    assert is_a_division(splits, rows)
    held = [set(groups[part - 7].tolist()) for part in splits.values()]
    assert all(held)
    assert sum(map(len, held)) == len(set().union(*held)) == len(sizes)


def test_groups_of_even_size_come_close_to_the_fractions() -> None:
    groups = np.repeat(np.arange(100, dtype=np.uint64), 7)
    splits = split_by_group(np.arange(700, dtype=np.int64), groups, (0.8, 0.1, 0.1), 0)
    assert {name: len(part) for name, part in splits.items()} == {"train": 560, "validation": 70, "test": 70}
    other = split_by_group(np.arange(700, dtype=np.int64), groups, (0.8, 0.1, 0.1), 1)
    assert not np.array_equal(splits["test"], other["test"])


def test_what_the_data_says_is_kept_and_validation_is_cut_from_training_rows() -> None:
    train, test = np.arange(0, 90, dtype=np.int64), np.arange(90, 100, dtype=np.int64)
    splits = divide({"test": test, "train": train}, None, 0)
    assert list(splits) == list(SPLITS)
    assert np.array_equal(splits["test"], test)
    assert is_a_division({"train": splits["train"], "validation": splits["validation"]}, train)
    assert len(splits["validation"]) == 9
    assert len(divide({"test": test, "train": train}, (0.5, 0.5), 0)["validation"]) == 45
    own = {"train": train, "validation": test[:4], "test": test[4:]}
    kept = divide(own, None, 0)
    assert all(np.array_equal(kept[name], own[name]) for name in SPLITS)


@pytest.mark.parametrize(
    ("given_splits", "fractions", "message"),
    [
        (("train", "validation", "test"), (0.9, 0.1), "the data says itself which rows are validation: leave out"),
        (("train", "test"), (0.8, 0.1, 0.1), "the data says itself which rows are test: give two"),
    ],
)
def test_fractions_that_contradict_the_data(given_splits: tuple[str, ...], fractions: Any, message: str) -> None:
    rows = {name: np.arange(10, dtype=np.int64) for name in given_splits}
    with pytest.raises(UserError, match=re.escape(message)):
        divide(rows, fractions, 0)
    with pytest.raises(UserError, match="2 training row"):
        divide({"train": np.arange(2, dtype=np.int64)}, (0.8, 0.1, 0.1), 0)


def test_a_group_that_the_datas_own_splits_divide_is_refused() -> None:
    """Only training rows are cut by groups: what is in the data's own test split must have kept to them."""
    groups = np.repeat(np.arange(20, dtype=np.uint64), 5)
    rows = np.arange(100, dtype=np.int64)
    whole = {"train": rows[:80], "test": rows[80:]}
    kept = divide(whole, None, 0, groups=groups)
    assert not set(groups[kept["train"]]) & set(groups[kept["validation"]])
    for own in ({"train": rows[:83], "test": rows[83:]},
                {"train": rows[:60], "validation": rows[60:82], "test": rows[82:]}):  # fmt: skip
        with pytest.raises(UserError, match=r"group_by: 1 group\(s\) have rows in"):
            divide(own, None, 0, groups=groups)


def test_no_row_is_in_two_splits_where_few_are_cut() -> None:
    rows = np.arange(4, dtype=np.int64)
    with pytest.raises(UserError, match="leave none of the 4 rows to train"):
        divide({"train": rows}, (0.2, 0.4, 0.4), 0)
    with pytest.raises(UserError, match="names no training rows, only validation"):
        divide({"train": rows[:0], "validation": rows}, None, 0)
