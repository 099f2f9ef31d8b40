"""What a search varies: dotted keys of the student's config, and the student that sampled values make.

Plain functions of the config, so that the driver and a trial in its actor derive the same folder from the same values.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from distill_ray.artifacts import Stage
from distill_ray.config import CeLoss, Config, SpaceEntry, StudentConfig, TuneConfig, keys_of, to_dict
from distill_ray.errors import UserError
from distill_ray.stages import opening, student
from distill_ray.storage import Folder

GIVEN = "given"  # key of a control's sample: its ``values`` as they are, and the ``finalist`` whose control it is
METRIC = "validation_accuracy"  # the one objective: sizes are functions of the config, the front is computed after
_LR_FACTOR = 4.0
_NOT_SEARCHED = "seeds"  # a trial has one seed; tune.seeds repeats the finalists

Readiness = Literal["ready", "invalid", "infeasible"]


@dataclass(frozen=True)
class Trial:
    """Sampled values and the student that they make. ``config`` and what follows are None for an invalid one.

    Of a student, ``values`` are those that it has: the temperature drawn for a ``ce`` loss is not one of them.
    """

    values: Mapping[str, Any]
    status: Readiness
    reason: str | None = None
    config: Config | None = None
    stage: Stage | None = None
    parameters: int | None = None

    def of_keys(self, keys: Collection[str]) -> Trial:
        """The same, its values those of ``keys``, as its student has them: a control is told by whole sections."""
        if self.config is None:
            return replace(self, values={key: value for key, value in self.values.items() if key in keys})
        whole = to_dict(self.config.student)
        return replace(self, values={key: _value(whole, key) for key in keys if _has(whole, key)})

    @property
    def network(self) -> str:
        """Equal for equal networks, whatever they are trained with."""
        assert self.config is not None
        return json.dumps(to_dict(self.config.student)["model"], sort_keys=True)


@dataclass(frozen=True)
class Inputs:
    """What all trials of a search share: plain data, so that it travels to the actors."""

    config: Config
    out: Folder
    data: Stage
    labels: Stage


def check(base: StudentConfig, tune: TuneConfig) -> None:
    """Refuse a space over keys that the student does not have.

    Raises:
        UserError: naming the key and the nearest one that could be meant.
    """
    known = sorted(student_keys(base, tune.space))
    for key in tune.space:
        if key not in known and ".kwargs." not in key:  # those are the network's own
            raise UserError(f"tune.space: {key!r} is no key of the student that can be searched; {_hint(key, known)}")
    of_controls = sorted(key for key in known if key.partition(".")[0] not in ("model", "loss"))
    for key in tune.control_space or {}:
        if key not in of_controls:
            hint = _hint(key, of_controls)
            raise UserError(f"tune.control_space: {key!r} is no key of a control that can be searched; {hint}")


def _hint(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def control_space(base: StudentConfig, tune: TuneConfig) -> dict[str, SpaceEntry]:
    """What the CE-only controls are searched over: ``tune.control_space``, or what of the students' space they have.

    The network is their student's, so that what is left may be nothing (a search over sizes and temperatures): then it
    is the learning rate, by a factor of 4 both ways.
    """
    if tune.control_space is not None:
        return tune.control_space
    hard = base.model_copy(update={"loss": CeLoss(name="ce")})
    known = student_keys(hard, ())
    shared = {
        key: entry for key, entry in tune.space.items()
        if key in known and key.partition(".")[0] not in ("model", "loss")
    }  # fmt: skip
    return shared or {"train.lr": SpaceEntry(loguniform=(base.train.lr / _LR_FACTOR, base.train.lr * _LR_FACTOR))}


def control_values(chosen: StudentConfig, sampled: Mapping[str, Any]) -> dict[str, Any]:
    """The control of a chosen student: its network on hard labels alone, ``sampled`` in place of its own values."""
    hard = CeLoss(name="ce", class_weights=chosen.loss.class_weights)
    whole = to_dict(chosen)
    return {"model": whole["model"], "loss": to_dict(hard), "train": whole["train"], **sampled}


def pretrained_of(space: Mapping[str, SpaceEntry]) -> list[str]:
    """The files and folders of pretrained weights that a space names: their content is part of what a search is."""
    found = {
        place
        for key, entry in space.items()
        for option in entry.options
        for place in ([option] if key == "model.pretrained" else [])
        + ([option.get("pretrained")] if key == "model" and isinstance(option, dict) else [])
    }
    return sorted(place for place in found if isinstance(place, str))


def student_keys(base: StudentConfig, searched: Collection[str]) -> set[str]:
    """Every dotted key, sections included; where the kind itself is searched (``loss.name``), the keys of all kinds."""
    return {
        key
        for name, field in StudentConfig.model_fields.items()
        if name != _NOT_SEARCHED
        for key in _keys_below(name, field, getattr(base, name), searched)
    }


def _keys_below(key: str, field: FieldInfo, value: Any, searched: Collection[str]) -> Iterator[str]:
    yield key
    if not isinstance(value, BaseModel):
        return
    any_kind = key in searched or f"{key}.name" in searched
    for kind in _kinds(field) if any_kind else (type(value),):
        for written, inner in keys_of(kind).items():
            name = next(name for name, one in kind.model_fields.items() if one is inner)
            yield from _keys_below(f"{key}.{written}", inner, getattr(value, name, None), searched)


def _kinds(field: FieldInfo) -> tuple[type[BaseModel], ...]:
    members = get_args(field.annotation) or (field.annotation,)
    return tuple(kind for kind in members if isinstance(kind, type) and issubclass(kind, BaseModel))


def values_of(tune: TuneConfig, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Config values of what Tune hands to a trial: what a sampler drew, or, of a control, the values themselves."""
    return dict(sample[GIVEN]["values"]) if GIVEN in sample else decode(tune.space, sample)


def decode(space: Mapping[str, SpaceEntry], sample: Mapping[str, Any]) -> dict[str, Any]:
    """Config values of what a sampler drew: it sees options by their number, since lists are no categories to it."""
    values: dict[str, Any] = {}
    for key, entry in space.items():
        drawn = sample[key]
        if entry.options:
            values[key] = copy.deepcopy(entry.options[int(drawn)])
        else:
            # A multiple of 0.1 is written 0.3, not 0.30000000000000004: the value that a person would type.
            values[key] = float(f"{drawn:.12g}") if entry.quniform else float(drawn)
    return values


def lay_over(base: StudentConfig, values: Mapping[str, Any]) -> StudentConfig:
    """The student with ``values`` in place of its own.

    Keys that the chosen kind does not have but another kind has (a temperature, where the loss is ``ce``) are left
    out: that is how one space covers several kinds.

    Raises:
        ValueError: in one line, why this is no student.
    """
    raw = to_dict(base)
    for key in sorted(values, key=lambda key: key.count(".")):  # a whole section before its keys
        *sections, last = key.split(".")
        target: Any = raw
        for section in sections:
            target = target.get(section) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            raise ValueError(f"{key}: {'.'.join(sections)} holds a value, not a section")
        target[last] = copy.deepcopy(values[key])
    for name, field in StudentConfig.model_fields.items():
        if isinstance(raw.get(name), dict):
            raw[name] = _of_its_kind(_kinds(field), raw[name])
    try:
        return StudentConfig.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = str(first["msg"]).removeprefix("Value error, ")
        raise ValueError(f"{'.'.join(str(part) for part in first['loc'])}: {message}") from None


def _of_its_kind(kinds: tuple[type[BaseModel], ...], section: dict[str, Any]) -> dict[str, Any]:
    chosen = next((kind for kind in kinds if section.get("name") in _tags(kind)), None)
    if chosen is None:
        return section
    foreign = {key for kind in kinds for key in keys_of(kind)} - set(keys_of(chosen))
    return {key: value for key, value in section.items() if key not in foreign}


def _tags(kind: type[BaseModel]) -> tuple[Any, ...]:
    field = kind.model_fields.get("name")
    return get_args(field.annotation) if field is not None else ()


def plan(inputs: Inputs, values: Mapping[str, Any], *, sized: bool = True) -> Trial:
    """What these values mean: a student and its folder, or why they are none.

    Not ``sized``, no network is built, and torch not imported: parameters are then told where constraints need them.
    """
    tune, base = inputs.config.tune, inputs.config.student
    assert tune is not None
    try:
        sampled = lay_over(base, values).model_copy(update={"seeds": base.seeds[:1]})
        config = inputs.config.model_copy(update={"student": sampled})
        student.check_loss(sampled.loss, _has_labels(inputs.data))
        sizes = _sizes(inputs.data, sampled) if sized or tune.limits else {}
    except (ValueError, UserError) as error:
        return Trial(values, "invalid", str(error))
    values = {key: value for key, value in values.items() if _has(to_dict(sampled), key)}
    place = student.locate(config, inputs.out, inputs.data, inputs.labels, sampled.loss, sampled.seeds[0])
    for measure, limit in tune.limits:
        if measure in sizes and sizes[measure] > limit:
            reason = exceeds(measure, sizes[measure], limit)
            return Trial(values, "infeasible", reason, config, place, sizes["parameters"])
    return Trial(values, "ready", None, config, place, sizes.get("parameters"))


def exceeds(measure: str, value: float, limit: float) -> str:
    """The reason of a trial that a constraint forbids."""
    return f"{measure} {value:,.6g}, tune.constraints: at most {limit:,.6g}"


def _has(raw: Any, key: str) -> bool:
    first, _, rest = key.partition(".")
    return isinstance(raw, dict) and first in raw and (not rest or _has(raw[first], rest))


def _value(raw: Any, key: str) -> Any:
    first, _, rest = key.partition(".")
    return _value(raw[first], rest) if rest else raw[first]


def _sizes(data: Stage, sampled: StudentConfig) -> dict[str, int]:
    """Parameters, and bytes of the weights without their file's header. From shapes alone: a candidate far above the
    limit costs no memory."""
    from distill_ray.models.classifier import count_parameters
    from distill_ray.stages import model_folder
    from distill_ray.store import open_store

    spec = model_folder.model_spec(open_store(data.folder).data_manifest, sampled.model)
    built = spec.build_on_meta(key="model")
    held = sum(tensor.numel() * tensor.element_size() for tensor in built.net.state_dict().values())
    return {"parameters": count_parameters(built), "bytes": held}


@lru_cache(maxsize=4)
def _has_labels(data: Stage) -> bool:
    """Whether the train split has hard labels: looked up once a process, not once a trial."""
    from distill_ray.store import open_store

    return opening.has_labels(open_store(data.folder), "train")
