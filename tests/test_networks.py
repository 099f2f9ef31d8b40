"""resnet, and the networks of timm and transformers: by name, from local files alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file

import distill_ray
from distill_ray import config as configs
from distill_ray.artifacts import stage
from distill_ray.config import AnyModel, CeLoss, InputConfig, ModelConfig, TrainConfig
from distill_ray.errors import UserError
from distill_ray.footprint import step_bytes
from distill_ray.models import ModelSpec, load_classifier, read_spec, save_model
from distill_ray.models.classifier import check_output, count_parameters
from distill_ray.stages import given, tune
from distill_ray.stages.export import largest_difference, to_program
from distill_ray.stages.search_space import Inputs
from distill_ray.storage import Folder
from distill_ray.store import SplitArrays
from distill_ray.training import FitSpec, Worker, fit

SHAPE, CLASSES = (3, 16, 16), 5
HERE = {name: importlib.util.find_spec(name) is not None for name in ("timm", "transformers")}
VIT = {
    "name": "transformers", "model": "vit",
    "kwargs": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
               "patch_size": 8},
}  # fmt: skip


def model_of(**keys: Any) -> AnyModel:
    model: AnyModel = TypeAdapter(ModelConfig).validate_python(keys)
    return model


def spec_of(model: AnyModel, shape: tuple[int, ...] = SHAPE, classes: int = CLASSES) -> ModelSpec:
    return ModelSpec(
        model=model, input=InputConfig(), shape=shape, dtype="uint8", classes=classes,
        class_names=tuple(map(str, range(classes))),
    )  # fmt: skip


def raw(rows: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randint(0, 256, (rows, *shape), dtype=torch.uint8)


def test_resnet_has_the_papers_parameters() -> None:
    """Section 4.2 with n = 3 on CIFAR-10 (ResNet-20): 0.27 M; here with 1x1 shortcuts where the width changes."""
    net = spec_of(model_of(name="resnet", blocks=3, norm="batch"), (3, 32, 32), 10).build()
    convolutions = 3 * 9 * 16 + 6 * 9 * 16 * 16 + 9 * 16 * 32 + 5 * 9 * 32 * 32 + 9 * 32 * 64 + 5 * 9 * 64 * 64
    shortcuts = 16 * 32 + 32 * 64
    norms = 2 * (16 * 7 + 32 * 7 + 64 * 7)  # scale and shift, the shortcuts' among them
    assert count_parameters(net) == convolutions + shortcuts + norms + 64 * 10 + 10
    assert count_parameters(net) == pytest.approx(0.27e6, rel=0.03)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 17), (3, 2, 2)])
def test_resnet_takes_free_widths_and_shapes(shape: tuple[int, ...]) -> None:
    net = spec_of(model_of(name="resnet", channels=[3, 5], blocks=2), shape).build()
    assert net(raw(2, shape)).shape == (2, CLASSES)
    with pytest.raises(UserError, match=r"student.model: resnet with 3 widths needs images .*height >= 4"):
        spec_of(model_of(name="resnet"), (3, 2, 2)).build(key="student.model")
    with pytest.raises(UserError, match=r"got \[16\]"):
        spec_of(model_of(name="resnet"), (16,)).build()


def test_with_group_norm_a_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    rows = raw(6)
    for norm, alone in (("group", True), ("batch", False)):
        net = spec_of(model_of(name="resnet", channels=[8, 16], norm=norm)).build().train()
        with torch.no_grad():
            assert torch.allclose(net(rows)[:2], net(rows[:2]), atol=1e-5) == alone


def test_resnet_is_saved_and_exported(tmp_path: Path) -> None:
    spec = spec_of(model_of(name="resnet", channels=[4, 8], norm="batch"))
    trained = spec.build().eval()
    save_model(Folder.at(tmp_path), spec, trained.net.state_dict())
    loaded = distill_ray.load_model(str(tmp_path))
    rows = raw(3)
    assert torch.equal(loaded(rows), trained(rows))
    assert largest_difference(to_program(trained, "uint8"), trained, rows) < 1e-4


# --- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HERE["transformers"], reason="transformers is not installed")
def test_an_image_classifier_of_transformers_by_its_type(tmp_path: Path) -> None:
    spec = spec_of(model_of(**VIT))
    torch.manual_seed(0)
    net = spec.build().eval()
    check_output(net, SHAPE, "uint8", CLASSES, "student.model")
    rows = raw(3)
    assert torch.allclose(net(rows), net.net((rows.float() / 255 - 0.5) / 0.5).logits, atol=1e-5)
    save_model(Folder.at(tmp_path), spec, net.net.state_dict())
    assert torch.equal(distill_ray.load_model(str(tmp_path))(rows), net(rows))
    assert step_bytes(spec, TrainConfig(batch_size=8, precision="fp32"), 8, 1) > 16 * count_parameters(net)


@pytest.mark.skipif(not HERE["transformers"], reason="transformers is not installed")
def test_it_is_trained_and_exported_like_any_other(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 64)
    inputs = (rng.normal(0, 9, (64, *SHAPE)) + 50 * labels[:, None, None, None]).clip(0, 255).astype(np.uint8)
    rows = SplitArrays(np.arange(64), inputs, labels, None)
    train = TrainConfig(epochs=3, batch_size=16, lr=0.01, precision="fp32")
    result = fit(FitSpec(spec_of(model_of(**VIT)), train, CeLoss(name="ce"), 0, "fp32"), rows, rows,
                 Folder.at(tmp_path), Worker())  # fmt: skip
    assert result is not None
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    loaded = load_classifier(str(tmp_path))
    assert largest_difference(to_program(loaded, "uint8"), loaded, torch.from_numpy(inputs[:8])) < 1e-4


@pytest.mark.skipif(not HERE["transformers"], reason="transformers is not installed")
def test_transformers_starts_from_a_local_folder_with_another_head(tmp_path: Path) -> None:
    trained = spec_of(model_of(**VIT), classes=9).build().net
    trained.save_pretrained(tmp_path / "vit")  # type: ignore[operator]
    started = spec_of(model_of(**VIT, pretrained=str(tmp_path / "vit"))).build()
    check_output(started, SHAPE, "uint8", CLASSES, "teacher.model")
    kept = dict(trained.state_dict())
    assert all(torch.equal(t, kept[k]) for k, t in started.net.state_dict().items() if not k.startswith("classifier"))
    with pytest.raises(UserError, match=r"model.pretrained: .*config.json: no such file: nothing is downloaded"):
        spec_of(model_of(**VIT, pretrained=str(tmp_path / "gone"))).build()


@pytest.mark.skipif(not HERE["transformers"], reason="transformers is not installed")
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"image_size": 2 * SHAPE[1]}, r"its vit.embeddings.position_embeddings is \[.*\], and that of this model \["),
        ({"num_hidden_layers": 2}, r"6 weights of this model are not in it \(vit."),
    ],
)  # fmt: skip
def test_pretrained_weights_that_would_be_left_to_chance_are_refused(
    tmp_path: Path, changed: dict[str, int], told: str
) -> None:
    spec_of(model_of(**VIT)).build().net.save_pretrained(tmp_path / "vit")  # type: ignore[operator]
    model = model_of(name="transformers", model="vit", pretrained=str(tmp_path / "vit"), kwargs=changed)
    with pytest.raises(UserError, match=rf"student.model.pretrained .*vit: {told}.*start at random: leave out the kw"):
        spec_of(model).build(key="student.model")


@pytest.mark.skipif(not HERE["transformers"], reason="transformers is not installed")
def test_what_was_trained_from_a_pretrained_folder_does_not_need_it_again(tmp_path: Path) -> None:
    """The folder's sizes are recorded; a continued training reads its own checkpoint, not the folder's weights."""
    pretrained = tmp_path / "vit"
    spec_of(model_of(**VIT), classes=9).build().net.save_pretrained(pretrained)  # type: ignore[operator]
    model = model_of(name="transformers", model="vit", pretrained=str(pretrained), kwargs={"hidden_dropout_prob": 0.0})
    inputs = np.random.default_rng(0).integers(0, 256, (8, *SHAPE)).astype(np.uint8)
    rows = SplitArrays(np.arange(8), inputs, np.arange(8) % CLASSES, None)
    for epochs in (1, 2):
        train = TrainConfig(epochs=epochs, batch_size=4, precision="fp32")
        spec = FitSpec(spec_of(model), train, CeLoss(name="ce"), 0, "fp32")
        assert fit(spec, rows, rows, Folder.at(tmp_path / "out"), Worker()) is not None
        (pretrained / "model.safetensors").unlink(missing_ok=True)
    raw_rows = torch.from_numpy(inputs)
    before = distill_ray.load_model(str(tmp_path / "out"))(raw_rows)
    (pretrained / "config.json").unlink()
    loaded = load_classifier(str(tmp_path / "out"))
    assert torch.equal(loaded(raw_rows), before)
    assert "pretrained" not in (read_spec(Folder.at(tmp_path / "out")).model_dump_json(exclude_none=True))
    assert largest_difference(to_program(loaded, "uint8"), loaded, raw_rows) < 1e-4


@pytest.mark.skipif(not HERE["transformers"], reason="transformers is not installed")
def test_a_pretrained_folder_is_told_apart_and_computed_in_fp32(tmp_path: Path) -> None:
    folder = tmp_path / "vit"
    spec_of(model_of(**VIT)).build().net.bfloat16().save_pretrained(folder)  # type: ignore[operator]
    started = spec_of(model_of(**VIT, pretrained=str(folder))).build()
    assert {p.dtype for p in started.parameters()} == {torch.float32}
    check_output(started, SHAPE, "uint8", CLASSES, "teacher.model")
    with pytest.raises(UserError, match=r"student.model.pretrained .*vit: holds a vit, not a deit: set .*model=vit"):
        spec_of(model_of(name="transformers", model="deit", pretrained=str(folder))).build(key="student.model")
    weights = {"other.weight": torch.zeros(2, 2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.pretrained .*vit: no weight in it is one of this vit"):
        spec_of(model_of(**VIT, pretrained=str(folder))).build()


@pytest.mark.skipif(not HERE["transformers"], reason="transformers is not installed")
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"model": "vitt"}, r"student.model.model vitt: is no type of image classifier of transformers; did .*'vit'"),
        ({"model": "bert"}, r"student.model.model bert: is no type of image classifier"),
        ({"model": "timm_wrapper"}, r"student.model.model timm_wrapper: is timm's, .*: set student.model.name=timm"),
        ({"kwargs": {"patch_size": 0}}, r"student.model transformers vit: making it fails: "),
        ({"kwargs": {"attn_implementation": "a/b"}}, r"kwargs.attn_implementation a/b: .*nothing is downloaded"),
    ],
)
def test_what_transformers_does_not_know_is_one_line(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        spec_of(model_of(**(VIT | wrong))).build(key="student.model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["timm", "transformers"])
@pytest.mark.parametrize("model", ["hf-hub:timm/resnet18", "local-dir:/models/x", "google/vit-base-patch16-224"])
def test_addresses_of_models_are_refused(name: str, model: str) -> None:
    with pytest.raises(UserError, match=r"student.model.model .*: is the address of a model.*nothing is downloaded"):
        spec_of(model_of(name=name, model=model)).build(key="student.model")


# --- timm -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HERE["timm"], reason="timm is not installed")
def test_an_image_model_of_timm_by_its_name() -> None:
    spec = spec_of(model_of(name="timm", model="resnet18"), (1, 32, 32))
    net = spec.build().eval()
    check_output(net, (1, 32, 32), "uint8", CLASSES, "student.model")
    assert net(raw(2, (1, 32, 32))).shape == (2, CLASSES)
    with pytest.raises(UserError, match=r"student.model.model resnet81: is no model of timm; did you mean 'resnet"):
        spec_of(model_of(name="timm", model="resnet81")).build(key="student.model")


@pytest.mark.skipif(not HERE["timm"], reason="timm is not installed")
@pytest.mark.parametrize("format_", ["safetensors", "pt"])
def test_a_model_of_timm_starts_from_a_file_that_it_does_not_need_again(tmp_path: Path, format_: str) -> None:
    shape, file = (3, 32, 32), tmp_path / f"r.{format_}"
    theirs = spec_of(model_of(name="timm", model="resnet18"), shape).build().net
    save_file(theirs.state_dict(), file) if format_ == "safetensors" else torch.save(theirs.state_dict(), file)
    model = model_of(name="timm", model="resnet18", pretrained=str(file))
    same = spec_of(model, shape).build()
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in same.net.state_dict().items())
    other = spec_of(model, shape, classes=3).build()
    assert torch.equal(other.net.state_dict()["conv1.weight"], theirs.state_dict()["conv1.weight"])
    check_output(other, shape, "uint8", 3, "student.model")
    folder = Folder.at(tmp_path / "trained")
    save_model(folder, spec_of(model, shape), same.net.state_dict())
    file.unlink()
    assert torch.equal(load_classifier(folder)(raw(2, shape)).isfinite(), torch.ones(2, CLASSES, dtype=torch.bool))
    with pytest.raises(UserError, match=r"model.pretrained: .*: no such file: nothing is downloaded"):
        spec_of(model, shape).build()


@pytest.mark.skipif(not HERE["timm"], reason="timm is not installed")
def test_what_timm_cannot_start_from_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.pt"
    model = model_of(name="timm", model="resnet18", pretrained=str(file))
    torch.save({"model": torch.nn.Linear(2, 2)}, file)  # a pickled object
    with pytest.raises(UserError, match=r"pretrained .*r.pt: holds more than tensors, so that loading it could run"):
        spec_of(model).build()
    torch.save({"other.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(UserError, match=r"r.pt: no weight in it is one of resnet18, but other.weight"):
        spec_of(model).build()


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_an_extra_that_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, name, None)  # python's own way to say that there is none
    with pytest.raises(UserError, match=rf"student.model: {name} .*pip install 'distill-ray\[{name}\]'"):
        spec_of(model_of(name=name, model="x")).build(key="student.model")


def test_images_are_what_they_take() -> None:
    with pytest.raises(UserError, match=r"student.model timm: takes images"):
        spec_of(model_of(name="timm", model="x"), (16,)).build(key="student.model")


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"name": "timm", "model": "x", "kwargs": {"pretrained": True}}, "pretrained is not for kwargs"),
        ({"name": "timm", "model": "x", "kwargs": {"pretrained_cfg": {"url": "x"}}}, "pretrained_cfg is not for kw"),
        ({"name": "timm", "model": "x", "kwargs": {"num_classes": 3}}, "num_classes is not for kwargs"),
        ({"name": "transformers", "model": "x", "kwargs": {"trust_remote_code": True}}, "trust_remote_code is not"),
        ({"name": "resnet", "norm": "layer"}, "norm"),
        ({"name": "resnett"}, "did you mean 'resnet'"),
        ({"import": "a.b:c", "kwrgs": {}}, "did you mean 'kwargs'"),
    ],
)
def test_mistakes_in_a_model_are_told_by_the_config(model: dict[str, Any], told: str) -> None:
    raw_config = {"name": "x", "data": {"source": "glyph62"}, "teacher": {"model": {"name": "mlp"}}}
    with pytest.raises(UserError, match=told):
        configs.from_dict(raw_config | {"student": {"model": model}})


@pytest.mark.parametrize("key", ["model", "model.pretrained"])
def test_pretrained_weights_in_a_searchs_space_are_part_of_what_it_is(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, model = tmp_path / "r.pt", {"name": "timm", "model": "resnet18"}
    option: Any = "r.pt" if key == "model.pretrained" else model | {"pretrained": "r.pt"}
    raw_config = {
        "name": "x", "data": {"source": "glyph62"}, "teacher": {"model": {"name": "mlp"}}, "student": {"model": model},
        "tune": {"space": {key: {"choice": [option]}}},
    }  # fmt: skip
    out = Folder.at(tmp_path / "runs")
    inputs = Inputs(configs.from_dict(raw_config), out, stage(out, "data", {}), stage(out, "labels", {}))
    with pytest.raises(UserError, match=rf"tune.space {file}: no such file"):
        tune.locate(inputs)
    file.write_bytes(b"one")
    before = tune.locate(inputs)
    file.write_bytes(b"two")
    assert tune.locate(inputs) != before


def test_pretrained_weights_that_are_not_there_are_told_before_any_work(tmp_path: Path) -> None:
    raw_config = {"name": "x", "data": {"source": "glyph62"}, "teacher": {"model": {"name": "mlp"}}}
    model = {"name": "timm", "model": "resnet18", "pretrained": str(tmp_path / "r.pt")}
    with pytest.raises(UserError, match=r"student.model.pretrained .*r.pt: no such file"):
        given.check_present(configs.from_dict(raw_config | {"student": {"model": model}}))
