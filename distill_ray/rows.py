"""Batches for training and evaluation, from arrays in memory or from the shards of the stores.

Shapes: B rows of this worker's part of a global batch, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from distill_ray import order
from distill_ray.losses import UNLABELLED, Share
from distill_ray.order import Piece, Window
from distill_ray.store import SplitArrays, StoredSplit


@dataclass(frozen=True)
class Batch:
    """This worker's part of a global batch: raw ``inputs`` [B, *shape], ``labels``, ``logits``; and the whole's size.

    Where the worker has no rows in it (``empty``), B is 1 and the row must not count.
    """

    inputs: Tensor
    labels: Tensor
    logits: Tensor | None
    share: Share
    empty: bool


class Rows:
    """A split, batch by batch: all of it in memory, or a window at a time."""

    def __init__(self, split: SplitArrays | StoredSplit, device: torch.device) -> None:
        self._split = split
        self._device = device
        self._shard_rows = [len(split)] if isinstance(split, SplitArrays) else split.shard_rows
        self._window_rows = None if isinstance(split, SplitArrays) else split.window_rows
        self.count = sum(self._shard_rows)

    def shuffled(
        self, batch_size: int, seed: int, epoch: int, rank: int, world_size: int, skip: int = 0
    ) -> Iterator[Batch]:
        """The batches of a training epoch, without the first ``skip``."""
        if self._window_rows is None:
            plan = order.whole(self._shard_rows, seed, epoch)
        else:
            plan = order.windows(self._shard_rows, self._window_rows, seed, epoch)
        return self._batches(plan, batch_size, rank, world_size, skip)

    def in_order(self, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
        """The batches of an evaluation: every row once, whatever the number of workers."""
        return self._batches(order.in_order(self._shard_rows, self._window_rows), batch_size, rank, world_size, 0)

    def _batches(
        self, plan: Sequence[Window], batch_size: int, rank: int, world_size: int, skip: int
    ) -> Iterator[Batch]:
        with ThreadPoolExecutor(1) as pool:
            loaded = _Loaded(plan, self._load, pool)
            for number, pieces in enumerate(order.batches(plan, batch_size)):
                if number >= skip:
                    loaded.use(pieces[0].window, pieces[-1].window)
                    yield self._batch(pieces, loaded, rank, world_size)

    def _batch(self, pieces: Sequence[Piece], loaded: _Loaded, rank: int, world_size: int) -> Batch:
        labels = _joined([loaded.get(piece.window).labels[piece.index] for piece in pieces])
        share = Share(len(labels), int((labels != UNLABELLED).sum()))
        mine = order.part(pieces, rank, world_size)
        parts = [loaded.get(piece.window).pick(piece.index) for piece in mine or [_first_row(pieces)]]
        inputs, own_labels = _joined([part[0] for part in parts]), _joined([part[1] for part in parts])
        logits = [part[2] for part in parts if part[2] is not None]
        return Batch(
            self._moved(inputs), self._moved(own_labels), self._moved(_joined(logits)) if logits else None, share,
            empty=not mine,
        )  # fmt: skip

    def _moved(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _load(self, window: Window) -> _Tensors:
        return _Tensors.of(self._split if isinstance(self._split, SplitArrays) else self._split.load(window.shards))


@dataclass(frozen=True)
class _Tensors:
    inputs: Tensor
    labels: Tensor
    logits: Tensor | None

    @classmethod
    def of(cls, arrays: SplitArrays) -> _Tensors:
        logits = None if arrays.logits is None else _tensor(arrays.logits)
        return cls(_tensor(arrays.inputs), _tensor(arrays.labels), logits)

    def pick(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.inputs[index], self.labels[index], None if self.logits is None else self.logits[index]


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    """The array's own memory. Where other processes map it too it is read-only; batches are copies of its rows."""
    if not array.flags.writeable:
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
    return torch.from_numpy(array)


class _Loaded:
    """The windows in memory: those that the present batch needs, and the next, which is read meanwhile."""

    def __init__(self, plan: Sequence[Window], load: Callable[[Window], _Tensors], pool: ThreadPoolExecutor) -> None:
        self._plan, self._load, self._pool = plan, load, pool
        self._futures: dict[int, Future[_Tensors]] = {}

    def use(self, first: int, last: int) -> None:
        """The windows ``first`` to ``last`` are needed now; earlier ones no more."""
        for old in [number for number in self._futures if number < first]:
            del self._futures[old]
        for number in range(first, min(last + 2, len(self._plan))):
            if number not in self._futures:
                self._futures[number] = self._pool.submit(self._load, self._plan[number])

    def get(self, number: int) -> _Tensors:
        return self._futures[number].result()


def _first_row(pieces: Sequence[Piece]) -> Piece:
    return Piece(pieces[0].window, pieces[0].index[:1])


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
