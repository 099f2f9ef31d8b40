"""The training loop without Ray: order, resuming, data parallelism, faults."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import multiprocessing as mp

from distill_ray import artifacts, checkpoints, order, precision, training
from distill_ray.config import CeLoss, InputConfig, KdLoss, MlpModel, TrainConfig
from distill_ray.errors import RunError
from distill_ray.models import ModelSpec, load_classifier
from distill_ray.optimizing import lr_factor
from distill_ray.stages import progress
from distill_ray.storage import Folder
from distill_ray.store import SplitArrays
from distill_ray.training import FitResult, FitSpec, Worker, fit

CLASSES = 4


def _rows(count: int, seed: int) -> SplitArrays:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    inputs = (rng.normal(0, 20, (count, 6)) + 40 * labels[:, None]).clip(0, 255).astype(np.uint8)
    logits = (-3.0 * (np.arange(CLASSES) != labels[:, None])).astype(np.float16)
    return SplitArrays(np.arange(count), inputs, labels.astype(np.int64), logits)


def _spec(epochs: int = 4, loss: CeLoss | KdLoss | None = None, **train: object) -> FitSpec:
    model = ModelSpec(
        model=MlpModel(name="mlp", hidden=(8,)), input=InputConfig(), shape=(6,), dtype="uint8", classes=CLASSES,
        class_names=tuple("abcd"),
    )  # fmt: skip
    config = TrainConfig.model_validate({"epochs": epochs, "batch_size": 16, "lr": 0.01, **train})
    return FitSpec(model, config, loss or KdLoss(name="kd"), seed=3, precision="fp32")


def _fit(spec: FitSpec, folder: Path, **arguments: object) -> FitResult:
    result = fit(spec, _rows(101, 0), _rows(40, 1), Folder.at(folder), Worker(), **arguments)  # type: ignore[arg-type]
    assert result is not None
    return result


@settings(deadline=None)
@given(
    shard_rows=st.lists(st.integers(1, 40), min_size=1, max_size=8), batch=st.integers(1, 64),
    world=st.integers(1, 5), seed=st.integers(0, 99), epoch=st.integers(1, 9),
    window_rows=st.one_of(st.none(), st.integers(1, 100)),
)  # fmt: skip
def test_every_row_once_an_epoch_in_batches_that_do_not_depend_on_the_workers(
    shard_rows: list[int], batch: int, world: int, seed: int, epoch: int, window_rows: int | None
) -> None:
    if window_rows is None:
        plan = order.whole(shard_rows, seed, epoch)
    else:
        plan = order.windows(shard_rows, window_rows, seed, epoch)
    starts = np.concatenate([[0], np.cumsum(shard_rows)])

    def rows_of(pieces: list[order.Piece]) -> list[int]:
        """Numbers in the split of a batch's rows."""
        found: list[int] = []
        for piece in pieces:
            ids = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in plan[piece.window].shards])
            found += ids[piece.index.numpy()].tolist()
        return found

    seen: list[int] = []
    batches = list(order.batches(plan, batch))
    for whole in batches:
        together = [row for rank in range(world) for row in rows_of(order.part(whole, rank, world))]
        assert sorted(together) == sorted(rows_of(whole))
        shares = [len(rows_of(order.part(whole, rank, world))) for rank in range(world)]
        assert max(shares) - min(shares) <= 1
        seen += together
    assert [len(rows_of(whole)) for whole in batches[:-1]] == [batch] * (len(batches) - 1)
    assert sorted(seen) == list(range(sum(shard_rows)))
    if window_rows is not None:
        assert all(len(w.order) <= max(window_rows, *(shard_rows[s] for s in w.shards)) for w in plan)


def test_order_changes_with_seed_and_epoch() -> None:
    orders = {tuple(order.epoch_order(50, seed, epoch).tolist()) for seed in range(3) for epoch in range(1, 4)}
    assert len(orders) == 9


def test_schedules() -> None:
    def factors(**train: object) -> list[float]:
        config = TrainConfig.model_validate({"epochs": 2, **train})
        return [lr_factor(step, 5, config) for step in range(10)]

    assert factors(schedule="constant", warmup_epochs=0.8)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = factors(schedule="cosine")
    assert cosine[0] == 1.0
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[5] == pytest.approx(0.5)
    assert factors(schedule="step", step_epochs=[1], step_factor=0.5) == [1.0] * 5 + [0.5] * 5


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_interrupted_equals_uninterrupted_bitwise(tmp_path: Path, optimizer: str) -> None:
    spec = _spec(optimizer=optimizer)
    whole = _fit(spec, tmp_path / "whole")
    with pytest.raises(Killed):
        _fit(spec, tmp_path / "cut", on_epoch=_kill_after(2))
    epochs: list[float] = []
    resumed = _fit(spec, tmp_path / "cut", on_epoch=lambda row: epochs.append(row["epoch"]))
    assert epochs == [3, 4]
    assert resumed.weights_sha256 == whole.weights_sha256
    assert [row["train_loss"] for row in resumed.history] == [row["train_loss"] for row in whole.history]


def test_finished_training_is_not_repeated(tmp_path: Path) -> None:
    spec = _spec()
    first = _fit(spec, tmp_path)
    calls: list[object] = []
    assert _fit(spec, tmp_path, on_epoch=calls.append) == first
    assert calls == []


def test_it_learns_and_keeps_the_last_two_and_the_best(tmp_path: Path) -> None:
    result = _fit(_spec(epochs=12), tmp_path)
    accuracies = [row["validation_accuracy"] for row in result.history]
    assert max(accuracies) > 0.8  # chance is 0.25
    assert result.best_epoch == 1 + int(np.argmax(accuracies))
    kept = {int(path.name[6:11]) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {11, 12, result.best_epoch}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    spec = _spec(epochs=3)
    whole = _fit(spec, tmp_path / "whole")
    _fit(_spec(epochs=3), tmp_path / "hurt")
    newest = max((tmp_path / "hurt" / "checkpoints").iterdir())
    data = bytearray(newest.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    newest.write_bytes(b"" if damage == "empty" else data if damage == "flip" else data[: len(data) // 2])
    epochs: list[float] = []
    again = _fit(spec, tmp_path / "hurt", on_epoch=lambda row: epochs.append(row["epoch"]))
    assert epochs == [3.0]
    assert again.weights_sha256 == whole.weights_sha256


def test_the_checkpoint_before_is_of_use_when_the_newest_is_the_best_and_damaged(tmp_path: Path) -> None:
    """Accuracies 0.5, 0.9, 0.7, 0.8, 0.95: epoch 4 needs epoch 2, its best, to continue from."""
    _fit(_spec(epochs=1), tmp_path)
    folder = Folder.at(tmp_path / "checkpoints")
    first = checkpoints.at(folder, 1)
    assert first is not None
    history: list[dict[str, float]] = []
    for epoch, accuracy in enumerate((0.5, 0.9, 0.7, 0.8, 0.95), start=1):
        history = [*history, {"epoch": epoch, "validation_accuracy": accuracy}]
        best = artifacts.best_epoch(history)
        checkpoints.save(folder, replace(first, epoch=epoch, history=history, best_epoch=best))
    newest = max((tmp_path / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-7])
    found = checkpoints.latest(folder)
    assert found is not None
    assert (found.epoch, found.best_epoch) == (4, 2)


class Killed(Exception):
    pass


def _kill_after(epoch: int) -> Any:
    def kill(row: dict[str, float]) -> None:
        if row["epoch"] == epoch:
            raise Killed

    return kill


def _damage(folder: Path, epoch: int) -> None:
    (file,) = folder.glob(f"checkpoints/epoch-{epoch:05d}-*")
    file.write_bytes(file.read_bytes()[:-7])


def test_the_best_epochs_file_alone_damaged_costs_that_epoch_and_no_other(tmp_path: Path) -> None:
    """Nothing can improve on the first epoch here, so it is the best, and 3 and 4 are the last two."""
    spec = _spec(epochs=6, lr=1e-12, schedule="constant")
    whole = _fit(spec, tmp_path / "whole")
    assert whole.best_epoch == 1
    with pytest.raises(Killed):
        _fit(spec, tmp_path / "hurt", on_epoch=_kill_after(4))
    _damage(tmp_path / "hurt", 1)
    epochs: list[float] = []
    notes: list[str] = []
    with pytest.raises(Killed):
        _fit(spec, tmp_path / "hurt", on_epoch=_kill_after(5), on_note=notes.append)
    again = _fit(spec, tmp_path / "hurt", on_epoch=lambda row: epochs.append(row["epoch"]), on_note=notes.append)
    assert epochs == [6.0]
    assert notes == [
        f"{tmp_path / 'hurt' / 'checkpoints'}: the weights of epoch 1, the best until then, are lost; the training "
        "goes on after epoch 4, the best is now epoch 3"
    ]
    assert again.best_epoch == 3
    third, last = (checkpoints.at(Folder.at(tmp_path / "hurt" / "checkpoints"), epoch) for epoch in (3, 6))
    undisturbed = checkpoints.at(Folder.at(tmp_path / "whole" / "checkpoints"), 6)
    assert third is not None
    assert last is not None
    assert undisturbed is not None
    kept = load_classifier(str(tmp_path / "hurt")).net.state_dict()
    for name, tensor in kept.items():
        assert torch.equal(tensor, third.model[name])
        assert torch.equal(last.model[name], undisturbed.model[name])
    assert _fit(spec, tmp_path / "hurt", on_note=notes.append) == again
    assert len(notes) == 1


def test_what_was_lost_reaches_the_one_who_follows_the_training(tmp_path: Path) -> None:
    """A worker's log is seen by nobody: its note lies in the folder until it is passed on, once."""
    spec, folder = _spec(epochs=3, lr=1e-12, schedule="constant"), Folder.at(tmp_path)
    rows, notes = list[dict[str, float]](), list[str]()
    follower = progress.Follower(folder, rows.append, notes.append)
    with pytest.raises(Killed):
        _fit(spec, tmp_path, on_epoch=_kill_after(2))
    follower.poll()
    assert (len(rows), notes) == (2, [])
    _damage(tmp_path, 1)
    _fit(spec, tmp_path, on_note=progress.note_for_driver(folder))
    follower.poll()
    follower.poll()
    assert len(rows) == 3
    (note,) = notes
    assert "the weights of epoch 1, the best until then, are lost" in note
    assert "note.txt" not in folder.names()


def test_a_better_epoch_after_the_best_was_lost_is_the_best(tmp_path: Path) -> None:
    """Accuracies 0.5, 0.9, 0.7, 0.6 with the second lost; then 0.8, and the file of that damaged, too."""
    _fit(_spec(epochs=1), tmp_path)
    folder = Folder.at(tmp_path / "checkpoints")
    first = checkpoints.at(folder, 1)
    assert first is not None
    history: list[dict[str, float]] = []

    def save(accuracy: float, mended: checkpoints.Mended | None) -> None:
        history.append({"epoch": len(history) + 1, "validation_accuracy": accuracy})
        best = checkpoints.best_kept(history, mended)
        checkpoints.save(
            folder, replace(first, epoch=len(history), history=list(history), best_epoch=best, mended=mended)
        )

    for accuracy in (0.5, 0.9, 0.7, 0.6):
        save(accuracy, None)
    _damage(tmp_path, 2)
    mended = checkpoints.latest(folder)
    assert mended is not None
    assert (mended.epoch, mended.best_epoch, mended.mended) == (4, 3, checkpoints.Mended(4, 3))
    save(0.65, mended.mended)
    save(0.8, mended.mended)
    better = checkpoints.latest(folder)
    assert better is not None
    assert (better.epoch, better.best_epoch) == (6, 6)
    _damage(tmp_path, 6)
    before = checkpoints.latest(folder)
    assert before is not None
    assert (before.epoch, before.best_epoch) == (5, 3)


def test_nothing_whole_is_said(tmp_path: Path) -> None:
    _fit(_spec(epochs=1), tmp_path)
    _damage(tmp_path, 1)
    notes: list[str] = []
    _fit(_spec(epochs=1), tmp_path, on_note=notes.append)
    assert len(notes) == 1
    assert "safetensors: not whole; nothing else is whole: the training begins anew" in notes[0]


def test_checkpoints_round_trip(tmp_path: Path) -> None:
    _fit(_spec(epochs=2), tmp_path)
    saved = checkpoints.latest(Folder.at(tmp_path / "checkpoints"))
    assert saved is not None
    checkpoints.save(Folder.at(tmp_path / "copy"), saved)
    again = checkpoints.at(Folder.at(tmp_path / "copy"), 2)
    assert again is not None
    assert again.history == saved.history
    assert again.optimizer["param_groups"] == saved.optimizer["param_groups"]
    for ours, theirs in ((again.model, saved.model), (again.optimizer["state"][0], saved.optimizer["state"][0])):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_divergence_names_the_step_and_keeps_the_last_good_epoch(tmp_path: Path) -> None:
    _fit(_spec(epochs=1), tmp_path)
    bad = _rows(101, 0)
    logits = bad.logits
    assert logits is not None
    logits[:] = np.nan
    with pytest.raises(RunError, match=r"not finite at step 8 \(epoch 2\); the checkpoint of epoch 1 is kept"):
        fit(_spec(epochs=2), bad, _rows(40, 1), Folder.at(tmp_path), Worker())
    saved = checkpoints.latest(Folder.at(tmp_path / "checkpoints"))
    assert saved is not None
    assert saved.epoch == 1


def test_bf16_is_close_to_fp32(tmp_path: Path) -> None:
    """By emulation where the processor has no bf16: right everywhere, fast where it is native."""
    exact = _fit(_spec(epochs=6), tmp_path / "fp32")
    spec = _spec(epochs=6)
    rounded = _fit(FitSpec(spec.model, spec.train, spec.loss, spec.seed, "bf16"), tmp_path / "bf16")
    assert rounded.weights_sha256 != exact.weights_sha256
    assert rounded.history[-1]["train_loss"] == pytest.approx(exact.history[-1]["train_loss"], rel=0.05)


def _data_parallel(rank: int, world: int, port: int, folder: str) -> None:
    method = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=world)
    try:
        spec = _spec(epochs=3, batch_size=20)
        training.fit(spec, _rows(101, 0), _rows(40, 1), Folder.at(folder), Worker(rank, world))
    finally:
        torch.distributed.destroy_process_group()


def test_one_worker_equals_three_also_where_two_have_no_rows(tmp_path: Path) -> None:
    """101 rows in batches of 20: the last batch has a single row for three workers."""
    alone = _fit(_spec(epochs=3, batch_size=20), tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "three"
    mp.spawn(_data_parallel, args=(3, port, str(folder)), nprocs=3, join=True)  # type: ignore[attr-defined, no-untyped-call]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for key in ("train_loss", "validation_accuracy", "validation_ce"):
        assert [line[key] for line in lines] == pytest.approx([row[key] for row in alone.history], rel=1e-4)


def _with_a_stale_view(rank: int, world: int, port: int, folder: str) -> None:
    """A training of two, cut in its fourth epoch; then rank 1, on another machine, does not see the newest files."""
    method = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=world)
    spec, worker, see = _spec(), Worker(rank, world), Folder.names

    def train(name: str, **more: Any) -> None:
        fit(spec, _rows(101, 0), _rows(40, 1), Folder.at(folder) / name, worker, **more)

    def stale(self: Folder) -> list[str]:
        return [name for name in see(self) if not name.startswith("epoch-00003-")]

    try:
        train("whole")
        with pytest.raises(Killed):
            train("cut", on_epoch=_kill_after(3))
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(Folder, "names", stale)
            train("cut")
    finally:
        torch.distributed.destroy_process_group()


def test_all_workers_continue_from_the_file_that_the_first_chose(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_with_a_stale_view, args=(2, port, str(tmp_path)), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    whole, cut = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_a_worker_that_cannot_read_the_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fit(_spec(epochs=1), tmp_path)
    folder = Folder.at(tmp_path / "checkpoints")
    (name,) = folder.names()
    read, tries = Folder.read_bytes, list[str]()

    def late(self: Folder, name: str) -> bytes:
        tries.append(name)
        if len(tries) < 3:
            raise FileNotFoundError(name)
        return read(self, name)

    monkeypatch.setattr(checkpoints, "_PAUSE_S", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read_bytes", late)
        assert checkpoints.named(folder, name).epoch == 1
    monkeypatch.setattr(checkpoints, "_PATIENCE_S", 0.05)
    _damage(tmp_path, 1)
    with pytest.raises(RunError, match=rf"checkpoints/{name}: worker 0 continues from it, another worker cannot read"):
        checkpoints.named(folder, name)


def test_cast_weights_give_the_logits_that_autocast_gives() -> None:
    spec = _spec().model
    torch.manual_seed(0)
    model = spec.build().eval()
    rows = torch.randint(0, 256, (32, 6), dtype=torch.uint8)
    with torch.inference_mode(), precision.autocast("bf16", torch.device("cpu")):
        before = model(rows)
        precision.cast_weights(model, "bf16")
        assert torch.equal(model(rows), before)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_fp32_weights_stay_as_they_are() -> None:
    model = _spec().model.build()
    precision.cast_weights(model, "fp32")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
