"""init: looks at data of one's own and writes the config of a first run, with a comment at every choice.

What is looked at is little: the schema, the first row, and the label column, read in pieces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.types as pat
import yaml

from distill_ray import config as configs
from distill_ray.config import HuggingfaceData, IdxData, ImagesData, InputWish, ParquetData
from distill_ray.errors import UserError
from distill_ray.sources import (
    SPLITS,
    HuggingfaceSource,
    ImagesSource,
    ParquetSource,
    SourceInfo,
    decoding,
    files,
    huggingface,
    info_of,
    open_source,
    parquet,
)
from distill_ray.sources.annotations import class_counts
from distill_ray.store.shards import MAX_SHARD_BYTES

SourceName = Literal["parquet", "images", "huggingface", "idx"]
_LABELS = ("label", "labels", "target", "class", "y", "category", "fine_label")
_IDS = ("id", "row_id", "uid", "uuid", "key")
_SPLITS = ("split", "fold", "subset", "partition")
_IMAGES = ("image", "img", "image_bytes", "jpeg", "png")
_PATHS = ("path", "file", "filename", "file_name", "image_path")
_split_of = configs.SplitConfig().split_of
# Names as those of row numbers, of ids and of the classes in other words.
_NO_FEATURE = re.compile(r"__index_level_\d+__|unnamed: ?\d+|index|.*[_ .-]id|labels?_.*|.*_labels?", re.IGNORECASE)
_CAMEL_ID = re.compile(r".*[a-z](Id|ID)")  # PassengerId
_SHOWN, _SHOWN_CHARACTERS = 12, 60  # names in a comment, and of each
_UNEVEN = 5  # the largest class by the smallest
_LARGEST_SIDE = 224  # of images that are resized because they differ
_LEAST_SIDE = 8  # of images for convolutions
_STEPS, _BATCH = 1500, 128  # of the teacher's first training: long enough to learn something, short enough to look at


@dataclass(frozen=True)
class Wishes:
    """What the user says, in place of what would be found."""

    source: SourceName | None = None
    input: tuple[str, ...] = ()
    label: str | None = None
    id: str | None = None
    split: str | None = None
    no_id: bool = False
    no_split: bool = False

    def named(self) -> list[str]:
        """The columns that are named."""
        return [*self.input, *(name for name in (self.label, self.id, self.split) if name is not None)]


@dataclass
class Found:
    """The data section, why it is so (key -> comment), and the names of the splits that the data has of its own."""

    data: dict[str, Any]
    why: dict[str, str] = field(default_factory=dict)
    own_splits: list[str] = field(default_factory=list)
    guessed: dict[str, str] = field(default_factory=dict)  # key -> the flag that leaves it out


def first_config(path: str, name: str, wishes: Wishes) -> str:
    """The text of a config for the data at ``path``, ready to run.

    Raises:
        UserError: there is no such data, it is damaged, or its columns do not say which is the input.
    """
    found = _look(path, wishes)
    _choose_size(found)
    try:
        info = _settled(found)
    except UserError as error:
        flag = next((flag for key, flag in found.guessed.items() if str(error).startswith(key)), None)
        if flag is None:
            raise
        raise UserError(f"{error} (init took the column by its name: {flag} leaves it out)") from None
    text = _Writer(found, info, name).text()
    configs.from_dict(yaml.safe_load(text))  # what is written is valid
    return text


def _settled(found: Found) -> SourceInfo:
    """What the source says of itself, once the data section is such that it can be prepared."""
    info = info_of(open_source(_data_config(found.data)))
    if found.data.get("split", {}).get("stratify") and not all(len(info.splits.get(name, ())) for name in SPLITS):
        del found.data["split"]["stratify"]  # so few rows of each class that none of them would go there
        info = info_of(open_source(_data_config(found.data)))
    row_bytes = int(np.prod(info.shape)) * np.dtype(info.dtype).itemsize
    usual = configs.DataBase.model_fields["shard_rows"].default
    if row_bytes * usual > MAX_SHARD_BYTES * 0.9:  # ids and labels have a place beside the inputs
        found.data["shard_rows"] = 2 ** int(np.log2(max(1, MAX_SHARD_BYTES // 2 // row_bytes)))
        found.why["shard_rows"] = "a file of the data store has 100 MiB at most"
    return info


def _choose_size(found: Found) -> None:
    """One size for images of several: a sample of them says whether they differ."""
    source = open_source(_data_config(found.data))
    if not isinstance(source, ParquetSource | ImagesSource | HuggingfaceSource):
        return
    if source.layout().kind not in ("images", "paths"):
        return
    sizes = []
    for data in source.sample():
        with suppress(decoding.Undecodable):
            sizes.append(decoding.decode(data, InputWish()).shape[1:])
    if len(set(sizes)) > 1:
        lowest, highest = np.min(sizes, axis=0), np.max(sizes, axis=0)
        middle = np.minimum(np.median(sizes, axis=0), _LARGEST_SIDE)
        found.data["input"] = {"resize": [int(side) for side in middle]}
        found.why["input"] = (
            f"height and width: those looked at have {lowest[0]} to {highest[0]} by {lowest[1]} to {highest[1]}"
        )


def _data_config(data: Mapping[str, Any]) -> Any:
    kinds: dict[str, Any] = {
        "parquet": ParquetData,
        "images": ImagesData,
        "huggingface": HuggingfaceData,
        "idx": IdxData,
    }
    return kinds[data["source"]].model_validate(data)


# --- which source, which columns -------------------------------------------------------------------------------------


def _look(path: str, wishes: Wishes) -> Found:
    location = path if "://" in path else str(Path(path).expanduser().absolute())
    source = wishes.source or _guess(location)
    found = Found({"source": source, "path": location}, {"source": "what the files are" if not wishes.source else ""})
    if source == "parquet":
        _choose_columns(found, parquet.schema_of(location), wishes)
    elif source == "huggingface":
        schema, found.own_splits = huggingface.schema_of(location)
        _choose_columns(found, schema, wishes)
    elif wishes.named() or wishes.no_id or wishes.no_split:
        raise UserError(
            f"init: a source {source} has no columns to name: leave --input, --label, --id, --split, --no-id and "
            "--no-split out"
        )
    if source == "images":
        found.own_splits = open_source(_data_config(found.data)).split_names()
    _choose_split(found)
    return found


def _guess(location: str) -> SourceName:
    if "://" in location or any(sign in location for sign in "*?["):
        return "parquet"
    place = Path(location)
    if not place.exists():
        raise UserError(f"init {location}: no such file or folder")
    if place.is_file():
        return "parquet"
    names = {file.name for file in place.iterdir()}
    if {"dataset_info.json", "dataset_dict.json", "state.json"} & names:
        return "huggingface"
    if any(name.removesuffix(".gz").endswith("-ubyte") for name in names):
        return "idx"
    if any(place.rglob("*.parquet")):
        return "parquet"
    if any(file.is_dir() for file in place.iterdir()):
        return "images"
    raise UserError(
        f"init {location}: holds no Parquet files, no folders of images, no saved dataset and no idx files: name what "
        "it is with --source"
    )


def _choose_columns(found: Found, schema: pa.Schema, wishes: Wishes) -> None:
    names = schema.names
    for wish in wishes.named():
        if wish not in names:
            raise UserError(f"init: there is no column {wish!r}: {files.nearest(wish, names)}")
    label = wishes.label or _named(names, _LABELS)
    if label is None:
        raise UserError(
            f"init: no column is known to hold the classes (there are: {_some(names)}): name it with --label; data "
            "without labels needs data.class_names and a teacher that is trained, see the README"
        )
    # A column that is called as ids or splits are is no input, be it taken as such or not.
    identity, split = wishes.id or _named(names, _IDS), wishes.split or _named(names, _SPLITS)
    apart = {label, identity, split}
    others = [schema.field(name) for name in names if name not in apart]
    doubtful = [field.name for field in others if _is_number(field) and _is_no_feature(field, label, names)]
    inputs = list(wishes.input) or _inputs(others, doubtful)
    if label in inputs:
        raise UserError(f"init: --input {label}: it is the column of the labels, which is no input: name others")
    columns: dict[str, Any] = {"input": inputs[0] if len(inputs) == 1 else inputs, "label": label}
    if identity is not None and not wishes.no_id:
        columns["id"] = identity
        found.guessed |= {} if wishes.id else {"data.columns.id": "--no-id"}
    found.data["columns"] = columns
    text = split is not None and _is_text(schema.field(split).type)
    if split is not None and (wishes.split or text) and not wishes.no_split:
        _take_split_column(found, split, asked=wishes.split is not None)
    used = {*inputs, label, columns.get("id"), found.data.get("split", {}).get("column")}
    left = [name for name in names if name not in used]
    found.why["columns"] = f"not used: {_some(left)} (--id and --input take others)" if left else "all that there are"
    if doubtful and not wishes.input and _is_number(schema.field(inputs[0])):
        found.why["columns"] += f"; by its name each of {_some(doubtful)} is another label, id or row number"
    if "data.columns.id" in found.guessed:
        found.why["columns"] += f"; the ids are {identity} by its name, --no-id leaves them out"


def _take_split_column(found: Found, name: str, *, asked: bool) -> None:
    """Take the splits from a column, where its values say which is which."""
    if found.own_splits:
        if asked:
            raise UserError(f"init: --split {name}: the data has splits of its own ({_some(found.own_splits)})")
        return
    source = open_source(_data_config({**found.data, "split": {"column": name}}))
    assert isinstance(source, ParquetSource | HuggingfaceSource)
    values = source.split_values()
    unknown = [value for value in values if value is None or _split_of(value) is None]
    if not unknown:
        found.own_splits = [str(value) for value in values]
        found.data["split"] = {"column": name}
        found.guessed |= {} if asked else {"data.split": "--no-split"}
    elif asked:
        hint = files.nearest(str(unknown[0]), list(configs.SplitConfig().split_of_value()))
        raise UserError(f"init: --split {name}: it holds {unknown[0]!r}, which means no split: {hint}")


def _choose_split(found: Found) -> None:
    """Which rows train, validate and test: as the data says; what it does not name is cut from its training rows."""
    if found.data["source"] == "idx":
        found.data["split"] = {"fractions": [0.9, 0.1]}
        return
    split = found.data.setdefault("split", {})
    meant = _ours(found.own_splits)
    if {name: ours for ours, names in meant.items() for name in names} != {
        name: _split_of(name) for name in found.own_splits
    }:
        split["values"] = meant
    if "validation" not in meant:
        split |= {"fractions": [0.9, 0.1] if "test" in meant else [0.8, 0.1, 0.1], "stratify": True}
    if not split:
        del found.data["split"]


def _ours(names: Sequence[str]) -> dict[str, list[str]]:
    """Which of the data's own splits is which of ours, such that there are rows to train, to choose and to measure on.

    Validation rows can be cut from the training rows wherever there are test rows, so a single other split is the test.
    """
    meant = {ours: [name for name in names if _split_of(name) == ours] for ours in SPLITS}
    meant = {ours: those for ours, those in meant.items() if those}
    if not meant and names:
        return {"train": list(names)}
    if meant and "train" not in meant:
        meant["train"] = meant.pop("validation") if "validation" in meant else meant.pop("test")
    if "validation" in meant and "test" not in meant:
        meant["test"] = meant.pop("validation")
    return meant


def _inputs(fields: Sequence[Any], doubtful: Sequence[str]) -> list[str]:
    """The input column; for a table, all columns of numbers but those that are ``doubtful``."""
    for wanted, fits in ((_IMAGES, _is_image), ((), _is_image), ((), _is_list), (_PATHS, lambda f: _is_text(f.type))):
        matching = [f.name for f in fields if fits(f) and (not wanted or f.name.lower() in wanted)]
        if len(matching) == 1:
            return matching
        if len(matching) > 1:
            raise UserError(
                f"init: {len(matching)} columns could be the input ({', '.join(matching[:8])}): name one with --input"
            )
    numbers = [f.name for f in fields if _is_number(f) and f.name not in doubtful]
    if not numbers:
        raise UserError(
            f"init: no column can be the input (there are: {', '.join(f'{f.name} {f.type}' for f in fields[:12])}): it "
            "holds lists of numbers, encoded images, paths of images, or is several columns of numbers: name it with "
            "--input"
        )
    return numbers


def _is_no_feature(column: Any, label: str, names: Sequence[str]) -> bool:
    """Whether a column is called as one that says the class, or which row it is, in other words."""
    name = str(column.name)
    if name.lower() == "y" and pat.is_floating(column.type) and _named(names, ("x",)) is not None:
        return False  # a coordinate
    return (
        name.lower() in (*_LABELS, *_IDS, *_SPLITS)
        or (len(label) > 1 and name.lower().startswith(f"{label.lower()}_"))
        or bool(_NO_FEATURE.fullmatch(name) or _CAMEL_ID.fullmatch(name))
    )


def _named(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    by_lower = {name.lower(): name for name in reversed(names)}
    return next((by_lower[name] for name in wanted if name in by_lower), None)


def _is_image(column: Any) -> bool:
    kind = column.type.storage_type if isinstance(column.type, pa.ExtensionType) else column.type
    if pat.is_struct(kind):
        return {str(inner.name) for inner in kind} >= {"bytes", "path"}
    return bool(pat.is_binary(kind) or pat.is_large_binary(kind))


def _is_number(column: Any) -> bool:
    return bool(pat.is_floating(column.type) or pat.is_integer(column.type) or pat.is_decimal(column.type))


def _is_list(column: Any) -> bool:
    kind = column.type.storage_type if isinstance(column.type, pa.ExtensionType) else column.type
    return bool(pat.is_list(kind) or pat.is_large_list(kind) or pat.is_fixed_size_list(kind))


def _is_text(kind: Any) -> bool:
    kind = decoding.storage_type(kind)
    return bool(pat.is_string(kind) or pat.is_large_string(kind))


# --- the text --------------------------------------------------------------------------------------------------------


class _Writer:
    """The config as text: every choice with the reason for it."""

    def __init__(self, found: Found, info: SourceInfo, name: str) -> None:
        self._found, self._info, self._name = found, info, name
        self._rows = {split: len(numbers) for split, numbers in info.splits.items()}
        self._counts = self._class_counts()
        self._pictures = len(info.shape) == 3 and min(info.shape[1:]) >= _LEAST_SIDE and info.shape[0] in (1, 3)

    def text(self) -> str:
        """The whole file."""
        return "\n".join([*self._head(), *self._data(), *self._teacher(), *self._student(), ""])

    def _class_counts(self) -> list[int]:
        """Labelled rows of each class over all splits, empty where the source does not say."""
        if self._info.labels is None:
            return []
        counted = class_counts(self._info.labels, len(self._info.class_names), self._info.splits)
        return [int(sum(counts)) for counts in zip(*counted.values(), strict=True)]

    def _head(self) -> list[str]:
        info = self._info
        shape = " x ".join(map(str, info.shape))
        lines = [
            f"# {sum(self._rows.values()):,} rows of {shape} {info.dtype}, {len(info.class_names)} classes",
            "# Run it:      distill-ray run THIS_FILE",
            "# Change keys: distill-ray run THIS_FILE student.loss.temperature=4 student.seeds=[0,1,2]",
            "# All keys:    tune_configs/schema.json; an editor that knows YAML schemas completes them",
        ]
        lines += [f"# Note: {_comment(warning)}" for warning in info.warnings]
        return [*lines, "", f"name: {_inline(self._name)}"]

    def _data(self) -> list[str]:
        lines = ["data:"]
        for key, value in self._found.data.items():
            if key == "split":
                continue
            why = self._found.why.get(key, "")
            lines.append(f"  {key}: {_inline(value)}" + (f"  # {_comment(why)}" if why else ""))
        if self._counts:
            names, total = self._info.class_names, sum(self._counts)
            few = min(range(len(names)), key=self._counts.__getitem__)
            many = max(range(len(names)), key=self._counts.__getitem__)
            unlabelled = sum(self._rows.values()) - total
            said = (
                f"classes: {len(names)}, from {self._counts[few]:,} rows ({names[few]}) to {self._counts[many]:,} "
                f"({names[many]})" + (f"; {unlabelled:,} rows have no label" if unlabelled else "")
            )
            lines.append(f"  # {_comment(said)}")
        split = self._found.data.get("split")
        said = _comment(self._split_reason())
        lines.append(f"  # split: {said}" if split is None else f"  split: {_inline(split)}  # {said}")
        if self._info.dtype != "uint8" or len(self._info.shape) != 3:  # pictures are scaled unasked
            lines.append("  input: {mean: auto, std: auto}  # of the training rows, per channel or feature")
        return lines

    def _split_reason(self) -> str:
        split, own = self._found.data.get("split", {}), self._found.own_splits
        rows = ", ".join(f"{name} {count:,}" for name, count in self._rows.items())
        if self._found.data["source"] == "idx":
            return f"train and validation; the test files are the test split: {rows}"
        if not own:
            return f"train, validation, test; group_by: COLUMN keeps the rows of a group in one split: {rows}"
        whose = "as the column says" if "column" in split else "the data's own"
        said = [f"{whose} ({_some(own)})"]
        values = split.get("values", {})
        for ours, names in values.items():
            if renamed := [name for name in names if _split_of(name) != ours]:
                said.append(f"its {_some(renamed)} is our {ours}")
        used = {name for names in values.values() for name in names}
        if unused := [name for name in own if values and name not in used]:
            said.append(f"not used: {_some(unused)}")
        if "fractions" in split:
            said.append(f"{'validation' if len(split['fractions']) == 2 else 'validation and test'} cut from train")
        if "data.split" in self._found.guessed:
            said.append("--no-split leaves the column out")
        return f"{'; '.join(said)}: {rows}"

    def _model(self, large: bool) -> dict[str, Any]:
        if self._pictures:
            wide: dict[str, Any] = {"channels": [32, 64], "hidden": [512, 128]}
            return {"name": "char_cnn", **(wide if large else {"channels": [8, 16], "hidden": [32]})}
        return {"name": "mlp", "hidden": [512, 256] if large else [32]}

    def _epochs(self) -> int:
        return max(4, min(100, ceil(_STEPS * _BATCH / max(1, self._rows["train"]))))

    def _teacher(self) -> list[str]:
        train = {"epochs": self._epochs(), "batch_size": _BATCH}
        steps = self._epochs() * ceil(self._rows["train"] / _BATCH)
        return [
            "teacher:",
            f"  model: {_inline(self._model(large=True))}",
            f"  train: {_inline(train)}  # about {steps:,} steps: raise epochs while the accuracy rises",
        ]

    def _student(self) -> list[str]:
        uneven = bool(self._counts) and max(self._counts) >= _UNEVEN * max(1, min(self._counts))
        weights = ["  # Uneven classes: loss: {class_weights: balanced} counts each class the same."] if uneven else []
        train = {"epochs": 2 * self._epochs(), "batch_size": _BATCH}
        return [
            "student:",
            f"  model: {_inline(self._model(large=False))}  # what you can afford: `distill-ray tune` searches sizes",
            *weights,
            "  loss: {name: kd, temperature: 2.0, alpha: 0.9}",
            f"  train: {_inline(train)}",
            "  seeds: [0, 1, 2]  # a difference from the control means something beside the spread over seeds",
        ]


class _OneLine(yaml.SafeDumper):
    """Strings with line breaks and the like in double quotes, by escapes: the plain dumper breaks lines for them."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if value.isprintable() else '"')


_OneLine.add_representer(str, _text)


def _inline(value: Any) -> str:
    """YAML in one line."""
    text = yaml.dump(value, Dumper=_OneLine, default_flow_style=True, width=2**31, sort_keys=False, allow_unicode=True)
    return str(text).strip().removesuffix("...").strip()


def _comment(text: str) -> str:
    """``text`` with escapes for what would end a comment: names of columns, classes and files may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _some(names: Sequence[str]) -> str:
    """The first of some names."""
    shown = [name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}..." for name in names[:_SHOWN]]
    return ", ".join([*shown, "..."] if len(names) > _SHOWN else shown)
