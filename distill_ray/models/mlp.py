"""A plain multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """Inputs [B, *shape] to logits [B, classes] through ReLU layers of the given widths."""

    def __init__(self, shape: Sequence[int], classes: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = (prod(shape), *hidden, classes)
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Raw scores, no softmax."""
        x = torch.flatten(x, 1)
        for linear in self.linears[:-1]:
            x = F.relu(linear(x))
        logits: Tensor = self.linears[-1](x)
        return logits
