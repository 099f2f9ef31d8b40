"""Rows without labels: CE over the labelled rows, KD over all; with no label at all no accuracy and no control.

The last tests go through the real command, with teachers that are given.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from distill_ray import artifacts, losses
from distill_ray import config as configs
from distill_ray.config import CeLoss, InputConfig, KdLoss, MlpModel, TrainConfig
from distill_ray.errors import UserError
from distill_ray.models import ModelSpec
from distill_ray.placing import Node
from distill_ray.stages import given, opening, prepare, student
from distill_ray.stages import teacher as teacher_stage
from distill_ray.storage import Folder
from distill_ray.store import SplitArrays, Store
from distill_ray.training import FitSpec, Worker, fit
from distill_ray.validation import ValidationMetrics
from tests.harness import distill_ray, distill_ray_in, only, write_config
from tests.own_code import write_package
from tests.report_fixtures import context_of
from tests.unlabelled import Ids, write_data

CLASSES = 4


def rows(count: int, seed: int, labelled: float) -> SplitArrays:
    rng = np.random.default_rng(seed)
    true = rng.integers(0, CLASSES, count)
    inputs = (rng.normal(0, 20, (count, 6)) + 40 * true[:, None]).clip(0, 255).astype(np.uint8)
    logits = (-3.0 * (np.arange(CLASSES) != true[:, None])).astype(np.float16)
    labels = np.where(rng.random(count) < labelled, true, losses.UNLABELLED).astype(np.int64)
    return SplitArrays(np.arange(count), inputs, labels, logits)


def fitted(folder: Path, train: SplitArrays, validation: SplitArrays, loss: Any, **more: Any) -> artifacts.History:
    spec = ModelSpec(
        model=MlpModel(name="mlp", hidden=(8,)),
        input=InputConfig(),
        shape=(6,),
        dtype="uint8",
        classes=CLASSES,
        class_names=tuple("abcd"),
    )
    config = TrainConfig.model_validate({"epochs": 4, "batch_size": 16, "lr": 0.01, **more})
    result = fit(FitSpec(spec, config, loss, 3, "fp32"), train, validation, Folder.at(folder), Worker())
    assert result is not None
    assert result.best_epoch == artifacts.best_epoch(result.history)
    return result.history


def test_ce_is_a_mean_over_the_labelled_rows_of_an_epoch_and_kd_over_all(tmp_path: Path) -> None:
    """With a learning rate of next to nothing an epoch's losses are those of the untrained network."""
    train = rows(101, 0, labelled=0.4)
    spec = ModelSpec(
        model=MlpModel(name="mlp", hidden=(8,)),
        input=InputConfig(),
        shape=(6,),
        dtype="uint8",
        classes=CLASSES,
        class_names=tuple("abcd"),
    )
    torch.manual_seed(3)
    logits = spec.build()(torch.from_numpy(train.inputs)).detach()
    labels = torch.from_numpy(train.labels)
    history = fitted(tmp_path, train, rows(40, 1, 0.5), KdLoss(name="kd"), lr=1e-12, epochs=1)
    assert 20 < int((labels >= 0).sum()) < 60
    assert history[0]["train_ce"] == pytest.approx(
        float(F.cross_entropy(logits[labels >= 0], labels[labels >= 0])), 1e-4
    )
    assert train.logits is not None
    soft = losses.soft_kl(logits, torch.from_numpy(train.logits), 2.0)
    assert history[0]["train_kd"] == pytest.approx(float(soft), rel=1e-4)


def test_without_validation_labels_the_best_epoch_is_that_of_the_best_agreement(tmp_path: Path) -> None:
    history = fitted(tmp_path, rows(101, 0, 0.0), rows(40, 1, 0.0), KdLoss(name="kd"))
    assert all(row["train_ce"] == 0 and "validation_accuracy" not in row for row in history)
    agreements = [row["validation_agreement"] for row in history]
    assert agreements[-1] > agreements[0]
    assert history[-1]["validation_kl"] < history[0]["validation_kl"]
    assert artifacts.best_epoch(history) == 1 + agreements.index(max(agreements))


def test_labelled_validation_rows_are_what_counts_where_there_are_some(tmp_path: Path) -> None:
    history = fitted(tmp_path, rows(101, 0, 0.0), rows(40, 1, 0.3), KdLoss(name="kd"))
    assert all("validation_accuracy" in row and "validation_agreement" not in row for row in history)


def test_validation_metrics_without_labels_are_those_of_the_whole_split() -> None:
    torch.manual_seed(0)
    model, teacher = torch.randn(2, 30, CLASSES)
    measured = ValidationMetrics(torch.device("cpu"), 1)
    for part in (slice(0, 7), slice(7, 30)):
        measured.update(model[part], torch.full((len(model[part]),), -1), teacher[part].half())
    found = measured.compute()
    assert found["validation_agreement"] == pytest.approx(float((model.argmax(1) == teacher.argmax(1)).float().mean()))
    kl = F.kl_div(model.log_softmax(1), teacher.half().float().log_softmax(1), reduction="batchmean", log_target=True)
    assert found["validation_kl"] == pytest.approx(float(kl), rel=1e-5)


def test_a_loss_that_learns_from_labels_alone_is_refused_without_any() -> None:
    for loss in (CeLoss(name="ce"), KdLoss(name="kd", alpha=0)):
        student.check_loss(loss, labelled=True)
        with pytest.raises(UserError, match=r"student.loss (ce|kd with alpha 0): learns from hard labels alone"):
            student.check_loss(loss, labelled=False)
    student.check_loss(KdLoss(name="kd", alpha=0.5), labelled=False)  # its CE part is 0


def test_it_is_refused_before_a_given_teacher_is_copied(tmp_path: Path) -> None:
    """Not after hours of labelling; a search that looks for its loss has one of its own."""
    raw = {
        "name": "r", "data": {"source": "glyph62", "rows": 310}, "teacher": {"checkpoint": str(tmp_path / "gone.pt")},
        "student": {"model": {"name": "mlp"}, "loss": {"name": "ce"}},
    }  # fmt: skip
    config = configs.from_dict(raw)
    write_data(config, tmp_path / "none", none)
    write_data(config, tmp_path / "half", half)
    searched = configs.from_dict(raw | {"tune": {"space": {"loss.alpha": {"choice": [0.5, 0.9]}}}})
    for wanted, out, told in (
        (config, "none", "student.loss ce: learns from hard labels alone"),
        (searched, "none", "gone.pt"),
        (config, "half", "gone.pt"),
    ):
        context = context_of(tmp_path / out, wanted)
        context.session.start = lambda: [Node(2, 0)]  # type: ignore[method-assign]
        target = artifacts.stage(context.out, "teacher", {})
        with pytest.raises((UserError, FileNotFoundError), match=told):
            given.make(context, prepare.locate(wanted, context.out), target)


# --- through the real command ---------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "name": "r",
    "data": {"source": "glyph62", "rows": 930, "shard_rows": 256},
    "student": {
        "model": {"import": "my_pkg.nets:flat", "kwargs": {"width": 24}},
        "train": {"epochs": 20, "batch_size": 16, "lr": 0.0005, "precision": "fp32"},
    },
    "cluster": {"cpus_per_worker": 1},
}
SERVING = {"import": "my_pkg.nets:serving", "kwargs": {"width": 24}}


def none(split: str, ids: Ids) -> npt.NDArray[np.bool_]:
    return np.zeros(len(ids), dtype=np.bool_)


def half(split: str, ids: Ids) -> npt.NDArray[np.bool_]:
    chosen: npt.NDArray[np.bool_] = ids % 2 == 0
    return chosen


def logits_by_id(data: Store) -> dict[str, list[float]]:
    """What somebody's model might have said: the right class by a margin of 12."""
    found = {}
    for record in data.manifest.shards:
        batch = data.batch(record)
        for name in batch.column("source_id").to_pylist():
            best = int(name.rsplit("/", 1)[1]) % 62
            found[name] = [12.0 if c == best else 0.0 for c in range(62)]
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("user"))


def test_a_given_teacher_of_own_code_labels_half_labelled_rows(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Own networks, weights in a file, outputs that are probabilities, two programs beside them; half the rows without
    a label; then again."""
    from safetensors.torch import save_file

    from tests.test_given import exported, scripted

    out = tmp_path / "runs"
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    from my_pkg import nets  # type: ignore[import-not-found]

    torch.manual_seed(0)
    save_file(dict(nets.serving(width=24).state_dict()), place / "teacher.safetensors")
    example = torch.zeros(2, 1, 32, 32)
    (place / "second.pt2").write_bytes(exported(nets.flat(width=24).eval(), example=example))
    (place / "third.pt").write_bytes(scripted(nets.flat(width=24).eval(), example))
    members = [
        {"checkpoint": "teacher.safetensors", "model": SERVING}, {"checkpoint": "second.pt2", "format": "export"},
        {"checkpoint": "third.pt"},
    ]  # fmt: skip
    raw = RUN | {"teacher": {"ensemble": members, "weights": [8, 1, 1], "average": "probabilities"}}
    config = write_config(tmp_path, raw)
    write_data(configs.load(config), out, half)
    refused = distill_ray_in(place, "run", config, "--out", out)
    assert refused.code == 2
    assert "teacher.ensemble[0].model.import: my_pkg.nets:serving is code that would run here" in refused.stderr
    done = distill_ray_in(place, "run", config, "--out", out, "--json", "--allow-import")
    assert done.code == 0, done.stderr
    assert "its outputs are probabilities" in done.stderr
    assert "warning: teacher: accuracy 0.0" in done.stderr  # untrained: that is poor
    assert [row["role"] for row in done.answer["rows"]] == ["teacher", "student", "control"]
    assert all(row["accuracy"] is not None for row in done.answer["rows"])
    assert done.answer["rows"][1]["agreement"] > done.answer["rows"][2]["agreement"]
    teacher = only(out, "artifacts/teacher-*")
    labels = only(out, "artifacts/labels-*")
    assert json.loads((teacher / "summary.json").read_text())["measured"]["rows"] in (46, 47)  # of 93
    checked = distill_ray_in(place, "verify", labels, "--json", "--allow-import")
    assert checked.code == 0, checked.stderr
    assert checked.answer["replay"]["wrong_rows"] == 0
    unread = distill_ray_in(place, "verify", labels)
    assert unread.code == 2
    assert "names code that would run here, my_pkg.nets:serving" in unread.stderr
    portable = distill_ray_in(place, "export", config, "--out", out, "--json", "--allow-import")
    assert portable.code == 0, portable.stderr
    assert "(finished before, reused)" in portable.stderr
    assert "teacher: accuracy" not in portable.stderr  # nothing ran again
    assert (out / "r" / "export" / "student.pt2").exists()


def test_imported_logits_and_no_label_at_all(place: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = tmp_path / "runs"
    config = write_config(tmp_path, RUN)
    path = tmp_path / "logits.parquet"
    path.write_bytes(b"")
    data = write_data(configs.load(config, [f"labels.from={path}"]), out, none)
    assert not opening.has_labels(data, "train")
    given = logits_by_id(data)
    order = np.random.default_rng(0).permutation(len(given))
    names = [list(given)[i] for i in order]
    values = np.array([given[name] for name in names], dtype=np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 62)
    pq.write_table(pa.table({"source_id": names, "logits": column}), path, row_group_size=100)
    done = distill_ray_in(place, "import-labels", config, "--logits", path, "--out", out, "--json", "--allow-import")
    assert done.code == 0, done.stderr
    told = next(line for line in done.stderr.splitlines() if line.startswith("import-labels: next: distill-ray "))
    arguments = shlex.split(told.removeprefix("import-labels: next: distill-ray "))
    assert arguments == ["run", str(config), f'labels.from="{path}"', "--out", str(out), "--allow-import"]
    ran = distill_ray_in(place, *arguments, "--json")  # as it says
    assert ran.code == 0, ran.stderr
    assert [stage["status"] for stage in ran.answer["stages"]] == ["reused", "reused", "reused", "ran"]
    teacher, pupil = ran.answer["rows"]
    assert (teacher["accuracy"], teacher["parameters"], pupil["accuracy"]) == (None, None, None)
    assert pupil["agreement"] > 2 / 62  # chance is 1 / 62
    assert "there is no control to compare with" in (out / "r" / "report.html").read_text()
    summary = json.loads((Path(pupil["folder"]) / "summary.json").read_text())
    assert summary["validation_accuracy"] is None
    history = (Path(pupil["folder"]) / "metrics.jsonl").read_text().splitlines()
    assert summary["validation_agreement"] == max(json.loads(line)["validation_agreement"] for line in history)
    checked = distill_ray("verify", only(out, "artifacts/labels-*"), "--json")
    assert checked.code == 0, checked.stderr
    assert checked.answer["replay"] is None
    assert f"these logits were imported from {path}" in checked.stderr
    refused = distill_ray_in(
        place, "student", config, f"labels.from={path}", "student.loss={name: ce}", "--out", out, "--allow-import"
    )
    assert refused.code == 2
    assert "student.loss ce: learns from hard labels alone" in refused.stderr.splitlines()[-1]
    with pytest.raises(UserError, match="no row of the train split has a label, so there is nothing to learn from"):
        teacher_stage._require_labels(data)


@pytest.mark.slow
def test_a_search_over_own_code_without_a_label(place: Path, tmp_path: Path) -> None:
    """A trial finds the folder that the driver finds: the finalist is not trained again."""
    out, path = tmp_path / "runs", tmp_path / "logits.npy"
    space = {"model.kwargs.width": {"grid": [8, 16]}}
    raw = RUN | {"tune": {"space": space, "search": "grid", "trials": 2, "seeds": 1, "scheduler": "none"}}
    config = write_config(tmp_path, raw | {"labels": {"from": str(path), "by": "row_id"}})
    np.save(path, np.zeros((1, 62), dtype=np.float32))
    data = write_data(configs.load(config), out, none)
    np.save(path, np.array(list(logits_by_id(data).values()), dtype=np.float32))
    done = distill_ray_in(place, "tune", config, "--out", out, "--json", "--allow-import")
    assert done.code == 0, done.stderr
    assert done.answer["tune"]["counts"] == {"completed": 2}
    assert len(list(out.glob("artifacts/student-*"))) == 2
    for point in done.answer["tune"]["front"]:
        assert (point["test_accuracy"], point["control"]) == (None, None)
        assert 0 <= point["test_agreement"]["mean"] <= 1
        assert point["values"]["model.kwargs.width"] in (8, 16)
