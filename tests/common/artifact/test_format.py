"""FORMAT.md is enough: a reader written from it alone reads the golden file and whatever the writer writes."""

from __future__ import annotations

import hashlib
import json
import lzma

import brotli
import numpy as np
import pytest
import zstandard

from common.artifact.container import decode_artifact, encode_artifact, load_artifact
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


def mini_read(data: bytes) -> tuple[dict[str, np.ndarray], dict]:
    """Value by value, no shortcuts, no checks of hostile input."""
    assert data[:8] == bytes.fromhex("93 47 4F 4C 46 41 52 54")
    assert data[8] == 1
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
    for _, shape, grid, code_stream, scale_stream in header["tensors"]:
        scale = header["grids"][grid][2]
        rows = shape[0] if len(shape) >= 2 else 1
        needs.append((code_stream, product(shape)))
        needs.append((scale_stream, {"row": rows, "tensor": 1, "none": 0}[scale]))
    at = 26 + header_bytes
    queues = []
    for index, (codec, layout, stored_bytes) in enumerate(header["streams"]):
        n = sum(count for stream, count in needs if stream == index)
        raw_bytes = -(-n * int(layout[4:]) // 8) if layout.startswith("pack") else n * int(layout[6:])
        queues.append(stream_values(layout, expand(codec, data[at : at + stored_bytes], raw_bytes), n))
        at += stored_bytes
    assert at == len(data) - 16

    tensors = {}
    for name, shape, grid, code_stream, scale_stream in header["tensors"]:
        kind, bits, scale, scale_dtype, _ = header["grids"][grid]
        n = product(shape)
        words, queues[code_stream] = queues[code_stream][:n], queues[code_stream][n:]
        if kind == "int":
            codes = [word - (2 ** (bits - 1) - 1) for word in words]
        elif kind == "fp8_e4m3":
            codes = [e4m3(word) for word in words]
        else:
            codes = [float_of_bits(word << 16 if kind == "bf16" else word) for word in words]
        if scale == "none":
            values = np.array(codes, np.float32)
        else:
            rows = shape[0] if len(shape) >= 2 else 1
            n_scales = rows if scale == "row" else 1
            scales, queues[scale_stream] = queues[scale_stream][:n_scales], queues[scale_stream][n_scales:]
            scales = [float_of_bits(word << 16 if scale_dtype == "bf16" else word) for word in scales]
            per_scale = n // n_scales if n_scales else 1
            products = [np.float32(code) * np.float32(scales[at // per_scale]) for at, code in enumerate(codes)]
            values = np.array(products, np.float32)
        tensors[name] = values.reshape(shape)
    assert not any(queues)
    return tensors, header["meta"]


def assert_same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert list(first) == list(second)
    for name, values in first.items():
        assert values.shape == second[name].shape
        assert values.tobytes() == second[name].tobytes(), name


def test_golden_file_reads_as_committed(golden_artifact):
    """The file was written once; no later version may read other values from it."""
    with np.load(golden_artifact.with_suffix(".npz"), allow_pickle=False) as file:
        expected = {name: file[name] for name in sorted(file.files)}
    loaded, meta = load_artifact(golden_artifact)
    assert_same(loaded, expected)
    assert meta["temperature"] == 1.0
    assert {"raw", "zstd", "brotli", "lzma"} == {
        stream.codec for stream in decode_artifact(golden_artifact.read_bytes())[2].streams
    }


def test_mini_reader_reads_the_golden_file(golden_artifact):
    values, meta = mini_read(golden_artifact.read_bytes())
    loaded, loaded_meta = load_artifact(golden_artifact)
    assert_same(values, loaded)
    assert meta == loaded_meta


@pytest.mark.parametrize("codec", ["raw", "zstd", "brotli", "lzma"])
def test_mini_reader_reads_what_the_writer_writes(tensors, meta, codec):
    values, read_meta = mini_read(encode_artifact(tensors, meta, (codec,)))
    assert read_meta == meta
    expected = {
        name: dequantize(tensors[name]) if isinstance(tensors[name], QuantizedTensor) else tensors[name]
        for name in sorted(tensors)
    }
    assert_same(values, expected)


def test_uncompressed_files_are_the_same_for_ever(tensors, meta):
    """Without codec libraries in play every byte follows from FORMAT.md and the writer's order."""
    digest = hashlib.sha256(encode_artifact(tensors, meta, ("raw",))).hexdigest()
    assert digest == "e44542b28ce4226eeaa215a0e8d3265b26cf443a7a6799b2b4e611267154215b"
