"""The tree itself: imports go one way, plain modules know no ray, functions stay short, --help is fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import distill_ray
from tests.harness import environment

ROOT = Path(distill_ray.__file__).parent

# From the bottom up: a module may import those before it, never those after it.
LAYERS = (
    "errors", "config", "storage", "artifacts", "usercode", "sources", "models", "losses", "precision", "inference",
    "memory", "profiling", "evidence", "console", "store", "logit_files", "metrics", "replay", "order", "rows",
    "checkpoints", "optimizing", "footprint", "validation", "training", "tracking", "placing", "runtime", "stages",
    "starting", "interrupts", "cli",
)  # fmt: skip
RAY_MODULES = ("runtime", "stages")


def _modules() -> Iterator[tuple[str, Path, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield parts[0], path, ast.parse(path.read_text())


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _layers_of(tree: ast.Module) -> set[str]:
    names = {name.split(".")[1] for name in _imported(tree) if name.startswith("distill_ray.")}
    return names & set(LAYERS)


def test_every_module_has_its_layer() -> None:
    assert {layer for layer, _, _ in _modules()} - {"__init__"} == set(LAYERS)


def test_imports_go_downwards_only() -> None:
    # Deferred imports inside functions count too: they hide cycles, they do not remove them.
    upwards = [
        f"{path.relative_to(ROOT)} imports {other}"
        for layer, path, tree in _modules()
        if layer != "__init__"
        for other in _layers_of(tree)
        if LAYERS.index(other) > LAYERS.index(layer)
    ]
    assert upwards == []


def test_plain_modules_know_no_ray() -> None:
    found = [
        str(path.relative_to(ROOT))
        for layer, path, tree in _modules()
        if layer not in RAY_MODULES and any(name.split(".")[0] == "ray" for name in _imported(tree))
    ]
    assert found == []


def test_no_function_is_longer_than_60_lines() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for _, path, tree in _modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60
    ]
    assert long == []


def test_nothing_is_pickled_or_loaded_as_a_pickle() -> None:
    forbidden = ("pickle", "cloudpickle", "dill", "joblib")
    for _, path, tree in _modules():
        assert not [name for name in _imported(tree) if name.split(".")[0] in forbidden], path
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not {"torch.save", "yaml.unsafe_load"} & {ast.unparse(call.func) for call in calls}, path
        for call in calls:
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if ast.unparse(call.func) == "torch.load":  # of a teacher that is given
                assert arguments.get("weights_only") == "True", path
            if ast.unparse(call.func) == "np.load":
                assert arguments.get("allow_pickle") == "False", path


def test_help_answers_without_torch_or_ray() -> None:
    code = (
        "import sys; from distill_ray.cli import _guarded; code = _guarded(['run', '--help']); "
        "heavy = {'torch', 'ray', 'pyarrow', 'wandb', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'{heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment())
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout
