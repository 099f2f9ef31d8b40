"""A row that is left alone: batch norm cannot be trained on it, which is told before anything is trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from distill_ray import order
from distill_ray.config import InputConfig, StudentConfig
from distill_ray.errors import UserError
from distill_ray.models import foreign
from distill_ray.placing import Placement
from distill_ray.stages import model_folder

NORMED = {"name": "resnet", "channels": [4, 8, 8], "norm": "batch"}  # of 4x4 a single value a channel is left
GROUPED = {"name": "resnet", "channels": [12], "norm": "group"}


def check(rows: int, batch: int, workers: int = 1, most: int = 0, model: Any = None, **train: Any) -> None:
    data: Any = SimpleNamespace(
        splits={"train": SimpleNamespace(rows=rows)}, shape=(1, 4, 4), dtype="uint8", classes=3,
        class_names=tuple("abc"), input=InputConfig(),
    )  # fmt: skip
    section = StudentConfig.model_validate({"model": model or NORMED, "train": {"batch_size": batch, **train}})
    model_folder.check_model("student", data, section, Placement(workers, 1, 0.0, most_workers=most))


@pytest.mark.parametrize(
    ("rows", "batch", "workers", "parts", "least"),
    [
        (64, 16, 1, 1, 16), (65, 16, 1, 1, 1), (66, 16, 1, 1, 2), (5, 16, 1, 1, 5), (1, 16, 1, 1, 1),
        (66, 16, 2, 1, 1), (67, 16, 2, 1, 1), (68, 16, 2, 1, 2), (65, 16, 2, 1, 1), (64, 16, 3, 1, 5),
        (64, 16, 1, 4, 4), (64, 16, 1, 16, 1), (66, 16, 1, 2, 1), (67, 16, 1, 2, 1), (68, 16, 1, 2, 2),
        (64, 16, 3, 2, 2), (64, 16, 3, 4, 1), (27, 27, 2, 5, 1),
    ],
)  # fmt: skip
def test_the_fewest_rows_at_once(rows: int, batch: int, workers: int, parts: int, least: int) -> None:
    assert order.least_rows(rows, batch, workers, parts) == least


def test_a_row_left_alone_is_refused_with_a_size_that_leaves_none() -> None:
    told = (
        r"student.train.batch_size 16: 65 training rows in batches of that leave one row alone, which this network "
        r"cannot be trained on \(ValueError: Expected more than 1 value per channel.*\): set it to 15, or use a network"
    )
    with pytest.raises(UserError, match=told):
        check(65, 16)
    check(65, 15)
    check(64, 16)
    with pytest.raises(UserError, match=r"66 training rows in batches of that over 2 workers leave one row alone"):
        check(66, 16, workers=2)
    with pytest.raises(UserError, match=r"66 training rows in batches of that leave one row alone"):
        check(66, 16, most=2)  # when a second worker comes
    with pytest.raises(UserError, match=r"in batches of that in 2 parts leave one row alone"):
        check(66, 16, accumulate=2)


def test_a_network_that_can_be_trained_on_one_row_is_not_refused() -> None:
    check(65, 16, model=NORMED | {"channels": [4]})  # a row has 16 values a channel
    check(65, 16, model=GROUPED)
    check(65, 16, model={"name": "mlp"})


def test_a_network_that_cannot_take_one_row_at_all_is_refused_whatever_the_sizes() -> None:
    """Group norm with a channel a group, where one value a channel is left: its latency could not be measured."""
    with pytest.raises(UserError, match=r"student.model: it cannot take a single row, as its latency is measured by"):
        check(64, 16, model={"name": "resnet", "channels": [8, 8, 8]})


def test_networks_that_are_not_ours_are_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    monkeypatch.setattr(foreign, "build", build)
    model = {"import": "their:net"}
    check(64, 16, model=model)
    with pytest.raises(UserError, match=r"leave one row alone, .*: set it to 15"):
        check(65, 16, model=model)
