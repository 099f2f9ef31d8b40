"""How a stage is run: by the command line, which has a context open, or from Python with a config alone."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from distill_ray import config as configs
from distill_ray.config import Config
from distill_ray.console import Reporter
from distill_ray.errors import UserError
from distill_ray.runtime import Session
from distill_ray.stages import given
from distill_ray.stages.context import Context
from distill_ray.storage import Folder, check_writable
from distill_ray.tracking import Tracker, closing

ConfigLike: TypeAlias = Config | str | Path | Mapping[str, Any]
T = TypeVar("T")


@contextmanager
def opened(
    config: ConfigLike, overrides: Sequence[str] = (), *, out: str = "runs", quiet: bool = True,
    allow_import: bool = False, debug: bool = False, in_command: bool = False, search: Path | None = None,
) -> Iterator[Context]:  # fmt: skip
    """A context for the stages of one run; at its end Ray and W&B are left as they were found.

    Args:
        config: a config, the path of a YAML file, or its content as a dict.
        overrides: such as ``student.loss.temperature=4``.
        out: folder or URI that runs and artifacts go to.
        quiet: print nothing but warnings.
        allow_import: permit code that the config names by import path.
        debug: show Ray's own log.
        in_command: this process is the command's own, to be ended where Ray's head is lost.
        search: a file with a search, laid over the config.

    Raises:
        UserError: what is wrong with the config, with ``out``, or with a file that the config gives.
    """
    read = _read(config, overrides, search)
    if not allow_import:
        configs.refuse_imports(read)
    if not out.strip():
        raise UserError("--out: is empty: name a folder")
    place = Folder.at(out)
    check_writable(place)
    given.check_present(read)
    reporter = Reporter(quiet=quiet)
    session = Session(read, place, debug=debug, in_command=in_command)
    run_folder = place / read.name
    directory = run_folder.path if run_folder.is_local else Path(tempfile.gettempdir()) / "distill-ray-wandb"
    tracker = Tracker(read.tracking.wandb, read.name, directory, reporter.warn)
    try:
        with closing(tracker):
            yield Context(read, place, reporter, session, tracker)
    finally:
        session.close()


def _read(config: ConfigLike, overrides: Sequence[str], search: Path | None) -> Config:
    if isinstance(config, str | Path):
        return configs.load(config, overrides, search=search)
    if overrides:
        raise UserError("overrides are for a config in a file: change the dict instead")
    return config if isinstance(config, Config) else configs.from_dict(config)


class Stage(Generic[T]):
    """A stage as a function of a context, or of a config."""

    def __init__(self, work: Callable[[Context], T]) -> None:
        self._work = work
        functools.update_wrapper(self, work)

    def __call__(
        self, config: Context | ConfigLike, *, out: str = "runs", quiet: bool = True, allow_import: bool = False
    ) -> T:
        """Run the stage, and whatever it needs that is not finished.

        Args:
            config: as for ``opened``; or a context that is open already.
            out, quiet, allow_import: as for ``opened``; not for a context, which has its own.

        Raises:
            UserError, RunError: as the command tells them in one line.
        """
        if isinstance(config, Context):
            return self._work(config)
        with opened(config, out=out, quiet=quiet, allow_import=allow_import) as context:
            return self._work(context)
