"""What is measured between epochs: sums over the validation rows, by torch alone, on all workers together.

torchmetrics would do it, too, and is what finished models are measured by (``metrics``). Its import takes each process
that trains two seconds of a CPU, which a search of short trials cannot spare.

Shapes: B rows of this worker's part of a batch, C classes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class ValidationMetrics:
    """Accuracy and cross-entropy over batches; under data parallelism all workers get the whole.

    Where no row has a label, agreement with the teacher and KL(teacher || model) at temperature 1 take their place.
    """

    def __init__(self, device: torch.device, world_size: int) -> None:
        self._world_size = world_size
        # Rows, labelled rows, right ones, cross-entropy; and of rows with a teacher's logits: agreement, KL.
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)

    def update(self, logits_BC: Tensor, labels_B: Tensor, teacher_BC: Tensor | None) -> None:
        """Add a batch; unlabelled rows (-1) count for what is measured against the teacher alone."""
        chosen_B, known_B = logits_BC.argmax(dim=1), labels_B >= 0
        ce = F.cross_entropy(logits_BC, labels_B, ignore_index=-1, reduction="sum")
        agreed, kl = torch.zeros_like(ce), torch.zeros_like(ce)
        if teacher_BC is not None:
            teacher_log, model_log = teacher_BC.float().log_softmax(dim=1), logits_BC.log_softmax(dim=1)
            agreed = (chosen_B == teacher_BC.argmax(dim=1)).sum()
            kl = F.kl_div(model_log, teacher_log, reduction="sum", log_target=True)
        rows = torch.tensor(float(len(labels_B)), device=ce.device)
        parts = (rows, known_B.sum(), (known_B & (chosen_B == labels_B)).sum(), ce, agreed, kl)
        self._sums += torch.stack([part.double() for part in parts])

    def compute(self) -> dict[str, float]:
        """Over all rows of all workers."""
        sums = self._sums.clone()
        if self._world_size > 1:
            dist.all_reduce(sums)
        rows, labelled, right, ce, agreed, kl = sums.tolist()
        if not labelled:
            return {"validation_agreement": agreed / rows, "validation_kl": kl / rows}
        return {"validation_accuracy": right / labelled, "validation_ce": ce / labelled}
