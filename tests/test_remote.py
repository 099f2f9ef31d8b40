"""``--out s3://...`` against a real S3-compatible server: every stage, kills, refusals, outages, and the cache."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from distill_ray import storage
from distill_ray.console import Reporter
from distill_ray.errors import RunError, UserError
from distill_ray.storage import Folder
from distill_ray.store import ShardCache, open_store, read_split
from distill_ray.store.verify import verify
from tests.conftest import SmallRun
from tests.harness import SMALL_RUN, distill_ray, stop_when, write_config
from tests.object_store import BUCKET, ObjectStore, object_store, proxy

OUT = f"s3://{BUCKET}/team/runs"
PREFIX = "team/runs/"
SEARCH = {
    "space": {"loss.temperature": {"choice": [1.0, 4.0]}},
    "search": "grid", "scheduler": "none", "seeds": 1,
}  # fmt: skip
REFUSED_WITHIN_S = 30  # a bound for a hang, not a measure of speed


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@dataclass(frozen=True)
class RemoteRun:
    """What the remote run left, and the object versions that a killed one had written before."""

    environment: dict[str, str]
    stages: dict[str, str]
    written_before: dict[str, str]
    cache: Path


def versions(server: ObjectStore, kind: str) -> dict[str, str]:
    """When each shard of the stores of this kind was written."""
    pages = server.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{PREFIX}artifacts/{kind}")
    found = [item for page in pages for item in page.get("Contents", [])]
    return {item["Key"]: str(item["LastModified"]) for item in found if item["Key"].endswith(".arrow")}


@pytest.fixture(scope="module")
def remote_run(server: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> RemoteRun:
    """``distill-ray run`` of SMALL_RUN onto S3, killed once in the middle of labelling."""
    root = tmp_path_factory.mktemp("remote")
    config, cache = write_config(root, SMALL_RUN | {"cluster": {"cache_dir": str(root / "cache")}}), root / "cache"
    environment = server.environment()
    arguments = ("run", config, "--out", OUT)
    stop_when(arguments, lambda: len(versions(server, "labels")) >= 3, signal.SIGKILL, **environment)
    before = versions(server, "labels")
    done = distill_ray(*arguments, "--json", **environment)
    assert done.code == 0, done.stderr
    assert done.answer["stages"][0]["status"] == "reused"
    stages = {stage["name"]: stage["folder"] for stage in done.answer["stages"]}
    return RemoteRun(environment, stages, before, cache)


def test_every_artifact_is_the_same_as_on_a_disk(
    remote_run: RemoteRun, small_run: SmallRun, server: ObjectStore
) -> None:
    """fp32 on the same CPU: the shards by their names, which are checksums, and the weights by theirs."""
    here = {
        str(path.relative_to(small_run.out)) for path in small_run.out.glob("artifacts/*/*") if path.suffix == ".arrow"
    }
    there = server.keys(PREFIX)
    assert {key for key in there if key.endswith(".arrow")} == here
    for summary in small_run.out.glob("artifacts/*/summary.json"):
        key = f"{PREFIX}{summary.relative_to(small_run.out)}"
        body = server.client().get_object(Bucket=BUCKET, Key=key)["Body"].read()
        assert json.loads(body)["weights_sha256"] == json.loads(summary.read_text())["weights_sha256"]
    for name in ("small/config.yaml", "small/summary.json", "small/report.html"):
        assert there[name] > 0


def test_the_killed_runs_shards_were_not_written_again(remote_run: RemoteRun, server: ObjectStore) -> None:
    after = versions(server, "labels")
    assert len(remote_run.written_before) >= 3
    assert len(after) > len(remote_run.written_before)
    assert {key: after.get(key) for key in remote_run.written_before} == remote_run.written_before


def test_the_other_commands_work_there_too(remote_run: RemoteRun, server: ObjectStore, tmp_path: Path) -> None:
    config = write_config(tmp_path, SMALL_RUN | {"tune": SEARCH})
    tuned = distill_ray("tune", config, "--out", OUT, "--json", **remote_run.environment)
    assert tuned.code == 0, tuned.stderr
    assert tuned.answer["tune"]["counts"] == {"completed": 2}
    exported = distill_ray("export", config, "--out", OUT, "--json", **remote_run.environment)
    assert exported.code == 0, exported.stderr
    there = server.keys(PREFIX)
    assert there["small/export/student.pt2"] > 0
    assert {Path(key).name for key in there if key.startswith("artifacts/tune-")} >= {"trials.parquet", "pareto.json"}


@pytest.mark.parametrize("stage", ["prepare", "label"])
def test_verify_reads_it(remote_run: RemoteRun, stage: str) -> None:
    done = distill_ray("verify", remote_run.stages[stage], "--json", **remote_run.environment)
    assert done.code == 0, done.stderr
    assert (done.answer["missing"], done.answer["double"], done.answer["orphans"]) == (0, 0, 0)
    if stage == "label":
        assert done.answer["replay"]["wrong_rows"] == 0
        assert done.answer["accuracy"] == pytest.approx(done.answer["summary_accuracy"], abs=1e-6)


def test_shards_came_through_the_cache(remote_run: RemoteRun) -> None:
    copies = [path for path in remote_run.cache.iterdir() if path.suffix == ".arrow"]
    assert len(copies) > 0
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.stem for path in copies)


@pytest.fixture
def at_server(server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """This process, too, finds the server."""
    for key, value in server.environment().items():
        monkeypatch.setenv(key, value)
    storage._remote.cache_clear()
    return server


def test_a_damaged_object_is_refused_and_never_cached(
    remote_run: RemoteRun, at_server: ObjectStore, tmp_path: Path
) -> None:
    data = open_store(remote_run.stages["prepare"], ShardCache(tmp_path / "cache", 2**30))
    record = data.manifest.splits["test"].shards[0]
    key = f"{PREFIX}artifacts/{data.folder.name}/{record.file}"
    sound = at_server.client().get_object(Bucket=BUCKET, Key=key)["Body"].read()
    flipped = sound[:100] + bytes([sound[100] ^ 4]) + sound[101:]
    try:
        at_server.client().put_object(Bucket=BUCKET, Key=key, Body=flipped)
        with pytest.raises(UserError, match=rf"{record.file}: damaged shard"):
            read_split(data, "test")
    finally:
        at_server.client().put_object(Bucket=BUCKET, Key=key, Body=sound)
    assert len(read_split(data, "test")) == data.manifest.splits["test"].rows
    assert hashlib.sha256((tmp_path / "cache" / f"{record.sha256}.arrow").read_bytes()).hexdigest() == record.sha256


def test_what_is_cached_needs_the_server_only_for_the_manifest(
    remote_run: RemoteRun, at_server: ObjectStore, tmp_path: Path
) -> None:
    data = open_store(remote_run.stages["prepare"], ShardCache(tmp_path / "cache", 2**30))
    first = read_split(data, "validation")
    data.folder = Folder(f"s3://{BUCKET}/nowhere")
    again = read_split(data, "validation")
    assert again.inputs.tobytes() == first.inputs.tobytes()
    with pytest.raises(UserError, match="missing shard"):
        read_split(data, "test")


# --- what is refused at once, and what is waited for ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "changed", "told"),
    [
        ("s3://no-such-bucket/runs", {}, "NO_SUCH_BUCKET"),
        ("s3://", {}, "a URI without a bucket or path"),
        ("s9://shared/runs", {}, "s9://shared/runs: cannot be written (Unrecognized filesystem type"),
        (OUT, {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "Could not connect to server"),
        (f"s3://key:very-secret@{BUCKET}/runs", {}, "a URI with credentials in it"),
    ],
)
def test_a_wrong_address_is_one_line_at_once(
    server: ObjectStore, tmp_path: Path, out: str, changed: dict[str, str], told: str
) -> None:
    started = time.monotonic()
    done = distill_ray("run", write_config(tmp_path, SMALL_RUN), "--out", out, **server.environment() | changed)
    assert time.monotonic() - started < REFUSED_WITHIN_S
    assert (done.code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert told in line
    assert "very-secret" not in line


def test_options_in_the_uri_are_kept_on_every_path(
    server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in server.environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    options = f"?scheme=http&endpoint_override=127.0.0.1:{server.port}&region=us-east-1"
    folder = Folder.at(f"s3://{BUCKET}/options/runs/{options}")
    below = folder / "artifacts" / "data-1"
    below.write_text("a.txt", "text")
    assert below.uri == f"s3://{BUCKET}/options/runs/artifacts/data-1{options}"
    assert (below.name, below.parent.name, below.names()) == ("data-1", "artifacts", ["a.txt"])
    assert server.keys("options/") == {"runs/artifacts/data-1/a.txt": 4}


def test_a_folder_may_have_any_name(at_server: ObjectStore) -> None:
    for name, key in (("my runs", "my runs"), ("läufe", "läufe"), ("100%", "100%"), ("a%20b", "a b"), ("c#1", "c#1")):
        folder = Folder.at(f"s3://{BUCKET}/named/{name}/x")
        folder.write_text("a.txt", "text")
        assert folder.names() == ["a.txt"]
        assert at_server.keys("named/")[f"{key}/x/a.txt"] == 4


def test_a_folder_there_behaves_as_one_here(at_server: ObjectStore, tmp_path: Path) -> None:
    for folder in (Folder.at(tmp_path / "x"), Folder.at(f"s3://{BUCKET}/x")):
        assert (folder.names(), folder.sizes(), folder.size("a"), folder.exists("a")) == ([], {}, None, False)
        folder.write_bytes("b", b"12")
        folder.write_bytes("a", b"1" * (11 * 2**20))  # more than one part of a multipart upload
        (folder / "below").write_bytes("c", b"")
        assert folder.names() == ["a", "b"]
        assert folder.sizes() == {"a": 11 * 2**20, "b": 2}
        assert folder.buffer("a").to_pybytes() == folder.read_bytes("a") == b"1" * (11 * 2**20)
        folder.write_bytes("b", b"345")
        assert folder.read_bytes("b") == b"345"
        assert folder.names_older_than(3600) == []
        assert folder.names_older_than(-3600) == ["a", "b"]
        folder.delete("b")
        folder.delete("b")
        assert folder.names() == ["a"]
        with pytest.raises(FileNotFoundError):
            folder.read_bytes("b")
        with pytest.raises(FileNotFoundError):
            folder.buffer("b")


def test_an_outage_is_waited_for_and_told(
    server: ObjectStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with proxy(server.port) as door:
        for key, value in server.environment(door.port).items():
            monkeypatch.setenv(key, value)
        storage._remote.cache_clear()
        folder = Folder.at(f"s3://{BUCKET}/outage")
        folder.write_bytes("a", b"before")
        door.mode = "refuse"
        threading.Timer(8.0, lambda: setattr(door, "mode", "open")).start()
        folder.write_bytes("b", b"after")
        assert (folder.read_bytes("a"), folder.read_bytes("b")) == (b"before", b"after")
        assert door.refused > 0
    (told,) = {record.getMessage().split(" (")[0] for record in caplog.records if record.name == "distill_ray.storage"}
    assert told == f"s3://{BUCKET}/outage: refused"


def test_patience_ends(monkeypatch: pytest.MonkeyPatch, server: ObjectStore) -> None:
    for key, value in server.environment(1).items():
        monkeypatch.setenv(key, value)
    storage._remote.cache_clear()
    monkeypatch.setattr(storage, "_LONGEST_PAUSE_S", 0.1)
    token = storage._patience_s.set(1.0)
    try:
        with pytest.raises(RunError, match=r"does not answer for 1 s \(.*Could not connect to server"):
            Folder.at(f"s3://{BUCKET}/never").names()
    finally:
        storage._patience_s.reset(token)


def test_a_store_that_does_not_answer_is_not_called_faulty(
    monkeypatch: pytest.MonkeyPatch, server: ObjectStore
) -> None:
    for key, value in server.environment(1).items():
        monkeypatch.setenv(key, value)
    storage._remote.cache_clear()
    with pytest.raises(RunError, match=r"store: cannot be read \(.*Could not connect to server.*\): try again later"):
        verify(Folder.at(f"s3://{BUCKET}/store"), Reporter(quiet=True))


def test_only_old_orphans_go_and_the_first_commit_stays(at_server: ObjectStore, tmp_path: Path) -> None:
    """There are no locks: another writer may be about to commit what looks like an orphan."""
    from distill_ray.artifacts import Stage
    from distill_ray.stages import shard_job
    from tests import stores

    folder = Folder.at(f"s3://{BUCKET}/two-writers/data-{stores.DATA_DIGEST}")
    target = Stage("data", stores.DATA_DIGEST, folder)
    local = stores.make_data(tmp_path)
    for record in local.manifest.shards:
        folder.write_bytes(record.file, local.folder.read_bytes(record.file))
    orphan = "train-00000-0123456789abcdef.arrow"
    folder.write_bytes(orphan, b"of another writer")
    shard_job.commit(target, local.data_manifest)
    assert orphan in folder.names()
    other = local.data_manifest.model_copy(update={"code_version": "of the second writer"})
    shard_job.commit(target, other)
    assert open_store(folder).manifest == local.manifest
    folder.write_text("manifest.json", "{")
    shard_job.commit(target, other)  # what is in place is no store: the second writer's word counts
    assert open_store(folder).manifest == other
    folder.delete("manifest.json")
    folder.delete(local.manifest.shards[0].file)
    with pytest.raises(RunError, match="another run took it away"):
        shard_job.commit(target, other)
    assert "manifest.json" not in folder.names()
