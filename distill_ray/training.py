"""The one training loop: teacher and students, one worker or many, with Ray or without.

``fit`` owns its checkpoints and continues from them. What it computes depends on the data, the config and the seed; on
CPU fp32 at a fixed worker and thread count a continued run ends bitwise where an uninterrupted one does, since order
and random state are functions of (seed, epoch) and not of what ran before.

Shapes: N rows, B rows of this worker's part of a global batch, C classes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill_ray import checkpoints, losses, precision
from distill_ray.artifacts import METRICS_FILE, History
from distill_ray.checkpoints import Checkpoint
from distill_ray.config import CeLoss, KdLoss, TrainConfig
from distill_ray.errors import RunError
from distill_ray.memory import keep_freed_memory
from distill_ray.metrics import ValidationMetrics
from distill_ray.models import Classifier, ModelSpec, finished_weights, save_model
from distill_ray.storage import Folder
from distill_ray.store.reader import SplitArrays

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Worker:
    """The place of this process among those that train one model together."""

    rank: int = 0
    world_size: int = 1
    threads: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class FitSpec:
    """What is trained: ``precision`` is already resolved, never ``auto``."""

    model: ModelSpec
    train: TrainConfig
    loss: CeLoss | KdLoss
    seed: int
    precision: str


@dataclass(frozen=True)
class FitResult:
    """``weights_sha256`` of the model of ``best_epoch``, the epoch of the best validation accuracy."""

    weights_sha256: str
    best_epoch: int
    history: History


def fit(
    spec: FitSpec,
    train: SplitArrays,
    validation: SplitArrays,
    folder: Folder,
    worker: Worker,
    on_epoch: Callable[[dict[str, float]], None] = lambda row: None,
) -> FitResult | None:
    """Train to the last epoch, continuing from the folder's newest whole checkpoint, and write the best model.

    Every worker calls it with the same arguments but ``worker``; under more than one, torch.distributed is initialised
    and the folder is one that all of them see. ``on_epoch`` is called by every worker after each epoch's checkpoint.

    Returns:
        What was written, on rank 0; None on the others.

    Raises:
        RunError: the loss is not finite (names epoch and step), or memory ran out (names the key to lower).
    """
    keep_freed_memory()
    precision.exact_fp32()
    torch.set_num_threads(worker.threads)
    state = _State.start(spec, folder / CHECKPOINTS, worker)
    rows = _Rows(train, worker.device)
    held_out = _Rows(validation, worker.device)
    for epoch in range(len(state.history) + 1, spec.train.epochs + 1):
        try:
            row = _train_epoch(state, rows, epoch) | _validate(state, held_out)
        except torch.OutOfMemoryError:
            raise RunError(f"out of GPU memory with train.batch_size {spec.train.batch_size}: lower it") from None
        state.finish_epoch(epoch, row, folder)
        on_epoch(row)
    return export_best(spec.model, folder) if worker.rank == 0 else None


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
    weights = finished_weights(folder) or save_model(folder, model, best.model)
    return FitResult(weights, newest.best_epoch, newest.history)


class _Rows:
    """A split as tensors, batches by index."""

    def __init__(self, arrays: SplitArrays, device: torch.device) -> None:
        self._device = device
        self._tensors = [torch.from_numpy(arrays.inputs), torch.from_numpy(arrays.labels)]
        if arrays.logits is not None:
            self._tensors.append(torch.from_numpy(arrays.logits))
        self.count = len(arrays)

    def batch(self, index_B: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        picked = [tensor[index_B] for tensor in self._tensors]
        if self._device.type == "cuda":
            picked = [tensor.pin_memory().to(self._device, non_blocking=True) for tensor in picked]
        return picked[0], picked[1], picked[2] if len(picked) == 3 else None


def batches_of_worker(count: int, batch_size: int, worker: Worker, order_N: Tensor) -> Iterator[tuple[Tensor, int]]:
    """This worker's part of each global batch, and the global batch's row count.

    The global batches do not depend on the number of workers, and every row is in exactly one of them.
    """
    for start in range(0, count, batch_size):
        whole = order_N[start : start + batch_size]
        yield whole[worker.rank :: worker.world_size], len(whole)


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of the rows, a function of (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(_mix(seed, epoch))
    return torch.randperm(count, generator=generator)


def lr_factor(step: int, steps: int, warmup_steps: int, schedule: str) -> float:
    """The learning rate's factor at ``step`` of ``steps``: linear warmup, then constant or a half cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class _State:
    """Everything that changes while training."""

    spec: FitSpec
    worker: Worker
    checkpoints: Folder
    classifier: Classifier
    model: nn.Module  # the classifier, wrapped for data parallelism where there is more than one worker
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    history: History
    best_epoch: int

    @classmethod
    def start(cls, spec: FitSpec, folder: Folder, worker: Worker) -> _State:
        if worker.rank == 0:
            folder.sweep_temporaries()
        torch.manual_seed(spec.seed)
        classifier = spec.model.build().to(worker.device)
        saved = checkpoints.latest(folder)
        if saved is not None:
            classifier.net.load_state_dict(saved.model)
        optimizer = _optimizer(classifier, spec.train)
        scaler = torch.amp.GradScaler(worker.device.type, enabled=spec.precision == "fp16")
        if saved is not None:
            optimizer.load_state_dict(saved.optimizer)
            scaler.load_state_dict(saved.scaler)
        model: nn.Module = classifier
        if worker.world_size > 1:
            # Always through the wrapper: calling the inner module would skip the gradients' exchange.
            model = DistributedDataParallel(classifier)
        history = saved.history if saved is not None else []
        best_epoch = saved.best_epoch if saved is not None else 0
        return cls(spec, worker, folder, classifier, model, optimizer, scaler, history, best_epoch)

    def finish_epoch(self, epoch: int, row: dict[str, float], folder: Folder) -> None:
        """Checkpoint, then the epoch's line: what stands in metrics.jsonl has its checkpoint."""
        self.history = [*self.history, row]
        self.best_epoch = checkpoints.best_epoch(self.history)
        if self.worker.rank == 0:
            net, optimizer, scaler = (
                self.classifier.net.state_dict(),
                self.optimizer.state_dict(),
                self.scaler.state_dict(),
            )
            checkpoints.save(self.checkpoints, Checkpoint(epoch, net, optimizer, scaler, self.history, self.best_epoch))
            folder.write_text(METRICS_FILE, "".join(json.dumps(line) + "\n" for line in self.history))


def _train_epoch(state: _State, rows: _Rows, epoch: int) -> dict[str, float]:
    spec, worker = state.spec, state.worker
    started = time.perf_counter()
    torch.manual_seed(_mix(spec.seed, epoch) + worker.rank)  # dropout and the like: a function of (seed, epoch, rank)
    state.model.train()
    steps_per_epoch = math.ceil(rows.count / spec.train.batch_size)
    # Row-weighted sums of total, ce, kd; the first step whose loss is not finite. Kept on the device: no wait per step.
    sums = torch.zeros(3, dtype=torch.float64, device=worker.device)
    first_bad = torch.full((), math.inf, device=worker.device)
    lr = 0.0
    order_N = epoch_order(rows.count, spec.seed, epoch)
    for index, (index_B, global_rows) in enumerate(
        batches_of_worker(rows.count, spec.train.batch_size, worker, order_N)
    ):
        step = (epoch - 1) * steps_per_epoch + index
        lr = _set_lr(state, step, steps_per_epoch)
        terms = _step(state, rows, index_B, global_rows)
        sums += torch.stack([terms.total, terms.ce, terms.kd]).detach().double() * len(index_B)
        first_bad = torch.where(torch.isfinite(terms.total.detach()), first_bad, first_bad.clamp(max=step + 1))
    _refuse_divergence(state, epoch, first_bad)
    if worker.world_size > 1:
        dist.all_reduce(sums)
    total, ce, kd = (sums / rows.count).tolist()
    seconds = time.perf_counter() - started
    return {
        "epoch": epoch, "step": epoch * steps_per_epoch, "lr": lr, "train_loss": total, "train_ce": ce, "train_kd": kd,
        "train_seconds": seconds, "rows_per_s": rows.count / seconds,
    }  # fmt: skip


def _step(state: _State, rows: _Rows, index_B: Tensor, global_rows: int) -> losses.LossTerms:
    """One optimizer step. Its gradient is that of the mean over the global batch, whatever each worker's share."""
    spec, worker = state.spec, state.worker
    # DDP averages over the workers; a worker without rows in the last batch still takes part, with weight 0.
    weight = len(index_B) * worker.world_size / global_rows
    inputs, labels_B, teacher_BC = rows.batch(index_B if len(index_B) else torch.zeros(1, dtype=torch.int64))
    with precision.autocast(spec.precision, worker.device):
        student_BC = state.model(inputs)
    terms = losses.compute(spec.loss, student_BC, labels_B, teacher_BC)
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(terms.total * weight).backward()  # type: ignore[no-untyped-call]
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return terms


@torch.no_grad()
def _validate(state: _State, rows: _Rows) -> dict[str, float]:
    spec, worker = state.spec, state.worker
    started = time.perf_counter()
    state.classifier.eval()
    measured = ValidationMetrics(spec.model.classes, worker.device, worker.world_size)
    in_order = torch.arange(rows.count)
    for index_B, _ in batches_of_worker(rows.count, spec.train.batch_size, worker, in_order):
        if len(index_B):
            inputs, labels_B, _ = rows.batch(index_B)
            with precision.autocast(spec.precision, worker.device):
                logits_BC = state.classifier(inputs)
            measured.update(logits_BC.float(), labels_B)
    return measured.compute() | {"validation_seconds": time.perf_counter() - started}


def _refuse_divergence(state: _State, epoch: int, first_bad: Tensor) -> None:
    if state.worker.world_size > 1:
        dist.all_reduce(first_bad, op=dist.ReduceOp.MIN)
    if math.isfinite(step := float(first_bad)):
        kept = f"the checkpoint of epoch {epoch - 1} is kept" if epoch > 1 else "no epoch was finished"
        raise RunError(f"the loss is not finite at step {int(step)} (epoch {epoch}); {kept}: lower train.lr")


def _set_lr(state: _State, step: int, steps_per_epoch: int) -> float:
    train = state.spec.train
    warmup_steps = round(train.warmup_epochs * steps_per_epoch)
    lr = train.lr * lr_factor(step, train.epochs * steps_per_epoch, warmup_steps, train.schedule)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    return lr


def _optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    if train.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=train.lr, weight_decay=train.weight_decay)


def _mix(seed: int, epoch: int) -> int:
    """One 63-bit seed from two numbers, so that seed 0 epoch 1 and seed 1 epoch 0 differ."""
    return (seed * 1_000_003 + epoch * 7_919 + 12_345) % (2**63)
