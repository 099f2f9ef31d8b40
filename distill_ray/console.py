"""What a person sees: progress on stderr, results on stdout.

On a terminal long work has bars; elsewhere (a log, CI) the same work prints plain lines, at most one every few seconds.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

_PLAIN_LINE_EVERY_S = 5.0
_SILENT_S, _LOOK_EVERY_S = 60.0, 1.0


@dataclass
class Reporter:
    """Where progress goes. ``quiet`` silences everything but errors."""

    quiet: bool = False
    _stderr: Console = field(default_factory=lambda: Console(stderr=True, highlight=False, soft_wrap=True))

    def line(self, text: str) -> None:
        """One line of news."""
        if not self.quiet:
            self._stderr.print(text, markup=False)

    def warn(self, text: str) -> None:
        """One line that matters even to a quiet run."""
        self._stderr.print(f"warning: {text}", markup=False)

    @contextmanager
    def progress(self, description: str, total: float) -> Iterator[Bar]:
        """A bar for work of ``total`` steps; where it stands still for long, lines that say so."""
        with self._bar(description, total) as bar:
            over = threading.Event()
            watcher = threading.Thread(target=bar.watch, args=(over,), name="watch-progress", daemon=True)
            watcher.start()
            try:
                yield bar
            finally:
                over.set()
                watcher.join()

    @contextmanager
    def _bar(self, description: str, total: float) -> Iterator[Bar]:
        if self.quiet or not self._stderr.is_terminal:
            yield Bar(self, description, total, None, None)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        with _WithTable(*columns, console=self._stderr, transient=True) as bars:
            yield Bar(self, description, total, bars, bars.add_task(description, total=total, note=""))


class _WithTable(Progress):
    """A bar below a table that changes with it."""

    table: Table | None = None

    def get_renderables(self) -> Iterator[RenderableType]:
        if self.table is not None:
            yield self.table
        yield from super().get_renderables()


@dataclass
class Bar:
    """Progress of one piece of work, as a bar or as lines."""

    reporter: Reporter
    description: str
    total: float
    bars: _WithTable | None
    task: TaskID | None
    _last_line: float = 0.0
    _done: float = 0.0
    _news: float = 0.0
    _last_news: float = field(default_factory=time.monotonic)

    def watch(self, over: threading.Event) -> None:
        """Say so, again and again, while nothing is heard of the work: slow steps, or storage that refuses requests."""
        told = self._last_news
        while not over.wait(_LOOK_EVERY_S):
            silent_s = time.monotonic() - self._last_news
            if silent_s >= _SILENT_S and time.monotonic() - told >= _SILENT_S:
                told = time.monotonic()
                self.reporter.line(
                    f"{self.description}: {self._done:g}/{self.total:g} for {silent_s:.0f} s without news; "
                    "slow work, or storage that does not answer the workers"
                )

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """What the work consists of at the moment; on a terminal alone, above the bar."""
        if self.bars is None:
            return
        shown = Table(box=None, header_style="bold")
        for heading in headings:
            shown.add_column(heading, overflow="ellipsis", no_wrap=True)
        for row in rows:
            shown.add_row(*row)
        self.bars.table = shown

    def update(self, done: float, note: str = "", *, news: float = 0.0) -> None:
        """``done`` of ``total`` steps are finished; ``news`` changes where work goes on within a step."""
        if (done, news) != (self._done, self._news):
            self._done, self._news, self._last_news = done, news, time.monotonic()
        if self.bars is not None and self.task is not None:
            self.bars.update(self.task, completed=done, note=note)
        elif time.monotonic() - self._last_line >= _PLAIN_LINE_EVERY_S or done >= self.total:
            self._last_line = time.monotonic()
            self.reporter.line(f"{self.description}: {done:g}/{self.total:g}  {note}")


# (heading, key, digits), and what a narrow terminal does without, first to go first.
_COLUMNS = (
    ("accuracy", "accuracy", 4), ("macro F1", "macro_f1", 4), ("KL to teacher", "kl_to_teacher", 4),
    ("agreement", "agreement", 4), ("ECE", "ece", 4), ("parameters", "parameters", None), ("bytes", "bytes", None),
    ("latency ms", "latency_ms", 3),
    ("seconds", "seconds", 1),
)  # fmt: skip
_DISPENSABLE = ("bytes", "seconds", "ece", "agreement", "macro_f1", "latency_ms")
_LOG_WIDTH = 160  # a log has no width of its own: never fold a row there


def results_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the results of a run on stdout; no number is ever cut, a narrow terminal gets fewer columns."""
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, width=_LOG_WIDTH)
    for dropped in range(len(_DISPENSABLE) + 1):
        table = _table(title, rows, _DISPENSABLE[:dropped])
        if Console(width=10 * _LOG_WIDTH).measure(table).maximum <= console.width:
            break
    console.print(table)


def profile_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print where the time went, a row a stage, on stdout."""
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, width=_LOG_WIDTH)
    table = Table(title="seconds, mean over workers side by side", title_justify="left", header_style="bold")
    for number, key in enumerate(rows[0]):
        table.add_column(key, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        if row is rows[-1]:
            table.add_section()
        table.add_row(*(value if isinstance(value, str) else f"{value:.1f}" for value in row.values()))
    console.print(table)


def search_table(title: str, found: Mapping[str, Any]) -> None:
    """Print the finalists of a search on stdout, beside their controls, and what the label store saved."""
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, width=_LOG_WIDTH)
    synthetic = " of synthetic data" if found["synthetic"] else ""
    heading = f"{title}: finalists, test split{synthetic}, {found['seeds']} seed(s)"
    table = Table(title=heading, title_justify="left", header_style="bold")
    headings = ("trial", "parameters", "latency ms", "values", "student", "control", "difference, points", "verdict")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("values", "verdict") else "right", overflow="fold")
    for point in found["front"]:
        if point["finalist"]:
            table.add_row(*_finalist_cells(point))
    console.print(table)
    seconds = found["teacher_seconds_saved"]
    worth = "" if seconds is None else f", {seconds:,.0f} s of its time"
    print(
        f"{found['trials']} trials of {found['students']} students, {found['control_trials']} trials of controls, from "
        f"one set of labels: {found['teacher_passes_saved']} passes of the teacher saved{worth}\n"
        f"report: {found['folder']}/report.html; one of the finalists for use: distill-ray export CONFIG --trial N"
    )


def _finalist_cells(point: Mapping[str, Any]) -> list[str]:
    values = ", ".join(
        f"{key}={f'{value:.4g}' if isinstance(value, float) else value}" for key, value in point["values"].items()
    )
    test, control, difference = point["test_accuracy"] or point["test_agreement"], point["control"], point["difference"]
    cells = [
        str(point["trial"]),
        f"{point['parameters']:,}",
        f"{point['latency_ms']:.3f}",
        values,
        _spread(test),
        _spread(control),
    ]
    if difference is None:
        return [*cells, "n/a", ""]
    interval = (
        "" if difference["low"] is None else f" [{100 * difference['low']:+.2f}, {100 * difference['high']:+.2f}]"
    )
    return [*cells, f"{100 * difference['mean']:+.2f}{interval}", difference["verdict"]]


def _spread(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return "n/a"
    return f"{measured['mean']:.4f}" + ("" if measured["std"] is None else f" ± {measured['std']:.4f}")


def _table(title: str, rows: Sequence[Mapping[str, Any]], without: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("model", overflow="fold")
    shown = [column for column in _COLUMNS if column[1] not in without]
    for heading, _, _ in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(str(row["name"]), *(_number(row.get(key), digits) for _, key, digits in shown))
    return table


def _number(value: float | None, digits: int | None = None) -> str:
    if value is None:
        return "n/a"
    return f"{value:,}" if digits is None else f"{value:.{digits}f}"
