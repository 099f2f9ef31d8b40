"""The input contract that follows from the rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distill_ray.config import InputConfig, OwnData
from distill_ray.errors import UserError
from distill_ray.sources import SourceInfo
from distill_ray.stages import contract
from distill_ray.storage import Folder
from tests.own_data import data_config


def info(shape: tuple[int, ...], dtype: str) -> SourceInfo:
    return SourceInfo(shape, dtype, ("a", "b"), False, {})


def wish(**keys: object) -> OwnData:
    return data_config(source="parquet", path="/set", columns={"input": "x"}, input=keys)


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((3, 8, 8), "uint8", (1 / 255, (0.5,), (0.5,))), ((12,), "uint8", (1.0, (0.0,), (1.0,))),
        ((1, 8, 8), "float32", (1.0, (0.0,), (1.0,))), ((12,), "int32", (1.0, (0.0,), (1.0,))),
    ],
)  # fmt: skip
def test_only_images_of_bytes_are_scaled_unasked(
    tmp_path: Path, shape: tuple[int, ...], dtype: str, expected: tuple[object, ...]
) -> None:
    found = contract.settled(wish(), info(shape, dtype), Folder.at(tmp_path), [])
    assert (found.scale, found.mean, found.std) == expected
    given = contract.settled(
        wish(scale=2.0, mean=[3.0], std=[4.0], resize=[8, 8]), info(shape, dtype), Folder.at(tmp_path), []
    )
    assert given == InputConfig(scale=2.0, mean=(3.0,), std=(4.0,), resize=(8, 8))


@pytest.mark.parametrize("shape", [(5,), (3, 7), (3, 4, 6)])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_moments_of_parts_are_those_of_the_whole(shape: tuple[int, ...], dtype: str) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(100, 30, (500, *shape)) + 40 * np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))).clip(
        0, 255
    )
    rows = rows.astype(dtype)
    axes = (0, *range(2, rows.ndim))
    whole = contract.moments(rows[:1])
    for start, stop in ((1, 3), (3, 400), (400, 500)):
        whole = contract.joined(whole, contract.moments(rows[start:stop]))
    count, mean, squares = whole
    assert count == rows.size / shape[0]
    assert mean == pytest.approx(rows.mean(axis=axes, dtype=np.float64))
    assert squares / count == pytest.approx(rows.var(axis=axes, dtype=np.float64))


def test_numbers_that_do_not_fit_the_rows_are_refused() -> None:
    with pytest.raises(UserError, match="data.input.mean: 2 numbers for 3 channels: give 1 or 3"):
        contract.check(wish(mean=[1.0, 2.0]), info((3, 8, 8), "uint8"))


def test_resize_and_channels_are_not_written_where_they_are_not_used() -> None:
    assert set(InputConfig().model_dump()) == {"shape", "scale", "mean", "std"}
    assert InputConfig.model_validate_json(InputConfig(resize=(2, 3), channels=1).model_dump_json()).resize == (2, 3)
