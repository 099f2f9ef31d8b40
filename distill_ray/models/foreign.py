"""Networks that are not ours: your own by import path, timm's and transformers' by name. Imported where they are used.

timm and transformers are extras; neither ever downloads here.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distill_ray import usercode
from distill_ray.config import AnyModel, ForeignModel, ImportedModel, TimmModel, TransformersModel
from distill_ray.errors import UserError
from distill_ray.models.weights import read_state_dict

_SHOWN = 3  # keys of a list in an error


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


def bare(model: AnyModel, key: str) -> AnyModel:
    """The same network without the pretrained weights that it starts from, for weights that follow.

    What those weights' folder alone says of it (the sizes, of transformers) becomes part of it.

    Raises:
        UserError: such a folder is not there, or holds another type of model.
    """
    if isinstance(model, TimmModel):
        return model.model_copy(update={"pretrained": None})
    return _bare_hf(model, key) if isinstance(model, TransformersModel) else model


def logits_in(answer: Any) -> Any:
    """The logits in what a network returns: itself, or the ``logits`` of transformers' ModelOutput or of a dict."""
    if isinstance(answer, Tensor):
        return answer
    if isinstance(answer, dict):
        return answer.get("logits", answer)
    return getattr(answer, "logits", answer)


def _imported(model: ImportedModel, key: str) -> nn.Module:
    make = usercode.load(model.import_, f"{key}.import")
    made = _made(make, model.kwargs, f"{key}.import {model.import_}")
    if not isinstance(made, nn.Module):
        raise UserError(
            f"{key}.import {model.import_}: returned {type(made).__name__}, not an nn.Module: return the network"
        )
    return made


# --- timm -----------------------------------------------------------------------------------------------------------


def _timm(model: TimmModel, shape: Sequence[int], classes: int, key: str) -> nn.Module:
    _refuse_address(model.model, key)
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit its torch is a RuntimeError
        raise UserError(_not_installed(key, "timm", error)) from None
    if not timm.is_model(model.model):
        raise UserError(f"{key}.model {model.model}: is no model of timm{_near(model.model, timm.list_models())}")
    arguments: dict[str, Any] = {"num_classes": classes, "in_chans": shape[0], **model.kwargs}
    place = f"{key} timm {model.model}"
    if model.pretrained is None:
        net = _made(timm.create_model, {"model_name": model.model, **arguments}, place)
        assert isinstance(net, nn.Module)
        return net
    weights = _weights_of(model.pretrained, f"{key}.pretrained")
    overlay = _made(_timm_overlay, {"model": model.model, "weights": weights}, place)
    arguments |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
    net = _made(timm.create_model, {"model_name": model.model, **arguments}, place)
    assert isinstance(net, nn.Module)
    if isinstance(held := getattr(net, "pretrained_cfg", None), dict):
        held.pop("state_dict", None)  # a second copy of the weights
    if not _shares_a_tensor(net, weights):  # what it does not know it passes over, where the head is another
        there = ", ".join(list(weights)[:_SHOWN])
        raise UserError(f"{key}.pretrained {model.pretrained}: no weight in it is one of {model.model}, but {there}")
    return net


def _timm_overlay(model: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """timm's description of the weights: the tensors themselves, since its own loader of files may unpickle, and how
    many classes their head has, since it would take that for the head of the weights it knows."""
    import timm

    described = timm.models.get_pretrained_cfg(model)
    heads = (described.classifier if described is not None else None) or ()
    heads = (heads,) if isinstance(heads, str) else heads
    widths = {len(weights[f"{head}.weight"]) for head in heads if f"{head}.weight" in weights}
    head = {"num_classes": widths.pop(), "label_offset": 0} if len(widths) == 1 else {}
    return {"state_dict": dict(weights), "source": "", **head}


def _weights_of(path: str, key: str) -> dict[str, Tensor]:
    _require_file(path, key)
    return read_state_dict(Path(path).read_bytes(), f"{key} {path}", None, choose="save the ones that are meant alone")


def _shares_a_tensor(net: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """By value: a model may rename what it reads. Vectors do not count, since norms start alike in every network."""
    held = {(tuple(t.shape), float(t.double().sum())) for t in net.state_dict().values() if t.dim() > 1}
    return any((tuple(t.shape), float(t.double().sum())) in held for t in weights.values() if t.dim() > 1)


# --- transformers ---------------------------------------------------------------------------------------------------

# Of a config of transformers, what is not its architecture: the head is the data's, the dtype ours.
_NOT_ARCHITECTURE = (
    "_name_or_path", "architectures", "auto_map", "dtype", "id2label", "label2id", "model_type", "num_labels",
    "quantization_config", "torch_dtype", "transformers_version", "trust_remote_code",
)  # fmt: skip


def _hf(model: TransformersModel, shape: Sequence[int], classes: int, key: str) -> nn.Module:
    AutoConfig, AutoModel = _of_transformers(model, key)
    place, plain = f"{key} transformers {model.model}", _bare_hf(model, key)
    sizes = {"num_labels": classes, "num_channels": shape[0], "image_size": shape[1]}
    config = _made(lambda **rest: AutoConfig.for_model(model.model, **rest), {**sizes, **plain.kwargs}, place)
    if model.pretrained is None:
        net: nn.Module = _made(AutoModel.from_config, {"config": config}, place)
        return net
    arguments = {
        "config": config, "local_files_only": True, "use_safetensors": True, "trust_remote_code": False,
        "ignore_mismatched_sizes": True, "output_loading_info": True,
    }  # fmt: skip
    start = AutoModel.from_pretrained
    net, found = _made(lambda **rest: start(model.pretrained, **rest), arguments, place)
    absent = {*found["missing_keys"], *(entry[0] for entry in found["mismatched_keys"])}
    if set(net.state_dict()) <= absent:
        raise UserError(f"{key}.pretrained {model.pretrained}: no weight in it is one of this {model.model}")
    _refuse_left_to_chance(net, found, f"{key}.pretrained {model.pretrained}")
    return net.float()  # transformers keeps the dtype of the file


def _refuse_left_to_chance(net: Any, found: Mapping[str, Any], place: str) -> None:
    """Weights beyond the head that a pretrained folder lacks, or has in another shape: transformers would draw them at
    random without an error. Vectors that are not there are passed over: norms and biases start at 1 and 0."""
    body, weights = f"{net.base_model_prefix}.", net.state_dict()
    for name, there, wanted in found["mismatched_keys"]:
        if name.startswith(body):
            raise UserError(
                f"{place}: its {name} is {list(there)}, and that of this model {list(wanted)}, so that it would start "
                f"at random: leave out the kwargs that change its shape, or pretrained"
            )
    absent = sorted(n for n in found["missing_keys"] if n.startswith(body) and n in weights and weights[n].dim() > 1)
    if absent:
        raise UserError(
            f"{place}: {len(absent)} weights of this model are not in it ({', '.join(absent[:_SHOWN])}), so that they "
            f"would start at random: leave out the kwargs that add them, or pretrained"
        )


def _bare_hf(model: TransformersModel, key: str) -> TransformersModel:
    """The model with the sizes of its pretrained folder for ``kwargs``, and no such folder."""
    if model.pretrained is None:
        return model
    AutoConfig, _ = _of_transformers(model, key)
    _require_file(os.path.join(model.pretrained, "config.json"), f"{key}.pretrained")
    arguments = {**model.kwargs, "local_files_only": True, "trust_remote_code": False}
    read = AutoConfig.from_pretrained
    config = _made(lambda **rest: read(model.pretrained, **rest), arguments, f"{key}.pretrained {model.pretrained}")
    if config.model_type != model.model:
        raise UserError(
            f"{key}.pretrained {model.pretrained}: holds a {config.model_type}, not a {model.model}: set "
            f"{key}.model={config.model_type}"
        )
    sizes = json.loads(config.to_json_string(use_diff=False))
    kwargs = {name: value for name, value in sizes.items() if name not in _NOT_ARCHITECTURE}
    return model.model_copy(update={"kwargs": kwargs, "pretrained": None})


def _of_transformers(model: TransformersModel, key: str) -> tuple[Any, Any]:
    """AutoConfig and the class of image classifiers, once the model's type is known to be one."""
    _refuse_address(model.model, key)
    for name, value in model.kwargs.items():
        if name.endswith("_implementation") and "/" in str(value):  # kernels of the hub
            raise UserError(f"{key}.kwargs.{name} {value}: names a place to fetch code from: nothing is downloaded")
    try:
        from transformers import AutoConfig, AutoModelForImageClassification
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KNOWN
    except ImportError as error:
        raise UserError(_not_installed(key, "transformers", error)) from None
    if model.model == "timm_wrapper":
        raise UserError(f"{key}.model timm_wrapper: is timm's, not a type of its own: set {key}.name=timm")
    if model.model not in KNOWN:
        near = _near(model.model, KNOWN)
        raise UserError(f"{key}.model {model.model}: is no type of image classifier of transformers{near}")
    return AutoConfig, AutoModelForImageClassification


# --- both -----------------------------------------------------------------------------------------------------------


def _refuse_address(name: str, key: str) -> None:
    if any(mark in name for mark in ":/\\"):
        raise UserError(
            f"{key}.model {name}: is the address of a model, not a name: nothing is downloaded, so name its "
            f"architecture, and in {key}.pretrained where its weights lie"
        )


def _near(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


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
