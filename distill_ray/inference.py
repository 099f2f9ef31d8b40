"""A model over rows: nothing else, so that a labelling actor starts without what measures models."""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import Tensor, nn

from distill_ray.precision import autocast

_LATENCY_WARMUPS, _LATENCY_RUNS = 20, 200


@torch.inference_mode()
def logits_of(model: nn.Module, inputs: Tensor, batch_size: int, precision: str, device: torch.device) -> Tensor:
    """Float32 logits [N, C] of raw ``inputs`` [N, *shape], on the CPU, model in eval mode."""
    was_training = model.training
    model.eval()
    parts = []
    for start in range(0, len(inputs), batch_size):
        batch = inputs[start : start + batch_size].to(device)
        with autocast(precision, device):
            parts.append(model(batch).float().cpu())
    model.train(was_training)
    return torch.cat(parts)


@torch.inference_mode()
def latency_ms(model: nn.Module, example: Tensor, device: torch.device) -> float:
    """Median time of one row's forward pass in fp32, on one thread. ``example`` is [1, *shape]."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model.eval()
    example = example.to(device)
    times = []
    try:
        for _ in range(_LATENCY_WARMUPS + _LATENCY_RUNS):
            start = time.perf_counter()
            model(example)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return median(times[_LATENCY_WARMUPS:]) * 1000
