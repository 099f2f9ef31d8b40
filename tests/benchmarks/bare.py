"""The reference of labelling: plain PyTorch loops over arrays in memory, as fast as an engineer would write them.

The network is the product's own, loaded from the same teacher folder; nothing else of it is used. The weights are
converted once (autocast would do it for every batch), inputs are channels_last, no gradients are tracked, malloc keeps
what is freed, and no file is written: what is left out here is what the product has to make up for.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_WARM_UP_BATCHES = 4
TIMEOUT_S = 3600.0  # a bound for a hang
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@dataclass(frozen=True)
class Layout:
    """How a bare loop uses the CPUs."""

    processes: int
    threads: int


@dataclass(frozen=True)
class Work:
    """What is labelled: a teacher's folder, an array file [N, 1, height, width] of which the first ``rows`` count."""

    teacher: Path
    inputs: Path
    rows: int
    classes: int
    precision: str


def layouts() -> list[Layout]:
    """One process with all CPUs, and a process for each."""
    cpus = os.cpu_count() or 1
    return [Layout(processes, threads) for processes, threads in sorted({(1, cpus), (cpus, 1)})]


def rows_per_s(work: Work, layout: Layout, batch_sizes: Sequence[int]) -> list[float]:
    """The rates of runs over all rows, one for each batch size.

    Each process has its share of the rows in memory and has run a few batches before a barrier lets all of them start.
    A run is timed from the first start to the last end: processes and files cost the reference nothing.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(layout.processes)
    times: Queue[list[tuple[float, float]]] = context.Queue()
    bounds = np.linspace(0, work.rows, layout.processes + 1).astype(int).tolist()
    workers = [
        context.Process(target=_work, args=(work, share, layout.threads, batch_sizes, barrier, times), daemon=True)
        for share in pairwise(bounds)
    ]
    for worker in workers:
        worker.start()
    found = [times.get(timeout=TIMEOUT_S) for _ in workers]
    for worker in workers:
        worker.join()
    return [work.rows / (max(e for _, e in run) - min(s for s, _ in run)) for run in zip(*found, strict=True)]


def _work(
    work: Work, share: tuple[int, int], threads: int, batch_sizes: Sequence[int], barrier: Barrier,
    times: Queue[list[tuple[float, float]]],
) -> None:  # fmt: skip
    from distill_ray.models import load_classifier

    keep_freed_memory()
    torch.set_num_threads(threads)
    model = load_classifier(str(work.teacher))
    net, contract = model.net.to(_DTYPES[work.precision]), (model.multiplier, model.offset)
    rows = torch.from_numpy(np.load(work.inputs, mmap_mode="r")[slice(*share)].copy())
    logits = torch.empty(len(rows), work.classes, dtype=torch.float16)
    found = []
    for batch_size in batch_sizes:
        _label(net, contract, rows[: _WARM_UP_BATCHES * batch_size], logits, batch_size)
        barrier.wait(TIMEOUT_S)
        began = perf_counter()  # CLOCK_MONOTONIC: the same clock in every process
        _label(net, contract, rows, logits, batch_size)
        found.append((began, perf_counter()))
    times.put(found)


def keep_freed_memory() -> None:
    """Otherwise glibc unmaps each activation above 32 MiB, the next batch pages it in anew: half of the speed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@torch.inference_mode()
def _label(net: nn.Module, contract: tuple[Tensor, Tensor], rows: Tensor, logits: Tensor, batch_size: int) -> None:
    multiplier, offset = contract
    dtype = next(net.parameters()).dtype
    for start in range(0, len(rows), batch_size):
        x = rows[start : start + batch_size].to(torch.float32) * multiplier - offset
        logits[start : start + batch_size] = net(x.to(dtype, memory_format=torch.channels_last))
