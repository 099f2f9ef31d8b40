"""A network together with its input contract: raw stored rows in, logits out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill_ray.config import CharCnnModel, InputConfig, MlpModel
from distill_ray.errors import UserError
from distill_ray.models.char_cnn import CharCnn
from distill_ray.models.mlp import Mlp


class Classifier(nn.Module):
    """Applies ``(raw * scale - mean) / std`` per channel, then ``net``.

    The contract's numbers are not weights: they travel in model.json, not in the state dict of ``net``.
    """

    multiplier: Tensor
    offset: Tensor

    def __init__(self, net: nn.Module, contract: InputConfig, shape: Sequence[int]) -> None:
        super().__init__()
        self.net = net
        self.shape = tuple(shape)
        channel = (-1, *([1] * (len(shape) - 1)))
        mean, std = torch.tensor(contract.mean), torch.tensor(contract.std)
        self.register_buffer("multiplier", (contract.scale / std).reshape(channel), persistent=False)
        self.register_buffer("offset", (mean / std).reshape(channel), persistent=False)

    def forward(self, raw: Tensor) -> Tensor:
        """``raw`` [B, *shape] of any numeric dtype to logits [B, classes]."""
        x = raw.to(torch.float32) * self.multiplier - self.offset
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.net(x)
        return logits


def build_classifier(
    model: CharCnnModel | MlpModel, contract: InputConfig, shape: Sequence[int], classes: int, *, key: str = "model"
) -> Classifier:
    """The untrained network that the config names, its weights drawn from torch's global generator.

    Raises:
        UserError: the network cannot take inputs of this shape; ``key`` names the config's section.
    """
    for name, values in (("mean", contract.mean), ("std", contract.std)):
        if len(values) not in (1, shape[0]):
            raise UserError(f"data.input.{name}: {len(values)} numbers for {shape[0]} channels: give 1 or {shape[0]}")
    try:
        net = _build_net(model, shape, classes)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{key}: {error}") from None
    # Convolutions of a channels_last network run on oneDNN and cuDNN without reordering.
    return Classifier(net, contract, shape).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _build_net(model: CharCnnModel | MlpModel, shape: Sequence[int], classes: int) -> nn.Module:
    if isinstance(model, CharCnnModel):
        return CharCnn(shape, classes, model.channels, model.hidden)
    return Mlp(shape, classes, model.hidden)


def count_parameters(module: nn.Module) -> int:
    """Number of weights, trainable or not."""
    return sum(parameter.numel() for parameter in module.parameters())
