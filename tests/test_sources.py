"""Sources: rows by number, the same every time, divided honestly; and one clear line for every bad file."""

from __future__ import annotations

import gzip
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from distill_ray.config import Glyph62Data, IdxData, SplitConfig
from distill_ray.errors import UserError
from distill_ray.sources import Source, glyph62, open_source
from distill_ray.sources.base import SPLITS, split_by_fractions

# --- glyph62 --------------------------------------------------------------------------------------------------------


def glyphs(rows: int = 1240, seed: int = 0, fractions: tuple[float, ...] | None = None) -> Source:
    return open_source(Glyph62Data(source="glyph62", rows=rows, seed=seed, split=SplitConfig(fractions=fractions)))


def styles_of(source_ids: Any) -> set[str]:
    return {str(name).split("/")[0] for name in source_ids}


def test_glyph62_draws_the_same_rows_every_time() -> None:
    rows = np.array([3, 700, 1239], dtype=np.int64)
    first, again = glyphs().read(rows), glyphs().read(rows)
    assert np.array_equal(first.inputs, again.inputs)
    assert list(first.source_ids) == list(again.source_ids)
    # A row does not depend on the rows read with it.
    assert np.array_equal(glyphs().read(rows[1:2]).inputs[0], first.inputs[1])
    assert not np.array_equal(glyphs(seed=1).read(rows).inputs, first.inputs)


def test_glyph62_rows_are_bytes_with_ink() -> None:
    found = glyphs().read(np.arange(62, dtype=np.int64))
    assert found.inputs.dtype == np.uint8
    assert found.inputs.shape == (62, 1, 32, 32)
    assert found.labels.dtype == np.int64
    assert found.labels.tolist() == list(range(62))
    assert (found.inputs.reshape(62, -1).max(axis=1) > 100).all()
    assert len({image.tobytes() for image in found.inputs}) == 62
    assert [name.split("/")[1] for name in found.source_ids] == list(glyph62.CHARACTERS)


def test_glyph62_info_describes_the_rows() -> None:
    info = glyphs().info()
    assert (info.shape, info.dtype, info.synthetic) == ((1, 32, 32), "uint8", True)
    assert "".join(info.class_names) == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert {name: len(rows) for name, rows in info.splits.items()} == {"train": 992, "validation": 124, "test": 124}
    assert np.concatenate(list(info.splits.values())).tolist() == list(range(1240))


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_glyph62_splits_share_no_style_and_hold_every_class(seed: int) -> None:
    source = glyphs(seed=seed)
    found = {name: source.read(rows) for name, rows in source.info().splits.items()}
    styles = {name: styles_of(examples.source_ids) for name, examples in found.items()}
    assert styles["train"].isdisjoint(styles["validation"] | styles["test"])
    assert styles["validation"].isdisjoint(styles["test"])
    assert all(styles.values())
    for examples in found.values():
        assert set(examples.labels.tolist()) == set(range(62))


@pytest.mark.parametrize("seed", range(5))
def test_glyph62_no_outline_is_in_two_splits(seed: int) -> None:
    """Styles have different names and the same strokes: the names alone would not do."""
    splits = glyph62.split_styles((0.8, 0.1, 0.1), seed)
    assert sorted(style for styles in splits.values() for style in styles) == sorted(glyph62.STYLES)
    seen: dict[tuple[bytes, ...], str] = {}
    for split, styles in splits.items():
        for style in styles:
            for character in glyph62.CHARACTERS:
                key = tuple(stroke.tobytes() for stroke in glyph62.outlines()[style, character])
                assert seen.setdefault(key, split) == split, (style, character)


def test_glyph62_groups_hold_the_styles_that_share_outlines() -> None:
    groups = glyph62.style_groups()
    together = {frozenset(group) for group in groups}
    assert any({"futural", "rowmans"} <= group for group in together)
    assert len(groups) >= 3  # else there are not three splits


def test_glyph62_leaves_out_a_split_of_fraction_0() -> None:
    source = glyphs(fractions=(0.75, 0.25, 0.0))
    assert {name: len(rows) for name, rows in source.info().splits.items()} == {"train": 930, "validation": 310}


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ((0.9, 0.1), "it needs three fractions (train, validation, test), got [0.9, 0.1]"),
        ((0.01, 0.495, 0.495), "[0.01, 0.495, 0.495] leave no style for training"),
    ],
)
def test_glyph62_fractions_that_do_not_work(fractions: tuple[float, ...], message: str) -> None:
    with pytest.raises(UserError, match=r"data\.split\.fractions: " + ".*" + re.escape(message)):
        glyphs(fractions=fractions)


# --- idx ------------------------------------------------------------------------------------------------------------

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx_bytes(values: npt.NDArray[np.uint8]) -> bytes:
    """The idx format, written from its description: 0 0 type rank, big-endian sizes, values."""
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def idx_arrays(train: int = 40, test: int = 10, classes: int = 4) -> dict[str, npt.NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return {
        FILES[0]: rng.integers(0, 256, (train, 6, 5), dtype=np.uint8),
        FILES[1]: (np.arange(train) % classes).astype(np.uint8),
        FILES[2]: rng.integers(0, 256, (test, 6, 5), dtype=np.uint8),
        FILES[3]: (np.arange(test) % classes).astype(np.uint8),
    }


def write_idx(folder: Path, packed: bool = False, **sizes: int) -> dict[str, npt.NDArray[np.uint8]]:
    arrays = idx_arrays(**sizes)
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        raw = idx_bytes(values)
        (folder / f"{name}.gz").write_bytes(gzip.compress(raw)) if packed else (folder / name).write_bytes(raw)
    return arrays


def idx(folder: Path, **keys: Any) -> Source:
    return open_source(IdxData(source="idx", path=str(folder), **keys))


@pytest.mark.parametrize("packed", [False, True])
def test_idx_reads_what_was_written(tmp_path: Path, packed: bool) -> None:
    arrays = write_idx(tmp_path, packed)
    source = idx(tmp_path)
    info = source.info()
    assert (info.shape, info.dtype, info.synthetic, info.class_names) == ((1, 6, 5), "uint8", False, tuple("0123"))
    assert {name: len(rows) for name, rows in info.splits.items()} == {"train": 36, "validation": 4, "test": 10}
    assert np.sort(np.concatenate(list(info.splits.values()))).tolist() == list(range(50))
    assert info.splits["test"].tolist() == list(range(40, 50))  # the t10k pair and nothing else

    found = source.read(np.array([39, 40, 0, 49], dtype=np.int64))
    expected = np.stack([arrays[FILES[0]][39], arrays[FILES[2]][0], arrays[FILES[0]][0], arrays[FILES[2]][9]])
    assert np.array_equal(found.inputs[:, 0], expected)
    assert found.inputs.dtype == np.uint8
    assert found.labels.tolist() == [39 % 4, 0, 0, 9 % 4]
    assert list(found.source_ids) == ["train/39", "t10k/0", "train/0", "t10k/9"]


def test_idx_rows_limit_gives_a_seeded_sample(tmp_path: Path) -> None:
    write_idx(tmp_path)
    one, again, other = (idx(tmp_path, rows=20, test_rows=5, seed=seed).info().splits for seed in (0, 0, 1))
    assert {name: len(rows) for name, rows in one.items()} == {"train": 18, "validation": 2, "test": 5}
    assert all(np.array_equal(one[name], again[name]) for name in SPLITS)
    assert not all(np.array_equal(one[name], other[name]) for name in SPLITS)


def test_idx_fingerprint_follows_the_files(tmp_path: Path) -> None:
    write_idx(tmp_path)
    before = idx(tmp_path).fingerprint()
    assert idx(tmp_path).fingerprint() == before
    write_idx(tmp_path, train=44)
    assert idx(tmp_path).fingerprint() != before


def test_idx_sees_a_file_that_was_replaced(tmp_path: Path) -> None:
    """The cache of unpacked files goes by their state."""
    write_idx(tmp_path)
    assert len(idx(tmp_path).info().splits["test"]) == 10
    write_idx(tmp_path, test=12)
    assert len(idx(tmp_path).info().splits["test"]) == 12


def change(name: str, work: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(work((folder / name).read_bytes()))

    return apply


def replace(name: str, values: npt.NDArray[np.uint8]) -> Callable[[Path], None]:
    return change(name, lambda raw: idx_bytes(values))


def to_gz(name: str, work: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        plain = folder / name
        (folder / f"{name}.gz").write_bytes(work(plain.read_bytes()))
        plain.unlink()

    return apply


ZEROS = np.zeros
FORGED = struct.pack(">BBBB3I", 0, 0, 8, 3, 1 << 31, 1 << 31, 4)  # 2**64 bytes: 0 in 64-bit arithmetic


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (lambda folder: (folder / FILES[0]).unlink(), FILES[0], "no such file, nor train-images-idx3-ubyte.gz beside"),
        (lambda folder: (folder / FILES[3]).unlink(), FILES[3], "no such file"),
        (change(FILES[0], lambda raw: b""), FILES[0], "is empty: fetch it again"),
        (change(FILES[2], lambda raw: raw[:7]), FILES[2], "ends inside its header"),
        (change(FILES[0], lambda raw: raw[:-1]), FILES[0], "is truncated: 1215 bytes, its header says 1216"),
        (change(FILES[1], lambda raw: raw + b"\0\0"), FILES[1], "has bytes past its end: 50 bytes, its header says 48"),
        (change(FILES[0], lambda raw: b"\x89PNG" + raw[4:]), FILES[0], "starts with 89 50 4e 47, expected 00 00 08 03"),
        (change(FILES[0], lambda raw: raw[:2] + b"\x0d" + raw[3:]), FILES[0], "starts with 00 00 0d 03"),
        (change(FILES[0], lambda raw: FORGED), FILES[0], "16 bytes, its header says 18446744073709551632"),
        (change(FILES[1], gzip.compress), FILES[1], "is not an idx file of 1-dimensional unsigned bytes"),
        (replace(FILES[1], ZEROS((40, 1, 1), np.uint8)), FILES[1], "is not an idx file of 1-dimensional"),
        (replace(FILES[1], ZEROS(39, np.uint8)), FILES[1], "39 labels for the 40 images of train-images-idx3-ubyte"),
        (replace(FILES[3], ZEROS(11, np.uint8)), FILES[3], "11 labels for the 10 images of t10k-images-idx3-ubyte"),
        (replace(FILES[2], ZEROS((10, 5, 6), np.uint8)), FILES[2], "(5, 6) images, the train file has (6, 5)"),
        (replace(FILES[2], ZEROS((10, 0, 5), np.uint8)), FILES[2], "holds no images"),
        (replace(FILES[3], np.full(10, 4, np.uint8)), FILES[3], "label 4 of row 0 is out of range for 4 classes"),
        (replace(FILES[1], ZEROS(40, np.uint8)), FILES[3], "label 1 of row 1 is out of range for 1 classes"),
        (to_gz(FILES[0], lambda raw: raw), f"{FILES[0]}.gz", "is not a whole gzip file (Not a gzipped file"),
        (to_gz(FILES[0], lambda raw: gzip.compress(raw)[:-20]), f"{FILES[0]}.gz", "is not a whole gzip file"),
        (to_gz(FILES[0], lambda raw: gzip.compress(raw)[:30] + b"\xff" * 40), f"{FILES[0]}.gz", "is not a whole gzip"),
        (to_gz(FILES[0], lambda raw: b""), f"{FILES[0]}.gz", "is empty"),
    ],
)  # fmt: skip
def test_idx_bad_files(tmp_path: Path, damage: Callable[[Path], None], name: str, message: str) -> None:
    write_idx(tmp_path)
    idx(tmp_path).info()
    damage(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        idx(tmp_path).info()
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_idx_two_empty_files_hold_no_images(tmp_path: Path) -> None:
    write_idx(tmp_path)
    replace(FILES[0], ZEROS((0, 6, 5), np.uint8))(tmp_path)
    replace(FILES[1], ZEROS(0, np.uint8))(tmp_path)
    with pytest.raises(UserError, match="train-images-idx3-ubyte: holds no images"):
        idx(tmp_path).info()


def test_idx_one_class_is_nothing_to_learn(tmp_path: Path) -> None:
    write_idx(tmp_path, classes=1)
    with pytest.raises(UserError, match="holds one class only"):
        idx(tmp_path).info()


def test_idx_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path .*nowhere: no such folder; it must hold the four idx files"):
        idx(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UserError, match="is a file, not a folder"):
        idx(tmp_path / "file")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rows": 41}, "data.rows 41: the file holds only 40 rows"),
        ({"test_rows": 11}, "data.test_rows 11: the file holds only 10 rows"),
        ({"rows": 1}, "data.rows 1: too few to divide into train and validation"),
        ({"classes": 3}, "label 3 of row 3 is out of range for 3 classes (0 to 2)"),
        ({"split": {"fractions": [0.8, 0.1, 0.1]}}, "the t10k files are the test split of an idx folder: give two"),
    ],
)
def test_idx_bad_keys(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    write_idx(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        idx(tmp_path, **keys).info()


def test_idx_more_classes_than_labels_is_the_users_word(tmp_path: Path) -> None:
    write_idx(tmp_path)
    assert len(idx(tmp_path, classes=10).info().class_names) == 10


# --- splits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fractions", [(0.9, 0.1), (0.8, 0.1, 0.1), (0.98, 0.01, 0.01)])
def test_split_by_fractions_gives_each_row_once(fractions: tuple[float, ...]) -> None:
    rows = np.arange(100, 140, dtype=np.int64)
    splits = split_by_fractions(rows, fractions, seed=3)
    assert list(splits) == list(SPLITS[: len(fractions)])
    assert np.sort(np.concatenate(list(splits.values()))).tolist() == rows.tolist()
    assert all(len(part) >= 1 for part in splits.values())
    again, other = (split_by_fractions(rows, fractions, seed=seed) for seed in (3, 4))
    assert all(np.array_equal(splits[name], again[name]) for name in splits)
    assert not np.array_equal(splits["validation"], other["validation"])


def test_idx_warns_of_a_label_that_makes_empty_classes(tmp_path: Path) -> None:
    arrays = write_idx(tmp_path)
    name = next(name for name in arrays if name.startswith("train-labels"))
    labels = arrays[name].copy()
    labels[3] = 200
    (tmp_path / name).write_bytes(idx_bytes(labels))
    info = idx(tmp_path).info()
    assert len(info.class_names) == 201
    (warning,) = info.warnings
    assert "of 201 classes have no training row" in warning
    assert "data.classes" in warning


def test_idx_divides_each_class_where_asked(tmp_path: Path) -> None:
    write_idx(tmp_path, train=80)
    info = idx(tmp_path, split={"stratify": True, "fractions": [0.75, 0.25]}).info()
    assert info.labels is not None
    for name, share in (("train", 0.75), ("validation", 0.25)):
        counts = np.bincount(info.labels[info.splits[name]], minlength=4)
        whole = np.bincount(info.labels[:80], minlength=4)
        assert np.abs(counts - share * whole).max() < 2
