"""What a search shows: that the drawings hold its numbers, and that the page says what they come to."""

from __future__ import annotations

import copy
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill_ray.stages import charts, search_charts, search_report
from distill_ray.stages.search_charts import Drawing
from distill_ray.stages.search_results import TrialRow
from distill_ray.storage import Folder
from tests import search_fixtures
from tests.search_fixtures import CHANNELS, PARAMETERS, TEMPERATURES, pareto_of, summary_of, trial_rows

NAMES = ["front", "latency", "temperature"]
STUDENT, CONTROL = charts.LINES["student"].color, charts.LINES["control"].color


@pytest.fixture(scope="module")
def rows() -> list[TrialRow]:
    return trial_rows()


@pytest.fixture(scope="module")
def controls() -> list[TrialRow]:
    return search_fixtures.control_rows()


@pytest.fixture(scope="module")
def pareto(rows: list[TrialRow]) -> dict[str, Any]:
    return pareto_of(rows)


@pytest.fixture(scope="module")
def drawings(rows: list[TrialRow], pareto: dict[str, Any]) -> dict[str, Drawing]:
    return {drawing.name: drawing for drawing in search_charts.draw(rows, pareto)}


def written(
    folder: Path, rows: list[TrialRow], pareto: dict[str, Any], controls: list[TrialRow], **changed: Any
) -> str:
    summary = summary_of(rows, controls) | changed
    location = search_report.write(Folder.at(folder), "tiny", rows, controls, pareto, summary)
    return Path(location).read_text()


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, rows: list[TrialRow], pareto: dict[str, Any], controls: list[TrialRow]
) -> Path:
    path = tmp_path_factory.mktemp("search")
    written(path, rows, pareto, controls)
    return path


# --- the drawings -----------------------------------------------------------------------------------------------------


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def marks(svg: str, color: str) -> list[tuple[float, float]]:
    """Places of the marks of a colour, in points from the top left: legend and data alike."""
    uses = re.findall(r'<use [^>]*?x="([\d.]+)" y="([\d.]+)" style="([^"]*)"', svg)
    return [(float(x), float(y)) for x, y, style in uses if f"fill: {color}" in style]


def height_of(svg: str, share: float) -> float:
    """Where an accuracy stands, by the axis' own ticks: the drawing is read as a reader reads it."""
    tick = r'y="([\d.]+)" style="[^"]*stroke-width: 0.8"/>\s*</g>\s*</g>\s*<g>\s*<text [^>]*anchor: end[^>]*>([\d.]+)<'
    found = [(float(y), float(label)) for y, label in re.findall(tick, svg)]
    (low_y, low), (high_y, high) = found[0], found[-1]
    return low_y + (share - low) / (high - low) * (high_y - low_y)


def lines(svg: str, color: str, width: str) -> list[list[tuple[float, float]]]:
    """The lines of a colour and width inside the axes, as their corners."""
    paths = re.findall(rf'<path d="([^"]*)" clip-path="[^"]*" style="[^"]*stroke: {color}; stroke-width: {width}', svg)
    return [[(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)] for path in paths]


@pytest.mark.parametrize("name", ["front", "latency"])
def test_finalists_and_controls_stand_at_their_test_accuracy(
    name: str, drawings: dict[str, Drawing], pareto: dict[str, Any]
) -> None:
    svg = drawings[name].inline
    for color, entries in (
        (STUDENT, [point["test_accuracy"] for point in pareto["front"]]),
        (CONTROL, [point["control"] for point in pareto["front"]]),
    ):
        heights = [y for _, y in marks(svg, color)]
        for entry in entries:
            assert min(abs(height_of(svg, entry["mean"]) - y) for y in heights) < 0.01
        for (bottom, top), entry in zip(lines(svg, color, "1.4"), entries, strict=True):
            assert bottom[1] == pytest.approx(height_of(svg, entry["mean"] - entry["std"]), abs=0.01)
            assert top[1] == pytest.approx(height_of(svg, entry["mean"] + entry["std"]), abs=0.01)


@pytest.mark.parametrize(("name", "key"), [("front", "parameters"), ("latency", "latency_ms")])
def test_costs_are_on_a_logarithmic_axis(
    name: str, key: str, drawings: dict[str, Drawing], pareto: dict[str, Any]
) -> None:
    ours, theirs = ([line[0][0] for line in lines(drawings[name].inline, c, "1.4")] for c in (STUDENT, CONTROL))
    assert np.subtract(theirs, ours) == pytest.approx([10.0] * 4)  # side by side, around their common cost
    logs = np.log([point[key] for point in pareto["front"]])
    assert np.diff(ours) / np.diff(logs) == pytest.approx([(ours[3] - ours[0]) / (logs[3] - logs[0])] * 3, rel=1e-4)


def test_the_teacher_is_a_line_across(drawings: dict[str, Drawing]) -> None:
    for name in ("front", "latency"):
        svg = drawings[name].inline
        ((start, end),) = lines(svg, charts.LINES["teacher"].color, "1.6")
        assert start[1] == end[1] == pytest.approx(height_of(svg, 0.7752), abs=0.01)


def test_the_front_is_a_staircase_through_its_trials(drawings: dict[str, Drawing], pareto: dict[str, Any]) -> None:
    for name, front in (("front", pareto["front"]), ("latency", [p for p in pareto["latency"] if p["on_front"]])):
        svg = drawings[name].inline
        ((*corners,),) = lines(svg, search_charts._FRONT.color, "1.2")
        assert len(corners) == 2 * len(front) - 1
        heights = [height_of(svg, point["validation_accuracy"]) for point in front]
        assert [y for _, y in corners[::2]] == pytest.approx(heights, abs=0.01)


def test_every_completed_trial_has_its_faint_mark(drawings: dict[str, Drawing], rows: list[TrialRow]) -> None:
    done = sum(row.status == "completed" for row in rows)
    assert done < len(rows)
    for name in ("front", "latency"):
        assert drawings[name].inline.count("fill-opacity: 0.35") == done + 1  # the legend's own


def test_legends_name_everything_with_its_unit(drawings: dict[str, Drawing], pareto: dict[str, Any]) -> None:
    front, latency = texts(drawings["front"].inline), texts(drawings["latency"].inline)
    assert {"parameters", "accuracy, share of rows"} <= set(front)
    assert "latency, ms (1 row, fp32, 1 thread, measured alone)" in latency
    assert "finalists (#trial), test accuracy, mean ± sd of 5 seeds" in front
    assert "their CE-only controls, test accuracy, mean ± sd of 5 seeds" in front
    assert "teacher, test: 0.7752, 4,311,614 parameters" in front
    assert "teacher, test: 0.7752, 4,311,614 parameters, 1.91 ms" in latency
    assert {f"#{point['trial']}" for point in pareto["front"]} <= set(front) & set(latency)
    assert {"20 k", "500 k"} <= set(front)


def test_temperature_has_a_line_and_a_label_for_each_size(drawings: dict[str, Drawing]) -> None:
    told = texts(drawings["temperature"].inline)
    assert [text for text in told if text.endswith(" parameters")] == [f"{n:,} parameters" for n in PARAMETERS]
    assert [text for text in told if re.fullmatch(r"\d+", text)] == [f"{t:g}" for t in TEMPERATURES]
    places = marks(drawings["temperature"].inline, search_charts._LOOKS[0].color)
    columns = sorted({x for x, _ in places})
    assert len(columns) == len(TEMPERATURES) + 1  # the legend's own
    data = [x for x in columns if sum(abs(x - other) < 0.01 for other, _ in places) == 3]  # two trials, their median
    assert np.ptp(np.diff(data)) < 0.1  # each step of log2 is as wide


def test_the_median_of_a_size_is_drawn() -> None:
    made = [
        TrialRow(n, {"loss.temperature": t}, a, 1, 100, 1.0, "completed", None, None)
        for n, (t, a) in enumerate([(1.0, 0.2), (4.0, 0.1), (4.0, 0.3), (4.0, 0.7)])
    ]
    drawing = search_charts.draw(made, pareto_of(made))[-1]
    (((_, y_low), (_, y_high)),) = lines(drawing.inline, STUDENT, "1.6")
    trials = sorted({y for _, y in marks(drawing.inline, STUDENT)})
    # From the top: 0.7, 0.3, 0.2, 0.1; then the legend.
    assert y_high == pytest.approx(trials[1], abs=0.01)
    assert y_low == pytest.approx(trials[2], abs=0.01)


def test_temperature_is_drawn_only_where_it_was_searched(rows: list[TrialRow]) -> None:
    same = [replace(row, values=dict(row.values) | {"loss.temperature": 2.0}) for row in rows]
    without = [replace(row, values={"train.lr": 0.1}) for row in rows]
    hard = [replace(row, values=dict(row.values) | {"loss.name": "ce"}) for row in rows]
    for chosen in (same, without, hard):
        assert [drawing.name for drawing in search_charts.draw(chosen, pareto_of(chosen))] == NAMES[:2]


def test_drawn_temperatures_are_gathered_at_powers_of_two() -> None:
    random = np.random.default_rng(0)
    made = [
        TrialRow(n, {"loss.temperature": float(2**t)}, 0.3 + n / 1000, 1, 100 * (n % 9 + 1), 1.0, "completed", None, "")
        for n, t in enumerate(random.uniform(0, 4, 300))
    ]
    told = texts(search_charts.draw(made, pareto_of(made))[-1].inline)
    assert [text for text in told if re.fullmatch(r"\d+", text)] == ["1", "2", "4", "8", "16"]
    assert sum(text.endswith("00 parameters") for text in told) == 6
    assert "trials of other sizes" in told


def test_drawing_twice_gives_the_same_bytes(
    rows: list[TrialRow], pareto: dict[str, Any], drawings: dict[str, Drawing]
) -> None:
    assert search_charts.draw(rows, pareto) == list(drawings.values())
    assert all("<dc:date>" not in drawing.svg for drawing in drawings.values())


def test_ids_of_one_page_differ_from_drawing_to_drawing(drawings: dict[str, Drawing]) -> None:
    ids = [set(re.findall(r' id="([^"]*)"', drawing.inline)) for drawing in drawings.values()]
    assert all(ids)
    assert sum(map(len, ids)) == len(set.union(*ids))


def test_pngs_are_drawn_on_white(drawings: dict[str, Drawing]) -> None:
    for drawing in drawings.values():
        image = Image.open(io.BytesIO(drawing.png))
        assert tuple(round(dots) for dots in image.info["dpi"]) == (150, 150)
        pixels = np.asarray(image.convert("RGBA"))
        assert pixels[..., 3].min() == 255
        assert (pixels[0, 0] == 255).all()
        dark = (pixels[..., :3].max(axis=2) < 128).mean()
        assert 0.002 < dark < 0.2, drawing.name
        # Nothing is cut: the outermost pixels are paper (the teacher's line goes to the axes' right end).
        assert (pixels[[0, -1]] == 255).all()
        assert (pixels[:, 0] == 255).all()


def test_a_file_of_its_own_is_on_white_and_a_page_lends_its_colours(drawings: dict[str, Drawing]) -> None:
    for drawing in drawings.values():
        assert "fill: #ffffff" in drawing.svg
        assert "currentColor" not in drawing.svg
        assert drawing.inline.startswith("<svg ")
        assert "currentColor" in drawing.inline
        assert charts.INK not in drawing.inline
        assert "fill: #ffffff" not in drawing.inline


# --- what may be missing ----------------------------------------------------------------------------------------------


def test_a_search_without_a_completed_trial_still_draws(rows: list[TrialRow]) -> None:
    none = [row for row in rows if row.status != "completed"]
    made = search_charts.draw(none, {"front": [], "latency": [], "teacher": None})
    assert [drawing.name for drawing in made] == NAMES[:2]
    assert all("no completed trial to show" in texts(drawing.inline) for drawing in made)


def test_one_trial_with_one_seed_has_no_deviation(rows: list[TrialRow], tmp_path: Path) -> None:
    pareto = pareto_of(rows[:1], seeds=1)
    told = texts(search_charts.draw(rows[:1], pareto)[0].inline)
    assert "finalists (#trial), test accuracy, 1 seed" in told
    html = written(tmp_path, rows[:1], pareto, [], seeds=1)
    assert "±" not in table(html, 0)
    assert "one seed says nothing about the spread between seeds: not resolved." in html
    assert "No trials were made for the controls." in html
    assert not (tmp_path / "temperature.png").exists()


def test_without_test_labels_agreement_takes_the_place(
    rows: list[TrialRow], pareto: dict[str, Any], tmp_path: Path
) -> None:
    unlabelled = copy.deepcopy(pareto)
    unlabelled["teacher"]["test_accuracy"] = None
    for point in unlabelled["front"]:
        point |= {"test_agreement": point["test_accuracy"], "test_accuracy": None, "gap_closed": None}
    told = texts(search_charts.draw(rows, unlabelled)[0].inline)
    assert "finalists (#trial), test agreement with the teacher, mean ± sd of 5 seeds" in told
    assert "accuracy or agreement, share of rows" in told
    assert not [text for text in told if text.startswith("teacher")]
    html = written(tmp_path, rows, unlabelled, [])
    assert "chooses the teacher's class on" in text_of(html)
    assert f"agreement {pareto['front'][0]['test_accuracy']['mean']:.4f} ±" in table(html, 0)


def test_without_controls_or_a_teacher_nothing_is_claimed(
    rows: list[TrialRow], pareto: dict[str, Any], tmp_path: Path
) -> None:
    alone = copy.deepcopy(pareto) | {"teacher": None}
    for point in alone["front"]:
        point |= {"control": None, "difference": None, "gap_closed": None, "why_no_control": "no row has a label"}
    told = texts(search_charts.draw(rows, alone)[0].inline)
    assert not [text for text in told if "control" in text or "teacher" in text]
    html = written(tmp_path, rows, alone, [])
    assert text_of(html).count("It has no control: no row has a label.") == len(alone["front"])
    assert "distillation gained" not in html


def test_synthetic_rows_are_called_so(rows: list[TrialRow], pareto: dict[str, Any], tmp_path: Path) -> None:
    summary = summary_of(rows, [])
    pages = []
    for synthetic in (True, False):
        folder = Folder.at(tmp_path / str(synthetic))
        search_report.write(folder, "run", rows, [], pareto, summary | {"synthetic": synthetic})
        pages.append(folder.read_bytes("report.html").decode())
    assert ["synthetic data" in page for page in pages] == [True, False]


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tables as rows of cells; attributes that could fetch something; whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attrs if name.split(":")[-1] in ("src", "href", "data")]
        if tag != "meta":
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def table(html: str, number: int) -> str:
    return "\n".join(" | ".join(row) for row in Page(html).tables[number])


def text_of(html: str) -> str:
    bare = re.sub(r"<[^>]*>", "", re.sub(r"<(svg|style).*?</\1>", "", html, flags=re.DOTALL))
    return " ".join(bare.replace("&#39;", "'").replace("&#34;", '"').split())


def test_the_folder_holds_the_page_and_each_drawing_twice(folder: Path, drawings: dict[str, Drawing]) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["report.html", *(f"{name}.{kind}" for name in NAMES for kind in ("png", "svg"))]
    )
    html = (folder / "report.html").read_text()
    for name, drawing in drawings.items():
        assert (folder / f"{name}.png").read_bytes() == drawing.png
        assert (folder / f"{name}.svg").read_text() == drawing.svg
        assert drawing.inline in html


def test_the_page_needs_nothing_else(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert [reference for reference in page.references if not reference.startswith("#")] == []
    assert not {"script", "link", "img", "iframe"} & page.tags
    assert re.findall(r"url\((?!#)", html) == []
    assert "prefers-color-scheme: dark" in html


def test_finalists_stand_in_the_table(folder: Path, pareto: dict[str, Any]) -> None:
    head, teacher, *finalists = Page((folder / "report.html").read_text()).tables[0]
    assert head[3:6] == ["loss.temperature", "model.channels", "train.lr"]
    assert teacher[:3] == ["teacher", "4,311,614", "1.910"]
    assert len(finalists) == len(pareto["front"]) == 4
    for cells, point in zip(finalists, pareto["front"], strict=True):
        values, test, control, difference = (point[k] for k in ("values", "test_accuracy", "control", "difference"))
        assert cells == [
            f"#{point['trial']}", f"{point['parameters']:,}", f"{point['latency_ms']:.3f}",
            f"{values['loss.temperature']:.4g}", json.dumps(values["model.channels"]), f"{values['train.lr']:.4g}",
            f"{test['mean']:.4f} ± {test['std']:.4f} (n=5)", f"{control['mean']:.4f} ± {control['std']:.4f} (n=5)",
            "3: train.lr=0.0025",
            f"{100 * difference['mean']:+.2f} [{100 * difference['low']:+.2f}, {100 * difference['high']:+.2f}]",
            difference["verdict"], "25 %",
        ]  # fmt: skip
    assert [cells[10] for cells in finalists] == ["better", "better", "better", "not resolved"]


def test_each_finalist_has_its_verdict_in_a_sentence(folder: Path, pareto: dict[str, Any]) -> None:
    text = text_of((folder / "report.html").read_text())
    for point in pareto["front"]:
        difference = point["difference"]
        word = "gained" if difference["mean"] > 0 else "lost"
        assert f"distillation {word} {abs(100 * difference['mean']):.2f} percentage points on average" in text
        assert f"{100 * difference['low']:+.2f} to {100 * difference['high']:+.2f} points" in text
    assert text.count(": better.") == 3
    assert text.count(": not resolved.") == 1
    assert "Finalists and controls were chosen on the validation split" in text
    assert "The test split was met once, afterwards" in text


def test_every_trial_is_listed_the_best_first(folder: Path, rows: list[TrialRow], controls: list[TrialRow]) -> None:
    _, trials, of_controls = Page((folder / "report.html").read_text()).tables
    assert len(trials) == len(rows) + 1
    best = max(rows, key=lambda row: row.validation_accuracy or 0.0)
    assert trials[1][:1] + trials[1][4:5] == [f"#{best.id}", f"{best.validation_accuracy:.4f}"]
    assert {row[0] for row in trials[1:]} == {f"#{row.id}" for row in rows}
    infeasible = next(cells for cells in trials if cells[9:10] == ["infeasible"])
    assert infeasible[1:] == ["", "[64]", "", "n/a", "0", "9,000,000", "n/a", "0.0", "infeasible", "too large"]
    assert [cells[0] for cells in of_controls[1:]] == ["#2", "#1", "#0"]
    assert of_controls[0][1] == "train.lr"
    assert [row["status"] for row in map(vars, controls)] == [cells[-2] for cells in of_controls[1:]]


def test_what_others_named_is_escaped(rows: list[TrialRow], pareto: dict[str, Any], tmp_path: Path) -> None:
    hostile = "<b>bold</b>"
    named = [replace(row, values={**row.values, hostile: hostile}, reason=hostile) for row in rows]
    fronts = copy.deepcopy(pareto)
    for point in fronts["front"]:
        point["values"][hostile] = [hostile]
    summary = summary_of(named, named) | {"labels_digest": hostile}
    html = Path(search_report.write(Folder.at(tmp_path), hostile, named, named, fronts, summary)).read_text()
    assert "<b>" not in html
    assert "<h1>&lt;b&gt;bold" in html
    assert html.count("&lt;b&gt;bold") > 2 * len(rows)


@pytest.mark.parametrize(
    ("passes", "seconds", "told"),
    [
        (1205, 8000.0, "1,205 more passes over the rows: 2.2 h of its time."),
        (30, 42.0, "30 more passes over the rows: 42 s of its time."),
        (30, None, "30 more passes over the rows: how long one takes was not recorded."),
    ],
)
def test_what_the_label_store_saved(passes: int, seconds: float | None, told: str) -> None:
    sentence = search_report.saved({"teacher_passes_saved": passes, "teacher_seconds_saved": seconds})
    assert sentence.endswith(told)


def test_hundreds_of_trials_make_a_page_of_a_reasonable_size(tmp_path: Path) -> None:
    many = trial_rows(per_setting=25)
    html = written(tmp_path, many, pareto_of(many), [])
    assert len(many) > 500
    assert len(Page(html).tables[1]) == len(many) + 1
    assert len(html) < 2_000_000
    assert len(CHANNELS) == len(Page(html).tables[0]) - 2
