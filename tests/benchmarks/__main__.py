"""python -m tests.benchmarks NAME... [--json]: run benchmarks; without names, list them."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

import tests.benchmarks
from tests.benchmarks.common import REGISTRY, Figure, Settings, summary_of

_LOG_WIDTH = 120  # of a table that does not go to a terminal


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 when everything ran, whether its target is met or not; 2 for a mistake on the command line."""
    options = _parser().parse_args(arguments)
    _import_all()
    if not options.names:
        width = max(map(len, REGISTRY))
        print("\n".join(f"{name:<{width}}  {summary_of(function)}" for name, function in REGISTRY.items()))
        return 0
    unknown = [name for name in options.names if not _select(name)]
    if unknown:
        groups = sorted({name.split(".")[0] for name in REGISTRY})
        print(f"benchmarks: no benchmark {unknown[0]!r}; there are {', '.join([*groups, *REGISTRY])}", file=sys.stderr)
        return 2
    chosen = list(dict.fromkeys(name for asked in options.names for name in _select(asked)))
    if options.out is not None:
        _run(chosen, Settings(options.out.absolute(), options.pairs, options.seconds, options.scale), options.json)
        return 0
    with tempfile.TemporaryDirectory(prefix="distill-ray-benchmarks-") as scratch:
        _run(chosen, Settings(Path(scratch), options.pairs, options.seconds, options.scale), options.json)
    return 0


def _run(names: Sequence[str], settings: Settings, as_json: bool) -> None:
    figures = []
    for name in names:
        figures.append(REGISTRY[name](settings))
        if as_json:
            print(json.dumps(figures[-1].row()), flush=True)
    if not as_json:
        _show(figures)


def _show(figures: Sequence[Figure]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_LOG_WIDTH)
    table = Table(header_style="bold")
    table.add_column("benchmark", no_wrap=True)
    for heading in ("ratio", "target", "met", "ours", "reference", "unit", "pairs"):
        table.add_column(heading, justify="right" if heading not in ("met", "unit") else "left", no_wrap=True)
    for figure in figures:
        target = "" if figure.target is None else f"{'≤' if figure.at_most else '≥'} {figure.target:g}"
        met = {True: "yes", False: "NO", None: ""}[figure.met]
        table.add_row(
            figure.name, _number(figure.ratio, 3), target, met, _number(figure.ours), _number(figure.reference),
            figure.unit, str(len(figure.pairs)),
        )  # fmt: skip
    console.print(table)


def _number(value: float | None, digits: int | None = None) -> str:
    if value is None:
        return ""
    if digits is None:
        digits = 0 if value >= 1000 else 3
    return f"{value:,.{digits}f}"


def _select(asked: str) -> list[str]:
    """The benchmark of this name, or those of this group."""
    return [name for name in REGISTRY if asked in (name, name.split(".")[0])]


def _import_all() -> None:
    for module in pkgutil.iter_modules(tests.benchmarks.__path__):
        if module.name != "__main__":
            importlib.import_module(f"tests.benchmarks.{module.name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a benchmark, or a group such as label")
    parser.add_argument("--json", action="store_true", help="one JSON object a line for each figure")
    parser.add_argument(
        "--pairs", type=_positive(int), default=5, help="alternating pairs of each figure (%(default)s)"
    )
    parser.add_argument(
        "--seconds", type=_positive(float), default=60.0, help="how long the bare loop takes (%(default)s)"
    )
    parser.add_argument("--scale", type=_positive(float), default=1.0, help="other sizes, times this, for a quick look")
    parser.add_argument("--out", type=Path, default=None, help="folder to work in (default: a temporary one, removed)")
    return parser


def _positive(kind: type[int] | type[float]) -> type[int] | type[float]:
    def parse(text: str) -> float:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its message
    return parse  # type: ignore[return-value]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
