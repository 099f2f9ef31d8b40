"""The search: what a space means, what the front and its intervals are, and one whole search through the command."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from distill_ray import training
from distill_ray.artifacts import Stage, exclusive
from distill_ray.config import SpaceEntry, StudentConfig, TuneConfig, from_dict, to_dict
from distill_ray.errors import RunError, UserError
from distill_ray.placing import Placement
from distill_ray.stages import search_results, search_schedule, search_space, search_trial, tune
from distill_ray.stages.search_results import TrialRow
from distill_ray.stages.search_watch import Budget, Watch
from distill_ray.storage import Folder
from tests.harness import Finished, distill_ray, only, write_config

# A grid of 6: two students, one with too many parameters, and three whose temperature is no temperature.
SEARCH: dict[str, Any] = {
    "name": "search",
    "data": {"source": "glyph62", "rows": 620, "shard_rows": 620},
    "teacher": {"model": {"name": "mlp", "hidden": [32]}, "train": {"epochs": 1, "batch_size": 64}},
    "labels": {"precision": "fp32"},
    "student": {
        "model": {"name": "mlp", "hidden": [4]},
        "train": {"epochs": 2, "batch_size": 64, "precision": "fp32"},
    },
    "tune": {
        "space": {"model.hidden": {"grid": [[4], [8], [900]]}, "loss.temperature": {"choice": [2.0, -1.0]}},
        "search": "grid", "scheduler": "none", "seeds": 1, "constraints": ["parameters <= 100_000"],
    },
    "tracking": {"wandb": {"mode": "disabled"}},
}  # fmt: skip

KD_SPACE = SpaceEntry(choice=(1,))
KD_STUDENT = StudentConfig.model_validate({"model": {"name": "char_cnn"}, "loss": {"name": "kd", "alpha": 0.5}})


# --- the space --------------------------------------------------------------------------------------------------------


def space(**entries: Any) -> TuneConfig:
    return TuneConfig.model_validate({"space": {key.replace("__", "."): value for key, value in entries.items()}})


def test_values_are_laid_over_the_student() -> None:
    values = {"model.channels": [2, 4], "loss.temperature": 4.0, "train.lr": 0.01, "train.epochs": 3.0}
    student = search_space.lay_over(KD_STUDENT, values)
    assert to_dict(student.model) == {"name": "char_cnn", "channels": [2, 4], "hidden": [512, 128]}
    assert to_dict(student.loss) == {"name": "kd", "temperature": 4.0, "alpha": 0.5, "class_weights": None}
    assert (student.train.lr, student.train.epochs) == (0.01, 3)
    assert KD_STUDENT.train.lr == 1e-3


def test_a_kind_takes_only_the_keys_that_it_has() -> None:
    values = {"loss.name": "ce", "loss.temperature": 4.0, "model": {"name": "mlp"}, "model.hidden": [7]}
    student = search_space.lay_over(KD_STUDENT, values)
    assert to_dict(student.loss) == {"name": "ce", "class_weights": None}
    assert to_dict(student.model) == {"name": "mlp", "hidden": [7]}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"loss.temperature": -1.0}, "loss.kd.temperature: Input should be greater than 0"),
        ({"model": {"name": "mlp", "widths": [3]}}, "model.mlp.widths"),
        ({"model": 3, "model.hidden": [3]}, "model.hidden: model holds a value, not a section"),
        ({"train.warmup_epochs": 9}, "leaves nothing of the 8 epochs"),
    ],
)
def test_an_invalid_student_says_why(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        search_space.lay_over(KD_STUDENT, values)


def test_options_are_drawn_by_number_and_steps_are_round() -> None:
    config = space(model__hidden={"choice": [[4], [8, 8]]}, loss__alpha={"quniform": [0, 1, 0.1]})
    drawn = {"model.hidden": 1, "loss.alpha": 0.1 + 0.2}
    assert search_space.decode(config.space, drawn) == {"model.hidden": [8, 8], "loss.alpha": 0.3}


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("model.chanels", "did you mean 'model.channels'"),
        ("loss.temprature", "did you mean 'loss.temperature'"),
        ("epochs", "did you mean 'train.epochs'"),
        ("seeds", "no key of the student that can be searched"),
    ],
)
def test_a_key_that_is_none_names_the_nearest(key: str, near: str) -> None:
    with pytest.raises(UserError, match=near):
        search_space.check(KD_STUDENT, space(**{key: {"choice": [1]}}))


def test_a_key_of_another_kind_is_known_where_the_kind_is_searched() -> None:
    base = KD_STUDENT.model_copy(update={"loss": search_space.lay_over(KD_STUDENT, {"loss.name": "ce"}).loss})
    temperature = {"uniform": [1, 4]}
    with pytest.raises(UserError, match="'loss.temperature' is no key"):
        search_space.check(base, space(loss__temperature=temperature))
    search_space.check(base, space(loss__temperature=temperature, loss__name={"choice": ["ce", "kd"]}))


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"space": {"train.lr": {"grid": [1]}}}, "a grid needs tune.search grid"),
        ({"space": {"train.lr": {"uniform": [1, 2]}}, "search": "grid"}, "takes grid or choice, not a range"),
        ({"space": {"train.lr": {"grid": [1, 2, 3]}}, "search": "grid", "trials": 2}, "the grid has 3 points"),
        ({"space": {"train.lr": {"quniform": [0, 1, 0.3]}}}, "must be multiples of its step"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(section: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        from_dict(SEARCH | {"tune": section})


def test_controls_are_searched_over_what_they_share_with_the_students() -> None:
    shared = space(model__channels={"choice": [[2, 4]]}, loss__alpha={"uniform": [0, 1]}, train__lr={"uniform": [1, 2]})
    assert set(search_space.control_space(KD_STUDENT, shared)) == {"train.lr"}
    sizes = search_space.control_space(KD_STUDENT, space(model__channels={"choice": [[2, 4]]}))
    assert sizes == {"train.lr": SpaceEntry(loguniform=(2.5e-4, 4e-3))}  # nothing is shared: the rate, by 4 both ways
    own = shared.model_copy(update={"control_space": {"train.weight_decay": SpaceEntry(uniform=(0, 1))}})
    assert set(search_space.control_space(KD_STUDENT, own)) == {"train.weight_decay"}


def test_a_control_is_its_student_but_for_the_loss_and_what_is_sampled() -> None:
    student = search_space.lay_over(KD_STUDENT, {"model.channels": [2, 4], "train.lr": 0.02, "train.epochs": 3})
    control = search_space.lay_over(KD_STUDENT, search_space.control_values(student, {"train.lr": 0.5}))
    assert to_dict(control.loss) == {"name": "ce", "class_weights": None}
    assert control.model == student.model
    assert control.train == student.train.model_copy(update={"lr": 0.5})


@pytest.mark.parametrize("key", ["model.channels", "loss.temperature"])
def test_a_control_space_over_what_a_control_cannot_vary_is_refused(key: str) -> None:
    with pytest.raises(UserError, match="a control has its student's network and the loss ce"):
        from_dict(SEARCH | {"tune": SEARCH["tune"] | {"control_space": {key: {"choice": [1]}}}})
    other = space(train__lr={"choice": [1]}).model_copy(update={"control_space": {"train.rate": KD_SPACE}})
    with pytest.raises(UserError, match=r"tune.control_space: 'train.rate' is no key .* did you mean"):
        search_space.check(KD_STUDENT, other)


@pytest.mark.parametrize("text", ["parameters < 5", "parameter <= 5", "latency_ms <= fast", "bytes <= -1"])
def test_a_constraint_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"parameters <= 50_000, of parameters or bytes or latency_ms"):
        from_dict(SEARCH | {"tune": SEARCH["tune"] | {"constraints": [text]}})


def test_constraints_are_numbers_as_people_write_them() -> None:
    config = space(train__lr={"choice": [1]}).model_copy(update={"constraints": ("parameters <= 50_000", "bytes<=2e5")})
    assert config.limits == (("parameters", 50_000.0), ("bytes", 200_000.0))


# --- when a trial is stopped ------------------------------------------------------------------------------------------


def test_small_students_are_compared_with_small_ones() -> None:
    """ASHA stops the worse half of each group, though every small one is worse than every large one."""
    from ray.tune.experiment import Trial

    scheduler = search_schedule.asha_within(8, lambda sample: sample["size"])
    trials = {
        (size, rank): Trial("trial", config={"size": size}, stub=True)
        for size in ("large", "small")
        for rank in range(4)
    }
    for trial in trials.values():
        scheduler.on_trial_add(None, trial)
    decided = {}
    for (size, rank), trial in sorted(trials.items(), key=lambda item: -item[0][1]):  # the best first
        accuracy = (0.9 if size == "large" else 0.5) + rank / 100
        result = {"epoch": 2, "validation_accuracy": accuracy, "training_iteration": 1}
        decided[size, rank] = scheduler.on_trial_result(None, trial, result)
    for size in ("large", "small"):
        assert [decided[size, rank] for rank in (3, 0)] == ["CONTINUE", "STOP"], size


def test_sizes_within_a_factor_of_two_compete() -> None:
    assert search_schedule.size_class(1_024) == search_schedule.size_class(2_047) != search_schedule.size_class(2_048)
    assert search_schedule.size_class(None) == search_schedule.size_class(0) == -1


def test_the_minutes_of_a_killed_search_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    folder = Folder.at(tmp_path)
    first = Budget(folder, 2.0)
    now[0] = 90.0
    assert not first.is_over(3)
    first.note(3)
    second = Budget(folder, 2.0)
    now[0] = 125.0
    assert second.is_over(3), "90 s of the first and 35 of the second"
    assert not second.is_over(2), "what the first had trained is taken in before"
    assert not Budget(folder, None).is_over(0)


# --- results ----------------------------------------------------------------------------------------------------------


def trial(number: int, accuracy: float, parameters: int, **other: Any) -> TrialRow:
    return TrialRow(number, {}, accuracy, 1, parameters, 1.0, other.pop("status", "completed"), None, "folder")


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    points = [(10.0, 0.5), (20.0, 0.4), (30.0, 0.9), (10.0, 0.5), (5.0, 0.1), (30.0, 0.8)]
    assert search_results.front(points) == [4, 0, 2]
    rows = [trial(0, 0.5, 10), trial(1, 0.9, 5, status="stopped"), trial(2, 0.7, 20), trial(3, 0.6, 30)]
    assert [row.id for row in search_results.trial_front(rows)] == [0, 2]


def test_finalists_are_spread_and_keep_the_ends() -> None:
    rows = [trial(number, number / 10, number) for number in range(8)]
    assert [row.id for row in search_results.spread(rows, 4)] == [0, 2, 5, 7]
    assert [row.id for row in search_results.spread(rows[:3], 4)] == [0, 1, 2]
    assert [row.id for row in search_results.spread(rows, 1)] == [7]


def test_a_latency_above_its_limit_keeps_a_trial_from_the_front() -> None:
    row = trial(0, 0.9, 10)
    slow = tune._within(row, 0.7, 0.5)
    assert (slow.status, slow.latency_ms) == ("infeasible", 0.7)
    assert slow.reason == "latency_ms 0.7, tune.constraints: at most 0.5"
    assert tune._within(row, 0.7, 0.7) == dataclasses.replace(row, latency_ms=0.7)
    assert tune._within(row, "it cannot be measured", 0.7).status == "failed"


def test_a_search_that_found_nothing_says_what_to_change() -> None:
    cut = dataclasses.replace(trial(0, 0.9, 10, status="stopped"), reason="stopped by the scheduler")
    slow = tune._within(trial(1, 0.9, 10), 0.7, 0.5)
    told = tune._why_nothing([cut, slow])
    assert "(1 stopped, 1 infeasible); the first: latency_ms 0.7" in told
    assert told.endswith("loosen tune.constraints, or add smaller students to tune.space")
    failed = dataclasses.replace(trial(2, 0.0, 10, status="failed"), reason="the loss is not finite")
    assert "the first: the loss is not finite" in tune._why_nothing([cut, slow, failed])
    assert "none begun" in tune._why_nothing([])


def test_a_seed_that_cannot_be_trained_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side the first that fails ends them all; each is then trained, or fails, by itself."""

    def trained(context: Any, config: Any, seeds: tuple[int, ...]) -> list[Any]:
        if 2 in seeds:
            raise RunError("student: the loss is not finite")
        finished = SimpleNamespace(finished=lambda: {"accuracy": 0.5})
        return [SimpleNamespace(seed=seed, stage=finished) for seed in seeds]

    monkeypatch.setattr(tune, "_trained", trained)
    config = from_dict(SEARCH | {"tune": SEARCH["tune"] | {"seeds": 4}})
    assert config.tune is not None
    found, lost = tune._over_seeds(SimpleNamespace(), config.tune, config)  # type: ignore[arg-type]
    assert sorted(found) == [0, 1, 3]
    assert {seed: str(error) for seed, error in lost.items()} == {2: "student: the loss is not finite"}


def test_the_share_of_the_gap_is_told_where_there_is_one() -> None:
    ours, theirs = summaries(0.88, 0.90), summaries(0.86, 0.86)
    assert search_results.finalist(ours, theirs, 0.92)["gap_closed"] == pytest.approx(0.5)
    assert search_results.finalist(ours, theirs, 0.865)["gap_closed"] is None  # half a point is no gap
    assert search_results.finalist(ours, theirs, None)["gap_closed"] is None


def test_seeds_that_failed_are_left_out_of_the_pairs() -> None:
    ours, theirs = summaries(0.88, 0.90, 0.92), summaries(0.86, 0.86, 0.86)
    del ours[1], theirs[2]
    entry = search_results.finalist(ours, theirs, None)
    assert entry["test_accuracy"]["values"] == [0.88, 0.92]
    assert entry["control"]["values"] == [0.86, 0.86]
    assert entry["difference"]["seeds"] == 1
    assert entry["difference"]["mean"] == pytest.approx(0.02)


def summaries(*accuracies: float) -> dict[int, dict[str, Any]]:
    return {seed: {"accuracy": a, "latency_of": "", "bytes": 1} for seed, a in enumerate(accuracies)}


def test_a_finite_space_of_controls_is_drawn_without_repeats() -> None:
    finite = {"train.lr": SpaceEntry(choice=(1, 2, 3)), "train.epochs": SpaceEntry(choice=(4, 5))}
    drawn = [tuple(sorted(sample.items())) for sample in tune._drawn(finite, 5, seed=0)]
    assert len(drawn) == len(set(drawn)) == 5
    assert len(tune._drawn(finite, 50, seed=0)) == 6
    ranged = {"train.lr": SpaceEntry(loguniform=(1e-3, 1e-2))}
    rates = [sample["train.lr"] for sample in tune._drawn(ranged, 9, seed=1)]
    assert len(set(rates)) == 9
    assert all(1e-3 <= rate <= 1e-2 for rate in rates)
    assert rates == [sample["train.lr"] for sample in tune._drawn(ranged, 9, seed=1)]


def test_the_front_over_latency_is_among_all_that_were_trained() -> None:
    rows = [
        dataclasses.replace(trial(number, accuracy, 10 - number), latency_ms=latency)
        for number, (accuracy, latency) in enumerate([(0.5, 1.0), (0.7, 2.0), (0.6, 3.0)])
    ]
    found = search_results.pareto(rows, {}, None)
    assert [(point["trial"], point["on_front"]) for point in found["latency"]] == [(0, True), (1, True), (2, False)]


def test_columns_of_any_space_make_a_table() -> None:
    values: list[dict[str, Any]] = [{"a": [4], "b": 1, "c": {"name": "mlp"}}, {"a": [8, 8], "b": "x"}]
    rows = [TrialRow(n, v, None, 0, None, 0.0, "invalid", "why", None) for n, v in enumerate(values)]
    table = pq.read_table(search_results.to_parquet(rows, ["a", "b", "c"]))
    assert table.column("a").to_pylist() == [[4], [8, 8]]
    assert table.column("b").to_pylist() == ["1", '"x"']
    assert table.column("c").to_pylist() == ['{"name": "mlp"}', None]


# --- a whole search ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    config: Path
    out: Path
    finished: Finished

    @property
    def folder(self) -> Path:
        return only(self.out, "artifacts/tune-*")

    @property
    def trials(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = pq.read_table(self.folder / "trials.parquet").to_pylist()
        return rows


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Search:
    root = tmp_path_factory.mktemp("search")
    config, out = write_config(root, SEARCH), root / "runs"
    finished = distill_ray("tune", config, "--out", out, "--json")
    assert finished.code == 0, finished.stderr
    return Search(config, out, finished)


def test_every_trial_has_its_row(search: Search) -> None:
    rows = search.trials
    assert [row["id"] for row in rows] == list(range(6))
    found = {(row["model.hidden"][0], row["loss.temperature"]): row for row in rows}
    assert {key: row["status"] for key, row in found.items()} == {
        (4, 2.0): "completed", (8, 2.0): "completed", (900, 2.0): "infeasible",
        (4, -1.0): "invalid", (8, -1.0): "invalid", (900, -1.0): "invalid",
    }  # fmt: skip
    assert found[4, 2.0]["parameters"] == 1024 * 4 + 4 + 4 * 62 + 62
    assert found[4, 2.0]["epochs"] == 2
    assert 0 <= found[4, 2.0]["validation_accuracy"] <= 1
    assert found[900, 2.0]["reason"] == "parameters 978,362, tune.constraints: at most 100,000"
    assert found[4, -1.0]["reason"].startswith("loss.kd.temperature: Input should be greater than 0")


def test_the_front_and_the_summary(search: Search) -> None:
    pareto = json.loads((search.folder / "pareto.json").read_text())
    rows = {row["id"]: row for row in search.trials}
    assert pareto["front"], "a front has at least one point"
    for point in pareto["front"]:
        assert (point["finalist"], rows[point["trial"]]["status"]) == (True, "completed")
        tested = json.loads((Path(point["folder"]) / "summary.json").read_text())
        assert point["test_accuracy"]["values"] == [tested["accuracy"]]
        assert len(point["control"]["values"]) == 1
        assert point["control"]["searched"]["train.lr"] > 0
        assert point["latency_ms"] > 0
        assert point["difference"]["verdict"] == "not resolved"  # one seed resolves nothing
    assert sorted(p["latency_ms"] for p in pareto["latency"]) == [p["latency_ms"] for p in pareto["latency"]]
    summary = json.loads((search.folder / "summary.json").read_text())
    assert summary["counts"] == {"completed": 2, "infeasible": 1, "invalid": 3}
    assert (summary["trials"], summary["teacher_passes_saved"]) == (6, 3)  # of 4 epochs; the labels took one
    assert summary["teacher_seconds_saved"] > 0
    controls = pq.read_table(search.folder / "control_trials.parquet").to_pylist()
    assert summary["control_trials"] == len(controls) >= 2
    assert {row["finalist"] for row in controls} == {point["trial"] for point in pareto["front"]}
    latencies = {point["trial"]: point["latency_ms"] for point in pareto["latency"]}
    assert latencies == {row["id"]: row["latency_ms"] for row in search.trials if row["status"] == "completed"}
    labels = only(search.folder.parent, "labels-*/manifest.json").read_bytes()
    assert summary["labels_manifest_sha256"] == hashlib.sha256(labels).hexdigest()  # the search labelled nothing
    assert search.finished.answer["tune"]["best"] == summary["best"]
    assert len(search.finished.stdout.splitlines()) == 1, "Ray Tune is silent"


def test_only_finalists_met_the_test_split(search: Search) -> None:
    front = {point["folder"] for point in search.finished.answer["tune"]["front"]}
    trained = {row["folder"] for row in search.trials if row["status"] == "completed"}
    assert {folder for folder in trained if (Path(folder) / "summary.json").exists()} == front


def test_a_finished_search_trains_nothing(search: Search) -> None:
    again = distill_ray("tune", search.config, "--out", search.out, "--json")
    assert again.code == 0, again.stderr
    assert {stage["status"] for stage in again.answer["stages"]} == {"reused"}
    assert again.answer["tune"] == search.finished.answer["tune"]


def test_a_trial_is_the_student_of_the_same_config(search: Search) -> None:
    point = search.finished.answer["tune"]["front"][0]
    controls = pq.read_table(search.folder / "control_trials.parquet").to_pylist()
    before = {row["folder"]: (Path(row["folder"]) / "metrics.jsonl").stat().st_mtime_ns for row in controls}
    overrides = [f"student.{key}={json.dumps(value)}" for key, value in point["values"].items()]
    student = distill_ray("student", search.config, *overrides, "--out", search.out, "--json")
    assert student.code == 0, student.stderr
    stages = {stage["role"]: stage for stage in student.answer["stages"] if stage["name"] == "student"}
    assert (stages["student"]["folder"], stages["student"]["status"]) == (point["folder"], "reused")
    # One of the control's trials has its student's own values: it is finished here, if it was not chosen, not trained.
    control = stages["control"]["folder"]
    assert (Path(control) / "metrics.jsonl").stat().st_mtime_ns == before[control]


def test_a_finalist_is_exported_by_its_number(search: Search) -> None:
    point = search.finished.answer["tune"]["front"][0]
    exported = distill_ray("export", search.config, "--trial", str(point["trial"]), "--out", search.out, "--json")
    assert exported.code == 0, exported.stderr
    assert exported.answer["student"]["folder"] == point["folder"]
    assert exported.answer["export"] == str(search.out / "search" / f"export-{point['trial']}")
    assert {stage["status"] for stage in exported.answer["stages"]} == {"reused"}
    other = distill_ray("export", search.config, "--trial", "77", "--out", search.out)
    assert other.code == 2
    assert "--trial 77: is no finalist of the search, which has" in other.stderr


def test_the_folder_says_what_the_search_was(search: Search) -> None:
    told = yaml.safe_load((search.folder / "config.yaml").read_text())
    assert told["config"]["tune"]["constraints"] == ["parameters <= 100_000"]
    assert told["config"]["student"]["train"]["epochs"] == 2
    assert set(told["resolved"]["control_space"]) == {"train.lr"}
    assert "the controls are searched over train.lr, the students are not" in search.finished.stderr


def test_an_unknown_key_is_refused_before_anything_starts(tmp_path: Path) -> None:
    section = SEARCH["tune"] | {"space": {"model.hiden": {"grid": [[4]]}}}
    finished = distill_ray("tune", write_config(tmp_path, SEARCH | {"tune": section}), "--out", tmp_path / "runs")
    assert finished.code == 2
    assert "did you mean 'model.hidden'?" in finished.stderr
    assert not (tmp_path / "runs" / "artifacts").exists()


# --- what the driver makes of what happens --------------------------------------------------------------------------


def watch_of(search: Search, minutes: float | None = None) -> tuple[Watch, Callable[[float], dict[str, Any]]]:
    """A watch over no work at all, and samples by temperature: of students that nobody has trained."""
    inputs = inputs_of(search, {"loss.temperature": {"uniform": [10, 99]}})
    silent = SimpleNamespace(line=lambda *_: None, warn=lambda *_: None)
    tracker = SimpleNamespace(start=lambda *_, **__: None, log=lambda *_: None, finish=lambda *_: None)
    context: Any = SimpleNamespace(reporter=silent, tracker=tracker)
    bar = SimpleNamespace(table=lambda *_: None, update=lambda *_, **__: None)
    budget = Budget(Folder.at(search.out / "budget"), minutes)
    return Watch(context, inputs, bar, budget, ["loss.temperature"]), lambda t: {"loss.temperature": t}


def test_rows_stand_as_their_trials_were_begun_whatever_ends_first(search: Search) -> None:
    watch, sample = watch_of(search)
    for number, temperature in enumerate((11.0, 12.0, 13.0)):
        watch.start(f"t{number}", sample(temperature))
    watch.end("t2")
    watch.start("t0", sample(11.0))  # again, after its process died: Tune puts it behind the others
    watch.end("t1")
    watch.end("t0")
    rows, plans = watch.rows()
    assert [(row.id, row.values["loss.temperature"]) for row in rows] == [(0, 11.0), (1, 12.0), (2, 13.0)]
    assert [plans[row.id].values for row in rows] == [row.values for row in rows]


def test_a_control_keeps_its_finalist_and_is_compared_with_those_of_the_same(search: Search) -> None:
    watch, _ = watch_of(search)
    student = search_space.lay_over(from_dict(SEARCH).student, {"model.hidden": [5]})
    samples = [
        {search_space.GIVEN: {"finalist": finalist, "values": search_space.control_values(student, {})}}
        for finalist in (7, 3)
    ]
    for sample in samples:
        watch.start(str(sample), sample)
    rows, _ = watch.rows()
    assert [row.values["finalist"] for row in rows] == [7, 3]
    assert watch.group(samples[0]) != watch.group(samples[1])
    assert watch.group({"loss.temperature": 11.0}) == watch.group({"loss.temperature": 12.0})


def test_a_trial_that_died_before_it_began_is_a_row(search: Search) -> None:
    watch, sample = watch_of(search)
    watch.start("t0", sample(11.0))
    watch.close({"t1": (sample(12.0), "the trial's process died: out of memory")})
    rows, _ = watch.rows()
    assert [(row.status, row.reason) for row in rows] == [
        ("stopped", "stopped by the scheduler: others were better after as many epochs"),
        ("failed", "the trial's process died: out of memory"),
    ]
    assert watch.ended == 2


def test_what_the_scheduler_stopped_is_told_from_what_the_minutes_did(search: Search) -> None:
    watch, sample = watch_of(search, minutes=1e-9)
    watch.start("cut", sample(11.0))
    watch.end("cut")
    watch.start("late", sample(12.0))
    assert watch.is_out_of_time()
    watch.close({})
    reasons = [row.reason for row in watch.rows()[0]]
    assert reasons[0] is not None
    assert reasons[0].startswith("stopped by the scheduler")
    assert reasons[1] == "the minutes of tune.minutes were over"


def test_a_student_in_other_hands_is_told_so_unless_they_are_of_this_search(search: Search) -> None:
    watch, sample = watch_of(search)
    for name, temperature in (("mine", 11.0), ("twin", 11.0), ("elsewhere", 12.0)):
        watch.start(name, sample(temperature))
    for name in ("twin", "elsewhere"):
        watch.result(name, {"epoch": 0, "validation_accuracy": 0.0, "reason": search_trial.TAKEN})
    watch.close({})
    rows, _ = watch.rows()
    assert [row.status for row in rows] == ["stopped", "stopped", "failed"]
    assert rows[2].reason == search_trial.TAKEN


# --- one trial, in this process, on the stores of that search ---------------------------------------------------------


@dataclass
class Reports:
    """Stands in for Tune's side of a trial."""

    rows: list[tuple[int, float, str | None]]
    stop_at: int | None = None

    def __call__(self, epoch: int, accuracy: float, reason: str | None = None) -> None:
        self.rows.append((epoch, accuracy, reason))
        if epoch == self.stop_at:
            raise SystemExit  # as Tune's session does where the scheduler stops a trial

    @property
    def epochs(self) -> list[int]:
        return [epoch for epoch, _, _ in self.rows]


@pytest.fixture
def run_trial(search: Search, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Reports, Folder]]:
    """Runs one trial of the searched stores, with its own temperature, until it ends or is stopped."""

    def run(temperature: float, stop_at: int | None = None) -> tuple[Reports, Folder]:
        inputs = inputs_of(search, {"loss.temperature": {"uniform": [1, 9]}})
        reports = Reports([], stop_at)
        monkeypatch.setattr(search_trial, "_report", reports)
        monkeypatch.setenv("TUNE_FUNCTION_THREAD_TIMEOUT_S", "")  # restored after the test
        with nullcontext() if stop_at is None else pytest.raises(SystemExit):
            search_trial.train_trial(
                {"loss.temperature": temperature}, search_trial.job_of(inputs, Placement(1, 1, 0.0))
            )
        stage = search_space.plan(inputs, {"loss.temperature": temperature}).stage
        assert stage is not None
        return reports, stage.folder

    return run


def inputs_of(search: Search, space: dict[str, Any]) -> search_space.Inputs:
    """The stores of the search, under another space."""
    config = from_dict(SEARCH | {"tune": SEARCH["tune"] | {"space": space, "search": "random"}})
    data, labels = only(search.out, "artifacts/data-*"), only(search.out, "artifacts/labels-*")
    return search_space.Inputs(
        config,
        Folder.at(search.out),
        Stage("data", data.name.partition("-")[2], Folder.at(data)),
        Stage("labels", labels.name.partition("-")[2], Folder.at(labels)),
    )


def test_values_that_the_student_does_not_have_are_not_its_own(search: Search) -> None:
    inputs = inputs_of(search, {"loss.name": {"choice": ["ce", "kd"]}, "loss.temperature": {"uniform": [1, 9]}})
    hard, soft = (search_space.plan(inputs, {"loss.name": n, "loss.temperature": 4.0}) for n in ("ce", "kd"))
    assert hard.values == {"loss.name": "ce"}
    assert soft.values == {"loss.name": "kd", "loss.temperature": 4.0}
    assert (hard.status, soft.status) == ("ready", "ready")
    assert hard.stage != soft.stage


def test_a_stopped_trial_goes_on_where_it_stood(run_trial: Callable[..., tuple[Reports, Folder]]) -> None:
    stopped, folder = run_trial(5.0, stop_at=1)
    assert stopped.epochs == [1]
    assert not folder.exists("model.safetensors")
    first_epoch = folder.read_bytes("metrics.jsonl")
    resumed, _ = run_trial(5.0)
    assert resumed.epochs == [1, 2]
    assert folder.read_bytes("metrics.jsonl").startswith(first_epoch)
    assert folder.exists("model.safetensors")
    assert not folder.exists("summary.json"), "a trial never looks at the test split"


def test_a_trained_trial_only_reports(
    run_trial: Callable[..., tuple[Reports, Folder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = run_trial(6.0)
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("trained again"))
    again, _ = run_trial(6.0)
    assert again.rows == first.rows


def test_a_trial_that_raises_says_why(
    run_trial: Callable[..., tuple[Reports, Folder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: Any, **__: Any) -> None:
        raise RunError("the loss is not finite at step 3")

    monkeypatch.setattr(training, "fit", diverge)
    failed, _ = run_trial(7.0)
    assert failed.rows == [(0, 0.0, "the loss is not finite at step 3")]


def test_a_student_that_another_trains_is_not_waited_for(
    run_trial: Callable[..., tuple[Reports, Folder]], search: Search
) -> None:
    inputs = inputs_of(search, {"loss.temperature": {"uniform": [1, 9]}})
    stage = search_space.plan(inputs, {"loss.temperature": 8.0}).stage
    assert stage is not None
    with exclusive(stage, lambda message: pytest.fail(message)):
        twin, folder = run_trial(8.0)
    assert twin.rows == [(0, 0.0, search_trial.TAKEN)]
    assert not folder.exists("metrics.jsonl")
