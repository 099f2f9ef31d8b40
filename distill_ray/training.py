"""The one training loop: teacher and students, one worker or many, with Ray or without.

``fit`` owns its checkpoints and continues from them. What it computes depends on the data, the config and the seed; on
CPU fp32 at a fixed worker and thread count a continued run ends bitwise where an uninterrupted one does, since order
and random state are functions of the seed and the position, not of what ran before.

Shapes: N rows, B rows of this worker's part of a global batch, C classes.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from distill_ray import checkpoints, losses, order, precision, profiling
from distill_ray.artifacts import METRICS_FILE, History, best_epoch, is_over
from distill_ray.checkpoints import Checkpoint, Unfinished
from distill_ray.config import CeLoss, KdLoss, TrainConfig
from distill_ray.errors import RunError, UserError
from distill_ray.losses import Share
from distill_ray.memory import keep_freed_memory
from distill_ray.metrics import ValidationMetrics
from distill_ray.models import Classifier, ModelSpec, finished_weights, save_model
from distill_ray.optimizing import apply_gradients, averaged, load_state, lr_factor, optimizer_of, set_lr
from distill_ray.rows import Batch, Rows
from distill_ray.storage import Folder
from distill_ray.store import SplitArrays, StoredSplit

CHECKPOINTS = "checkpoints"
_STEPS_BETWEEN_CLOCKS = 16  # workers agree this often on whether a checkpoint is due


@dataclass(frozen=True)
class Worker:
    """The place of this process among those that train one model together."""

    rank: int = 0
    world_size: int = 1
    threads: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class FitSpec:
    """What is trained: ``precision`` is already resolved, never ``auto``; ``class_weights`` are of the CE term."""

    model: ModelSpec
    train: TrainConfig
    loss: CeLoss | KdLoss
    seed: int
    precision: str
    class_weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class FitResult:
    """``weights_sha256`` of the model of ``best_epoch``, the best by ``artifacts.score``."""

    weights_sha256: str
    best_epoch: int
    history: History


def fit(
    spec: FitSpec,
    train: SplitArrays | StoredSplit,
    validation: SplitArrays | StoredSplit,
    folder: Folder,
    worker: Worker,
    on_epoch: Callable[[dict[str, float]], None] = lambda row: None,
    must_save: Callable[[], bool] = lambda: False,
) -> FitResult | None:
    """Train to the last epoch, continuing from the folder's newest whole checkpoint, and write the best model.

    Every worker calls it with the same arguments but ``worker``; under more than one, torch.distributed is initialised
    and the folder is one that all of them see. ``on_epoch`` is called by every worker after each epoch,
    whose checkpoint is being written then, by a thread; it is there when ``fit`` ends, in whatever way.
    ``must_save`` is asked every few steps, by every worker alike, and has to tell all of them the same: whether a
    checkpoint is wanted now, as when a node is about to go.

    Returns:
        What was written, on rank 0; None on the others.

    Raises:
        RunError: the loss is not finite (names epoch and step), or memory ran out (names the key to lower).
    """
    keep_freed_memory()
    precision.exact_fp32()
    torch.set_num_threads(worker.threads)
    with checkpoints.Writer() as writer:
        _train(_State.start(spec, folder, worker, must_save, writer), train, validation, on_epoch)
        with profiling.phase("checkpoints"):
            writer.wait()
            return export_best(spec.model, folder) if worker.rank == 0 else None


def _train(
    state: _State,
    train: SplitArrays | StoredSplit,
    validation: SplitArrays | StoredSplit,
    on_epoch: Callable[[dict[str, float]], None],
) -> None:
    spec, worker = state.spec, state.worker
    rows, held_out = Rows(train, worker.device), Rows(validation, worker.device)
    while not is_over(state.history, spec.train.epochs, spec.train.early_stop_epochs):
        epoch = len(state.history) + 1
        try:
            with profiling.phase("compute"):
                row = _train_epoch(state, rows, epoch)
            with profiling.phase("evaluation"):
                row |= _validate(state, held_out)
        except RuntimeError as error:
            raise _as_out_of_memory(error, spec.train) from None
        with profiling.phase("checkpoints"):
            state.finish_epoch(epoch, row)
        on_epoch(row)


def export_best(model: ModelSpec, folder: Folder) -> FitResult:
    """Write the model of the best epoch of the training in ``folder``, from its checkpoints.

    A folder that is finished and whole is left as it is: where there are no locks, another run may have been faster,
    and labels or students may have been made of its weights already.

    Raises:
        RunError: there is no whole checkpoint.
    """
    newest = checkpoints.latest(folder / CHECKPOINTS)
    best = checkpoints.at(folder / CHECKPOINTS, newest.best_epoch) if newest is not None else None
    if newest is None or best is None:
        raise RunError(f"{folder / CHECKPOINTS}: holds no whole checkpoint; run the command again")
    kept = best.average if best.average is not None else best.model
    weights = finished_weights(folder) or save_model(folder, model, kept)
    return FitResult(weights, newest.best_epoch, newest.history)


def _as_out_of_memory(error: RuntimeError, train: TrainConfig) -> RuntimeError | RunError:
    """The error itself, or what to lower where it says that memory ran out."""
    where = "GPU " if isinstance(error, torch.OutOfMemoryError) else ""
    if not where and "can't allocate memory" not in str(error):  # the words of torch's CPU allocator
        return error
    parts = train.batch_size if train.accumulate == 1 else f"{train.batch_size} in {train.accumulate} parts"
    return RunError(f"out of {where}memory with train.batch_size {parts}: lower it, or raise train.accumulate")


@dataclass
class _State:
    """Everything that changes while training."""

    spec: FitSpec
    worker: Worker
    folder: Folder
    writer: checkpoints.Writer
    classifier: Classifier
    model: nn.Module  # the classifier, wrapped for data parallelism where there is more than one worker
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    history: History
    best_epoch: int
    unfinished: Unfinished | None  # where within its epoch the training continues
    saved_at: float
    must_save: Callable[[], bool]
    class_weights: Tensor | None

    @classmethod
    def start(
        cls, spec: FitSpec, folder: Folder, worker: Worker, must_save: Callable[[], bool], writer: checkpoints.Writer
    ) -> _State:
        if worker.rank == 0:
            (folder / CHECKPOINTS).sweep_temporaries()
        torch.manual_seed(spec.seed)
        saved = checkpoints.latest(folder / CHECKPOINTS)
        start = spec.model if saved is None else spec.model.bare()  # its own weights follow
        classifier = start.build().to(worker.device)
        if saved is not None:
            classifier.net.load_state_dict(saved.model)
        average = averaged(classifier.net, spec.train.ema_decay)
        if saved is not None and saved.average is not None and average is not None:
            average.module.load_state_dict(saved.average)
            average.n_averaged.fill_(1)  # it follows from here; at 0 it would start as a copy
        optimizer = optimizer_of(classifier, spec.train)
        scaler = torch.amp.GradScaler(worker.device.type, enabled=spec.precision == "fp16")
        if saved is not None:
            load_state(optimizer, saved.optimizer)
            scaler.load_state_dict(saved.scaler)
        return cls(
            spec, worker, folder, writer, classifier, _wrapped(classifier, spec.train, worker), average, optimizer,
            scaler,
            saved.history if saved is not None else [], saved.best_epoch if saved is not None else 0,
            saved.unfinished if saved is not None else None, time.monotonic(), must_save,
            None if spec.class_weights is None else torch.tensor(spec.class_weights, device=worker.device),
        )  # fmt: skip

    def finish_epoch(self, epoch: int, row: dict[str, float]) -> None:
        """Checkpoint, then the epoch's line: what stands in metrics.jsonl has its checkpoint."""
        self.history = [*self.history, row]
        self.best_epoch = best_epoch(self.history)
        self.unfinished = None
        self.save(epoch)

    def save(self, epoch: int, unfinished: Unfinished | None = None) -> None:
        """The state after ``epoch`` whole epochs, and after ``unfinished`` of the next; a thread writes it."""
        self.saved_at = time.monotonic()
        if self.worker.rank != 0:
            return
        average = None if self.average is None else self.average.module.state_dict()
        taken = checkpoints.snapshot(Checkpoint(
            epoch, self.classifier.net.state_dict(), average, self.optimizer.state_dict(),
            self.scaler.state_dict(), self.history, self.best_epoch, unfinished,
        ))  # fmt: skip
        self.writer.submit(partial(_write, self.folder, taken))


def _write(folder: Folder, taken: checkpoints.Snapshot) -> None:
    checkpoints.write(folder / CHECKPOINTS, taken)
    if taken.checkpoint.unfinished is None:
        lines = "".join(json.dumps(line) + "\n" for line in taken.checkpoint.history)
        folder.write_text(METRICS_FILE, lines)


def _wrapped(classifier: Classifier, train: TrainConfig, worker: Worker) -> nn.Module:
    """Compiled where asked for, and wrapped for data parallelism: calling what is inside would not exchange gradients.

    Batch norm sees the whole global batch on GPUs (SyncBatchNorm, NCCL alone has it). On CPUs each worker normalises
    with its own rows, and the statistics that are kept are those of rank 0.
    """
    if worker.world_size > 1 and worker.device.type == "cuda":
        classifier.net = nn.SyncBatchNorm.convert_sync_batchnorm(classifier.net)  # type: ignore[no-untyped-call]
    if train.compile != "none":
        if worker.device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise UserError("train.compile: needs a C++ compiler (g++), and there is none here: set it to none")
        classifier.net.compile(mode=None if train.compile == "default" else train.compile)
    return DistributedDataParallel(classifier) if worker.world_size > 1 else classifier


@dataclass
class _Sums:
    """Sums over an epoch's rows, on the device: no wait per step. ``values``: total, ce, kd, each times its rows."""

    values: Tensor
    labelled: int
    first_bad: Tensor  # the first step whose loss is not finite

    @classmethod
    def start(cls, device: torch.device, before: Unfinished | None, rank: int) -> _Sums:
        values = torch.zeros(3, dtype=torch.float64, device=device)
        if before is not None and rank == 0:  # what is saved is the sum over the workers: one of them carries it on
            values += torch.tensor(before.sums, dtype=torch.float64, device=device)
        return cls(values, before.labelled if before is not None else 0, torch.full((), math.inf, device=device))

    def add(self, terms: losses.LossTerms, share: Share, step: int) -> None:
        """A step's terms: this worker's contributions to the means over the global batch."""
        weights = torch.tensor([share.rows, share.labelled, share.rows], dtype=torch.float64)
        self.values += torch.stack([terms.total, terms.ce, terms.kd]).detach().double() * weights.to(self.values.device)
        self.labelled += share.labelled
        self.first_bad = torch.where(
            torch.isfinite(terms.total.detach()), self.first_bad, self.first_bad.clamp(max=step + 1)
        )

    def over_all_workers(self, worker: Worker) -> list[float]:
        values = self.values.clone()
        if worker.world_size > 1:
            dist.all_reduce(values)
        summed: list[float] = values.tolist()
        return summed


def _train_epoch(state: _State, rows: Rows, epoch: int) -> dict[str, float]:
    spec, worker = state.spec, state.worker
    started = time.perf_counter()
    state.model.train()
    steps_per_epoch = math.ceil(rows.count / spec.train.batch_size)
    before = state.unfinished
    sums = _Sums.start(worker.device, before, worker.rank)
    done = before.steps if before is not None else 0
    lr = 0.0
    batches = rows.shuffled(spec.train.batch_size, spec.seed, epoch, worker.rank, worker.world_size, skip=done)
    for index, batch in enumerate(batches, start=done):
        step = (epoch - 1) * steps_per_epoch + index
        lr = spec.train.lr * lr_factor(step, steps_per_epoch, spec.train)
        set_lr(state.optimizer, lr)
        torch.manual_seed(order.mix(spec.seed, step) + worker.rank)  # dropout: a function of (seed, step, rank)
        sums.add(_step(state, batch), batch.share, step)
        within = index + 1 < steps_per_epoch
        noticed = within and (index + 1) % _STEPS_BETWEEN_CLOCKS == 0 and state.must_save()
        if noticed or (within and _is_due(state, index + 1)):
            _refuse_divergence(state, epoch, sums.first_bad)
            spent = time.perf_counter() - started + (before.seconds if before is not None else 0.0)
            unfinished = Unfinished(index + 1, sums.over_all_workers(worker), sums.labelled, spent)
            with profiling.phase("checkpoints"):
                state.save(epoch - 1, unfinished)
                if noticed:
                    state.writer.wait()
    _refuse_divergence(state, epoch, sums.first_bad)
    total, ce, kd = sums.over_all_workers(worker)
    seconds = time.perf_counter() - started + (before.seconds if before is not None else 0.0)
    return {
        "epoch": epoch, "step": epoch * steps_per_epoch, "lr": lr, "train_loss": total / rows.count,
        "train_ce": ce / max(1, sums.labelled), "train_kd": kd / rows.count, "train_seconds": seconds,
        "rows_per_s": rows.count / seconds,
    }  # fmt: skip


def _is_due(state: _State, steps: int) -> bool:
    """Whether a checkpoint within the epoch is due; all workers agree, by rank 0's clock."""
    every_s, worker = state.spec.train.checkpoint_every_s, state.worker
    if every_s is None or (worker.world_size > 1 and steps % _STEPS_BETWEEN_CLOCKS):
        return False
    due = torch.tensor(float(time.monotonic() - state.saved_at >= every_s), device=worker.device)
    if worker.world_size > 1:
        dist.broadcast(due, src=0)
    return bool(due)


def _step(state: _State, batch: Batch) -> losses.LossTerms:
    """One optimizer step on the mean loss over the global batch, whatever each worker's and each part's share of it."""
    spec, worker = state.spec, state.worker
    state.optimizer.zero_grad(set_to_none=True)
    terms: losses.LossTerms | None = None
    parts = _parts(batch, spec.train.accumulate)
    for number, (inputs, labels_B, logits_BC) in enumerate(parts):
        last = number == len(parts) - 1
        exchange = nullcontext() if last or worker.world_size == 1 else state.model.no_sync()  # type: ignore[operator]
        with exchange:
            with precision.autocast(spec.precision, worker.device):
                student_BC = state.model(inputs)
            part = losses.compute(spec.loss, student_BC, labels_B, logits_BC, batch.share, state.class_weights)
            if batch.empty:  # it still takes part in the exchange of gradients, with a row that does not count
                part = losses.LossTerms(part.total * 0, part.ce * 0, part.kd * 0)
            # The contributions of the workers add up; DistributedDataParallel takes their mean.
            state.scaler.scale(part.total * worker.world_size).backward()  # type: ignore[no-untyped-call]
        terms = part if terms is None else terms.plus(part)
    apply_gradients(state.model, state.optimizer, state.scaler, spec.train.clip_norm)
    if state.average is not None:
        state.average.update_parameters(state.classifier.net)
    assert terms is not None
    return terms


def _parts(batch: Batch, accumulate: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """The rows in at most ``accumulate`` parts; workers may differ in their number: only after the last they meet."""
    if accumulate == 1:
        return [(batch.inputs, batch.labels, batch.logits)]
    inputs, labels = batch.inputs.chunk(accumulate), batch.labels.chunk(accumulate)
    logits = [None] * len(inputs) if batch.logits is None else batch.logits.chunk(accumulate)
    return list(zip(inputs, labels, logits, strict=True))


@torch.no_grad()
def _validate(state: _State, rows: Rows) -> dict[str, float]:
    spec, worker = state.spec, state.worker
    started = time.perf_counter()
    state.classifier.eval()
    weights, state.classifier.net = state.classifier.net, _validated(state)
    measured = ValidationMetrics(spec.model.classes, worker.device, worker.world_size)
    try:
        for batch in rows.in_order(spec.train.batch_size, worker.rank, worker.world_size):
            if not batch.empty:
                with precision.autocast(spec.precision, worker.device):
                    logits_BC = state.classifier(batch.inputs)
                measured.update(logits_BC.float(), batch.labels, batch.logits)
    finally:
        state.classifier.net = weights
    return measured.compute() | {"validation_seconds": time.perf_counter() - started}


def _validated(state: _State) -> nn.Module:
    """What is validated is what is kept: the average of the weights where there is one."""
    if state.average is None:
        return state.classifier.net
    net: nn.Module = state.average.module
    return net.eval()


def _refuse_divergence(state: _State, epoch: int, first_bad: Tensor) -> None:
    first_bad = first_bad.clone()
    if state.worker.world_size > 1:
        dist.all_reduce(first_bad, op=dist.ReduceOp.MIN)
    if math.isfinite(step := float(first_bad)):
        kept = f"the checkpoint of epoch {epoch - 1} is kept" if epoch > 1 else "no epoch was finished"
        raise RunError(f"the loss is not finite at step {int(step)} (epoch {epoch}); {kept}: lower train.lr")
