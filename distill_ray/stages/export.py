"""export: the best student of a run, in forms that need none of this package to run, checked before they are offered.

``<out>/<name>/export/`` gets ``student.pt2`` (a torch.export program of network and input contract: raw rows in, logits
out, any batch size), the student's own ``model.safetensors`` and ``model.json``, and ``export.json``, which is written
last and says what the others are. A finalist of a search goes to ``export-<trial>/``.
"""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distill_ray import __version__
from distill_ray.artifacts import SPEC_FILE, WEIGHTS_FILE, score
from distill_ray.config import imports_of, to_dict
from distill_ray.errors import RunError, UserError
from distill_ray.models import Classifier, ModelSpec, load_classifier
from distill_ray.stages import entry, opening, prepare, results, search_space, student, tune
from distill_ray.stages.context import Context
from distill_ray.stages.student import Student
from distill_ray.storage import Folder

EXPORT_FOLDER = "export"
PROGRAM_FILE, RECORD_FILE = "student.pt2", "export.json"
FORMAT_VERSION = 1
MAX_LOGIT_DIFFERENCE = 1e-4
_CHECK_ROWS = 256


@entry.Stage
def run(context: Context) -> dict[str, Any]:
    """Export the run's best student, after every stage that it needs; returns where it is and what it holds.

    Raises:
        RunError: the exported program does not give the logits of ``load_model``; an earlier export stays as it was.
    """
    if context.config.tune is not None:
        context.reporter.warn("export: the student of the config itself; one that its search has found: --trial N")
    return _export(context, student.run(context), results.run_folder(context) / EXPORT_FOLDER)


def run_trial(context: Context, trial: int) -> dict[str, Any]:
    """Export the best seed of a finalist of the config's search, into a folder of its own; as ``run``.

    Raises:
        UserError: there is no such finalist; says which there are.
    """
    finalists = {point["trial"]: point for point in tune.run(context)["tune"]["front"] if point["finalist"]}
    if trial not in finalists:
        there = ", ".join(map(str, finalists))
        raise UserError(f"--trial {trial}: is no finalist of the search, which has {there}: name one of them")
    point = finalists[trial]
    section = search_space.lay_over(context.config.student, point["values"])
    config = context.config.model_copy(update={"student": section.model_copy(update={"seeds": tuple(point["seeds"])})})
    students = student.run_alone(replace(context, config=config))
    return _export(context, students, results.run_folder(context) / f"{EXPORT_FOLDER}-{trial}")


def _export(context: Context, students: Sequence[Student], folder: Folder) -> dict[str, Any]:
    best = best_student(students)
    record = finished(folder, best)
    if record is None:
        record = _write(context, best, folder)
    context.reporter.line(f"export: {folder}")
    return {"export": str(folder), **{key: record[key] for key in ("student", "files", "check")}}


def best_student(students: Sequence[Student]) -> Student:
    """The student of the highest validation accuracy (without labels: agreement with the teacher), the first among
    equals; controls do not count.

    The test split has no say: a model chosen on it would look better than it is.
    """
    candidates = [candidate for candidate in students if candidate.role == "student"]
    return max(candidates, key=lambda candidate: _score(_summary(candidate)))


def _score(summary: Mapping[str, Any]) -> float:
    return score({key: value for key, value in summary.items() if value is not None})


def finished(folder: Folder, chosen: Student) -> dict[str, Any] | None:
    """What ``export.json`` says, where this very student is exported already and every file is there in its size."""
    try:
        record = folder.read_json(RECORD_FILE)
        same = record["format_version"] == FORMAT_VERSION and record["code_version"] == __version__
        same = same and record["student"]["weights_sha256"] == _summary(chosen)["weights_sha256"]
        same = same and record["student"]["digest"] == chosen.stage.digest
        whole = all(folder.size(name) == file["bytes"] for name, file in record["files"].items())
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if same and whole else None


def to_program(model: Classifier, dtype: str) -> bytes:
    """``model`` as the bytes of a torch.export program: raw rows [B, *shape] of ``dtype`` to logits [B, classes].

    The example that is traced, and kept in the file, is made of zeros: no row of the data leaves with the model.
    """
    # Weights in channels_last order would be saved as incomplete slices of their storage (torch 2.13 warns of it).
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    example = torch.zeros((2, *model.shape), dtype=getattr(torch, dtype))  # a batch of 1 would be taken for a constant
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(plain, (example,), dynamic_shapes={"raw": {0: batch}})
    target = io.BytesIO()
    torch.export.save(program, target)
    return target.getvalue()


@torch.inference_mode()
def largest_difference(program: bytes, model: nn.Module, rows: Tensor) -> float:
    """Between a logit of the program, loaded from its bytes, and one of ``model``: all rows at once, and one alone."""
    loaded = torch.export.load(io.BytesIO(program)).module()
    return max(float((loaded(batch) - model(batch)).abs().max()) for batch in (rows, rows[:1]))


def _write(context: Context, best: Student, folder: Folder) -> dict[str, Any]:
    source = best.stage.folder
    names_code = any(imports_of(to_dict(context.config.student)))  # the command asked for permission
    model = load_classifier(source, expected_sha256=str(_summary(best)["weights_sha256"]), allow_import=names_code)
    files = {name: source.read_bytes(name) for name in (WEIGHTS_FILE, SPEC_FILE)}
    spec = ModelSpec.model_validate_json(files[SPEC_FILE])
    files[PROGRAM_FILE] = to_program(model, spec.dtype)
    rows = _test_rows(context)
    difference = largest_difference(files[PROGRAM_FILE], model, rows)
    if not difference <= MAX_LOGIT_DIFFERENCE:  # NaN is refused too
        raise RunError(
            f"export: {PROGRAM_FILE} differs from {source} by {difference:.2g} in a logit, at most "
            f"{MAX_LOGIT_DIFFERENCE:g} is allowed: nothing was written"
        )
    record = _record(best, spec, files)
    record["check"] = {"rows": len(rows), "max_logit_difference": difference, "allowed": MAX_LOGIT_DIFFERENCE}
    folder.delete(RECORD_FILE)  # while files are replaced, no record may vouch for them
    for name, data in files.items():
        folder.write_bytes(name, data)
    folder.write_json(RECORD_FILE, record)
    return record


def _record(best: Student, spec: ModelSpec, files: Mapping[str, bytes]) -> dict[str, Any]:
    summary = _summary(best)
    measured = ("accuracy", "validation_accuracy", "parameters", "weights_sha256", "teacher_digest", "data_digest")
    return {
        "format_version": FORMAT_VERSION,
        "code_version": __version__,
        "torch_version": str(torch.__version__),
        "student": {
            "name": best.title, "folder": str(best.stage.folder), "digest": best.stage.digest, "seed": best.seed,
            "loss": to_dict(best.loss), **{key: summary[key] for key in measured},
        },
        "input": {
            "shape": list(spec.shape), "dtype": spec.dtype, "batch": "any number of rows, at least 1",
            "contract": "raw stored rows; (raw * scale - mean) / std per channel is part of the program",
            **spec.input.model_dump(mode="json", exclude={"shape"}),
        },
        "output": {"logits": spec.classes, "class_names": list(spec.class_names)},
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        },
    }  # fmt: skip


def _test_rows(context: Context) -> Tensor:
    """Real rows that no model was trained on, as the store has them."""
    data = opening.data_store(context.config, prepare.run(context))
    first = data.manifest.splits["test"].shards[0]
    return torch.from_numpy(data.data_shard(first).inputs[:_CHECK_ROWS].copy())  # the shard is mapped read-only


def _summary(of: Student) -> dict[str, Any]:
    summary = of.stage.finished()
    if summary is None:
        raise RunError(f"{of.stage.folder}: is not finished")
    return summary
