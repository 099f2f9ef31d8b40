"""Which arithmetic a model runs in, resolved from what the hardware has."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

from distill_ray.config import PrecisionName
from distill_ray.errors import UserError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(precision: PrecisionName, device: torch.device) -> str:
    """``auto`` becomes bf16 where the device computes in it natively, else fp32.

    Raises:
        UserError: fp16 without a GPU.
    """
    if precision == "fp16" and device.type != "cuda":
        raise UserError("precision fp16 needs a GPU: use auto, bf16 or fp32")
    if precision != "auto":
        return precision
    return "bf16" if has_native_bf16(device) else "fp32"


def exact_fp32() -> None:
    """Make fp32 mean float32 in this process: CUDA's convolutions would round their inputs to TF32 (10 bits)."""
    torch.backends.cudnn.allow_tf32 = False


def has_native_bf16(device: torch.device) -> bool:
    """Whether bf16 is computed natively, not emulated: AVX-512 BF16 or AMX on CPUs, Ampere or later on GPUs."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private in torch 2.13; absent: fp32, always right
    return bool(probe and probe())


def cast_weights(model: nn.Module, precision: str) -> None:
    """Store the weights as autocast would cast them at every call: the same logits, without casting them every time.

    For inference only: autocast's own cache of cast weights does not work under ``torch.inference_mode``.
    """
    dtype = _DTYPES.get(precision)
    for layer in model.modules() if dtype is not None else ():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            layer.to(dtype)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """A context in which matrix products run in ``precision``."""
    dtype = _DTYPES.get(precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
