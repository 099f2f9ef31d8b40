"""What is measured of a model, by torchmetrics; nothing here is a formula of ours."""

from __future__ import annotations

import time
from collections.abc import Iterable
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import KLDivergence, MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score

from distill_ray.inference import logits_of
from distill_ray.store.reader import SplitArrays

ECE_BINS = 15
_LATENCY_WARMUPS, _LATENCY_RUNS = 20, 200


def quality(logits_NC: Tensor, labels_N: Tensor, teacher_NC: Tensor | None) -> dict[str, float | None]:
    """Accuracy, macro F1, cross-entropy and calibration on the labelled rows; KL and agreement with the teacher on all.

    ``kl_to_teacher`` is KL(teacher || model) in nats at temperature 1; ``ece`` has 15 bins.
    """
    classes = logits_NC.shape[1]
    labelled = labels_N >= 0
    known, targets = logits_NC[labelled], labels_N[labelled]
    result: dict[str, float | None] = {"accuracy": None, "macro_f1": None, "ce": None, "ece": None}
    if len(targets):
        result["accuracy"] = float(MulticlassAccuracy(classes, average="micro", sync_on_compute=False)(known, targets))
        result["macro_f1"] = float(MulticlassF1Score(classes, average="macro", sync_on_compute=False)(known, targets))
        result["ce"] = float(F.cross_entropy(known, targets))
        ece = MulticlassCalibrationError(classes, n_bins=ECE_BINS, sync_on_compute=False)
        result["ece"] = float(ece(known.softmax(dim=1), targets))
    result.update(kl_to_teacher=None, agreement=None)
    if teacher_NC is not None:
        teacher_log, model_log = teacher_NC.float().log_softmax(dim=1), logits_NC.log_softmax(dim=1)
        result["kl_to_teacher"] = max(
            0.0, float(KLDivergence(log_prob=True, sync_on_compute=False)(teacher_log, model_log))
        )
        agreement = MulticlassAccuracy(classes, average="micro", sync_on_compute=False)
        result["agreement"] = float(agreement(logits_NC, teacher_NC.argmax(dim=1)))
    return result


class ValidationMetrics:
    """Accuracy and cross-entropy over batches; under data parallelism all workers get the whole.

    Where no row has a label, agreement with the teacher and KL(teacher || model) at temperature 1 take their place.
    """

    def __init__(self, classes: int, device: torch.device, world_size: int) -> None:
        sync = world_size > 1
        self._accuracy = MulticlassAccuracy(classes, average="micro", ignore_index=-1, sync_on_compute=sync).to(device)
        self._ce = MeanMetric(sync_on_compute=sync).to(device)
        self._labelled = SumMetric(sync_on_compute=sync).to(device)
        self._agreement = MulticlassAccuracy(classes, average="micro", sync_on_compute=sync).to(device)
        self._kl = MeanMetric(sync_on_compute=sync).to(device)

    def update(self, logits_BC: Tensor, labels_B: Tensor, teacher_BC: Tensor | None) -> None:
        """Add a batch; unlabelled rows (-1) count for what is measured against the teacher alone."""
        known = labels_B >= 0
        self._labelled.update(known.sum())
        if teacher_BC is not None:
            self._agreement.update(logits_BC, teacher_BC.argmax(dim=1))
            teacher_log, model_log = teacher_BC.float().log_softmax(dim=1), logits_BC.log_softmax(dim=1)
            self._kl.update(F.kl_div(model_log, teacher_log, reduction="none", log_target=True).sum(dim=1))
        self._accuracy.update(logits_BC, labels_B)
        losses_B = F.cross_entropy(logits_BC, labels_B, ignore_index=-1, reduction="none")
        self._ce.update(losses_B[known])

    def compute(self) -> dict[str, float]:
        """Over all rows of all workers."""
        if not float(self._labelled.compute()):
            return {
                "validation_agreement": float(self._agreement.compute()),
                "validation_kl": float(self._kl.compute()),
            }
        return {"validation_accuracy": float(self._accuracy.compute()), "validation_ce": float(self._ce.compute())}


def evaluate(
    model: nn.Module, parts: Iterable[SplitArrays], batch_size: int, precision: str, device: torch.device
) -> dict[str, float | None]:
    """``quality`` of ``model`` on a split that comes in parts; against its stored teacher logits where it has them.

    The inputs of one part are in memory at a time; logits and labels of all rows are.
    """
    logits, labels, teacher = [], [], []
    for part in parts:
        inputs = torch.from_numpy(np.require(part.inputs, requirements="W"))  # a copy where it is mapped read-only
        logits.append(logits_of(model, inputs, batch_size, precision, device))
        labels.append(torch.from_numpy(np.array(part.labels)))
        if part.logits is not None:
            teacher.append(torch.from_numpy(np.array(part.logits)))
    return quality(torch.cat(logits), torch.cat(labels), torch.cat(teacher) if teacher else None)


@torch.inference_mode()
def latency_ms(model: nn.Module, example: Tensor, device: torch.device) -> float:
    """Median time of one row's forward pass in fp32, on one thread. ``example`` is [1, *shape]."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model.eval()
    example = example.to(device)
    times = []
    try:
        for _ in range(_LATENCY_WARMUPS + _LATENCY_RUNS):
            start = time.perf_counter()
            model(example)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return median(times[_LATENCY_WARMUPS:]) * 1000
