"""Which row is in which batch: a function of (seed, epoch), never of the number of workers or of what ran before.

An epoch is a sequence of windows. A window is a set of shards that are in memory together, in one permutation; the
batches are cut from the windows' rows end to end, so that only the last batch of an epoch may be smaller. With one
window over all shards this is a shuffle of the whole split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """``shards`` (their numbers, in this order end to end) and ``order``, the permutation of their N rows."""

    shards: tuple[int, ...]
    order: Tensor


@dataclass(frozen=True)
class Piece:
    """Rows ``index`` of one window, which belong to one batch."""

    window: int
    index: Tensor


def whole(shard_rows: Sequence[int], seed: int, epoch: int) -> list[Window]:
    """All rows in one permutation."""
    return [Window(tuple(range(len(shard_rows))), epoch_order(sum(shard_rows), seed, epoch))]


def windows(shard_rows: Sequence[int], window_rows: int, seed: int, epoch: int) -> list[Window]:
    """Shards in random order, as many to a window as stay within ``window_rows`` (one at least), permuted within it."""
    generator = _generator(seed, epoch)
    groups: list[list[int]] = []
    held = 0
    for shard in torch.randperm(len(shard_rows), generator=generator).tolist():
        if not groups or held + shard_rows[shard] > window_rows:
            groups.append([])
            held = 0
        groups[-1].append(shard)
        held += shard_rows[shard]
    return [
        Window(tuple(group), torch.randperm(sum(shard_rows[shard] for shard in group), generator=generator))
        for group in groups
    ]


def in_order(shard_rows: Sequence[int], window_rows: int | None) -> list[Window]:
    """All rows as they are stored, for evaluation; a shard a window where ``window_rows`` is given."""
    if window_rows is None:
        return [Window(tuple(range(len(shard_rows))), torch.arange(sum(shard_rows)))]
    return [Window((shard,), torch.arange(rows)) for shard, rows in enumerate(shard_rows)]


def batches(plan: Sequence[Window], batch_size: int) -> Iterator[list[Piece]]:
    """The global batches of an epoch, each a list of pieces; every row is in exactly one of them."""
    pieces: list[Piece] = []
    missing = batch_size
    for number, window in enumerate(plan):
        start = 0
        while start < len(window.order):
            taken = window.order[start : start + missing]
            pieces.append(Piece(number, taken))
            start += len(taken)
            missing -= len(taken)
            if missing == 0:
                yield pieces
                pieces, missing = [], batch_size
    if pieces:
        yield pieces


def part(pieces: Sequence[Piece], rank: int, world_size: int) -> list[Piece]:
    """This worker's rows of a global batch: every ``world_size``-th from ``rank`` on."""
    mine, before = [], 0
    for piece in pieces:
        share = piece.index[(rank - before) % world_size :: world_size]
        before += len(piece.index)
        if len(share):
            mine.append(Piece(piece.window, share))
    return mine


def parts(rows: int, world_size: int, most: int) -> tuple[int, int]:
    """Rows of a part, and the number of parts, in which every worker takes its share of a batch of ``rows``.

    At most ``most`` parts. By the largest share, so that all workers take the same number, which a network that meets
    the others in its forward pass needs (SyncBatchNorm): where a share is a part short, a row that does not count is
    that part.
    """
    share = -(-rows // world_size)
    size = -(-share // most)
    return size, -(-share // size)


def least_rows(rows: int, batch_size: int, world_size: int, most_parts: int) -> int:
    """The fewest rows that a worker puts through the network at once in an epoch: of its share of the last or of a
    whole batch, in ``parts``. A worker without a share takes one row that does not count."""
    found = []
    for batch in {min(batch_size, rows), rows % batch_size} - {0}:
        at_once, _ = parts(batch, world_size, most_parts)
        for share in {batch // world_size, -(-batch // world_size)}:
            found.append(max(1, share) % at_once or at_once)
    return min(found)


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of ``count`` rows."""
    return torch.randperm(count, generator=_generator(seed, epoch))


def mix(seed: int, epoch: int) -> int:
    """One 63-bit seed from two numbers, so that seed 0 epoch 1 and seed 1 epoch 0 differ."""
    return (seed * 1_000_003 + epoch * 7_919 + 12_345) % (2**63)


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix(seed, epoch))
