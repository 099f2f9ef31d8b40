"""Columns of numbers and of images into arrays, all rows of one shape; what cannot be used is told row by row.

Shapes: B rows. Every function returns ``inputs`` [B, *shape] and the faults, offset -> reason; the values of a faulty
row are 0 and must not be used.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, UnidentifiedImageError

from distill_ray.config import InputWish
from distill_ray.errors import RunError, UserError
from distill_ray.storage import reason_of

Kind = Literal["list", "scalars", "images", "paths"]
Faults = dict[int, str]
Array = npt.NDArray[Any]

# Of the formats that Pillow knows, those that are pictures and nothing else: it hands EPS to ghostscript.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_GREY = ("L", "1", "LA")
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_ORIENTATION = 0x0112  # in EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
SAMPLE_ROWS = 32  # images that are looked at before one shape is said to be that of all
_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True)
class Layout:
    """How inputs are stored in the source (``kind``), and the ``shape`` and ``dtype`` that each becomes."""

    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    lengths: tuple[int, ...] = ()  # of nested lists: of those within a row, by depth

    @property
    def width(self) -> int:
        """Numbers of one row."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * np.dtype(self.dtype).itemsize


# --- which kind, from the type of the column -------------------------------------------------------------------------


def kind_of(name: str, column: pa.DataType) -> Kind:
    """What the input column holds.

    Raises:
        UserError: nothing that can be an input.
    """
    column = storage_type(column)
    if _is_list(column):
        return "list"
    if pa.types.is_struct(column) and {"bytes", "path"} <= {field.name for field in column}:
        return "images"
    if _is_binary(column):
        return "images"
    if pa.types.is_string(column) or pa.types.is_large_string(column) or pa.types.is_string_view(column):
        return "paths"
    dtype_of(name, column)
    return "scalars"


def dtype_of(name: str, column: pa.DataType) -> str:
    """The stored dtype for numbers of this Arrow type.

    Raises:
        UserError: they are no numbers, or of a type that no store holds.
    """
    while _is_list(column := storage_type(column)):
        column = column.value_type
    if pa.types.is_uint8(column) or pa.types.is_boolean(column):
        return "uint8"
    if pa.types.is_integer(column):
        return "int32"
    if pa.types.is_float16(column):
        return "float16"
    if pa.types.is_floating(column) or pa.types.is_decimal(column):
        return "float32"
    raise UserError(
        f"data.columns.input: column {name!r} holds {column}: an input is a list of numbers, a number, an encoded "
        "image (bytes), or the path of one"
    )


def storage_type(column: pa.DataType) -> pa.DataType:
    """The plain type below extension and dictionary types."""
    if isinstance(column, pa.BaseExtensionType):
        return storage_type(column.storage_type)
    return storage_type(column.value_type) if pa.types.is_dictionary(column) else column


def _is_list(column: pa.DataType) -> bool:
    return bool(pa.types.is_list(column) or pa.types.is_large_list(column) or pa.types.is_fixed_size_list(column))


def _is_binary(column: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(column)
        or pa.types.is_large_binary(column)
        or pa.types.is_fixed_size_binary(column)
        or pa.types.is_binary_view(column)
    )


def plain(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One array of a plain type."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # too large for one
        array = pa.concat_arrays(array.chunks)
    while isinstance(array, pa.ExtensionArray | pa.DictionaryArray):
        array = array.storage if isinstance(array, pa.ExtensionArray) else array.dictionary_decode()
    return array


# --- numbers ---------------------------------------------------------------------------------------------------------


def list_shape(row: pa.Scalar) -> tuple[int, ...] | None:
    """The shape of one list, None where it is null, empty or ragged."""
    try:
        shape = np.shape(row.as_py())
    except ValueError:
        return None
    return tuple(int(n) for n in shape) if shape and math.prod(shape) else None


def lists(column: pa.Array, layout: Layout) -> tuple[Array, Faults]:
    """Lists of numbers, nested or not, each of ``layout.width`` numbers."""
    leaves, offsets = _leaves(column)
    assert offsets is not None, "a list column"
    widths = np.diff(offsets)
    faults: Faults = {}
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    for row in np.flatnonzero(~valid):
        faults[int(row)] = "its input is null"
    for row in np.flatnonzero(valid & (widths != layout.width)):
        faults[int(row)] = f"its input has {widths[row]} numbers, expected {layout.width}"
    for row in np.flatnonzero(valid & (widths == layout.width) & ~_regular(column, layout.lengths)):
        faults[int(row)] = (
            f"the lists in it are not {' x '.join(map(str, layout.lengths))} long, as those of the first row"
        )
    good = np.flatnonzero([row not in faults for row in range(len(column))])
    picked = leaves.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    if len(good) < len(column):
        places = (offsets[good][:, np.newaxis] - offsets[0] + np.arange(layout.width)).reshape(-1)
        picked = picked.take(pa.array(places))
    values, wrong = _converted(picked, layout)
    inputs = np.zeros((len(column), layout.width), dtype=layout.dtype)
    inputs[good] = values.reshape(-1, layout.width)
    faults |= {int(good[offset]): reason for offset, reason in wrong.items()}
    return inputs.reshape(-1, *layout.shape), faults


def _regular(column: pa.Array, expected: Sequence[int]) -> npt.NDArray[np.bool_]:
    """By row: whether the lists within it are as long at each depth as those of the first row.

    The same number of leaves in other lists, 2 x 3 for 3 x 2, is another array.
    """
    rows = np.ones(len(column), dtype=np.bool_)
    level, owner = plain(column), np.arange(len(column))
    for length in expected:
        owner = np.repeat(owner, _lengths(level))
        level = plain(level.flatten())
        rows[np.unique(owner[_lengths(level) != length])] = False
    return rows


def _lengths(lists: pa.Array) -> npt.NDArray[np.int64]:
    return np.asarray(pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False), dtype=np.int64)


def _leaves(array: pa.Array) -> tuple[pa.Array, npt.NDArray[np.int64] | None]:
    """The numbers of a nested list column, and where each row's begin and end among them."""
    array = plain(array)
    if not _is_list(array.type):
        return array, None
    if pa.types.is_fixed_size_list(array.type):
        offsets = (np.arange(len(array) + 1, dtype=np.int64) + array.offset) * array.type.list_size
    else:
        offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    values, inner = _leaves(array.values)
    return values, offsets if inner is None else inner[offsets]


def _converted(leaves: pa.Array, layout: Layout) -> tuple[Array, Faults]:
    """Numbers [B * width] in the stored dtype, and the rows that have a null, a NaN, an infinity or too large a one."""
    faults: Faults = {}

    def tell(bad: Array, reason: str) -> None:
        for row in np.flatnonzero(bad.reshape(-1, layout.width).any(axis=1)):
            faults.setdefault(int(row), reason)

    if pa.types.is_decimal(leaves.type):
        leaves = leaves.cast(pa.float64())
    if leaves.null_count:
        tell(leaves.is_null().to_numpy(zero_copy_only=False), "its input holds a null")
        # What lies below the nulls does not matter: their rows are faulty already.
        leaves = pa.Array.from_buffers(leaves.type, len(leaves), [None, leaves.buffers()[1]], offset=leaves.offset)
    values = leaves.to_numpy(zero_copy_only=False)
    if layout.dtype == "int32" and values.dtype != np.int32:
        tell((values < _INT32.min) | (values > _INT32.max), "its input holds an integer beyond 32 bits")
    with np.errstate(over="ignore"):  # told below
        stored = values.astype(layout.dtype)
    if stored.dtype.kind == "f":
        tell(np.isnan(stored), "its input holds a NaN")
        tell(np.isinf(stored), f"its input holds an infinity, or a number too large for {layout.dtype}")
    return stored, faults


def scalars(columns: Sequence[pa.Array], names: Sequence[str], layout: Layout) -> tuple[Array, Faults]:
    """One number a column, a row of a table."""
    inputs = np.zeros((len(columns[0]), len(columns)), dtype=layout.dtype)
    faults: Faults = {}
    one = Layout("scalars", (1,), layout.dtype)
    for number, (column, name) in enumerate(zip(columns, names, strict=True)):
        values, wrong = _converted(column, one)
        inputs[:, number] = values
        for row, reason in wrong.items():
            faults.setdefault(row, f"{reason} (column {name!r})")
    return inputs.reshape(-1, *layout.shape), faults


# --- images ----------------------------------------------------------------------------------------------------------


class Undecodable(Exception):
    """An image that cannot be used; the message says why."""


def images(
    column: pa.Array, layout: Layout, wish: InputWish, open_path: Callable[[str], bytes]
) -> tuple[Array, Faults]:
    """Encoded images, or the paths of such, decoded one by one."""
    inputs = np.zeros((len(column), *layout.shape), dtype=np.uint8)
    faults: Faults = {}
    for row in range(len(column)):
        try:
            decoded = decode(encoded(column, row, open_path), wish, layout.shape[0])
            if decoded.shape != layout.shape:
                raise Undecodable(
                    f"its image has the shape {list(decoded.shape)}, expected {list(layout.shape)} (data.input.resize "
                    "makes all alike)"
                )
            inputs[row] = decoded
        except Undecodable as error:
            faults[row] = str(error)
    return inputs, faults


def with_colours(shape: tuple[int, ...], wish: InputWish, sample: Iterable[bytes]) -> tuple[int, ...]:
    """``shape``, that of the first image, with three channels where it is grey and one of a ``sample`` of files is not.

    Of the sample only headers are looked at; what is no image is left to those who decode it.
    """
    if shape[0] != 1 or wish.channels is not None or not any(map(_has_colours, sample)):
        return shape
    return (3, *shape[1:])


def _has_colours(data: bytes) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as file:
                return file.mode not in (*_GREY, *_DEEP)
    except Exception:  # whatever the decoders of damaged files raise
        return False


def sampled(count: int, most: int = SAMPLE_ROWS) -> list[int]:
    """The numbers below ``count`` that are looked at, in equal steps: the same each time."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, most)).tolist()})


def encoded(column: pa.Array, row: int, open_path: Callable[[str], bytes]) -> bytes:
    """The bytes of an image file: of the column itself, or of the file that it names.

    Raises:
        Undecodable: it is null, or there is no such file.
    """
    value = column[row].as_py()
    if isinstance(value, dict):
        value = value["bytes"] if value["bytes"] is not None else value["path"]
    if value is None:
        raise Undecodable("its input is null")
    if isinstance(value, bytes):
        return value
    try:
        return open_path(value)
    except FileNotFoundError:
        raise Undecodable(f"its image {value} is not there") from None
    except (IsADirectoryError, NotADirectoryError, pa.ArrowInvalid) as error:
        raise Undecodable(f"its image {value} cannot be read ({reason_of(error)})") from None
    except (OSError, pa.ArrowException) as error:  # of the storage, not of the row: it must not be left out for good
        raise RunError(f"{value}: cannot be read ({reason_of(error)}): the same command tries again") from None


def _upright(file: Image.Image) -> Image.Image:
    """Turned as its EXIF block says; as it is where that block is damaged, which the picture need not be."""
    file.load()
    try:
        turn = _TURNS.get(file.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever the reader of damaged blocks raises
        return file
    return file if turn is None else file.transpose(turn)


def _opaque(image: Image.Image) -> Image.Image:
    """On white where it is transparent: what lies below there is mostly black, as what is drawn on it may be."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def decode(data: bytes, wish: InputWish, channels: int | None = None) -> npt.NDArray[np.uint8]:
    """An image [channels, height, width]; resized where ``wish`` says so. Without ``channels``: as the file has it.

    What is transparent is white.

    Raises:
        Undecodable: it is no image, is damaged, or has more than 8 bits a channel; or it has colours, which
            ``channels`` would take from it though ``wish`` does not ask for that.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as file:
                if file.mode in _DEEP:
                    raise Undecodable("its image has more than 8 bits a channel: convert it to 8 bits first")
                image = _opaque(_upright(file))
                wanted = wish.channels or channels or (1 if file.mode in _GREY else 3)
                if wanted == 1 and wish.channels is None and file.mode not in _GREY:
                    raise Undecodable(
                        "its image has colours, and those that were looked at before are grey: data.input.channels (1 "
                        "or 3) says what all become"
                    )
                image = image.convert("L" if wanted == 1 else "RGB")
                if wish.resize is not None:
                    height, width = wish.resize
                    image = image.resize((width, height), Image.Resampling.BILINEAR)  # antialiased where it shrinks
                pixels = np.asarray(image, dtype=np.uint8)
    except UnidentifiedImageError:
        raise Undecodable(f"its image is none that can be read ({len(data)} bytes)") from None
    except Undecodable:
        raise
    except Exception as error:  # whatever the decoders of damaged files raise
        raise Undecodable(f"its image cannot be decoded ({reason_of(error)})") from None
    return pixels[np.newaxis] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
