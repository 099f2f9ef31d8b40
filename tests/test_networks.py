"""resnet, and the networks of timm and transformers: by name, from local files alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

import distill_ray
from distill_ray import config as configs
from distill_ray.config import AnyModel, CeLoss, InputConfig, ModelConfig, TrainConfig
from distill_ray.errors import UserError
from distill_ray.footprint import step_bytes
from distill_ray.models import ModelSpec, load_classifier, save_model
from distill_ray.models.classifier import check_output, count_parameters
from distill_ray.stages.export import largest_difference, to_program
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
def test_what_transformers_does_not_know_is_one_line() -> None:
    for wrong in ({**VIT, "model": "vitt"}, {**VIT, "kwargs": {"patch_size": 0}}):
        with pytest.raises(UserError, match=r"student.model transformers vitt?: making it fails: ") as caught:
            spec_of(model_of(**wrong)).build(key="student.model")
        assert "\n" not in str(caught.value)


# --- timm -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HERE["timm"], reason="timm is not installed")
def test_an_image_model_of_timm_by_its_name() -> None:
    spec = spec_of(model_of(name="timm", model="resnet18"), (1, 32, 32))
    net = spec.build().eval()
    check_output(net, (1, 32, 32), "uint8", CLASSES, "student.model")
    assert net(raw(2, (1, 32, 32))).shape == (2, CLASSES)


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
