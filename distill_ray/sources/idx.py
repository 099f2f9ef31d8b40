"""idx: a folder in the MNIST family's file format (LeCun, Cortes, Burges: "The MNIST database", section FILE FORMATS).

The folder holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two ``t10k-`` files, plain or .gz. The
test split is the ``t10k-`` pair; train and validation are divided from the ``train-`` pair.
"""

from __future__ import annotations

import gzip
import math
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_ray.config import IdxData
from distill_ray.errors import UserError
from distill_ray.sources.base import Examples, Indices, SourceInfo
from distill_ray.sources.splitting import split_by_class, split_by_fractions

_IMAGES, _LABELS = "{}-images-idx3-ubyte", "{}-labels-idx1-ubyte"
_UBYTE = 0x08
_FRACTIONS = (0.9, 0.1)


@lru_cache(maxsize=8)
def _read(path: Path, mtime_ns: int, dimensions: int) -> npt.NDArray[np.uint8]:
    """Cached by file state: a worker that prepares many shards unpacks each file once."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: is not a whole gzip file ({error}): fetch it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    return parse_idx(data, dimensions, path)


def parse_idx(data: bytes, dimensions: int, path: Path) -> npt.NDArray[np.uint8]:
    """Decode an idx file of unsigned bytes: magic (0, 0, type, rank), big-endian sizes, then the values.

    Raises:
        UserError: the bytes are not an idx file of this rank, or fewer or more than its header says.
    """
    header = 4 + 4 * dimensions
    if len(data) < header:
        raise UserError(f"{path}: {'is empty' if not data else 'ends inside its header'}: fetch it again")
    if data[:3] != bytes((0, 0, _UBYTE)) or data[3] != dimensions:
        raise UserError(
            f"{path}: is not an idx file of {dimensions}-dimensional unsigned bytes (starts with {data[:4].hex(' ')}, "
            f"expected 00 00 08 {dimensions:02x})"
        )
    shape = tuple(int(n) for n in np.frombuffer(data, dtype=">u4", count=dimensions, offset=4))
    expected = header + math.prod(shape)  # Python's integers: a forged header cannot overflow it
    if len(data) != expected:
        what = "is truncated" if len(data) < expected else "has bytes past its end"
        raise UserError(f"{path}: {what}: {len(data)} bytes, its header says {expected}: fetch it again")
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)


class IdxSource:
    """Rows are numbered through the train file and on through the test file."""

    def __init__(self, config: IdxData) -> None:
        self._config = config
        self._folder = Path(config.path)
        try:
            readable = self._folder.is_dir() and next(self._folder.iterdir(), None) is not None
            what = "is a file, not a folder" if self._folder.is_file() else "no such folder"
            what = "is empty" if self._folder.is_dir() else what
        except OSError as error:
            readable, what = False, f"cannot be read ({error.strerror})"
        if not readable:
            raise UserError(f"data.path {self._folder}: {what}; it must hold the four idx files of an MNIST-like set")
        fractions = config.split.fractions or _FRACTIONS
        if len(fractions) == 3 and fractions[2] != 0:
            raise UserError(
                f"data.split.fractions {list(fractions)}: the t10k files are the test split of an idx folder: give two "
                "fractions (train, validation) that sum to 1"
            )
        self._fractions = fractions[:2]

    def _file(self, pattern: str, part: str) -> Path:
        plain = self._folder / pattern.format(part)
        packed = plain.with_name(plain.name + ".gz")
        for path in (plain, packed):
            if path.is_file():
                return path
        raise UserError(f"{plain}: no such file, nor {packed.name} beside it")

    def _array(self, pattern: str, part: str, dimensions: int) -> npt.NDArray[np.uint8]:
        path = self._file(pattern, part)
        return _read(path, path.stat().st_mtime_ns, dimensions)

    def _part(self, part: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        images, labels = self._array(_IMAGES, part, 3), self._array(_LABELS, part, 1)
        if len(images) != len(labels):
            raise UserError(
                f"{self._file(_LABELS, part)}: {len(labels)} labels for the {len(images)} images of "
                f"{self._file(_IMAGES, part).name}"
            )
        if images.size == 0:
            raise UserError(f"{self._file(_IMAGES, part)}: holds no images")
        return images, labels

    def fingerprint(self) -> dict[str, Any]:
        """Name, size and modification time of each of the four files."""
        files = [self._file(pattern, part) for part in ("train", "t10k") for pattern in (_IMAGES, _LABELS)]
        states = [(path, path.stat()) for path in files]
        return {"files": [[str(path), state.st_size, state.st_mtime_ns] for path, state in states]}

    def info(self) -> SourceInfo:
        """Shape, classes (0 to the largest label) and splits; checks that every label is one of the classes."""
        (images, labels), (test_images, test_labels) = self._part("train"), self._part("t10k")
        if images.shape[1:] != test_images.shape[1:]:
            raise UserError(
                f"{self._file(_IMAGES, 't10k')}: {test_images.shape[1:]} images, the train file has {images.shape[1:]}"
            )
        classes = self._config.classes or int(labels.max()) + 1
        for part, values in (("train", labels), ("t10k", test_labels)):
            beyond = np.flatnonzero(values >= classes)
            if beyond.size:
                raise UserError(
                    f"{self._file(_LABELS, part)}: label {values[beyond[0]]} of row {beyond[0]} is out of range for "
                    f"{classes} classes (0 to {classes - 1})"
                )
        if classes < 2:
            raise UserError(f"{self._file(_LABELS, 'train')}: holds one class only: nothing to learn")
        train = self._sample(np.arange(len(images), dtype=np.int64), self._config.rows, "rows")
        test = np.arange(len(images), len(images) + len(test_images), dtype=np.int64)
        known = np.concatenate([labels, test_labels]).astype(np.int64)
        if self._config.split.stratify:
            splits = split_by_class(train, known[train], self._fractions, self._config.seed)
        else:
            splits = split_by_fractions(train, self._fractions, self._config.seed)
        splits["test"] = self._sample(test, self._config.test_rows, "test_rows")
        if len(splits["train"]) == 0:
            raise UserError(f"data.rows {len(train)}: too few to divide into train and validation")
        names = tuple(str(c) for c in range(classes))
        warnings = self._empty_classes(labels[splits["train"]], classes)
        return SourceInfo((1, *images.shape[1:]), "uint8", names, False, splits, warnings, known)

    def _empty_classes(self, labels: npt.NDArray[np.uint8], classes: int) -> tuple[str, ...]:
        empty = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
        if not empty.size:
            return ()
        return (
            f"{self._file(_LABELS, 'train')}: {empty.size} of {classes} classes have no training row (the first: "
            f"{empty[0]}); if the largest label is a mistake, data.classes says how many there are",
        )

    def _sample(self, rows: Indices, limit: int | None, key: str) -> Indices:
        if limit is None:
            return rows
        if limit > len(rows):
            raise UserError(f"data.{key} {limit}: the file holds only {len(rows)} rows")
        return np.sort(np.random.default_rng((self._config.seed, 3)).permutation(rows)[:limit])

    def read(self, indices: Indices) -> Examples:
        """Rows of both files, by number. ``source_ids`` are ``train/<n>`` or ``t10k/<n>``."""
        train, test = self._part("train"), self._part("t10k")
        first_test = len(train[0])
        inputs = np.empty((len(indices), 1, *train[0].shape[1:]), dtype=np.uint8)
        labels = np.empty(len(indices), dtype=np.int64)
        in_test = indices >= first_test
        for (images, targets), mask, start in ((train, ~in_test, 0), (test, in_test, first_test)):
            inputs[mask, 0] = images[indices[mask] - start]
            labels[mask] = targets[indices[mask] - start]
        names = [f"t10k/{row - first_test}" if row >= first_test else f"train/{row}" for row in indices.tolist()]
        return Examples(inputs, labels, names)
