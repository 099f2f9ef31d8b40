"""Code that a config names by an import path: found, fingerprinted without running it, and loaded.

Nothing here asks for permission: commands refuse a config that names code unless ``--allow-import`` was given, and
``load_model`` refuses a folder that does.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from distill_ray.errors import UserError


def make_importable() -> None:
    """Put the current folder before all others, as ``python -m`` does; Ray does the same in its workers."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def load(path: str, key: str) -> Callable[..., Any]:
    """The callable ``package.module:name``; this runs the module.

    Raises:
        UserError: the module is not there or fails, or has no such callable; ``key`` names the config's section.
    """
    make_importable()
    module_name, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(_not_there(path, key)) from None
        raise UserError(f"{key} {path}: importing it fails: {error}: install that, or mend the import") from error
    except Exception as error:  # whatever the user's module raises while it runs
        raise UserError(f"{key} {path}: importing it fails: {type(error).__name__}: {_line(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"{key} {path}: {module_name} has no {name!r}: write package.module:callable")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{key} {path}: is a {type(found).__name__}, not a callable that makes a network")
    made: Callable[..., Any] = found
    return made


def fingerprint(path: str, key: str) -> str:
    """SHA-256 over the source text of the module and of what it imports from beside it; nothing is run.

    Of an installed package all its files count, of other folders on the path those that the module reaches by imports.

    Raises:
        UserError: the module is not there.
    """
    make_importable()
    module = path.partition(":")[0]
    spec = find(module)
    if spec is None:
        raise UserError(_not_there(path, key))
    sha256 = hashlib.sha256()
    for name, file in sorted(_files(module).items()):
        sha256.update(f"{name}\0".encode())
        sha256.update(hashlib.sha256(file.read_bytes()).digest())
    return sha256.hexdigest()


def find(module: str) -> ModuleSpec | None:
    """Where a module's source is, by the rules of import but without running its packages."""
    spec: ModuleSpec | None = None
    where: Any = None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:depth]), where)
        if spec is None:
            return None
        where = spec.submodule_search_locations
    return spec


def local_files(module: str) -> dict[str, Path]:
    """Module name to file, of the module and what it imports, as far as they are no installed packages."""
    return {name: file for name, file in _files(module).items() if _is_local(file)}


def relative_path(name: str, file: Path) -> Path:
    """Where a module lies below the folder that it is imported from."""
    place = Path(*name.split("."))
    return place / file.name if file.name == "__init__.py" else place.with_suffix(".py")


def _files(module: str) -> dict[str, Path]:
    top = module.partition(".")[0]
    found: dict[str, Path] = {}
    ahead = [module]
    while ahead:
        name = ahead.pop()
        spec = find(name)
        file = Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None
        if file is None or file.suffix != ".py" or name in found:
            continue
        if name.partition(".")[0] != top and not _is_local(file):
            continue
        found[name] = file
        ahead += [*_parents(name), *_imported(name, file)]
    whole = found.get(top)
    if whole is not None and whole.name == "__init__.py" and not _is_local(whole):  # what it imports later, too
        root = whole.parent.parent
        found |= {path.relative_to(root).as_posix(): path for path in whole.parent.rglob("*.py")}
    return found


def _is_local(file: Path) -> bool:
    """Neither of an installed package nor of Python itself. Not a question of where this process runs: a worker must
    answer it as the command does."""
    if {"site-packages", "dist-packages"} & set(file.parts):
        return False
    return not any(file.is_relative_to(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _imported(name: str, file: Path) -> Iterator[str]:
    """What the source imports, by absolute name; a name imported from a module may be a module itself."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return  # the import itself will tell
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).strip(".")
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)


def _not_there(path: str, key: str) -> str:
    module = path.partition(":")[0]
    return (
        f"{key} {path}: there is no module {module}, neither in the folder {Path.cwd()} nor among the installed "
        "packages"
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or "no reason given"
