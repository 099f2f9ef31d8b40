"""Given teachers in every format: read without pickles, turned into the data's logits, or refused in one line."""

from __future__ import annotations

import hashlib
import io
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import save as save_tensors
from torch import nn

from distill_ray import config as configs
from distill_ray import inference
from distill_ray.config import Config, InputConfig, MlpModel, ModelConfig, TeacherInput
from distill_ray.console import Reporter
from distill_ray.errors import RunError, UserError
from distill_ray.models import GivenSpec, ModelSpec, formats, load_model, save_model
from distill_ray.models.formats import OnnxNet, detect, open_program
from distill_ray.models.given import FLOOR, Member, check_kind, class_order, recognise, to_logits, unclear, usable
from distill_ray.models.weights import fill, read_state_dict
from distill_ray.stages import given
from distill_ray.stages.label import possible_precision
from distill_ray.storage import Folder
from distill_ray.store import Store
from tests import stores
from tests.harness import distill_ray, write_config
from tests.object_store import BUCKET, object_store
from tests.report_fixtures import context_of
from tests.unlabelled import write_data

SHAPE, CLASSES = stores.SHAPE, stores.CLASSES
NAMES = tuple("abcde")
MLP = {"name": "mlp", "hidden": [6]}
CPU = torch.device("cpu")
GLYPHS = torch.zeros(2, 1, 32, 32)


class Net(nn.Module):
    """The network of MLP, as somebody else would write it; ``softmax``: it gives probabilities."""

    def __init__(self, softmax: bool = False, classes: int = CLASSES, features: int = 16, hidden: int = 6) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(features, hidden), nn.Linear(hidden, classes)])
        self.softmax = softmax

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linears[1](torch.relu(self.linears[0](x.view(x.shape[0], -1))))
        answer: torch.Tensor = y.softmax(dim=1) if self.softmax else y
        return answer


def net_of(seed: int = 0, **arguments: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**arguments).eval()


def saved(value: Any) -> bytes:
    target = io.BytesIO()
    torch.save(value, target)
    return target.getvalue()


def scripted(net: nn.Module, example: torch.Tensor | None = None) -> bytes:
    target = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, torch.zeros(2, *SHAPE) if example is None else example)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, target)
    return target.getvalue()


def exported(net: nn.Module, rows: int | None = None, example: torch.Tensor | None = None) -> bytes:
    """``rows``: for exactly so many at a time."""
    batch = None if rows else ({0: torch.export.Dim("batch", min=1)},)
    example = torch.zeros(rows or 2, *SHAPE) if example is None else example
    program = torch.export.export(net, (example,), dynamic_shapes=batch)
    target = io.BytesIO()
    torch.export.save(program, target)
    return target.getvalue()


def onnx_of(
    net: Net,
    rows: int | str = "rows",
    takes: str = "FLOAT",
    labelled: bool = False,
    shape: tuple[int, ...] = SHAPE,
    classes: int = CLASSES,
) -> bytes:
    """Built by hand: torch's own exporter needs more packages. ``labelled``: as classifiers of sklearn are converted,
    the best class before the probabilities."""
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    weights = {name.replace(".", "_"): tensor.numpy() for name, tensor in net.state_dict().items()}
    nodes = [
        helper.make_node("Cast", ["x"], ["floats"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["flat"]),
        helper.make_node("Gemm", ["flat", "linears_0_weight", "linears_0_bias"], ["first"], transB=1),
        helper.make_node("Relu", ["first"], ["hidden"]),
        helper.make_node("Gemm", ["hidden", "linears_1_weight", "linears_1_bias"], ["scores"], transB=1),
    ]
    kind = onnx.TensorProto.FLOAT
    outputs = [helper.make_tensor_value_info("scores", kind, [rows, classes])]
    if labelled:
        nodes += [
            helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0),
            helper.make_node("Softmax", ["scores"], ["soft"], axis=1),
        ]
        outputs = [
            helper.make_tensor_value_info("label", onnx.TensorProto.INT64, [rows]),
            helper.make_tensor_value_info("soft", kind, [rows, classes]),
        ]
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", getattr(onnx.TensorProto, takes), [rows, *shape])], outputs,
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


WRITERS: dict[str, Callable[[Net], bytes]] = {
    "t.safetensors": lambda net: save_tensors(dict(net.state_dict())),
    "t.pth": lambda net: saved(net.state_dict()),
    "t.ckpt": lambda net: saved({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}),
    "t.pt": scripted,
    "t.pt2": exported,
    "t.onnx": onnx_of,
}
KINDS = dict(zip(WRITERS, ("state_dict",) * 3 + ("torchscript", "export", "onnx"), strict=True))


# --- from the file to logits ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return stores.make_data(tmp_path_factory.mktemp("artifacts"))


def config_of(**teacher: Any) -> Config:
    return configs.from_dict(
        {"name": "x", "data": {"source": "glyph62"}, "teacher": teacher, "student": {"model": MLP}}
    )


def made(config: Config, data: Store, folder: Path) -> tuple[Any, list[str], dict[str, Any]]:
    """What the stage does, but for Ray: the model as it is loaded from its folder, the notes, the summary."""
    place = Folder.at(folder)
    draft = given.collect(config, data.data_manifest, place)
    spec, notes = given.resolve_outputs(config, draft, place, data, CPU)
    text = spec.model_dump_json(by_alias=True)
    place.write_text("model.json", text)
    summary = given.measure(config, spec, place, data, CPU, text.encode())
    place.write_json("summary.json", summary)
    return load_model(place, allow_import=True), notes, summary


def rows_of(data: Store) -> torch.Tensor:
    return torch.from_numpy(data.data_shard(data.manifest.splits["train"].shards[0]).inputs.copy())


def normalised(raw: torch.Tensor) -> torch.Tensor:
    return (raw.float() / 255 - 0.5) / 0.5


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_networks_logits(name: str, data: Store, tmp_path: Path) -> None:
    net = net_of()
    path = tmp_path / name
    path.write_bytes(WRITERS[name](net))
    assert detect(path.read_bytes(), str(path)) == KINDS[name]
    model: dict[str, Any] = {"model": MLP} if KINDS[name] == "state_dict" else {}
    model |= {"format": "export"} if KINDS[name] == "export" else {}
    loaded, notes, summary = made(config_of(checkpoint=str(path), **model), data, tmp_path / "folder")
    raw = rows_of(data)
    with torch.no_grad():
        assert torch.allclose(loaded(raw), net(normalised(raw)), atol=1e-5)
    assert notes == []
    assert summary["parameters"] == (None if name.endswith("onnx") else 16 * 6 + 6 + 6 * CLASSES + CLASSES)
    assert summary["given"][0] == {"checkpoint": str(path), "format": KINDS[name], "output": "logits"}
    assert possible_precision(loaded, "auto") == ("auto" if KINDS[name] == "state_dict" else "fp32")
    if KINDS[name] != "state_dict":
        with pytest.raises(UserError, match="labels.precision bf16: a teacher given as a program"):
            possible_precision(loaded, "bf16")
    assert not loaded.training


@pytest.mark.parametrize("name", ["t.pt2", "t.onnx"])
def test_a_program_for_a_fixed_number_of_rows_runs_any(name: str, tmp_path: Path) -> None:
    net = net_of()
    content = exported(net, rows=4) if name == "t.pt2" else onnx_of(net, rows=4)
    program = open_program(content, KINDS[name], name)
    for rows in (1, 4, 11):
        x = torch.randn(rows, *SHAPE)
        with torch.no_grad():
            assert torch.allclose(program(x), net(x), atol=1e-5)


@pytest.mark.parametrize("takes", ["UINT8", "INT64"])
def test_a_program_that_takes_integers_gets_the_rows_own_numbers(takes: str, data: Store, tmp_path: Path) -> None:
    """Not ones that were normalised and then cut to -1, 0 and 1."""
    pytest.importorskip("onnxruntime")
    net, raw = net_of(), rows_of(data)
    path = tmp_path / "t.onnx"
    path.write_bytes(onnx_of(net, takes=takes))
    loaded, notes, _ = made(config_of(checkpoint=str(path)), data, tmp_path / "folder")
    with torch.no_grad():
        assert torch.allclose(loaded(raw), net(raw.float()), rtol=1e-4, atol=1e-3)
    assert notes == [f"{path}: takes {takes.lower()} numbers, those of the rows as they are"]
    scaled = {"scale": 1.5, "mean": [0.0], "std": [1.0]}
    loaded, notes, _ = made(config_of(checkpoint=str(path), input=scaled), data, tmp_path / "scaled")
    seen = (raw.float() * 1.5).round()
    with torch.no_grad():
        expected = net(seen.clamp(0, 255) if takes == "UINT8" else seen)
        assert torch.allclose(loaded(raw), expected, rtol=1e-4, atol=1e-3)
    assert notes == []
    config = config_of(checkpoint=str(path))
    draft = given.collect(config, data.data_manifest, Folder.at(tmp_path / "folder"))
    with pytest.raises(
        UserError, match=r"teacher.input.scale: .*t.onnx takes .* numbers, and the data has float32: say"
    ):
        given.resolve_outputs(
            config, draft.model_copy(update={"dtype": "float32"}), Folder.at(tmp_path / "folder"), data, CPU
        )


def test_an_onnx_classifier_that_gives_its_best_class_first(data: Store, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "t.onnx"
    path.write_bytes(onnx_of(net_of(), labelled=True))
    loaded, notes, _ = made(config_of(checkpoint=str(path)), data, tmp_path / "folder")
    raw = rows_of(data)
    with torch.no_grad():
        assert torch.allclose(loaded(raw), net_of()(normalised(raw)).log_softmax(dim=1), atol=1e-4)
    assert notes == [f"{path}: its outputs are probabilities (8 rows looked at)"]


def test_which_output_of_an_onnx_model_holds_the_scores() -> None:
    def output(name: str, kind: str, *shape: Any) -> SimpleNamespace:
        return SimpleNamespace(name=name, type=kind, shape=list(shape))

    label, whole = output("label", "tensor(int64)", "N"), output("whole", "tensor(int8)", "N", 5)
    features, scores = output("features", "tensor(float)", "N", 8, 4, 4), output("scores", "tensor(float)", "N", 5)
    logits, soft = output("logits", "tensor(float16)", "N", 5), output("probabilities", "tensor(float)", "N", 5)
    mapped = output("output_probability", "seq(map(int64,tensor(float)))")
    for outputs, chosen in (
        ([label, scores], "scores"), ([features, scores], "scores"), ([features], "features"), ([whole], "whole"),
        ([scores, logits], "logits"), ([scores, soft], "probabilities"), ([soft, logits], "logits"),
    ):  # fmt: skip
        assert formats._scores(outputs, "t.onnx") == chosen
    with pytest.raises(UserError, match=r"t.onnx: none of its outputs \(label tensor\(int64\), .*zipmap=False"):
        formats._scores([label, mapped], "t.onnx")


def test_a_half_precision_script_gets_half_precision_rows(data: Store, tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    path.write_bytes(scripted(net_of().half(), torch.zeros(2, *SHAPE).half()))
    loaded, _, _ = made(config_of(checkpoint=str(path)), data, tmp_path / "folder")
    raw = rows_of(data)
    with torch.no_grad():
        assert torch.allclose(loaded(raw), net_of()(normalised(raw)), atol=5e-3)


class Dropping(nn.Module):
    """Own code that asks for dropout whatever the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net_of()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(nn.functional.dropout(x, 0.1))  # type: ignore[no-any-return]


def with_batch_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: scripted(nn.Sequential(net_of(), nn.Dropout(0.1)).train()), "t.pt"),
        (lambda: scripted(with_batch_norm().train()), "t.pt"),
        (lambda: exported(with_batch_norm().train(), rows=4), "t.pt2"),
        (lambda: scripted(Dropping().eval()), "t.pt"),
    ],
    ids=["dropout", "batch norm", "batch norm of a fixed batch", "own dropout"],
)
def test_a_network_in_train_mode_is_refused(make: Callable[[], bytes], name: str, data: Store, tmp_path: Path) -> None:
    """Its labels would hang on chance, or on the rows that are labelled together."""
    path = tmp_path / name
    path.write_bytes(make())
    config = config_of(checkpoint=str(path), **({"format": "export"} if name == "t.pt2" else {}))
    with pytest.raises(UserError, match=r"teacher: its answer for a row depends on chance .* call eval\(\) before"):
        made(config, data, tmp_path / "folder")
    path.write_bytes(scripted(with_batch_norm().eval()))
    made(config_of(checkpoint=str(path)), data, tmp_path / "other")


def test_probabilities_are_recognised_said_and_become_logits(data: Store, tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    path.write_bytes(scripted(net_of(softmax=True)))
    loaded, notes, _ = made(config_of(checkpoint=str(path)), data, tmp_path / "folder")
    raw = rows_of(data)
    with torch.no_grad():
        expected = net_of()(normalised(raw)).log_softmax(dim=1)
        assert torch.allclose(loaded(raw), expected, atol=1e-5)
    assert notes == [f"{path}: its outputs are probabilities (8 rows looked at)"]
    with pytest.raises(UserError, match=r"teacher.output log_probabilities: row 0 is none: it sums to"):
        made(config_of(checkpoint=str(path), output="log_probabilities"), data, tmp_path / "other")
    path.write_bytes(scripted(net_of()))
    with pytest.raises(UserError, match=r"teacher.output probabilities: row 0 is none: .* set it to auto or logits"):
        made(config_of(checkpoint=str(path), output="probabilities"), data, tmp_path / "other")


def test_recognise() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.2, 0.3, 0.4]])
    assert recognise(logits) == "logits"
    assert recognise(logits.softmax(dim=1)) == "probabilities"
    assert recognise(logits.softmax(dim=1).half().float()) == "probabilities"
    assert recognise(logits.log_softmax(dim=1)) == "log_probabilities"
    assert recognise(torch.cat([logits.softmax(dim=1), logits])) == "logits"
    assert recognise(torch.tensor([[0.3, 0.4, 0.5]])) == "logits"  # within [0, 1], but not of sum 1
    assert unclear(logits) is None
    assert unclear(logits.softmax(dim=1)) is None


def test_outputs_of_sigmoids_are_asked_about(data: Store, tmp_path: Path) -> None:
    """Within [0, 1], and no probabilities of one class: as logits they would differ by 1 nat at most."""
    told = unclear(torch.tensor([[0.3, 0.4, 0.5], [0.9, 0.8, 0.1]]))
    assert told is not None
    assert "do not sum to 1" in told
    path = tmp_path / "t.pt"
    path.write_bytes(scripted(nn.Sequential(net_of(), nn.Sigmoid()).eval()))
    with pytest.raises(UserError, match=r"teacher.output: .* as those of a sigmoid .* or say logits") as caught:
        made(config_of(checkpoint=str(path)), data, tmp_path / "folder")
    assert "\n" not in str(caught.value)
    _, _, summary = made(config_of(checkpoint=str(path), output="logits"), data, tmp_path / "other")
    assert summary["given"][0]["output"] == "logits"


def test_rounded_probabilities_are_asked_about_and_taken_at_their_word() -> None:
    """Three decimals of ten classes: the sums are off by more than arithmetic explains."""
    soft = torch.tensor([[0.9164] + [0.0094] * 8 + [0.0084]]).round(decimals=3)
    assert abs(float(soft.sum()) - 1) > 1e-3
    assert "if they were rounded" in (unclear(soft) or "")
    assert check_kind(soft, "probabilities") is None
    assert check_kind(torch.tensor([[0.5, 0.6]]), "probabilities") == 0


def test_a_probability_of_zero_gets_a_floor() -> None:
    logits = to_logits(torch.tensor([[1.0, 0.0, 0.0]]), "probabilities")
    assert torch.isfinite(logits).all()
    assert logits[0].tolist() == pytest.approx([0.0, np.log(FLOOR), np.log(FLOOR)], rel=1e-6)
    assert not torch.isfinite(to_logits(torch.tensor([[float("nan"), 1.0]]), "probabilities")).all()


def test_the_logarithm_of_a_zero_gets_the_same_floor(data: Store, tmp_path: Path) -> None:
    logs = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).log()
    assert usable(logs, "auto").tolist() == usable(logs, "log_probabilities").tolist() == [True, True]
    assert usable(logs, "logits").tolist() == usable(torch.cat([logs, logs + 1]), "auto").tolist()[:2] == [False, True]
    assert to_logits(logs, recognise(logs))[0].tolist() == pytest.approx([0.0, np.log(FLOOR)], rel=1e-6)

    class Sure(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            best = x.flatten(1)[:, :CLASSES].argmax(dim=1)
            return nn.functional.one_hot(best, CLASSES).float().log()

    path = tmp_path / "t.pt"
    path.write_bytes(scripted(Sure().eval()))
    loaded, notes, _ = made(config_of(checkpoint=str(path)), data, tmp_path / "folder")
    assert notes == [f"{path}: its outputs are log-probabilities (8 rows looked at)"]
    with torch.no_grad():
        assert loaded(rows_of(data)).unique().tolist() == pytest.approx([np.log(FLOOR), 0.0], rel=1e-6)


def test_classes_in_another_order_and_more_of_them(data: Store, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    net = net_of(classes=7)
    path.write_bytes(save_tensors(dict(net.state_dict())))
    config = config_of(checkpoint=str(path), model=MLP, classes=["x", "e", "d", "c", "b", "a", "y"])
    loaded, notes, _ = made(config, data, tmp_path / "folder")
    raw = rows_of(data)
    with torch.no_grad():
        assert torch.allclose(loaded(raw), net(normalised(raw))[:, [5, 4, 3, 2, 1]], atol=1e-5)
    assert notes == [f"{path}: 2 of its 7 classes are not in the data"]


@pytest.mark.parametrize(
    ("outputs", "width", "told"),
    [
        (None, 7, r"teacher: gives 7 numbers a row, the data has 5 classes: name its outputs in teacher.classes"),
        (None, 1, r"teacher: gives 1 numbers a row, the data has 5 classes"),
        (tuple("abcd"), 5, r"teacher.classes: 4 names, but it gives 5 numbers a row"),
        (tuple("abcdd"), 5, r"teacher.classes: 'd' stands there twice"),
        (tuple("abcdx"), 5, r"teacher.classes: 'e' is a class of the data, but none of the teacher's \(1 such\)"),
    ],
)
def test_other_classes_are_refused(outputs: tuple[str, ...] | None, width: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        class_order(outputs, width, NAMES, "teacher")


def test_a_single_output_for_two_classes_is_told_what_can_be_done() -> None:
    with pytest.raises(
        UserError, match=r"let the network return two, \[0, z\] for its logit z of 'dog', or \[1 - p, p\]"
    ):
        class_order(None, 1, ("cat", "dog"), "teacher")


def test_classes_in_the_same_order_are_left_alone() -> None:
    assert class_order(None, 5, NAMES, "teacher") is None
    assert class_order(NAMES, 5, NAMES, "teacher") is None
    assert config_of(checkpoint="/t.pt", classes=[0, 1]).teacher.classes == ("0", "1")  # YAML's numbers are names


def test_its_own_preprocessing(tmp_path: Path) -> None:
    """Grey to three channels, numbers per channel, then larger: against torch's own functions."""
    seen: list[torch.Tensor] = []

    class Look(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.flatten(1)[:, :CLASSES]

    contract = TeacherInput(scale=0.5, mean=(1.0, 2.0, 3.0), std=(1.0, 2.0, 4.0), channels=3, resize=(7, 9))
    raw = torch.randint(0, 256, (3, *SHAPE), dtype=torch.uint8)
    Member(Look(), contract, SHAPE, "logits", None, ours=False)(raw)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (contract.mean, contract.std))
    expected = (raw.float().repeat(1, 3, 1, 1) * 0.5 - mean) / std
    expected = nn.functional.interpolate(expected, (7, 9), mode="bilinear", antialias=True)
    assert torch.allclose(seen[0], expected, atol=1e-4)
    assert seen[0].is_contiguous()
    for wrong, told in ((TeacherInput(channels=3), "input.channels 3"), (TeacherInput(mean=(1.0, 2.0)), "input.mean")):
        with pytest.raises(UserError, match=told):
            Member(Look(), wrong, (2, 4, 4) if wrong.channels else SHAPE, "logits", None, ours=False)


def test_what_its_input_leaves_out_is_the_datas(data: Store, tmp_path: Path) -> None:
    """Not numbers that are said nowhere: a wish of a resize alone keeps the data's mean."""
    theirs = InputConfig(scale=1.0, mean=(3.0,), std=(7.0,))
    other = Store(data.folder, data.data_manifest.model_copy(update={"input": theirs}))
    net, raw = net_of(), rows_of(data)
    (tmp_path / "t.pt").write_bytes(scripted(net))
    (tmp_path / "t.safetensors").write_bytes(save_tensors(dict(net.state_dict())))
    for number, (given_input, seen) in enumerate(
        [
            ({"resize": [4, 4]}, (raw.float() - 3) / 7),
            ({"mean": [2.0]}, (raw.float() - 2) / 7),
            ({"std": [5.0], "scale": 0.5}, (raw.float() / 2 - 3) / 5),
            ({"scale": 0.5, "mean": [1.0], "std": [2.0]}, (raw.float() / 2 - 1) / 2),
        ]
    ):  # fmt: skip
        for name, model in (("t.pt", {}), ("t.safetensors", {"model": MLP})):
            config = config_of(checkpoint=str(tmp_path / name), input=given_input, **model)
            loaded, _, _ = made(config, other, tmp_path / f"{number}-{name}")
            with torch.no_grad():
                assert torch.allclose(loaded(raw), net(seen), atol=1e-3)


def test_a_folder_of_another_shape_keeps_its_contract_where_it_is_resized(data: Store, tmp_path: Path) -> None:
    """As the error says that refuses it without."""
    spec = ModelSpec(
        model=MlpModel.model_validate(MLP), input=InputConfig(scale=0.5, mean=(1.0,), std=(4.0,)), shape=(1, 2, 2),
        dtype="uint8", classes=CLASSES, class_names=data.manifest.class_names,
    )  # fmt: skip
    torch.manual_seed(0)
    student = spec.build().eval()
    save_model(Folder.at(tmp_path / "student"), spec, student.net.state_dict())
    with pytest.raises(UserError, match=r"takes rows of \[1, 2, 2\], the data has \[1, 4, 4\]: give teacher.input"):
        made(config_of(checkpoint=str(tmp_path / "student")), data, tmp_path / "folder")
    config = config_of(checkpoint=str(tmp_path / "student"), input={"resize": [2, 2]})
    loaded, _, _ = made(config, data, tmp_path / "folder")
    small = nn.functional.interpolate(rows_of(data).float(), (2, 2), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert torch.allclose(loaded(rows_of(data)), student(small), atol=1e-4)


def test_a_whole_input_still_names_the_same_folder() -> None:
    whole = {"scale": 0.5, "mean": [0.1], "std": [0.2], "channels": 3, "resize": [8, 8]}
    payload = configs.digest_payload(config_of(checkpoint="/t.pt", input=whole).teacher)
    assert payload["input"] == {**whole, "interpolation": "bilinear"}


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_an_ensemble_is_the_weighted_average(average: str, data: Store, tmp_path: Path) -> None:
    nets = [net_of(seed) for seed in range(2)]
    (tmp_path / "a.pt").write_bytes(scripted(nets[0]))
    (tmp_path / "b.safetensors").write_bytes(save_tensors(dict(nets[1].state_dict())))
    second = {"checkpoint": str(tmp_path / "b.safetensors"), "model": MLP, "output": "logits"}  # all within [0, 1]
    members = [{"checkpoint": str(tmp_path / "a.pt")}, second]
    config = config_of(ensemble=members, weights=[3, 1], average=average)
    loaded, _, summary = made(config, data, tmp_path / "folder")
    raw = rows_of(data)
    with torch.no_grad():
        one, two = (net(normalised(raw)) for net in nets)
        if average == "logits":
            expected = 0.75 * one + 0.25 * two
        else:
            expected = (0.75 * one.softmax(1) + 0.25 * two.softmax(1)).log()
        assert torch.allclose(loaded(raw), expected, atol=1e-5)
    assert set(summary["files"]) == {"model.pt", "model-1.safetensors", "model.json"}


def test_a_finished_folder_is_a_teacher(data: Store, tmp_path: Path) -> None:
    from distill_ray.config import MlpModel
    from distill_ray.models import ModelSpec, save_model

    spec = ModelSpec(
        model=MlpModel(name="mlp", hidden=(6,)), input=InputConfig(scale=0.01), shape=SHAPE, dtype="uint8",
        classes=CLASSES, class_names=tuple("edcba"),
    )  # fmt: skip
    student = spec.build().eval()
    save_model(Folder.at(tmp_path / "student"), spec, student.net.state_dict())
    loaded, _, _ = made(config_of(checkpoint=str(tmp_path / "student")), data, tmp_path / "folder")
    raw = rows_of(data)
    with torch.no_grad():
        assert torch.allclose(loaded(raw), student(raw).flip(1), atol=1e-4)


def test_the_pretrained_folder_that_named_its_architecture_is_not_needed_again(data: Store, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
             "patch_size": 2}  # fmt: skip
    vit = {"name": "transformers", "model": "vit", "kwargs": sizes}
    spec = ModelSpec(
        model=TypeAdapter(ModelConfig).validate_python(vit), input=InputConfig(), shape=SHAPE, dtype="uint8",
        classes=CLASSES, class_names=tuple("abcde"),
    )  # fmt: skip
    net = spec.build().net.eval()
    net.save_pretrained(tmp_path / "vit")  # type: ignore[operator]
    (tmp_path / "vit" / "model.safetensors").unlink()  # sizes are all that is asked of it
    path = tmp_path / "t.safetensors"
    path.write_bytes(save_tensors(dict(net.state_dict())))
    model = {"name": "transformers", "model": "vit", "pretrained": str(tmp_path / "vit")}
    made(config_of(checkpoint=str(path), model=model, output="logits"), data, tmp_path / "folder")
    shutil.rmtree(tmp_path / "vit")
    raw = rows_of(data)
    with torch.no_grad():
        assert torch.allclose(load_model(str(tmp_path / "folder"))(raw), net((raw / 255 - 0.5) / 0.5).logits, atol=1e-4)


def test_the_accuracy_is_measured_and_compared_with_the_largest_class(data: Store, tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    path.write_bytes(scripted(net_of()))
    loaded, _, summary = made(config_of(checkpoint=str(path)), data, tmp_path / "folder")
    shards = [data.data_shard(record) for record in data.manifest.splits["test"].shards]
    labels = np.concatenate([shard.labels for shard in shards])
    with torch.no_grad():
        best = loaded(torch.from_numpy(np.concatenate([shard.inputs for shard in shards]))).argmax(dim=1).numpy()
    assert summary["measured"] == {
        "accuracy": pytest.approx((best == labels).mean()), "rows": len(labels), "split": "test",
        "majority": pytest.approx(np.bincount(labels).max() / len(labels)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("accuracy", "majority", "poor"),
    [(0.48, 0.001, False), (0.9, 0.8, False), (0.82, 0.8, True), (0.25, 0.1, True), (0.62, 0.5, True), (1, 1, False)],
)
def test_poor_is_what_hardly_beats_the_largest_class(
    accuracy: float, majority: float, poor: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not half of a thousand classes, nor nine tenths where eight are of one class."""
    context = context_of(tmp_path)
    context.reporter = Reporter(quiet=False)
    measured = {"accuracy": accuracy, "rows": 9, "split": "test", "majority": majority}
    given.tell(context, {"macro_f1": 0.1234, "measured": measured})
    told = capsys.readouterr().err
    assert f"accuracy {accuracy:.4f} on the 9 labelled rows" in told
    assert "macro F1 0.1234" in told
    assert ("that is poor" in told) == poor
    given.tell(context, {"macro_f1": 0.1234, "measured": measured | {"split": "train"}})
    assert "macro F1" not in capsys.readouterr().err  # it is that of the test split


def test_an_onnx_teachers_latency_is_that_of_one_thread(
    data: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "t.onnx"
    seen: list[int] = []
    path.write_bytes(onnx_of(net_of()))

    def note(model: nn.Module, example: torch.Tensor, device: torch.device) -> float:
        sessions = [module._session[0] for module in model.modules() if isinstance(module, OnnxNet)]
        seen.extend(session.get_session_options().intra_op_num_threads for session in sessions)
        return 1.0

    monkeypatch.setattr(inference, "latency_ms", note)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        made(config_of(checkpoint=str(path)), data, tmp_path / "folder")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


def test_a_file_that_is_overwritten_in_place_is_another_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size, within a second, in one process; on a disk with its old times, too."""
    import os

    path = tmp_path / "t.pt"
    path.write_bytes(b"a" * 64)
    before, times = given.content_sha256(str(path), "k"), path.stat()
    path.write_bytes(b"b" * 64)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert given.content_sha256(str(path), "k") != before
    with object_store() as store:
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        client, place = store.client(), f"s3://{BUCKET}/teachers/t.pt"
        client.put_object(Bucket=BUCKET, Key="teachers/t.pt", Body=b"a" * 64)
        assert given.content_sha256(place, "k") == before
        hits = given._sha256.cache_info().hits
        assert given.content_sha256(place, "k") == before
        assert given._sha256.cache_info().hits == hits + 1  # it is not fetched again
        client.put_object(Bucket=BUCKET, Key="teachers/t.pt", Body=b"b" * 64)
        assert given.content_sha256(place, "k") == hashlib.sha256(b"b" * 64).hexdigest()
        with pytest.raises(UserError, match="no such file"):
            given.content_sha256(f"s3://{BUCKET}/teachers/gone.pt", "k")


# --- what is refused ------------------------------------------------------------------------------------------------


class Harmful:
    """Unpickling it would run something."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must not be printed",)


def test_a_pickle_that_runs_code_is_refused_with_the_mend(capsys: pytest.CaptureFixture[str]) -> None:
    content = saved({"state_dict": net_of().state_dict(), "model": Harmful()})
    with pytest.raises(UserError, match=r"holds more than tensors.*torch.save\(model.state_dict\(\), PATH\)") as caught:
        read_state_dict(content, "/t.pt", None)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_whole_pickled_model_is_refused_too() -> None:
    with pytest.raises(UserError, match="holds more than tensors"):
        read_state_dict(saved(net_of()), "/t.pt", None)


def test_an_exported_program_is_code_that_needs_permission(data: Store, tmp_path: Path) -> None:
    """torch evaluates text of the file while it loads it."""
    path = tmp_path / "t.pt2"
    path.write_bytes(exported(net_of()))
    with pytest.raises(UserError, match=r"is a torch.export program, .* set teacher.format=export and say --allow"):
        made(config_of(checkpoint=str(path)), data, tmp_path / "folder")
    config = config_of(checkpoint=str(path), format="export")
    with pytest.raises(UserError, match="teacher.format: export is code that would run here"):
        configs.refuse_imports(config)
    made(config, data, tmp_path / "folder")
    with pytest.raises(UserError, match="allow_import=True"):
        load_model(Folder.at(tmp_path / "folder"))


def test_a_folder_keeps_its_contract_beside_another_model(data: Store, tmp_path: Path) -> None:
    """The config's model takes the place of the folder's alone: not of its classes, nor of its input."""
    classes = list(data.manifest.class_names)
    spec = ModelSpec(
        model=MlpModel.model_validate(MLP), input=InputConfig(mean=(0.25,)), shape=SHAPE, dtype="uint8",
        classes=CLASSES, class_names=tuple(classes[::-1]),
    )  # fmt: skip
    save_model(Folder.at(tmp_path / "theirs"), spec, spec.build().net.state_dict())
    with_model, _, _ = made(config_of(checkpoint=str(tmp_path / "theirs"), model=MLP), data, tmp_path / "a")
    without, _, _ = made(config_of(checkpoint=str(tmp_path / "theirs")), data, tmp_path / "b")
    raw = rows_of(data)
    with torch.no_grad():
        assert torch.equal(with_model(raw), without(raw))


def test_an_export_that_hides_a_pickle_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """torch.export.load falls back to unpickling where the weights alone cannot be read."""
    import zipfile

    source = zipfile.ZipFile(io.BytesIO(exported(net_of())))
    target = io.BytesIO()
    changed = 0
    with zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            content = source.read(name)
            if content[:2] == b"PK":  # sample inputs and the like, in torch.save's form
                content, changed = saved(((Harmful(),), {})), changed + 1
            archive.writestr(name, content)
    assert changed
    with pytest.raises(UserError, match="is no whole torch.export file"):
        open_program(target.getvalue(), "export", "/t.pt2")
    assert "this must not be printed" not in capsys.readouterr().out


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kept", [0, 9, 300, -40])
def test_a_file_cut_short_is_one_line(name: str, kept: int, data: Store, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(WRITERS[name](net_of())[:kept])
    model = {"model": MLP} if KINDS[name] == "state_dict" else {}
    with pytest.raises(UserError) as caught:
        made(config_of(checkpoint=str(path), **model), data, tmp_path / "folder")
    assert str(path) in str(caught.value) or str(tmp_path / "folder") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_onnx_model_in_several_files_is_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(onnx_of(net_of()))
    path = tmp_path / "t.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(UserError, match="t.onnx: keeps its weights in other files: save it as one file"):
        open_program(path.read_bytes(), "onnx", str(path))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("linears.1.bias"), r"1 missing: linears.1.bias: check teacher.model"),
        (lambda w: w.update(head=torch.zeros(2)), r"1 unexpected: head"),
        (
            lambda w: w.update({"linears.0.bias": torch.zeros(9)}),
            r"1 of another shape: linears.0.bias \(\[9\] in the file, \[6\] in the model\)",
        ),
    ],
)
def test_keys_that_do_not_fit_are_listed(change: Callable[[dict[str, Any]], Any], told: str) -> None:
    weights = dict(net_of().state_dict())
    change(weights)
    with pytest.raises(UserError, match=told):
        fill(Net(), weights, "/t.pt")


def test_where_the_weights_lie_is_found_or_asked_for() -> None:
    weights = dict(net_of().state_dict())
    for content, key in (
        (weights, None), ({"model": weights, "optimizer": {"lr": 1}}, None), ({"a": {"b": weights}}, "a.b"),
        ({"model": weights, "ema": weights}, "ema"),
    ):  # fmt: skip
        assert read_state_dict(saved(content), "/t.pt", key).keys() == weights.keys()
    for content, key, told in (
        (
            {"model": weights, "ema": weights},
            None,
            r"sets of weights \(model, ema\): name where they lie",
        ),
        ({"a": {"b": weights}}, None, "holds no weights, but a mapping of a: name where they lie with teacher.key"),
        ({"a": {"b": weights}}, "a.c", "teacher.key a.c: /t.pt has no 'c' there, only: b"),
    ):
        with pytest.raises(UserError, match=told):
            read_state_dict(saved(content), "/t.pt", key)


def test_outputs_that_are_not_finite_name_the_row(data: Store, tmp_path: Path) -> None:
    net = net_of()
    with torch.no_grad():
        net.linears[1].bias[0] = float("nan")  # type: ignore[operator]
    (tmp_path / "t.pt").write_bytes(scripted(net))
    with pytest.raises(RunError, match=r"not finite for row 0 \(8 of 8 rows\)"):
        made(config_of(checkpoint=str(tmp_path / "t.pt")), data, tmp_path / "folder")


def test_changed_files_are_refused_when_they_are_loaded(data: Store, tmp_path: Path) -> None:
    (tmp_path / "t.pt").write_bytes(scripted(net_of()))
    made(config_of(checkpoint=str(tmp_path / "t.pt")), data, tmp_path / "folder")
    stores.flip_byte(tmp_path / "folder" / "model.pt")
    with pytest.raises(UserError, match=r"model.pt: damaged \(its checksum is another\)"):
        load_model(str(tmp_path / "folder"))
    spec = tmp_path / "folder" / "model.json"
    spec.write_text(spec.read_text().replace('"logits"', '"probabilities"'))
    with pytest.raises(UserError, match=r"model.json: damaged, or not the weights that were asked for"):
        load_model(str(tmp_path / "folder"))
    assert GivenSpec.model_validate_json(spec.read_bytes()).members[0].file == "model.pt"


@pytest.mark.parametrize(
    ("teacher", "told"),
    [
        (
            {"ensemble": [{"chekpoint": "/t.pt"}]},
            "teacher.ensemble.0.chekpoint: unknown key, did you mean 'checkpoint'",
        ),
        ({"ensemble": [{"format": "onnx"}]}, "teacher.ensemble.0.checkpoint: is missing"),
        ({"checkpoint": "/t.pt", "input": {"scale": 0}}, "teacher.input.scale"),
        ({}, "teacher: needs a model to train, a checkpoint that is trained already, or labels.from"),
        ({"checkpoint": "/t.pt", "train": {"epochs": 2}}, "a given teacher is not trained: remove train"),
        ({"model": MLP, "output": "probabilities"}, "output is for a given teacher: add its checkpoint"),
        ({"ensemble": [{"checkpoint": "/t.pt"}], "checkpoint": "/u.pt"}, "ensemble: its members have a checkpoint"),
        ({"ensemble": [{"checkpoint": "/t.pt"}], "weights": [1, 2]}, "weights: 2 numbers for 1 members"),
        ({"ensemble": [{"checkpoint": "/t.pt"}], "output": "logits"}, "belong to its members"),
        ({"checkpoint": "/t.pt", "average": "probabilities"}, "weights and average are those of an ensemble"),
    ],
)
def test_contradictions_are_refused_by_the_config(teacher: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        config_of(**teacher)


def test_missing_files_and_missing_models(data: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher.checkpoint .*gone.pt: no such file"):
        given.check_present(config_of(checkpoint=str(tmp_path / "gone.pt")))
    with pytest.raises(UserError, match=r"teacher.model.import no_pkg.nets:x: there is no module no_pkg.nets"):
        given.check_present(config_of(model={"import": "no_pkg.nets:x"}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"teacher.checkpoint .*empty: no trained model is in this folder"):
        given.check_present(config_of(checkpoint=str(tmp_path / "empty")))
    path = tmp_path / "t.pth"
    path.write_bytes(saved(net_of().state_dict()))
    with pytest.raises(UserError, match=r"teacher.model: is missing: .*t.pth holds weights alone"):
        made(config_of(checkpoint=str(path)), data, tmp_path / "folder")
    path.write_bytes(scripted(net_of()))
    with pytest.raises(UserError, match=r"teacher.model: .*t.pth is a torchscript file, which is a whole network"):
        made(config_of(checkpoint=str(path), model=MLP), data, tmp_path / "folder")
    path.write_text("hello, this is no model")
    with pytest.raises(
        UserError, match=r"t.pth: is no safetensors file, torch checkpoint, TorchScript or torch.export"
    ):
        made(config_of(checkpoint=str(path), model=MLP), data, tmp_path / "folder")


def test_the_folder_is_named_by_content_not_by_place(tmp_path: Path) -> None:
    from distill_ray.artifacts import Stage
    from distill_ray.stages import teacher

    out = Folder.at(tmp_path / "out")
    data = Stage("data", "da7a" * 4, out / "artifacts" / "data")
    places = [tmp_path / name for name in ("a.pt", "b.pt", "c.pt")]
    for place, net in zip(places, (net_of(), net_of(), net_of(1)), strict=True):
        place.write_bytes(scripted(net))
    places[1].write_bytes(places[0].read_bytes())
    one, same, other = (teacher.locate(config_of(checkpoint=str(p)), out, data).digest for p in places)
    assert one == same != other
    said = teacher.locate(config_of(checkpoint=str(places[0]), output="logits"), out, data).digest
    assert said != one


@pytest.mark.parametrize(
    ("make", "code", "told"),
    [
        (lambda: scripted(glyph_net(7), GLYPHS), 2, "teacher: gives 7 numbers a row, the data has 62"),
        (lambda: scripted(glyph_net(62, nan=True), GLYPHS), 1, "not finite for row 0 (256 of 256 rows)"),
        (lambda: scripted(glyph_net(62), GLYPHS)[:-99], 2, "t.pt: is cut short or damaged"),
    ],
    ids=["other classes", "nan", "cut short"],
)
def test_the_command_tells_it_in_one_line(make: Callable[[], bytes], code: int, told: str, tmp_path: Path) -> None:
    """From the worker, too, where two of them are found."""
    (tmp_path / "t.pt").write_bytes(make())
    raw = {
        "name": "x", "data": {"source": "glyph62", "rows": 620, "shard_rows": 256},
        "teacher": {"checkpoint": str(tmp_path / "t.pt")}, "student": {"model": MLP},
    }  # fmt: skip
    write_data(configs.from_dict(raw), tmp_path / "runs", lambda split, ids: ids >= 0)
    done = distill_ray("label", write_config(tmp_path, raw), "--out", tmp_path / "runs", "--quiet")
    assert (done.code, done.stdout) == (code, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert told in line
    assert not list(tmp_path.glob("runs/artifacts/*/summary.json"))


def glyph_net(classes: int, nan: bool = False) -> nn.Module:
    last = nn.Linear(1024, classes)
    if nan:
        last.bias.data[3] = float("nan")
    return nn.Sequential(nn.Flatten(), last).eval()
