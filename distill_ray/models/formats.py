"""Files of given networks: which format they have, and how each is loaded without running a pickle."""

from __future__ import annotations

import io
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill_ray.errors import UserError
from distill_ray.models import foreign
from distill_ray.models.weights import FETCH, is_safetensors, line_of

Format = Literal["state_dict", "torchscript", "export", "onnx"]


def detect(data: bytes, place: str) -> Format:
    """What a file is, by its content; ONNX has no mark of its own and goes by its name.

    Raises:
        UserError: it is nothing that can be a network, or is cut short.
    """
    if place.partition("?")[0].lower().endswith(".onnx"):
        return "onnx"
    if not data:
        raise UserError(f"{place}: is empty: {FETCH}")
    if is_safetensors(data):
        return "state_dict"
    if data[:2] == b"PK":
        return _of_archive(_names(data, place))
    if data[:1] == b"\x80":  # torch.save before 1.6
        return "state_dict"
    raise UserError(
        f"{place}: is no safetensors file, torch checkpoint, TorchScript or torch.export file: say what it is with "
        "format, or check the path"
    )


def _names(data: bytes, place: str) -> list[str]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.namelist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{place}: is cut short or damaged ({error}): {FETCH}") from None


def _of_archive(names: list[str]) -> Format:
    if any(re.search(r"(^|/)(archive_format|serialized_exported_program\.json)$", name) for name in names):
        return "export"
    return "torchscript" if any(name.endswith("/constants.pkl") for name in names) else "state_dict"


# --- programs -------------------------------------------------------------------------------------------------------


def open_program(data: bytes, kind: str, place: str) -> nn.Module:
    """A network that needs no code of ours: inputs float32 [B, ...] to what it returns.

    Raises:
        UserError: it is damaged, or cannot be loaded here.
    """
    makers: dict[str, Callable[[bytes, str], nn.Module]] = {
        "torchscript": ScriptNet, "export": ExportedNet, "onnx": OnnxNet,
    }  # fmt: skip
    return makers[kind](data, place)


def integers_of(net: nn.Module) -> torch.dtype | None:
    """The dtype of the integers that a program takes; None where it takes floats, or is no program."""
    dtype = getattr(net, "input_dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and not dtype.is_floating_point else None


def _cast(rows: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Rows in the dtype that a program takes: rounded for integers, and bytes kept in their range."""
    if dtype is None or dtype == rows.dtype:
        return rows
    if not dtype.is_floating_point:
        rows = rows.round()
    return rows.clamp(0, 255).to(dtype) if dtype == torch.uint8 else rows.to(dtype)


class ScriptNet(nn.Module):
    """A TorchScript file, given inputs of the dtype of its first weight."""

    def __init__(self, data: bytes, place: str) -> None:
        super().__init__()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of the format, which users have files in
                self.script = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{place}: is no whole TorchScript file ({line_of(error)[:200]}): {FETCH}") from None
        dtypes = [weight.dtype for weight in self.script.parameters()]
        self.input_dtype = next((dtype for dtype in dtypes if dtype.is_floating_point), None)

    def forward(self, x: Tensor) -> Any:
        """As the file has it."""
        return self.script(_cast(x, self.input_dtype))


class ExportedNet(nn.Module):
    """A torch.export program. It runs on the device it was exported for, whatever the device of its inputs."""

    def __init__(self, data: bytes, place: str) -> None:
        super().__init__()
        if compiled := [name for name in _names(data, place) if name.endswith((".so", ".cubin"))]:
            raise UserError(f"{place}: holds compiled code ({compiled[0]}), which is not loaded: export it without")
        try:
            with _only_weights():
                program = torch.export.load(io.BytesIO(data))
            module = program.module()
        except Exception as error:  # of torch, zipfile, json and the unpickler
            raise UserError(
                f"{place}: is no whole torch.export file of this torch ({line_of(error)[:200]}): {FETCH}"
            ) from None
        self._held = [module]  # not a child: it refuses train() and eval()
        self.parameter_count = sum(tensor.numel() for tensor in program.parameters())
        tensors = [*program.state_dict.values(), *program.constants.values()]
        self._device = next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))
        example = _first_input(program)
        self.input_dtype = None if example is None else example.dtype
        fixed = None if example is None else example.shape[0]
        self._batch = fixed if isinstance(fixed, int) else None

    def forward(self, x: Tensor) -> Any:
        """As the program has it; where it was exported for a fixed number of rows, so many at a time."""
        rows = _cast(x.to(self._device), self.input_dtype)
        return _in_batches(rows, self._batch, self._held[0]).to(x.device)


def _first_input(program: Any) -> Any:
    """The symbolic value of the first user input; None where the program does not say it."""
    names = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    value = nodes[names[0]].meta.get("val") if names and names[0] in nodes else None
    return value if isinstance(value, Tensor) and value.dim() else None


@contextmanager
def _only_weights() -> Iterator[None]:
    """torch.export.load falls back on unpickling everything where the weights alone cannot be read; here it may not."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class OnnxNet(nn.Module):
    """An ONNX model with one input, through onnxruntime on the CPU, with as many threads as torch has now."""

    def __init__(self, data: bytes, place: str) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f"{place}: onnxruntime is not installed: pip install 'distill-ray[onnx]'") from None
        if _EXTERNAL in data:  # its checksum would not cover them
            raise UserError(f"{place}: keeps its weights in other files: save it as one file (onnx.save_model does)")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no base class of their own
            raise UserError(f"{place}: is no whole ONNX model ({line_of(error)[:200]}): {FETCH}") from None
        if len(session.get_inputs()) != 1:
            names = ", ".join(entry.name for entry in session.get_inputs())
            raise UserError(f"{place}: has {len(session.get_inputs())} inputs ({names}), a classifier has one")
        entry = session.get_inputs()[0]
        self._session, self._name = [session], entry.name
        self._output = _scores(session.get_outputs(), place)
        self.input_dtype = _ONNX_DTYPES.get(entry.type, torch.float32)
        self._batch = entry.shape[0] if entry.shape and isinstance(entry.shape[0], int) else None

    def forward(self, x: Tensor) -> Any:
        """The output that holds a number for each class."""

        def run(rows: Tensor) -> Any:
            answer = self._session[0].run([self._output], {self._name: rows.numpy()})[0]
            return torch.from_numpy(answer)

        return _in_batches(_cast(x.detach().cpu(), self.input_dtype).contiguous(), self._batch, run).to(x.device)


def _scores(outputs: Sequence[Any], place: str) -> str:
    """The output with a number for each class: called logits or probabilities, or else the first one of floats.

    Classifiers that sklearn or a boosting library made have the best class itself as their first output.

    Raises:
        UserError: there is none.
    """
    floats = [entry for entry in outputs if _ONNX_DTYPES.get(entry.type, torch.uint8).is_floating_point]
    named = [entry for name in ("logits", "probabilities") for entry in floats if entry.name == name]
    tables = [entry for entry in floats if len(entry.shape or ()) == 2]
    alone = [entry for entry in outputs if len(outputs) == 1 and entry.type in _ONNX_DTYPES]  # integers, perhaps
    chosen = next(iter((*named, *tables, *floats, *alone)), None)
    if chosen is None:
        held = ", ".join(f"{entry.name} {entry.type}" for entry in outputs)
        raise UserError(
            f"{place}: none of its outputs ({held}) is a tensor of scores [rows, classes]: convert it so that one is "
            "(zipmap=False of skl2onnx and onnxmltools)"
        )
    return str(chosen.name)


_EXTERNAL = b"\x0a\x08location\x12"  # protobuf: an entry of a tensor's external_data
_ONNX_DTYPES = {
    "tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64,
    "tensor(uint8)": torch.uint8, "tensor(int8)": torch.int8, "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
}  # fmt: skip
PROGRAMS = (ScriptNet, ExportedNet, OnnxNet)


def _in_batches(rows: Tensor, size: int | None, run: Callable[[Tensor], Any]) -> Any:
    """``run`` over all rows; where it takes exactly ``size`` at a time, the last are filled up and cut off again."""
    if size is None or len(rows) == size:
        return _tensor_of(run(rows))
    parts = []
    for part in torch.split(rows, size):
        filled = torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])]) if len(part) < size else part
        parts.append(_tensor_of(run(filled))[: len(part)])
    return torch.cat(parts)


def _tensor_of(answer: Any) -> Tensor:
    found = foreign.logits_in(answer)
    if not isinstance(found, Tensor):
        raise UserError(f"the teacher returns {type(answer).__name__}, expected a tensor of logits [rows, classes]")
    return found
