"""FORMAT.md is enough: a reader written from it alone reads the golden file and whatever the writer writes."""

from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path

import brotli
import numpy as np
import pytest
import zstandard

from common.artifact.container import STREAM_CODECS, decode_artifact, encode_artifact, load_artifact
from common.quant.grid import QuantizedTensor, dequantize


def expand(codec: str, data: bytes, raw_bytes: int) -> bytes:
    if codec == "brotli":
        return brotli.decompress(data)
    if codec == "zstd":
        return zstandard.ZstdDecompressor().decompress(data)
    if codec == "lzma":
        size = 4096
        while size < raw_bytes and size < 2**26:
            size *= 2
        lzma2 = {"id": lzma.FILTER_LZMA2, "dict_size": size, "lc": 0, "lp": 0, "pb": 0}
        return lzma.decompress(data, format=lzma.FORMAT_RAW, filters=[lzma2])
    assert codec == "raw"
    return data


def number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def float_of_bits(bits: int) -> float:
    return float(np.frombuffer(bits.to_bytes(4, "little"), "<f4")[0])


def e4m3(code: int) -> float:
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if sign else magnitude


def stream_values(layout: str, raw: bytes, n: int) -> list[int]:
    if layout.startswith("pack"):
        k = int(layout[4:])
        assert len(raw) == -(-n * k // 8)
        whole = number(raw)
        assert whole >> n * k == 0
        return [whole >> index * k & (1 << k) - 1 for index in range(n)]
    width = int(layout[6:])
    assert len(raw) == width * n
    rotated = [number(bytes(raw[plane * n + index] for plane in range(width))) for index in range(n)]
    top = 8 * width - 1
    return [word >> 1 | (word & 1) << top for word in rotated]


def rans_symbols(stored: bytes, contexts: list[int]) -> list[int]:
    if not contexts:
        assert stored == b""
        return []
    at, tables = 1, []
    for _ in range(stored[0]):
        first, count = stored[at], stored[at + 1] + 1
        at += 2
        frequency = {}
        for symbol in range(first, first + count):
            value = shift = 0
            while stored[at] >= 128:
                value, shift, at = value + (stored[at] - 128 << shift), shift + 7, at + 1
            frequency[symbol] = value + (stored[at] << shift)
            at += 1
        assert sum(frequency.values()) == 2**14
        tables.append(frequency)
    n_lanes = 1
    while 16 * (2 * n_lanes) ** 2 <= len(contexts):
        n_lanes *= 2
    states = [number(stored[at + 4 * lane : at + 4 * lane + 4]) for lane in range(n_lanes)]
    at += 4 * n_lanes
    symbols = []
    for index, context in enumerate(contexts):
        lane = index % n_lanes
        x = states[lane]
        u, below = x % 2**14, 0
        for symbol, frequency in tables[context].items():  # noqa: B007 (the symbol found is used)
            if below <= u < below + frequency:
                break
            below += frequency
        symbols.append(symbol)
        x = frequency * (x // 2**14) + u - below
        if x < 2**16:
            x = 2**16 * x + number(stored[at : at + 2])
            at += 2
        states[lane] = x
    assert at == len(stored)
    assert set(states) == {2**16}
    return symbols


def mini_read(data: bytes) -> tuple[dict[str, np.ndarray], dict]:
    """Value by value, no shortcuts, no checks of hostile input."""
    assert data[:8] == bytes.fromhex("93 47 4F 4C 46 41 52 54")
    assert data[8] == 2
    header_bytes, header_raw_bytes, file_bytes = number(data[10:14]), number(data[14:18]), number(data[18:26])
    assert file_bytes == len(data)
    assert hashlib.blake2b(data[:-16], digest_size=16).digest() == data[-16:]
    codec = ("raw", "zstd", "brotli", "lzma")[data[9]]
    text = expand(codec, data[26 : 26 + header_bytes], header_raw_bytes)
    assert len(text) == header_raw_bytes
    header = json.loads(text.decode("utf-8"))
    assert list(header) == ["grids", "meta", "streams", "tensors"]

    def product(shape):
        result = 1
        for length in shape:
            result *= length
        return result

    needs = []  # (stream, count) in order of use
    wants = []  # (class stream, count)
    for _, shape, grid, code_stream, scale_stream, class_form, class_stream in header["tensors"]:
        scale = header["grids"][grid][2]
        rows, columns = (shape[0], product(shape[1:])) if len(shape) >= 2 else (1, product(shape))
        needs.append((code_stream, product(shape)))
        needs.append((scale_stream, {"row": rows, "tensor": 1, "cross": rows + columns, "none": 0}[scale]))
        wants.append((class_stream, {"row": rows, "tensor": 1, "cross": rows + columns, "none": 0}[class_form]))
    at = 26 + header_bytes
    parts = []
    for _, _, stored_bytes in header["streams"]:
        parts.append(data[at : at + stored_bytes])
        at += stored_bytes
    assert at == len(data) - 16

    def values_of(index, n, contexts):
        codec, layout, _ = header["streams"][index]
        if codec != "rans":
            raw_bytes = -(-n * int(layout[4:]) // 8) if layout.startswith("pack") else n * int(layout[6:])
            return stream_values(layout, expand(codec, parts[index], raw_bytes), n)
        if layout.startswith("pack"):
            values = rans_symbols(parts[index], contexts)
            assert all(value >> int(layout[4:]) == 0 for value in values)
            return values
        planes = [plane for plane in range(int(layout[6:])) for _ in range(n)]
        return stream_values(layout, bytes(rans_symbols(parts[index], planes)), n)

    class_streams = {stream for stream, count in wants if stream >= 0}
    classes = {}
    for index in class_streams:
        n = sum(count for stream, count in wants if stream == index)
        classes[index] = values_of(index, n, [0] * n)
    contexts = {index: [] for index in range(len(parts))}
    for (_, shape, _, code_stream, _, class_form, class_stream), (_, count) in zip(header["tensors"], wants):
        rows, columns = (shape[0], product(shape[1:])) if len(shape) >= 2 else (1, product(shape))
        own = []
        if class_form != "none":
            own, classes[class_stream] = classes[class_stream][:count], classes[class_stream][count:]
        for row in range(rows):
            for column in range(columns):
                context = 0
                if class_form == "tensor":
                    context = own[0]
                elif class_form == "row":
                    context = own[row]
                elif class_form == "cross":
                    context = own[row] + own[rows + column]
                contexts[code_stream].append(context)
    assert not any(classes.values())
    queues = []
    for index in range(len(parts)):
        n = sum(count for stream, count in needs if stream == index)
        queues.append([] if index in class_streams else values_of(index, n, contexts[index]))

    tensors = {}
    for name, shape, grid, code_stream, scale_stream, _, _ in header["tensors"]:
        kind, bits, scale, scale_dtype, _ = header["grids"][grid]
        n = product(shape)
        words, queues[code_stream] = queues[code_stream][:n], queues[code_stream][n:]
        rows = shape[0] if len(shape) >= 2 else 1
        columns = product(shape) // rows if rows else 0
        if kind == "int":
            codes = [word - (2 ** (bits - 1) - 1) for word in words]
        elif kind == "trellis":
            codes, state, after = [], 0, {0: (0, 5, 1, 6, 2, 4, 3, 7), 1: (2, 7, 3, 4, 0, 6, 1, 5)}
            for at, word in enumerate(words):
                if at % columns == 0:
                    state = 0
                codes.append(word - 127 + 0.5 * (state % 2))
                state = after[(word - 127) % 2][state]
        elif kind == "fp8_e4m3":
            codes = [e4m3(word) for word in words]
        else:
            codes = [float_of_bits(word << 16 if kind == "bf16" else word) for word in words]
        if scale == "none":
            values = np.array(codes, np.float32)
        else:
            n_scales = {"row": rows, "tensor": 1, "cross": rows + columns}[scale]
            scales, queues[scale_stream] = queues[scale_stream][:n_scales], queues[scale_stream][n_scales:]
            scales = [float_of_bits(word << 16 if scale_dtype == "bf16" else word) for word in scales]
            products = []
            for at, code in enumerate(codes):
                value = np.float32(code) * np.float32(scales[0 if scale == "tensor" else at // columns])
                products.append(value * np.float32(scales[rows + at % columns]) if scale == "cross" else value)
            values = np.array(products, np.float32)
        tensors[name] = values.reshape(shape)
    assert not any(queues)
    return tensors, header["meta"]


def assert_same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert list(first) == list(second)
    for name, values in first.items():
        assert values.shape == second[name].shape
        assert values.tobytes() == second[name].tobytes(), name


GOLDEN = Path(__file__).resolve().parents[2] / "golden"


@pytest.mark.parametrize(
    "name,codecs",
    [("zstd", {"zstd"}), ("general", {"raw", "brotli", "lzma"}), ("rans", {"rans"}), ("trellis", {"rans"})],
)
def test_golden_files_read_as_committed_and_so_does_the_mini_reader(name, codecs):
    """The files were written once; no later version may read other values from them."""
    path = GOLDEN / f"{name}.artifact"
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
        expected = {tensor: file[tensor] for tensor in sorted(file.files)}
    loaded, meta = load_artifact(path)
    assert_same(loaded, expected)
    assert meta["temperature"] == 1.0
    values, read_meta = mini_read(path.read_bytes())
    assert_same(values, expected)
    assert read_meta == meta
    assert codecs <= {stream.codec for stream in decode_artifact(path.read_bytes())[2].streams}


@pytest.mark.parametrize("codec", ["raw", "zstd", "brotli", "lzma", "rans", "all"])
def test_mini_reader_reads_what_the_writer_writes(tensors, meta, codec):
    values, read_meta = mini_read(encode_artifact(tensors, meta, STREAM_CODECS if codec == "all" else (codec,)))
    assert read_meta == meta
    expected = {
        name: dequantize(tensors[name]) if isinstance(tensors[name], QuantizedTensor) else tensors[name]
        for name in sorted(tensors)
    }
    assert_same(values, expected)


def test_uncompressed_files_are_the_same_for_ever(tensors, meta):
    """Without codec libraries in play every byte follows from FORMAT.md and the writer's order."""
    digest = hashlib.sha256(encode_artifact(tensors, meta, ("raw",))).hexdigest()
    assert digest == "7ac3cfedef7acb637c005cd7980e737423d4cd394b7573d9d52dc3c1180040e2"
    digest = hashlib.sha256(encode_artifact(tensors, meta, ("rans",))).hexdigest()
    assert digest == "73bba64b5058199db18aa6979f27a7aaf8d97a43e291909b94e43d378d58cb95"
