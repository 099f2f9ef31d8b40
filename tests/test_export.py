"""export: the right student, files that work without this package, and no file that does not."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distill_ray.artifacts import Stage
from distill_ray.config import CeLoss, KdLoss
from distill_ray.errors import RunError
from distill_ray.models import Classifier, load_classifier, load_model
from distill_ray.stages import export, prepare, student
from distill_ray.stages.context import Context
from distill_ray.stages.student import Role, Student
from distill_ray.storage import Folder
from distill_ray.store import open_store, read_split
from tests.report_fixtures import SEEDS, context_of, finish_run

FILES = {"student.pt2", "model.safetensors", "model.json"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """A run whose every stage is finished. Tests must not change its artifacts."""
    return finish_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def exported(finished: Context) -> Path:
    """The first export of the run."""
    context = context_of(finished.out)
    answer = export.run(context)
    assert not context.session.started
    return Path(answer["export"])


def record_of(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "export.json").read_text())
    assert isinstance(record, dict)
    return record


def rows_of(context: Context) -> torch.Tensor:
    data = open_store(prepare.run(context_of(context.out)).folder)
    return torch.from_numpy(read_split(data, "test").inputs)


def states(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def candidate(folder: Path, role: Role, seed: int, validation_accuracy: float) -> Student:
    place = Folder.at(folder / f"student-{role}-{seed}")
    place.write_json("summary.json", {"validation_accuracy": validation_accuracy})
    loss = KdLoss(name="kd") if role == "student" else CeLoss(name="ce")
    return Student(role, loss, seed, Stage("student", f"{role}{seed}", place))


# --- which student --------------------------------------------------------------------------------------------------


def test_the_best_student_is_chosen_on_validation_rows_and_is_no_control(tmp_path: Path) -> None:
    students = [
        candidate(tmp_path, "student", 0, 0.50), candidate(tmp_path, "control", 0, 0.99),
        candidate(tmp_path, "student", 1, 0.70), candidate(tmp_path, "student", 2, 0.70),
    ]  # fmt: skip
    assert export.best_student(students) is students[2]  # the first of two equals


def test_an_unfinished_student_is_refused(tmp_path: Path) -> None:
    unfinished = candidate(tmp_path, "student", 0, 0.5)
    unfinished.stage.folder.delete("summary.json")
    with pytest.raises(RunError, match="is not finished"):
        export.best_student([unfinished])


# --- what is written ------------------------------------------------------------------------------------------------


def test_the_record_describes_the_files(exported: Path, finished: Context) -> None:
    record = record_of(exported)
    assert {path.name for path in exported.iterdir()} == FILES | {"export.json"}
    assert set(record["files"]) == FILES
    for name, file in record["files"].items():
        data = (exported / name).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    best = export.best_student(student.run(context_of(finished.out)))
    summary = best.stage.finished() or {}
    assert record["student"]["digest"] == best.stage.digest
    assert record["student"]["seed"] in SEEDS
    assert record["student"]["accuracy"] == summary["accuracy"]
    assert record["student"]["weights_sha256"] == record["files"]["model.safetensors"]["sha256"]
    assert (record["input"]["shape"], record["input"]["dtype"]) == ([1, 32, 32], "uint8")
    assert record["input"]["scale"] == finished.config.data.input.scale
    assert record["output"]["logits"] == len(record["output"]["class_names"]) == 62
    assert record["check"]["max_logit_difference"] <= record["check"]["allowed"] == 1e-4
    assert record["check"]["rows"] == len(rows_of(finished))


@pytest.mark.parametrize("batch", [1, 2, 7, 31])
def test_the_program_gives_the_students_logits_for_any_batch(exported: Path, finished: Context, batch: int) -> None:
    program = torch.export.load(exported / "student.pt2").module()
    original = load_model(record_of(exported)["student"]["folder"])
    rows = rows_of(finished)[:batch]
    assert len(rows) == batch
    with torch.inference_mode():
        found, expected = program(rows), original(rows)
    assert found.shape == (batch, 62)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.01  # logits that are all alike would prove nothing


def test_the_copied_model_loads_as_the_student_does(exported: Path, finished: Context) -> None:
    rows = rows_of(finished)
    original = load_model(record_of(exported)["student"]["folder"])
    with torch.inference_mode():
        assert torch.equal(load_model(str(exported))(rows), original(rows))


def test_no_row_of_the_data_leaves_with_the_program(exported: Path) -> None:
    example = torch.export.load(exported / "student.pt2").example_inputs
    assert example is None or not any(tensor.any() for tensor in example[0])


def test_the_program_needs_torch_alone(exported: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "rows = torch.zeros((3, 1, 32, 32), dtype=torch.uint8)\n"
        "print(tuple(torch.export.load(sys.argv[1]).module()(rows).shape), 'distill_ray' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(exported / "student.pt2")],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.strip() == "(3, 62) False", done.stderr


# --- again, and when it goes wrong ----------------------------------------------------------------------------------


def test_a_finished_export_is_not_made_again(
    exported: Path, finished: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = states(exported)

    def to_program(model: Classifier, dtype: str) -> bytes:
        raise AssertionError("exported again")

    monkeypatch.setattr(export, "to_program", to_program)
    assert export.run(context_of(finished.out))["files"] == record_of(exported)["files"]
    assert states(exported) == before


@pytest.mark.parametrize("damage", ["file gone", "file shortened", "record gone", "record broken", "other student"])
def test_an_export_that_is_not_whole_is_made_again(exported: Path, finished: Context, damage: str) -> None:
    best = export.best_student(student.run(context_of(finished.out)))
    place = Folder.at(exported)
    kept = states(exported)
    assert export.finished(place, best) == record_of(exported)
    try:
        if damage == "file gone":
            (exported / "model.json").unlink()
        elif damage == "file shortened":
            (exported / "student.pt2").write_bytes(b"PK")
        elif damage == "record gone":
            (exported / "export.json").unlink()
        elif damage == "record broken":
            (exported / "export.json").write_text("[1, 2]")
        else:
            record = record_of(exported)
            record["student"]["digest"] = "0" * 16
            (exported / "export.json").write_text(json.dumps(record))
        assert export.finished(place, best) is None
    finally:
        for name, (_, data) in kept.items():
            (exported / name).write_bytes(data)


def test_a_program_that_differs_is_refused_and_nothing_changes(
    exported: Path, finished: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    (exported / "export.json").rename(exported / "aside.json")  # else the finished export would be returned
    before = states(exported)
    faithful = export.to_program

    def spoiled(model: Classifier, dtype: str) -> bytes:
        other = load_classifier(str(exported))
        with torch.no_grad():
            next(reversed(list(other.parameters())))[0] += 1e-3  # one bias of 62
        return faithful(other, dtype)

    monkeypatch.setattr(export, "to_program", spoiled)
    with pytest.raises(RunError, match=r"student\.pt2 differs from .* by 0\.001 in a logit, at most 0\.0001"):
        export.run(context_of(finished.out))
    assert states(exported) == before
    (exported / "aside.json").rename(exported / "export.json")


def test_logits_that_are_not_numbers_are_refused(
    finished: Context, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = (exported / "export.json").read_bytes()
    (exported / "export.json").unlink()
    monkeypatch.setattr(export, "to_program", lambda model, dtype: (exported / "student.pt2").read_bytes())
    monkeypatch.setattr(export, "largest_difference", lambda program, model, rows: float("nan"))
    with pytest.raises(RunError, match="by nan in a logit"):
        export.run(context_of(finished.out))
    (exported / "export.json").write_bytes(kept)


def test_the_largest_difference_is_found_in_any_row(exported: Path, finished: Context) -> None:
    program = (exported / "student.pt2").read_bytes()
    rows = rows_of(finished)

    class Shifted(torch.nn.Module):
        """The program's logits, one of them in the last row moved by 0.5."""

        def forward(self, raw: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = torch.export.load(io.BytesIO(program)).module()(raw).clone()
            if len(raw) > 1:
                logits[-1, 3] += 0.5
            return logits

    assert export.largest_difference(program, Shifted(), rows) == pytest.approx(0.5, abs=1e-5)
    assert export.largest_difference(program, Shifted(), rows[:1]) == 0.0
