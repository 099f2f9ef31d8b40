"""Rows of one's own: what each kind of column becomes, classes, ids, and one clear line for what cannot be."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from distill_ray.errors import UserError
from distill_ray.sources import ParquetSource, decoding, open_source
from tests.object_store import BUCKET, object_store
from tests.own_data import bad_rows, data_config, fixed_list, pixels, png, read_all, write_parquet

LABELS = [0, 1, 2] * 20


def parquet(path: Path, **keys: Any) -> Any:
    columns = {"input": "x", "label": "y"} | keys.pop("columns", {})
    return data_config(source="parquet", path=str(path), columns=columns, **keys)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrow", "dtype"),
    [
        (pa.uint8(), "uint8"), (pa.int8(), "int32"), (pa.int32(), "int32"), (pa.int64(), "int32"),
        (pa.float16(), "float16"), (pa.float32(), "float32"), (pa.float64(), "float32"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("listed", ["fixed", "list", "large"])
def test_lists_of_numbers_become_rows_of_the_stored_type(
    tmp_path: Path, arrow: pa.DataType, dtype: str, listed: str
) -> None:
    values = np.random.default_rng(0).integers(0, 100, (60, 12))
    column = fixed_list(values).cast(pa.list_(arrow, 12))
    if listed != "fixed":
        column = column.cast(pa.list_(arrow) if listed == "list" else pa.large_list(arrow))
    path = write_parquet(tmp_path / "rows.parquet", {"x": column, "y": LABELS})
    found = read_all(parquet(path))
    assert (found.info.shape, found.info.dtype) == ((12,), dtype)
    assert np.array_equal(found.inputs, values.astype(dtype))
    assert found.inputs.dtype == dtype
    shaped = read_all(parquet(path, input={"shape": [3, 4]}))
    assert shaped.info.shape == (3, 4)
    assert np.array_equal(shaped.inputs, values.astype(dtype).reshape(-1, 3, 4))


def test_nested_lists_have_their_own_shape(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(60, 2, 5))
    path = write_parquet(tmp_path / "rows.parquet", {"x": values.tolist(), "y": LABELS})
    found = read_all(parquet(path))
    assert (found.info.shape, found.info.dtype) == ((2, 5), "float32")
    assert np.array_equal(found.inputs, values.astype(np.float32))


def test_decimals_are_numbers(tmp_path: Path) -> None:
    numbers = pa.array([None if n == 7 else n / 4 for n in range(60)]).cast(pa.decimal128(8, 2))
    path = write_parquet(tmp_path / "rows.parquet", {"a": numbers, "b": np.arange(60), "y": LABELS})
    assert bad_rows(parquet(path, columns={"input": ["a", "b"]})) == [
        f"{path}, row 7: its input holds a null (column 'a')"
    ]
    path = write_parquet(tmp_path / "rows.parquet", {"a": numbers.fill_null(0), "b": np.arange(60), "y": LABELS})
    found = read_all(parquet(path, columns={"input": ["a", "b"]}))
    assert found.inputs[4].tolist() == [1.0, 4.0]
    listed = pa.FixedSizeListArray.from_arrays(numbers.fill_null(0), 2)
    found = read_all(parquet(write_parquet(tmp_path / "rows.parquet", {"x": listed, "y": [0, 1, 2] * 10})))
    assert (found.info.dtype, found.inputs[2].tolist()) == ("float32", [1.0, 1.25])


def test_pictures_with_their_channels_last_are_told(tmp_path: Path) -> None:
    def warnings(*shape: int, **keys: Any) -> tuple[str, ...]:
        values = np.zeros((60, *shape), np.uint8).tolist()
        path = write_parquet(tmp_path / "rows.parquet", {"x": values, "y": LABELS})
        return read_all(parquet(path, **keys)).info.warnings

    (told,) = warnings(8, 6, 3)
    assert "rows of [8, 6, 3] are read as 8 channels of [6, 3]" in told
    assert "write pictures [height, width, channels] as [channels, height, width]" in told
    assert warnings(8, 6, 3, input={"shape": [8, 6, 3]}) == warnings(3, 8, 6) == warnings(1, 6, 3) == ()


def test_as_many_numbers_in_other_lists_are_another_array(tmp_path: Path) -> None:
    lists = [[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]] * 9
    columns = {
        "x": [*lists, [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[1.0], [2.0, 3.0, 4.0, 5.0, 6.0]]],
        "y": [0, 1] * 5 + [0],
    }
    write_parquet(tmp_path / "a.parquet", columns)
    found = bad_rows(parquet(tmp_path, max_bad_rows=5))
    assert len(found) == 2
    assert all("the lists in it are not 3 long" in text for text in found)


def test_several_number_columns_are_a_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {"a": rng.normal(size=60), "b": rng.integers(0, 9, 60), "c": rng.integers(0, 2, 60).astype(bool)}
    path = write_parquet(tmp_path / "rows.parquet", {**columns, "y": LABELS})
    found = read_all(parquet(path, columns={"input": ["b", "a", "c"]}))
    assert (found.info.shape, found.info.dtype) == ((3,), "float32")
    assert np.array_equal(found.inputs, np.stack([columns[name] for name in "bac"], axis=1).astype(np.float32))


def test_the_rows_of_a_folder_are_those_of_its_files_by_name(tmp_path: Path) -> None:
    values = np.arange(60 * 4, dtype=np.uint8).reshape(60, 4)
    columns = {"x": fixed_list(values), "y": LABELS}
    folder = write_parquet(tmp_path / "set", columns, files=7, row_group_size=3)
    write_parquet(folder / "_ignored.parquet", {"other": [1]})
    (folder / "notes.txt").write_text("no parquet")
    found = read_all(parquet(folder))
    assert np.array_equal(found.inputs, values)
    assert found.labels == LABELS
    assert found.ids[:2] == ["part-000.parquet/0", "part-000.parquet/1"]
    assert found.ids[-1].startswith("part-006.parquet/")
    some = read_all(parquet(tmp_path / "set" / "part-00[0-2].parquet"))
    assert np.array_equal(some.inputs, values[: len(some.inputs)])
    assert 0 < len(some.inputs) < 60


@pytest.mark.parametrize(("row_group_size", "files"), [(1, 1), (7, 4), (1000, 1), (5, 9)])
def test_pieces_cover_every_row_once_and_in_order(tmp_path: Path, row_group_size: int, files: int) -> None:
    values = np.arange(60, dtype=np.int32).reshape(60, 1)
    path = write_parquet(tmp_path / "set", {"x": fixed_list(values), "y": LABELS}, row_group_size, files)
    source = open_source(parquet(path))
    assert isinstance(source, ParquetSource)
    pieces = source.pieces()
    assert [piece.first_row for piece in pieces] == np.cumsum([0, *(piece.rows for piece in pieces)])[:-1].tolist()
    assert sum(piece.rows for piece in pieces) == 60
    assert np.array_equal(read_all(parquet(path)).inputs, values)


def test_only_the_wanted_rows_are_read(tmp_path: Path) -> None:
    values = np.arange(60 * 3, dtype=np.int32).reshape(60, 3)
    path = write_parquet(tmp_path / "rows.parquet", {"x": fixed_list(values), "y": LABELS})
    source = open_source(parquet(path))
    assert isinstance(source, ParquetSource)
    wanted = np.random.default_rng(0).random(60) < 0.3
    (piece,) = source.pieces()
    parts = list(source.stream(piece, source.layout(), wanted))
    assert np.concatenate([offsets for offsets, *_ in parts]).tolist() == np.flatnonzero(wanted).tolist()
    assert np.array_equal(np.concatenate([inputs for _, inputs, *_ in parts]), values[wanted])


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bytes", "struct", "struct_path", "path", "rooted"])
def test_encoded_images_and_paths_are_decoded(tmp_path: Path, form: str) -> None:
    images = pixels(60, channels=3)
    encoded = [png(image) for image in images]
    folder = tmp_path / ("elsewhere" if form == "rooted" else "set")
    (folder / "png").mkdir(parents=True)
    names = [f"png/{number}.png" for number in range(60)]
    for name, data in zip(names, encoded, strict=True):
        (folder / name).write_bytes(data)
    column: Any = {
        "bytes": encoded,
        "struct": [{"bytes": data, "path": None} for data in encoded],
        "struct_path": [{"bytes": None, "path": name} for name in names],
    }.get(form, names)
    if form.startswith("struct"):
        column = pa.array(column, type=pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    path = write_parquet(tmp_path / "set" / "rows.parquet", {"x": column, "y": LABELS})
    found = read_all(parquet(path, **({"root": str(folder)} if form == "rooted" else {})))
    assert (found.info.shape, found.info.dtype) == ((3, 6, 5), "uint8")
    assert np.array_equal(found.inputs, images.transpose(0, 3, 1, 2))


def test_resize_and_channels_are_pillows(tmp_path: Path) -> None:
    images = [pixels(1, 9 + n % 3, 14, channels=3, seed=n)[0] for n in range(60)]
    path = write_parquet(tmp_path / "rows.parquet", {"x": [png(image) for image in images], "y": LABELS})
    found = read_all(parquet(path, input={"resize": [4, 6], "channels": 1}))
    assert found.info.shape == (1, 4, 6)
    expected = [Image.fromarray(i).convert("L").resize((6, 4), Image.Resampling.BILINEAR) for i in images]
    assert np.array_equal(found.inputs[:, 0], np.stack([np.asarray(image) for image in expected]))


def test_grey_images_have_one_channel_unless_three_are_asked_for(tmp_path: Path) -> None:
    images = pixels(60)
    path = write_parquet(tmp_path / "rows.parquet", {"x": [png(image) for image in images], "y": LABELS})
    assert np.array_equal(read_all(parquet(path)).inputs[:, 0], images)
    three = read_all(parquet(path, input={"channels": 3})).inputs
    assert np.array_equal(three, np.repeat(images[:, np.newaxis], 3, axis=1))


def test_one_image_in_colours_of_many_grey_ones_keeps_them(tmp_path: Path) -> None:
    images = [png(image) for image in pixels(60)]
    images[48] = png(pixels(1, channels=3)[0])  # the first of a row group
    path = write_parquet(tmp_path / "rows.parquet", {"x": images, "y": LABELS})
    assert read_all(parquet(path)).info.shape == (3, 6, 5)


def test_rows_that_are_large_in_the_file_are_read_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [png(image) for image in pixels(60, 500, 500)]  # 250 kB each, and 16 bytes when they are resized
    path = write_parquet(tmp_path / "rows.parquet", {"x": images, "y": LABELS}, row_group_size=60, use_dictionary=False)
    taken: list[int] = []
    decode = decoding.images

    def counted(column: Any, *more: Any) -> Any:
        taken.append(len(column))
        return decode(column, *more)

    monkeypatch.setattr(decoding, "images", counted)
    found = read_all(parquet(path, input={"resize": [4, 4]}))
    assert found.inputs.shape == (60, 1, 4, 4)
    assert max(taken) * 250_000 <= 8 * 2**20


def test_a_photograph_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    upright = Image.fromarray(pixels(1, 8, 16)[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    file = io.BytesIO()
    upright.save(file, "PNG", exif=exif)
    path = write_parquet(tmp_path / "rows.parquet", {"x": [file.getvalue()] * 60, "y": LABELS})
    found = read_all(parquet(path))
    assert found.info.shape == (1, 16, 8)
    assert np.array_equal(found.inputs[0, 0], np.rot90(np.asarray(upright), -1))


def test_a_damaged_exif_block_does_not_make_the_picture_useless(tmp_path: Path) -> None:
    (image,) = pixels(1, 8, 16)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", exif=b"Exif\x00\x00neither end of a number comes first")
    path = write_parquet(tmp_path / "rows.parquet", {"x": [file.getvalue()] * 60, "y": LABELS})
    assert np.array_equal(read_all(parquet(path)).inputs[0, 0], image)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    """A drawing in black, and what lies below the transparent part is black too."""
    drawing = Image.new(mode, (6, 4), {"RGBA": (0, 0, 0, 0), "LA": (0, 0)}.get(mode, 0))
    drawing.putpixel((1, 2), {"RGBA": (9, 9, 9, 255), "LA": (9, 255)}.get(mode, 9))
    file = io.BytesIO()
    if mode == "P":
        drawing.putpalette([value for n in range(256) for value in (n, n, n)])
    drawing.save(file, "PNG", **({"transparency": 0} if mode in ("P", "L") else {}))
    path = write_parquet(tmp_path / "rows.parquet", {"x": [file.getvalue()] * 60, "y": LABELS})
    found = read_all(parquet(path))
    assert found.info.shape == (1 if mode in ("LA", "L") else 3, 4, 6)
    expected = np.full((4, 6), 255)
    expected[2, 1] = 9
    assert (found.inputs == expected).all()


def test_an_alpha_channel_that_hides_nothing_changes_no_pixel(tmp_path: Path) -> None:
    (image,) = pixels(1, 40, 40, channels=3)
    opaque = np.concatenate([image, np.full((40, 40, 1), 255, np.uint8)], axis=2)
    path = write_parquet(tmp_path / "rows.parquet", {"x": [png(opaque)] * 60, "y": LABELS})
    assert np.array_equal(read_all(parquet(path)).inputs[0], image.transpose(2, 0, 1))


# --- ids and labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids", [list(range(100, 160)), [f"row {n}" for n in range(60)], [bytes([n]) for n in range(60)],
    [n / 2 for n in range(60)], [None, *range(59)]],
)  # fmt: skip
def test_ids_of_any_type_stay(tmp_path: Path, ids: list[Any]) -> None:
    columns = {"x": fixed_list(np.zeros((60, 2), np.uint8)), "y": LABELS, "key": ids}
    found = read_all(parquet(write_parquet(tmp_path / "rows.parquet", columns), columns={"id": "key"}))
    assert found.ids == ids


@pytest.mark.parametrize("encoded", [False, True])
def test_names_of_classes_are_sorted_unless_given(tmp_path: Path, encoded: bool) -> None:
    words = ["pear", "apple", None] * 20
    column = pa.array(words).dictionary_encode() if encoded else words
    path = write_parquet(tmp_path / "rows.parquet", {"x": fixed_list(np.zeros((60, 2), np.uint8)), "y": column})
    found = read_all(parquet(path))
    assert found.info.class_names == ("apple", "pear")
    assert found.labels[:3] == [1, 0, -1]
    named = read_all(parquet(path, class_names=["pear", "fig", "apple"]))
    assert named.info.class_names == ("pear", "fig", "apple")
    assert named.labels[:3] == [0, 2, -1]
    assert "1 of 3 classes have no row (the first: 'fig')" in named.info.warnings[0]


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.float16(), pa.decimal128(5, 2)])
def test_integers_beside_missing_ones_are_floats_in_pandas(tmp_path: Path, kind: pa.DataType) -> None:
    labels: list[int | None] = [2, None, 0, 1] * 15
    x = fixed_list(np.zeros((60, 2), np.uint8))
    column = pa.array(labels, pa.int16()).cast(pa.float32()).cast(kind)
    path = write_parquet(tmp_path / "set" / "a.parquet", {"x": x, "y": column})
    expected = [2, -1, 0, 1] * 15
    assert read_all(parquet(path)).labels == expected
    if pa.types.is_floating(kind):  # not a number is none, either; and a file that misses none has integers
        values = np.asarray([np.nan if label is None else label for label in labels], kind.to_pandas_dtype())
        write_parquet(tmp_path / "set" / "b.parquet", {"x": x, "y": pa.array(values)})
        write_parquet(tmp_path / "set" / "c.parquet", {"x": x, "y": LABELS})
        found = read_all(parquet(tmp_path / "set"))
        assert found.info.class_names == ("0", "1", "2")
        assert found.labels == expected * 2 + LABELS


def test_an_empty_word_is_no_label(tmp_path: Path) -> None:
    columns = {"x": fixed_list(np.zeros((60, 2), np.uint8)), "y": ["cat", "", "dog", None] * 15}
    found = read_all(parquet(write_parquet(tmp_path / "rows.parquet", columns)))
    assert (found.info.class_names, found.labels[:4]) == (("cat", "dog"), [0, -1, 1, -1])


def test_a_number_that_may_stand_for_no_label_is_told(tmp_path: Path) -> None:
    x = fixed_list(np.zeros((60, 2), np.uint8))
    path = write_parquet(tmp_path / "rows.parquet", {"x": x, "y": [0, 1, 2, 255] * 15})
    (told,) = read_all(parquet(path)).info.warnings
    assert told == (
        "252 of 256 classes have no row (the first: '3'); where the label 255 means that there is none, write null in "
        "its place"
    )
    path = write_parquet(tmp_path / "rows.parquet", {"x": x, "y": [0, 1, 3, 4] * 15})
    assert read_all(parquet(path)).info.warnings == ("1 of 5 classes have no row (the first: '2')",)


def test_the_order_in_which_pieces_arrive_does_not_matter(tmp_path: Path) -> None:
    words = [f"class {n * 7 % 5}" for n in range(60)]
    columns = {"x": fixed_list(np.zeros((60, 2), np.uint8)), "y": words}
    source = open_source(parquet(write_parquet(tmp_path / "set", columns, files=6)))
    assert isinstance(source, ParquetSource)
    small = [(p.first_row + at, table) for p in source.pieces() for at, table in source.annotations(p)]
    small = [(first + at, table.slice(at, 10)) for first, table in small for at in range(0, table.num_rows, 10)]
    one, two = source.info(small), source.info(list(reversed(small)))
    assert one.class_names == two.class_names
    assert one.labels is not None
    assert two.labels is not None
    assert np.array_equal(one.labels, two.labels)


def test_no_labels_at_all_need_names_of_classes(tmp_path: Path) -> None:
    columns = {"x": fixed_list(np.zeros((60, 2), np.uint8)), "y": pa.nulls(60, pa.string())}
    path = write_parquet(tmp_path / "rows.parquet", columns)
    for keys in ({}, {"columns": {"label": None}}):
        assert read_all(parquet(path, class_names=["a", "b"], **keys)).labels == [-1] * 60
        with pytest.raises(UserError, match=r"no row has a label: name .* the classes in data\.class_names"):
            read_all(parquet(path, **keys))


# --- what cannot be --------------------------------------------------------------------------------------------------

X = fixed_list(np.zeros((60, 2), np.float32))
NUMBERS = [[float(n), 1.0] for n in range(60)]


def changed(row: int, value: Any) -> list[Any]:
    return [*NUMBERS[:row], value, *NUMBERS[row + 1 :]]


@pytest.mark.parametrize(
    ("columns", "keys", "message"),
    [
        ({"y": LABELS, "xx": X}, {}, "data.columns.input: {path} has no column 'x': did you mean 'xx'?"),
        ({"x": X}, {}, "data.columns.label: {path} has no column 'y': there are: x"),
        ({"x": X, "y": LABELS}, {"columns": {"id": "key"}}, "data.columns.id: {path} has no column 'key'"),
        ({"x": X, "y": LABELS}, {"split": {"column": "part"}}, "data.split.column: {path} has no column 'part'"),
        ({"x": [], "y": []}, {}, "data.path {path}: holds no rows"),
        ({"x": [{"a": 1}] * 60, "y": LABELS}, {}, "column 'x' holds struct<a: int64>: an input is a list of numbers"),
        ({"x": X, "y": [0.5] * 60}, {}, "the column holds double; labels are integers or strings"),
        ({"x": X, "y": [*LABELS[:5], 0.5, *LABELS[6:]]}, {}, "and null marks a row without one (there is 0.5)"),
        ({"x": X, "y": [*LABELS[:5], 1e300, *LABELS[6:]]}, {}, "and null marks a row without one (there is 1e+300)"),
        ({"x": X, "y": [*LABELS[:5], -3.0, *LABELS[6:]]}, {}, "{path}, row 5 has the label -3: labels count from 0 on"),
        ({"x": X, "y": [*LABELS[:5], -3, *LABELS[6:]]}, {}, "{path}, row 5 has the label -3: labels count from 0 on"),
        (
            {"x": X, "y": LABELS}, {"class_names": ["a", "b"]},
            "{path}, row 2 has the label 2, out of range for 2 classes in data.class_names (0 to 1)",
        ),
        (
            {"x": X, "y": ["cat", "dog", "dgo"] * 20, "key": [f"k{n}" for n in range(60)]},
            {"class_names": ["cat", "dog"], "columns": {"id": "key"}},
            "{path}, row 2 (id 'k2') has the label 'dgo', which is not in data.class_names: did you mean 'dog'?",
        ),
        ({"x": X, "y": [10**12, *LABELS[1:]]}, {}, "row 0 has the label 1000000000000, out of range for 1,000,000"),
        ({"x": X, "y": [0] * 60}, {}, "data.columns.label: the rows are of one class only: nothing to learn"),
        (
            {"x": X, "y": LABELS, "key": [*range(59), 7]}, {"columns": {"id": "key"}},
            "data.columns.id: 7 is the id of two rows, {path}, row 7 and {path}, row 59: ids must differ",
        ),
        (
            {"x": X, "y": [3, *LABELS[1:]], "part": ["test", *["train"] * 40, *["validation"] * 19]},
            {"split": {"column": "part"}},
            "data.split: class '3' has no training row, but 1 in test (1 such class(es)): leave its rows out",
        ),
        (
            {"x": X, "y": LABELS, "part": ["train"] * 59 + ["tset"]}, {"split": {"column": "part"}},
            "data.split.column: {path}, row 59 has 'tset', which means no split: did you mean 'test'?",
        ),
        (
            {"x": X, "y": LABELS, "part": ["train"] * 59 + [None]}, {"split": {"column": "part"}},
            "data.split.column: {path}, row 59 is in no split (null)",
        ),
        (
            {"x": X, "y": LABELS, "writer": [None] + [1] * 59}, {"split": {"group_by": "writer"}},
            "data.split.group_by: {path}, row 0 has no group",
        ),
        (
            {"x": X, "y": LABELS, "writer": [1, 2] * 30}, {"split": {"group_by": "writer"}},
            "data.split.group_by: 2 group(s) cannot be divided over 3 splits",
        ),
        ({"x": X, "y": LABELS}, {"input": {"shape": [3]}}, "data.input.shape: [3] is 3 numbers, but the rows have 2"),
        ({"x": X, "y": LABELS}, {"input": {"resize": [3, 3]}}, "data.input.resize: is for images, and column"),
        ({"x": [None] * 60, "y": LABELS}, {}, "column 'x' holds null: an input is"),
        ({"x": pa.nulls(60, pa.list_(pa.int8())), "y": LABELS}, {}, "{path}, row 0: its input is null"),
        ({"a": ["1"] * 60, "b": [1] * 60, "y": LABELS}, {"columns": {"input": ["a", "b"]}}, "'a' holds string; of"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(
    tmp_path: Path, columns: dict[str, Any], keys: dict[str, Any], message: str
) -> None:
    path = write_parquet(tmp_path / "rows.parquet", columns)
    with pytest.raises(UserError, match=re.escape(message.format(path=path))) as caught:
        read_all(parquet(path, **keys))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("columns", "reasons"),
    [
        ({"x": changed(9, [1.0, 2.0, 3.0])}, ["{path}, row 9: its input has 3 numbers, expected 2"]),
        ({"x": changed(9, [float("nan"), 0.0])}, ["{path}, row 9: its input holds a NaN"]),
        ({"x": changed(9, [0.0, float("inf")])}, ["{path}, row 9: its input holds an infinity"]),
        ({"x": changed(9, [1e300, 0.0])}, ["{path}, row 9: its input holds an infinity, or a number too large"]),
        ({"x": changed(9, None)}, ["{path}, row 9: its input is null"]),
        ({"x": changed(9, [None, 1.0])}, ["{path}, row 9: its input holds a null"]),
        ({"x": [[1, 2]] * 9 + [[1, 2**40]] + [[1, 2]] * 50}, ["{path}, row 9: its input holds an integer beyond"]),
        (
            {"a": [*range(9), None, *range(50)], "b": [1.0] * 59 + [float("nan")]},
            ["{path}, row 9: its input holds a null (column 'a')", "{path}, row 59: its input holds a NaN (col"],
        ),
    ],
)  # fmt: skip
def test_each_row_that_cannot_be_used_is_named(tmp_path: Path, columns: dict[str, Any], reasons: list[str]) -> None:
    path = write_parquet(tmp_path / "rows.parquet", {**columns, "y": LABELS})
    names = ["a", "b"] if "a" in columns else "x"
    found = bad_rows(parquet(path, columns={"input": names}))
    assert len(found) == len(reasons)
    for said, reason in zip(found, reasons, strict=True):
        assert said.startswith(reason.format(path=path))


def test_images_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    good = [png(image) for image in pixels(60)]
    deep = io.BytesIO()
    Image.fromarray(np.zeros((6, 5), np.uint16)).save(deep, "PNG")
    wrong = {
        3: (good[3][: len(good[3]) // 2], "cannot be decoded"), 8: (b"", "none that can be read (0 bytes)"),
        21: (b"no image", "none that can be read (8 bytes)"), 30: (None, "its input is null"),
        44: (png(pixels(1, 7, 5)[0]), "has the shape [1, 7, 5], expected [1, 6, 5]"),
        50: (deep.getvalue(), "more than 8 bits a channel"),
    }  # fmt: skip
    column = [wrong[n][0] if n in wrong else data for n, data in enumerate(good)]
    path = write_parquet(tmp_path / "rows.parquet", {"x": column, "y": LABELS, "key": [f"k{n}" for n in range(60)]})
    found = bad_rows(parquet(path, columns={"id": "key"}))
    assert len(found) == len(wrong)
    for said, (row, (_, reason)) in zip(found, sorted(wrong.items()), strict=True):
        assert said.startswith(f"{path}, row {row} (id 'k{row}'): ")
        assert reason in said


def test_an_image_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(pixels(1)[0]))
    path = write_parquet(tmp_path / "rows.parquet", {"x": ["0.png"] * 59 + ["1.png"], "y": LABELS})
    (said,) = bad_rows(parquet(path))
    assert said == f"{path}, row 59: its image 1.png is not there"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "set" / "a.parquet", {"x": X, "y": LABELS})
    for data, message in (
        (whole.read_bytes()[:-20], "cannot be read as Parquet (it has no Parquet footer: it was cut short"),
        (b"", "b.parquet: is empty (0 bytes)"),
        (b"nothing of the kind, but long enough for a footer", "cannot be read as Parquet"),
    ):
        (tmp_path / "set" / "b.parquet").write_bytes(data)
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            read_all(parquet(tmp_path / "set"))
        assert str(tmp_path / "set" / "b.parquet") in str(caught.value)
    data = whole.read_bytes()  # the footer is whole, a page is not
    (tmp_path / "set" / "b.parquet").write_bytes(data[:4] + bytes(56) + data[60:])
    with pytest.raises(UserError, match=r"b\.parquet: cannot be read as Parquet"):
        read_all(parquet(tmp_path / "set"))


def test_files_of_two_types(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "a.parquet", {"x": X, "y": LABELS})
    write_parquet(tmp_path / "set" / "b.parquet", {"x": X, "y": ["cat"] * 60})
    with pytest.raises(UserError, match=r"column 'y' is int64 in .*a\.parquet, but string in .*b\.parquet"):
        read_all(parquet(tmp_path / "set"))


@pytest.mark.parametrize("empty", [0, 1, 2])
@pytest.mark.parametrize("word", [False, True])
def test_a_file_without_any_value_in_a_column_has_the_type_of_the_others(
    tmp_path: Path, empty: int, word: bool
) -> None:
    for number, name in enumerate("abc"):
        values = [n if not word else ("ant", "bee")[n % 2] for n in range(2)] * 10
        columns = {"x": X.slice(0, 20), "y": values, "key": [number * 20 + n for n in range(20)]}
        if number == empty:
            columns |= {"y": pa.nulls(20), "key": pa.nulls(20)}
        write_parquet(tmp_path / "set" / f"{name}.parquet", columns)
    found = read_all(parquet(tmp_path / "set", columns={"id": "key"}))
    assert found.ids == [None if n // 20 == empty else n for n in range(60)]
    assert found.labels == [-1 if n // 20 == empty else n % 2 for n in range(60)]
    assert found.info.class_names == (("ant", "bee") if word else ("0", "1"))


def test_two_types_are_told_though_the_first_file_has_none(tmp_path: Path) -> None:
    for name, values in (("a", pa.nulls(60)), ("b", LABELS), ("c", ["cat"] * 60)):
        write_parquet(tmp_path / "set" / f"{name}.parquet", {"x": X, "y": values})
    with pytest.raises(UserError, match=r"column 'y' is int64 in .*b\.parquet, but string in .*c\.parquet"):
        read_all(parquet(tmp_path / "set"))


def test_an_input_that_one_file_has_no_value_of_is_missing_row_by_row(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "a.parquet", {"x": X, "y": LABELS})
    write_parquet(tmp_path / "set" / "b.parquet", {"x": pa.nulls(3), "y": LABELS[:3]})
    found = bad_rows(parquet(tmp_path / "set"))
    assert found == [f"{tmp_path / 'set' / 'b.parquet'}, row {n}: its input is null" for n in range(3)]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("nowhere", "no such file or folder"), ("nowhere/*.parquet", "no such file or folder"),
        ("empty", "holds no .parquet or .parq or .pq file"), ("empty/*.parquet", "no file matches it"),
    ],
)  # fmt: skip
def test_places_without_files(tmp_path: Path, location: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=re.escape(f"data.path {tmp_path / location}: {message}")):
        open_source(parquet(tmp_path / location)).fingerprint()


# --- on an object store ----------------------------------------------------------------------------------------------


def test_files_and_the_images_that_they_name_may_lie_on_an_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pixels(30)
    with object_store() as server:
        for key, value in server.environment().items():
            monkeypatch.setenv(key, value)
        client = server.client()
        for number, image in enumerate(images):
            client.put_object(Bucket=BUCKET, Key=f"set/png/{number}.png", Body=png(image))
        for part in range(2):
            names = [f"png/{number}.png" for number in range(part * 15, part * 15 + 15)]
            path = write_parquet(tmp_path / "rows.parquet", {"x": names, "y": LABELS[:15]})
            client.put_object(Bucket=BUCKET, Key=f"set/part-{part}.parquet", Body=path.read_bytes())
        for location in (f"s3://{BUCKET}/set", f"s3://{BUCKET}/set/part-*.parquet"):
            found = read_all(parquet(Path("unused")).model_copy(update={"path": location}))
            assert np.array_equal(found.inputs[:, 0], images)
            assert found.ids[-1] == "part-1.parquet/14"
        odd = ("hot dog", "köder", "100%", "a%20b", "q?#[1]", "+=&,;:@~")
        for number in range(30):
            key = f"odd/{odd[number % len(odd)]}/{number} %2F é?.png"
            client.put_object(Bucket=BUCKET, Key=key, Body=png(images[number]))
        folders = data_config(source="images", path=f"s3://{BUCKET}/odd")
        found = read_all(folders)
        assert found.info.class_names == tuple(sorted(odd))
        order = [int(name.split("/")[1].split()[0]) for name in found.ids]
        assert np.array_equal(found.inputs[:, 0], images[order])
        names = [f"{odd[n % len(odd)]}/{n} %2F é?.png" for n in range(30)]
        path = write_parquet(tmp_path / "rows.parquet", {"x": names, "y": LABELS[:30]})
        client.put_object(Bucket=BUCKET, Key="odd/the rows: 100%.parquet", Body=path.read_bytes())
        for location in (f"s3://{BUCKET}/odd", f"s3://{BUCKET}/odd/the rows: 100%.parquet"):
            found = read_all(parquet(Path("unused")).model_copy(update={"path": location}))
            assert np.array_equal(found.inputs[:, 0], images)
            assert found.ids[0] == "the rows: 100%.parquet/0"
        with pytest.raises(UserError, match="no such file or folder"):
            read_all(parquet(Path("unused")).model_copy(update={"path": f"s3://{BUCKET}/nowhere"}))
        client.put_object(Bucket=BUCKET, Key="set/part-2.parquet", Body=b"cut short")
        with pytest.raises(UserError, match=r"s3://.*/set/part-2\.parquet: cannot be read as Parquet"):
            read_all(parquet(Path("unused")).model_copy(update={"path": f"s3://{BUCKET}/set"}))
