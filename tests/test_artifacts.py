"""Stage folders: their names never move, their files are whole, and one process at a time makes one."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distill_ray import artifacts, config
from distill_ray.config import Section, digest_payload, setting
from distill_ray.errors import UserError
from distill_ray.sources import open_source
from distill_ray.storage import Folder, check_writable

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 60  # a bound for a hang

# The folder names of shipped configs. They may change only together with artifacts.STAGE_VERSIONS or the config's own
# data section: otherwise every store that users have is made again.
GOLDEN_DATA_DIGESTS = {"glyph62": "3155b9e7357bb5c4", "smoke": "e4858823aeccad75"}


# --- digests --------------------------------------------------------------------------------------------------------


def data_stage(name: str, *overrides: str) -> artifacts.Stage:
    data = config.load(ROOT / "tune_configs" / f"{name}.yaml", overrides).data
    payload = {"config": digest_payload(data), "source": open_source(data).fingerprint()}
    return artifacts.stage(Folder.at("/out"), "data", payload)


@pytest.mark.parametrize(("name", "digest"), GOLDEN_DATA_DIGESTS.items())
def test_the_data_folders_of_shipped_configs_keep_their_names(name: str, digest: str) -> None:
    stage = data_stage(name)
    assert (stage.digest, str(stage.folder)) == (digest, f"/out/artifacts/data-{digest}")


def test_prepare_names_its_folder_so_too() -> None:
    from distill_ray.stages import prepare

    loaded = config.load(ROOT / "tune_configs" / "smoke.yaml")
    assert prepare.locate(loaded, Folder.at("/out")) == data_stage("smoke")


# Of the whole chain, with a teacher whose weights are said to have the checksum 00...
GOLDEN_CHAIN = {
    "glyph62": {
        "teacher": "17beed9cea2c703a", "labels": "5524822bdbf42f1d", "student": "1ded943f5b934d4b",
        "control": "e94f963fdcf034c4",
    },
    "smoke": {
        "teacher": "53edb706591b2ef4", "labels": "599366c256ca73a2", "student": "b5d1aba12f3d8130",
        "control": "1f23b9c928d7cd1b",
    },
    "smoke_search": {
        "teacher": "1039b589c46ee752", "labels": "ab8defa14709ec17", "student": "ce3a8272006cd0b3",
        "control": "ce0596a4a0ad383f", "tune": "a9ad2c4549eb1dab",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN_CHAIN)
def test_all_folders_of_shipped_configs_keep_their_names(name: str, tmp_path: Path) -> None:
    from distill_ray.stages import label, prepare, student, teacher, tune
    from distill_ray.stages.search_space import Inputs

    loaded, out = config.load(ROOT / "tune_configs" / f"{name}.yaml"), Folder.at(tmp_path)
    data = prepare.locate(loaded, out)
    model = teacher.locate(loaded, out, data)
    model.folder.write_json(model.marker, {"weights_sha256": "0" * 64})
    labels = label.locate(loaded, out, data, model)
    found = {"teacher": model.digest, "labels": labels.digest}
    found |= {one.role: one.stage.digest for one in student.students_of(loaded, out, data, labels)}
    if loaded.tune is not None:
        found["tune"] = tune.locate(Inputs(loaded, out, data, labels)).digest
    assert found == GOLDEN_CHAIN[name]


@pytest.mark.parametrize(
    "override", ["data.seed=1", "data.rows=1922", "data.shard_rows=255", "data.input.mean=[0.4]",
    "data.split.fractions=[0.7, 0.2, 0.1]"],
)  # fmt: skip
def test_what_changes_the_data_changes_its_folder(override: str) -> None:
    assert data_stage("smoke", override).digest != GOLDEN_DATA_DIGESTS["smoke"]


@pytest.mark.parametrize(
    "override", ["name=other", "cluster.workers=7", "tracking.wandb.mode=disabled", "student.seeds=[4]",
    "teacher.seed=3"],
)  # fmt: skip
def test_what_does_not_change_the_data_leaves_its_folder(override: str) -> None:
    assert data_stage("smoke", override).digest == GOLDEN_DATA_DIGESTS["smoke"]


def test_digest_of_is_pinned() -> None:
    """The canonical form itself: sorted keys, no spaces, UTF-8 escapes, SHA-256."""
    written = rb'{"a":{"\u00e9":true},"b":[1,2.5,null]}'
    expected = hashlib.sha256(written).hexdigest()[:16]
    assert artifacts.digest_of({"b": [1, 2.5, None], "a": {"é": True}}) == expected
    assert artifacts.digest_of({"a": {"é": True}, "b": (1, 2.5, None)}) == expected
    with pytest.raises(ValueError, match="JSON compliant"):
        artifacts.digest_of({"a": float("nan")})


def test_stages_of_one_payload_have_folders_of_their_own() -> None:
    stages = [artifacts.stage(Folder.at("/out"), name, {"x": 1}) for name in artifacts.MARKERS]
    assert len({stage.digest for stage in stages}) == len(artifacts.MARKERS)


def test_a_new_stage_version_is_a_new_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "STAGE_VERSIONS", {**artifacts.STAGE_VERSIONS, "data": 2})
    assert data_stage("smoke").digest != GOLDEN_DATA_DIGESTS["smoke"]


class Inner(Section):
    kept: int = setting(1)
    ignored: int = setting(1, digest="never")


class Before(Section):
    inner: Inner = setting(Inner())
    items: tuple[Inner, ...] = setting((Inner(),))


class After(Before):
    """``Before`` with a key that was added later."""

    added: float = setting(0.0, digest="not_at_default")
    added_section: Inner | None = setting(None, digest="not_at_default")


def test_a_key_added_later_is_left_out_at_its_neutral_default() -> None:
    assert digest_payload(After()) == digest_payload(Before()) == {"inner": {"kept": 1}, "items": [{"kept": 1}]}
    assert digest_payload(After(added=0.5)) == {**digest_payload(Before()), "added": 0.5}
    assert digest_payload(After(added_section=Inner(kept=3)))["added_section"] == {"kept": 3}


def test_a_key_that_does_not_change_the_result_is_left_out_at_any_value() -> None:
    noisy = Before(inner=Inner(ignored=9), items=(Inner(ignored=8),))
    assert digest_payload(noisy) == digest_payload(Before())
    assert digest_payload(Before(inner=Inner(kept=2))) != digest_payload(Before())


# --- finished or not ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, "", '{"rows": 1', "[1]", "\xff"])
def test_a_folder_without_a_whole_marker_is_unfinished(tmp_path: Path, content: str | None) -> None:
    stage = artifacts.stage(Folder.at(tmp_path), "teacher", {})
    if content is not None:
        stage.folder.write_bytes("summary.json", content.encode("latin-1"))
    assert stage.finished() is None


def test_the_marker_says_that_a_folder_is_finished(tmp_path: Path) -> None:
    for name, marker in artifacts.MARKERS.items():
        stage = artifacts.stage(Folder.at(tmp_path), name, {})
        stage.folder.write_json("other.json", {})
        assert stage.finished() is None
        stage.folder.write_json(marker, {"rows": 1})
        assert stage.finished() == {"rows": 1}


# --- files appear whole or not at all -------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    folder = Folder.at(tmp_path)
    folder.write_text("summary.json", "before")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full) if failing == "fsync" else monkeypatch.setattr(Path, "replace", full)
    for name in ("summary.json", "new.json"):
        with pytest.raises(OSError, match="No space left"):
            folder.write_text(name, "after")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    assert folder.read_bytes("summary.json") == b"before"


def test_json_that_is_none_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        Folder.at(tmp_path).write_json("summary.json", {"accuracy": float("nan")})
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys
from distill_ray.storage import Folder
folder = Folder.at(sys.argv[1])
print("ready", flush=True)
while True:
    for value in range(256):
        folder.write_bytes("file", bytes([value]) * 3_000_000)
"""


def test_a_killed_writer_leaves_a_whole_file_or_none(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    for delay_s in (0.0, 0.02, 0.05, 0.09):
        with process(WRITER, str(tmp_path)) as writer:
            assert line_of(writer) == "ready"
            seen = time.monotonic() + delay_s
            while time.monotonic() < seen:
                assert folder.size("file") in (None, 3_000_000)
            writer.kill()
        if folder.exists("file"):
            content = folder.read_bytes("file")
            assert content == content[:1] * 3_000_000
        assert folder.names() in ([], ["file"])  # what it left half written is not listed


def test_check_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(Folder.at(tmp_path / "new" / "out"))
    assert list((tmp_path / "new" / "out").iterdir()) == []


# --- one maker at a time --------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from distill_ray import artifacts
from distill_ray.storage import Folder
stage = artifacts.stage(Folder.at(sys.argv[1]), "data", {"x": 1})
with artifacts.exclusive(stage, lambda text: print(text, flush=True)):
    print("held", flush=True)
    sys.stdin.readline()
print("released", flush=True)
"""


@contextmanager
def process(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    call = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(call, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0) as child:
        try:
            yield child
        finally:
            child.kill()


def line_of(child: subprocess.Popen[str], timeout_s: float = TIMEOUT_S) -> str | None:
    """The next line that the process prints, None where there is none in time."""
    assert child.stdout is not None
    if not select.select([child.stdout], [], [], timeout_s)[0]:
        return None
    return child.stdout.readline().rstrip("\n")


def test_exclusive_waits_until_the_holder_is_killed(tmp_path: Path) -> None:
    stage = artifacts.stage(Folder.at(tmp_path), "data", {"x": 1})
    with process(HOLDER, str(tmp_path)) as holder:
        assert line_of(holder) == "held"
        with process(HOLDER, str(tmp_path)) as waiter:
            assert line_of(waiter) == f"another run is making {stage.folder.name}; waiting for it"
            assert line_of(waiter, timeout_s=0.5) is None
            holder.send_signal(signal.SIGKILL)
            assert holder.wait(TIMEOUT_S) == -signal.SIGKILL
            assert line_of(waiter) == "held"


def test_exclusive_passes_on_when_the_holder_is_done(tmp_path: Path) -> None:
    stage = artifacts.stage(Folder.at(tmp_path), "data", {"x": 1})
    told: list[str] = []
    with process(HOLDER, str(tmp_path)) as holder:
        assert line_of(holder) == "held"
        other = artifacts.stage(Folder.at(tmp_path), "data", {"x": 2})
        with artifacts.exclusive(other, told.append):  # another folder is another lock
            assert told == []
        assert holder.stdin is not None
        holder.stdin.write("\n")
        assert line_of(holder) == "released"
        with artifacts.exclusive(stage, told.append):
            assert told == []
    assert not stage.folder.path.exists()  # the lock lies beside the folder, not in it


def test_exclusive_lets_go_when_the_work_fails(tmp_path: Path) -> None:
    stage = artifacts.stage(Folder.at(tmp_path), "data", {"x": 1})
    with pytest.raises(RuntimeError, match="broken"), artifacts.exclusive(stage, print):
        raise RuntimeError("broken")
    with process(HOLDER, str(tmp_path)) as holder:
        assert line_of(holder) == "held"


def test_exclusive_leaves_no_marker_where_the_mount_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A marker file would outlive a killed run, and its successor would wait for ever."""

    def flock(file: int, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    stage, told = artifacts.stage(Folder.at(tmp_path), "data", {"x": 1}), list[str]()
    with artifacts.exclusive(stage, told.append), artifacts.exclusive(stage, told.append):
        assert not artifacts.has_locks(stage.folder)
    assert told == []
    monkeypatch.undo()
    assert artifacts.has_locks(stage.folder)


def test_exclusive_does_not_lock_object_stores(tmp_path: Path) -> None:
    stage = artifacts.stage(Folder(f"file://{tmp_path}"), "data", {"x": 1})
    with artifacts.exclusive(stage, print), artifacts.exclusive(stage, print):
        pass
    assert list(tmp_path.iterdir()) == []


# --- where a folder is ----------------------------------------------------------------------------------------------


def test_a_file_uri_is_a_local_folder_and_credentials_in_a_uri_are_refused(tmp_path: Path) -> None:
    assert Folder.at(f"file://{tmp_path}/runs") == Folder.at(tmp_path / "runs")
    with pytest.raises(UserError, match="credentials") as caught:
        Folder.at("s3://KEY:CANARY@bucket/runs")
    assert "CANARY" not in str(caught.value)
