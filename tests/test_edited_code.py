"""One's own code, edited between two runs of one process, as in a notebook whose Ray stays up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.harness import RUN_TIMEOUT_S, SMALL_RUN, environment
from tests.own_code import write_package

SCRIPT = """
import json, pathlib, shutil, sys
import ray
from distill_ray.errors import UserError
from distill_ray.stages import student

config, out, nets = json.loads(sys.argv[1]), sys.argv[2], pathlib.Path("my_pkg/nets.py")

def parameters():
    return [s.stage.finished()["parameters"] for s in student.run(config, out=out, allow_import=True)]

quiet = {"num_cpus": 2, "logging_level": "ERROR", "log_to_driver": False, "include_dashboard": False}
ray.init(**quiet)
found = [parameters()]
nets.write_text(nets.read_text().replace("width=32", "width=48"))
found.append(parameters())
ray.shutdown()

shutil.copytree("my_pkg", "older/my_pkg")  # what travelled with a Ray that was started for it
nets.write_text(nets.read_text().replace("width=48", "width=56"))
ray.init(**quiet, runtime_env={"working_dir": "older"})
try:
    parameters()
except UserError as error:
    found.append(str(error))
ray.shutdown()
print(json.dumps(found))
"""


def test_what_is_trained_is_the_code_that_names_the_folder(tmp_path: Path) -> None:
    here = write_package(tmp_path / "here")
    train = {"epochs": 1, "batch_size": 256, "precision": "fp32"}
    config = SMALL_RUN | {
        "data": {"source": "glyph62", "rows": 620, "shard_rows": 310},
        "teacher": {"model": {"name": "mlp", "hidden": [8]}, "train": train},
        "labels": {"precision": "fp32"}, "tracking": {"wandb": {"mode": "disabled"}},
        "student": {"model": {"import": "my_pkg.nets:flat"}, "train": train, "seeds": [0]},
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(config), str(tmp_path / "runs")],
        capture_output=True, text=True, timeout=RUN_TIMEOUT_S, env=environment(), cwd=here,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second, refused = json.loads(done.stdout.splitlines()[-1])
    sizes = [1024 * width + width + width * 62 + 62 for width in (32, 48)]
    assert (first, second) == ([sizes[0]] * 2, [sizes[1]] * 2)
    assert "my_pkg.nets: the workers of the Ray that was running before have other source of it" in refused
