"""What can be asked of the training loop: windows, accumulation, averages, early ends, checkpoints within an epoch."""

from __future__ import annotations

import errno
import socket
import threading
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import multiprocessing as mp
from torch import nn

from distill_ray import artifacts, checkpoints, losses, optimizing, training
from distill_ray.config import CeLoss, InputConfig, KdLoss, MlpModel, TrainConfig
from distill_ray.errors import RunError
from distill_ray.losses import Share
from distill_ray.models import ModelSpec, load_classifier, load_model
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
