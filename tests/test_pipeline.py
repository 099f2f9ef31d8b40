"""The whole pipeline through the real command: what it leaves, that it is right, and that it is not run twice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from safetensors.torch import load_file

import distill_ray
from distill_ray import config as configs
from distill_ray.config import CeLoss, MlpModel, TrainConfig
from distill_ray.inference import logits_of
from distill_ray.models.saved import ModelSpec
from distill_ray.stages.model_folder import finish, model_spec
from distill_ray.storage import Folder
from distill_ray.store import StoredSplit, open_store, read_split
from distill_ray.training import FitSpec, Worker, fit
from tests.conftest import SmallRun
from tests.harness import SMALL_RUN, environment, epochs_done, kill_workers, only, write_config
from tests.harness import distill_ray as command
from tests.stores import make_data

STUDENT_KEYS = {"accuracy", "kl_to_teacher", "agreement", "ece", "parameters", "bytes", "latency_ms", "seconds"}


def test_run_leaves_the_folders_and_keys_of_the_contract(small_run: SmallRun) -> None:
    artifacts = small_run.out / "artifacts"
    for pattern, files in {
        "data-*": {"manifest.json"},
        "labels-*": {"manifest.json", "config.yaml"},
        "teacher-*": {"config.yaml", "metrics.jsonl", "summary.json", "model.safetensors", "model.json"},
    }.items():
        assert files <= {path.name for path in only(artifacts, pattern).iterdir()}
    assert len(list(artifacts.glob("student-*"))) == 2
    summary = json.loads((small_run.out / "small" / "summary.json").read_text())
    assert [row["role"] for row in summary["rows"]] == ["teacher", "student", "control"]
    for row in summary["rows"]:
        assert all(isinstance(row[key], int | float) for key in STUDENT_KEYS), row
    assert [stage["name"] for stage in summary["stages"]] == ["prepare", "teacher", "label", "student", "student"]
    assert {stage["status"] for stage in summary["stages"]} == {"ran"}
    assert small_run.finished.answer["rows"] == summary["rows"]
    assert yaml.safe_load((small_run.out / "small" / "config.yaml").read_text())["name"] == "small"
    assert (small_run.out / "small" / "report.html").stat().st_size > 0


def test_one_epoch_is_one_line_with_the_parts_of_the_loss(small_run: SmallRun) -> None:
    for folder in (small_run.out / "artifacts").glob("student-*"):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == list(range(1, 9))
        assert {"train_loss", "train_ce", "train_kd", "validation_accuracy"} <= lines[0].keys()
        loss = yaml.safe_load((folder / "config.yaml").read_text())["config"]["loss"]
        expected = [
            0.9 * row["train_kd"] + 0.1 * row["train_ce"] if loss["name"] == "kd" else row["train_ce"] for row in lines
        ]
        assert np.allclose([row["train_loss"] for row in lines], expected, rtol=1e-5)


def test_stored_labels_are_the_teachers_logits_row_by_row(small_run: SmallRun) -> None:
    """Against a bare PyTorch loop that knows nothing of stores, views or the input contract's code."""
    artifacts = small_run.out / "artifacts"
    labels = next(stage["folder"] for stage in small_run.finished.answer["stages"] if stage["name"] == "label")
    weights = load_file(only(artifacts, "teacher-*") / "model.safetensors")

    def teacher(x: torch.Tensor) -> torch.Tensor:
        for i in range(2):
            x = torch.relu(
                torch.conv2d(x, weights[f"convolutions.{i}.weight"], weights[f"convolutions.{i}.bias"], padding=1)
            )
        x = torch.max_pool2d(x, 2).flatten(1)
        x = torch.relu(x @ weights["linears.0.weight"].T + weights["linears.0.bias"])
        return x @ weights["linears.1.weight"].T + weights["linears.1.bias"]

    stored: dict[int, np.ndarray[tuple[int, ...], np.dtype[np.float16]]] = {}
    for path in Path(labels).glob("*.arrow"):
        table = pa.ipc.open_file(path).read_all()
        logits = table["logits"].combine_chunks().flatten().to_numpy().reshape(-1, 62)
        stored.update(zip(table["row_id"].to_pylist(), logits, strict=True))
    seen = 0
    for path in only(artifacts, "data-*").glob("*.arrow"):
        table = pa.ipc.open_file(path).read_all()
        raw = table["input"].combine_chunks().flatten().to_numpy().reshape(-1, 1, 32, 32)
        expected = teacher((torch.from_numpy(raw.astype(np.float32)) / 255 - 0.5) / 0.5)
        expected -= expected.max(dim=1, keepdim=True).values
        ours = np.stack([stored[row_id] for row_id in table["row_id"].to_pylist()]).astype(np.float32)
        # float16 has 11 significant bits; the rest is the order of summation in fp32.
        assert np.allclose(ours, expected.numpy(), rtol=2**-11, atol=1e-4)
        seen += len(ours)
    assert seen == len(stored) == 1860


def test_bf16_labels_are_a_bare_loop_in_bf16_and_their_distance_from_fp32_is_in_the_manifest(
    own_copy: SmallRun, tmp_path: Path
) -> None:
    """Another precision is another label store of the same teacher; emulated where the processor has no bf16."""
    config = write_config(tmp_path, SMALL_RUN | {"labels": {"precision": "bf16", "batch_size": 64}})
    done = command("label", config, "--out", own_copy.out, "--json")
    assert done.code == 0, done.stderr
    statuses = {stage["name"]: stage for stage in done.answer["stages"]}
    assert (statuses["teacher"]["status"], statuses["label"]["status"]) == ("reused", "ran")
    labels = open_store(statuses["label"]["folder"])
    check = labels.label_manifest.precision_check
    assert labels.label_manifest.precision == "bf16"
    assert check["rows"] > 0
    assert 0 < check["max_abs_difference"] < 1
    assert 0 <= check["kl"] < 0.01
    assert 0.9 < check["top1_agreement"] <= 1
    teacher = distill_ray.load_model(statuses["teacher"]["folder"])
    data = open_store(statuses["prepare"]["folder"])
    for record in data.manifest.splits["train"].shards[:5]:
        rows = data.data_shard(record)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            bare = torch.cat([teacher(batch).float() for batch in torch.from_numpy(rows.inputs.copy()).split(64)])  # type: ignore[no-untyped-call]
        bare = bare - bare.max(dim=1, keepdim=True).values
        twin = next(shard for shard in labels.manifest.splits["train"].shards if shard.index == record.index)
        stored = labels.label_shard(twin)
        assert np.array_equal(stored.row_ids, rows.row_ids)
        assert np.allclose(stored.logits.astype(np.float32), bare.numpy(), rtol=2**-11, atol=1e-4)


def test_loaded_student_gives_the_logits_and_the_accuracy_of_the_table(small_run: SmallRun) -> None:
    data = open_store(str(only(small_run.out / "artifacts", "data-*")))
    test = read_split(data, "test")
    for row in small_run.finished.answer["rows"]:
        model = distill_ray.load_model(row["folder"])
        assert not model.training
        with torch.inference_mode():
            logits = model(torch.from_numpy(test.inputs))
        accuracy = float((logits.argmax(1).numpy() == test.labels).mean())
        assert abs(accuracy - row["accuracy"]) < 1e-6
        spec = ModelSpec.model_validate_json((Path(row["folder"]) / "model.json").read_bytes())
        rebuilt = spec.build()
        rebuilt.net.load_state_dict(load_file(Path(row["folder"]) / "model.safetensors"))
        again = logits_of(rebuilt, torch.from_numpy(test.inputs), len(test), "fp32", torch.device("cpu"))
        assert torch.equal(logits, again)


def test_the_same_command_again_runs_nothing_and_imports_neither_torch_nor_ray(small_run: SmallRun) -> None:
    probe = (
        "import sys; from distill_ray.cli import _guarded; code = _guarded(sys.argv[1:]); "
        "print(sorted({'torch', 'ray', 'matplotlib'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    again = subprocess.run(
        [sys.executable, "-c", probe, "run", str(small_run.config), "--out", str(small_run.out), "--json"],
        capture_output=True, text=True, timeout=120, env=environment(),
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "one seed says nothing about the spread between seeds" in again.stdout.splitlines()[-2]
    answer = json.loads(again.stdout.splitlines()[-1])
    assert {stage["status"] for stage in answer["stages"]} == {"reused"}
    assert answer["rows"] == small_run.finished.answer["rows"]
    assert again.stderr.splitlines()[-1] == "[]"


def test_another_run_shares_the_teacher_and_its_labels(own_copy: SmallRun, tmp_path: Path) -> None:
    """Another name, temperature and batch size of labelling: only a new student is trained."""
    other = SMALL_RUN | {"name": "warmer", "labels": {"precision": "fp32", "batch_size": 32}}
    config = write_config(tmp_path, other)
    done = command("run", config, "student.loss.temperature=4", "--out", own_copy.out, "--json")
    assert done.code == 0, done.stderr
    assert [(stage["name"], stage["status"]) for stage in done.answer["stages"]] == [
        ("prepare", "reused"),
        ("teacher", "reused"),
        ("label", "reused"),
        ("student", "ran"),
        ("student", "reused"),
    ]


def test_students_from_windows_of_shards_and_where_their_time_went(own_copy: SmallRun, tmp_path: Path) -> None:
    """Eight shards at a time: bitwise what fit() makes of the same windows, and not what it makes of the whole."""
    overrides = ["student.train.shuffle=window", "student.train.window_rows=256"]
    done = command("run", own_copy.config, *overrides, "--out", own_copy.out, "--json", "--profile")
    assert done.code == 0, done.stderr
    config = configs.load(own_copy.config, overrides)
    data, labels = (open_store(str(only(own_copy.out / "artifacts", name))) for name in ("data-*", "labels-*"))
    for row, whole in zip(done.answer["rows"][1:], own_copy.finished.answer["rows"][1:], strict=True):
        folder = Path(row["folder"])
        assert folder.name != Path(whole["folder"]).name
        resolved = yaml.safe_load((folder / "config.yaml").read_text())["resolved"]
        assert resolved["shuffle"] == "window"
        loss = config.student.loss if row["role"] == "student" else CeLoss(name="ce")
        spec = FitSpec(model_spec(data.data_manifest, config.student.model), config.student.train, loss, 0, "fp32")
        train, validation = (StoredSplit(data, split, labels, 256) for split in ("train", "validation"))
        place, worker = Folder.at(tmp_path / row["role"]), Worker(threads=resolved["threads"])
        alone = fit(spec, train, validation, place, worker)
        assert alone is not None
        summaries = [json.loads((Path(kept) / "summary.json").read_text()) for kept in (folder, whole["folder"])]
        assert [alone.weights_sha256 == kept["weights_sha256"] for kept in summaries] == [True, False]
    *stages, total = done.answer["profile"]
    assert [stage["stage"] for stage in stages] == ["start of Ray", "student", "end of Ray"]
    assert all(stages[1][phase] > 0 for phase in ("start-up", "reading", "compute", "evaluation", "checkpoints"))
    for row in (*stages, total):
        parts = [value for key, value in row.items() if key not in ("stage", "seconds")]
        assert sum(parts) == pytest.approx(row["seconds"], rel=0.05)
    assert total["seconds"] >= sum(stage["seconds"] for stage in stages)
    assert "start-up" in done.stdout  # the table, above the one line of JSON


def test_offline_tracking_leaves_one_run_a_stage(small_run: SmallRun) -> None:
    runs = list((small_run.out / "small" / "wandb").glob("offline-run-*"))
    assert len(runs) == 4  # teacher, labels, student, control
    assert "warning" not in small_run.finished.stderr


def test_two_data_parallel_workers_train_the_same_teacher(small_run: SmallRun, tmp_path: Path) -> None:
    """gloo, two Ray Train workers, the same global batches: the loss curve of one worker, to float tolerance."""
    config = write_config(tmp_path, SMALL_RUN | {"cluster": {"workers": 2, "cpus_per_worker": 1}})
    done = command("teacher", config, "--out", tmp_path / "runs", "--json")
    assert done.code == 0, done.stderr
    pair = only(tmp_path / "runs" / "artifacts", "teacher-*")
    assert yaml.safe_load((pair / "config.yaml").read_text())["resolved"]["workers"] == 2
    alone = only(small_run.out / "artifacts", "teacher-*")
    assert pair.name == alone.name  # the worker count does not change the result, so not the folder either
    curves = [
        [json.loads(line)["train_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (alone, pair)
    ]
    assert np.allclose(curves[0], curves[1], rtol=1e-3)


def test_two_data_parallel_workers_train_the_same_students_though_one_is_killed(own_copy: SmallRun) -> None:
    """Each student and control on both workers, one after another; the group that lost one goes on from its epoch."""
    alone = {row["folder"].split("/")[-1]: row for row in own_copy.finished.answer["rows"][1:]}
    curves = {name: _curve(own_copy.out / "artifacts" / name) for name in alone}
    for name in alone:
        shutil.rmtree(own_copy.out / "artifacts" / name)
    two = ["cluster.student_workers=2", "cluster.cpus_per_worker=1"]
    done, killed = kill_workers(
        ["run", own_copy.config, *two, "--out", own_copy.out, "--json"],
        [(lambda: epochs_done(own_copy.out, "student") >= 2, "RayTrainWorker")],
    )
    assert done.code == 0, done.stderr
    assert len(killed) == 1
    assert [stage["status"] for stage in done.answer["stages"]] == ["reused", "reused", "reused", "ran", "ran"]
    for row in done.answer["rows"][1:]:
        folder = Path(row["folder"])
        resolved = yaml.safe_load((folder / "config.yaml").read_text())["resolved"]
        assert (resolved["workers"], resolved["threads"]) == (2, 1)
        assert not list(folder.glob("failure.json"))
        assert np.allclose(_curve(folder), curves[folder.name], rtol=1e-3)
        assert row["accuracy"] == pytest.approx(alone[folder.name]["accuracy"], abs=0.02)


def _curve(folder: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_test_metrics_are_measured_in_exact_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finishes a student has not trained it: fit() cannot have seen to it there."""
    data, folder, cpu = make_data(tmp_path), Folder.at(tmp_path / "student"), torch.device("cpu")
    model = model_spec(data.data_manifest, MlpModel(name="mlp", hidden=(4,)))
    spec = FitSpec(model, TrainConfig(epochs=1, batch_size=12), CeLoss(name="ce"), 0, "fp32")
    result = fit(spec, read_split(data, "train"), read_split(data, "validation"), folder, Worker())
    assert result is not None
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    finish(folder, model, result, data, None, cpu, {})
    assert not torch.backends.cudnn.allow_tf32
    assert folder.read_json("summary.json")["test_rows"] == 12
