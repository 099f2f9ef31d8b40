"""What is measured between epochs, beside torchmetrics on the same rows."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torchmetrics import KLDivergence
from torchmetrics.classification import MulticlassAccuracy

from distill_ray.validation import ValidationMetrics
from tests.harness import environment

CLASSES = 7


def batches(*, labelled: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of different sizes; a part of the labels, or all, are missing."""
    random = torch.Generator().manual_seed(0)
    found = []
    for rows in (16, 5, 1):
        logits, teacher = (3 * torch.randn(rows, CLASSES, generator=random) for _ in range(2))
        labels = torch.randint(0, CLASSES, (rows,), generator=random)
        missing = torch.rand(rows, generator=random) < 0.4
        labels[missing if labelled else torch.full((rows,), True)] = -1
        found.append((logits, labels, teacher.half()))
    return found


def measured(parts: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
    metrics = ValidationMetrics(torch.device("cpu"), 1)
    for part in parts:
        metrics.update(*part)
    return metrics.compute()


def test_accuracy_and_cross_entropy_are_over_the_labelled_rows() -> None:
    parts = batches(labelled=True)
    logits, labels, _ = (torch.cat(column) for column in zip(*parts, strict=True))
    known = labels >= 0
    assert 0 < known.sum() < len(labels)
    accuracy = MulticlassAccuracy(CLASSES, average="micro", ignore_index=-1)(logits, labels)
    ce = torch.nn.functional.cross_entropy(logits[known].double(), labels[known])
    assert measured(parts) == pytest.approx(
        {"validation_accuracy": float(accuracy), "validation_ce": float(ce)}, rel=1e-6
    )


def test_without_labels_the_teacher_is_what_is_compared_with() -> None:
    parts = batches(labelled=False)
    logits, _, teacher = (torch.cat(column).float() for column in zip(*parts, strict=True))
    agreement = MulticlassAccuracy(CLASSES, average="micro")(logits, teacher.argmax(1))
    kl = KLDivergence(log_prob=True)(teacher.log_softmax(1), logits.log_softmax(1))
    assert measured(parts) == pytest.approx(
        {"validation_agreement": float(agreement), "validation_kl": float(kl)}, rel=1e-5
    )


def test_what_trains_does_not_import_what_measures() -> None:
    """torchmetrics and what it brings would cost each process that trains two seconds."""
    code = (
        "import sys, distill_ray.training, distill_ray.stages.model_folder; "
        "print([m for m in ('torchmetrics', 'matplotlib', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.strip() == "[]"
