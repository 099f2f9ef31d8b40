"""What can be asked of the training loop: windows, accumulation, averages, early ends, checkpoints within an epoch."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn

from distill_ray import artifacts, checkpoints, losses, optimizing, order, training
from distill_ray.config import CeLoss, ImportedModel, InputConfig, KdLoss, MlpModel, TrainConfig
from distill_ray.errors import RunError
from distill_ray.losses import Share
from distill_ray.models import Classifier, ModelSpec, foreign, load_classifier, load_model
from distill_ray.storage import Folder
from distill_ray.store import SplitArrays, StoredSplit
from distill_ray.training import FitResult, FitSpec, Worker, fit
from tests import stores

CLASSES = 4
ROWS, HELD_OUT = 101, 40


def rows(count: int, seed: int, unlabelled: float = 0.0) -> SplitArrays:
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, count)
    inputs = (random.normal(0, 20, (count, 6)) + 40 * labels[:, None]).clip(0, 255).astype(np.uint8)
    logits = (-3.0 * (np.arange(CLASSES) != labels[:, None])).astype(np.float16)
    labels = np.where(random.random(count) < unlabelled, -1, labels)
    return SplitArrays(np.arange(count), inputs, labels.astype(np.int64), logits)


def spec_of(loss: CeLoss | KdLoss | None = None, **train: Any) -> FitSpec:
    model = ModelSpec(
        model=MlpModel(name="mlp", hidden=(8,)), input=InputConfig(), shape=(6,), dtype="uint8", classes=CLASSES,
        class_names=tuple("abcd"),
    )  # fmt: skip
    config = TrainConfig.model_validate({"epochs": 3, "batch_size": 20, "lr": 0.01, **train})
    return FitSpec(model, config, loss or KdLoss(name="kd"), seed=3, precision="fp32")


def trained(spec: FitSpec, folder: Path, train: SplitArrays | StoredSplit | None = None, **more: Any) -> FitResult:
    result = fit(spec, train or rows(ROWS, 0), rows(HELD_OUT, 1), Folder.at(folder), Worker(), **more)
    assert result is not None
    return result


def losses_of(result: FitResult) -> list[float]:
    return [row["train_loss"] for row in result.history]


# --- one batch in parts, on one worker or several ---------------------------------------------------------------------


@pytest.mark.parametrize("loss", [CeLoss(name="ce"), KdLoss(name="kd", temperature=3.0, alpha=0.7)])
def test_the_parts_of_a_batch_add_up_to_its_loss(loss: CeLoss | KdLoss) -> None:
    whole = rows(50, 5, unlabelled=0.4)
    torch.manual_seed(0)
    student, teacher = torch.randn(50, CLASSES), torch.from_numpy(np.array(whole.logits))
    labels = torch.from_numpy(whole.labels)
    expected = losses.compute(loss, student, labels, teacher)
    share = Share(50, int((labels >= 0).sum()))
    parts = [
        losses.compute(loss, student[part], labels[part], teacher[part], share)
        for part in (slice(0, 7), slice(7, 8), slice(8, 50))
    ]
    for name in ("total", "ce", "kd"):
        together = sum(float(getattr(part, name)) for part in parts)
        assert together == pytest.approx(float(getattr(expected, name)), rel=1e-6)


@pytest.mark.parametrize("accumulate", [2, 7, 20])
def test_accumulation_does_not_change_the_training(tmp_path: Path, accumulate: int) -> None:
    """Also where the last batch, of a single row, has fewer rows than parts."""
    train = rows(ROWS, 0, unlabelled=0.3)
    alone = trained(spec_of(), tmp_path / "alone", train)
    parts = trained(spec_of(accumulate=accumulate), tmp_path / "parts", train)
    assert losses_of(parts) == pytest.approx(losses_of(alone), rel=1e-5)


def data_parallel(rank: int, world: int, port: int, folder: str, train: dict[str, Any]) -> None:
    method = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=world)
    try:
        split = rows(ROWS, 0, unlabelled=0.3)
        fit(spec_of(**train), split, rows(HELD_OUT, 1), Folder.at(folder), Worker(rank, world))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("train", [{}, {"accumulate": 3, "clip_norm": 0.5, "ema_decay": 0.9}], ids=["plain", "options"])
def test_one_worker_equals_several(tmp_path: Path, world: int, train: dict[str, Any]) -> None:
    """With rows that have no label, unevenly spread: CE is the mean over the labelled rows of the whole batch."""
    alone = trained(spec_of(**train), tmp_path / "alone", rows(ROWS, 0, unlabelled=0.3))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "several"
    mp.spawn(data_parallel, args=(world, port, str(folder), train), nprocs=world)  # type: ignore[attr-defined, no-untyped-call]
    several = training.export_best(spec_of().model, Folder.at(folder))
    for key in ("train_loss", "train_ce", "train_kd", "validation_accuracy", "validation_ce"):
        expected = [row[key] for row in alone.history]
        assert [row[key] for row in several.history] == pytest.approx(expected, rel=1e-4)


# --- networks that are not ours, on several workers -------------------------------------------------------------------


class Meets(nn.Module):
    """Meets the other workers in each forward pass of the training, as SyncBatchNorm does, which is for GPUs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and dist.is_initialized():
            dist.all_reduce(torch.ones(3))
        logits: torch.Tensor = self.head(x)
        return logits


class Spare(nn.Module):
    """Has weights that no step uses, some that every second step uses, and some that a step's first part alone does."""

    def __init__(self, parts: int = 1) -> None:
        super().__init__()
        self.head, self.every_second, self.first_part, self.unused = (nn.Linear(6, CLASSES) for _ in range(4))
        self.passes, self.parts = 0, parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step, part = divmod(self.passes, self.parts)
        self.passes += self.training
        logits: torch.Tensor = self.head(x)
        if step % 2:
            logits = logits + self.every_second(x)
        return logits if part else logits + 0 * self.first_part(x)


class Normed(nn.Sequential):
    """With statistics of the rows that this worker alone has seen."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=0.9), nn.ReLU(), nn.Linear(8, CLASSES))


def their_spec(**train: Any) -> FitSpec:
    spec = spec_of(**train)
    return replace(spec, model=spec.model.model_copy(update={"model": ImportedModel.model_validate({"import": "a:b"})}))


# name: the network, and how it is trained by three workers
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "meets": (Meets, {"batch_size": 14, "accumulate": 4}),
    "spare": (Spare, {}),
    "spare in parts": (partial(Spare, 2), {"batch_size": 26, "accumulate": 2}),  # each of its batches is in two
    "normed": (Normed, {"batch_size": 19}),  # the last has two rows for each
    "normed, average": (Normed, {"batch_size": 19, "ema_decay": 0.5}),
}


def several(rank: int, world: int, port: int, folder: str) -> None:
    """All of it in one group of processes, whose start takes longer than the trainings."""
    method, timeout = f"tcp://127.0.0.1:{port}", timedelta(seconds=60)
    dist.init_process_group("gloo", timeout=timeout, init_method=method, rank=rank, world_size=world)
    worker, train, held_out = Worker(rank, world), rows(ROWS, 0), rows(HELD_OUT, 1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "_CLOCK_S", 1e-9)  # every step is longer
            kill_at_step(patch, 9)
            cut = spec_of(checkpoint_every_s=1e-9 if rank == 0 else 1e9)  # by the first one's clock
            with pytest.raises(KilledWithin):
                fit(cut, train, held_out, Folder.at(folder) / "cut", worker)
        for name, (kind, options) in CASES.items():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(foreign, "build", partial(made, kind))
                fit(their_spec(**options), train, held_out, Folder.at(folder) / name, worker)
    finally:
        dist.destroy_process_group()


def made(kind: Callable[[], nn.Module], *_: Any) -> nn.Module:
    return kind()


@pytest.fixture(scope="module")
def by_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of what three workers trained: ``cut`` in its second epoch, and ``CASES``."""
    folder = tmp_path_factory.mktemp("by_three")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(several, args=(3, port, str(folder)), nprocs=3)  # type: ignore[attr-defined, no-untyped-call]
    return folder


def test_workers_take_equally_many_parts() -> None:
    assert order.parts(64, 3, 8) == (3, 8)  # of 22 rows seven of 3 and one of 1; of 21 seven, and one that is filled
    for rows_B, world, most in ((64, 1, 8), (22, 1, 8), (101, 1, 7), (1, 4, 2), (20, 3, 3)):
        size, number = order.parts(rows_B, world, most)
        chunks = torch.zeros(-(-rows_B // world)).chunk(most)
        assert (size, number) == (len(chunks[0]), len(chunks))


@pytest.mark.parametrize("name", ["meets", "spare", "spare in parts"])
def test_networks_that_are_not_ours_train_on_several_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_three: Path, name: str
) -> None:
    """One that meets gets shares of 5, 5 and 4 rows: three parts of two at most, or, each for itself, 3, 3 and 4."""
    kind, options = CASES[name]
    monkeypatch.setattr(foreign, "build", partial(made, kind))
    alone = trained(their_spec(**options), tmp_path)
    together = training.export_best(their_spec().model, Folder.at(by_three / name))
    for key in ("train_loss", "validation_ce"):
        expected = [row[key] for row in alone.history]
        assert [row[key] for row in together.history] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["normed", "normed, average"])
def test_what_is_validated_on_several_workers_is_what_is_kept(by_three: Path, name: str) -> None:
    """Each worker has statistics of its own rows; those of the first are kept."""
    saved = checkpoints.at(Folder.at(by_three / name / "checkpoints"), 3)
    assert saved is not None
    net, held_out = Normed(), rows(HELD_OUT, 1)
    net.load_state_dict(saved.average or saved.model)
    logits = Classifier(net, InputConfig(), (6,), ours=False).eval()(torch.from_numpy(held_out.inputs))
    ce = float(nn.functional.cross_entropy(logits.detach(), torch.from_numpy(held_out.labels)))
    assert saved.history[-1]["validation_ce"] == pytest.approx(ce, rel=1e-5)


# --- options ----------------------------------------------------------------------------------------------------------


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    """With SGD a step is lr times the gradient: its length says how long the gradient was."""
    before = spec_of().model
    torch.manual_seed(3)
    start = torch.cat([parameter.flatten() for parameter in before.build().parameters()]).detach()
    lengths = {}
    for name, clip in (("free", None), ("clipped", 0.01)):
        once = spec_of(
            epochs=1, batch_size=ROWS, optimizer="sgd", momentum=0, weight_decay=0, lr=1.0, schedule="constant",
            clip_norm=clip,
        )  # fmt: skip
        trained(once, tmp_path / name)
        end = torch.cat([p.flatten() for p in load_classifier(str(tmp_path / name)).net.parameters()]).detach()
        lengths[name] = float((end - start).norm())
    assert lengths["clipped"] == pytest.approx(0.01, rel=1e-3)
    assert lengths["free"] > 0.05


def test_the_average_of_the_weights_is_what_is_validated_and_kept(tmp_path: Path) -> None:
    decay = 0.8
    spec = spec_of(epochs=1, batch_size=25, ema_decay=decay)
    trained(spec, tmp_path / "ema")
    torch.manual_seed(spec.seed)
    expected: dict[str, torch.Tensor] = {}
    for steps in range(1, 6):  # 101 rows: 5 steps; the weights after each, from trainings that end there
        weights = weights_after(tmp_path / f"after-{steps}", spec, steps)
        if not expected:
            expected = {name: tensor.clone() for name, tensor in weights.items()}
        else:
            expected = {name: decay * expected[name] + (1 - decay) * tensor for name, tensor in weights.items()}
    kept = load_classifier(str(tmp_path / "ema")).net.state_dict()
    for name, tensor in expected.items():
        assert torch.allclose(kept[name], tensor, atol=1e-6)


def weights_after(folder: Path, spec: FitSpec, steps: int) -> dict[str, torch.Tensor]:
    """The weights themselves after so many steps of the first epoch."""

    class Stop(Exception):
        pass

    seen: list[dict[str, torch.Tensor]] = []
    original = optimizing.apply_gradients

    def counting(model: torch.nn.Module, *arguments: Any) -> None:
        original(model, *arguments)
        seen.append({name: p.detach().clone() for name, p in model.net.state_dict().items()})  # type: ignore[union-attr]
        if len(seen) == steps:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill_ray.training.apply_gradients", counting)
        with pytest.raises(Stop):
            trained(spec, folder)
    return seen[-1]


def test_early_stopping(tmp_path: Path) -> None:
    def history(*accuracies: float) -> artifacts.History:
        return [{"validation_accuracy": accuracy} for accuracy in accuracies]

    assert not artifacts.is_over(history(), 5, 1)
    assert not artifacts.is_over(history(0.5, 0.6, 0.6), 5, 2)
    assert artifacts.is_over(history(0.5, 0.6, 0.6, 0.5), 5, 2)
    assert not artifacts.is_over(history(0.5, 0.6, 0.6, 0.5), 5, None)
    assert artifacts.is_over(history(0.1, 0.2, 0.3, 0.4, 0.5), 5, 2)

    frozen = spec_of(epochs=9, lr=1e-12, early_stop_epochs=2)  # nothing can improve on the first epoch
    result = trained(frozen, tmp_path)
    assert (len(result.history), result.best_epoch) == (3, 1)
    calls: list[object] = []
    assert trained(frozen, tmp_path, on_epoch=calls.append) == result
    assert calls == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_compiled_training_is_close(tmp_path: Path) -> None:
    plain = trained(spec_of(epochs=2), tmp_path / "plain")
    compiled = trained(spec_of(epochs=2, compile="default"), tmp_path / "compiled")
    assert losses_of(compiled) == pytest.approx(losses_of(plain), rel=1e-4)
    rows_BF = torch.from_numpy(rows(8, 2).inputs)
    ours, theirs = (load_model(str(tmp_path / name))(rows_BF) for name in ("compiled", "plain"))
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_out_of_memory_names_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        torch.empty(2**46, dtype=torch.uint8)  # 64 TiB: the real allocator's own words

    monkeypatch.setattr(training, "_step", full)
    with pytest.raises(RunError, match=r"out of memory with train.batch_size 20: lower it, or raise train.accumulate"):
        trained(spec_of(), tmp_path)


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "GPU "),
        ("CUDA error: out of memory", "GPU "),
        ("[enforce fail at alloc_cpu.cpp:131] err == 0. DefaultCPUAllocator: can't allocate memory", ""),
    ],
)
def test_out_of_memory_is_known_by_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, where: str
) -> None:
    def full(*arguments: object) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(training, "_step", full)
    with pytest.raises(RunError, match=rf"^out of {where}memory with train.batch_size 20 in 2 parts: lower it"):
        trained(spec_of(accumulate=2), tmp_path)
    monkeypatch.setattr(training, "_step", lambda *_: torch.zeros(2, 3) @ torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trained(spec_of(), tmp_path)


def test_out_of_memory_before_the_first_step_names_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "averaged", lambda *_: torch.empty(2**46, dtype=torch.uint8))
    with pytest.raises(RunError, match=r"out of memory with train.batch_size 20: lower it, or raise train.accumulate"):
        trained(spec_of(), tmp_path)


def test_momentum_begins_with_the_first_step_that_is_not_left_out() -> None:
    """A scaler leaves out a step whose gradients have overflowed, which the first steps' often have."""

    def after(*gradients: float) -> torch.Tensor:
        torch.manual_seed(0)
        net = nn.Linear(4, 3)
        optimizer = optimizing.optimizer_of(net, TrainConfig(optimizer="sgd", momentum=0.9), scaled=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**6, backoff_factor=0.5)
        for value in gradients:
            scaler.scale(torch.zeros(()))
            for parameter in net.parameters():
                parameter.grad = torch.full_like(parameter, value * scaler.get_scale())
            optimizing.apply_gradients(net, optimizer, scaler, None)
            if value == float("inf"):
                assert all(state.get("momentum_buffer") is None for state in optimizer.state.values())
        return net.weight.detach().clone()

    assert torch.equal(after(float("inf"), 1.0, 1.0), after(1.0, 1.0))


def test_sgd_in_fp16_is_the_one_that_a_scaler_may_leave_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused: set[bool] = set()
    original = optimizing.apply_gradients

    def looking(model: nn.Module, optimizer: torch.optim.Optimizer, *more: Any) -> None:
        fused.add(optimizer.param_groups[0]["fused"])
        original(model, optimizer, *more)

    monkeypatch.setattr(training, "apply_gradients", looking)
    for precision, expected in (("fp16", False), ("fp32", True)):
        fused.clear()
        trained(replace(spec_of(epochs=1, optimizer="sgd"), precision=precision), tmp_path / precision)
        assert fused == {expected}


# --- windows of shards ------------------------------------------------------------------------------------------------


def stored(tmp_path: Path, window_rows: int) -> StoredSplit:
    return StoredSplit(stores.make_data(tmp_path), "train", stores.make_labels(tmp_path), window_rows)


def stored_spec(**train: Any) -> FitSpec:
    spec = spec_of(batch_size=7, **train)
    model = spec.model.model_copy(
        update={"shape": stores.SHAPE, "classes": stores.CLASSES, "class_names": tuple("abcde")}
    )
    return replace(spec, model=model)


def stored_validation(tmp_path: Path) -> StoredSplit:
    return StoredSplit(stores.make_data(tmp_path), "validation", stores.make_labels(tmp_path), 8)


@pytest.mark.parametrize("window_rows", [1, 8, 20, 1000])
def test_training_from_windows_sees_every_row_once_an_epoch(tmp_path: Path, window_rows: int) -> None:
    from distill_ray.rows import Rows

    split = Rows(stored(tmp_path, window_rows), torch.device("cpu"))
    everything = {bytes(row.tobytes()) for row in split_inputs(tmp_path)}
    for epoch in (1, 2):
        batches = list(split.shuffled(7, seed=0, epoch=epoch, rank=0, world_size=1))
        assert [len(batch.inputs) for batch in batches] == [7, 7, 7, 7, 7, 1]
        seen = [row.numpy().tobytes() for batch in batches for row in batch.inputs]
        assert len(seen) == len(set(seen)) == 36
        assert set(seen) == everything


def split_inputs(tmp_path: Path) -> np.ndarray[Any, Any]:
    from distill_ray.store import read_split

    inputs: np.ndarray[Any, Any] = read_split(stores.make_data(tmp_path), "train").inputs
    return inputs


def test_training_from_windows_learns_and_resumes_bitwise(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(row: dict[str, float]) -> None:
        if row["epoch"] == 2:
            raise Killed

    split, held_out = stored(tmp_path, 16), stored_validation(tmp_path)
    whole = fit(stored_spec(epochs=4), split, held_out, Folder.at(tmp_path / "whole"), Worker())
    with pytest.raises(Killed):
        fit(stored_spec(epochs=4), split, held_out, Folder.at(tmp_path / "cut"), Worker(), on_epoch=kill)
    again = fit(stored_spec(epochs=4), split, held_out, Folder.at(tmp_path / "cut"), Worker())
    assert whole is not None
    assert again is not None
    assert again.weights_sha256 == whole.weights_sha256
    assert losses_of(whole)[-1] < losses_of(whole)[0]


# --- checkpoints within an epoch --------------------------------------------------------------------------------------


class KilledWithin(Exception):
    pass


def kill_at_step(patch: pytest.MonkeyPatch, wanted: int) -> None:
    """From the ``wanted``-th step on, counted over everything that runs now."""
    original, count = optimizing.apply_gradients, iter(range(10**9))

    def counting(*arguments: Any) -> None:
        if next(count) == wanted:
            raise KilledWithin
        original(*arguments)

    patch.setattr("distill_ray.training.apply_gradients", counting)


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9, "optimizer": "sgd"}], ids=["plain", "average"])
@pytest.mark.parametrize("killed_at", [1, 4, 9, 17])
def test_a_kill_within_an_epoch_costs_no_more_than_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, options: dict[str, Any]
) -> None:
    """6 steps an epoch, a checkpoint after each: bitwise the weights and the losses of an undisturbed training."""
    spec = spec_of(checkpoint_every_s=1e-9, **options)
    whole = trained(spec_of(**options), tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at_step(patch, killed_at)
        with pytest.raises(KilledWithin):
            trained(spec, tmp_path / "cut")
    saved = checkpoints.latest(Folder.at(tmp_path / "cut" / "checkpoints"))
    assert saved is not None
    epoch, steps = divmod(killed_at, 6)
    assert saved.position == (epoch, steps)
    with monkeypatch.context() as patch:
        kill_at_step(patch, 18 - killed_at)  # exactly as many steps as are missing: one more would raise
        again = trained(spec, tmp_path / "cut")
    assert again.weights_sha256 == whole.weights_sha256
    for key in ("train_loss", "train_ce", "train_kd", "validation_ce"):
        assert [row[key] for row in again.history] == pytest.approx([row[key] for row in whole.history], rel=1e-12)


def test_a_notice_is_heard_in_an_epoch_of_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """6 steps an epoch; where steps are long it is asked after each but the last."""
    written, asked = list[tuple[int, int]](), list[bool]()
    original = checkpoints.write

    def watching(folder: Folder, taken: checkpoints.Snapshot) -> None:
        written.append(taken.checkpoint.position)
        original(folder, taken)

    def must_save() -> bool:
        asked.append(len(asked) in (0, 3))
        return asked[-1]

    monkeypatch.setattr(checkpoints, "write", watching)
    plain = trained(spec_of(epochs=2), tmp_path / "short", must_save=must_save)
    assert written[0] == (0, 1)
    written.clear()
    asked.clear()
    monkeypatch.setattr(training, "_CLOCK_S", 1e-9)  # every step is longer
    noticed = trained(spec_of(epochs=2), tmp_path / "long", must_save=must_save)
    assert written == [(0, 1), (0, 4), (1, 0), (2, 0)]
    assert len(asked) == 10
    assert noticed.weights_sha256 == plain.weights_sha256


@pytest.mark.parametrize(("step_s", "gaps"), [(1e-4, [4, 16, 64, 64]), (0.1, [4, 16, 19, 19]), (5.0, [1, 1])])
def test_the_clock_is_looked_at_every_two_seconds(step_s: float, gaps: list[int]) -> None:
    clock, found = training._Clock(), list[int]()
    for _ in gaps:
        clock.steps = clock.gap
        clock.since = time.monotonic() - clock.steps * step_s * 1.01
        found.append(clock.next_gap())
        clock.restart(found[-1])
    assert found == gaps


def test_long_steps_of_several_workers_each_have_a_checkpoint(by_three: Path) -> None:
    saved = checkpoints.latest(Folder.at(by_three / "cut" / "checkpoints"))
    assert saved is not None
    assert saved.position == (1, 3)


def test_checkpoints_within_an_epoch_are_few_and_go_when_it_ends(tmp_path: Path) -> None:
    names: list[set[str]] = []
    original = checkpoints.write

    def watching(folder: Folder, taken: checkpoints.Snapshot) -> None:
        original(folder, taken)
        names.append(set(folder.names()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "write", watching)
        trained(spec_of(checkpoint_every_s=1e-9), tmp_path)
    within = [sum("-steps-" in name for name in seen) for seen in names]
    assert max(within) == 2
    assert within[5::6] == [0, 0, 0]  # at the end of each epoch
    assert max(map(len, names)) <= 5


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, step, steps, went_on = checkpoints.write, optimizing.apply_gradients, count(1), threading.Event()

    def stepping(*arguments: Any) -> None:
        step(*arguments)
        if next(steps) == 7:  # an epoch has 6
            went_on.set()

    def waiting(folder: Folder, taken: checkpoints.Snapshot) -> None:
        assert taken.checkpoint.epoch > 1 or went_on.wait(60), "the second epoch waited for the first's checkpoint"
        original(folder, taken)

    monkeypatch.setattr(checkpoints, "write", waiting)
    monkeypatch.setattr(training, "apply_gradients", stepping)
    slow = trained(spec_of(), tmp_path / "slow")
    monkeypatch.undo()
    assert slow.weights_sha256 == trained(spec_of(), tmp_path / "quick").weights_sha256


@pytest.mark.parametrize("at_epoch", [1, 3])
def test_a_checkpoint_that_cannot_be_written_ends_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_epoch: int
) -> None:
    original, epochs = checkpoints.write, list[float]()

    def full(folder: Folder, taken: checkpoints.Snapshot) -> None:
        if taken.checkpoint.epoch == at_epoch:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(folder, taken)

    monkeypatch.setattr(checkpoints, "write", full)
    with pytest.raises(OSError, match="No space left"):
        trained(spec_of(), tmp_path, on_epoch=lambda row: epochs.append(row["epoch"]))
    assert epochs == [1, 2, 3][:at_epoch]  # told at the next one at the latest, of the last at the end
    lines = tmp_path / artifacts.METRICS_FILE
    assert (len(lines.read_text().splitlines()) if lines.exists() else 0) == at_epoch - 1


def test_a_damaged_checkpoint_within_an_epoch_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(checkpoint_every_s=1e-9)
    with monkeypatch.context() as patch:
        kill_at_step(patch, 10)
        with pytest.raises(KilledWithin):
            trained(spec, tmp_path)
    newest = max(path for path in (tmp_path / "checkpoints").iterdir() if "-steps-" in path.name)
    newest.write_bytes(newest.read_bytes()[:-9])
    saved = checkpoints.latest(Folder.at(tmp_path / "checkpoints"))
    assert saved is not None
    assert saved.position == (1, 3)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_an_optimizer_goes_on_from_a_checkpoint_in_its_weights_memory_order(name: str) -> None:
    """Checkpoints hold plain order, convolutions are channels_last, and fused kernels go through memory."""

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return net, optimizing.optimizer_of(net, TrainConfig(optimizer=name))

    def step(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        rows = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        net(rows.contiguous(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()

    whole, cut = made(), made()
    for number in range(4):
        step(*whole, number)
    for number in range(2):
        step(*cut, number)
    saved = cut[1].state_dict()
    for state in saved["state"].values():
        state.update({k: v.contiguous() for k, v in state.items() if isinstance(v, torch.Tensor)})
    resumed = made()
    resumed[0].load_state_dict(cut[0].state_dict())
    optimizing.load_state(resumed[1], saved)
    for number in range(2, 4):
        step(*resumed, number)
    for ours, theirs in zip(resumed[0].parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
