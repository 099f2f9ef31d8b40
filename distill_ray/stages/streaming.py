"""A streamed source through Ray Data: its pieces are read by tasks, and a sort by row id brings each shard together.

Where a row goes is in the plan before anything is read (its row id, of the seed and its number alone), so neither the
number of workers nor the order in which blocks arrive can change the result. The rows travel as Ray Data's blocks:
where they do not fit in its object store, Ray spills them to the disk of its session folder (as many bytes as the rows
have once decoded, less what compression saves). A process holds a piece's batch or a partition, never the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distill_ray import runtime
from distill_ray.artifacts import Stage
from distill_ray.config import Config, from_dict, to_dict
from distill_ray.errors import RunError
from distill_ray.sources import (
    AnySource,
    BadRow,
    HuggingfaceSource,
    ImagesSource,
    ParquetSource,
    Piece,
    SourceInfo,
    open_cached,
    state_of,
)  # fmt: skip
from distill_ray.sources.base import check_bad_rows
from distill_ray.sources.decoding import Layout
from distill_ray.stages.shard_job import ShardPlan, bounded, run_items
from distill_ray.storage import Folder
from distill_ray.store import ShardRecord, shards

_PARTITION_BYTES = 64 * 2**20  # small shards are sorted together: fewer blocks; one block may have 1.5 x 128 MiB
# Ray Data's own default is to merge 1 GiB of blocks before they are sorted, which takes twice that in a process.
_SORT_INPUT_BYTES = 64 * 2**20
_NOWHERE = -1  # the row id of a row that is not wanted
_CHECKED_ROWS = 4096  # of a task; the source holds as many of them at a time as are a few MiB
_FIXED = {"row_id": pa.int64(), "label": pa.int64()}


# --- small columns ---------------------------------------------------------------------------------------------------


def small_columns(config: Config, source: ParquetSource, pieces: Sequence[Piece]) -> Iterator[tuple[int, pa.Table]]:
    """The condensed small columns of all rows, in any order: the number of the first row, and some rows."""
    if not source.annotated():
        return
    dataset = _mapped(_of_pieces(pieces), _Annotate(job_of(config, source)))
    for block in _blocks(dataset):
        if block.num_rows:
            yield int(block.column("row")[0].as_py()), block.drop_columns(["row"])


class _Annotate:
    """A piece to its small columns, with the row's number beside them."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._job = job

    def __call__(self, items: pa.Table) -> Iterator[pa.Table]:
        source = _source(self._job)
        for piece, _ in _pieces_in(items):
            for offset, table in source.annotations(piece):
                first = piece.first_row + offset
                yield table.append_column("row", pa.array(np.arange(first, first + table.num_rows, dtype=np.int64)))


# --- bad rows --------------------------------------------------------------------------------------------------------


def bad_rows(config: Config, source: Any, target: Stage) -> list[BadRow]:
    """The rows whose input cannot be used: all inputs are decoded once for that, and what was found is kept.

    Only where ``data.max_bad_rows`` allows some: else the first that is met while the shards are written ends the run.
    """
    kept = _kept_bad_rows(target)
    if kept is not None:
        return kept
    if isinstance(source, ParquetSource):
        items: list[dict[str, Any]] = [{"piece": _as_json(piece)} for piece in source.pieces()]
    else:
        starts = range(0, source.rows, _CHECKED_ROWS)
        items = [{"first": start, "rows": min(_CHECKED_ROWS, source.rows - start)} for start in starts]
    found: list[BadRow] = []
    for answer in run_items("prepare", items, _find_bad_rows, job_of(config, source)):
        found += [BadRow(**row) for row in json.loads(answer)]
    found.sort(key=lambda row: row.row)
    check_bad_rows(config.data, found)  # type: ignore[arg-type]
    target.folder.write_json(_BAD_ROWS_FILE, {"store": target.digest, "rows": [asdict(row) for row in found]})
    return found


_BAD_ROWS_FILE = "bad_rows.json"


def _kept_bad_rows(target: Stage) -> list[BadRow] | None:
    try:
        kept = target.folder.read_json(_BAD_ROWS_FILE)
        return [BadRow(**row) for row in kept["rows"]] if kept["store"] == target.digest else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _find_bad_rows(item: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    """Runs in a Ray Data task."""
    source = opened(arguments)
    found: list[BadRow] = []
    if isinstance(source, ParquetSource):
        piece = _from_json(item["piece"])
        for _, _, _, bad in source.stream(piece, source.layout(), np.ones(piece.rows, dtype=np.bool_)):
            found += bad
    else:
        assert isinstance(source, ImagesSource | HuggingfaceSource)
        found = source.bad_rows(np.arange(item["first"], item["first"] + item["rows"], dtype=np.int64))
    return json.dumps([asdict(row) for row in found])


# --- shards ----------------------------------------------------------------------------------------------------------


def write_shards(
    config: Config, target: Stage, source: ParquetSource, info: SourceInfo, todo: Sequence[ShardPlan]
) -> Iterator[ShardRecord]:
    """Read the rows of the shards that are to do, sort them, write the shards; the record of each as it is written.

    Raises:
        UserError, RunError: what a task raised.
    """
    if not todo:
        return
    assert info.labels is not None
    pieces = source.pieces()
    places = np.full(source.rows, _NOWHERE, dtype=np.int64)
    for plan in todo:
        places[plan.payload["indices"]] = np.arange(plan.first_id, plan.first_id + plan.rows)
    wanted = [piece for piece in pieces if (places[piece.first_row : piece.first_row + piece.rows] != _NOWHERE).any()]
    layout = source.layout()
    read = _Read(job_of(config, source), layout)
    write = _Write(target.folder.uri, target.digest, layout, [_Shard.of(plan) for plan in todo])
    dataset = _mapped(_of_pieces(wanted, places, info.labels), read)
    boundaries = _boundaries(todo, layout.row_bytes)
    # Also where all is one partition: the rows of its shards come from many blocks.
    dataset = dataset.sort("row_id", boundaries=boundaries)
    for block in _blocks(_mapped(dataset, write)):
        for text in block.column("record").to_pylist():
            yield ShardRecord.model_validate_json(text)


def _boundaries(todo: Sequence[ShardPlan], row_bytes: int) -> list[int]:
    """The row ids at which partitions begin: each holds whole shards, together as large as is handy."""
    bounds: list[int] = []
    held = 0
    for plan in sorted(todo, key=lambda plan: plan.first_id):
        size = plan.rows * (row_bytes + 64)
        if held + size > _PARTITION_BYTES or not bounds:
            bounds.append(plan.first_id)
            held = 0
        held += size
    # The first begins at the smallest id; without any boundary Ray would sample its own.
    return bounds[1:] or [bounds[0]]


class _Read:
    """A piece to its rows: row id, input (its bytes), label and source id."""

    def __init__(self, job: Mapping[str, Any], layout: Layout) -> None:
        self._job, self._layout = job, layout

    def __call__(self, items: pa.Table) -> Iterator[pa.Table]:
        source = _source(self._job)
        for piece, columns in _pieces_in(items):
            places, labels = columns["places"], columns["labels"]
            for offsets, inputs, ids, bad in source.stream(piece, self._layout, places != _NOWHERE):
                check_bad_rows(source.config.model_copy(update={"max_bad_rows": 0}), bad)
                yield _rows(places[offsets], inputs, labels[offsets], ids, self._layout)


def _rows(
    row_ids: npt.NDArray[np.int64],
    inputs: npt.NDArray[Any],
    labels: npt.NDArray[np.int64],
    ids: pa.Array,
    layout: Layout,
) -> pa.Table:
    # Inputs travel as plain bytes: every kernel that moves rows knows how to, whatever the numbers are.
    raw = pa.py_buffer(np.ascontiguousarray(inputs))
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(layout.row_bytes), len(row_ids), [None, raw])
    return pa.table({"row_id": row_ids, "input": column, "label": labels, "source_id": ids})


class _Shard:
    """What is to know of a shard in order to cut it out of sorted rows."""

    def __init__(self, split: str, index: int, first_id: int, rows: int) -> None:
        self.split, self.index, self.first_id, self.rows = split, index, first_id, rows

    @classmethod
    def of(cls, plan: ShardPlan) -> _Shard:
        return cls(plan.split, plan.index, plan.first_id, plan.rows)


class _Write:
    """Sorted rows, which are whole shards, to the records of the shards that were written."""

    def __init__(self, folder: str, store: str, layout: Layout, planned: Sequence[_Shard]) -> None:
        self._folder, self._store, self._layout = folder, store, layout
        self._planned = sorted(planned, key=lambda shard: shard.first_id)

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        if not rows.num_rows:  # a partition without rows
            return
        row_ids = rows.column("row_id").to_numpy()
        starts = np.asarray([shard.first_id for shard in self._planned])
        for number in np.unique(np.searchsorted(starts, row_ids, side="right") - 1):
            shard = self._planned[number]
            first = int(np.searchsorted(row_ids, shard.first_id))
            part = rows.slice(first, shard.rows)
            expected = np.arange(shard.first_id, shard.first_id + shard.rows)
            if not np.array_equal(part.column("row_id").to_numpy(), expected):
                raise RunError(f"shard {shard.index} of {shard.split} did not come together: run the command again")
            yield pa.table({"record": [self._written(shard, part).model_dump_json()]})

    def _written(self, shard: _Shard, rows: pa.Table) -> ShardRecord:
        layout = self._layout
        packed = rows.column("input").combine_chunks()
        packed = packed.chunk(0) if isinstance(packed, pa.ChunkedArray) else packed
        buffer = packed.buffers()[1].slice(packed.offset * layout.row_bytes, len(packed) * layout.row_bytes)
        inputs = np.frombuffer(buffer, dtype=layout.dtype).reshape(-1, *layout.shape)
        batch = shards.encode_data(
            rows.column("row_id").to_numpy(), inputs, rows.column("label").to_numpy(),
            rows.column("source_id").combine_chunks(),
        )  # fmt: skip
        return shards.write(Folder.at(self._folder), shard.split, shard.index, batch, store=self._store)


# --- Ray Data --------------------------------------------------------------------------------------------------------


def job_of(config: Config, source: AnySource) -> dict[str, Any]:
    """What a worker needs to open the same source."""
    return {"config": to_dict(config), "state": state_of(source)}


def opened(job: Mapping[str, Any]) -> AnySource:
    """Runs on a worker: the source of ``job_of``, in the state that the driver saw.

    Raises:
        RunError: its files are others now.
    """
    return open_cached(from_dict(job["config"]).data, job["state"])


def _source(job: Mapping[str, Any]) -> ParquetSource:
    source = opened(job)
    assert isinstance(source, ParquetSource)
    return source


def _of_pieces(pieces: Sequence[Piece], places: Any = None, labels: Any = None) -> Any:
    """One block a piece, so that blocks are ours; with what is known of its rows, so that a task gets its own alone."""
    items = []
    for piece in pieces:
        at = slice(piece.first_row, piece.first_row + piece.rows)
        more = {} if places is None else {"places": places[at].tobytes(), "labels": labels[at].tobytes()}
        items.append({"piece": _as_json(piece), **more})
    data = runtime.data()
    dataset = data.from_items(items, override_num_blocks=len(items))
    context = dataset.context
    context.raise_original_map_exception = True  # ours say what happened; wrapped they would be lost
    for key, value in (("shuffle_input_batch_bytes", _SORT_INPUT_BYTES), ("shuffle_compression", "lz4")):
        if hasattr(context, key):  # of Ray 2.60 and later
            setattr(context, key, value)
    return dataset


def _mapped(dataset: Any, work: Any) -> Any:
    """``work`` from blocks to blocks."""
    return bounded(dataset.map_batches, work, batch_size=None, batch_format="pyarrow", num_cpus=1)


def _pieces_in(items: pa.Table) -> Iterator[tuple[Piece, dict[str, npt.NDArray[np.int64]]]]:
    for number in range(items.num_rows):
        columns = {
            name: np.frombuffer(items.column(name)[number].as_buffer(), dtype=np.int64)
            for name in items.column_names
            if name != "piece"
        }
        yield _from_json(items.column("piece")[number].as_py()), columns


def _as_json(piece: Piece) -> str:
    return json.dumps(asdict(piece))


def _from_json(text: str) -> Piece:
    raw = json.loads(text)
    return Piece(
        raw["first_row"], raw["rows"], tuple((file, tuple(groups), rows) for file, groups, rows in raw["parts"])
    )


def _blocks(dataset: Any) -> Iterator[pa.Table]:
    try:
        # Without prefetching: see shard_job.
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except GeneratorExit:
        raise
    except Exception as error:  # one of ours comes as a subclass of it, too, whose text is Ray's
        raise runtime.as_run_error("prepare", error) from error
