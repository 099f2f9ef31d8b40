"""report.html: what it says, that it needs nothing else, and that a reused run hardly pays for it."""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from distill_ray.stages import charts, report, results
from distill_ray.stages.charts import Chart, Curve
from distill_ray.stages.context import Context
from distill_ray.storage import Folder
from tests.report_fixtures import PRECISION_CHECK, SEEDS, context_of, finish_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """A run whose every stage is finished. Tests must not change its artifacts."""
    return finish_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def summary(finished: Context) -> dict[str, Any]:
    return results.write(context_of(finished.out))


@pytest.fixture(scope="module")
def html(finished: Context) -> str:
    answer = report.run(context_of(finished.out))
    return Path(answer["report"]).read_text()


def row(role: str, seed: int, accuracy: float | None) -> dict[str, Any]:
    return {"role": role, "seed": seed, "accuracy": accuracy}


def runs(*accuracies: tuple[float | None, float | None]) -> list[dict[str, Any]]:
    """Rows of a summary: the teacher, then a student and its control for each seed."""
    pairs = [[row("student", seed, s), row("control", seed, c)] for seed, (s, c) in enumerate(accuracies)]
    return [{"role": "teacher", "accuracy": 0.9}, *(one for pair in pairs for one in pair)]


# --- what distillation did ------------------------------------------------------------------------------------------


def test_one_seed_claims_no_spread() -> None:
    first, last = report.verdict(runs((0.3675, 0.43)))
    assert "right on 36.75 % of the test rows, its control on 43.00 %" in first
    assert "lost 6.25 percentage points" in first
    assert "one seed says nothing about the spread" in last
    assert "interval" not in last


def test_below_the_table_stands_what_it_comes_to() -> None:
    one, three = runs((0.3675, 0.43)), runs((0.52, 0.50), (0.63, 0.60), (0.54, 0.50))
    assert report.verdict_in_short(one) == " ".join(report.verdict(one))
    assert report.verdict_in_short(three) == report.verdict(three)[-1]


def test_seeds_that_agree_resolve_a_gain() -> None:
    *each, last = report.verdict(runs((0.52, 0.50), (0.63, 0.60), (0.54, 0.50)))
    assert ["gained" in sentence for sentence in each] == [True] * 3
    # gains 2, 3, 4 points: mean 3, standard deviation 1, half width 4.303 / sqrt(3) = 2.48
    assert "gained 3.00 percentage points on average" in last
    assert "from +0.52 to +5.48 points." in last
    assert "not resolved" not in last


def test_a_resolved_loss_is_called_a_loss() -> None:
    last = report.verdict(runs((0.50, 0.52), (0.60, 0.63), (0.50, 0.54)))[-1]
    assert "lost 3.00 percentage points on average" in last
    assert "from -5.48 to -0.52 points." in last


def test_seeds_that_disagree_resolve_nothing() -> None:
    last = report.verdict(runs((0.52, 0.50), (0.50, 0.51)))[-1]
    assert "spans 0: not resolved" in last


def test_equal_accuracies_are_no_gain() -> None:
    first, last = report.verdict(runs((0.5, 0.5), (0.5, 0.5)))[-2:]
    assert "neither gained nor lost" in first
    assert "not resolved" in last


def test_pairs_are_joined_by_seed_not_by_position() -> None:
    rows = [row("control", 1, 0.1), row("student", 0, 0.5), row("control", 0, 0.4), row("student", 1, 0.3)]
    assert [(pair.seed, round(pair.gain, 6)) for pair in report.pairs(rows)] == [(0, 0.1), (1, 0.2)]


def test_without_a_control_or_labels_nothing_is_claimed() -> None:
    (alone,) = report.verdict([row("student", 0, 0.5)])
    assert "no distillation to judge" in alone
    (unlabelled,) = report.verdict(runs((None, None)))
    assert "no labels" in unlabelled


# --- the file -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Texts of the table cells, attributes that could fetch something, and whether every element is closed."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name.split(":")[-1] in ("src", "href", "data")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data


def test_run_writes_the_report_without_starting_ray(finished: Context) -> None:
    context = context_of(finished.out)
    answer = report.run(context)
    assert answer == {"report": str(finished.out.path / "tiny" / "report.html")}
    assert not context.session.started
    assert {outcome.status for outcome in context.outcomes.values()} == {"reused"}


def test_every_row_of_the_summary_is_in_the_table(html: str, summary: dict[str, Any]) -> None:
    cells = Page(html).cells
    assert [one["role"] for one in summary["rows"]] == ["teacher", *["student", "control"] * len(SEEDS)]
    for one in summary["rows"]:
        start = cells.index(one["name"])
        texts = cells[start + 1 : start + 11]
        assert texts[:5] == [f"{one[key]:.4f}" for key in ("accuracy", "macro_f1", "kl_to_teacher", "agreement", "ece")]
        assert texts[5] == f"{one['parameters']:,}"
        assert texts[6] == f"1/{summary['rows'][0]['parameters'] / one['parameters']:.3g}"
        assert float(texts[7].split()[0]) == pytest.approx(one["bytes"] / 1000, rel=0.01)
        assert texts[7].endswith(" kB")
        assert texts[8:] == [f"{one['latency_ms']:.3f}", f"{one['seconds']:.1f}"]


def test_stages_checks_and_config_are_shown(html: str, summary: dict[str, Any], finished: Context) -> None:
    cells = Page(html).cells
    for stage in summary["stages"]:
        assert "/".join(stage["folder"].split("/")[-2:]) in cells
    assert cells.count("reused") == len(summary["stages"]) == 3 + 2 * len(SEEDS)
    text = " ".join(re.sub(r"<[^>]*>", "", html).split())
    assert f"in fp32 for {finished_rows(finished):,} rows" in text
    assert f"on {PRECISION_CHECK['rows']:.0f} training rows: the same class on 87.50 %" in text
    assert "KL(fp32 ‖ fp32) 0.0012 nats, largest difference of a logit 0.046" in text
    assert "temperature: 2.0" in text  # a default of the config


def finished_rows(context: Context) -> int:
    data = context.config.data
    assert data.source == "glyph62"
    return data.rows


def test_the_file_needs_nothing_else(html: str) -> None:
    page = Page(html)
    assert page.open == []
    assert [reference for reference in page.references if not reference.startswith("#")] == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "@import" not in html
    assert re.findall(r"url\((?!#)", html) == []
    addresses = set(re.findall(r"https?://[^\s\"<]+", html))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not places


def test_synthetic_data_are_called_so(finished: Context, summary: dict[str, Any], html: str) -> None:
    assert "synthetic data" in html
    real = Path(report.write_report(context_of(finished.out), summary | {"synthetic": False})).read_text()
    assert "synthetic" not in real.split("<h2>Config")[0]


def test_what_others_named_is_escaped(finished: Context, summary: dict[str, Any]) -> None:
    hostile = copy.deepcopy(summary)
    hostile["rows"][1]["name"] = "<script>alert(1)</script>"
    written = Path(report.write_report(context_of(finished.out), hostile)).read_text()
    assert "<script>" not in written
    assert "&lt;script&gt;alert(1)" in written


def test_values_that_were_not_measured_are_not_invented(finished: Context, summary: dict[str, Any]) -> None:
    unlabelled = copy.deepcopy(summary)
    for one in unlabelled["rows"]:
        one.update(accuracy=None, macro_f1=None, ece=None)
    unlabelled["precision_check"] = None
    written = Path(report.write_report(context_of(finished.out), unlabelled)).read_text()
    assert Page(written).cells.count("n/a") == 3 * len(summary["rows"])
    assert "No comparison with fp32 was recorded" in written


def test_the_report_goes_to_a_uri(finished: Context, summary: dict[str, Any], tmp_path: Path, html: str) -> None:
    (tmp_path / "tiny").mkdir()
    location = report.write_report(context_of(Folder(f"file://{tmp_path}")), summary)
    assert location == f"file://{tmp_path}/tiny/report.html"
    assert (tmp_path / "tiny" / "report.html").read_text() == html


# --- its curves -----------------------------------------------------------------------------------------------------


def lines_in(drawing: str, color: str) -> int:
    return len(re.findall(rf'style="fill: none;[^"]* stroke: {color}; stroke-width: 1.5', drawing))


def test_curves_of_every_model_are_drawn(html: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    seeds = len(SEEDS)
    expected = [(1, seeds, seeds), (1, seeds, seeds), (0, seeds, 0)]  # only the distilled have the distillation term
    assert [tuple(lines_in(drawing, line.color) for line in charts.LINES.values()) for drawing in drawings] == expected
    assert all("currentColor" in drawing and "#010203" not in drawing for drawing in drawings)


def test_a_reused_run_draws_nothing_and_leaves_the_file(
    finished: Context, summary: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(report.write_report(context_of(finished.out), summary))
    before, content = path.stat().st_mtime_ns, path.read_text()

    def draw(curves: list[Curve]) -> list[Chart]:
        raise AssertionError("drawn again")

    monkeypatch.setattr(charts, "draw", draw)
    report.write_report(context_of(finished.out), summary)
    assert path.stat().st_mtime_ns == before
    changed = copy.deepcopy(summary)
    changed["stages"][0] |= {"status": "ran", "seconds": 12.34}
    report.write_report(context_of(finished.out), changed)  # other text, the same curves
    assert "12.3" in Page(path.read_text()).cells
    report.write_report(context_of(finished.out), summary)
    assert path.read_text() == content
    monkeypatch.setattr(charts, "digest", lambda curves: "0123456789abcdef")
    with pytest.raises(AssertionError, match="drawn again"):
        report.write_report(context_of(finished.out), summary)


def test_a_damaged_report_is_written_anew(finished: Context, summary: dict[str, Any], html: str) -> None:
    path = Path(report.write_report(context_of(finished.out), summary))
    path.write_bytes(b"\xff\xfe not ours")
    report.write_report(context_of(finished.out), summary)
    assert path.read_text() == html


def epochs(*values: float) -> list[dict[str, float]]:
    return [{"epoch": n, "train_ce": value, "train_kd": 0.0} for n, value in enumerate(values, start=1)]


def test_digest_covers_every_epoch() -> None:
    one, other = (charts.digest([Curve("teacher", False, epochs(2.0, value))]) for value in (1.0, 1.5))
    assert one != other
    assert one == charts.digest([Curve("teacher", False, epochs(2.0, 1.0))])


def test_only_what_was_measured_gets_a_chart() -> None:
    assert charts.draw([]) == []
    assert charts.draw([Curve("teacher", False, [])]) == []
    (only,) = charts.draw([Curve("control", False, epochs(2.0, math.nan, 1.0))])  # no accuracy, nothing distilled
    assert only.title.startswith("Cross-entropy")
    assert only.svg.count("<use ") >= 2


def test_drawing_twice_gives_the_same_bytes() -> None:
    curves = [Curve("student", True, epochs(2.0, 1.0))]
    assert charts.draw(curves) == charts.draw(curves)
