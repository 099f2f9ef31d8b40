"""A model over rows: nothing else, so that a labelling actor starts without what measures models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill_ray.precision import autocast


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
