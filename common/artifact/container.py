"""One file for a whole model: quantized tensors and meta data, every byte accounted for. Specified in FORMAT.md.

Nothing in a file is executed or unpickled. The reader allocates nothing whose size it has not first checked against
the size of the file and fixed limits; whatever is wrong with a file, it raises ArtifactError and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from common.artifact.budget import SizeReport, StreamSize, TensorSize, apportion_bytes
from common.artifact.classes import CLASS_FORMS, choose_classes, class_count, spread_classes
from common.artifact.entropy import ARTIFACT_CODECS, compress_if_smaller, compress_smallest, decompress_stream
from common.artifact.rans import rans_decode, rans_encode
from common.errors import ArtifactError, ConfigError
from common.files import write_atomically
from common.quant.bitpack import pack_codes, packed_size_bytes, unpack_codes
from common.quant.grid import (
    F32_GRID,
    GRID_SCALE_MAX,
    SMALL_CODE_KINDS,
    GridSpec,
    QuantizedTensor,
    dequantize,
    grid_scale_count,
    round_to_bf16,
)

ARTIFACT_MAGIC = b"\x93GOLFART"
ARTIFACT_VERSION = 2
ARTIFACT_DIGEST_BYTES = 16
# magic, version, header codec, stored and raw bytes of the header, bytes of the file
ARTIFACT_PREFIX = struct.Struct("<8sBBIIQ")

# Limits of the reader; the writer keeps them too. A file with more elements than this per byte is either a bomb or a
# model of constants.
ARTIFACT_MAX_FILE_BYTES = 1 << 32
ARTIFACT_MAX_HEADER_BYTES = 1 << 20
ARTIFACT_MAX_ELEMENTS = 1 << 31
ARTIFACT_FREE_ELEMENTS = 1 << 24
ARTIFACT_MAX_ELEMENTS_PER_BYTE = 64
ARTIFACT_MAX_AXES = 8
ARTIFACT_MAX_NAME_BYTES = 512
ARTIFACT_MAX_META_DEPTH = 32

_PACK_LAYOUTS = {f"pack{bits}": bits for bits in range(1, 9)}
_PLANE_LAYOUTS = {"planes2": 2, "planes4": 4}
_ESTIMATE_VALUES = 1 << 20  # how many values of a stream decide its layout
STREAM_CODECS = (*ARTIFACT_CODECS, "rans")  # rans codes values, not bytes: it is for streams, not for the header


# ------------------------------------------------------------------------------------------------------------ layouts


def _rotate_left(words: np.ndarray) -> np.ndarray:
    """Move the sign bit of 16- or 32-bit floats to the bottom, so that the exponent fills the top byte alone."""
    top = words.dtype.type(8 * words.itemsize - 1)
    return (words << words.dtype.type(1)) | (words >> top)


def _rotate_right(words: np.ndarray) -> np.ndarray:
    top = words.dtype.type(8 * words.itemsize - 1)
    return (words >> words.dtype.type(1)) | (words << top)


def _layout_size_bytes(layout: str, count: int) -> int:
    if layout in _PACK_LAYOUTS:
        return packed_size_bytes(count, _PACK_LAYOUTS[layout])
    return _PLANE_LAYOUTS[layout] * count


def _values_to_bytes(values: np.ndarray, layout: str) -> bytes:
    """Raw bytes of a stream. values: uint8 for pack layouts, uint16 or uint32 words for planes."""
    if layout in _PACK_LAYOUTS:
        return pack_codes(values, _PACK_LAYOUTS[layout]).tobytes()
    word_bytes = _PLANE_LAYOUTS[layout]
    words = _rotate_left(values).astype(f"<u{word_bytes}").view(np.uint8).reshape(-1, word_bytes)
    return np.ascontiguousarray(words.T).tobytes()


def _values_to_symbols(values: np.ndarray, contexts: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None, int]:
    """What rans codes: small values themselves; floats byte plane by byte plane, each with its table."""
    if values.dtype == np.uint8:
        return values, contexts, 1 if contexts is None else int(contexts.max(initial=0)) + 1
    word_bytes = values.dtype.itemsize
    planes = np.frombuffer(_values_to_bytes(values, f"planes{word_bytes}"), np.uint8)
    return planes, _plane_contexts(values.size, word_bytes), word_bytes


def _plane_contexts(count: int, word_bytes: int) -> np.ndarray:
    return np.repeat(np.arange(word_bytes, dtype=np.uint8), count)


def _rans_values(stored: bytes, layout: str, count: int, contexts: np.ndarray | None) -> np.ndarray:
    """Values of a rans stream."""
    if layout in _PLANE_LAYOUTS:
        word_bytes = _PLANE_LAYOUTS[layout]
        planes = rans_decode(stored, word_bytes * count, _plane_contexts(count, word_bytes))
        return _bytes_to_values(planes.tobytes(), layout, count)
    values = rans_decode(stored, count, contexts)
    if values.size and int(values.max()) >> _PACK_LAYOUTS[layout]:
        raise ArtifactError(f"the rans stream holds {int(values.max())}, more than {layout} can")
    return values


def _bytes_to_values(raw: bytes, layout: str, count: int) -> np.ndarray:
    """Inverse of _values_to_bytes."""
    raw_bytes = np.frombuffer(raw, np.uint8)
    if layout in _PACK_LAYOUTS:
        return unpack_codes(raw_bytes, _PACK_LAYOUTS[layout], count)
    word_bytes = _PLANE_LAYOUTS[layout]
    words = np.ascontiguousarray(raw_bytes.reshape(word_bytes, count).T).view(f"<u{word_bytes}").reshape(-1)
    return _rotate_right(words.astype(f"=u{word_bytes}"))


# --------------------------------------------------------------------------------------------------- codes and values


def _check_quantized(name: str, q: QuantizedTensor) -> None:
    """Refuse a tensor that no file may hold: wrong types or shapes, codes off the grid, unsound scales or values."""
    spec = q.spec
    other_dtypes = {"fp8_e4m3": np.uint8, "bf16": np.uint16, "f32": np.float32}
    expected_dtype = np.int8 if spec.holds_integers else other_dtypes[spec.kind]
    if q.codes.dtype != expected_dtype or q.codes.shape != tuple(q.shape):
        raise ArtifactError(
            f"tensor {name!r} has codes of {q.codes.dtype} {q.codes.shape}: "
            f"grid {spec.label} of shape {tuple(q.shape)} needs {np.dtype(expected_dtype)} of that shape"
        )
    n_scales = grid_scale_count(tuple(q.shape), spec)
    if q.scales.dtype != np.float32 or q.scales.shape != (n_scales,):
        raise ArtifactError(
            f"tensor {name!r} has scales of {q.scales.dtype} {q.scales.shape}: expected float32 ({n_scales},)"
        )
    if n_scales:
        # written so that NaN fails it
        if not bool(np.all((q.scales >= 0) & (q.scales <= np.float32(GRID_SCALE_MAX)))):
            raise ArtifactError(f"tensor {name!r} has a scale that is NaN, negative or above {GRID_SCALE_MAX:g}")
        if spec.scale_dtype == "bf16" and not np.array_equal(round_to_bf16(q.scales), q.scales):
            raise ArtifactError(f"tensor {name!r} has a scale that is not a bf16 value, as its grid {spec.label} says")
    if spec.holds_integers:
        sound = q.codes.size == 0 or (int(q.codes.max()) <= spec.qmax and int(q.codes.min()) >= -spec.qmax)
        fault = f"a code outside -{spec.qmax}..{spec.qmax}"
    else:
        if spec.kind == "fp8_e4m3":
            sound = not np.any((q.codes & np.uint8(0x7F)) == 0x7F)
        elif spec.kind == "bf16":
            sound = not np.any((q.codes & np.uint16(0x7F80)) == 0x7F80)
        else:
            sound = bool(np.isfinite(q.codes).all())
        fault = "NaN or an infinite value"
    if not sound:
        raise ArtifactError(f"tensor {name!r} on grid {spec.label} holds {fault}")


def _codes_to_words(q: QuantizedTensor) -> np.ndarray:
    """Codes as the unsigned values that a stream holds, one axis."""
    if q.spec.holds_integers:
        return (q.codes.reshape(-1) + np.int8(q.spec.qmax)).view(np.uint8)  # modulo 256: 0..2*qmax
    if q.spec.kind == "f32":
        return np.ascontiguousarray(q.codes).reshape(-1).view(np.uint32)
    return q.codes.reshape(-1)


def _words_to_codes(name: str, words: np.ndarray, shape: tuple[int, ...], spec: GridSpec) -> np.ndarray:
    if spec.holds_integers:
        if words.size and int(words.max()) > 2 * spec.qmax:
            raise ArtifactError(f"tensor {name!r} on grid {spec.label} holds the code {int(words.max()) - spec.qmax}")
        words = words.view(np.int8) - np.int8(spec.qmax)
    elif spec.kind == "f32":
        words = words.view(np.float32)
    return words.reshape(shape)


def _scale_words(q: QuantizedTensor) -> np.ndarray:
    bits = np.ascontiguousarray(q.scales).view(np.uint32)
    return (bits >> np.uint32(16)).astype(np.uint16) if q.spec.scale_dtype == "bf16" else bits


def _words_to_scales(words: np.ndarray) -> np.ndarray:
    if words.dtype == np.uint16:
        words = words.astype(np.uint32) << np.uint32(16)
    return words.view(np.float32)


def _entropy_weight(words: np.ndarray) -> int:
    """What a part of a stream should cost, in 1/1024 bit: its size times the entropy of its values taken alone."""
    if words.dtype != np.uint8:
        return 1024 * 8 * words.nbytes
    if words.size == 0:
        return 0
    share = np.bincount(words) / words.size
    share = share[share > 0]
    return max(1, round(1024 * words.size * float(-(share * np.log2(share)).sum())))


# ------------------------------------------------------------------------------------------------------------- header


def _check_meta(value: object, where: str, depth: int = 0) -> None:
    """Refuse what JSON cannot hold and give back unchanged (tuples excepted: they come back as lists)."""
    if depth > ARTIFACT_MAX_META_DEPTH:
        raise ArtifactError(f"{where} is nested more than {ARTIFACT_MAX_META_DEPTH} deep")
    if value is None or isinstance(value, bool | str):
        return
    if isinstance(value, int):
        if abs(value) >= 1 << 63:
            raise ArtifactError(f"{where} is an integer of {value.bit_length()} bits: at most 63 are allowed")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ArtifactError(f"{where} is {value}: JSON has only finite numbers")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_meta(item, f"{where}[{index}]", depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ArtifactError(f"{where} has the key {key!r} of type {type(key).__name__}: keys must be strings")
            _check_meta(item, f"{where}[{key!r:.40}]", depth + 1)
    else:
        raise ArtifactError(f"{where} is a {type(value).__name__}: use dict, list, str, int, float, bool or None")


def _header_text(header: Mapping[str, object]) -> bytes:
    """The one way to write a header: sorted keys, no spaces, UTF-8, finite numbers."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def _check_tensor_name(name: object) -> str:
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ArtifactError(f"tensor name {name!r:.80} is not a non-empty printable string")
    try:
        n_bytes = len(name.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise ArtifactError(f"tensor name {name!r:.80} is not valid Unicode") from error
    if n_bytes > ARTIFACT_MAX_NAME_BYTES:
        raise ArtifactError(f"tensor name {name!r:.80} has {n_bytes} bytes: at most {ARTIFACT_MAX_NAME_BYTES}")
    return name


def _check_tensor_shape(name: str, shape: Sequence[object]) -> tuple[int, ...]:
    if len(shape) > ARTIFACT_MAX_AXES:
        raise ArtifactError(f"tensor {name!r} has {len(shape)} axes: at most {ARTIFACT_MAX_AXES}")
    checked: list[int] = []
    for length in shape:
        if type(length) is not int or not 0 <= length <= ARTIFACT_MAX_ELEMENTS:
            raise ArtifactError(f"tensor {name!r} has an axis of {length!r:.40}: expected 0..{ARTIFACT_MAX_ELEMENTS}")
        checked.append(length)
    return tuple(checked)


def _check_element_count(shapes: Iterator[tuple[int, ...]], file_bytes: int) -> None:
    """Bound what the file expands to. Empty axes count as one: rows of an empty tensor have scales."""
    n_elements = sum(math.prod(max(length, 1) for length in shape) for shape in shapes)
    limit = min(ARTIFACT_MAX_ELEMENTS, ARTIFACT_FREE_ELEMENTS + ARTIFACT_MAX_ELEMENTS_PER_BYTE * file_bytes)
    if n_elements > limit:
        raise ArtifactError(f"{n_elements} elements declared: a file of {file_bytes} bytes may have at most {limit}")


# ------------------------------------------------------------------------------------------------------------ writing


@dataclass
class _StreamPlan:
    """A stream being put together: values of one kind, one after the other."""

    layouts: tuple[str, ...]
    parts: list[np.ndarray] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)  # of codes that may have classes: whose they are, in order


def _code_layouts(spec: GridSpec) -> tuple[str, ...]:
    """Layouts worth trying. Byte-oriented codecs see the symbols only where these do not straddle bytes."""
    if spec.kind == "bf16":
        return ("planes2",)
    if spec.kind == "f32":
        return ("planes4",)
    if spec.kind == "fp8_e4m3" or spec.bits == 8:
        return ("pack8",)
    if spec.bits in (2, 4):
        return (f"pack{spec.bits}",)
    return (f"pack{spec.bits}", "pack4") if spec.bits == 3 else (f"pack{spec.bits}", "pack8")


def _choose_layout(values: np.ndarray, layouts: tuple[str, ...], codecs: Sequence[str]) -> str:
    """The layout whose beginning is smallest: compressed with a fast codec, or plain where nothing is compressed."""
    if len(layouts) == 1:
        return layouts[0]
    raws = [_values_to_bytes(values[:_ESTIMATE_VALUES], layout) for layout in layouts]
    sizes = [len(stored) for _, stored in compress_smallest(raws, ("raw",) if set(codecs) == {"raw"} else ("zstd",))]
    return layouts[sizes.index(min(sizes))]


def _contexts(parts: Sequence[tuple[tuple[int, ...], str, np.ndarray]]) -> np.ndarray | None:
    """Contexts (uint8) of the codes of a stream from (shape, form, classes) of its tensors; None where all are 0.

    Raises ArtifactError as spread_classes.
    """
    if all(form == "none" for _, form, _ in parts):
        return None
    contexts = np.zeros(sum(math.prod(shape) for shape, _, _ in parts), np.uint8)
    at = 0
    for shape, form, classes in parts:
        count = math.prod(shape)
        if count and form != "none":
            contexts[at : at + count] = spread_classes(classes, shape, form)
        at += count
    return contexts


def encode_artifact(
    tensors: Mapping[str, QuantizedTensor | np.ndarray],
    meta: Mapping[str, Any],
    codecs: Sequence[str] = STREAM_CODECS,
) -> bytes:
    """Bytes of the file that save_artifact writes; arguments and errors as there."""
    quantized: dict[str, QuantizedTensor] = {}
    for name in sorted(tensors, key=_check_tensor_name):
        tensor = tensors[name]
        if isinstance(tensor, np.ndarray):
            if tensor.dtype != np.float32:
                raise ArtifactError(f"tensor {name!r} is an array of {tensor.dtype}: quantize it or cast it to float32")
            tensor = QuantizedTensor(F32_GRID, tensor, np.zeros(0, np.float32), tensor.shape)
        elif not isinstance(tensor, QuantizedTensor):
            raise ArtifactError(
                f"tensor {name!r} is a {type(tensor).__name__}: give a QuantizedTensor or float32 array"
            )
        _check_tensor_shape(name, tensor.shape)
        _check_quantized(name, tensor)
        quantized[name] = tensor
    _check_meta(dict(meta), "meta")

    plans: dict[tuple[str, ...], _StreamPlan] = {}
    for name, q in quantized.items():
        plan = plans.setdefault(("codes", q.spec.kind, str(q.spec.bits)), _StreamPlan(_code_layouts(q.spec)))
        plan.parts.append(_codes_to_words(q))
        plan.tensors.append(name)
        if q.spec.scale != "none":
            layout = "planes2" if q.spec.scale_dtype == "bf16" else "planes4"
            plans.setdefault(("scales", q.spec.scale_dtype), _StreamPlan((layout,))).parts.append(_scale_words(q))

    layouts: list[str] = []
    streams: list[tuple[str, bytes]] = []
    classes: dict[str, tuple[str, np.ndarray]] = {}
    for key, plan in plans.items():
        values = np.concatenate(plan.parts)
        plan.parts.clear()
        stored = None
        if "rans" in codecs:
            contexts = None
            if key[0] == "codes" and key[1] in SMALL_CODE_KINDS:
                own = choose_classes([quantized[name] for name in plan.tensors])
                classes |= dict(zip(plan.tensors, own, strict=True))
                contexts = _contexts([(quantized[name].shape, *classes[name]) for name in plan.tensors])
            stored = rans_encode(*_values_to_symbols(values, contexts))
        layouts.append(_choose_layout(values, plan.layouts, codecs))
        streams.append(compress_if_smaller(_values_to_bytes(values, layouts[-1]), codecs, stored))
        if streams[-1][0] != "rans":
            classes |= {name: ("none", np.zeros(0, np.uint8)) for name in plan.tensors}
    class_values = [classes[name][1] for name in quantized if name in classes and classes[name][0] != "none"]
    if class_values:
        values = np.concatenate(class_values)
        layouts.append(f"pack{max(int(values.max()).bit_length(), 1)}")
        plans["classes",] = _StreamPlan((layouts[-1],))
        stored = rans_encode(values, None) if "rans" in codecs else None
        streams.append(compress_if_smaller(_values_to_bytes(values, layouts[-1]), codecs, stored))

    grids: dict[GridSpec, int] = {}
    index_of = {key: index for index, key in enumerate(plans)}
    rows: list[list[object]] = []
    for name, q in quantized.items():
        form = classes.get(name, ("none",))[0]
        rows.append([
            name, list(q.shape), grids.setdefault(q.spec, len(grids)),
            index_of["codes", q.spec.kind, str(q.spec.bits)],
            -1 if q.spec.scale == "none" else index_of["scales", q.spec.scale_dtype],
            form, -1 if form == "none" else index_of["classes",],
        ])  # fmt: skip

    header = {
        "grids": [[spec.kind, spec.bits, spec.scale, spec.scale_dtype, spec.clip] for spec in grids],
        "meta": dict(meta),
        "streams": [[codec, layout, len(data)] for (codec, data), layout in zip(streams, layouts, strict=True)],
        "tensors": rows,
    }
    try:
        text = _header_text(header)
    except UnicodeEncodeError as error:
        raise ArtifactError(f"meta holds text that is not valid Unicode: {error}") from error
    if len(text) > ARTIFACT_MAX_HEADER_BYTES:
        raise ArtifactError(f"names, shapes and meta take {len(text)} bytes: at most {ARTIFACT_MAX_HEADER_BYTES}")
    [(header_codec, stored_header)] = compress_smallest([text], [codec for codec in codecs if codec != "rans"])
    body = b"".join(data for _, data in streams)
    file_bytes = ARTIFACT_PREFIX.size + len(stored_header) + len(body) + ARTIFACT_DIGEST_BYTES
    _check_element_count((q.shape for q in quantized.values()), file_bytes)
    if file_bytes > ARTIFACT_MAX_FILE_BYTES:
        raise ArtifactError(f"the artifact has {file_bytes} bytes: at most {ARTIFACT_MAX_FILE_BYTES}")
    codec_number = ARTIFACT_CODECS.index(header_codec)
    prefix = ARTIFACT_PREFIX.pack(
        ARTIFACT_MAGIC, ARTIFACT_VERSION, codec_number, len(stored_header), len(text), file_bytes
    )
    content = prefix + stored_header + body
    return content + hashlib.blake2b(content, digest_size=ARTIFACT_DIGEST_BYTES).digest()


def save_artifact(
    path: str | os.PathLike[str],
    tensors: Mapping[str, QuantizedTensor | np.ndarray],
    meta: Mapping[str, Any],
    codecs: Sequence[str] = STREAM_CODECS,
) -> SizeReport:
    """Write a model to one file.

    Args:
        path: where; replaced as a whole or not at all.
        tensors: by name. A float32 array is stored exactly. Their order does not matter: the file sorts them by name.
        meta: what JSON can hold (a tuple comes back as a list), at most 32 deep.
        codecs: those to try; on each stream the smallest result is kept.

    Returns:
        Where every byte of the file went.

    Raises:
        ArtifactError: a tensor with a NaN or infinite value or an unusable name, meta that is not JSON, a limit
            exceeded.
        OSError: the file cannot be written.

    Numerics: the finished bytes are decoded again and compared with the input before the file gets its name.
    """
    data = encode_artifact(tensors, meta, codecs)
    written, _, report = decode_artifact(data)
    for name, tensor in tensors.items():
        back = written[name]
        if isinstance(tensor, np.ndarray):
            same = isinstance(back, np.ndarray) and back.tobytes() == tensor.tobytes()
        elif isinstance(back, np.ndarray):
            same = tensor.spec == F32_GRID and back.tobytes() == tensor.codes.tobytes()
        else:
            same = back.spec == tensor.spec and np.array_equal(back.codes, tensor.codes)
            same = same and np.array_equal(back.scales, tensor.scales)
        assert same, f"tensor {name!r} does not survive its own encoding"
    write_atomically(path, data)
    return report


# ------------------------------------------------------------------------------------------------------------ reading


@dataclass
class _StreamEntry:
    """A stream of the table, and how many values the tensors take from it."""

    codec: str
    layout: str
    stored_bytes: int
    n_values: int = 0
    holds: str = ""  # "values" or "classes"


@dataclass(frozen=True)
class _TensorEntry:
    """A tensor of the table, and where in its streams it lies."""

    name: str
    shape: tuple[int, ...]
    spec: GridSpec
    code_stream: int
    code_start: int
    scale_stream: int
    scale_start: int
    class_form: str
    class_stream: int
    class_start: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_scales(self) -> int:
        return grid_scale_count(self.shape, self.spec)


def _header_rows(header: Mapping[str, object], key: str, width: int) -> list[list[Any]]:
    rows = header[key]
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == width for row in rows):
        raise ArtifactError(f"the header's {key!r} is not a list of rows of {width}")
    return rows


def _parse_header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"))
    except RecursionError as error:
        raise ArtifactError("the header is nested too deep") from error
    except ValueError as error:  # not UTF-8, not JSON, an integer of thousands of digits
        raise ArtifactError(f"the header is not JSON in UTF-8: {error!s:.200}") from error
    if not isinstance(header, dict) or sorted(header) != ["grids", "meta", "streams", "tensors"]:
        raise ArtifactError("the header does not have exactly the keys grids, meta, streams and tensors")
    if not isinstance(header["meta"], dict):
        raise ArtifactError("the header's meta is not an object")
    _check_meta(header["meta"], "meta")
    _check_meta([header["grids"], header["streams"], header["tensors"]], "the header")
    try:
        canonical = _header_text(header)
    except UnicodeEncodeError as error:
        raise ArtifactError("the header holds text that is not valid Unicode") from error
    if canonical != text:  # repeated keys, spaces, other spellings of a number: one content has one file
        raise ArtifactError("the header is not in canonical form: keys sorted and unique, no spaces")
    return header


def _parse_grids(header: Mapping[str, object]) -> list[GridSpec]:
    grids = []
    for row in _header_rows(header, "grids", 5):
        try:
            spec = GridSpec(*row)
        except ConfigError as error:
            raise ArtifactError(f"the header's grid {row!r:.80} is unknown: {error}") from error
        if [spec.kind, spec.bits, spec.scale] != row[:3]:  # defaults are for programs, not for files
            raise ArtifactError(f"the header's grid {row!r:.80} leaves a field out")
        grids.append(spec)
    return grids


def _parse_streams(header: Mapping[str, object]) -> list[_StreamEntry]:
    streams = []
    for codec, layout, stored_bytes in _header_rows(header, "streams", 3):
        if codec not in STREAM_CODECS:
            raise ArtifactError(f"codec {codec!r:.80} is unknown: this reader has {', '.join(STREAM_CODECS)}")
        if not isinstance(layout, str) or (layout not in _PACK_LAYOUTS and layout not in _PLANE_LAYOUTS):
            raise ArtifactError(f"stream layout {layout!r:.80} is unknown")
        if type(stored_bytes) is not int or not 0 <= stored_bytes <= ARTIFACT_MAX_FILE_BYTES:
            raise ArtifactError(f"a stream declares {stored_bytes!r:.40} bytes")
        streams.append(_StreamEntry(codec, layout, stored_bytes))
    return streams


def _take_values(
    streams: list[_StreamEntry], index: object, count: int, layouts: Sequence[str], what: str, holds: str = "values"
) -> int:
    """Reserve the next `count` values of a stream; returns where they start."""
    if type(index) is not int or not 0 <= index < len(streams):
        raise ArtifactError(f"{what} are in stream {index!r:.40}, but there are {len(streams)}")
    stream = streams[index]
    if stream.layout not in layouts:
        raise ArtifactError(f"{what} cannot be in a stream of layout {stream.layout}")
    if stream.holds not in ("", holds):
        raise ArtifactError(f"{what} cannot be in stream {index}, which holds {stream.holds}")
    stream.holds = holds
    start = stream.n_values
    stream.n_values += count
    return start


def _parse_tensors(
    header: Mapping[str, object], grids: list[GridSpec], streams: list[_StreamEntry], file_bytes: int
) -> list[_TensorEntry]:
    tensors: list[_TensorEntry] = []
    names: set[str] = set()
    rows = _header_rows(header, "tensors", 7)
    shapes: list[tuple[int, ...]] = []
    for name, shape, *_ in rows:
        _check_tensor_name(name)
        if name in names:
            raise ArtifactError(f"tensor name {name!r} occurs twice")
        names.add(name)
        if not isinstance(shape, list):
            raise ArtifactError(f"tensor {name!r} has the shape {shape!r:.80}: expected a list")
        shapes.append(_check_tensor_shape(name, shape))
    _check_element_count(iter(shapes), file_bytes)
    used: set[int] = set()
    for (name, _, grid, code_stream, scale_stream, form, class_stream), shape in zip(rows, shapes, strict=True):
        if type(grid) is not int or not 0 <= grid < len(grids):
            raise ArtifactError(f"tensor {name!r} is on grid {grid!r:.40}, but there are {len(grids)}")
        spec = grids[grid]
        if spec.holds_integers:
            code_layouts = [f"pack{bits}" for bits in range(spec.bits, 9)]
        else:
            code_layouts = {"fp8_e4m3": ["pack8"], "bf16": ["planes2"], "f32": ["planes4"]}[spec.kind]
        what = f"the codes of tensor {name!r}"
        code_start = _take_values(streams, code_stream, math.prod(shape), code_layouts, what)
        used.add(code_stream)
        scale_start = 0
        if spec.scale != "none":
            layout = "planes2" if spec.scale_dtype == "bf16" else "planes4"
            what = f"the scales of tensor {name!r}"
            scale_start = _take_values(streams, scale_stream, grid_scale_count(shape, spec), [layout], what)
            used.add(scale_stream)
        elif scale_stream != -1 or type(scale_stream) is not int:
            raise ArtifactError(f"tensor {name!r} has no scales, but names stream {scale_stream!r:.40} for them")
        class_start = 0
        if form not in CLASS_FORMS:
            raise ArtifactError(f"tensor {name!r} has classes of the form {form!r:.40}: use {', '.join(CLASS_FORMS)}")
        if form != "none":
            if spec.kind not in SMALL_CODE_KINDS or streams[code_stream].codec != "rans":
                raise ArtifactError(f"tensor {name!r} has classes, but its codes are not small numbers coded by rans")
            what = f"the classes of tensor {name!r}"
            count = class_count(shape, form)
            class_start = _take_values(streams, class_stream, count, list(_PACK_LAYOUTS), what, "classes")
            used.add(class_stream)
        elif class_stream != -1 or type(class_stream) is not int:
            raise ArtifactError(f"tensor {name!r} has no classes, but names stream {class_stream!r:.40} for them")
        tensors.append(
            _TensorEntry(
                name, shape, spec, code_stream, code_start, scale_stream, scale_start, form, class_stream, class_start
            )
        )
    if len(used) != len(streams):
        unused = min(set(range(len(streams))) - used)
        raise ArtifactError(f"stream {unused} of {streams[unused].stored_bytes} bytes belongs to no tensor")
    return tensors


def _open_frame(data: bytes) -> tuple[bytes, int, int]:
    """Check prefix, length and checksum; returns the header's text and where the body starts and ends."""
    smallest = ARTIFACT_PREFIX.size + ARTIFACT_DIGEST_BYTES
    magic = data[: len(ARTIFACT_MAGIC)]
    if magic != ARTIFACT_MAGIC[: len(magic)] or not magic:
        raise ArtifactError(f"not an artifact: the file begins with {magic!r}, expected {ARTIFACT_MAGIC!r}")
    if len(data) < smallest:
        raise ArtifactError(f"truncated: {len(data)} bytes, and the smallest artifact has {smallest}")
    _, version, codec_number, stored_bytes, raw_bytes, file_bytes = ARTIFACT_PREFIX.unpack_from(data)
    if version != ARTIFACT_VERSION:
        raise ArtifactError(f"format version {version} is unknown: this code reads {ARTIFACT_VERSION}, update it")
    if file_bytes != len(data):
        fault = "truncated" if len(data) < file_bytes else "extended"
        raise ArtifactError(f"{fault}: {len(data)} bytes, but the file says that it has {file_bytes}")
    content = memoryview(data)[:-ARTIFACT_DIGEST_BYTES]
    if hashlib.blake2b(content, digest_size=ARTIFACT_DIGEST_BYTES).digest() != data[-ARTIFACT_DIGEST_BYTES:]:
        raise ArtifactError("damaged: the checksum does not match the content; copy or export the file again")
    if codec_number >= len(ARTIFACT_CODECS):
        raise ArtifactError(f"header codec number {codec_number} is unknown")
    if raw_bytes > ARTIFACT_MAX_HEADER_BYTES:
        raise ArtifactError(f"the header declares {raw_bytes} bytes: at most {ARTIFACT_MAX_HEADER_BYTES}")
    body_start = ARTIFACT_PREFIX.size + stored_bytes
    if body_start > len(content):
        raise ArtifactError(f"the header declares {stored_bytes} stored bytes, more than the file has")
    text = decompress_stream(data[ARTIFACT_PREFIX.size : body_start], ARTIFACT_CODECS[codec_number], raw_bytes)
    return text, body_start, len(content)


def _entry_contexts(
    entries: Sequence[_TensorEntry], index: int, values: Sequence[np.ndarray], n_values: int
) -> np.ndarray | None:
    """Contexts of the codes in stream `index`, from classes that are decoded already; None where all are 0."""
    parts = []
    for entry in entries:
        if entry.code_stream == index:
            at = entry.class_start
            count = class_count(entry.shape, entry.class_form)
            classes = values[entry.class_stream][at : at + count] if count else np.zeros(0, np.uint8)
            parts.append((entry.shape, entry.class_form, classes))
    return _contexts(parts)


def decode_artifact(data: bytes) -> tuple[dict[str, QuantizedTensor | np.ndarray], dict[str, Any], SizeReport]:
    """Inverse of encode_artifact; results and errors as read_artifact."""
    text, body_start, body_end = _open_frame(data)
    header = _parse_header(text)
    streams = _parse_streams(header)
    entries = _parse_tensors(header, _parse_grids(header), streams, len(data))
    declared_bytes = sum(stream.stored_bytes for stream in streams)
    if declared_bytes != body_end - body_start:
        raise ArtifactError(f"the streams declare {declared_bytes} bytes, {body_end - body_start} follow the header")

    starts = list(accumulate((stream.stored_bytes for stream in streams), initial=body_start))
    values: list[np.ndarray] = [np.zeros(0, np.uint8)] * len(streams)
    # classes first: they say which tables the codes were coded with
    for index in sorted(range(len(streams)), key=lambda index: streams[index].holds != "classes"):
        stream = streams[index]
        stored = data[starts[index] : starts[index + 1]]
        try:
            if stream.codec == "rans":
                contexts = None
                if stream.layout in _PACK_LAYOUTS and stream.holds != "classes":
                    contexts = _entry_contexts(entries, index, values, stream.n_values)
                values[index] = _rans_values(stored, stream.layout, stream.n_values, contexts)
            else:
                raw = decompress_stream(stored, stream.codec, _layout_size_bytes(stream.layout, stream.n_values))
                values[index] = _bytes_to_values(raw, stream.layout, stream.n_values)
        except ArtifactError as error:
            raise ArtifactError(f"stream {index}: {error}") from error
    sizes = [
        StreamSize(stream.layout, stream.codec, _layout_size_bytes(stream.layout, stream.n_values), stream.stored_bytes)
        for stream in streams
    ]

    tensors: dict[str, QuantizedTensor | np.ndarray] = {}
    parts: list[list[tuple[int, bool, int]]] = [[] for _ in streams]  # (tensor, is scales, weight) in each stream
    for index, entry in enumerate(entries):
        words = values[entry.code_stream][entry.code_start : entry.code_start + entry.n_elements]
        parts[entry.code_stream].append((index, False, _entropy_weight(words)))
        scales = np.zeros(0, np.float32)
        if entry.spec.scale != "none":
            scale_words = values[entry.scale_stream][entry.scale_start : entry.scale_start + entry.n_scales]
            parts[entry.scale_stream].append((index, True, _entropy_weight(scale_words)))
            scales = _words_to_scales(scale_words)
        if entry.class_form != "none":
            class_end = entry.class_start + class_count(entry.shape, entry.class_form)
            class_words = values[entry.class_stream][entry.class_start : class_end]
            parts[entry.class_stream].append((index, True, _entropy_weight(class_words)))
        q = QuantizedTensor(
            entry.spec, _words_to_codes(entry.name, words, entry.shape, entry.spec), scales, entry.shape
        )
        _check_quantized(entry.name, q)
        tensors[entry.name] = q.codes if entry.spec.kind == "f32" else q

    code_bytes, scale_bytes = [0] * len(entries), [0] * len(entries)
    for stream, stream_parts in zip(streams, parts, strict=True):
        shares = apportion_bytes(stream.stored_bytes, [weight for _, _, weight in stream_parts])
        for (index, is_scales, _), share in zip(stream_parts, shares, strict=True):
            (scale_bytes if is_scales else code_bytes)[index] += share
    report = SizeReport(
        file_bytes=len(data),
        frame_bytes=ARTIFACT_PREFIX.size + ARTIFACT_DIGEST_BYTES,
        header_bytes=body_start - ARTIFACT_PREFIX.size,
        tensors=tuple(
            TensorSize(
                entry.name, entry.shape, entry.spec.label, entry.n_elements, code_bytes[index], scale_bytes[index]
            )
            for index, entry in enumerate(entries)
        ),
        streams=tuple(sizes),
    )
    return tensors, header["meta"], report


def read_artifact(
    path: str | os.PathLike[str],
) -> tuple[dict[str, QuantizedTensor | np.ndarray], dict[str, Any], SizeReport]:
    """Read a file as it is stored.

    Returns:
        The tensors by name, in the file's order, on their grids (a float32 array where the grid is f32); meta; where
        every byte of the file went.

    Raises:
        ArtifactError: the file is missing, unreadable, not an artifact, of another version, truncated, extended,
            damaged or hostile. Memory used is at most proportional to the checked number of elements.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"{os.fspath(path)}: not a regular file")
        if status.st_size > ARTIFACT_MAX_FILE_BYTES:
            raise ArtifactError(f"{os.fspath(path)}: {status.st_size} bytes, at most {ARTIFACT_MAX_FILE_BYTES} allowed")
        data = Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{os.fspath(path)}: cannot be read: {error.strerror or error}") from error
    try:
        return decode_artifact(data)
    except ArtifactError as error:
        raise ArtifactError(f"{os.fspath(path)}: {error}") from error


def load_artifact(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a model's values.

    Returns:
        float32 arrays by name (writable, owning their memory), equal to dequantize of what was saved, bit for bit;
        and meta.

    Raises:
        ArtifactError: as read_artifact.
    """
    stored, meta, _ = read_artifact(path)
    tensors: dict[str, np.ndarray] = {}
    for name in list(stored):
        tensor = stored.pop(name)
        tensors[name] = tensor.copy() if isinstance(tensor, np.ndarray) else dequantize(tensor)
    return tensors, meta
