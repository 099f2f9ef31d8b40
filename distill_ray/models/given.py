"""Teachers that are given: weights, TorchScript, torch.export programs and ONNX models, alone or averaged.

What each format may run when it is loaded: a state dict (safetensors, or a torch checkpoint read with
``weights_only=True``) nothing; an ONNX model the operators of onnxruntime; TorchScript those of torch, some of which
read and write files; a torch.export program whatever it likes, since torch evaluates text of the file, so that it needs
permission. No pickle is ever loaded.

Shapes: B rows, W outputs of one network, C classes of the data.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from distill_ray.config import InputConfig, ModelConfig, OutputKind, TeacherInput
from distill_ray.errors import UserError
from distill_ray.models import foreign, formats
from distill_ray.models.classifier import build_classifier, is_ours
from distill_ray.models.weights import fill, read_state_dict
from distill_ray.storage import Folder

FLOOR = torch.finfo(torch.float32).tiny  # of a probability before its logarithm: -87.3 nats
RAW = InputConfig(scale=1, mean=(0.0,), std=(1.0,))  # a contract that leaves the rows' numbers as they are
_SUM_TOLERANCE = 1e-3  # what is recognised as probabilities: float16 does not sum to 1 exactly
_ROUNDED = 5e-4  # of each of them, where they were written with three decimals and are said to be probabilities
_NEAR = 0.05  # of sums that may be meant to be 1
_ROUNDED_ONES = "its outputs lie within [0, 1] and sum to nearly 1: say probabilities, if they were rounded, or logits"
_SIGMOIDS = (
    "its outputs lie within [0, 1] and do not sum to 1, as those of a sigmoid for each class, which taken for logits "
    "make nearly flat labels: give what comes before the sigmoid, or say logits if they are logits"
)
MemberFormat = Literal["state_dict", "torchscript", "export", "onnx"]


class GivenMember(BaseModel):
    """One network: its file in the folder, how it sees a row, and what its outputs are.

    ``order`` has, for each class of the data, the number of the output that stands for it; None: they are the same.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    file: str = Field(pattern=r"^model(-\d+)?\.(safetensors|pt|pt2|onnx)$")  # may not leave the folder
    bytes: int
    sha256: str
    format: MemberFormat
    model: ModelConfig | None = None
    input: TeacherInput | None = None
    output: OutputKind = "auto"
    order: tuple[int, ...] | None = None
    width: int | None = None  # of a state dict: how many outputs its network is made with


class GivenSpec(BaseModel):
    """What model.json of a given teacher holds."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    format_version: Literal[1] = 1
    kind: Literal["given"] = "given"
    members: tuple[GivenMember, ...]
    weights: tuple[float, ...]
    average: Literal["logits", "probabilities"]
    input: InputConfig
    shape: tuple[int, ...]
    dtype: str
    classes: int
    class_names: tuple[str, ...]

    def open(self, folder: Folder, *, key: str = "teacher") -> GivenNet:
        """The networks, loaded from ``folder``, in eval mode.

        Raises:
            UserError: a file is missing, damaged or not the one that this says, or cannot be loaded.
        """
        members = [self._member(member, folder, key) for member in self.members]
        return GivenNet(members, self.weights, self.average).eval()

    def _member(self, member: GivenMember, folder: Folder, key: str) -> Member:
        place = folder.location(member.file)
        try:
            data = folder.read_bytes(member.file)
        except FileNotFoundError:
            raise UserError(f"{place}: no such file: delete its folder, the same command makes it again") from None
        if hashlib.sha256(data).hexdigest() != member.sha256:
            raise UserError(
                f"{place}: damaged (its checksum is another): delete its folder, the command makes it again"
            )
        contract = member.input or TeacherInput(scale=self.input.scale, mean=self.input.mean, std=self.input.std)
        if member.format != "state_dict":
            net = formats.open_program(data, member.format, place)
            return Member(net, contract, self.shape, member.output, member.order, ours=False)
        assert member.model is not None
        net = build_given(member.model, contract, self.shape, member.width or self.classes, f"{key}.model")
        fill(net, read_state_dict(data, place, None), place)
        ours = is_ours(member.model)
        return Member(net, contract, self.shape, member.output, member.order, ours=ours)


def build_given(model: Any, contract: TeacherInput, shape: Sequence[int], width: int, key: str) -> nn.Module:
    """The bare network, without its contract, for rows of ``shape`` as the contract turns them out; its weights follow,
    so that pretrained ones are not looked for."""
    seen = seen_shape(contract, shape, key)
    return build_classifier(foreign.bare(model, key), InputConfig(), seen, width, key=key).net


def seen_shape(contract: TeacherInput, shape: Sequence[int], key: str) -> tuple[int, ...]:
    """The shape of one row as the network sees it.

    Raises:
        UserError: the contract does not fit rows of ``shape``.
    """
    channels, rest = shape[0], tuple(shape[1:])
    if contract.channels is not None and channels not in (1, contract.channels):
        raise UserError(
            f"{key}.input.channels {contract.channels}: rows of {channels} channels cannot become that many"
        )
    if contract.resize is not None and len(shape) != 3:
        raise UserError(f"{key}.input.resize: rows of shape {list(shape)} are no images")
    channels = contract.channels or channels
    for name, values in (("mean", contract.mean), ("std", contract.std)):
        if len(values) not in (1, channels):
            raise UserError(f"{key}.input.{name}: {len(values)} numbers for {channels} channels: give 1 or {channels}")
    return (channels, *(contract.resize or rest))


class Member(nn.Module):
    """One given network with its own input contract: raw rows in; ``forward`` gives logits of the data's classes."""

    multiplier: Tensor
    offset: Tensor
    order: Tensor | None

    def __init__(
        self,
        net: nn.Module,
        contract: TeacherInput,
        shape: Sequence[int],
        output: OutputKind,
        order: Sequence[int] | None,
        *,
        ours: bool,
    ) -> None:
        super().__init__()
        seen_shape(contract, shape, "teacher")
        self.net, self.contract, self.output, self.ours = net, contract, output, ours
        channel = (-1, *([1] * (len(shape) - 1)))
        mean, std = torch.tensor(contract.mean), torch.tensor(contract.std)
        self.register_buffer("multiplier", (contract.scale / std).reshape(channel), persistent=False)
        self.register_buffer("offset", (mean / std).reshape(channel), persistent=False)
        numbers = None if order is None else torch.tensor(list(order))
        self.register_buffer("order", numbers, persistent=False)

    def raw_output(self, raw: Tensor) -> Any:
        """What the network itself returns for raw rows [B, *shape]: [B, W] where it is as it should be."""
        x = raw.to(torch.float32)
        if self.contract.channels is not None and x.shape[1] != self.contract.channels:
            x = x.expand(-1, self.contract.channels, *x.shape[2:])
        x = x * self.multiplier - self.offset
        if self.contract.resize is not None:
            mode = self.contract.interpolation
            smooth = {} if mode == "nearest" else {"antialias": True, "align_corners": False}
            x = F.interpolate(x, size=self.contract.resize, mode=mode, **smooth)
        in_order = torch.channels_last if self.ours and x.dim() == 4 else torch.contiguous_format
        return foreign.logits_in(self.net(x.contiguous(memory_format=in_order)))

    def forward(self, raw: Tensor) -> Tensor:
        """Logits [B, C] in the order of the data's classes, of raw rows [B, *shape]."""
        logits = to_logits(self.raw_output(raw), self.output)
        return logits if self.order is None else logits.index_select(1, self.order)


class GivenNet(nn.Module):
    """One given network, or the average of several: raw rows [B, *shape] to logits [B, C].

    Averaged as logits: ``sum w_i z_i``, the geometric mean of the softmaxes. As probabilities:
    ``log sum w_i softmax(z_i)``, the arithmetic one, at temperature 1.
    """

    ours = False  # its weights stay as they were given

    def __init__(
        self, members: Sequence[Member], weights: Sequence[float], average: Literal["logits", "probabilities"]
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.average = average
        self.weights = [weight / sum(weights) for weight in weights]

    @property
    def reducible(self) -> bool:
        """Whether its arithmetic may be lowered to bf16 or fp16: programs compute as they were made."""
        return not any(isinstance(member.net, formats.PROGRAMS) for member in self.members)

    def forward(self, raw: Tensor) -> Tensor:
        """Logits, not yet minus their maximum."""
        if len(self.members) == 1:
            logits: Tensor = self.members[0](raw)
            return logits
        each = [member(raw).float() for member in self.members]
        if self.average == "logits":
            return torch.stack([w * z for w, z in zip(self.weights, each, strict=True)]).sum(dim=0)
        logs = [z.log_softmax(dim=1) + torch.tensor(w).log() for w, z in zip(self.weights, each, strict=True)]
        return torch.stack(logs).logsumexp(dim=0)


def to_logits(answer_BW: Tensor, output: OutputKind) -> Tensor:
    """Logits of what a network returns; log-probabilities are logits already. A probability of 0 becomes the floor."""
    if output == "probabilities":
        return answer_BW.float().clamp(min=FLOOR).log()
    values = answer_BW.float()
    return values.masked_fill(values == -math.inf, math.log(FLOOR)) if output == "log_probabilities" else values


def usable(answer_BW: Tensor, output: OutputKind) -> Tensor:
    """By row [B], whether its numbers make a label: finite ones, and the logarithm of a probability of 0."""
    finite_B = torch.isfinite(answer_BW).all(dim=1)
    kind = recognise(answer_BW) if output == "auto" and not bool(finite_B.all()) else output
    return finite_B | is_log_probabilities(answer_BW) if kind == "log_probabilities" else finite_B


def recognise(answer_BW: Tensor) -> Literal["logits", "probabilities", "log_probabilities"]:
    """What outputs are, by looking: probabilities lie in [0, 1] and sum to 1 in every row, their logs so too."""
    values = answer_BW.double()
    if bool((values >= 0).all() and (values <= 1 + _SUM_TOLERANCE).all() and _sums_to_one(values).all()):
        return "probabilities"
    return "log_probabilities" if is_log_probabilities(values).all() else "logits"


def unclear(answer_BW: Tensor) -> str | None:
    """What is to be said of outputs that might be probabilities and are none; None where it is clear what they are.

    Rounded probabilities, and a sigmoid's, taken for logits would be nearly flat labels.
    """
    values = answer_BW.double()
    within = bool((values >= 0).all() and (values <= 1 + _SUM_TOLERANCE).all())
    if not within or bool(_sums_to_one(values).all()):
        return None
    near = bool(_sums_to_one(values, _NEAR + _ROUNDED * values.shape[1]).all())
    return _ROUNDED_ONES if near else _SIGMOIDS


def is_log_probabilities(values_BW: Tensor) -> Tensor:
    """By row [B]."""
    return (values_BW <= _SUM_TOLERANCE).all(dim=1) & _sums_to_one(values_BW.double().exp())


def is_probabilities(values_BW: Tensor) -> Tensor:
    """By row [B]."""
    values = values_BW.double()
    right_sum = _sums_to_one(values, _SUM_TOLERANCE + _ROUNDED * values.shape[1])
    return (values >= 0).all(dim=1) & (values <= 1 + _SUM_TOLERANCE).all(dim=1) & right_sum


def _sums_to_one(values_BW: Tensor, tolerance: float = _SUM_TOLERANCE) -> Tensor:
    return (values_BW.sum(dim=1) - 1).abs() <= tolerance


def check_kind(answer_BW: Tensor, asked: OutputKind) -> int | None:
    """The first row that is not what is said of all of them; None where all are."""
    if asked not in ("probabilities", "log_probabilities"):
        return None
    right_B = is_probabilities(answer_BW) if asked == "probabilities" else is_log_probabilities(answer_BW)
    wrong = torch.nonzero(~right_B)
    return int(wrong[0]) if len(wrong) else None


def class_order(outputs: Sequence[str] | None, width: int, class_names: Sequence[str], key: str) -> list[int] | None:
    """For each class of the data the number of the output that stands for it; None where they are the same.

    Outputs of classes that the data does not have are left out.

    Raises:
        UserError: there are other classes, or another number of them, and no map that explains it.
    """
    if outputs is None:
        if width == 1 and len(class_names) == 2:
            raise UserError(
                f"{key}: gives 1 number a row, the data has 2 classes: let the network return two, [0, z] for its "
                f"logit z of {class_names[1]!r}, or [1 - p, p] for its probability p"
            )
        if width != len(class_names):
            raise UserError(
                f"{key}: gives {width} numbers a row, the data has {len(class_names)} classes: name its outputs in "
                f"{key}.classes, in their order"
            )
        return None
    if len(outputs) != width:
        raise UserError(f"{key}.classes: {len(outputs)} names, but it gives {width} numbers a row")
    if len(set(outputs)) != len(outputs):
        twice = next(name for name in outputs if list(outputs).count(name) > 1)
        raise UserError(f"{key}.classes: {twice!r} stands there twice")
    missing = [name for name in class_names if name not in set(outputs)]
    if missing:
        raise UserError(
            f"{key}.classes: {missing[0]!r} is a class of the data, but none of the teacher's ({len(missing)} such): a "
            "teacher must know every class"
        )
    order = [list(outputs).index(name) for name in class_names]
    return None if order == list(range(width)) else order
