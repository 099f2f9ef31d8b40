"""Code that a config names by an import path: found, fingerprinted without running it, and loaded.

Nothing here asks for permission: commands refuse a config that names code unless ``--allow-import`` was given, and
``load_model`` refuses a folder that does.

What a fingerprint covers: the files of the module and of the modules that its source imports, also compiled ones. What
it cannot see: modules that are imported by a name made at run time, and files that the code reads or compiles while it
runs.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import pkgutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, lru_cache
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from distill_ray.errors import UserError

_COMPILED = tuple(sorted({f".{suffix.rpartition('.')[2]}" for suffix in EXTENSION_SUFFIXES}))
_OURS = Path(__file__).parent
_loaded: dict[str, str] = {}  # by module, the SHA-256 of the file of one's own that this process has run


def make_importable() -> None:
    """Put the current folder before all others, as ``python -m`` does; Ray does the same in its workers. What has come
    into the folders is seen."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()  # a file may be younger than the last look at its folder


def load(path: str, key: str) -> Callable[..., Any]:
    """The callable ``package.module:name``; this runs the module, anew where a file of one's own has changed since this
    process ran it: a notebook and the workers of a Ray that stays up live longer than an edit.

    Raises:
        UserError: the module is not there or fails, or has no such callable; ``key`` names the config's section.
    """
    make_importable()
    module_name, _, name = path.partition(":")
    files = local_files(module_name)
    now = {module: _sha256(file) for module, file in files.items()}
    _forget_changed(files, now, f"{key} {path}")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UserError(_not_there(path, key)) from None
        raise UserError(f"{key} {path}: importing it fails: {error}: install that, or mend the import") from error
    except Exception as error:  # whatever the user's module raises while it runs
        raise UserError(f"{key} {path}: importing it fails: {type(error).__name__}: {_line(error)}") from error
    _loaded.update({module: sha256 for module, sha256 in now.items() if module in sys.modules})
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"{key} {path}: {module_name} has no {name!r}: write package.module:callable")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{key} {path}: is a {type(found).__name__}, not a callable that makes a network")
    made: Callable[..., Any] = found
    return made


def _forget_changed(files: Mapping[str, Path], now: Mapping[str, str], place: str) -> None:
    """Let the modules of ``files`` be imported anew where one of them is not what this process has run."""
    changed = [name for name, file in files.items() if name in sys.modules and _is_other(name, file, now[name])]
    if not changed:
        return
    built = [files[name] for name in changed if files[name].suffix in _COMPILED]
    if built:
        raise UserError(
            f"{place}: {built[0]} was built anew since this process imported it, and compiled code stays as it was "
            "loaded: start the process again (in a notebook the kernel, and its Ray with ray.shutdown())"
        )
    for name in [name for name in sys.modules if any(name == own or name.startswith(f"{own}.") for own in files)]:
        if not str(getattr(sys.modules[name], "__file__", "")).endswith(_COMPILED):
            del sys.modules[name]  # those that import what has changed hold on to it


def _is_other(name: str, file: Path, sha256: str) -> bool:
    if name in _loaded:
        return _loaded[name] != sha256
    status = file.stat()  # imported by somebody else: when is not known, but not before this process began
    return max(status.st_mtime, status.st_ctime) >= _process_started_s()


@cache
def _process_started_s() -> float:
    """In Unix seconds; 0 where the system does not say it."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0.0
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def fingerprint(path: str, key: str) -> str:
    """SHA-256 over the source text of the module and of what it imports from beside it, and over the bytes of compiled
    modules among them; nothing is run.

    Of an installed package all its files count, of other folders on the path, those of editable installs too, the ones
    that the module reaches by imports.

    Raises:
        UserError: the module is not there, or its file cannot be read.
    """
    make_importable()
    module = path.partition(":")[0]
    spec = find(module)
    if spec is None:
        raise UserError(_not_there(path, key))
    files = _files(module)
    if spec.origin is not None and module not in files:
        raise UserError(f"{key} {path}: lies in {spec.origin}, where changes cannot be seen: install it as plain files")
    sha256 = hashlib.sha256()
    for name, file in sorted(files.items()):
        sha256.update(f"{name}\0".encode())
        sha256.update(bytes.fromhex(_sha256(file)))
    return sha256.hexdigest()


def _sha256(file: Path) -> str:
    if file.suffix not in _COMPILED:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    status = file.stat()
    return _sha256_of_compiled(file, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=4096)
def _sha256_of_compiled(file: Path, size: int, changed_ns: int, status_ns: int) -> str:
    """Read once a process: there may be a gigabyte of it."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def find(module: str) -> ModuleSpec | None:
    """Where a module's source is, by the rules of import but without running its packages."""
    spec: ModuleSpec | None = None
    where: Iterable[str] | None = sys.path
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        if where is None:
            return None  # a module that is no package holds no modules
        name = ".".join(parts[:depth])
        spec = _in_folders(name, where) or _by_finders(name, None if depth == 1 else where)
        if spec is None:
            return None
        where = spec.submodule_search_locations
    return spec


def _in_folders(name: str, folders: Iterable[str]) -> ModuleSpec | None:
    """As ``PathFinder``, which for a namespace package below another one needs the upper one to be imported."""
    portions: list[str] = []
    for folder in folders:
        finder = pkgutil.get_importer(folder or str(Path.cwd()))
        spec = finder.find_spec(name) if finder is not None else None
        if spec is not None and spec.loader is not None:
            return spec
        portions += (spec.submodule_search_locations or ()) if spec is not None else ()
    if not portions:
        return None
    namespace = ModuleSpec(name, None, is_package=True)
    namespace.submodule_search_locations = portions
    return namespace


def _by_finders(name: str, where: Iterable[str] | None) -> ModuleSpec | None:
    """By the finders that packages have put beside Python's own, as editable installs do."""
    if name.partition(".")[0] in sys.stdlib_module_names:
        return None
    for finder in sys.meta_path:
        if finder is not PathFinder and hasattr(finder, "find_spec"):
            spec = finder.find_spec(name, None if where is None else list(where), None)
            if spec is not None:
                return spec
    return None


def local_files(module: str) -> dict[str, Path]:
    """Module name to file, of the module and what it imports, as far as they are no installed packages."""
    return {name: file for name, file in _files(module).items() if _is_local(file)}


def relative_path(name: str, file: Path) -> Path:
    """Where a module lies below the folder that it is imported from."""
    place = Path(*name.split("."))
    return place / file.name if file.stem.partition(".")[0] == "__init__" else place.parent / file.name


def _files(module: str) -> dict[str, Path]:
    top = module.partition(".")[0]
    found: dict[str, Path] = {}
    ahead = [module]
    while ahead:
        name = ahead.pop()
        spec = find(name) if name not in found else None
        file = Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None
        if file is None or not file.is_file():
            ahead += _parents(name) if spec is not None else ()  # a package without a file of its own
            continue
        if name.partition(".")[0] != top and not _is_local(file):
            continue
        found[name] = file
        ahead += [*_parents(name), *(_imported(name, file) if file.suffix == ".py" else ())]
    return found | _whole(module, found)


def _whole(module: str, found: Mapping[str, Path]) -> dict[str, Path]:
    """All files of the installed package that the module belongs to: it may import some of them later."""
    packages = (found[name] for name in [*_parents(module), module] if name in found)
    package = next((file for file in packages if file.name == "__init__.py"), None)
    if package is None or _is_local(package):
        return {}
    files = (path for path in package.parent.rglob("*") if path.suffix == ".py" or path.suffix in _COMPILED)
    return {path.relative_to(package.parent.parent).as_posix(): path for path in files}


def _is_local(file: Path) -> bool:
    """Neither of an installed package (this one counts as such, wherever it is) nor of Python itself.

    Not a question of where this process runs: a worker must answer it as the command does.
    """
    if {"site-packages", "dist-packages"} & set(file.parts) or file.is_relative_to(_OURS):
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
