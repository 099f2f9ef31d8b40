"""Folders of images, tables that name them, and saved Hugging Face datasets."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

from distill_ray.config import InputWish
from distill_ray.errors import UserError
from distill_ray.sources import HuggingfaceSource, ImagesSource, open_source
from tests.harness import environment
from tests.own_data import Array, bad_rows, data_config, pixels, png, read_all, split_sizes

CLASSES = ("cat", "dog", "eel")


def write_folder(root: Path, images: Array, splits: tuple[str, ...] = ("",)) -> list[str]:
    """A folder a class, in each of the splits; returns the files' names in order."""
    names = []
    for number, image in enumerate(images):
        name = f"{splits[number % len(splits)]}/{CLASSES[number % 3]}/{number:03d}.png".lstrip("/")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(image))
        names.append(name)
    return names


def test_a_folder_a_class(tmp_path: Path) -> None:
    images = pixels(60)
    names = write_folder(tmp_path, images)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    found = read_all(data_config(source="images", path=str(tmp_path)))
    assert (found.info.shape, found.info.class_names) == ((1, 6, 5), CLASSES)
    assert found.ids == sorted(names)
    order = [int(name[-7:-4]) for name in found.ids]
    assert np.array_equal(found.inputs[:, 0], images[order])
    assert found.labels == [number % 3 for number in order]
    assert split_sizes(found.info.splits) == {"train": 48, "validation": 6, "test": 6}


def test_folders_of_splits_are_kept(tmp_path: Path) -> None:
    write_folder(tmp_path, pixels(60), splits=("train", "train", "train", "val", "test"))
    found = read_all(data_config(source="images", path=str(tmp_path)))
    assert found.info.class_names == CLASSES
    assert split_sizes(found.info.splits) == {"train": 36, "validation": 12, "test": 12}
    assert all(found.ids[row].startswith("val/") for row in found.info.splits["validation"])


@pytest.mark.parametrize(
    ("parts", "values"),
    [
        (("Training", "Testing"), None), (("TRAIN", "Test"), None),
        (("a", "b"), {"train": "a", "test": "b"}), (("Training", "test1"), {"train": "Training", "test": ["test1"]}),
    ],
)  # fmt: skip
def test_folders_of_splits_may_be_spelled_otherwise(
    tmp_path: Path, parts: tuple[str, str], values: dict[str, Any] | None
) -> None:
    write_folder(tmp_path, pixels(60), splits=parts)
    config = data_config(source="images", path=str(tmp_path), split={"values": values})
    found = read_all(config)
    assert found.info.class_names == CLASSES
    assert split_sizes(found.info.splits) == {"train": 27, "validation": 3, "test": 30}
    assert all(found.ids[row].startswith(f"{parts[1]}/") for row in found.info.splits["test"])
    assert "splits" in open_source(config).fingerprint()  # they were classes once, in a store of this very config


def test_folders_that_look_like_splits_are_no_classes_unless_it_is_said(tmp_path: Path) -> None:
    def refused(message: str, **keys: Any) -> None:
        with pytest.raises(UserError, match=re.escape(message)):
            read_all(data_config(source="images", path=str(tmp_path / "set"), **keys))

    def write(*names: str) -> None:
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        for number, image in enumerate(pixels(24)):
            place = tmp_path / "set" / names[number % len(names)] / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(png(image))

    def classes(**keys: Any) -> tuple[str, ...]:
        return read_all(data_config(source="images", path=str(tmp_path / "set"), **keys)).info.class_names

    for flat in (("train", "test"), ("Train", "TEST"), ("train", "test1")):
        write(*flat)
        refused("are splits by their names, and hold no folder a class: make one")
        assert classes(class_names=sorted(flat)) == tuple(sorted(flat))
    write("trn/cat", "trn/dog", "tst/cat", "tst/dog")
    refused("its folders trn, tst hold folders of the same names (cat, dog): say in data.split.values which split each")
    assert classes(class_names=["trn", "tst"]) == ("trn", "tst")
    assert classes(split={"values": {"train": "trn", "test": "tst"}}) == ("cat", "dog")
    refused("'tset' is none of the folders of the data: did you mean 'tst'?", split={"values": {"test": "tset"}})
    refused("is in no folder of a class in a split, as trn/", split={"values": {"train": "trn"}})
    write("cat/png", "dog/png", "test1", "test2")
    assert classes() == ("cat", "dog", "test1", "test2")
    write("cat", "dog")
    refused("are splits by their names, and hold no folder", split={"values": {"train": "cat"}})


def test_files_are_in_the_order_of_their_folders(tmp_path: Path) -> None:
    """As torchvision's ImageFolder has them: by whole names "hot dog/..." comes before "hot/...", since " " < "/"."""
    names = ("hot/1.png", "hot/a/0.png", "hot dog/1.png", "hot dog/0.png", "hot-dog/1.png")
    for name, image in zip(names, pixels(5), strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(image))
    config = data_config(source="images", path=str(tmp_path), split={"fractions": [0.4, 0.3, 0.3]})
    source = open_source(config)
    assert isinstance(source, ImagesSource)
    assert source.read(np.arange(5)).source_ids.to_pylist() == [  # type: ignore[union-attr]
        "hot/1.png", "hot/a/0.png", "hot dog/0.png", "hot dog/1.png", "hot-dog/1.png"
    ]  # fmt: skip


def test_a_file_beside_the_splits_does_not_make_classes_of_them(tmp_path: Path) -> None:
    write_folder(tmp_path, pixels(60), splits=("train", "val", "test"))
    (tmp_path / "train" / "logo.png").write_bytes(png(pixels(1)[0]))
    with pytest.raises(UserError, match=r"train/logo.png is in no folder of a class in a split, as test/.* is"):
        read_all(data_config(source="images", path=str(tmp_path)))


def test_names_that_cameras_and_people_give_with_an_underscore_count(tmp_path: Path) -> None:
    write_folder(tmp_path, pixels(30))
    (tmp_path / "cat").rename(tmp_path / "_background")
    (tmp_path / "dog" / "001.png").rename(tmp_path / "dog" / "_MG_001.png")
    found = read_all(data_config(source="images", path=str(tmp_path)))
    assert found.info.class_names == ("_background", "dog", "eel")
    assert len(found.ids) == 30


def test_a_second_run_in_one_process_sees_new_files(tmp_path: Path) -> None:
    from distill_ray.sources import open_cached, open_source, state_of

    write_folder(tmp_path, pixels(30))
    config = data_config(source="images", path=str(tmp_path))
    before = open_source(config)
    state = state_of(before)
    assert open_cached(config, state).rows == 30  # type: ignore[union-attr]
    (tmp_path / "cat" / "one_more.png").write_bytes(png(pixels(1)[0]))
    assert state_of(open_source(config)) != state
    assert len(read_all(config).ids) == 31
    from distill_ray.errors import RunError

    open_cached.__globals__["_open_cached"].cache_clear()  # another worker, which has opened nothing yet
    with pytest.raises(RunError, match="changed while they were read"):
        open_cached(config, state)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_names_files_and_labels(tmp_path: Path, suffix: str) -> None:
    images = pixels(60)
    names = write_folder(tmp_path, images)
    table = pa.table({
        "file": names, "animal": [CLASSES[n % 3] if n != 5 else None for n in range(60)], "n": list(range(60)),
        "who": [n // 6 for n in range(60)],
    })  # fmt: skip
    path = tmp_path / f"table{suffix}"
    if suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pa.parquet.write_table(table, path)
    columns = {"input": "file", "label": "animal", "id": "n"}
    keys: dict[str, Any] = {"source": "images", "path": str(tmp_path), "table": path.name}
    found = read_all(data_config(**keys, columns=columns, split={"group_by": "who"}))
    assert np.array_equal(found.inputs[:, 0], images)
    assert found.ids == list(range(60))
    assert [label for n, label in enumerate(found.labels) if n != 5] == [n % 3 for n in range(60) if n != 5]
    groups = [{row // 6 for row in rows.tolist()} for rows in found.info.splits.values()]
    assert sum(map(len, groups)) == 10
    assert found.labels[5] == -1


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    def refused(message: str, **keys: Any) -> None:
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            read_all(data_config(**{"source": "images", "path": str(tmp_path), **keys}))
        assert caught.value.exit_code == 2

    refused("holds no .png or .jpg")
    refused("no such file or folder", path=str(tmp_path / "nowhere"))
    write_folder(tmp_path, pixels(12))
    refused("is a file, not a folder of images", path=str(tmp_path / "cat" / "000.png"))
    table = {"table": "table.csv", "columns": {"input": "file", "label": "animal"}}
    refused("data.table", **table)
    (tmp_path / "table.csv").write_text("")
    refused("table.csv: is empty (0 bytes)", **table)
    (tmp_path / "table.csv").write_text("fil,animal\ncat/000.png,cat\n")
    refused("has no column 'file': did you mean 'fil'?", **table)
    (tmp_path / "table.csv").write_text("file,animal\n1,cat\n2,dog\n")
    refused("column 'file' holds int64, not the names of files", **table)
    (tmp_path / "stray.png").write_bytes(png(pixels(1)[0]))
    refused("stray.png is in no folder of a class")


def test_image_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, pixels(12))
    damaged = tmp_path / "dog" / "004.png"
    damaged.write_bytes(damaged.read_bytes()[:50])
    config = data_config(source="images", path=str(tmp_path))
    (said,) = bad_rows(config)
    assert said.startswith(f"{damaged}: its image ")
    with pytest.raises(UserError, match=re.escape(f"{damaged}: its image ")):
        read_all(config)


def test_one_image_in_colours_of_many_grey_ones_keeps_them(tmp_path: Path) -> None:
    """The first is grey; one of those that are looked at is not."""
    write_folder(tmp_path, pixels(60))
    colours = pixels(1, channels=3)[0]
    (tmp_path / "eel" / "059.png").write_bytes(png(colours))
    config = data_config(source="images", path=str(tmp_path))
    found = read_all(config)
    assert found.info.shape == (3, 6, 5)
    assert np.array_equal(found.inputs[-1], colours.transpose(2, 0, 1))
    grey = read_all(data_config(source="images", path=str(tmp_path), input={"channels": 1}))
    assert grey.info.shape == (1, 6, 5)


def test_colours_that_were_not_seen_beforehand_are_not_taken_away_untold(tmp_path: Path) -> None:
    names = write_folder(tmp_path, pixels(100))
    inner = sorted(names)[1]  # the step between those that are looked at is three
    (tmp_path / inner).write_bytes(png(pixels(1, channels=3)[0]))
    config = data_config(source="images", path=str(tmp_path))
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / inner}: its image has colours, and those that were")):
        read_all(config)
    for channels in (1, 3):
        found = read_all(config.model_copy(update={"input": InputWish(channels=channels)}))
        assert found.info.shape == (channels, 6, 5)


def test_files_that_are_not_read_are_counted(tmp_path: Path) -> None:
    write_folder(tmp_path, pixels(60))
    assert read_all(data_config(source="images", path=str(tmp_path))).info.warnings == ()
    for name in ("fox/1.heic", "fox/2.HEIC", "cat/3.heic", "cat/notes.txt", "README", ".DS_Store", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"what it may be")
    info = read_all(data_config(source="images", path=str(tmp_path))).info
    assert info.class_names == CLASSES
    (told,) = info.warnings
    assert told.startswith("5 file(s) in data.path are not read")
    counted = told.partition("as those of images: ")[2].partition(" (read are .png, ")[0]
    assert sorted(counted.split(", ")) == ["1 .txt", "1 without a suffix", "3 .heic"]


@pytest.mark.parametrize(
    ("written", "classes"),
    [
        (("01", "1", ""), ("01", "1")), (("001", "002", "003"), ("001", "002", "003")),
        (("0", "2", "10"), tuple(map(str, range(11)))), (("0", " 1", "2"), ("0", "1", "2")),
        (("-0", "0", "1"), ("-0", "0", "1")), (("1", "", f"{2**64}1"), ("1", f"{2**64}1")),
    ],
)  # fmt: skip
def test_labels_of_a_table_are_what_is_written(
    tmp_path: Path, written: tuple[str, ...], classes: tuple[str, ...]
) -> None:
    names = write_folder(tmp_path, pixels(60))
    lines = [f"{name},{written[n % 3]},0{n},{n // 6:02}" for n, name in enumerate(names)]
    (tmp_path / "t.csv").write_text("\n".join(["file,class,key,who", *lines]))
    columns = {"input": "file", "label": "class", "id": "key"}
    keys = {"source": "images", "path": str(tmp_path), "table": "t.csv", "columns": columns}
    found = read_all(data_config(**keys, split={"group_by": "who"}))
    assert found.info.class_names == classes
    assert [found.info.class_names[label] if label >= 0 else "" for label in found.labels] == [
        written[n % 3].strip() for n in range(60)
    ]
    assert found.ids == [f"0{n}" for n in range(60)]


def test_ids_of_a_table_that_no_number_holds_are_kept(tmp_path: Path) -> None:
    names = write_folder(tmp_path, pixels(60))
    ids = [str(10**24 + n) for n in range(60)]  # as floats they are all the same
    lines = [f"{name},{n % 3},{key}" for n, (name, key) in enumerate(zip(names, ids, strict=True))]
    (tmp_path / "t.csv").write_text("\n".join(["file,class,key", *lines]))
    columns = {"input": "file", "label": "class", "id": "key"}
    keys = {"source": "images", "path": str(tmp_path), "table": "t.csv", "columns": columns}
    assert read_all(data_config(**keys)).ids == ids


def test_two_columns_of_one_name_are_told(tmp_path: Path) -> None:
    names = write_folder(tmp_path, pixels(6))
    (tmp_path / "t.csv").write_text("\n".join(["file,class,class", *(f"{name},1,2" for name in names)]))
    columns = {"input": "file", "label": "class"}
    with pytest.raises(UserError, match=r"data\.columns\.label: .*t\.csv has several columns 'class'"):
        read_all(data_config(source="images", path=str(tmp_path), table="t.csv", columns=columns))


@pytest.mark.parametrize("source", ["images", "huggingface"])
def test_looking_for_bad_rows_takes_little_memory_however_large_they_are(tmp_path: Path, source: str) -> None:
    """60 images of 3 MB each, decoded a few at a time."""
    large = png(np.zeros((1000, 1000, 3), np.uint8))
    if source == "images":
        for number, name in enumerate(write_folder(tmp_path, pixels(60))):
            (tmp_path / name).write_bytes(large if number != 7 else b"none")
        config = data_config(source="images", path=str(tmp_path))
    else:
        import datasets

        rows = {"image": [{"bytes": large if n != 7 else b"none", "path": None} for n in range(60)]}
        columns = datasets.Features(image=datasets.Image())
        datasets.Dataset.from_dict(rows, features=columns).save_to_disk(tmp_path)
        config = data_config(source="huggingface", path=str(tmp_path), columns={"input": "image"})
    bad_rows(config)  # what is imported and kept counts no more
    tracemalloc.start()
    try:
        assert len(bad_rows(config)) == 1
        assert tracemalloc.get_traced_memory()[1] < 45e6
    finally:
        tracemalloc.stop()


def test_the_files_of_few_images_of_a_dataset_are_in_memory_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset(pixels(60, 12, 12)).save_to_disk(str(tmp_path))
    taken: list[int] = []
    whole = HuggingfaceSource._rows

    def counted(self: HuggingfaceSource, rows: Any) -> Any:
        taken.append(len(rows))
        return whole(self, rows)

    monkeypatch.setattr(HuggingfaceSource, "_rows", counted)
    columns = {"input": "image", "label": "label"}
    keys: dict[str, Any] = {"source": "huggingface", "path": str(tmp_path), "columns": columns}
    found = read_all(data_config(**keys, input={"resize": [2, 2]}))
    assert found.inputs.shape == (60, 1, 2, 2)
    assert max(taken) <= 16


# --- saved Hugging Face datasets -------------------------------------------------------------------------------------


def features() -> Any:
    import datasets

    return datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)), key=datasets.Value("string"),
        grid=datasets.Array2D((2, 3), "float32"), row=datasets.List(datasets.Value("float64"), length=4),
    )  # fmt: skip


def dataset(images: Array, first: int = 0) -> Any:
    import datasets

    rows = len(images)
    columns = {
        "image": [{"bytes": png(image), "path": None} for image in images],
        "label": [-1 if n == 5 else n % 3 for n in range(rows)],
        "key": [f"k{first + n}" for n in range(rows)],
        "grid": [[[float(n)] * 3, [0.5] * 3] for n in range(rows)],
        "row": [[n, n + 0.5, 0, 1] for n in range(rows)],
    }
    return datasets.Dataset.from_dict(columns, features=features())


def test_a_saved_dataset(tmp_path: Path) -> None:
    images = pixels(60, channels=3)
    made = dataset(images).shuffle(seed=3)  # an index beside the rows
    made.save_to_disk(tmp_path / "saved")
    order = [int(key[1:]) for key in made["key"]]
    keys = {"source": "huggingface", "path": str(tmp_path / "saved")}
    found = read_all(data_config(**keys, columns={"input": "image", "label": "label", "id": "key"}))
    assert found.info.class_names == CLASSES
    assert np.array_equal(found.inputs, images[order].transpose(0, 3, 1, 2))
    assert found.labels == [-1 if n == 5 else n % 3 for n in order]
    assert found.ids == [f"k{n}" for n in order]
    grid = read_all(data_config(**keys, columns={"input": "grid", "label": "label"}))
    assert (grid.info.shape, grid.info.dtype) == ((2, 3), "float32")
    assert grid.inputs[:, 0, 0].tolist() == [float(n) for n in order]
    assert grid.ids[:2] == ["row/0", "row/1"]
    row = read_all(data_config(**keys, columns={"input": "row", "label": "label"}))
    assert row.inputs[:, 1].tolist() == [n + 0.5 for n in order]


def test_classes_of_a_saved_dataset_in_another_order_are_renumbered(tmp_path: Path) -> None:
    dataset(pixels(60)).save_to_disk(str(tmp_path))
    keys = {"source": "huggingface", "path": str(tmp_path), "columns": {"input": "image", "label": "label"}}
    plain = read_all(data_config(**keys))
    other = read_all(data_config(**keys, class_names=plain.info.class_names[::-1]))
    words = [
        [None if label < 0 else found.info.class_names[label] for label in found.labels] for found in (plain, other)
    ]
    assert words[0] == words[1]
    assert plain.labels != other.labels


def test_a_dataset_that_is_saved_again_is_read_again(tmp_path: Path) -> None:
    config = data_config(source="huggingface", path=str(tmp_path), columns={"input": "image", "label": "label"})
    dataset(pixels(60)).save_to_disk(str(tmp_path))
    before = read_all(config)
    shutil.rmtree(tmp_path)
    dataset(pixels(60, seed=5)).save_to_disk(str(tmp_path))
    assert not np.array_equal(read_all(config).inputs, before.inputs)


def test_the_splits_of_a_saved_dict_are_kept(tmp_path: Path) -> None:
    import datasets

    parts = {"train": dataset(pixels(30)), "test": dataset(pixels(12, seed=1), 30), "extra": dataset(pixels(3), 42)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    keys: dict[str, Any] = {
        "source": "huggingface", "path": str(tmp_path / "saved"), "columns": {"input": "image", "label": "label"}
    }  # fmt: skip
    with pytest.raises(UserError, match="its split 'extra' means none of ours"):
        read_all(data_config(**keys))
    found = read_all(data_config(**keys, split={"values": {"train": "train", "test": "test"}}))
    assert split_sizes(found.info.splits) == {"train": 27, "validation": 3, "test": 12}
    assert all(found.ids[row].startswith("test/") for row in found.info.splits["test"])
    assert np.array_equal(found.inputs[30:, 0], pixels(12, seed=1))
    # Left out, it would not be missed: another would be cut from the training rows.
    with pytest.raises(
        UserError, match="data.split.values: 'tset' is none of the splits of the data: did you mean 'test'"
    ):
        read_all(data_config(**keys, split={"values": {"train": "train", "test": "tset"}}))


def test_a_label_beyond_the_names_of_the_classes_is_named(tmp_path: Path) -> None:
    import datasets

    rows = {"row": [[float(n), 1.0] for n in range(20)], "label": [0, 1] * 10}
    made = datasets.Dataset.from_dict(rows)
    classes = datasets.Features(row=made.features["row"], label=datasets.ClassLabel(names=["ant", "bee"]))
    table = made.data.table.set_column(1, "label", pa.array([0, 1] * 9 + [0, 255]))
    datasets.Dataset(table.replace_schema_metadata(None), info=datasets.DatasetInfo(features=classes)).save_to_disk(
        tmp_path / "saved"
    )
    keys = {"source": "huggingface", "path": str(tmp_path / "saved"), "columns": {"input": "row", "label": "label"}}
    with pytest.raises(UserError, match=r"saved, row 19 has the label 255, and the dataset names 2 classes \(0 to 1\)"):
        read_all(data_config(**keys))


def test_a_split_that_misses_labels_has_floats_of_them(tmp_path: Path) -> None:
    import datasets

    rows = {"row": [[float(n), 1.0] for n in range(20)], "label": [0, 1] * 10}
    half = datasets.Dataset.from_dict(rows | {"label": [0.0, None] * 10})
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows), "test": half}).save_to_disk(tmp_path / "saved")
    keys = {"source": "huggingface", "path": str(tmp_path / "saved"), "columns": {"input": "row", "label": "label"}}
    assert read_all(data_config(**keys)).labels == [0, 1] * 10 + [0, -1] * 10


def test_a_split_without_any_label_is_unlabelled(tmp_path: Path) -> None:
    import datasets

    rows = {"row": [[float(n), 1.0] for n in range(20)], "label": ["ant", "bee"] * 10}
    test = datasets.Dataset.from_dict(rows | {"label": [None] * 20})
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows), "test": test}).save_to_disk(tmp_path / "saved")
    keys: dict[str, Any] = {
        "source": "huggingface", "path": str(tmp_path / "saved"), "columns": {"input": "row", "label": "label"}
    }  # fmt: skip
    assert read_all(data_config(**keys)).labels == [0, 1] * 10 + [-1] * 20
    test = datasets.Dataset.from_dict(rows | {"label": [0, 1] * 10})
    shutil.rmtree(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows), "test": test}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"data\.columns\.label: .* column 'label' has several types .*string, int64"):
        read_all(data_config(**keys))


def test_saved_datasets_that_cannot_be(tmp_path: Path) -> None:
    columns = {"input": "imag", "label": "label"}
    keys: dict[str, Any] = {"source": "huggingface", "path": str(tmp_path / "saved"), "columns": columns}
    with pytest.raises(UserError, match="no such folder; it is what save_to_disk"):
        read_all(data_config(**keys))
    dataset(pixels(12)).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="has no column 'imag': did you mean 'image'?"):
        read_all(data_config(**keys))
    shutil.rmtree(tmp_path / "saved")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "other.json").write_text("{}")
    keys["path"] += "/"
    with pytest.raises(UserError, match="is no dataset that save_to_disk made"):
        read_all(data_config(**keys))


def test_without_the_library_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not there
    config = data_config(source="huggingface", path=str(tmp_path), columns={"input": "image"})
    with pytest.raises(UserError, match=re.escape("pip install 'distill-ray[huggingface]'")):
        read_all(config)


def test_the_library_is_imported_only_where_it_is_used() -> None:
    code = "import sys, distill_ray.sources; sys.exit(len({'datasets', 'ray', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment())
    assert (done.returncode, done.stderr) == (0, "")
