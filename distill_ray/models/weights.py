"""Weights as others save them: safetensors files and torch checkpoints, read without running a pickle."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from distill_ray.errors import UserError

FETCH = "fetch or save it again"
_SHOWN = 3  # keys of a list in an error
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of DataParallel, torch.compile, Lightning


def is_safetensors(data: bytes) -> bool:
    """By the first byte after the 8 that say how long the JSON header is."""
    return data[8:9] == b"{"


def read_state_dict(
    data: bytes, place: str, key: str | None, *, choose: str = "name where they lie with teacher.key"
) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a torch checkpoint; ``key`` says where in it they lie.

    ``choose`` is the mend where that cannot be seen.

    Raises:
        UserError: it is damaged, holds more than tensors and plain values, or the weights cannot be found in it.
    """
    if is_safetensors(data):
        try:
            return dict(load_tensors(data))
        except SafetensorError as error:
            raise UserError(f"{place}: is cut short or damaged ({line_of(error)}): {FETCH}") from None
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # of torch, zipfile and the unpickler
        if type(error).__name__ == "UnpicklingError" and "cut short" not in str(error):
            raise UserError(
                f"{place}: holds more than tensors, so that loading it could run code: save the weights alone with "
                f"torch.save(model.state_dict(), PATH) or safetensors (refused: {_refused(error)})"
            ) from None
        raise UserError(f"{place}: is cut short or damaged ({line_of(error)[:200]}): {FETCH}") from None
    return _weights_in(content, place, key, choose)


def _refused(error: BaseException) -> str:
    found = re.search(r"GLOBAL ([\w.]+)|Unsupported operand \d+|Unsupported class ([\w.]+)", str(error))
    return found.group(1) or found.group(0) if found else line_of(error)[:120]


def _weights_in(content: Any, place: str, key: str | None, choose: str) -> dict[str, Tensor]:
    if key is not None:
        for part in key.split("."):
            if not isinstance(content, Mapping) or part not in content:
                there = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
                raise UserError(f"teacher.key {key}: {place} has no {part!r} there, only: {there[:200]}")
            content = content[part]
    if _is_weights(content):
        return dict(content)
    inside = [name for name, value in content.items() if _is_weights(value)] if isinstance(content, Mapping) else []
    if len(inside) == 1:
        return dict(content[inside[0]])
    if inside:
        raise UserError(f"{place}: holds several sets of weights ({', '.join(inside)}): {choose}")
    what = (
        f"a mapping of {', '.join(map(str, content))[:200]}" if isinstance(content, Mapping) else type(content).__name__
    )
    raise UserError(f"{place}: holds no weights, but {what}: {choose}")


def _is_weights(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(tensor, Tensor) for tensor in value.values())


def fill(net: nn.Module, weights: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """Put the weights into ``net``, whose state is returned; a common prefix of wrappers is taken off.

    Raises:
        UserError: they do not fit: the keys that are missing, unexpected or of another shape.
    """
    wanted = net.state_dict()
    weights = _unwrapped(weights, set(wanted))
    missing = [key for key in wanted if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in wanted]
    shapes = [
        f"{key} ({list(weights[key].shape)} in the file, {list(tensor.shape)} in the model)"
        for key, tensor in wanted.items()
        if key in weights and weights[key].shape != tensor.shape
    ]
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise UserError(f"{place}: its keys do not fit the model: {'; '.join(problems)}: check teacher.model")
    net.load_state_dict(dict(weights), strict=False)
    return net.state_dict()


def _unwrapped(weights: Mapping[str, Tensor], wanted: set[str]) -> Mapping[str, Tensor]:
    while weights and not set(weights) & wanted:
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in weights)), None)
        if prefix is None:
            break
        weights = {key.removeprefix(prefix): tensor for key, tensor in weights.items()}
    return weights


def line_of(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
