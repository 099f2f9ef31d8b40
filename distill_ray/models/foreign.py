"""Networks that are not ours: your own by import path, timm's and transformers' by name. Imported where they are used.

timm and transformers are extras; neither ever downloads here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distill_ray import usercode
from distill_ray.config import ForeignModel, ImportedModel, TimmModel, TransformersModel
from distill_ray.errors import UserError


def build(model: ForeignModel, shape: Sequence[int], classes: int, key: str) -> nn.Module:
    """The network that ``model`` names, from inputs [B, *shape] to logits [B, classes] or something that holds them.

    Raises:
        UserError: it is not installed, not there, or cannot be made; names ``key``.
    """
    if isinstance(model, ImportedModel):
        return _imported(model, key)
    if len(shape) != 3:
        raise UserError(f"{key} {model.name}: takes images of shape [channels, height, width], got {list(shape)}")
    return _timm(model, shape, classes, key) if isinstance(model, TimmModel) else _hf(model, shape, classes, key)


def logits_in(answer: Any) -> Any:
    """The logits in what a network returns: itself, or the ``logits`` of transformers' ModelOutput or of a dict."""
    if isinstance(answer, Tensor):
        return answer
    if isinstance(answer, dict):
        return answer.get("logits", answer)
    return getattr(answer, "logits", answer)


def code_sha256(model: Any, key: str) -> str | None:
    """What a digest needs to know of the code that ``model`` names; None where it names none."""
    return usercode.fingerprint(model.import_, key) if isinstance(model, ImportedModel) else None


def _imported(model: ImportedModel, key: str) -> nn.Module:
    make = usercode.load(model.import_, f"{key}.import")
    made = _made(make, model.kwargs, f"{key}.import {model.import_}")
    if not isinstance(made, nn.Module):
        raise UserError(
            f"{key}.import {model.import_}: returned {type(made).__name__}, not an nn.Module: return the network"
        )
    return made


def _timm(model: TimmModel, shape: Sequence[int], classes: int, key: str) -> nn.Module:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit its torch is a RuntimeError
        raise UserError(_not_installed(key, "timm", error)) from None
    arguments: dict[str, Any] = {"num_classes": classes, "in_chans": shape[0], **model.kwargs}
    if model.pretrained is not None:
        _require_file(model.pretrained, f"{key}.pretrained")
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": {"file": model.pretrained}}
    net = _made(timm.create_model, {"model_name": model.model, **arguments}, f"{key} timm {model.model}")
    assert isinstance(net, nn.Module)
    return net


def _hf(model: TransformersModel, shape: Sequence[int], classes: int, key: str) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModelForImageClassification
    except ImportError as error:
        raise UserError(_not_installed(key, "transformers", error)) from None
    place = f"{key} transformers {model.model}"
    if model.pretrained is not None:
        _require_file(os.path.join(model.pretrained, "config.json"), f"{key}.pretrained")
        arguments = {"num_labels": classes, "local_files_only": True, "use_safetensors": True, **model.kwargs}
        arguments |= {"trust_remote_code": False, "ignore_mismatched_sizes": True}
        start = AutoModelForImageClassification.from_pretrained
        net: nn.Module = _made(lambda **rest: start(model.pretrained, **rest), arguments, place)
        return net
    sizes = {"num_labels": classes, "num_channels": shape[0], "image_size": shape[1]}
    config = _made(lambda **rest: AutoConfig.for_model(model.model, **rest), {**sizes, **model.kwargs}, place)
    net = _made(AutoModelForImageClassification.from_config, {"config": config}, place)
    return net


def _made(make: Callable[..., Any], arguments: dict[str, Any], place: str) -> Any:
    try:
        return make(**arguments)
    except UserError:
        raise
    except Exception as error:  # whatever the network's own code raises
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{place}: making it fails: {type(error).__name__}: {reason}") from error


def _require_file(path: str, key: str) -> None:
    if not Path(path).is_file():
        raise UserError(f"{key}: {path}: no such file: nothing is downloaded, so it must be there")


def _not_installed(key: str, package: str, error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return f"{key}: {package} is not installed: pip install 'distill-ray[{package}]'"
    return f"{key}: {package} cannot be imported ({' '.join(str(error).split())}): pip install 'distill-ray[{package}]'"
