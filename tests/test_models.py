"""Networks and their saved form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import distill_ray
from distill_ray.config import CharCnnModel, InputConfig, MlpModel
from distill_ray.errors import UserError
from distill_ray.models import ModelSpec, build_classifier, save_model
from distill_ray.models.classifier import count_parameters
from distill_ray.storage import Folder

ARTICLE_TEACHER = CharCnnModel(name="char_cnn", channels=(32, 64), hidden=(512, 128))
ARTICLE_STUDENT = CharCnnModel(name="char_cnn", channels=(32, 64), hidden=(512,))


def _spec(model: CharCnnModel | MlpModel, shape: tuple[int, ...] = (1, 32, 32), classes: int = 62) -> ModelSpec:
    return ModelSpec(
        model=model, input=InputConfig(), shape=shape, dtype="uint8", classes=classes,
        class_names=tuple(map(str, range(classes))),
    )  # fmt: skip


def test_the_articles_networks_have_the_articles_parameters() -> None:
    """conv 1->32, 32->64 (3x3), linear 16384->512->128->62; the student without the 128."""
    teacher = 32 * 9 + 32 + 64 * 32 * 9 + 64 + 64 * 256 * 512 + 512 + 512 * 128 + 128 + 128 * 62 + 62
    student = 32 * 9 + 32 + 64 * 32 * 9 + 64 + 64 * 256 * 512 + 512 + 512 * 62 + 62
    assert count_parameters(_spec(ARTICLE_TEACHER).build()) == teacher == 8_481_598
    assert count_parameters(_spec(ARTICLE_STUDENT).build()) == student
    assert student / teacher == pytest.approx(0.995, abs=1e-3)


def test_char_cnn_computes_what_the_article_writes_down() -> None:
    torch.manual_seed(0)
    classifier = _spec(ARTICLE_TEACHER).build()
    layers = [m for m in classifier.net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    raw = torch.randint(0, 256, (3, 1, 32, 32), dtype=torch.uint8)
    x = (raw.float() / 255 - 0.5) / 0.5
    x = F.relu(layers[1](F.relu(layers[0](x))))
    x = F.max_pool2d(x, 2, 2).contiguous().view(-1, 64 * 16 * 16)
    x = layers[4](F.relu(layers[3](F.relu(layers[2](x)))))
    assert torch.allclose(classifier(raw), x, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 17)])
def test_widths_and_shapes_are_free(shape: tuple[int, ...]) -> None:
    model = _spec(CharCnnModel(name="char_cnn", channels=(3, 5, 7), hidden=()), shape, 10).build()
    assert model(torch.zeros(2, *shape, dtype=torch.uint8)).shape == (2, 10)
    assert _spec(MlpModel(name="mlp", hidden=(8,)), shape, 4).build()(torch.zeros(2, *shape)).shape == (2, 4)


def test_a_network_that_cannot_take_the_input_is_refused_by_key() -> None:
    with pytest.raises(UserError, match="student.model: char_cnn needs images"):
        build_classifier(ARTICLE_STUDENT, InputConfig(), (16,), 3, key="student.model")
    with pytest.raises(UserError, match="data.input.mean"):
        build_classifier(ARTICLE_STUDENT, InputConfig(mean=(0.1, 0.2)), (3, 8, 8), 3)


def test_the_contract_is_applied_per_channel_to_raw_rows() -> None:
    contract = InputConfig(scale=1 / 255, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    classifier = build_classifier(MlpModel(name="mlp", hidden=()), contract, (3, 2, 2), 2)
    seen: list[torch.Tensor] = []
    classifier.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    raw = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)
    classifier(torch.from_numpy(raw))
    mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in (contract.mean, contract.std))
    assert np.allclose(seen[0].numpy(), (raw / 255 - mean) / std, atol=1e-6)


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    spec = _spec(CharCnnModel(name="char_cnn", channels=(2, 3), hidden=(5,)))
    trained = spec.build().eval()
    sha256 = save_model(Folder.at(tmp_path), spec, trained.net.state_dict())
    loaded = distill_ray.load_model(str(tmp_path))
    raw = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    assert torch.equal(loaded(raw), trained(raw))
    assert not loaded.training
    with pytest.raises(UserError, match="sha256"):
        distill_ray.models.load_model(str(tmp_path), expected_sha256="0" * 64)
    assert len(sha256) == 64


def test_loading_what_is_not_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no trained model"):
        distill_ray.load_model(str(tmp_path))
    spec = _spec(CharCnnModel(name="char_cnn", channels=(2, 3), hidden=(5,)))
    save_model(Folder.at(tmp_path), spec, spec.build().net.state_dict())
    other = json.loads((tmp_path / "model.json").read_text())
    other["model"]["hidden"] = [6]
    (tmp_path / "model.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="does not fit") as caught:
        distill_ray.load_model(str(tmp_path))
    assert "\n" not in str(caught.value)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(UserError, match="does not fit"):
        distill_ray.load_model(str(tmp_path))


def test_damaged_weights_of_a_finished_folder_are_refused(tmp_path: Path) -> None:
    spec = _spec(CharCnnModel(name="char_cnn", channels=(2, 3), hidden=(5,)))
    sha256 = save_model(Folder.at(tmp_path), spec, spec.build().net.state_dict())
    Folder.at(tmp_path).write_json("summary.json", {"weights_sha256": sha256})
    assert distill_ray.load_model(str(tmp_path)) is not None
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="damaged, or not the weights") as caught:
        distill_ray.load_model(str(tmp_path))
    assert "delete it" in str(caught.value)
