"""Files of given networks: which format they have, and how each is loaded without running a pickle."""

from __future__ import annotations

import io
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from distill_ray.errors import UserError
from distill_ray.models import foreign

Format = Literal["state_dict", "torchscript", "export", "onnx"]
_SHOWN = 3  # keys of a list in an error
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")  # of DataParallel, torch.compile, Lightning
_FETCH = "fetch or save it again"


def detect(data: bytes, place: str) -> Format:
    """What a file is, by its content; ONNX has no mark of its own and goes by its name.

    Raises:
        UserError: it is nothing that can be a network, or is cut short.
    """
    if place.partition("?")[0].lower().endswith(".onnx"):
        return "onnx"
    if not data:
        raise UserError(f"{place}: is empty: {_FETCH}")
    if _is_safetensors(data):
        return "state_dict"
    if data[:2] == b"PK":
        return _of_archive(_names(data, place))
    if data[:1] == b"\x80":  # torch.save before 1.6
        return "state_dict"
    raise UserError(
        f"{place}: is no safetensors file, torch checkpoint, TorchScript or torch.export file: say what it is with "
        "format, or check the path"
    )


def _is_safetensors(data: bytes) -> bool:
    return data[8:9] == b"{"  # after 8 bytes that say how long the JSON header is


def _names(data: bytes, place: str) -> list[str]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.namelist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{place}: is cut short or damaged ({error}): {_FETCH}") from None


def _of_archive(names: list[str]) -> Format:
    if any(re.search(r"(^|/)(archive_format|serialized_exported_program\.json)$", name) for name in names):
        return "export"
    return "torchscript" if any(name.endswith("/constants.pkl") for name in names) else "state_dict"


# --- weights --------------------------------------------------------------------------------------------------------


def read_state_dict(data: bytes, place: str, key: str | None) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a torch checkpoint; ``key`` says where in it they lie.

    Raises:
        UserError: it is damaged, holds more than tensors and plain values, or the weights cannot be found in it.
    """
    if _is_safetensors(data):
        try:
            return dict(load_tensors(data))
        except SafetensorError as error:
            raise UserError(f"{place}: is cut short or damaged ({_line(error)}): {_FETCH}") from None
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # of torch, zipfile and the unpickler
        if type(error).__name__ == "UnpicklingError" and "cut short" not in str(error):
            raise UserError(
                f"{place}: holds more than tensors, so that loading it could run code: save the weights alone with "
                f"torch.save(model.state_dict(), PATH) or safetensors (refused: {_refused(error)})"
            ) from None
        raise UserError(f"{place}: is cut short or damaged ({_line(error)[:200]}): {_FETCH}") from None
    return _weights_in(content, place, key)


def _refused(error: BaseException) -> str:
    found = re.search(r"GLOBAL ([\w.]+)|Unsupported operand \d+|Unsupported class ([\w.]+)", str(error))
    return found.group(1) or found.group(0) if found else _line(error)[:120]


def _weights_in(content: Any, place: str, key: str | None) -> dict[str, Tensor]:
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
        raise UserError(f"{place}: holds several sets of weights: choose one with teacher.key: {', '.join(inside)}")
    what = (
        f"a mapping of {', '.join(map(str, content))[:200]}" if isinstance(content, Mapping) else type(content).__name__
    )
    raise UserError(f"{place}: holds no weights, but {what}: name where they lie with teacher.key")


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


class ScriptNet(nn.Module):
    """A TorchScript file."""

    def __init__(self, data: bytes, place: str) -> None:
        super().__init__()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of the format, which users have files in
                self.script = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{place}: is no whole TorchScript file ({_line(error)[:200]}): {_FETCH}") from None

    def forward(self, x: Tensor) -> Any:
        """As the file has it."""
        return self.script(x)


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
                f"{place}: is no whole torch.export file of this torch ({_line(error)[:200]}): {_FETCH}"
            ) from None
        self._held = [module]  # not a child: it refuses train() and eval()
        self.parameter_count = sum(tensor.numel() for tensor in program.parameters())
        tensors = [*program.state_dict.values(), *program.constants.values()]
        self._device = next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))
        example = _first_input(program)
        self._dtype = None if example is None else example.dtype
        fixed = None if example is None else example.shape[0]
        self._batch = fixed if isinstance(fixed, int) else None

    def forward(self, x: Tensor) -> Any:
        """As the program has it; where it was exported for a fixed number of rows, so many at a time."""
        rows = x.to(self._device, self._dtype or x.dtype)
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
            raise UserError(f"{place}: is no whole ONNX model ({_line(error)[:200]}): {_FETCH}") from None
        if len(session.get_inputs()) != 1:
            names = ", ".join(entry.name for entry in session.get_inputs())
            raise UserError(f"{place}: has {len(session.get_inputs())} inputs ({names}), a classifier has one")
        entry = session.get_inputs()[0]
        self._session, self._name = [session], entry.name
        outputs = [output.name for output in session.get_outputs()]
        self._output = "logits" if "logits" in outputs else outputs[0]
        self._dtype = _ONNX_DTYPES.get(entry.type, torch.float32)
        self._batch = entry.shape[0] if entry.shape and isinstance(entry.shape[0], int) else None

    def forward(self, x: Tensor) -> Any:
        """The output called logits, or else the first."""

        def run(rows: Tensor) -> Any:
            answer = self._session[0].run([self._output], {self._name: rows.numpy()})[0]
            return torch.from_numpy(answer)

        return _in_batches(x.detach().cpu().to(self._dtype).contiguous(), self._batch, run).to(x.device)


_EXTERNAL = b"\x0a\x08location\x12"  # protobuf: an entry of a tensor's external_data
_ONNX_DTYPES = {
    "tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64,
    "tensor(uint8)": torch.uint8, "tensor(int32)": torch.int32, "tensor(int64)": torch.int64,
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


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
