"""A store that is not what was written: flipped, cut, missing and foreign files, before and after the commit."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from distill_ray.console import Reporter
from distill_ray.errors import UserError
from distill_ray.storage import Folder
from distill_ray.store import ShardRecord, SplitArrays, Store, open_store, read_shards, shards
from distill_ray.store import manifest as manifests
from distill_ray.store.verify import verify
from tests.campaign import ledger
from tests.campaign.ground import Ground, Tally, Trail, last_line
from tests.harness import only

_FOREIGN_DIGEST = "f0" * 8
_LABEL_FLIPS_A_DATA_FLIP = 5


def flips(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """One byte, anywhere in the file, one shard at a time: ``count`` label shards, and some data shards."""
    out = ground.copy("flips", labels=True)
    tallies = []
    for kind, flipped in (("label", count), ("data", max(1, count // _LABEL_FLIPS_A_DATA_FLIP))):
        tally = Tally(f"one byte of a {kind} shard flipped")
        store = open_store(str(only(out, f"artifacts/{'labels' if kind == 'label' else 'data'}-*")))
        records = store.manifest.shards
        tally.expect(len(records) >= flipped, f"the store has only {len(records)} shards")
        for record in rng.sample(records, min(flipped, len(records))):
            path = store.folder.path / record.file
            with _restored(path):
                _flip(path, rng)
                _must_refuse(tally, ground, store.folder, record.file)
        tallies.append(tally)
    return tallies


def _flip(path: Path, rng: random.Random) -> None:
    """Change one byte and nothing else."""
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= rng.randrange(1, 256)
    path.write_bytes(raw)


def flip_before_a_student(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """The real command: no epoch is trained on a damaged store."""
    tally = Tally("one byte flipped, then `distill-ray student`")
    for number in range(count):
        out = ground.copy(f"student-{number}", labels=True)
        record = rng.choice(open_store(Folder(str(only(out, "artifacts/labels-*")))).manifest.splits["train"].shards)
        _flip(only(out, f"artifacts/labels-*/{record.file}"), rng)
        done = ground.run("student", out)
        tally.injected += 1
        tally.expect(done.code == 2, f"exit {done.code} instead of 2: {last_line(done)}")
        tally.expect(record.file in last_line(done), f"does not name {record.file}: {last_line(done)}")
        trained = list(out.glob("artifacts/student-*/metrics.jsonl"))
        tally.expect(not trained, "an epoch was trained on it")
        tally.say(f"exit {done.code}: {last_line(done).replace(record.file, '<shard>')}")
    return [tally]


def broken_shards(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """Shards of a finished store that are cut, gone, of another store, or of other rows; ``count`` of each."""
    store, foreign = _copied_store(ground, "shards"), _foreign_store(ground)
    tallies = []
    for fault, damage in _SHARD_DAMAGES.items():
        tally = Tally(fault)
        tallies.append(tally)
        for record in rng.sample(store.manifest.splits["train"].shards[1:-1], count):
            path = store.folder.path / record.file
            manifest = store.folder.path / manifests.FILE
            with _restored(path), _restored(manifest):
                named = damage(rng, store, foreign, record)
                _must_refuse(tally, ground, store.folder, named)
                if named != record.file:
                    (store.folder.path / named).unlink()
    return tallies


def _cut(rng: random.Random, store: Store, foreign: Store, record: ShardRecord) -> str:
    path = store.folder.path / record.file
    path.write_bytes(path.read_bytes()[: rng.randrange(record.bytes)])
    return record.file


def _delete(rng: random.Random, store: Store, foreign: Store, record: ShardRecord) -> str:
    (store.folder.path / record.file).unlink()
    return record.file


def _swap_the_file(rng: random.Random, store: Store, foreign: Store, record: ShardRecord) -> str:
    theirs = foreign.manifest.splits[record.split].shards[record.index]
    shutil.copyfile(foreign.folder.path / theirs.file, store.folder.path / record.file)
    return record.file


def _swap_the_rows(rng: random.Random, store: Store, foreign: Store, record: ShardRecord) -> str:
    """The rows of the shard before it, whole, under a right name, and named by the manifest with its own ids."""
    before = store.manifest.splits[record.split].shards[record.index - 1]
    batch = shards.read(store.folder, before, verify=True)
    written = shards.write(store.folder, record.split, record.index, batch, store=store.manifest.digest)
    raw = json.loads((store.folder.path / manifests.FILE).read_bytes())
    raw["splits"][record.split]["shards"][record.index] = written.model_dump()
    (store.folder.path / manifests.FILE).write_text(json.dumps(raw))
    return written.file


_SHARD_DAMAGES: dict[str, Callable[[random.Random, Store, Store, ShardRecord], str]] = {
    "a label shard cut": _cut,
    "a label shard deleted": _delete,
    "a shard of another teacher under the right name": _swap_the_file,
    "a whole shard with the ids of another": _swap_the_rows,
}


def spoil_what_was_left(trail: Trail, rng: random.Random) -> None:
    """Between two starts: a finished shard is cut, and others give way to whole shards that do not belong there."""
    names = rng.sample(sorted(trail.whole()), len(_LEFTOVERS))
    store = only(trail.out, "artifacts/labels-*")
    whole = {name: (store / name).read_bytes() for name in names}
    for (what, spoil), name in zip(_LEFTOVERS.items(), names, strict=True):
        (store / name).unlink()
        file, raw = spoil(trail.ground, rng, name, whole)
        (store / file).write_bytes(raw)
        trail.written.pop(name, None)
        tally = trail.suffer(Tally(f"left by a killed writer: {what}"))
        tally.injected += 1
        tally.say("not taken: the same command computes the shard again")


_Spoilt = tuple[str, bytes]  # a file's name and content


def _left_cut(ground: Ground, rng: random.Random, name: str, whole: Mapping[str, bytes]) -> _Spoilt:
    return name, whole[name][: rng.randrange(len(whole[name]))]


def _left_foreign(ground: Ground, rng: random.Random, name: str, whole: Mapping[str, bytes]) -> _Spoilt:
    return name, _their(ground, name).read_bytes()


def _left_foreign_by_its_name(ground: Ground, rng: random.Random, name: str, whole: Mapping[str, bytes]) -> _Spoilt:
    return _their(ground, name).name, _their(ground, name).read_bytes()


def _left_other_rows(ground: Ground, rng: random.Random, name: str, whole: Mapping[str, bytes]) -> _Spoilt:
    other = next(n for n in whole if n != name)
    return f"{_place(name)}-{other.rsplit('-', 1)[1]}", whole[other]


def _place(name: str) -> str:
    """Split and index of a shard, without its checksum."""
    return name.rsplit("-", 1)[0]


def _their(ground: Ground, name: str) -> Path:
    return next(_foreign_store(ground).folder.path.glob(f"{_place(name)}-*.arrow"))


_LEFTOVERS: dict[str, Callable[[Ground, random.Random, str, Mapping[str, bytes]], _Spoilt]] = {
    "a cut shard": _left_cut,
    "another teacher's shard under the right name": _left_foreign,
    "another teacher's shard under a name that fits it": _left_foreign_by_its_name,
    "a shard with other rows under a name that fits it": _left_other_rows,
}


def leftovers(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """A finished store loses its manifest, and what is left is spoilt; ``count`` times."""
    tallies: list[Tally] = []
    out = ground.copy("leftovers", labels=True)
    for _ in range(count):
        trail = Trail(ground, out)
        only(out, "artifacts/labels-*/manifest.json").unlink()
        trail.note()
        spoil_what_was_left(trail, rng)
        trail.finish()
        tallies += trail.tallies
    return tallies


def broken_manifests(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """A manifest that is cut, gone or of another store: verify and the reader refuse it."""
    store, foreign = _copied_store(ground, "manifests"), _foreign_store(ground)
    path = store.folder.path / manifests.FILE
    raw = path.read_bytes().rstrip()
    cut, gone, other = (Tally(f"the manifest {what}") for what in ("cut", "deleted", "of another store"))
    for share in (0.5, *(rng.random() for _ in range(count - 1))):
        with _restored(path):
            path.write_bytes(raw[: int(share * len(raw))])
            _must_refuse(cut, ground, store.folder, manifests.FILE)
    with _restored(path):
        path.write_bytes(raw[: len(raw) // 2])
        _verify_command(cut, ground, store.folder.path, manifests.FILE)
    with _restored(path):
        path.unlink()
        _must_refuse(gone, ground, store.folder, manifests.FILE)
    with _restored(path):
        shutil.copyfile(foreign.folder.path / manifests.FILE, path)
        _must_refuse(other, ground, store.folder, ".arrow: missing shard")
    return [cut, gone, other]


def manifests_made_again(ground: Ground, rng: random.Random, count: int) -> list[Tally]:
    """`distill-ray label` over a manifest that is cut, and over one of another store: whole again, no shard written."""
    foreign = _foreign_store(ground).folder.path / manifests.FILE
    tallies = []
    for what in ("cut in half", "of another store")[:count]:
        out = ground.copy(f"manifest-{what[:3]}", labels=True)
        trail = Trail(ground, out, [tally := Tally(f"the manifest {what}, then `distill-ray label`")])
        path = only(out, "artifacts/labels-*/manifest.json")
        raw = path.read_bytes()
        path.write_bytes(raw[: len(raw) // 2] if what == "cut in half" else foreign.read_bytes())
        tally.injected += 1
        trail.note()
        done = trail.finish()
        tally.say(f"exit {done.code}: the manifest is written again, no shard is")
        tallies.append(tally)
    return tallies


def _verify_command(tally: Tally, ground: Ground, store: Path, named: str) -> None:
    done = ground.verify(store)
    line = last_line(done)
    tally.injected += 1
    tally.expect(done.code == 2 and named in line, f"verify ended with exit {done.code}: {line}")
    tally.say(f"`distill-ray verify` exits {done.code} naming {named}")


def _must_refuse(tally: Tally, ground: Ground, damaged: Folder, named: str) -> None:
    """Before a batch reaches a student: what reads for training refuses, and so does verify, both naming the file.

    What the reader took before it refused is compared with the undisturbed run, row by row.
    """
    tally.injected += 1
    is_data = damaged.name.startswith("data-")
    taken, reading = _taken(damaged.path.parent, is_data)
    verifying = _refusal(lambda: verify(damaged, Reporter(quiet=True)))
    tally.expect(named in reading, f"the reader does not name {named}: {reading or 'it takes the store'}")
    tally.expect(named in verifying, f"verify does not name {named}: {verifying or 'no fault found'}")
    reference = ground.data_reference if is_data else ground.reference
    tally.add(ledger.accepted(taken, reference, refused=bool(reading)))
    if reading and verifying:
        tally.say("the reader and verify refuse it, naming the file")


def _taken(artifacts: Path, is_data: bool) -> tuple[list[tuple[int, bytes]], str]:
    """The rows that a reader of the data and label store there takes before it refuses, and what it then says."""
    taken: list[tuple[int, bytes]] = []

    def read_all() -> None:
        data, labels = (open_store(str(only(artifacts, f"{kind}-*"))) for kind in ("data", "labels"))
        for split in labels.manifest.splits:
            for part in read_shards(data, split, labels):
                taken.extend(_rows(part, is_data))

    refusal = _refusal(read_all)
    return taken, refusal


def _rows(part: SplitArrays, is_data: bool) -> Iterator[tuple[int, bytes]]:
    """By row id, what the ledger compares: input and label, or logits."""
    assert part.logits is not None
    for row, at, label, logits in zip(part.row_ids, part.inputs, part.labels, part.logits, strict=True):
        yield int(row), at.tobytes() + label.tobytes() if is_data else logits.tobytes()


def _refusal(work: Callable[[], object]) -> str:
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def _copied_store(ground: Ground, name: str) -> Store:
    return open_store(str(only(ground.copy(name, labels=True), "artifacts/labels-*")))


def _foreign_store(ground: Ground) -> Store:
    """The same rows labelled by somebody else: logits half as large, under another digest."""
    ours = open_store(str(ground.labels))
    folder = Folder(str(ground.work / "foreign" / "artifacts" / f"labels-{_FOREIGN_DIGEST}"))
    if not folder.exists(manifests.FILE):
        records = [
            shards.write(folder, r.split, r.index, halved(ours, r), store=_FOREIGN_DIGEST) for r in ours.manifest.shards
        ]
        changed = {"digest": _FOREIGN_DIGEST, "teacher_digest": _FOREIGN_DIGEST, "teacher_weights_sha256": "f0" * 32}
        splits = manifests.split_records(records)
        manifests.write(folder, ours.label_manifest.model_copy(update=changed | {"splits": splits}))
    return open_store(folder)


def halved(store: Store, record: ShardRecord) -> pa.RecordBatch:
    """A shard with half of each logit: right in every other way."""
    shard = store.label_shard(record)
    made_in = store.label_manifest.precision
    return shards.encode_logits(shard.row_ids, shard.logits.astype(np.float32) * np.float32(0.5), precision=made_in)


@contextmanager
def _restored(path: Path) -> Iterator[None]:
    """Undo what the block does to a file."""
    raw, status = path.read_bytes(), path.stat()
    try:
        yield
    finally:
        path.write_bytes(raw)
        assert path.stat().st_size == status.st_size
