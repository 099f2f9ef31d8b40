"""A teacher that is given: its files are copied into a teacher folder like any other, looked at, and measured first.

The folder is named by the SHA-256 of the files' content and by what the config says of them, not by where they lay. So
labels, verify and reuse need nothing of the place they came from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from distill_ray import placing, runtime, usercode
from distill_ray.artifacts import SPEC_FILE, SUMMARY_FILE, WEIGHTS_FILE, Stage
from distill_ray.config import Config, GivenTeacher, ImportedModel, TeacherInput, TeacherInputWish, from_dict, to_dict
from distill_ray.errors import RunError, UserError
from distill_ray.stages import opening
from distill_ray.stages.context import Context, config_section, tracking_id, write_stage_config
from distill_ray.storage import Folder, impatience, reason_of
from distill_ray.store import DataManifest, SplitArrays, Store, read_shards

_SAMPLE_ROWS = 256  # that tell what the outputs are
_MEASURED_ROWS = 4096  # of another split, where the test split has no labels
_COMPANY_ROWS = 16  # that run together, the second time
_COMPANY_SLACK = 0.02  # of the answers' spread: batches of another size round otherwise, in bf16 by nearly 1 %
_COMPANY_LEAST = 1e-3  # of the largest answer: the least spread that differences are compared with
_GOOD_SHARE = 0.3  # of the way from the largest class's share to 1
_SUFFIXES = {"state_dict": "safetensors", "torchscript": "pt", "export": "pt2", "onnx": "onnx"}


def check_present(config: Config) -> None:
    """Look for the files and the code that the config gives, before any work; no code is run.

    Raises:
        UserError: one is not there or cannot be read.
    """
    sections: list[tuple[str, Any]] = [*keyed(config), ("teacher", config.teacher), ("student", config.student)]
    for key, section in sections:
        if isinstance(section.model, ImportedModel):
            usercode.fingerprint(section.model.import_, f"{key}.model.import")
        elif (pretrained := getattr(section.model, "pretrained", None)) is not None:
            content_sha256(pretrained, f"{key}.model.pretrained", only_look=True)
    for key, member in keyed(config):
        content_sha256(member.checkpoint, f"{key}.checkpoint", only_look=True)
    for key, place in (("labels.from", config.labels.from_), ("labels.ids", config.labels.ids)):
        if place is not None and "://" not in place and not Path(place).exists():
            raise UserError(f"{key} {place}: no such file or folder")


def keyed(config: Config) -> list[tuple[str, GivenTeacher]]:
    """The given networks, each with the key of its section."""
    members = config.teacher.given
    return [(f"teacher.ensemble[{i}]" if config.teacher.ensemble else "teacher", m) for i, m in enumerate(members)]


def files(config: Config) -> list[str]:
    """The SHA-256 of each given file's content: what a digest needs to know of them."""
    return [content_sha256(member.checkpoint, f"{key}.checkpoint") for key, member in keyed(config)]


def content_sha256(location: str, key: str, *, only_look: bool = False) -> str:
    """Of a file, or of a model folder's weights and of what it says of them.

    Raises:
        UserError: it is not there or cannot be read.
    """
    folder, name = _file(location)
    try:
        with impatience():
            state = folder.state(name)
        if state is None:
            raise FileNotFoundError(location)
        if only_look:
            return ""
        found = _sha256(folder, name, state)
        if folder != Folder.at(location):
            return found
        specs = [folder.read_bytes(spec) for spec in (SPEC_FILE, "config.json") if folder.exists(spec)]
        return hashlib.sha256(b"".join([found.encode(), *specs])).hexdigest()
    except FileNotFoundError:
        what = "no trained model is in this folder" if name == WEIGHTS_FILE else "no such file"
        raise UserError(f"{key} {location}: {what}") from None
    except OSError as error:
        raise UserError(f"{key} {location}: cannot be read ({reason_of(error)})") from None


@lru_cache(maxsize=64)
def _sha256(folder: Folder, name: str, state: tuple[Any, ...]) -> str:
    return hashlib.sha256(folder.buffer(name)).hexdigest()


def _file(location: str) -> tuple[Folder, str]:
    """The folder and the name of a file; of a model folder, its weights."""
    place = Folder.at(location)
    is_folder = place.path.is_dir() if place.is_local else place.exists(SPEC_FILE)
    return (place, WEIGHTS_FILE) if is_folder else (place.parent, place.name)


# --- the stage ------------------------------------------------------------------------------------------------------


def make(context: Context, data: Stage, target: Stage, is_same: Callable[[], bool] = lambda: True) -> None:
    """Copy, look, measure; tells the accuracy before anything is labelled.

    Raises:
        RunError: the files are not those any more that ``target`` is named by.
    """
    import ray

    nodes = context.session.start()
    source = opening.data_store(context.config, data)
    check_student(context, source)
    draft = collect(context.config, source.data_manifest, target.folder)
    if not is_same():
        raise RunError("teacher.checkpoint: its content changed while it was read: the same command takes it anew")
    placement = placing.independent(context.config.cluster, nodes, 1)
    job = {
        "config": to_dict(context.config), "data": data, "stage": target, "draft": draft.model_dump(mode="json",
        by_alias=True), "threads": placement.cpus,
    }  # fmt: skip
    task = ray.remote(num_cpus=placement.cpus, num_gpus=placement.gpus, max_retries=3)(examine)
    key, run_id = target.folder.name, tracking_id(target.folder)
    section = config_section(context.config, "teacher")
    context.tracker.start(key, run_id=run_id, name=key, job_type="teacher", config=section | {"digest": target.digest})
    with context.reporter.progress("teacher", 1) as bar:
        try:
            notes: list[str] = ray.get(task.remote(job))
        except Exception as error:
            raise runtime.as_run_error("teacher", error) from error
        bar.update(1, "given teacher measured")
    for note in notes:
        context.reporter.line(f"teacher: {note}")
    summary = target.finished()
    if summary is None:
        raise RunError(f"{target.folder}: is not finished")
    tell(context, summary)
    context.tracker.finish(key, summary)


def check_student(context: Context, data: Store) -> None:
    """Refuse now, not after hours of labelling, a student that cannot be made or would have nothing to learn from.

    Raises:
        UserError: its network or its batch does not fit, or its loss learns from labels that are not there.
    """
    from distill_ray.stages import model_folder, student

    config = context.config
    placement = placing.student(config.cluster, context.session.start(), 1)
    model_folder.check_model("student", data.data_manifest, config.student, placement)
    searched = config.tune.space if config.tune else {}
    if any(key.partition(".")[0] == "loss" for key in searched):  # it is the trials' own that counts
        return
    try:
        student.check_loss(config.student.loss, labelled=False)
    except UserError:  # only now are the labels looked for: where there are none, that reads every shard
        student.check_loss(config.student.loss, opening.has_labels(data, "train"))


def tell(context: Context, summary: dict[str, Any]) -> None:
    """The accuracy of a teacher that was not trained here; a warning where it is poor."""
    found = summary["measured"]
    if found["accuracy"] is None:
        context.reporter.warn("teacher: no row has a label, so its accuracy cannot be measured: its word is taken")
        return
    text = (
        f"teacher: accuracy {found['accuracy']:.4f} on the {found['rows']:,} labelled rows looked at "
        f"({found['split']} split); the largest class is {found['majority']:.4f} of them"
    )
    if found["split"] == "test":  # where it is measured, too
        text += f", macro F1 {summary['macro_f1']:.4f}"
    if found["accuracy"] < found["majority"] + _GOOD_SHARE * (1 - found["majority"]):
        context.reporter.warn(
            f"{text}: that is poor, mostly by other preprocessing than it was trained with (teacher.input), or "
            "another order of its classes (teacher.classes)"
        )
        return
    context.reporter.line(text)


def collect(config: Config, data: DataManifest, folder: Folder) -> Any:
    """Copy the given files into ``folder``, weights as safetensors; what is known of them, ``output`` still as asked.

    Raises:
        UserError: a file is damaged, or its weights do not fit the model; nothing was run but the model's own code.
    """
    from distill_ray.models import GivenSpec

    members = [_collected(key, number, member, data, folder) for number, (key, member) in enumerate(keyed(config))]
    teacher = config.teacher
    return GivenSpec(
        members=tuple(members), weights=teacher.weights or (1.0,) * len(members), average=teacher.average,
        input=data.input, shape=data.shape, dtype=data.dtype, classes=data.classes, class_names=data.class_names,
    )  # fmt: skip


def _collected(key: str, number: int, member: GivenTeacher, data: DataManifest, folder: Folder) -> Any:
    from distill_ray.models import foreign, formats
    from distill_ray.models.given import GivenMember

    source, name = _file(member.checkpoint)
    place = source.location(name)
    content = source.read_bytes(name)
    contract = None if member.input is None else member.input.settled(data.input)
    if source == Folder.at(member.checkpoint):  # a folder, not the file in it
        member, contract = _of_folder(key, member, source, data)
    kind = formats.detect(content, place) if member.format in ("auto", "folder") else member.format
    if kind == "export" and member.format != "export":
        raise UserError(
            f"{key}.checkpoint {place}: is a torch.export program, and torch runs text that it holds when it is "
            f"loaded: if you trust whom it is from, set {key}.format=export and say --allow-import"
        )
    if kind == "state_dict":
        if member.model is None:
            raise UserError(f"{key}.model: is missing: {place} holds weights alone, and they need their network")
        content = _fitting(key, member, contract or TeacherInputWish().settled(data.input), data, content, place)
    elif member.model is not None or member.key is not None:
        what = "model" if member.model is not None else "key"
        raise UserError(f"{key}.{what}: {place} is a {kind} file, which is a whole network: remove {what}")
    file = f"{Path(WEIGHTS_FILE).stem}{f'-{number}' if number else ''}.{_SUFFIXES[kind]}"
    folder.write_bytes(file, content)
    return GivenMember(
        file=file, bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), format=kind,
        model=None if member.model is None else foreign.bare(member.model, f"{key}.model"),
        input=contract, output=member.output, width=_width(member, data),
        order=None if member.classes is None else _order(key, member, data),
    )  # fmt: skip


def _width(member: GivenTeacher, data: DataManifest) -> int:
    return data.classes if member.classes is None else len(member.classes)


def _order(key: str, member: GivenTeacher, data: DataManifest) -> tuple[int, ...]:
    from distill_ray.models.given import class_order

    assert member.classes is not None
    names = member.classes
    found = class_order(names, len(names), data.class_names, key)
    return tuple(range(len(names))) if found is None else tuple(found)


def _of_folder(key: str, member: GivenTeacher, folder: Folder, data: DataManifest) -> tuple[GivenTeacher, TeacherInput]:
    """What the model.json of a finished teacher or student says, where the config does not; and its contract."""
    from distill_ray.models import ModelSpec, read_spec

    spec = read_spec(folder)
    if not isinstance(spec, ModelSpec):
        raise UserError(f"{key}.checkpoint {folder}: is a given teacher itself: name its own files")
    if member.input is None and spec.shape != data.shape:
        raise UserError(
            f"{key}.checkpoint {folder}: takes rows of {list(spec.shape)}, the data has {list(data.shape)}: give "
            f"{key}.input, with resize or channels"
        )
    if isinstance(spec.model, ImportedModel) and member.model is None:
        raise UserError(f"{key}.checkpoint {folder}: its model.json names code: give {key}.model with its import path")
    known = {"model": member.model or spec.model, "classes": member.classes or spec.class_names}
    return member.model_copy(update=known), (member.input or TeacherInputWish()).settled(spec.input)


def _fitting(
    key: str, member: GivenTeacher, contract: TeacherInput, data: DataManifest, content: bytes, place: str
) -> bytes:
    """The weights of a state dict as safetensors, once they are seen to fit the model."""
    from distill_ray.models.given import build_given
    from distill_ray.models.saved import to_safetensors
    from distill_ray.models.weights import fill, read_state_dict

    net = build_given(member.model, contract, data.shape, _width(member, data), f"{key}.model")
    return to_safetensors(fill(net, read_state_dict(content, place, member.key), place))


# --- on a worker ----------------------------------------------------------------------------------------------------


def examine(job: dict[str, Any]) -> list[str]:
    """Runs in a Ray task: find out what the outputs are, write model.json, measure, write summary.json.

    Returns what there is to tell.

    Raises:
        UserError: the outputs are not one number a class, or not what the config says of them.
        RunError: an output is not finite; names the row.
    """
    import torch

    from distill_ray import precision
    from distill_ray.models import GivenSpec

    config, target = from_dict(job["config"]), job["stage"]
    torch.set_num_threads(job["threads"])
    precision.exact_fp32()
    device = runtime.worker_device()
    data = opening.data_store(config, job["data"])
    draft = GivenSpec.model_validate(job["draft"])
    spec, notes = resolve_outputs(config, draft, target.folder, data, device)
    text = spec.model_dump_json(indent=2, by_alias=True) + "\n"
    target.folder.write_text(SPEC_FILE, text)
    outputs = {"outputs": [member.output for member in spec.members]}
    write_stage_config(target, config_section(config, "teacher"), {"precision": "fp32", **outputs})
    summary = measure(config, spec, target.folder, data, device, text.encode())
    target.folder.write_json(SUMMARY_FILE, summary)
    return notes


def resolve_outputs(config: Config, draft: Any, folder: Folder, data: Store, device: Any) -> tuple[Any, list[str]]:
    """``draft`` with what each member's outputs are, as seen on a sample, and what there is to tell of it."""
    import torch

    record = data.manifest.splits["train"].shards[0]
    shard = data.data_shard(record)
    rows = torch.from_numpy(shard.inputs[:_SAMPLE_ROWS].copy())  # the shard is mapped read-only
    rows = rows.to(device)
    draft, network, notes = _opened(config, draft, folder)
    members = []
    for (key, asked), member, module in zip(keyed(config), draft.members, network.to(device).members, strict=True):
        output = _sampled(module, rows, key)
        width = output.shape[1]
        if member.order is None or asked.classes is not None:
            _check_width(asked, width, data.manifest.class_names, key)
        kind = _kind(output, asked, shard.row_ids, key)
        _require_same(module, rows, output, kind, key)
        if kind != "logits":
            notes.append(f"{asked.checkpoint}: its outputs are {kind.replace('_', '-')} ({len(rows)} rows looked at)")
        if member.order is not None and len(member.order) < width:
            notes.append(f"{asked.checkpoint}: {width - len(member.order)} of its {width} classes are not in the data")
        order = None if member.order == tuple(range(width)) else member.order
        members.append(member.model_copy(update={"output": kind, "order": order}))
    return draft.model_copy(update={"members": tuple(members)}), notes


def _opened(config: Config, draft: Any, folder: Folder) -> tuple[Any, Any, list[str]]:
    """``draft`` and its networks, where programs that take integers get the numbers of the rows as they are, unless
    the config says others; and what there is to tell of it."""
    from distill_ray.models import formats
    from distill_ray.models.given import RAW

    network = draft.open(folder)
    members, notes = [], []
    for (key, asked), member, module in zip(keyed(config), draft.members, network.members, strict=True):
        contract = member.input
        if (dtype := formats.integers_of(module.net)) is not None:
            wish = asked.input or TeacherInputWish()
            contract = wish.settled(RAW)
            name = str(dtype).removeprefix("torch.")
            if wish.scale is None and draft.dtype.startswith("float"):
                raise UserError(
                    f"{key}.input.scale: {asked.checkpoint} takes {name} numbers, and the data has {draft.dtype}: say "
                    "the scale that makes such of them"
                )
            if None in (wish.scale, wish.mean, wish.std):
                notes.append(f"{asked.checkpoint}: takes {name} numbers, those of the rows as they are")
        members.append(member.model_copy(update={"input": contract}))
    if tuple(members) == draft.members:
        return draft, network, notes
    draft = draft.model_copy(update={"members": tuple(members)})
    return draft, draft.open(folder), notes


def _require_same(module: Any, rows: Any, output: Any, kind: str, key: str) -> None:
    """Refuse a network that answers a row by chance, or by the rows beside it: few of them run again together.

    Probabilities are compared as such: their logarithms differ much where they hardly differ.
    """
    import torch

    parts = max(2, len(rows) // _COMPANY_ROWS) if len(rows) > 3 else 1
    again = torch.empty_like(output)
    for part in range(parts):
        again[part::parts] = _sampled(module, rows[part::parts], key)
    if kind == "log_probabilities":
        output, again = output.exp(), again.exp()
    spread = (output - output.mean(dim=0)).double().square().mean().sqrt()
    least = _COMPANY_LEAST * output.double().abs().max() + torch.finfo(torch.float32).tiny
    share = float((again - output).double().square().mean().sqrt() / torch.maximum(spread, least))
    if not share <= _COMPANY_SLACK:
        raise UserError(
            f"{key}: its answer for a row depends on chance or on the rows beside it (run again in other company the "
            f"answers differ by {share:.0%} of their spread), as with dropout or batch norm in train mode, or dynamic "
            "quantization: call eval() before the network is traced or exported"
        )


def _sampled(module: Any, rows: Any, key: str) -> Any:
    """Raw outputs [B, W] of the sample."""
    import torch
    from torch import Tensor

    try:
        with torch.inference_mode():
            output = module.raw_output(rows)
    except UserError:
        raise
    except Exception as error:  # whatever the network's own code raises
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{key}: it fails on rows of shape {list(rows.shape[1:])}: {type(error).__name__}: {reason}: check "
            f"{key}.input, and that it takes any number of rows"
        ) from error
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(rows):
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UserError(f"{key}: returns {got} for {len(rows)} rows, expected logits [rows, classes]")
    return output.float().cpu()


def _check_width(asked: GivenTeacher, width: int, class_names: Sequence[str], key: str) -> None:
    from distill_ray.models.given import class_order

    class_order(asked.classes, width, class_names, key)


def _kind(output: Any, asked: GivenTeacher, row_ids: Any, key: str) -> str:
    import torch

    from distill_ray.models.given import check_kind, recognise, unclear, usable

    bad = torch.nonzero(~usable(output, asked.output))
    if len(bad):
        raise RunError(
            f"{key}: gives a number that is not finite for row {int(row_ids[int(bad[0])])} "
            f"({len(bad)} of {len(output)} rows): its weights are bad, or its input overflows: check teacher.input"
        )
    if asked.output == "auto":
        if (doubt := unclear(output)) is not None:
            raise UserError(f"{key}.output: {doubt}")
        return recognise(output)
    wrong = check_kind(output, asked.output)
    if wrong is not None:
        total = float((output[wrong] if asked.output == "probabilities" else output[wrong].exp()).sum())
        raise UserError(
            f"{key}.output {asked.output}: row {int(row_ids[wrong])} is none: it sums to {total:.4g}, from "
            f"{float(output[wrong].min()):.4g} to {float(output[wrong].max()):.4g}: set it to auto or logits"
        )
    return asked.output


def measure(config: Config, spec: Any, folder: Folder, data: Store, device: Any, text: bytes) -> dict[str, Any]:
    """The content of summary.json; ``text`` is that of model.json, whose checksum is that of the teacher."""
    import torch

    from distill_ray import inference, metrics
    from distill_ray.models import GivenNet, load_model
    from distill_ray.models.classifier import count_parameters
    from distill_ray.models.formats import ExportedNet

    sha256 = hashlib.sha256(text).hexdigest()
    model = load_model(folder, expected_sha256=sha256, allow_import=True).to(device)  # the command asked for it
    batch = config.labels.batch_size
    quality = metrics.evaluate(model, read_shards(data, "test"), batch, "fp32", device)
    one_row = torch.from_numpy(next(read_shards(data, "test")).inputs[:1].copy())
    unknown = any(member.format == "onnx" for member in spec.members)
    with _one_thread():  # a session of onnxruntime has for good as many as torch had when it was loaded
        alone = load_model(folder, expected_sha256=sha256, allow_import=True).to(device) if unknown else model
        latency = inference.latency_ms(alone, one_row, device)
    held = {member.file: {"bytes": member.bytes, "sha256": member.sha256} for member in spec.members}
    held[SPEC_FILE] = {"bytes": len(text), "sha256": sha256}
    assert isinstance(model, GivenNet)
    programs = [module for module in model.modules() if isinstance(module, ExportedNet)]
    parameters = count_parameters(model) + sum(program.parameter_count for program in programs)
    return {
        **quality, "parameters": None if unknown else parameters,
        "bytes": sum(member.bytes for member in spec.members), "latency_ms": latency,
        "latency_of": f"1 row, fp32, 1 thread, {device.type}", "seconds": None,
        "test_rows": data.manifest.splits["test"].rows, "weights_sha256": sha256, "precision": "fp32",
        "data_digest": data.manifest.digest, "files": held, "measured": measured(model, data, quality, batch, device),
        "given": [
            {"checkpoint": asked.checkpoint, "format": member.format, "output": member.output}
            for asked, member in zip(config.teacher.given, spec.members, strict=True)
        ],
    }  # fmt: skip


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measured(model: Any, data: Store, quality: dict[str, Any], batch: int, device: Any) -> dict[str, Any]:
    """Accuracy on labelled rows: the test split's, or else some of another split's, and the largest class's share."""
    import numpy as np

    from distill_ray import metrics

    for split in ("test", "validation", "train"):
        labels, parts = [], []
        for part in read_shards(data, split):
            labelled = part.labels >= 0
            if labelled.any():
                labels.append(part.labels[labelled])
                if split != "test":  # which is measured already
                    parts.append(SplitArrays(part.row_ids[labelled], part.inputs[labelled], labels[-1], None))
            if split != "test" and sum(map(len, labels)) >= _MEASURED_ROWS:
                break
        if labels:
            known = metrics.evaluate(model, parts, batch, "fp32", device) if parts else quality
            counts = np.bincount(np.concatenate(labels))
            rows, majority = int(counts.sum()), float(counts.max() / counts.sum())
            return {"accuracy": known["accuracy"], "rows": rows, "split": split, "majority": majority}
    return {"accuracy": None, "rows": 0, "split": None, "majority": None}
