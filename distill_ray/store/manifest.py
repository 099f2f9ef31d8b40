"""The manifest of a store: what it holds, who made it, and the shards that count. Written last; the only commit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
)

from distill_ray.config import InputConfig
from distill_ray.errors import UserError
from distill_ray.storage import Folder

FILE = "manifest.json"
FORMAT = "distill_ray.store"
FORMAT_VERSION = "1.2"
_MAJOR = int(FORMAT_VERSION.split(".")[0])
# A manifest comes from outside: its file names may not leave the store's folder.
SHARD_NAME = re.compile(r"(?P<split>[a-z]+)-(?P<index>[0-9]{5,})-(?P<checksum>[0-9a-f]{16})\.arrow\Z")


class _Part(BaseModel):
    # Unknown keys are ignored: a reader of version 1.0 reads 1.1.
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class ShardRecord(_Part):
    """One shard: ``rows`` rows whose ids are ``first_id``..``last_id``, in a file named by its content."""

    split: str
    index: int = Field(ge=0)
    file: str
    rows: int = Field(ge=1)
    first_id: int = Field(ge=0)
    last_id: int = Field(ge=0)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("file")
    @classmethod
    def _stays_inside(cls, value: str) -> str:
        if not SHARD_NAME.match(value):
            raise ValueError(f"{value!r} is not a shard's name")
        return value


class SplitRecord(_Part):
    """The shards of one split, by index."""

    rows: int = Field(ge=0)
    shards: tuple[ShardRecord, ...]


class StoreManifest(_Part):
    """What data and label stores share."""

    format: Literal["distill_ray.store"] = "distill_ray.store"
    format_version: str = FORMAT_VERSION
    digest: str
    code_version: str
    classes: int = Field(ge=2)
    class_names: tuple[str, ...]
    splits: dict[str, SplitRecord]

    @property
    def rows(self) -> int:
        """Rows of all splits."""
        return sum(split.rows for split in self.splits.values())

    @property
    def shards(self) -> list[ShardRecord]:
        """All shards, split by split."""
        return [shard for split in self.splits.values() for shard in split.shards]


class DataManifest(StoreManifest):
    """A data store: inputs and hard labels.

    ``class_counts`` are the labelled rows of each class, by split; ``bad_rows`` how many rows of the source were left
    out. Both are absent where they are not known.
    """

    kind: Literal["data"] = "data"
    source: str
    synthetic: bool
    shape: tuple[int, ...]
    dtype: str
    input: InputConfig
    config: dict[str, Any]
    class_counts: dict[str, tuple[int, ...]] | None = None
    bad_rows: int | None = None

    @model_serializer(mode="wrap")
    def _without_unknown(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain: dict[str, Any] = handler(self)
        return {k: v for k, v in plain.items() if v is not None or k not in ("class_counts", "bad_rows")}


class LabelManifest(StoreManifest):
    """A label store: a teacher's logits for every row of one data store."""

    kind: Literal["labels"] = "labels"
    data_digest: str
    teacher_digest: str
    teacher_weights_sha256: str
    dtype: Literal["float16"] = "float16"
    views: Literal[1] = 1
    precision: str
    precision_check: dict[str, float]


AnyManifest = Annotated[DataManifest | LabelManifest, Field(discriminator="kind")]


class _Envelope(_Part):
    manifest: AnyManifest


def split_records(records: Sequence[ShardRecord]) -> dict[str, SplitRecord]:
    """Group shard records by split, ordered by index."""
    names = sorted(
        {record.split for record in records}, key=lambda name: ("train", "validation", "test", name).index(name)
    )
    grouped = {name: tuple(sorted((r for r in records if r.split == name), key=lambda r: r.index)) for name in names}
    return {name: SplitRecord(rows=sum(r.rows for r in shards), shards=shards) for name, shards in grouped.items()}


def read(folder: Folder) -> DataManifest | LabelManifest:
    """Parse ``manifest.json`` of a store.

    Raises:
        UserError: there is none, it is damaged, or its major version is newer than this code.
    """
    place = folder.location(FILE)
    try:
        raw = folder.read_json(FILE)
    except FileNotFoundError:
        raise UserError(f"{place}: no such file: {folder} is not a finished store") from None
    except ValueError as error:
        raise UserError(f"{place}: cannot be read as JSON ({error}): delete it to make the store again") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{place}: is not the manifest of a {FORMAT}")
    check_version(raw, place)
    try:
        return _Envelope.model_validate({"manifest": raw}).manifest
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"][2:]) or "kind"
        raise UserError(f"{place}: {key}: {problem['msg']}: delete it to make the store again") from None


def check_version(raw: Mapping[str, Any], place: str) -> None:
    """Refuse a manifest that this code cannot understand, by name.

    Raises:
        UserError: its major version is newer than this code, or none.
    """
    version = str(raw.get("format_version", ""))
    major = version.split(".")[0]
    if not major.isdecimal() or int(major) > _MAJOR:
        raise UserError(
            f"{place}: has format version {version!r}, this code reads up to {_MAJOR}.x: update distill-ray"
        )


def write(folder: Folder, manifest: StoreManifest) -> None:
    """Commit the store."""
    folder.write_text(FILE, manifest.model_dump_json(indent=1) + "\n")
