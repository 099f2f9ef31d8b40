"""Losses against values computed independently in float64 with numpy, and against numerical gradients."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_ray import losses
from distill_ray.config import CeLoss, KdLoss
from distill_ray.errors import UserError

Array = npt.NDArray[np.float64]
STUDENT = [[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]]
TEACHER = [[1.0, 0.0, -1.0], [-0.5, 2.5, 0.5]]
LABELS = [0, 1]


def _reference_kd(student: Array, teacher: Array, labels: list[int], t: float, alpha: float) -> float:
    def softmax(x: Array) -> Array:
        e = np.exp(x - x.max(axis=1, keepdims=True))
        return np.asarray(e / e.sum(axis=1, keepdims=True))

    p, q = softmax(teacher / t), softmax(student / t)
    kl = (p * (np.log(p) - np.log(q))).sum(axis=1).mean()
    ce = -np.log(softmax(student)[np.arange(len(labels)), labels]).mean()
    return float(alpha * t**2 * kl + (1 - alpha) * ce)


def test_golden_values() -> None:
    """Computed in float64 with math.exp and math.log from the formula of the paper, without torch."""
    terms = losses.kd(torch.tensor(STUDENT), torch.tensor(TEACHER), torch.tensor(LABELS), temperature=2.0, alpha=0.9)
    assert float(terms.ce) == pytest.approx(0.14814827, abs=1e-6)
    assert float(terms.kd) == pytest.approx(0.51431198, abs=1e-6)
    assert float(terms.total) == pytest.approx(0.9 * 0.51431198 + 0.1 * 0.14814827, abs=1e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), t=st.floats(0.5, 20), alpha=st.floats(0, 1), rows=st.integers(1, 8))
def test_kd_is_the_papers_formula(seed: int, t: float, alpha: float, rows: int) -> None:
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(0, 3, (2, rows, 5))
    labels = rng.integers(0, 5, rows).tolist()
    ours = losses.kd(torch.tensor(student), torch.tensor(teacher), torch.tensor(labels), temperature=t, alpha=alpha)
    assert float(ours.total) == pytest.approx(_reference_kd(student, teacher, labels, t, alpha), rel=1e-3, abs=1e-4)


def test_gradient_scale_does_not_depend_on_the_temperature() -> None:
    """At high T the softened gradient tends to (student - teacher) / C, both zero-mean (Hinton 2015, section 2)."""
    student = torch.tensor(STUDENT, requires_grad=True)
    losses.soft_kl(student, torch.tensor(TEACHER), 500.0).backward()  # type: ignore[no-untyped-call]
    centred = [torch.tensor(x) - torch.tensor(x).mean(dim=1, keepdim=True) for x in (STUDENT, TEACHER)]
    assert student.grad is not None
    assert torch.allclose(student.grad, (centred[0] - centred[1]) / 3 / 2, atol=2e-3)


def test_gradients_are_those_of_finite_differences() -> None:
    student = torch.tensor(STUDENT, dtype=torch.float32, requires_grad=True)
    losses.kd(student, torch.tensor(TEACHER), torch.tensor(LABELS), temperature=3.0, alpha=0.7).total.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    step = 1e-4
    for i in range(2):
        for j in range(3):
            up, down = np.array(STUDENT), np.array(STUDENT)
            up[i, j] += step
            down[i, j] -= step
            args = (np.array(TEACHER), LABELS, 3.0, 0.7)
            slope = (_reference_kd(up, *args) - _reference_kd(down, *args)) / (2 * step)
            assert float(student.grad[i, j]) == pytest.approx(slope, abs=1e-4)


def test_kd_is_zero_for_the_teacher_itself_and_ignores_the_stored_shift() -> None:
    teacher = torch.tensor(TEACHER)
    assert float(losses.soft_kl(teacher, teacher, 4.0)) == pytest.approx(0.0, abs=1e-6)
    shifted = teacher - teacher.max(dim=1, keepdim=True).values
    student = torch.tensor(STUDENT)
    assert float(losses.soft_kl(student, shifted, 4.0)) == pytest.approx(
        float(losses.soft_kl(student, teacher, 4.0)), abs=1e-5
    )


def test_computed_in_float32_under_autocast() -> None:
    student, teacher = torch.tensor(STUDENT).bfloat16(), torch.tensor(TEACHER).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = losses.kd(student, teacher, torch.tensor(LABELS), temperature=2.0, alpha=0.5)
    assert terms.total.dtype == torch.float32
    exact = losses.kd(student.float(), teacher.float(), torch.tensor(LABELS), temperature=2.0, alpha=0.5)
    assert torch.equal(terms.total, exact.total)


def test_unlabelled_rows_count_for_kd_and_not_for_ce() -> None:
    labels = torch.tensor([0, losses.UNLABELLED])
    both = losses.kd(torch.tensor(STUDENT), torch.tensor(TEACHER), labels, temperature=1.0, alpha=0.5)
    assert torch.equal(both.ce, losses.ce(torch.tensor(STUDENT[:1]), torch.tensor([0])))
    assert torch.equal(both.kd, losses.soft_kl(torch.tensor(STUDENT), torch.tensor(TEACHER), 1.0))
    assert float(losses.ce(torch.tensor(STUDENT), torch.tensor([-1, -1]))) == 0.0


def test_kd_without_a_teacher_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="kd"):
        losses.compute(KdLoss(name="kd"), torch.tensor(STUDENT), torch.tensor(LABELS), None)
    assert float(losses.compute(CeLoss(name="ce"), torch.tensor(STUDENT), torch.tensor(LABELS), None).kd) == 0.0


def test_balanced_weights_give_each_class_the_same_part() -> None:
    weights = losses.balanced_weights([90, 9, 0, 1])
    assert weights == pytest.approx((100 / 270, 100 / 27, 0.0, 100 / 3))
    assert sum(w * n for w, n in zip(weights, [90, 9, 0, 1], strict=True)) == pytest.approx(100)  # 1 a row on average


def test_weighted_ce_is_the_formula_and_its_parts_add_up() -> None:
    rng = np.random.default_rng(0)
    student, labels = rng.normal(size=(12, 3)), rng.integers(-1, 3, 12)
    weights = np.array([0.5, 1.0, 4.0])
    log_softmax = student - np.log(np.exp(student).sum(axis=1, keepdims=True))
    known = labels >= 0
    expected = -(weights[labels] * log_softmax[np.arange(12), labels])[known].sum() / known.sum()
    given = (torch.tensor(student), torch.tensor(labels))
    weights_C = torch.tensor(weights, dtype=torch.float32)
    assert float(losses.ce(*given, weights_C=weights_C)) == pytest.approx(expected, abs=1e-6)
    share = losses.Share(12, int(known.sum()))
    for loss in (CeLoss(name="ce"), KdLoss(name="kd", temperature=2.0, alpha=0.3)):
        teacher = torch.tensor(rng.normal(size=(12, 3)))
        whole = losses.compute(loss, *given, teacher, weights_C=weights_C)
        parts = [
            losses.compute(loss, given[0][part], given[1][part], teacher[part], share, weights_C)
            for part in (slice(0, 2), slice(2, 9), slice(9, 12))
        ]
        assert sum(float(part.total) for part in parts) == pytest.approx(float(whole.total), abs=1e-5)
        assert torch.equal(whole.ce, losses.ce(*given, weights_C=weights_C))
