"""report: report.html of a run, one file that shows what came out and needs nothing else to be read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from distill_ray import evidence
from distill_ray.config import to_dict, to_yaml
from distill_ray.stages import charts, entry, pages, progress, results
from distill_ray.stages.charts import Curve
from distill_ray.stages.context import Context
from distill_ray.storage import Folder
from distill_ray.store import LabelManifest
from distill_ray.store import manifest as manifests

REPORT_FILE = "report.html"
_TEMPLATE = "report.html.j2"
_DRAWN = re.compile(r"<!--charts (?P<digest>\w+)-->(?P<html>.*?)<!--/charts-->", re.DOTALL)


@dataclass(frozen=True)
class Pair:
    """A student and the control of the same seed: test accuracies, and what distillation added."""

    seed: int
    student: float
    control: float

    @property
    def gain(self) -> float:
        """Above 0 where the student is the better one."""
        return self.student - self.control


@entry.Stage
def run(context: Context) -> dict[str, Any]:
    """Make every stage that the report shows, then write it; returns where it is."""
    return {"report": write_report(context, results.write(context))}


def write_report(context: Context, summary: Mapping[str, Any]) -> str:
    """Write ``report.html`` of a run whose summary is ``summary``; returns its location.

    Curves that the existing report already shows are taken from it, and an unchanged report is not written again, so
    that this costs a reused run next to nothing.
    """
    folder = results.run_folder(context)
    before = _existing(folder)
    html = _render(context, summary, before)
    if html != before:
        folder.write_text(REPORT_FILE, html)
    location = folder.location(REPORT_FILE)
    context.reporter.line(f"report: {location}")
    return location


def pairs(rows: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """Students beside their controls, by seed, as far as both have a test accuracy."""
    controls = {row["seed"]: row["accuracy"] for row in rows if row["role"] == "control"}
    found = []
    for row in rows:
        control = controls.get(row["seed"]) if row["role"] == "student" else None
        if control is not None and row["accuracy"] is not None:
            found.append(Pair(row["seed"], row["accuracy"], control))
    return found


def verdict(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What distillation did to the test accuracy, in sentences: each seed, then the mean with its uncertainty."""
    distilled = [row for row in rows if row["role"] == "student" and row.get("loss", {}).get("name", "ce") != "ce"]
    if distilled and not any(row["role"] == "control" for row in rows):
        agreements = ", ".join(f"{100 * row['agreement']:.2f} %" for row in distilled)
        return [
            "The training rows have no labels, so there is no control to compare with. The students choose the "
            f"teacher's class on {agreements} of the test rows."
        ]
    if not any(row["role"] == "control" for row in rows):
        return ["The student of this run learns from the hard labels alone: there is no distillation to judge."]
    found = pairs(rows)
    if not found:
        return ["The test split has no labels: whether distillation gained accuracy cannot be said."]
    sentences = [
        f"Seed {pair.seed}: the distilled student is right on {100 * pair.student:.2f} % of the test rows, its "
        f"control on {100 * pair.control:.2f} %: distillation {pages.change(pair.gain)}."
        for pair in found
    ]
    return [*sentences, _overall([pair.gain for pair in found])]


def verdict_in_short(rows: Sequence[Mapping[str, Any]]) -> str:
    """What ``verdict`` comes to, for the line below the table."""
    sentences = verdict(rows)
    return " ".join(sentences) if len(sentences) <= 2 else sentences[-1]


def _overall(gains: Sequence[float]) -> str:
    if len(gains) < 2:
        return (
            "This is one seed, and one seed says nothing about the spread between seeds: several in student.seeds show "
            "whether the difference is more than chance."
        )
    difference = evidence.paired_difference(gains, [0.0] * len(gains))
    low, high = difference["low"], difference["high"]
    text = (
        f"Over {len(gains)} seeds distillation {pages.change(difference['mean'])} on average; the 95 % interval of the "
        f"paired difference (Student's t) goes from {100 * low:+.2f} to {100 * high:+.2f} points"
    )
    if low <= 0 <= high:
        return f"{text} and spans 0: not resolved with these seeds."
    return f"{text}."


def _existing(folder: Folder) -> str | None:
    try:
        return folder.read_bytes(REPORT_FILE).decode()
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def _render(context: Context, summary: Mapping[str, Any], before: str | None) -> str:
    curves = _curves(summary["rows"])
    digest = charts.digest(curves)
    drawn = _DRAWN.search(before or "")
    environment = pages.environment()
    environment.filters |= {"ratio": _ratio, "short": _short}
    return environment.get_template(_TEMPLATE).render(
        summary=summary, teacher=summary["rows"][0], verdict=verdict(summary["rows"]), lines=_legend(summary["rows"]),
        charts_digest=digest, charts=None if drawn and drawn["digest"] == digest else _drawings(curves),
        # Our own output of an earlier run, found by the digest of what it shows: not to be escaped a second time.
        charts_html=Markup(drawn["html"]) if drawn else None, labels=_label_manifest(summary), config=_yaml(context),
    )  # fmt: skip


def _drawings(curves: Sequence[Curve]) -> list[tuple[str, Markup]]:
    return [(chart.title, Markup(chart.svg)) for chart in charts.draw(curves)]


def _curves(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    return [
        Curve(row["role"], row.get("loss", {}).get("name") == "kd", progress.read_history(Folder(row["folder"])))
        for row in rows
    ]


def _legend(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, charts.Line]]:
    """Roles in the order of the table, with the number of models that each stands for."""
    counts = {role: sum(row["role"] == role for row in rows) for role in charts.LINES}
    return [(f"{role}s ({n} seeds)" if n > 1 else role, charts.LINES[role]) for role, n in counts.items() if n]


def _label_manifest(summary: Mapping[str, Any]) -> LabelManifest | None:
    folder = next((stage["folder"] for stage in summary["stages"] if stage["name"] == "label"), None)
    manifest = manifests.read(Folder(folder)) if folder else None
    return manifest if isinstance(manifest, LabelManifest) else None


def _yaml(context: Context) -> str:
    return to_yaml(to_dict(context.config))


def _ratio(value: int | None, whole: int | None) -> str:
    """How many times ``value`` goes into the teacher's, as 1/n."""
    return f"1/{whole / value:.3g}" if value and whole else "n/a"


def _short(folder: str) -> str:
    """A folder's last two parts: all runs under one --out share the rest."""
    return "/".join(folder.split("/")[-2:])
