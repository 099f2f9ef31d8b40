"""The one training loop: teacher and students, one worker or many, with Ray or without.

``fit`` owns its checkpoints and continues from them. What it computes depends on the data, the config and the seed; on
CPU fp32 at a fixed worker and thread count a continued run ends bitwise where an uninterrupted one does, since order
and random state are functions of the seed and the position, not of what ran before.

Shapes: N rows, B rows of this worker's part of a global batch, C classes.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
import warnings
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
from distill_ray.artifacts import METRICS_FILE, History, is_over
from distill_ray.checkpoints import Checkpoint, Mended, Unfinished
from distill_ray.config import CeLoss, KdLoss, TrainConfig
from distill_ray.errors import RunError, UserError
from distill_ray.losses import Share
from distill_ray.memory import keep_freed_memory
from distill_ray.models import Classifier, ModelSpec, finished_weights, save_model
from distill_ray.optimizing import apply_gradients, averaged, load_state, lr_factor, optimizer_of, set_lr
from distill_ray.rows import Batch, Rows
from distill_ray.storage import Folder
from distill_ray.store import SplitArrays, StoredSplit
from distill_ray.validation import ValidationMetrics

CHECKPOINTS = "checkpoints"
_CLOCK_S, _MOST_STEPS_BETWEEN_CLOCKS = 2.0, 64  # workers agree this often on whether a checkpoint is wanted
# In the errors of torch's allocators, and of CUDA's libraries where they allocate themselves.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
_OF_GPUS = ("CUDA", "CUBLAS", "CUDNN", "NCCL")
_log = logging.getLogger(__name__)


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
    on_note: Callable[[str], None] = _log.warning,
) -> FitResult | None:
    """Train to the last epoch, continuing from the folder's newest whole checkpoint, and write the best model.

    Every worker calls it with the same arguments but ``worker``; under more than one, torch.distributed is initialised
    and the folder is one that all of them see. ``on_epoch`` is called by every worker after each epoch,
    whose checkpoint is being written then, by a thread; it is there when ``fit`` ends, in whatever way.
    ``must_save`` is asked every few steps, every two seconds at least or after a step that takes longer, by every
    worker alike, and has to tell all of them the same: whether a checkpoint is wanted now, as when a node is about to
    go. ``on_note`` gets a line, on rank 0, where checkpoints are damaged and what was trained is lost.

    Returns:
        What was written, on rank 0; None on the others.

    Raises:
        RunError: the loss is not finite (names epoch and step), memory ran out (names the key to lower), or a worker
            cannot read the checkpoint that the others continue from.
    """
    keep_freed_memory()
    precision.exact_fp32()
    torch.set_num_threads(worker.threads)
    with checkpoints.Writer() as writer:
        try:
            state = _State.start(spec, folder, worker, must_save, writer, on_note)
            _train(state, train, validation, on_epoch)
        except RuntimeError as error:
            raise _as_out_of_memory(error, spec.train) from None
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
        with profiling.phase("compute"):
            row = _train_epoch(state, rows, epoch)
        with profiling.phase("evaluation"):
            row |= _validate(state, held_out)
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
    text, of_gpu = str(error), isinstance(error, torch.OutOfMemoryError)
    if not of_gpu and not any(words in text for words in _OUT_OF_MEMORY):
        return error
    where = "GPU " if of_gpu or any(name in text for name in _OF_GPUS) else ""
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
    mended: Mended | None
    saved_at: float
    must_save: Callable[[], bool]
    class_weights: Tensor | None
    clock: _Clock

    @classmethod
    def start(
        cls, spec: FitSpec, folder: Folder, worker: Worker, must_save: Callable[[], bool], writer: checkpoints.Writer,
        on_note: Callable[[str], None],
    ) -> _State:  # fmt: skip
        if worker.rank == 0:
            (folder / CHECKPOINTS).sweep_temporaries()
        torch.manual_seed(spec.seed)
        saved = _saved(folder / CHECKPOINTS, worker, on_note)
        start = spec.model if saved is None else spec.model.bare()  # its own weights follow
        classifier = start.build().to(worker.device)
        if saved is not None:
            classifier.net.load_state_dict(saved.model)
        average = averaged(classifier.net, spec.train.ema_decay)
        if saved is not None and saved.average is not None and average is not None:
            average.module.load_state_dict(saved.average)
            average.n_averaged.fill_(1)  # it follows from here; at 0 it would start as a copy
        scaler = torch.amp.GradScaler(worker.device.type, enabled=spec.precision == "fp16")
        optimizer = optimizer_of(classifier, spec.train, scaled=scaler.is_enabled())
        if saved is not None:
            load_state(optimizer, saved.optimizer)
            scaler.load_state_dict(saved.scaler)
        return cls(
            spec, worker, folder, writer, classifier, _wrapped(classifier, spec.train, worker), average, optimizer,
            scaler,
            saved.history if saved is not None else [], saved.best_epoch if saved is not None else 0,
            saved.unfinished if saved is not None else None, saved.mended if saved is not None else None,
            time.monotonic(), must_save,
            None if spec.class_weights is None else torch.tensor(spec.class_weights, device=worker.device), _Clock(),
        )  # fmt: skip

    def finish_epoch(self, epoch: int, row: dict[str, float]) -> None:
        """Checkpoint, then the epoch's line: what stands in metrics.jsonl has its checkpoint."""
        self.history = [*self.history, row]
        self.best_epoch = checkpoints.best_kept(self.history, self.mended)
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
            self.scaler.state_dict(), self.history, self.best_epoch, unfinished, self.mended,
        ))  # fmt: skip
        self.writer.submit(partial(_write, self.folder, taken))


def _saved(folder: Folder, worker: Worker, on_note: Callable[[str], None]) -> Checkpoint | None:
    """What all workers continue from: rank 0 chooses it, since on shared storage not all may see the same files."""
    choice = checkpoints.choose(folder) if worker.rank == 0 else None
    if choice is not None and choice.lost is not None:
        on_note(f"{folder}: {choice.lost}")
    name = [choice.name if choice is not None else None]
    if worker.world_size > 1:
        dist.broadcast_object_list(name, src=0, device=worker.device)
    if choice is not None:
        return choice.checkpoint
    return None if name[0] is None else checkpoints.named(folder, name[0])


def _write(folder: Folder, taken: checkpoints.Snapshot) -> None:
    checkpoints.write(folder / CHECKPOINTS, taken)
    if taken.checkpoint.unfinished is None:
        lines = "".join(json.dumps(line) + "\n" for line in taken.checkpoint.history)
        folder.write_text(METRICS_FILE, lines)


def _wrapped(classifier: Classifier, train: TrainConfig, worker: Worker) -> nn.Module:
    """Compiled where asked for, and wrapped for data parallelism: calling what is inside would not exchange gradients.

    Batch norm sees the whole global batch on GPUs (SyncBatchNorm, NCCL alone has it). On CPUs each worker normalises
    with its own rows, and the statistics that are kept are those of rank 0. A network that is not ours may have weights
    that a step, or every step, does without.
    """
    if worker.world_size > 1 and worker.device.type == "cuda":
        classifier.net = nn.SyncBatchNorm.convert_sync_batchnorm(classifier.net)  # type: ignore[no-untyped-call]
    if train.compile != "none":
        if worker.device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise UserError("train.compile: needs a C++ compiler (g++), and there is none here: set it to none")
        classifier.net.compile(mode=None if train.compile == "default" else train.compile)
    if worker.world_size == 1:
        return classifier
    if classifier.ours:
        return DistributedDataParallel(classifier)
    warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")  # said where a step uses them all
    return DistributedDataParallel(classifier, find_unused_parameters=True)


@dataclass
class _Clock:
    """After how many steps the workers look at the time together: about every ``_CLOCK_S``, by what steps have taken,
    and after each where one takes longer."""

    gap: int = 1
    steps: int = 0
    since: float = field(default_factory=time.monotonic)

    def next_gap(self) -> int:
        """By this worker's clock; at most four times the last, since the first steps may be quick by chance."""
        per_step_s = max(1e-9, time.monotonic() - self.since) / self.steps
        return max(1, min(int(_CLOCK_S / per_step_s), 4 * self.gap, _MOST_STEPS_BETWEEN_CLOCKS))

    def restart(self, gap: int) -> None:
        """The next look is after ``gap`` more steps."""
        self.gap, self.steps, self.since = gap, 0, time.monotonic()


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
        state.clock.steps += 1
        due, noticed = _wanted(state) if index + 1 < steps_per_epoch else (False, False)  # its end has one in any case
        if due or noticed:
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


def _wanted(state: _State) -> tuple[bool, bool]:
    """Whether a checkpoint within the epoch is due, and whether it is asked for; all agree, by rank 0's clock."""
    every_s, worker, clock = state.spec.train.checkpoint_every_s, state.worker, state.clock
    strikes = clock.steps >= clock.gap
    due = every_s is not None and time.monotonic() - state.saved_at >= every_s
    if not strikes:
        return due and worker.world_size == 1, False
    noticed = state.must_save()
    agreed = [int(due), clock.next_gap()]
    if worker.world_size > 1:
        told = torch.tensor(agreed, device=worker.device)
        dist.broadcast(told, src=0)
        agreed = told.tolist()
    clock.restart(agreed[1])
    return bool(agreed[0]), noticed


def _step(state: _State, batch: Batch) -> losses.LossTerms:
    """One optimizer step on the mean loss over the global batch, whatever each worker's and each part's share of it."""
    spec, worker = state.spec, state.worker
    state.optimizer.zero_grad(set_to_none=True)
    terms: losses.LossTerms | None = None
    parts = _parts(batch, spec.train.accumulate, worker.world_size)
    for number, (inputs, labels_B, logits_BC, counts) in enumerate(parts):
        last = number == len(parts) - 1
        exchange = nullcontext() if last or worker.world_size == 1 else state.model.no_sync()  # type: ignore[operator]
        with exchange:
            with precision.autocast(spec.precision, worker.device):
                student_BC = state.model(inputs)
            part = losses.compute(spec.loss, student_BC, labels_B, logits_BC, batch.share, state.class_weights)
            if not counts:  # the worker still takes part in what the others exchange
                part = losses.LossTerms(part.total * 0, part.ce * 0, part.kd * 0)
            # The contributions of the workers add up; DistributedDataParallel takes their mean.
            state.scaler.scale(part.total * worker.world_size).backward()  # type: ignore[no-untyped-call]
        terms = part if terms is None else terms.plus(part)
    apply_gradients(state.model, state.optimizer, state.scaler, spec.train.clip_norm)
    if state.average is not None:
        state.average.update_parameters(state.classifier.net)
    assert terms is not None
    return terms


def _parts(batch: Batch, accumulate: int, world_size: int) -> list[tuple[Tensor, Tensor, Tensor | None, bool]]:
    """The rows in at most ``accumulate`` parts, on every worker in as many, and whether each counts."""
    size, number = order.parts(batch.share.rows, world_size, accumulate)
    inputs, labels = torch.split(batch.inputs, size), torch.split(batch.labels, size)
    logits = [None] * len(inputs) if batch.logits is None else torch.split(batch.logits, size)
    mine = [(*part, not batch.empty) for part in zip(inputs, labels, logits, strict=True)]
    filler = (inputs[0][:1], labels[0][:1], None if logits[0] is None else logits[0][:1], False)
    return mine + [filler] * (number - len(mine))


@torch.no_grad()
def _validate(state: _State, rows: Rows) -> dict[str, float]:
    spec, worker = state.spec, state.worker
    started = time.perf_counter()
    state.classifier.eval()
    weights, state.classifier.net = state.classifier.net, _validated(state)
    _share_buffers(state.classifier.net, worker)
    measured = ValidationMetrics(worker.device, worker.world_size)
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


def _share_buffers(net: nn.Module, worker: Worker) -> None:
    """Rank 0's on every worker: its batch statistics are those that are kept, so they are what is validated."""
    for buffer in net.buffers() if worker.world_size > 1 else ():
        held = buffer.contiguous()
        dist.broadcast(held, src=0)
        buffer.copy_(held)


def _refuse_divergence(state: _State, epoch: int, first_bad: Tensor) -> None:
    first_bad = first_bad.clone()
    if state.worker.world_size > 1:
        dist.all_reduce(first_bad, op=dist.ReduceOp.MIN)
    if math.isfinite(step := float(first_bad)):
        kept = f"the checkpoint of epoch {epoch - 1} is kept" if epoch > 1 else "no epoch was finished"
        raise RunError(f"the loss is not finite at step {int(step)} (epoch {epoch}); {kept}: lower train.lr")
