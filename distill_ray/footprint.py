"""How much memory a training step takes, told before any worker starts: the network runs on tensors without data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill_ray.config import TrainConfig
from distill_ray.models import ModelSpec

_FLOAT_BYTES = 4
# Tensors of the weights' size: the weights, their gradients, and what the optimizer keeps of each.
_COPIES = {"sgd": 3, "adam": 4, "adamw": 4}


def step_bytes(model: ModelSpec, train: TrainConfig, rows: int, world_size: int) -> int:
    """Bytes of one worker in a training step on ``rows`` rows: weights, gradients, optimizer, and what backward needs.

    Counted, not measured: the tensors that autograd saves, each storage once. What the kernels and the gradients of the
    activations need comes on top (the article's teacher, fp32: 0.57 MiB a row counted, 0.9 MiB measured), so a training
    that fits by this count may still run out of memory; one that does not would never have fitted.
    """
    at_once = math.ceil(math.ceil(min(train.batch_size, rows) / world_size) / train.accumulate)
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    classifier = model.build_on_meta()
    inputs = torch.zeros((at_once, *model.shape), dtype=getattr(torch, model.dtype), device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            classifier(inputs).log_softmax(dim=1).sum()
    except Exception:
        if classifier.ours:
            raise
        saved.clear()  # code that is not ours may need numbers: then the weights alone are counted
    weights = {p.untyped_storage()._cdata: p.numel() * _FLOAT_BYTES for p in classifier.parameters()}
    activations = sum(storage.nbytes() for key, storage in saved.items() if key not in weights)
    if train.precision != "fp32":  # where auto becomes fp32 it is twice as much
        activations //= 2
    copies = _COPIES[train.optimizer] + (1 if train.ema_decay is not None else 0)
    return sum(weights.values()) * copies + activations
