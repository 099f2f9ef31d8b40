"""Distillation losses: pure functions, logits in, scalars out.

Shapes: B batch, C classes. Every loss is computed in float32 whatever the autocast dtype, and is a mean over the batch
of sums over the classes ("batchmean").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill_ray.config import CeLoss, KdLoss
from distill_ray.errors import UserError

UNLABELLED = -1


@dataclass(frozen=True)
class LossTerms:
    """``total`` is what is minimised; ``ce`` and ``kd`` are its unweighted parts, for logging."""

    total: Tensor
    ce: Tensor
    kd: Tensor


def ce(student_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Cross-entropy with the hard labels, a mean over the labelled rows; 0 where no row is labelled."""
    losses_B = F.cross_entropy(student_BC.float(), labels_B, ignore_index=UNLABELLED, reduction="none")
    return losses_B.sum() / (labels_B != UNLABELLED).sum().clamp(min=1)


def soft_kl(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(softmax(teacher / T) || softmax(student / T))``.

    Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2. Gradients of the softened term shrink with 1/T^2; the
    factor T^2 keeps its weight beside the hard labels independent of the temperature.
    """
    log_student_BC = F.log_softmax(student_BC.float() / temperature, dim=1)
    log_teacher_BC = F.log_softmax(teacher_BC.float() / temperature, dim=1)
    return F.kl_div(log_student_BC, log_teacher_BC, reduction="batchmean", log_target=True) * temperature**2


def kd(student_BC: Tensor, teacher_BC: Tensor, labels_B: Tensor, *, temperature: float, alpha: float) -> LossTerms:
    """``alpha * T^2 * KL(teacher_T || student_T) + (1 - alpha) * CE`` (Hinton, Vinyals, Dean 2015, section 2)."""
    soft, hard = soft_kl(student_BC, teacher_BC, temperature), ce(student_BC, labels_B)
    return LossTerms(alpha * soft + (1 - alpha) * hard, hard, soft)


def compute(loss: CeLoss | KdLoss, student_BC: Tensor, labels_B: Tensor, teacher_BC: Tensor | None) -> LossTerms:
    """The loss that the config names.

    Raises:
        UserError: the loss needs teacher logits and there are none.
    """
    if isinstance(loss, KdLoss):
        if teacher_BC is None:
            raise UserError("student.loss.name kd: needs a teacher's labels")
        return kd(student_BC, teacher_BC, labels_B, temperature=loss.temperature, alpha=loss.alpha)
    hard = ce(student_BC, labels_B)
    return LossTerms(hard, hard, torch.zeros_like(hard))
