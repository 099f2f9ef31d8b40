"""A finished run without Ray: every stage's folder filled by the plain code that the stages place on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill_ray.artifacts import Stage
from distill_ray.config import CeLoss, Config, Glyph62Data, KdLoss, TrainConfig, from_dict, to_dict
from distill_ray.console import Reporter
from distill_ray.inference import logits_of
from distill_ray.models import ModelSpec, load_model
from distill_ray.runtime import Session
from distill_ray.sources import open_source
from distill_ray.stages import label, model_folder, prepare, student, teacher
from distill_ray.stages.context import Context
from distill_ray.storage import Folder
from distill_ray.store import DataManifest, LabelManifest, ShardRecord, Store, open_store, read_split, shards
from distill_ray.store import manifest as manifests
from distill_ray.tracking import Tracker
from distill_ray.training import FitSpec, Worker, fit

SEEDS = (0, 1)
RUN: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": "glyph62", "rows": 310},
    "teacher": {
        "model": {"name": "char_cnn", "channels": [4], "hidden": [16]},
        "train": {"epochs": 2, "batch_size": 64, "precision": "fp32"},
    },
    "labels": {"precision": "fp32"},
    "student": {
        "model": {"name": "char_cnn", "channels": [2, 3], "hidden": [8]},
        "train": {"epochs": 3, "batch_size": 64, "precision": "fp32"},
        "seeds": list(SEEDS),
    },
    "tracking": {"wandb": {"mode": "disabled"}},
}
PRECISION_CHECK = {"rows": 248.0, "top1_agreement": 0.875, "kl": 0.00123, "max_abs_difference": 0.0456}
_CPU = torch.device("cpu")


def context_of(out: Folder | Path, config: Config | None = None) -> Context:
    """A context as the command makes it; its Ray session is never started by what is tested here."""
    config = config or from_dict(RUN)
    folder = out if isinstance(out, Folder) else Folder.at(out)
    tracker = Tracker(config.tracking.wandb, config.name, Path("unused"), lambda text: None)
    return Context(config, folder, Reporter(quiet=True), Session(config, folder), tracker)


def finish_run(out: Path) -> Context:
    """Fill the folders of every stage of RUN; returns a fresh context that finds them all finished."""
    config, folder = from_dict(RUN), Folder.at(out)
    data = prepare.locate(config, folder)
    store = _write_data(config, data)
    model = teacher.locate(config, folder, data)
    _train(config.teacher.train, CeLoss(name="ce"), 0, model, store, None, _spec(store, config.teacher.model))
    labels = label.locate(config, folder, data, model)
    twins = _write_labels(store, model, labels)
    spec = _spec(store, config.student.model)
    for wanted in student.students_of(config, folder, data, labels):
        _train(config.student.train, wanted.loss, wanted.seed, wanted.stage, store, twins, spec)
    return context_of(folder, config)


def _spec(store: Store, model: Any) -> ModelSpec:
    return model_folder.model_spec(store.data_manifest, model)


def _write_data(config: Config, target: Stage) -> Store:
    assert isinstance(config.data, Glyph62Data)
    source = open_source(config.data)
    info = source.info()
    records: list[ShardRecord] = []
    for split, rows in info.splits.items():
        examples = source.read(rows)
        batch = shards.encode_data(rows.astype(np.int64), examples.inputs, examples.labels, examples.source_ids)
        records.append(shards.write(target.folder, split, 0, batch, store=target.digest))
    manifest = DataManifest(
        digest=target.digest, code_version="0", classes=len(info.class_names), class_names=info.class_names,
        splits=manifests.split_records(records), source=config.data.source, synthetic=info.synthetic,
        shape=info.shape, dtype=info.dtype, input=config.data.input, config=to_dict(config.data),
    )  # fmt: skip
    manifests.write(target.folder, manifest)
    return open_store(target.folder)


def _write_labels(data: Store, model: Stage, target: Stage) -> Store:
    network = load_model(model.folder)
    records: list[ShardRecord] = []
    for record in data.manifest.shards:
        rows = data.data_shard(record)
        logits = logits_of(network, torch.from_numpy(rows.inputs.copy()), 128, "fp32", _CPU)
        batch = shards.encode_logits(rows.row_ids, logits.numpy(), precision="fp32")
        records.append(shards.write(target.folder, record.split, record.index, batch, store=target.digest))
    manifest = LabelManifest(
        digest=target.digest, code_version="0", classes=data.manifest.classes, class_names=data.manifest.class_names,
        splits=manifests.split_records(records), data_digest=data.manifest.digest, teacher_digest=model.digest,
        teacher_weights_sha256=label.weights_sha256(model), precision="fp32", precision_check=PRECISION_CHECK,
    )  # fmt: skip
    manifests.write(target.folder, manifest)
    return open_store(target.folder)


def _train(
    train: TrainConfig,
    loss: CeLoss | KdLoss,
    seed: int,
    target: Stage,
    data: Store,
    labels: Store | None,
    model: ModelSpec,
) -> None:
    splits = {name: read_split(data, name, labels) for name in data.manifest.splits}
    result = fit(
        FitSpec(model, train, loss, seed, "fp32"), splits["train"], splits["validation"], target.folder, Worker()
    )
    assert result is not None
    extra = {"data_digest": data.manifest.digest, "teacher_digest": labels and labels.label_manifest.teacher_digest}
    model_folder.finish(target.folder, model, result, data, labels, _CPU, extra)
