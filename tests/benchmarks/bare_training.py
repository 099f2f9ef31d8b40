"""The references of training: plain PyTorch loops over arrays in memory, as fast as an engineer would write them.

The network and the batch size are the product's, nothing else of it is used. Autocast in the product's precision,
inputs are channels_last, malloc keeps what is freed, batches are taken by index from a permutation. There are no
checkpoints, no metrics but the accuracy on the validation rows, no files.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.benchmarks.bare import TIMEOUT_S, Layout, keep_freed_memory, layouts

_WARM_UP_BATCHES = 4


@dataclass(frozen=True)
class Training:
    """What is trained: the network of a model folder, on arrays saved with numpy.

    ``inputs`` [N, *shape] bytes, ``labels`` int64 [N], ``logits`` float16 [N, C] or None; the last ``held_out`` rows
    are validated after each epoch. ``teacher`` is the folder of one that labels every batch in the loop, in fp32.
    """

    model: Path
    inputs: Path
    labels: Path
    held_out: int
    batch_size: int
    epochs: int
    precision: str
    logits: Path | None = None
    teacher: Path | None = None
    temperature: float = 2.0
    alpha: float = 0.9
    plain: bool = False  # as scripts commonly are: fp32, contiguous memory, malloc as it comes

    @property
    def rows(self) -> int:
        """Rows that are trained on in one epoch."""
        return len(np.load(self.inputs, mmap_mode="r")) - self.held_out


def data_parallel_rows_per_s(work: Training) -> float:
    """Training rows/s, validation's time included, of the best layout: one process, or one a CPU with gradients
    averaged by DistributedDataParallel."""
    return max(work.rows * work.epochs / _span(_run([work] * layout.processes, layout)) for layout in layouts())


def side_by_side_rows_per_s(works: Sequence[Training]) -> float:
    """Training rows/s of several models together, of the best layout: each with its share of the CPUs at the same time,
    or one after another with all of them."""
    alone, together = layouts()[0], Layout(len(works), max(1, layouts()[0].threads // len(works)))
    one_by_one = sum(_span(_run([work], alone)) for work in works)
    at_once = _span(_run(works, together, independent=True))
    return sum(work.rows * work.epochs for work in works) / min(one_by_one, at_once)


def many_rows_per_s(works: Sequence[Training], layout: Layout) -> float:
    """Training rows/s of many models on the same rows: each process takes a further model when it is done with one."""
    return sum(work.rows * work.epochs for work in works) / _span(_run_queue(works, layout))


def rows_per_s(work: Training) -> float:
    """Training rows/s of one process with all CPUs."""
    return work.rows * work.epochs / _span(_run([work], layouts()[0]))


def _span(times: Sequence[tuple[float, float]]) -> float:
    return max(end for _, end in times) - min(start for start, _ in times)


def _run(works: Sequence[Training], layout: Layout, *, independent: bool = False) -> list[tuple[float, float]]:
    """A process for each of ``works``; without ``independent`` they are the ranks of one training."""
    port = 0 if independent or len(works) == 1 else _free_port()
    return _timed(_work, [(work, rank, len(works), layout.threads, port) for rank, work in enumerate(works)])


def _run_queue(works: Sequence[Training], layout: Layout) -> list[tuple[float, float]]:
    """As many processes as the layout has, and no more than there are works."""
    taken = multiprocessing.get_context("spawn").Value("i", 0)
    return _timed(_work_queue, [(works, layout.threads, taken)] * min(layout.processes, len(works)))


def _timed(target: Callable[..., None], shares: Sequence[tuple[Any, ...]]) -> list[tuple[float, float]]:
    """Start and end of each process's loops; all have their rows in memory and are warm when they start together."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(shares))
    times: Queue[tuple[float, float]] = context.Queue()
    processes = [context.Process(target=target, args=(*share, barrier, times), daemon=True) for share in shares]
    for process in processes:
        process.start()
    found = [times.get(timeout=TIMEOUT_S) for _ in processes]
    for process in processes:
        process.join()
    return found


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _work(
    work: Training, rank: int, count: int, threads: int, port: int, barrier: Barrier, times: Queue[tuple[float, float]]
) -> None:
    if not work.plain:
        keep_freed_memory()
    torch.set_num_threads(threads)
    world_size = count if port else 1
    if port:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    loop = _Loop(work, rank if port else 0, world_size)
    loop.warm_up()
    barrier.wait(TIMEOUT_S)
    began = perf_counter()  # CLOCK_MONOTONIC: the same clock in every process
    loop.run()
    times.put((began, perf_counter()))
    if port:
        dist.destroy_process_group()


def _work_queue(
    works: Sequence[Training], threads: int, taken: Synchronized[int], barrier: Barrier,
    times: Queue[tuple[float, float]],
) -> None:  # fmt: skip
    keep_freed_memory()
    torch.set_num_threads(threads)
    _Loop(works[0], 0, 1).warm_up()
    barrier.wait(TIMEOUT_S)
    began = perf_counter()
    while (number := _next(taken)) < len(works):
        _Loop(works[number], 0, 1).run()
    times.put((began, perf_counter()))


def _next(taken: Synchronized[int]) -> int:
    with taken.get_lock():
        taken.value += 1
        return taken.value - 1


class _Loop:
    def __init__(self, work: Training, rank: int, world_size: int) -> None:
        from distill_ray.models import load_classifier

        self.work, self.rank, self.world_size = work, rank, world_size
        self.format = torch.contiguous_format if work.plain else torch.channels_last
        model = load_classifier(str(work.model)).to(memory_format=self.format)  # type: ignore[call-overload]
        self.net, self.multiplier, self.offset = model.net.train(), model.multiplier, model.offset
        self.model: nn.Module = DistributedDataParallel(self.net) if world_size > 1 else self.net
        self.inputs, self.labels = _tensor(work.inputs), _tensor(work.labels)
        self.logits = None if work.logits is None else _tensor(work.logits)
        self.teacher: nn.Module | None = None if work.teacher is None else load_classifier(str(work.teacher)).net.eval()
        if self.teacher is not None:
            self.teacher = self.teacher.to(memory_format=self.format)  # type: ignore[call-overload]
        self.rows = torch.arange(work.rows)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3, weight_decay=0.01, fused=not work.plain)

    def warm_up(self) -> None:
        self.train(self.rows[: _WARM_UP_BATCHES * self.work.batch_size])

    def run(self) -> None:
        for _ in range(self.work.epochs):
            self.train(self.rows[torch.randperm(len(self.rows))])
            self.validate()

    def train(self, order: Tensor) -> None:
        step = self.work.batch_size
        for start in range(0, len(order), step):
            index = order[start + self.rank : start + step : self.world_size]
            x, labels = self._x(index), self.labels[index]
            self.optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                student = self.model(x.contiguous(memory_format=self.format))
            loss = self._loss(student.float(), labels, self._teacher_logits(index, x))
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()

    @torch.no_grad()
    def validate(self) -> float:
        self.net.eval()
        right = 0
        held_out = torch.arange(self.work.rows, len(self.inputs))[self.rank :: self.world_size]
        for index in torch.split(held_out, self.work.batch_size):
            with self._autocast():
                logits = self.net(self._x(index).contiguous(memory_format=self.format))
            right += int((logits.argmax(1) == self.labels[index]).sum())
        self.net.train()
        return right / max(1, len(held_out))

    def _x(self, index: Tensor) -> Tensor:
        x: Tensor = self.inputs[index].to(torch.float32) * self.multiplier - self.offset
        return x

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.work.precision == "bf16" and not self.work.plain)

    def _teacher_logits(self, index: Tensor, x: Tensor) -> Tensor | None:
        if self.teacher is not None:
            with torch.no_grad():
                logits: Tensor = self.teacher(x)
            return logits
        return None if self.logits is None else self.logits[index].float()

    def _loss(self, student: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        ce = F.cross_entropy(student, labels)
        if teacher is None:
            return ce
        t, alpha = self.work.temperature, self.work.alpha
        soft = F.kl_div(
            (student / t).log_softmax(1), (teacher / t).log_softmax(1), log_target=True, reduction="batchmean"
        )
        return alpha * t * t * soft + (1 - alpha) * ce


@cache  # loops that follow one another in a process share their rows
def _tensor(path: Path) -> Tensor:
    values: Tensor = torch.from_numpy(np.load(path))
    return values
