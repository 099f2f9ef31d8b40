"""verify runs the teacher again: right labels pass, other labels and other weights are told."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill_ray.errors import UserError
from distill_ray.replay import SAMPLE_ROWS, replay
from distill_ray.storage import Folder
from distill_ray.store import Store, open_store, shards
from distill_ray.store import manifest as manifests
from tests.conftest import SmallRun
from tests.harness import distill_ray, only


def opened(run: SmallRun) -> tuple[Store, Store, Folder]:
    labels, data, teacher = (only(run.out / "artifacts", f"{name}-*") for name in ("labels", "data", "teacher"))
    return open_store(str(labels)), open_store(str(data)), Folder.at(teacher)


def rewrite(labels: Store, change: object) -> None:
    """Give every shard other logits, with checksums and manifest to match."""
    records = []
    for record in labels.manifest.shards:
        shard = labels.label_shard(record)
        logits = change(shard.logits.astype(np.float32))  # type: ignore[operator]
        batch = shards.encode_logits(shard.row_ids, logits, precision=labels.label_manifest.precision)
        written = shards.write(labels.folder, record.split, record.index, batch, store=labels.manifest.digest)
        records.append(written)
    manifest = labels.label_manifest.model_copy(update={"splits": manifests.split_records(records)})
    manifests.write(labels.folder, manifest)


def test_the_teachers_own_logits_pass_to_float16_rounding(small_run: SmallRun) -> None:
    labels, data, teacher = opened(small_run)
    found = replay(labels, data, teacher)
    assert found["precision"] == "fp32"
    assert SAMPLE_ROWS * 0.8 < found["rows"] <= SAMPLE_ROWS + 8
    assert found["wrong_rows"] == 0
    assert found["top1_agreement"] > 0.98  # a tie within float16 may fall the other way
    assert 0 < found["max_abs_difference"] < 0.02  # logits down to -20 in float16
    assert replay(labels, data, teacher) == found  # the same sample for everyone


def test_the_command_reports_it(small_run: SmallRun) -> None:
    labels, data, teacher = opened(small_run)
    done = distill_ray("verify", labels.folder.path, "--json", "--sample", "40")
    assert done.code == 0, done.stderr
    assert done.answer["replay"] == replay(labels, data, teacher, rows=40)
    shown = distill_ray("verify", labels.folder.path, "--quiet", "--json", "--sample", "0")
    assert shown.answer["replay"] is None


@pytest.mark.parametrize(
    "change",
    [lambda logits: np.roll(logits, 1, axis=0), lambda logits: logits * 1.01, lambda logits: logits[:, ::-1]],
    ids=["rows shifted by one", "1 % larger", "classes reversed"],
)
def test_other_logits_are_told(own_copy: SmallRun, change: object) -> None:
    rewrite(opened(own_copy)[0], change)
    labels, data, teacher = opened(own_copy)
    with pytest.raises(UserError, match=r"the teacher, run again, gives other logits for \d+ of \d+ sampled rows, row"):
        replay(labels, data, teacher)
    done = distill_ray("verify", labels.folder.path)
    assert done.code == 2
    assert "1 fault" in done.stderr
    last = done.stderr.splitlines()[-1]
    # The accuracy on the test split is looked at first; logits that are only scaled keep it.
    assert "gives other logits" in last or "on the test split, the teacher's summary.json says" in last


def test_a_teacher_with_other_weights_is_told(own_copy: SmallRun) -> None:
    labels, data, teacher = opened(own_copy)
    weights = teacher.path / "model.safetensors"
    tensors = {name: tensor + 0.01 * torch.ones_like(tensor) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    summary = json.loads((teacher.path / "summary.json").read_text())
    summary["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (teacher.path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match=r"not the weights that were asked for"):
        replay(labels, data, teacher)


def test_without_the_teacher_it_says_that_nothing_was_run(own_copy: SmallRun, tmp_path: Path) -> None:
    labels, _, teacher = opened(own_copy)
    teacher.path.rename(tmp_path / "elsewhere")
    done = distill_ray("verify", labels.folder.path, "--json")
    assert done.code == 0, done.stderr
    assert done.answer["replay"] is None
    assert f"there is no {teacher.name} beside it: no row was run again" in done.stderr
