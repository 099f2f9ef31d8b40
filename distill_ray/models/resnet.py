"""A small residual network for small images (He, Zhang, Ren, Sun 2015, arXiv 1512.03385, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

_GROUPS = 8  # at most, and a divisor of the channels


class ResNet(nn.Module):
    """Images [B, channels, height, width] to logits [B, classes].

    A 3x3 convolution, then a stage of basic blocks for each width; the first block of each later stage halves height
    and width. Then the mean over the image and a linear layer.

    Raises:
        ValueError: the input is not an image, or smaller than the number of times it is halved.
    """

    def __init__(
        self, shape: Sequence[int], classes: int, channels: Sequence[int], blocks: int, norm: Literal["group", "batch"]
    ) -> None:
        super().__init__()
        least = 2 ** (len(channels) - 1)
        if len(shape) != 3 or min(shape[1:]) < least:
            raise ValueError(
                f"resnet with {len(channels)} widths needs images of shape [channels, height >= {least}, "
                f"width >= {least}], got {list(shape)}"
            )
        self.stem = nn.Conv2d(shape[0], channels[0], kernel_size=3, padding=1, bias=False)
        self.stem_norm = _norm(norm, channels[0])
        made = [BasicBlock(channels[0], channels[0], 1, norm) for _ in range(blocks)]
        for before, after in pairwise(channels):
            made.append(BasicBlock(before, after, 2, norm))
            made += [BasicBlock(after, after, 1, norm) for _ in range(blocks - 1)]
        self.blocks = nn.Sequential(*made)
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Raw scores, no softmax."""
        x = F.relu(self.stem_norm(self.stem(x)))
        logits: Tensor = self.head(self.blocks(x).mean(dim=(2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes (option B)."""

    def __init__(self, before: int, after: int, stride: int, norm: Literal["group", "batch"]) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1, bias=False)
        self.first_norm = _norm(norm, after)
        self.second = nn.Conv2d(after, after, kernel_size=3, padding=1, bias=False)
        self.second_norm = _norm(norm, after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), _norm(norm, after))

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, H, W] to [B, after, H / stride, W / stride]."""
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.shortcut(x))


def _norm(kind: Literal["group", "batch"], channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(math.gcd(_GROUPS, channels), channels)
