"""init: looks at data of one's own and writes the config of a first run, with a comment at every choice.

What is looked at is little: the schema, the first row, and the label column, read in pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.types as pat
import yaml

from distill_ray import config as configs
from distill_ray.config import HuggingfaceData, IdxData, ImagesData, ParquetData
from distill_ray.errors import UserError
from distill_ray.sources import SourceInfo, files, huggingface, info_of, open_source, parquet
from distill_ray.sources.annotations import class_counts

SourceName = Literal["parquet", "images", "huggingface", "idx"]
_LABELS = ("label", "labels", "target", "class", "y", "category", "fine_label")
_IDS = ("id", "row_id", "uid", "uuid", "key")
_SPLITS = ("split", "fold", "subset", "partition")
_IMAGES = ("image", "img", "image_bytes", "jpeg", "png")
_PATHS = ("path", "file", "filename", "file_name", "image_path")
_RARE = 10  # a class with fewer rows is not divided by fractions of a tenth
_UNEVEN = 5  # the largest class by the smallest
_LEAST_SIDE = 8  # of images for convolutions
_STEPS, _BATCH = 1500, 128  # of the teacher's first training: long enough to learn something, short enough to look at


@dataclass(frozen=True)
class Wishes:
    """What the user says, in place of what would be found."""

    source: SourceName | None = None
    input: tuple[str, ...] = ()
    label: str | None = None
    id: str | None = None


@dataclass
class Found:
    """The data section, why it is so (key -> comment), and what the source then says of itself."""

    data: dict[str, Any]
    why: dict[str, str] = field(default_factory=dict)
    own_splits: list[str] = field(default_factory=list)


def first_config(path: str, name: str, wishes: Wishes) -> str:
    """The text of a config for the data at ``path``, ready to run.

    Raises:
        UserError: there is no such data, it is damaged, or its columns do not say which is the input.
    """
    found = _look(path, wishes)
    text = _Writer(found, info_of(open_source(_data_config(found.data))), name).text()
    configs.from_dict(yaml.safe_load(text))  # what is written is valid
    return text


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
    elif wishes.input or wishes.label or wishes.id:
        raise UserError(f"init: a source {source} has no columns to name: leave --input, --label and --id out")
    if source == "images" and "://" not in location:
        known = configs.SplitConfig().split_of_value()
        found.own_splits = sorted(place.name for place in Path(location).iterdir() if place.name in known)
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
    for wish in (*wishes.input, wishes.label, wishes.id):
        if wish is not None and wish not in names:
            raise UserError(f"init: there is no column {wish!r}: {files.nearest(wish, names)}")
    label = wishes.label or _named(names, _LABELS)
    identity = wishes.id or _named(names, _IDS)
    split = _named(names, _SPLITS)
    split = split if split is not None and _is_text(schema.field(split).type) else None
    taken = {label, identity, split}
    inputs = list(wishes.input) or _inputs([schema.field(name) for name in names if name not in taken])
    columns: dict[str, Any] = {"input": inputs[0] if len(inputs) == 1 else inputs}
    if label is not None:
        columns["label"] = label
    if identity is not None:
        columns["id"] = identity
    found.data["columns"] = columns
    if split is not None:
        found.data["split"] = {"column": split}
    left = [name for name in names if name not in {*taken, *inputs}]
    found.why["columns"] = f"not used: {', '.join(left)}" if left else "all that there are"


def _inputs(fields: Sequence[Any]) -> list[str]:
    """The input column; for a table, all columns of numbers."""
    for wanted, fits in ((_IMAGES, _is_image), ((), _is_image), ((), _is_list), (_PATHS, lambda f: _is_text(f.type))):
        matching = [f.name for f in fields if fits(f) and (not wanted or f.name.lower() in wanted)]
        if len(matching) == 1:
            return matching
        if len(matching) > 1:
            raise UserError(
                f"init: {len(matching)} columns could be the input ({', '.join(matching[:8])}): name one with --input"
            )
    numbers = [f.name for f in fields if pat.is_floating(f.type) or pat.is_integer(f.type)]
    if not numbers:
        raise UserError(
            f"init: no column can be the input (there are: {', '.join(f'{f.name} {f.type}' for f in fields[:12])}): it "
            "holds lists of numbers, encoded images, paths of images, or is several columns of numbers: name it with "
            "--input"
        )
    return numbers


def _named(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    by_lower = {name.lower(): name for name in reversed(names)}
    return next((by_lower[name] for name in wanted if name in by_lower), None)


def _is_image(column: Any) -> bool:
    kind = column.type.storage_type if isinstance(column.type, pa.ExtensionType) else column.type
    if pat.is_struct(kind):
        return {str(inner.name) for inner in kind} >= {"bytes", "path"}
    return bool(pat.is_binary(kind) or pat.is_large_binary(kind))


def _is_list(column: Any) -> bool:
    kind = column.type.storage_type if isinstance(column.type, pa.ExtensionType) else column.type
    return bool(pat.is_list(kind) or pat.is_large_list(kind) or pat.is_fixed_size_list(kind))


def _is_text(kind: Any) -> bool:
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
        lines += [f"# Note: {warning}" for warning in info.warnings]
        return [*lines, "", f"name: {_inline(self._name)}"]

    def _data(self) -> list[str]:
        lines = ["data:"]
        for key, value in self._found.data.items():
            if key == "split":
                continue
            why = self._found.why.get(key, "")
            lines.append(f"  {key}: {_inline(value)}" + (f"  # {why}" if why else ""))
        if self._counts:
            names, total = self._info.class_names, sum(self._counts)
            few = min(range(len(names)), key=self._counts.__getitem__)
            many = max(range(len(names)), key=self._counts.__getitem__)
            unlabelled = sum(self._rows.values()) - total
            lines.append(
                f"  # classes: {len(names)}, from {self._counts[few]:,} rows ({names[few]}) to {self._counts[many]:,} "
                f"({names[many]})" + (f"; {unlabelled:,} rows have no label" if unlabelled else "")
            )
        if self._found.own_splits:
            rows = ", ".join(f"{split} {count:,}" for split, count in self._rows.items())
            lines.append(f"  # split: the data's own ({', '.join(self._found.own_splits)}): {rows}")
        else:
            lines.append(f"  split: {_inline(self._split())}  # {self._split_reason()}")
        if self._info.dtype != "uint8":
            lines.append("  input: {mean: auto, std: auto}  # of the training rows, per channel or feature")
        return lines

    def _split(self) -> dict[str, Any]:
        if "split" in self._found.data:
            return dict(self._found.data["split"])
        fractions: list[float] = [0.9, 0.1] if self._own_test() else [0.8, 0.1, 0.1]
        stratify = bool(self._counts) and min(self._counts) >= _RARE and not self._own_test()
        return {"fractions": fractions, **({"stratify": True} if stratify else {})}

    def _own_test(self) -> bool:
        return bool(self._found.data["source"] == "idx")

    def _split_reason(self) -> str:
        rows = ", ".join(f"{split} {count:,}" for split, count in self._rows.items())
        if "split" in self._found.data:
            return f"as the column says: {rows}"
        if self._own_test():
            return "train and validation; the test files are the test split"
        return "train, validation, test; group_by: COLUMN keeps the rows of a group in one split"

    def _model(self, large: bool) -> dict[str, Any]:
        if self._pictures:
            wide: dict[str, Any] = {"channels": [32, 64], "hidden": [512, 128]}
            return {"name": "char_cnn", **(wide if large else {"channels": [8, 16], "hidden": [32]})}
        return {"name": "mlp", "hidden": [512, 256] if large else [32]}

    def _epochs(self) -> int:
        return max(4, min(100, ceil(_STEPS * _BATCH / max(1, self._rows["train"]))))

    def _teacher(self) -> list[str]:
        lines = ["teacher:"]
        if not self._found.data.get("columns", {"label": ""}).get("label", "") and "columns" in self._found.data:
            lines.append("  # There are no labels to train a teacher on: give one that is trained, see the README.")
        lines.append(f"  model: {_inline(self._model(large=True))}")
        train = {"epochs": self._epochs(), "batch_size": _BATCH}
        return [*lines, f"  train: {_inline(train)}  # about {_STEPS} steps: raise epochs while the accuracy rises"]

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


def _inline(value: Any) -> str:
    """YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True).strip()
    return text.removesuffix("...").strip()
