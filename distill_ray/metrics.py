"""What is measured of a finished model, by torchmetrics; nothing here is a formula of ours.

torchmetrics brings matplotlib, SciPy and transformers where they are installed and takes longer to import than torch:
what trains does without this module.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import KLDivergence
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score

from distill_ray.inference import logits_of
from distill_ray.store.reader import SplitArrays

ECE_BINS = 15


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
