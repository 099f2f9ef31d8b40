"""Which trials are stopped early: Ray Tune's ASHA, among those that compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from distill_ray.stages.search_space import METRIC

# A rung at a quarter and at half of the epochs, half of the trials cut at each: with Ray's default of 4 a search of 24
# trials would end with 1 or 2 whole ones, which is no front.
_ASHA_FIRST_RUNG, _ASHA_REDUCTION = 4, 2


def size_class(parameters: int | None) -> int:
    """Equal for networks within a factor of two of each other; -1 for what is no network."""
    return -1 if not parameters else int(math.log2(parameters))


def asha_within(epochs: int, group_of: Callable[[Mapping[str, Any]], Any]) -> Any:
    """ASHA among the trials of a group: students of about one size, or the controls of one finalist.

    Among all of them it would stop the small ones: they are less accurate than large ones after any number of epochs,
    and yet the front needs them. The first of a group to reach a rung goes on, so that each group has a whole trial. A
    class in a function, since its base is ray's and ray is imported late.
    """
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    def asha() -> Any:
        return ASHAScheduler(
            time_attr="epoch", metric=METRIC, mode="max", max_t=epochs, reduction_factor=_ASHA_REDUCTION,
            grace_period=-(-epochs // _ASHA_FIRST_RUNG), stop_last_trials=False,
        )  # fmt: skip

    class Within(FIFOScheduler):  # type: ignore[misc]
        _metric = METRIC

        def __init__(self) -> None:
            super().__init__()
            self._of_group: dict[Any, Any] = {}
            self._group_of: dict[str, Any] = {}

        def __reduce__(self) -> tuple[Any, tuple[()]]:
            return FIFOScheduler, ()  # Tune pickles its scheduler for a restore that never happens here

        def _asha(self, trial: Any) -> Any:
            if trial.trial_id not in self._group_of:
                self._group_of[trial.trial_id] = group_of(trial.config)
            return self._of_group.setdefault(self._group_of[trial.trial_id], asha())

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            self._asha(trial).on_trial_add(tune_controller, trial)

        def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
            self._asha(trial).on_trial_error(tune_controller, trial)

        def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> Any:
            return self._asha(trial).on_trial_result(tune_controller, trial, result)

        def on_trial_complete(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> None:
            self._asha(trial).on_trial_complete(tune_controller, trial, result)

        def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
            self._asha(trial).on_trial_remove(tune_controller, trial)

    return Within()
