"""From gradients to weights: the optimizers, the learning rate's course, clipping, and the average of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distill_ray.config import TrainConfig


def optimizer_of(model: nn.Module, train: TrainConfig, *, scaled: bool = False) -> torch.optim.Optimizer:
    """The optimizer that the config names, over all parameters; ``scaled``: a GradScaler may leave out steps of it.

    Fused: one pass over the weights instead of ten, which for the article's teacher was a third of a step on CPUs. Not
    SGD that is scaled: where its first step is left out, the fused one keeps memory that nobody has written as momentum
    (torch 2.13).
    """
    parameters = list(model.parameters())
    if train.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay, fused=not scaled
        )
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=train.lr, weight_decay=train.weight_decay, fused=True)


def load_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """``optimizer.load_state_dict``, each moment in its weight's own memory order.

    Checkpoints hold plain order; the fused kernels go through memory and would pair the elements of a channels_last
    weight with the moments of others.
    """
    optimizer.load_state_dict(saved)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def lr_factor(step: int, steps_per_epoch: int, train: TrainConfig) -> float:
    """The learning rate's factor at ``step``, counted from 0 over all epochs: linear warmup, then the schedule.

    ``cosine`` is half a cosine from 1 to 0 (Loshchilov, Hutter 2017, arXiv 1608.03983, without restarts); ``step``
    multiplies by ``step_factor`` after each of ``step_epochs``.
    """
    steps, warmup_steps = train.epochs * steps_per_epoch, round(train.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if train.schedule == "constant":
        return 1.0
    if train.schedule == "step":
        return train.step_factor ** sum(step >= epoch * steps_per_epoch for epoch in train.step_epochs)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def apply_gradients(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_norm: float | None
) -> None:
    """One step of the optimizer; ``clip_norm`` bounds the 2-norm of all gradients together, unscaled."""
    if clip_norm is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    scaler.step(optimizer)
    scaler.update()


def averaged(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """A copy of the model whose weights follow as an exponential moving average; None without a decay.

    ``average = decay * average + (1 - decay) * weights`` after every step (Polyak, Juditsky 1992, in the exponential
    form of Tarvainen, Valpola 2017, arXiv 1703.01780, section 2); buffers such as batch statistics are copied.
    """
    if decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
