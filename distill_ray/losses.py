"""Distillation losses: pure functions, logits in, scalars out.

Shapes: B batch, C classes. Every loss is computed in float32 whatever the autocast dtype. Its terms are means over rows
of sums over classes: CE over the labelled rows, KL over all of them.

A batch may be one part of a larger one, on another worker or in another accumulation step. Then :class:`Share` says how
many rows the larger one has, and the parts' losses add up to its loss exactly, also where the parts differ in size or
in how many of their rows are labelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_ray.config import CeLoss, KdLoss
from distill_ray.errors import UserError

UNLABELLED = -1


@dataclass(frozen=True)
class Share:
    """The batch that the rows at hand are a part of: its ``rows`` and how many of them are ``labelled``."""

    rows: int
    labelled: int


@dataclass(frozen=True)
class LossTerms:
    """``total`` is what is minimised; ``ce`` and ``kd`` are its unweighted parts, for logging."""

    total: Tensor
    ce: Tensor
    kd: Tensor

    def plus(self, other: LossTerms) -> LossTerms:
        """The terms of two parts of one batch, for logging: detached."""
        pairs = ((self.total, other.total), (self.ce, other.ce), (self.kd, other.kd))
        return LossTerms(*(one.detach() + two.detach() for one, two in pairs))


def balanced_weights(rows_C: Sequence[int]) -> tuple[float, ...]:
    """Weights under which every class has the same part in the loss, and a row's weight is 1 on average.

    ``rows_C`` are the labelled rows of each class; a class without rows weighs nothing. The usual inverse frequency,
    ``N / (classes with rows * rows of the class)`` (King, Zeng 2001, "Logistic regression in rare events data").
    """
    present = sum(rows > 0 for rows in rows_C)
    return tuple(sum(rows_C) / (present * rows) if rows else 0.0 for rows in rows_C)


def ce(student_BC: Tensor, labels_B: Tensor, share: Share | None = None, weights_C: Tensor | None = None) -> Tensor:
    """Cross-entropy with the hard labels, a mean over the labelled rows; 0 where no row is labelled.

    With ``weights_C`` each row counts by the weight of its class. The sum is divided by the number of labelled rows,
    not by their weights: so the parts of a batch add up, and the mean over batches is that over the data.
    """
    total = F.cross_entropy(student_BC.float(), labels_B, weights_C, ignore_index=UNLABELLED, reduction="sum")
    if share is not None:
        return total / max(1, share.labelled)
    return total / (labels_B != UNLABELLED).sum().clamp(min=1)


def soft_kl(student_BC: Tensor, teacher_BC: Tensor, temperature: float, share: Share | None = None) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))``.

    Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2. Gradients of the softened term shrink with 1/T^2; the
    factor T^2 keeps its weight beside the hard labels independent of the temperature.
    """
    log_student_BC = F.log_softmax(student_BC.float() / temperature, dim=1)
    log_teacher_BC = F.log_softmax(teacher_BC.float() / temperature, dim=1)
    total = F.kl_div(log_student_BC, log_teacher_BC, reduction="sum", log_target=True)
    return total / (len(student_BC) if share is None else share.rows) * temperature**2


def kd(
    student_BC: Tensor,
    teacher_BC: Tensor,
    labels_B: Tensor,
    *,
    temperature: float,
    alpha: float,
    share: Share | None = None,
    weights_C: Tensor | None = None,
) -> LossTerms:
    """``alpha * T^2 * KL(teacher_T || student_T) + (1 - alpha) * CE`` (Hinton, Vinyals, Dean 2015, section 2)."""
    soft, hard = soft_kl(student_BC, teacher_BC, temperature, share), ce(student_BC, labels_B, share, weights_C)
    return LossTerms(alpha * soft + (1 - alpha) * hard, hard, soft)


def compute(
    loss: CeLoss | KdLoss,
    student_BC: Tensor,
    labels_B: Tensor,
    teacher_BC: Tensor | None,
    share: Share | None = None,
    weights_C: Tensor | None = None,
) -> LossTerms:
    """The loss that the config names; with ``share``, this part's contribution to the loss of the larger batch.

    ``weights_C`` are the classes' weights in its CE term.

    Raises:
        UserError: the loss needs teacher logits and there are none.
    """
    if isinstance(loss, KdLoss):
        if teacher_BC is None:
            raise UserError("student.loss.name kd: needs a teacher's labels")
        return kd(
            student_BC, teacher_BC, labels_B, temperature=loss.temperature, alpha=loss.alpha, share=share,
            weights_C=weights_C,
        )  # fmt: skip
    hard = ce(student_BC, labels_B, share, weights_C)
    return LossTerms(hard, hard, torch.zeros_like(hard))
