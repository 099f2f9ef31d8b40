"""The typed config of a run: the only description of what the stages do.

One YAML file makes one :class:`Config`. Everything is checked here, before any work: unknown keys, types, ranges and
contradictions. Nothing heavier than pydantic is imported, so ``--help`` and a typo both answer at once.

How a key takes part in the digest of a stage folder is declared beside the key (see :func:`setting`).
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from distill_ray.errors import UserError

DigestRule = Literal["always", "never", "not_at_default"]


def setting(default: Any = ..., *, digest: DigestRule = "always", **constraints: Any) -> Any:
    """A config key. ``digest`` says whether the key names the folder of what it produces.

    always: its value is part of the digest. never: it does not change the result (batch size of inference, worker
    counts, names). not_at_default: a key added after folders existed; at its neutral default the old folders stay
    valid.
    """
    return Field(default, json_schema_extra={"digest": digest}, **constraints)


_Size: TypeAlias = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]  # height, width


class Section(BaseModel):
    """A part of the config: immutable, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
    booleans: ClassVar[frozenset[str]] = frozenset()  # the keys that are true or false

    @model_validator(mode="before")
    @classmethod
    def _no_booleans(cls, raw: Any) -> Any:
        # Few keys are booleans, and pydantic would take true for the number 1.
        for key, value in raw.items() if isinstance(raw, dict) else ():
            if isinstance(value, bool) and key not in cls.booleans:
                raise ValueError(f"{key} must be a number, a word or a section, got {str(value).lower()}")
        return raw


# --- data -----------------------------------------------------------------------------------------------------------


SplitName: TypeAlias = Literal["train", "validation", "test"]
_SplitValue: TypeAlias = str | int


class SplitConfig(Section):
    """How rows are divided over train, validation and test.

    ``fractions`` are three numbers that sum to 1, or two (train, validation) where the source says which rows are the
    test split. ``stratify``: each class is divided by the fractions. ``group_by`` names a column: rows of one group
    (one writer, one patient) stay in one split. ``column`` names a column that says each row's split; ``values`` says
    which of its values, of the data's own splits, or of the folders of images, mean which split, where they are not
    train (training), validation (val, valid, dev) and test (testing), in any case.
    """

    booleans: ClassVar[frozenset[str]] = frozenset({"stratify"})

    fractions: tuple[float, ...] | None = setting(None)
    stratify: bool = setting(False, digest="not_at_default", strict=True)
    group_by: str | None = setting(None, digest="not_at_default", min_length=1)
    column: str | None = setting(None, digest="not_at_default", min_length=1)
    values: dict[SplitName, _SplitValue | tuple[_SplitValue, ...]] | None = setting(None, digest="not_at_default")

    @field_validator("fractions")
    @classmethod
    def _sum_to_one(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is None:
            return None
        if len(value) not in (2, 3) or any(f < 0 for f in value) or abs(sum(value) - 1) > 1e-6:
            raise ValueError(f"needs 2 or 3 numbers >= 0 that sum to 1, got {list(value)} (sum {sum(value):g})")
        if value[0] == 0 or value[1] == 0:
            raise ValueError(
                "the train and the validation fraction must be above 0: models are chosen on validation rows"
            )
        return value

    @model_validator(mode="after")
    def _one_way(self) -> SplitConfig:
        if self.stratify and self.group_by is not None:
            raise ValueError("stratify and group_by cannot both be kept: a group has rows of any class; give one")
        return self

    def split_of(self, value: str) -> SplitName | None:
        """Which split a value of the column (or the name of a saved split, or of a folder) means, None where none."""
        return self.split_of_value().get(value if self.values is not None else value.lower())

    def split_of_value(self) -> dict[str, SplitName]:
        """Which split each such value means; where ``values`` does not say, in lower case."""
        if self.values is None:
            return dict(_SPLIT_ALIASES)
        meant: dict[str, SplitName] = {}
        for split, values in self.values.items():
            for value in values if isinstance(values, tuple) else (values,):
                meant[str(value)] = split
        return meant


_SPLIT_ALIASES: dict[str, SplitName] = {
    "train": "train", "training": "train", "validation": "validation", "val": "validation", "valid": "validation",
    "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip


class InputConfig(Section):
    """The input contract: how a stored row becomes what the model sees, ``(raw * scale - mean) / std`` per channel.

    ``shape`` is normally taken from the data; where it is given, it must agree with the data. ``resize`` and
    ``channels`` say how images became rows when they were prepared.
    """

    shape: tuple[int, ...] | None = setting(None)
    scale: float = setting(1 / 255, gt=0)
    mean: tuple[float, ...] = setting((0.5,), min_length=1)
    std: tuple[float, ...] = setting((0.5,), min_length=1)
    resize: _Size | None = setting(None, digest="not_at_default")
    channels: Literal[1, 3] | None = setting(None, digest="not_at_default")

    @field_validator("std")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(s <= 0 for s in value):
            raise ValueError("every std must be above 0")
        return value

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Readers of earlier versions know no such keys, and most stores have no use for them.
        plain: dict[str, Any] = handler(self)
        return {k: v for k, v in plain.items() if k not in ("resize", "channels") or v is not None}


class InputWish(Section):
    """``data.input`` of rows of one's own: what is not given follows from the rows.

    ``resize`` [height, width] (antialiased bilinear) and ``channels`` (1 grey, 3 RGB) are applied to images when they
    are prepared. ``scale`` is 1/255 and ``mean`` and ``std`` are 0.5 for images of bytes, else 1, 0 and 1. ``auto``:
    mean and standard deviation of the training rows, per channel or feature.
    """

    shape: tuple[Annotated[int, Field(ge=1)], ...] | None = setting(None, min_length=1)
    resize: _Size | None = setting(None)
    channels: Literal[1, 3] | None = setting(None)
    scale: float | None = setting(None, gt=0)
    mean: Literal["auto"] | tuple[float, ...] | None = setting(None)
    std: Literal["auto"] | tuple[float, ...] | None = setting(None)

    @field_validator("mean", "std")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, tuple) and (not value or (info.field_name == "std" and any(s <= 0 for s in value))):
            raise ValueError("needs numbers, and every std must be above 0")
        return value


class DataBase(Section):
    """What every source shares."""

    seed: int = setting(0, ge=0)
    shard_rows: int = setting(2048, ge=1)
    split: SplitConfig = setting(SplitConfig())


class BuiltinData(DataBase):
    """A source whose rows have one known form: images of bytes."""

    input: InputConfig = setting(InputConfig())

    @model_validator(mode="after")
    def _has_its_form(self) -> BuiltinData:
        name = getattr(self, "source", "")
        if self.input.resize is not None or self.input.channels is not None:
            raise ValueError(f"input.resize and input.channels are not for source {name}: its images are as they are")
        if self.split.column is not None or self.split.group_by is not None:
            raise ValueError(f"split.column and split.group_by name columns, and source {name} has none")
        return self


class Glyph62Data(BuiltinData):
    """The embedded synthetic source: 62 characters drawn from vector fonts, 1x32x32 uint8."""

    source: Literal["glyph62"]
    rows: int = setting(12000, ge=62, le=10_000_000)

    @field_validator("split")
    @classmethod
    def _by_style(cls, value: SplitConfig) -> SplitConfig:
        if value.stratify:
            raise ValueError("source glyph62 is split by style, and every style has every class: leave out stratify")
        return value


class IdxData(BuiltinData):
    """A folder in the MNIST family's file format, plain or .gz.

    ``rows`` limits the training file and ``test_rows`` the test file to a seeded sample: for quick looks.
    """

    source: Literal["idx"]
    path: str
    rows: int | None = setting(None, ge=1)
    test_rows: int | None = setting(None, ge=1)
    classes: int | None = setting(None, ge=2)


class ColumnsConfig(Section):
    """Which columns hold what. ``input`` is one column, or several of one number each (a table).

    Without ``label`` no row has a label; without ``id`` a row is called by its file and number.
    """

    input: str | tuple[str, ...]
    label: str | None = setting(None)
    id: str | None = setting(None)

    @field_validator("input")
    @classmethod
    def _some(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value or (isinstance(value, tuple) and len(set(value)) != len(value)):
            raise ValueError(f"needs the name of a column, or different names of several, got {value!r}")
        return value

    @model_validator(mode="after")
    def _no_label_among_inputs(self) -> ColumnsConfig:
        if self.label is not None and self.label in ((self.input,) if isinstance(self.input, str) else self.input):
            raise ValueError(f"input: {self.label!r} is the column of the labels: what is to be learned is no input")
        return self


class OwnData(DataBase):
    """Rows of one's own. ``class_names`` fixes the classes and their order; else they follow from the labels.

    Up to ``max_bad_rows`` rows whose input cannot be used (undecodable, null, not finite) are left out.
    """

    input: InputWish = setting(InputWish())
    class_names: tuple[str, ...] | None = setting(None, min_length=2)
    # Part of the digest: without other rows the same numbers are in a shard, and not the same rows.
    max_bad_rows: int = setting(0, ge=0)

    @field_validator("class_names")
    @classmethod
    def _distinct(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(set(value)) != len(value):
            raise ValueError("the same name is given twice")
        return value


class ParquetData(OwnData):
    """Parquet: a file, a folder or a pattern such as ``/data/part-*.parquet``; a local path or a URI.

    The input column holds lists of numbers, encoded images, or paths of image files, which are relative to ``root``, or
    else to the Parquet file.
    """

    source: Literal["parquet"]
    path: str = setting(min_length=1)
    columns: ColumnsConfig
    root: str | None = setting(None, min_length=1)


class ImagesData(OwnData):
    """A folder of images: a folder a class (under train, validation and test folders, where there are such).

    Or with ``table``, a CSV or Parquet file in it that names the image files and their labels, by ``columns``.
    """

    source: Literal["images"]
    path: str = setting(min_length=1)
    table: str | None = setting(None, min_length=1)
    columns: ColumnsConfig | None = setting(None)

    @model_validator(mode="after")
    def _table_has_columns(self) -> ImagesData:
        if (self.table is None) != (self.columns is None):
            raise ValueError("table and columns go together: without a table a folder is a class")
        if self.columns is not None and not isinstance(self.columns.input, str):
            raise ValueError("columns.input must be one column, that of the image files' names")
        if self.table is None and (self.split.column is not None or self.split.group_by is not None):
            raise ValueError("split.column and split.group_by name columns of a table, and no table is given")
        return self


class HuggingfaceData(OwnData):
    """A Hugging Face dataset, or several in a DatasetDict, saved by ``save_to_disk``. Its own splits are kept."""

    source: Literal["huggingface"]
    path: str = setting(min_length=1)
    columns: ColumnsConfig


DataConfig: TypeAlias = Annotated[
    Glyph62Data | IdxData | ParquetData | ImagesData | HuggingfaceData, Field(discriminator="source")
]


# --- models, losses, training ---------------------------------------------------------------------------------------


class CharCnnModel(Section):
    """The article's network with free widths: 3x3 convolutions, one 2x2 max pool, then linear layers."""

    name: Literal["char_cnn"]
    channels: tuple[Annotated[int, Field(ge=1)], ...] = setting((32, 64), min_length=1)
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = setting((512, 128))


class MlpModel(Section):
    """Linear layers with ReLU between them, on the flattened input."""

    name: Literal["mlp"]
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = setting((256,))


class ResnetModel(Section):
    """A small residual network (He et al. 2015, arXiv 1512.03385, section 4.2): a stage of ``blocks`` for each width.

    ``norm: group`` treats every row alone, so that a row's logits depend neither on its neighbours nor on the number of
    workers; ``batch`` is the paper's.
    """

    name: Literal["resnet"]
    channels: tuple[Annotated[int, Field(ge=1)], ...] = setting((16, 32, 64), min_length=1)
    blocks: int = setting(1, ge=1)
    norm: Literal["group", "batch"] = setting("group")


class _ForeignModel(Section):
    """A network that is not ours: ``kwargs`` go to it as they are, booleans too."""

    @model_validator(mode="before")
    @classmethod
    def _no_booleans(cls, raw: Any) -> Any:
        return raw


class ImportedModel(_ForeignModel):
    """Your own network: ``import: "package.module:callable"``, called with ``kwargs``; it returns an nn.Module.

    It gets inputs [rows, *shape] as float32 by the input contract and returns logits [rows, classes]. It is code, so
    it runs with ``--allow-import`` only.
    """

    model_config = ConfigDict(populate_by_name=True)

    name: Literal["import"] = setting("import")
    import_: str = setting(alias="import", pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")
    kwargs: dict[str, Any] = setting({})


_OF_TIMM = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


class TimmModel(_ForeignModel):
    """An image model of timm: ``timm.create_model(model, num_classes, in_chans, **kwargs)``. Nothing is downloaded.

    ``pretrained`` is a local file of weights to start from, safetensors or a torch checkpoint that holds tensors alone
    (no pickle is loaded); the head is made anew where the classes differ.
    """

    name: Literal["timm"]
    model: str = setting(min_length=1)
    kwargs: dict[str, Any] = setting({})
    pretrained: str | None = setting(None, digest="never", min_length=1)  # its content is part of the digest

    @field_validator("kwargs")
    @classmethod
    def _ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _without(value, (*_OF_TIMM, "num_classes", "in_chans"))


class TransformersModel(_ForeignModel):
    """An image classifier of transformers: ``model`` is its type (``vit``, ``resnet``, ...), ``kwargs`` its config's.

    ``pretrained`` is a local folder with ``config.json`` (of that type; its sizes hold, where ``kwargs`` do not say
    others) and ``model.safetensors`` to start from; the head is made anew where the classes differ.
    """

    name: Literal["transformers"]
    model: str = setting(min_length=1)
    kwargs: dict[str, Any] = setting({})
    pretrained: str | None = setting(None, digest="never", min_length=1)  # its content is part of the digest

    @field_validator("kwargs")
    @classmethod
    def _ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _without(value, ("num_labels", "trust_remote_code"))


def _without(kwargs: dict[str, Any], taken: tuple[str, ...]) -> dict[str, Any]:
    if found := [key for key in taken if key in kwargs]:
        raise ValueError(f"{found[0]} is not for kwargs: it comes from the data, or from the key pretrained")
    return kwargs


def _named(raw: Any) -> Any:
    # {import: "package.module:callable"} needs no name beside it.
    return {"name": "import", **raw} if isinstance(raw, dict) and "import" in raw and "name" not in raw else raw


OwnModel: TypeAlias = CharCnnModel | MlpModel | ResnetModel
ForeignModel: TypeAlias = ImportedModel | TimmModel | TransformersModel
AnyModel: TypeAlias = OwnModel | ForeignModel
ModelConfig: TypeAlias = Annotated[
    CharCnnModel | MlpModel | ResnetModel | ImportedModel | TimmModel | TransformersModel,
    Field(discriminator="name"),
    BeforeValidator(_named),
]


class CeLoss(Section):
    """Hard labels only. ``class_weights: balanced`` lets every class of the training split weigh the same."""

    name: Literal["ce"]
    class_weights: Literal["balanced"] | None = setting(None, digest="not_at_default")


class KdLoss(Section):
    """Softened teacher logits weighted with the hard labels (Hinton et al. 2015); ``class_weights`` is for those."""

    name: Literal["kd"]
    temperature: float = setting(2.0, gt=0, le=100)
    alpha: float = setting(0.9, ge=0, le=1)
    class_weights: Literal["balanced"] | None = setting(None, digest="not_at_default")


LossConfig: TypeAlias = Annotated[CeLoss | KdLoss, Field(discriminator="name")]

PrecisionName: TypeAlias = Literal["auto", "fp32", "bf16", "fp16"]


class TrainConfig(Section):
    """How one model is trained. ``batch_size`` is the global batch, whatever the number of workers."""

    epochs: int = setting(4, ge=1)
    batch_size: int = setting(256, ge=1)
    optimizer: Literal["adamw", "adam", "sgd"] = setting("adamw")
    lr: float = setting(1e-3, gt=0)
    weight_decay: float = setting(0.01, ge=0)
    momentum: float = setting(0.9, ge=0, lt=1)
    schedule: Literal["cosine", "constant", "step"] = setting("cosine")
    warmup_epochs: float = setting(0.0, ge=0)
    precision: PrecisionName = setting("auto")
    # Of the schedule step: after each of these epochs the learning rate is multiplied by the factor.
    step_epochs: tuple[Annotated[int, Field(ge=1)], ...] = setting((), digest="not_at_default")
    step_factor: float = setting(0.1, digest="not_at_default", gt=0, lt=1)
    # A global batch is computed in so many parts, one after another, where it does not fit in memory at once.
    accumulate: int = setting(1, digest="not_at_default", ge=1)
    clip_norm: float | None = setting(None, digest="not_at_default", gt=0)
    # Exponential moving average of the weights, updated every step; it is what is validated and kept.
    ema_decay: float | None = setting(None, digest="not_at_default", gt=0, lt=1)
    # Stop when the validation accuracy has not risen for so many epochs.
    early_stop_epochs: int | None = setting(None, digest="not_at_default", ge=1)
    compile: Literal["none", "default", "max-autotune"] = setting("none", digest="not_at_default")
    # whole: all rows in memory, in one permutation. window: shards in random order, so many of them at a time in memory
    # as hold window_rows rows, and those permuted. auto: whole where the rows fit.
    shuffle: Literal["auto", "whole", "window"] = setting("auto", digest="not_at_default")
    window_rows: int = setting(65_536, digest="not_at_default", ge=1)
    # Within an epoch, too: what a fault costs at most. Without it, an epoch.
    checkpoint_every_s: float | None = setting(None, digest="never", gt=0)

    @model_validator(mode="after")
    def _schedule_makes_sense(self) -> TrainConfig:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} leaves nothing of the {self.epochs} epochs")
        if (self.schedule == "step") != bool(self.step_epochs):
            raise ValueError("schedule step and step_epochs go together: give both or neither")
        if self.step_epochs and (list(self.step_epochs) != sorted(set(self.step_epochs))):
            raise ValueError(f"step_epochs must ascend, got {list(self.step_epochs)}")
        if self.step_epochs and self.step_epochs[-1] >= self.epochs:
            raise ValueError(f"step_epochs {self.step_epochs[-1]} is not within the {self.epochs} epochs")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate {self.accumulate} parts of a batch of {self.batch_size} rows")
        return self


class TeacherInput(Section):
    """How a given teacher sees a stored row, in numbers, as its folder holds them.

    In this order: one channel is repeated to ``channels``; ``(raw * scale - mean) / std`` per channel; images are
    resized to ``resize`` (height, width) with antialiasing.
    """

    scale: float = setting(1 / 255, gt=0)
    mean: tuple[float, ...] = setting((0.5,), min_length=1)
    std: tuple[Annotated[float, Field(gt=0)], ...] = setting((0.5,), min_length=1)
    channels: int | None = setting(None, ge=1)
    resize: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = setting(None)
    interpolation: Literal["bilinear", "bicubic", "nearest"] = setting("bilinear")


class TeacherInputWish(Section):
    """``input`` of a given teacher: how it wants to see a stored row, see :class:`TeacherInput`.

    ``scale``, ``mean`` and ``std`` that are not given are those of its own folder, where it is a finished one, else
    those of the data (of a program that takes integers 1, 0 and 1: the rows' own numbers).
    """

    scale: float | None = setting(None, gt=0)
    mean: tuple[float, ...] | None = setting(None, min_length=1)
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = setting(None, min_length=1)
    channels: int | None = setting(None, ge=1)
    resize: _Size | None = setting(None)
    interpolation: Literal["bilinear", "bicubic", "nearest"] = setting("bilinear")

    def settled(self, base: InputConfig) -> TeacherInput:
        """The contract in numbers; what is not given is taken from ``base``."""
        numbers = {key: getattr(base, key) for key in ("scale", "mean", "std") if getattr(self, key) is None}
        return TeacherInput.model_validate(self.model_dump(exclude=set(numbers)) | numbers)


CheckpointFormat: TypeAlias = Literal["auto", "state_dict", "torchscript", "export", "onnx", "folder"]
OutputKind: TypeAlias = Literal["auto", "logits", "probabilities", "log_probabilities"]


def _as_names(raw: Any) -> Any:
    # YAML reads the class 7 as a number.
    return [str(name) if type(name) is int else name for name in raw] if isinstance(raw, list | tuple) else raw


ClassNames: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_as_names)]


class _Member(Section):
    """What describes one given network; see :class:`TeacherConfig`."""

    # Where the file lies does not name the folder: the SHA-256 of its content does.
    checkpoint: str | None = setting(None, digest="never", min_length=1)
    format: CheckpointFormat = setting("auto", digest="not_at_default")
    key: str | None = setting(None, digest="not_at_default", min_length=1)
    output: OutputKind = setting("auto", digest="not_at_default")
    classes: ClassNames | None = setting(None, digest="not_at_default", min_length=2)
    input: TeacherInputWish | None = setting(None, digest="not_at_default")


class GivenTeacher(_Member):
    """One network of an ensemble."""

    checkpoint: str = setting(digest="never", min_length=1)
    model: ModelConfig | None = setting(None)


class TeacherConfig(_Member):
    """The large model: trained here on the hard labels (``model``, ``train``), or given.

    Given by ``checkpoint``: a path or URI of a state dict (safetensors, or a torch checkpoint; with ``model``, and
    ``key`` where the weights lie deeper in it), a TorchScript file, a torch.export program, an ONNX model, or a
    finished teacher's or student's folder. Or by ``ensemble``: several of them, averaged with ``weights`` as logits or
    as probabilities.

    ``output`` says what a given teacher returns, ``auto`` looks at a sample. ``classes`` are its outputs in order,
    where they are not the data's. ``input`` is its own preprocessing.
    """

    model: ModelConfig | None = setting(None)
    train: TrainConfig = setting(TrainConfig())
    seed: int = setting(0, ge=0)
    loss: CeLoss = setting(CeLoss(name="ce"), digest="not_at_default")
    ensemble: tuple[GivenTeacher, ...] = setting((), digest="not_at_default")
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = setting(None, digest="not_at_default")
    average: Literal["logits", "probabilities"] = setting("logits", digest="not_at_default")

    @model_validator(mode="before")
    @classmethod
    def _ce_unless_named(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(loss := raw.get("loss"), dict) and "name" not in loss:
            return {**raw, "loss": {"name": "ce", **loss}}
        return raw

    @property
    def given(self) -> tuple[GivenTeacher, ...]:
        """The networks that are given; empty where the teacher is trained here."""
        if self.ensemble:
            return self.ensemble
        if self.checkpoint is None:
            return ()
        values = {name: getattr(self, name) for name in GivenTeacher.model_fields}
        return (GivenTeacher.model_construct(**values),)

    @model_validator(mode="after")
    def _trained_or_given(self) -> TeacherConfig:
        if self.ensemble and (self.checkpoint is not None or self.model is not None):
            raise ValueError(
                "ensemble: its members have a checkpoint and a model of their own: remove the ones beside it"
            )
        if self.given and (self.train != TrainConfig() or self.seed):
            raise ValueError("a given teacher is not trained: remove train and seed, or the checkpoint")
        if self.ensemble and any(getattr(self, key) != _default(self, key) for key in _MEMBER_ALONE):
            raise ValueError(f"ensemble: {', '.join(_MEMBER_ALONE)} belong to its members")
        if not self.ensemble and (self.weights is not None or self.average != "logits"):
            raise ValueError("weights and average are those of an ensemble: give one, or remove them")
        if self.weights is not None and len(self.weights) != len(self.ensemble):
            raise ValueError(f"weights: {len(self.weights)} numbers for {len(self.ensemble)} members of the ensemble")
        if not self.given and (given := [key for key in _MEMBER_ALONE if getattr(self, key) != _default(self, key)]):
            raise ValueError(f"{given[0]} is for a given teacher: add its checkpoint, or remove it")
        return self


_MEMBER_ALONE = ("format", "key", "output", "classes", "input")


def _default(section: BaseModel, key: str) -> Any:
    return type(section).model_fields[key].get_default()


class LabelsConfig(Section):
    """The label store: the teacher's logits for every row.

    Or logits that somebody computed already: ``from`` is a Parquet file or folder (a column ``by`` of ids, and a list
    column or one column a class), or a .npy array [rows, classes], with ``ids`` in a .npy file of its own or else in
    the order of the source's own rows, or with ``by: row_id`` of the row ids. ``output`` says what they are; ``auto``
    looks at them. ``classes`` are the numbers of a row in order, where they are not the data's classes.
    """

    model_config = ConfigDict(populate_by_name=True)

    views: Literal[1] = setting(1)
    dtype: Literal["float16"] = setting("float16")
    precision: PrecisionName = setting("auto")
    batch_size: int = setting(256, ge=1, digest="never")
    from_: str | None = setting(None, alias="from", digest="never", min_length=1)
    ids: str | None = setting(None, digest="never", min_length=1)
    by: Literal["source_id", "row_id"] = setting("source_id", digest="not_at_default")
    output: OutputKind = setting("auto", digest="not_at_default")
    classes: ClassNames | None = setting(None, digest="not_at_default", min_length=2)

    @model_validator(mode="after")
    def _of_imported_ones(self) -> LabelsConfig:
        described = [key for key in ("ids", "by", "output", "classes") if getattr(self, key) != _default(self, key)]
        if self.from_ is None and described:
            raise ValueError(
                "ids, by, output and classes describe labels that are read from a file: add from, or remove them"
            )
        return self


class StudentConfig(Section):
    """The small model. Its CE-only control is the same config with another loss."""

    model: ModelConfig
    loss: LossConfig = setting(KdLoss(name="kd"))
    train: TrainConfig = setting(TrainConfig(epochs=8, batch_size=128))
    seeds: tuple[int, ...] = setting((0,), min_length=1, digest="never")

    @model_validator(mode="before")
    @classmethod
    def _kd_unless_named(cls, raw: Any) -> Any:
        # So that an override of student.loss.temperature needs no name beside it.
        if isinstance(raw, dict) and isinstance(loss := raw.get("loss"), dict) and "name" not in loss:
            return {**raw, "loss": {"name": "kd", **loss}}
        return raw

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value) or any(seed < 0 for seed in value):
            raise ValueError(f"seeds must be distinct and >= 0, got {list(value)}")
        return value


# --- search, tracking, cluster --------------------------------------------------------------------------------------


class SpaceEntry(Section):
    """One dimension of a search: exactly one of the kinds below."""

    choice: tuple[Any, ...] | None = setting(None, digest="not_at_default", min_length=1)
    grid: tuple[Any, ...] | None = setting(None, digest="not_at_default", min_length=1)
    uniform: tuple[float, float] | None = setting(None, digest="not_at_default")
    loguniform: tuple[float, float] | None = setting(None, digest="not_at_default")
    quniform: tuple[float, float, float] | None = setting(None, digest="not_at_default")  # lower, upper, step

    @model_validator(mode="after")
    def _one_kind(self) -> SpaceEntry:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(type(self).model_fields)}, got {given or 'none'}")
        bounds = self.uniform or self.loguniform or (self.quniform and self.quniform[:2])
        if bounds and not bounds[0] < bounds[1]:
            raise ValueError(f"the lower bound must be below the upper one, got {list(bounds)}")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform needs bounds above 0, got {list(self.loguniform)}")
        if self.quniform and self.quniform[2] <= 0:
            raise ValueError(f"the step of quniform must be above 0, got {self.quniform[2]:g}")
        if self.quniform and any(abs(b / self.quniform[2] - round(b / self.quniform[2])) > 1e-9 for b in bounds or ()):
            raise ValueError(f"the bounds of quniform must be multiples of its step, got {list(self.quniform)}")
        return self

    @property
    def options(self) -> tuple[Any, ...]:
        """The values to choose from, empty where a range is searched."""
        return self.grid or self.choice or ()


Measure: TypeAlias = Literal["parameters", "bytes", "latency_ms"]
_CONSTRAINT = re.compile(r"\s*(?P<measure>\w+)\s*<=\s*(?P<limit>[\d_]+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*")


class Constraint(NamedTuple):
    """The most that a student may have of something."""

    measure: Measure
    limit: float

    @classmethod
    def parse(cls, text: str) -> Constraint:
        """Of text such as ``parameters <= 50_000``.

        Raises:
            ValueError: it is none.
        """
        match = _CONSTRAINT.fullmatch(text)
        if match is None or match["measure"] not in get_args(Measure):
            known = " or ".join(get_args(Measure))
            raise ValueError(f"must look like parameters <= 50_000, of {known}, got {text!r}")
        return cls(cast("Measure", match["measure"]), float(match["limit"]))


class TuneConfig(Section):
    """A search over keys of the student's config, such as ``model.channels`` or ``loss.temperature``.

    ``constraints`` such as ``parameters <= 50_000``: those of ``parameters`` and ``bytes`` (of the weights) are checked
    before a trial starts, ``latency_ms`` (one row, fp32, one thread) is measured alone when all are trained. The
    ``minutes`` are for the trials: what runs when they are over is stopped, finalists and controls come after. Controls
    are searched for, too: over ``control_space``, by default what ``space`` has that a CE-only student can have, its
    networks aside, or else its learning rate.
    """

    space: dict[str, SpaceEntry] = setting(min_length=1)
    search: Literal["random", "grid", "optuna"] = setting("random")
    scheduler: Literal["asha", "none"] = setting("asha")
    trials: int = setting(24, ge=1)
    minutes: float | None = setting(None, gt=0, digest="not_at_default")
    constraints: tuple[str, ...] = setting((), digest="not_at_default")
    finalists: int = setting(4, ge=1, digest="not_at_default")
    seeds: int = setting(5, ge=1)
    control_space: dict[str, SpaceEntry] | None = setting(None, min_length=1, digest="not_at_default")
    seed: int = setting(0, ge=0)

    @field_validator("constraints")
    @classmethod
    def _can_be_parsed(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            Constraint.parse(text)
        return value

    @model_validator(mode="after")
    def _grid_is_whole(self) -> TuneConfig:
        """The number of trials must be plain from the config: a grid is for a grid search, and fits its trials."""
        if self.search != "grid":
            if named := [key for key, entry in self.space.items() if entry.grid]:
                raise ValueError(f"space.{named[0]}: a grid needs tune.search grid; {self.search} search takes choice")
            return self
        if ranges := [key for key, entry in self.space.items() if not entry.options]:
            raise ValueError(f"space.{ranges[0]}: a grid search takes grid or choice, not a range")
        if (size := prod(len(entry.options) for entry in self.space.values())) > self.trials:
            raise ValueError(f"the grid has {size} points, tune.trials is {self.trials}: raise it or shorten the grid")
        return self

    @model_validator(mode="after")
    def _controls_have_the_same_networks(self) -> TuneConfig:
        for key in self.control_space or {}:
            if key == "model" or key.startswith(("model.", "loss.")) or key == "loss":
                raise ValueError(
                    f"control_space.{key}: a control has its student's network and the loss ce: leave it out"
                )
        return self

    @property
    def limits(self) -> tuple[Constraint, ...]:
        """``constraints``, parsed."""
        return tuple(Constraint.parse(text) for text in self.constraints)

    @property
    def planned_trials(self) -> int:
        """How many trials the search runs: a grid's own size, else what is asked for."""
        return prod(len(e.options) for e in self.space.values()) if self.search == "grid" else self.trials


class WandbConfig(Section):
    """``auto``: online where a key is found, else offline. It never asks and never stops a run."""

    mode: Literal["auto", "online", "offline", "disabled"] = setting("auto")
    project: str = setting("distill-ray", min_length=1)
    entity: str | None = setting(None)


class TrackingConfig(Section):
    """Where experiments are logged."""

    wandb: WandbConfig = setting(WandbConfig())


_Workers: TypeAlias = Annotated[int, Field(ge=1)]


class ClusterConfig(Section):
    """Where Ray runs and what each worker gets. ``auto`` is resolved from what the cluster has."""

    address: str = setting("auto", min_length=1)
    # Of a data-parallel model: a number, or [min, max]: as many as the cluster has room for, while it trains, too.
    workers: Literal["auto"] | Annotated[int, Field(ge=1)] | tuple[_Workers, _Workers] = setting("auto")
    # Of each student: 1 trains them side by side, more train them one after another, data-parallel as the teacher.
    student_workers: int = setting(1, ge=1)
    cpus_per_worker: Literal["auto"] | Annotated[int, Field(ge=1)] = setting("auto")
    gpus_per_worker: Literal["auto"] | Annotated[float, Field(ge=0)] = setting("auto")
    # Where each node keeps copies of the shards of remote stores, and how much at most; 0 keeps none.
    cache_dir: str = setting("auto", digest="never", min_length=1)
    cache_gib: float = setting(20.0, digest="never", ge=0)

    @field_validator("workers")
    @classmethod
    def _ascends(cls, value: Any) -> Any:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"[min, max] must ascend, got {list(value)}")
        return value


class Config(Section):
    """A whole run."""

    name: str = setting(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    data: DataConfig
    teacher: TeacherConfig = setting(TeacherConfig())
    labels: LabelsConfig = setting(LabelsConfig())
    student: StudentConfig
    tune: TuneConfig | None = setting(None)
    tracking: TrackingConfig = setting(TrackingConfig())
    cluster: ClusterConfig = setting(ClusterConfig())

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, value: str) -> str:
        if value == "artifacts":
            raise ValueError("'artifacts' is the folder that runs share: choose another name")
        return value

    @model_validator(mode="after")
    def _logits_come_from_one_place(self) -> Config:
        if self.labels.from_ is not None and self.teacher != TeacherConfig():
            raise ValueError("labels.from and teacher: the logits come from one of them: remove the other")
        if self.labels.from_ is None and not self.teacher.given and self.teacher.model is None:
            raise ValueError(
                "teacher: needs a model to train, a checkpoint that is trained already, or labels.from with its logits"
            )
        return self


# --- digests --------------------------------------------------------------------------------------------------------


def digest_payload(section: BaseModel) -> dict[str, Any]:
    """The JSON-able part of ``section`` that determines the result, by the rule declared with each key."""
    payload: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        extra = field.json_schema_extra
        rule = extra.get("digest", "always") if isinstance(extra, dict) else "always"
        if rule == "never" or (rule == "not_at_default" and value == field.get_default()):
            continue
        payload[name] = digest_payload(value) if isinstance(value, BaseModel) else _plain(value)
    return payload


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, BaseModel):
        return digest_payload(value)
    return value


# --- loading --------------------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = (), *, search: str | Path | None = None) -> Config:
    """Read a config file, lay ``a.b.c=value`` overrides over it, and validate.

    ``search`` is a file with a ``tune`` section, which takes the place of the config's, and a ``student`` section,
    whose keys are laid over the config's, or one of the two; overrides come after it.

    Raises:
        UserError: a file cannot be read, is not a YAML mapping, or a key is unknown, mistyped or contradictory.
    """
    raw, lines = _read_yaml(Path(path))
    if search is not None:
        _lay_search_over(raw, lines, Path(search))
    for override in overrides:
        parts = _apply_override(raw, override)
        lines = {path: line for path, line in lines.items() if path[: len(parts)] != parts}
        for depth in range(1, len(parts)):
            lines.setdefault(parts[:depth], f"override {override}")
        lines[parts] = f"override {override}"
    return _absolute_checkpoints(_absolute_paths(_validate(raw, lines, str(path))))


def from_dict(raw: Mapping[str, Any]) -> Config:
    """Validate a config that is already a dict, as the stages receive it from the driver."""
    return _absolute_checkpoints(_absolute_paths(_validate(dict(raw), {}, "config")))


def to_dict(config: BaseModel) -> dict[str, Any]:
    """The config as plain JSON types, with every default filled in."""
    return config.model_dump(mode="json", by_alias=True)


def to_yaml(values: Mapping[str, Any]) -> str:
    """``values`` as safe YAML in the order given."""
    return yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=None, width=120)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, for editors."""
    return Config.model_json_schema()


Line: TypeAlias = "int | str"
Lines: TypeAlias = dict[tuple[str, ...], Line]


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice: YAML would keep the last one silently."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = str(key_node.value)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config {path}: no such file; ready ones are in tune_configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: cannot be read as text: {error}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"config {path}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(
            f"config {path}: must be a mapping of keys, but the file {'is empty' if raw is None else 'is not'}"
        )
    return raw, dict(_key_lines(root, ()))


_OF_A_SEARCH = ("tune", "student")  # what a search file may hold


def _lay_search_over(raw: dict[str, Any], lines: Lines, path: Path) -> None:
    searched, where = _read_yaml(path)
    if foreign := [key for key in searched if key not in _OF_A_SEARCH]:
        raise UserError(
            f"--search {path}, line {where[foreign[0],]}: {foreign[0]}: a search file holds tune, and student where "
            "that changes; the rest is the run's config"
        )
    for key in [key for key in lines if key[0] == "tune" and "tune" in searched]:
        del lines[key]
    lines.update({key: f"--search {path}, line {line}" for key, line in where.items()})
    raw |= {"tune": searched["tune"]} if "tune" in searched else {}
    if "student" in searched:
        raw["student"] = _merged(raw.get("student"), searched["student"])


def _merged(below: Any, above: Any) -> Any:
    """``above`` over ``below``, section by section. A section that names another kind takes the whole place."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if _kind(above, below) != _kind(below, above):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


def _kind(section: Mapping[str, Any], other: Mapping[str, Any]) -> Any:
    """What kind of section it is: as it says, or else as the other does; the name of a loss may be left out."""
    if "import" in section or ("name" not in section and "import" in other):
        return "import"
    implied = "kd" if {"temperature", "alpha"} & (section.keys() | other.keys()) else None
    return section.get("name") or implied or other.get("name")


def _key_lines(node: yaml.Node | None, prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Line]]:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            path = (*prefix, str(key_node.value))
            yield path, key_node.start_mark.line + 1
            yield from _key_lines(value_node, path)


def _apply_override(raw: dict[str, Any], override: str) -> tuple[str, ...]:
    key, equals, text = override.partition("=")
    parts = tuple(key.split("."))
    if not equals or not all(parts):
        raise UserError(f"override {override!r}: must look like key.subkey=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML") from None
    target = raw
    for depth, part in enumerate(parts[:-1]):
        child = target.setdefault(part, {})
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {'.'.join(parts[: depth + 1])} holds a value, not a section")
        target = child
    target[parts[-1]] = value
    return parts


def _validate(raw: dict[str, Any], lines: Lines, source: str) -> Config:
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(_one_line(error, raw, lines, source)) from None


def _one_line(error: ValidationError, raw: dict[str, Any], lines: Lines, source: str) -> str:
    # An unknown key explains a missing one (a typo), so it is told first.
    problems = sorted(error.errors(include_url=False), key=lambda p: p["type"] != "extra_forbidden")
    first = problems[0]
    path = _config_path(first["loc"], raw)
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    where = f"{source}, line {line}" if isinstance(line, int) else f"{source}, {line}" if line else source
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    name = ".".join(path) or "config"
    return f"{where}: {name}: {_explain(first, path, raw)}{more}"


def _config_path(loc: Sequence[int | str], raw: Any) -> tuple[str, ...]:
    """The key path as the user wrote it: pydantic's location without the tags of its unions."""
    path: list[str] = []
    current = raw
    for position, item in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(current, dict) and item == "import" and not last:
            continue  # the tag of such a model, and one of its keys, too
        if isinstance(current, dict) and (item in current or last):
            path.append(str(item))
            current = current.get(item)
        elif isinstance(current, list | tuple) and isinstance(item, int):
            path.append(str(item))
            current = current[item] if item < len(current) else None
    return tuple(path)


def _explain(problem: Any, path: tuple[str, ...], raw: dict[str, Any]) -> str:
    kind, message = problem["type"], str(problem["msg"])
    if kind == "extra_forbidden":
        valid = sorted({key for section in _sections_at(path[:-1], raw) for key in keys_of(section)})
        near = difflib.get_close_matches(path[-1], valid, n=1, cutoff=0.5)
        return "unknown key" + (f", did you mean {near[0]!r}?" if near else f"; valid keys: {', '.join(valid)}")
    if kind == "missing":
        return "is missing and has no default"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        key = str(problem["ctx"]["discriminator"]).strip("'")
        tags = [tag for section in _sections_at(path, {}) for tag in get_args(section.model_fields[key].annotation)]
        given = problem["input"].get(key) if isinstance(problem["input"], dict) else problem["input"]
        near = difflib.get_close_matches(str(given), tags, n=1, cutoff=0.5)
        hint = f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(tags)}" if tags else ""
        return f"{key} {given!r} is not known{hint}" if given is not None else f"needs the key {key!r}{hint}"
    message = message.removeprefix("Value error, ")
    given = problem["input"]
    shown = f", got {given!r}" if isinstance(given, str | int | float | bool | None) and "got" not in message else ""
    return message[0].lower() + message[1:] + shown


def _sections_at(path: Sequence[str], raw: Any) -> list[type[BaseModel]]:
    """The sections that may stand at ``path``, narrowed by the tags that the user gave."""
    sections: list[type[BaseModel]] = [Config]
    current = raw
    free_key = False  # of a mapping such as tune.space, whose keys are the user's own
    for part in path:
        if isinstance(current, list) and part.isdigit():  # of a list of sections
            current = current[int(part)]
            continue
        current = current.get(part) if isinstance(current, dict) else None
        if free_key:
            free_key = False
            continue
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        sections = [model for field in fields for model in _models_of(field)]
        free_key = any(get_origin(field.annotation) is dict for field in fields)
        tagged = [model for model in sections if isinstance(current, dict) and _tag_matches(model, current)]
        sections = tagged or sections
    return sections


def keys_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """The keys of a section as they are written in a config."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _models_of(field: FieldInfo | Any) -> list[type[BaseModel]]:
    annotation = field.annotation if isinstance(field, FieldInfo) else field
    if get_origin(annotation) in (Union, types.UnionType, Annotated, dict, tuple):
        return [model for arg in get_args(annotation) for model in _models_of(arg)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _tag_matches(model: type[BaseModel], raw: Mapping[str, Any]) -> bool:
    for key in ("source", "name"):
        field = model.model_fields.get(key)
        if field is not None and get_origin(field.annotation) is Literal:
            return raw.get(key) in get_args(field.annotation)
    return True


def _absolute_paths(config: Config) -> Config:
    data = config.data
    if isinstance(data, IdxData):
        path = data.path.removeprefix("file://")
        if "://" in path:
            raise UserError("data.path: source idx reads local files, this is a URI: copy the folder to a local path")
        config = _with_data(config, path=str(Path(path).expanduser().resolve()))
    elif isinstance(data, ParquetData | ImagesData | HuggingfaceData):
        path = _absolute("data.path", data.path)
        config = _with_data(config, path=path)
        if isinstance(data, ParquetData) and data.root is not None:
            config = _with_data(config, root=_absolute("data.root", data.root))
        if isinstance(data, ImagesData) and data.table is not None and "/" in data.table:
            config = _with_data(config, table=_absolute("data.table", data.table))
    if config.cluster.cache_dir != "auto":
        where = str(Path(config.cluster.cache_dir).expanduser().absolute())
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"cache_dir": where})})
    return config


def _with_data(config: Config, **changes: str) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def _absolute(key: str, location: str) -> str:
    """A local path from where the command is typed; a URI as it is."""
    location = location.removeprefix("file://")
    if "://" not in location:
        return str(Path(location).expanduser().absolute())
    place, _, options = location.split("://", 1)[1].partition("?")
    if "@" in place.split("/", 1)[0] or re.search(r"(key|secret|token|password)[^=&]*=", options, re.IGNORECASE):
        raise UserError(f"{key}: a URI with credentials in it: leave them out, and set them in the environment")
    return location


def _absolute_checkpoints(config: Config) -> Config:
    """Files of given models and logits, from where the command is typed."""
    teacher, labels = config.teacher, config.labels
    teacher = _moved(teacher, "checkpoint").model_copy(
        update={"ensemble": tuple(_of_member(member) for member in teacher.ensemble)}
    )
    student = config.student.model_copy(update={"model": _with_pretrained(config.student.model)})
    teacher = teacher.model_copy(update={"model": _with_pretrained(teacher.model)})
    labels = _moved(_moved(labels, "from_"), "ids")
    return config.model_copy(
        update={"teacher": teacher, "labels": labels, "student": student, "tune": _with_pretrained_space(config.tune)}
    )


def _with_pretrained_space(tune: TuneConfig | None) -> TuneConfig | None:
    """Pretrained weights that a search's space names, from where the command is typed."""
    if tune is None:
        return None

    def moved(key: str, option: Any) -> Any:
        if key == "model.pretrained" and isinstance(option, str):
            return _absolute("tune.space.model.pretrained", option)
        if key == "model" and isinstance(option, dict) and isinstance(where := option.get("pretrained"), str):
            return option | {"pretrained": _absolute("tune.space.model", where)}
        return option

    space = {
        key: entry.model_copy(
            update={
                kind: tuple(moved(key, option) for option in options)
                for kind in ("choice", "grid")
                if (options := getattr(entry, kind)) is not None
            }
        )
        for key, entry in tune.space.items()
    }
    return tune.model_copy(update={"space": space})


SectionT = TypeVar("SectionT", bound=Section)


def _of_member(member: GivenTeacher) -> GivenTeacher:
    return _moved(member, "checkpoint").model_copy(update={"model": _with_pretrained(member.model)})


def _moved(section: SectionT, key: str) -> SectionT:
    where = getattr(section, key)
    return section if where is None else section.model_copy(update={key: _absolute(key.strip("_"), where)})


def _with_pretrained(model: Any) -> Any:
    return _moved(model, "pretrained") if isinstance(model, TimmModel | TransformersModel) else model


# --- code that a config names ---------------------------------------------------------------------------------------


def imports_of(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, import path) of all code that a config names, in a search's space too; ``values`` as plain data.

    A torch.export program is code as well.
    """
    if isinstance(values, dict):
        for key, value in values.items():
            place = f"{prefix}.{key}" if prefix else str(key)
            if str(key).rpartition(".")[2] in ("import", "import_") and value is not None:  # the alias, and the field
                yield place, value if isinstance(value, str) else json.dumps(value, default=str)
            elif key == "format" and value == "export":  # of a checkpoint: torch evaluates text of such a file
                yield place, value
            else:
                yield from imports_of(value, place)
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from imports_of(value, f"{prefix}[{number}]")


def refuse_imports(config: Config) -> None:
    """For commands that were not given ``--allow-import``.

    Raises:
        UserError: the config names code.
    """
    for place, code in imports_of(to_dict(config)):
        raise UserError(f"{place}: {code} is code that would run here: read it, then say --allow-import")
