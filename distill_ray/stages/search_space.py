"""What a search varies: dotted keys of the student's config, and the student that sampled values make.

Plain functions of the config, so that the driver and a trial in its actor derive the same folder from the same values.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from distill_ray.artifacts import Stage
from distill_ray.config import Config, SpaceEntry, StudentConfig, TuneConfig, keys_of, to_dict
from distill_ray.errors import UserError
from distill_ray.stages import opening, student
from distill_ray.storage import Folder

METRIC = "validation_accuracy"  # the one objective: sizes are functions of the config, the front is computed after
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
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"tune.space: {key!r} is no key of the student that can be searched; {hint}")


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


def plan(inputs: Inputs, values: Mapping[str, Any]) -> Trial:
    """What these values mean: a student and its folder, or why they are none."""
    tune, base = inputs.config.tune, inputs.config.student
    assert tune is not None
    try:
        sampled = lay_over(base, values).model_copy(update={"seeds": base.seeds[:1]})
        config = inputs.config.model_copy(update={"student": sampled})
        student.check_loss(sampled.loss, _has_labels(inputs.data))
        parameters = _parameters(inputs.data, sampled)
    except (ValueError, UserError) as error:
        return Trial(values, "invalid", str(error))
    values = {key: value for key, value in values.items() if _has(to_dict(sampled), key)}
    place = student.locate(config, inputs.out, inputs.data, inputs.labels, sampled.loss, sampled.seeds[0])
    if tune.max_parameters is not None and parameters > tune.max_parameters:
        reason = f"{parameters} parameters, tune.max_parameters is {tune.max_parameters}"
        return Trial(values, "infeasible", reason, config, place, parameters)
    return Trial(values, "ready", None, config, place, parameters)


def _has(raw: Any, key: str) -> bool:
    first, _, rest = key.partition(".")
    return isinstance(raw, dict) and first in raw and (not rest or _has(raw[first], rest))


def _parameters(data: Stage, sampled: StudentConfig) -> int:
    from distill_ray.models.classifier import count_parameters
    from distill_ray.stages.model_spec import model_spec
    from distill_ray.store import open_store

    # Shapes only: a candidate far above the limit costs no memory.
    spec = model_spec(open_store(data.folder).data_manifest, sampled.model)
    return count_parameters(spec.build_on_meta(key="model"))


@lru_cache(maxsize=4)
def _has_labels(data: Stage) -> bool:
    """Whether the train split has hard labels: looked up once a process, not once a trial."""
    from distill_ray.store import open_store

    return opening.has_labels(open_store(data.folder), "train")
