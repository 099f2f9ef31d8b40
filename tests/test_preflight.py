"""What could never work is refused before any work: one line, exit 2, soon."""

from __future__ import annotations

import time

import pytest

from distill_ray.config import CharCnnModel, InputConfig, MlpModel, TrainConfig
from distill_ray.footprint import step_bytes
from distill_ray.models import ModelSpec
from tests.conftest import SmallRun
from tests.harness import distill_ray

REFUSED_WITHIN_S = 30


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("cluster.gpus_per_worker=1", "1 GPUs each are asked for, the cluster has"),
        ("cluster.cpus_per_worker=512", "512 CPUs each are asked for, the cluster has"),
        ("cluster.workers=300", "300 worker(s) with"),
        ("cluster.workers=[200, 300]", "200 worker(s) with"),
        ("cluster.workers=[3, 2]", "[min, max] must ascend, got [3, 2]"),
        ("teacher.train.precision=fp16", "teacher.train.precision: fp16 needs a GPU"),
        ("teacher.model.hidden=[300000, 300000]", "teacher.train.batch_size 64: a step takes at least"),
        ("student.model.hidden=[300000, 300000]", "student.train.batch_size 32: a step takes at least"),
    ],
)
def test_what_can_never_work_is_refused_soon(own_copy: SmallRun, override: str, told: str) -> None:
    """From a finished data store, so that what is left to refuse comes first."""
    begun = sorted(path.name for path in own_copy.out.glob("artifacts/*"))
    started = time.monotonic()
    done = distill_ray("run", own_copy.config, override, "teacher.seed=7", "--out", own_copy.out, "--quiet")
    seconds = time.monotonic() - started
    assert (done.code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert told in line
    assert seconds < REFUSED_WITHIN_S
    # A folder with a tracking id at most: nothing was trained.
    fresh = [path for path in own_copy.out.glob("artifacts/*") if path.name not in begun]
    assert [path.name for path in fresh if (path / "metrics.jsonl").exists()] == []


def spec_of(model: CharCnnModel | MlpModel, shape: tuple[int, ...]) -> ModelSpec:
    return ModelSpec(
        model=model, input=InputConfig(), shape=shape, dtype="uint8", classes=10, class_names=tuple("abcdefghij")
    )


def test_a_step_is_counted_by_its_parts() -> None:
    """An mlp of 100 -> 50 -> 10: 5,560 weights; saved for the backward pass are the floats of inputs and layers."""
    mlp = spec_of(MlpModel(name="mlp", hidden=(50,)), (100,))
    weights = 4 * (100 * 50 + 50 + 50 * 10 + 10)
    one, two = (
        step_bytes(mlp, TrainConfig(batch_size=batch, precision="fp32"), rows=10_000, world_size=1) - 4 * weights
        for batch in (1000, 2000)
    )
    assert one == 4 * 1000 * (100 + 50 + 10)
    assert two == 2 * one


@pytest.mark.parametrize(
    ("train", "rows", "world_size", "rows_at_once"),
    [
        ({}, 10_000, 1, 1000), ({}, 300, 1, 300), ({}, 10_000, 4, 250), ({"accumulate": 3}, 10_000, 1, 334),
        ({"accumulate": 2}, 10_000, 4, 125),
    ],
)  # fmt: skip
def test_a_step_is_counted_for_the_rows_that_are_in_memory_at_once(
    train: dict[str, int], rows: int, world_size: int, rows_at_once: int
) -> None:
    cnn = spec_of(CharCnnModel(name="char_cnn", channels=(4,), hidden=(8,)), (1, 8, 8))
    asked = TrainConfig.model_validate({"batch_size": 1000, "precision": "fp32", **train})
    plain = TrainConfig(batch_size=rows_at_once, precision="fp32")
    assert step_bytes(cnn, asked, rows, world_size) == step_bytes(cnn, plain, rows, 1)


def test_optimizers_and_averages_hold_copies_of_the_weights() -> None:
    mlp = spec_of(MlpModel(name="mlp", hidden=(50,)), (100,))
    weights = 4 * (100 * 50 + 50 + 50 * 10 + 10)

    def bytes_of(**train: object) -> int:
        return step_bytes(mlp, TrainConfig.model_validate({"batch_size": 8, **train}), 100, 1)

    assert bytes_of(optimizer="adamw") - bytes_of(optimizer="sgd") == weights
    assert bytes_of(ema_decay=0.9) - bytes_of() == weights
