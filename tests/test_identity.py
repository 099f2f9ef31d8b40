"""A store that is not the config's is refused, naming both; no flag gets around it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import SmallRun
from tests.harness import distill_ray, epochs_done, only

OTHER = "0123456789abcdef"


def change_manifest(run: SmallRun, store: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Change keys of a store's manifest; what they were before."""
    path = only(run.out, f"artifacts/{store}-*/manifest.json")
    manifest = json.loads(path.read_text())
    before = {key: manifest[key] for key in changes}
    path.write_text(json.dumps(manifest | changes))
    return before


@pytest.mark.parametrize(
    ("store", "key", "value", "told"),
    [
        ("labels", "digest", OTHER, "holds the store labels-{new}, the config's is labels-{old}"),
        ("labels", "data_digest", OTHER, "was made from data {new}, the config's data is {old}"),
        ("labels", "teacher_digest", OTHER, "was made by teacher {new}, the config's is {old}"),
        ("labels", "teacher_weights_sha256", "f" * 64, "was made by weights {new}, the config's is {old}"),
        ("labels", "class_names", [str(n) for n in range(62)], "its classes have other names than those of the data"),
        ("data", "digest", OTHER, "holds the store data-{new}, the config's is data-{old}"),
        (
            "data", "input", {"scale": 1.0, "mean": [0.0], "std": [1.0]},
            "is another: scale 1.0, the config has 0.00392156862745098",
        ),
    ],
)  # fmt: skip
def test_a_store_that_is_not_the_configs_is_refused(
    own_copy: SmallRun, store: str, key: str, value: Any, told: str
) -> None:
    old = change_manifest(own_copy, store, {key: value})[key]
    trained = epochs_done(own_copy.out, "student")
    # A student that is not there yet; what is asked of the stores is the same for those that are.
    done = distill_ray("student", own_copy.config, "student.seeds=[1]", "--out", own_copy.out)
    assert done.code == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert told.format(new=value, old=old) in last
    assert str(only(own_copy.out, f"artifacts/{store}-*")) in last
    assert "delete that folder" in last or "run `distill-ray label`" in last
    assert epochs_done(own_copy.out, "student") == trained


def test_a_whole_store_in_the_place_of_another_is_refused(own_copy: SmallRun) -> None:
    """As when a backup is restored under the wrong name."""
    data, labels = (only(own_copy.out / "artifacts", f"{name}-*") for name in ("data", "labels"))
    labels.rename(labels.with_name("kept"))
    data.rename(labels)
    labels.with_name("kept").rename(data)
    done = distill_ray("run", own_copy.config, "--out", own_copy.out)
    assert done.code == 2
    assert f"{data}: is a label store, expected a data store" in done.stderr.splitlines()[-1]


def test_there_is_no_force(own_copy: SmallRun) -> None:
    done = distill_ray("student", own_copy.config, "--force", "--out", own_copy.out)
    assert done.code == 2
    assert "--force" in done.stderr


def test_a_store_of_a_newer_format_is_not_made_again_over_it(own_copy: SmallRun) -> None:
    change_manifest(own_copy, "labels", {"format_version": "2.0"})
    path = only(own_copy.out, "artifacts/labels-*/manifest.json")
    before = path.read_bytes()
    done = distill_ray("run", own_copy.config, "--out", own_copy.out)
    assert done.code == 2
    assert "format version '2.0', this code reads up to 1.x: update distill-ray" in done.stderr.splitlines()[-1]
    assert path.read_bytes() == before
