"""The config: what is accepted, and the one line that says why something is not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray import config as configs
from distill_ray.config import KdLoss, StudentConfig, digest_payload
from distill_ray.errors import UserError
from distill_ray.stages import search_space

DESIGN = """\
name: glyph62
data:     {source: glyph62, rows: 12000, seed: 0, shard_rows: 2048,
           split: {fractions: [0.8, 0.1, 0.1]},
           input: {shape: [1, 32, 32], scale: 0.00392156862745098, mean: [0.5], std: [0.5]}}
teacher:  {model: {name: char_cnn, channels: [32, 64], hidden: [512, 128]},
           train: {epochs: 4, batch_size: 256, optimizer: adamw, lr: 1.0e-3, precision: auto}}
labels:   {views: 1, dtype: float16}
student:  {model: {name: char_cnn, channels: [8, 16], hidden: [32]},
           loss: {name: kd, temperature: 2.0, alpha: 0.9},
           train: {epochs: 8, batch_size: 128, lr: 1.0e-3}, seeds: [0]}
tracking: {wandb: {mode: auto, project: distill-ray}}
cluster:  {address: auto, workers: auto, gpus_per_worker: auto}
"""


def _load(tmp_path: Path, *overrides: str, text: str = DESIGN) -> configs.Config:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return configs.load(path, overrides)


def test_overrides_reach_nested_keys_with_their_yaml_type(tmp_path: Path) -> None:
    config = _load(tmp_path, "student.loss.temperature=4", "student.seeds=[0, 1]", "teacher.train.precision=fp32")
    assert isinstance(config.student.loss, KdLoss)
    assert config.student.loss.temperature == 4.0
    assert config.student.seeds == (0, 1)
    assert config.teacher.train.precision == "fp32"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["student.loss.temprature=3"], ["student.loss.temprature", "did you mean 'temperature'"]),
        (["techer.seed=1"], ["techer", "did you mean 'teacher'"]),
        (["data.path=/somewhere"], ["data.path", "unknown key"]),
        (["student.loss.name=kdd"], ["line 9", "'kdd'", "did you mean 'kd'"]),
        (["data.source=glyph26"], ["line 2", "'glyph26'", "did you mean 'glyph62'"]),
        (["student.train.lr=fast"], ["student.train.lr", "number", "'fast'"]),
        (["teacher.train.epochs=2.5"], ["teacher.train.epochs", "integer"]),
        (["student.loss.alpha=2"], ["student.loss.alpha", "less than or equal to 1", "2"]),
        (["student.loss.temperature=0"], ["student.loss.temperature", "greater than 0"]),
        (["student.loss.temperature=.nan"], ["student.loss.temperature", "finite"]),
        (["data.split.fractions=[0.5, 0.6]"], ["data.split.fractions", "sum to 1", "1.1"]),
        (["data.split.fractions=[0.9, 0.0, 0.1]"], ["data.split.fractions", "validation"]),
        (["teacher.train.warmup_epochs=9"], ["teacher.train", "warmup_epochs 9", "4 epochs"]),
        (["student.seeds=[1, 1]"], ["student.seeds", "distinct"]),
        (["data.source=idx"], ["data.path", "missing"]),
        (["name=artifacts"], ["name", "artifacts"]),
        (["name=../elsewhere"], ["name", "pattern"]),
        (["labels.views=4"], ["labels.views", "4"]),
        (["student.model=3"], ["student.model"]),
        (["labels.classes=[a, b]"], ["labels", "ids, by, output and classes describe labels that are read"]),
        (["data={source: parquet, path: x}"], ["data.columns", "missing"]),
        (["data={source: parquet, path: x, columns: {inptu: a}}"], ["data.columns.inptu", "did you mean 'input'"]),
        (["data={source: parquet, path: x, columns: {input: [a, a]}}"], ["data.columns.input", "different names"]),
        (["data={source: parket, path: x}"], ["'parket'", "did you mean 'parquet'"]),
        (["data={source: images, path: x, table: y}"], ["table and columns go together"]),
        (["data={source: parquet, path: x, columns: {input: a}, input: {std: [0]}}"], ["data.input.std", "above 0"]),
        (["data={source: parquet, path: x, columns: {input: a}, input: {mean: avto}}"], ["data.input.mean"]),
        (["data={source: parquet, path: x, columns: {input: a}, class_names: [b, b]}"], ["class_names", "twice"]),
        (["data.split.stratify=true"], ["data", "glyph62 is split by style"]),
        (["data.split.stratify=yeah"], ["data.split.stratify", "boolean"]),
        (["data.split={stratify: true, group_by: a}"], ["data.split", "give one"]),
        (["data.split.column=a"], ["source glyph62 has none"]),
        (["data.input.channels=3"], ["not for source glyph62"]),
        (["student.loss.class_weights=heavy"], ["student.loss.class_weights", "balanced"]),
        (["teacher.loss.temperature=2"], ["teacher.loss.temperature", "unknown key"]),
        (["tune={space: {loss.temperature: {unform: [1, 2]}}}"], ["tune.space", "did you mean 'uniform'", "override"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_key_place_and_mend(
    tmp_path: Path, overrides: list[str], expected: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        _load(tmp_path, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in (*expected, "run.yaml"):
        assert part in message, message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "must be a mapping"),
        ("name: [unclosed\n", "not valid YAML"),
        (DESIGN + "name: twice\n", "'name' is given twice"),
        (DESIGN.replace("epochs: 8", "epochs: eight"), "line 10: student.train.epochs"),
        ("name: x\n!!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError, match="run.yaml") as caught:
        _load(tmp_path, text=text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["no-equals-sign", "=3", "student..seeds=1", "name.deeper=1"])
def test_an_override_that_is_none(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match="override"):
        _load(tmp_path, override)


def test_a_missing_file_says_where_ready_ones_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tune_configs"):
        configs.load(tmp_path / "absent.yaml")


def test_shipped_configs_load_and_have_a_head_comment() -> None:
    shipped = sorted(Path(__file__).parents[1].glob("tune_configs/*.yaml"))
    assert {"smoke.yaml", "glyph62.yaml", "fashion_mnist.yaml"} <= {path.name for path in shipped}
    for path in shipped:
        assert path.read_text().startswith("# ")
        configs.load(path)


def test_each_shipped_search_lies_over_the_config_that_its_head_names() -> None:
    root = Path(__file__).parents[1]
    shipped = sorted(root.glob("tune_configs/searches/*.yaml"))
    assert {"fashion_mnist_size_temperature.yaml", "glyph62_size_temperature.yaml", "cluster.yaml"} <= {
        path.name for path in shipped
    }
    for path in shipped:
        named = re.search(r"#   distill-ray tune (\S+) --search (\S+)", path.read_text())
        assert named is not None, path
        assert named[2] == str(path.relative_to(root))
        config = configs.load(
            root / named[1] if named[1] != "CONFIG" else root / "tune_configs/glyph62.yaml", search=path
        )
        assert config.tune is not None
        search_space.check(config.student, config.tune)


def test_a_search_is_laid_over_a_config(tmp_path: Path) -> None:
    run, search = tmp_path / "run.yaml", tmp_path / "search.yaml"
    whole = yaml.safe_load(DESIGN)
    whole |= {"tune": {"space": {"train.lr": {"choice": [1]}}, "trials": 3}}
    run.write_text(yaml.safe_dump(whole))
    search.write_text(
        "student: {train: {epochs: 3}, loss: {name: ce}}\ntune: {space: {model: {choice: [{name: mlp}]}}}\n"
    )
    config = configs.load(run, ["student.train.lr=0.5", "tune.seeds=2"], search=search)
    assert config.tune is not None
    assert (set(config.tune.space), config.tune.trials, config.tune.seeds) == ({"model"}, 24, 2)
    assert (config.student.train.epochs, config.student.train.lr, config.student.loss.name) == (3, 0.5, "ce")
    assert config.student.model == configs.load(run).student.model


@pytest.mark.parametrize(
    ("below", "above", "expected"),
    [
        (
            {"temperature": 2, "alpha": 0.5},
            {"name": "kd", "temperature": 4},
            {"name": "kd", "temperature": 4, "alpha": 0.5},
        ),
        ({"name": "kd", "alpha": 0.5}, {"temperature": 4}, {"name": "kd", "alpha": 0.5, "temperature": 4}),
        ({"name": "kd", "alpha": 0.5}, {"name": "ce"}, {"name": "ce"}),
        ({"name": "mlp", "hidden": [4]}, {"hidden": [8]}, {"name": "mlp", "hidden": [8]}),
        ({"name": "mlp", "hidden": [4]}, {"import": "m:f"}, {"import": "m:f"}),
        ({"import": "m:f"}, {"kwargs": {"width": 3}}, {"import": "m:f", "kwargs": {"width": 3}}),
        ({"epochs": 3, "lr": 1}, {"lr": 2}, {"epochs": 3, "lr": 2}),
    ],
)
def test_a_section_of_another_kind_takes_the_whole_place(
    below: dict[str, Any], above: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert configs._merged(below, above) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data: {rows: 3}\ntune: {}", r"--search .*search.yaml, line 1: data: a search file holds tune, and student"),
        ("tune:\n  spce: {}", r"--search .*search.yaml, line 2: tune.spce: unknown key, did you mean 'space'"),
        ("student: {train: {epochs: 0}}", r"--search .*search.yaml, line 1: student.train.epochs"),
    ],
)
def test_a_search_file_that_is_wrong_is_named(text: str, told: str, tmp_path: Path) -> None:
    run, search = tmp_path / "run.yaml", tmp_path / "search.yaml"
    run.write_text(DESIGN)
    search.write_text(text)
    with pytest.raises(UserError, match=told):
        configs.load(run, search=search)


def test_the_dumped_config_loads_to_the_same_config(tmp_path: Path) -> None:
    config = _load(tmp_path)
    assert configs.from_dict(yaml.safe_load(configs.to_yaml(configs.to_dict(config)))) == config


@settings(deadline=None)
@given(epochs=st.integers(1, 99), seeds=st.lists(st.integers(0, 9), min_size=1, unique=True))
def test_the_digest_payload_covers_what_changes_the_result_and_nothing_else(epochs: int, seeds: list[int]) -> None:
    def payload(**changes: Any) -> dict[str, Any]:
        model = {"name": "mlp"}
        return digest_payload(StudentConfig.model_validate({"model": model, **changes}))

    base = payload()
    assert payload(seeds=seeds) == base  # a seed is a folder of its own, not part of the section
    assert (payload(train={"epochs": epochs}) == payload(train={"epochs": 4})) == (epochs == 4)


def test_a_relative_source_path_is_made_absolute_when_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = _load(tmp_path, "data={source: idx, path: images}")
    assert getattr(config.data, "path", None) == str(tmp_path / "images")


@pytest.mark.parametrize("path", ["s3://key:CANARY@bucket/set", "s3://bucket/set?secret_key=CANARY"])
def test_credentials_in_a_uri_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match="data.path: a URI with credentials") as caught:
        _load(tmp_path, f"data={{source: parquet, path: '{path}', columns: {{input: a}}}}")
    assert "CANARY" not in str(caught.value)


def test_paths_of_ones_own_become_absolute_and_uris_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for written, expected in (
        ("set/*.parquet", f"{tmp_path}/set/*.parquet"),
        ("s3://b/set?region=x", "s3://b/set?region=x"),
    ):
        config = _load(tmp_path, f"data={{source: parquet, path: '{written}', columns: {{input: a}}}}")
        assert getattr(config.data, "path", None) == expected


def test_the_published_schema_is_that_of_the_config() -> None:
    published = json.loads((Path(__file__).parents[1] / "tune_configs" / "schema.json").read_text())
    assert published == json.loads(json.dumps(configs.json_schema())), "run `make schema`"
    assert set(configs.Config.model_fields) == set(published["properties"])
