"""From Python: the public interface, in a script of its own, as a notebook would use it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import distill_ray
from distill_ray import config as configs
from distill_ray.errors import UserError
from distill_ray.stages import prepare
from tests.harness import RUN_TIMEOUT_S, SMALL_RUN, environment

SCRIPT = """
import json, signal, sys
before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
import distill_ray
from distill_ray.stages import label, student

config, out = json.loads(sys.argv[1]), sys.argv[2]
labels = label.run(config, out=out)
first = distill_ray.run(config, out=out)
warmer = config | {"name": "warmer", "student": config["student"] | {"loss": {"temperature": 4.0}}}
second = distill_ray.run(warmer, out=out)

assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
import ray
assert not ray.is_initialized()
ray.init(num_cpus=2, logging_level="ERROR", log_to_driver=False, include_dashboard=False)  # one's own stays
cooler = config | {"student": config["student"] | {"loss": {"temperature": 1.0}}}
students = student.run(cooler, out=out)
assert ray.is_initialized()
ray.shutdown()

store = distill_ray.store.open(str(labels.folder))
model = distill_ray.load_model(str(students[0].stage.folder))
print(json.dumps({
    "rows": store.manifest.rows, "training": model.training, "first": first["stages"], "second": second["stages"],
    "accuracies": [row["accuracy"] for row in first["rows"] + second["rows"]],
}))
"""


def test_several_runs_in_one_process_that_leave_it_as_it_was(tmp_path: Path) -> None:
    config = SMALL_RUN | {"labels": {"precision": "fp32"}, "tracking": {"wandb": {"mode": "disabled"}}}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(config), str(tmp_path / "runs")],
        capture_output=True, text=True, timeout=RUN_TIMEOUT_S, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1  # nothing is printed that was not asked for
    assert "epochs" not in done.stderr
    answer = json.loads(done.stdout)
    assert answer["rows"] == 1860
    assert answer["training"] is False
    statuses = [[(s["name"], s["status"]) for s in answer[key]] for key in ("first", "second")]
    assert statuses[0][:3] == [("prepare", "reused"), ("teacher", "reused"), ("label", "reused")]
    assert statuses[0][3:] == [("student", "ran"), ("student", "ran")]
    assert statuses[1][3:] == [("student", "ran"), ("student", "reused")]  # one control for both
    assert all(0 < accuracy <= 1 for accuracy in answer["accuracies"])


def test_a_stage_by_its_full_name_in_a_fresh_interpreter(tmp_path: Path) -> None:
    """With nothing imported but the package."""
    code = "import distill_ray; distill_ray.stages.label.run('absent.yaml')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment(), cwd=tmp_path
    )
    assert "UserError: config absent.yaml: no such file" in done.stderr.splitlines()[-1]
    with pytest.raises(ImportError, match="labels"):
        from distill_ray.stages import labels  # noqa: F401
    assert {"stages", "store"} <= set(distill_ray.__all__)


def test_a_config_that_is_wrong_is_an_exception_with_the_commands_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown key, did you mean 'rows'"):
        prepare.run(SMALL_RUN | {"data": {"source": "glyph62", "rowz": 3}}, out=str(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        prepare.run(tmp_path / "absent.yaml", out=str(tmp_path))
    with pytest.raises(UserError, match="--allow-import"):
        prepare.run(SMALL_RUN | {"teacher": {"model": {"import": "os:getcwd"}}}, out=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_config_object_is_taken_as_it_is(tmp_path: Path) -> None:
    config = configs.from_dict(SMALL_RUN)
    with pytest.raises(UserError, match="--out: is empty"):
        prepare.run(config, out=" ")
