"""A network together with its input contract: raw stored rows in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from distill_ray.config import AnyModel, CharCnnModel, InputConfig, MlpModel, OwnModel, ResnetModel
from distill_ray.errors import UserError
from distill_ray.models import foreign
from distill_ray.models.char_cnn import CharCnn
from distill_ray.models.mlp import Mlp
from distill_ray.models.resnet import ResNet

_PROBE_ROWS = 2


class Classifier(nn.Module):
    """Applies ``(raw * scale - mean) / std`` per channel, then ``net``.

    The contract's numbers are not weights: they travel in model.json, not in the state dict of ``net``. ``ours``: the
    network is one of this package's, which run in channels_last order; others may take views of their activations,
    which that order does not allow.
    """

    multiplier: Tensor
    offset: Tensor

    def __init__(self, net: nn.Module, contract: InputConfig, shape: Sequence[int], *, ours: bool = True) -> None:
        super().__init__()
        self.net = net
        self.shape = tuple(shape)
        self.ours = ours
        channel = (-1, *([1] * (len(shape) - 1)))
        mean, std = torch.tensor(contract.mean), torch.tensor(contract.std)
        self.register_buffer("multiplier", (contract.scale / std).reshape(channel), persistent=False)
        self.register_buffer("offset", (mean / std).reshape(channel), persistent=False)

    def forward(self, raw: Tensor) -> Tensor:
        """``raw`` [B, *shape] of any numeric dtype to logits [B, classes]."""
        x = raw.to(torch.float32) * self.multiplier - self.offset
        if x.dim() == 4 and self.ours:
            x = x.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.net(x) if self.ours else foreign.logits_in(self.net(x))
        return logits


def build_classifier(
    model: AnyModel, contract: InputConfig, shape: Sequence[int], classes: int, *, key: str = "model"
) -> Classifier:
    """The untrained network that the config names, its weights drawn from torch's global generator.

    Raises:
        UserError: the network cannot take inputs of this shape; ``key`` names the config's section.
    """
    for name, values in (("mean", contract.mean), ("std", contract.std)):
        if len(values) not in (1, shape[0]):
            raise UserError(f"data.input.{name}: {len(values)} numbers for {shape[0]} channels: give 1 or {shape[0]}")
    if not isinstance(model, CharCnnModel | MlpModel | ResnetModel):
        return Classifier(foreign.build(model, shape, classes, key), contract, shape, ours=False)
    try:
        net = _build_net(model, shape, classes)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{key}: {error}") from None
    # Convolutions of a channels_last network run on oneDNN and cuDNN without reordering.
    return Classifier(net, contract, shape).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _build_net(model: OwnModel, shape: Sequence[int], classes: int) -> nn.Module:
    if isinstance(model, CharCnnModel):
        return CharCnn(shape, classes, model.channels, model.hidden)
    if isinstance(model, ResnetModel):
        return ResNet(shape, classes, model.channels, model.blocks, model.norm)
    return Mlp(shape, classes, model.hidden)


def is_ours(model: AnyModel) -> bool:
    """Whether the network is one of this package's, by name."""
    return isinstance(model, get_args(OwnModel))


@torch.no_grad()
def check_output(model: nn.Module, shape: Sequence[int], dtype: str, classes: int, key: str) -> None:
    """Run two rows of zeros through ``model``: what is not ours may return anything.

    Raises:
        UserError: it fails, or does not return logits [rows, classes]; names what it returned and what is expected.
    """
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    rows = torch.zeros((_PROBE_ROWS, *shape), dtype=getattr(torch, dtype), device=device)
    was_training = model.training
    model.eval()
    try:
        answer = model(rows)
    except Exception as error:  # whatever the network's own code raises
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{key}: it fails on rows of shape {list(shape)}: {type(error).__name__}: {reason}: check its kwargs"
        ) from error
    finally:
        model.train(was_training)
    expected = f"logits [rows, {classes}], one for each class of the data"
    if not isinstance(answer, Tensor):
        raise UserError(f"{key}: returns {type(answer).__name__}, expected a tensor of {expected}")
    if tuple(answer.shape) != (_PROBE_ROWS, classes):
        got = ["rows" if n == _PROBE_ROWS and i == 0 else n for i, n in enumerate(answer.shape)]
        raise UserError(f"{key}: returns [{', '.join(map(str, got))}], expected {expected}: check its kwargs")


def count_parameters(module: nn.Module) -> int:
    """Number of weights, trainable or not."""
    return sum(parameter.numel() for parameter in module.parameters())
