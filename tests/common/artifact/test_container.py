"""Artifacts: round trips, exact sizes, determinism, and each way in which a file can be wrong."""

from __future__ import annotations

import hashlib
import os
import struct

import brotli
import numpy as np
import pytest

from common.artifact import container
from common.artifact.container import (
    ARTIFACT_CODECS,
    STREAM_CODECS,
    decode_artifact,
    encode_artifact,
    load_artifact,
    read_artifact,
    save_artifact,
)
from common.artifact.entropy import compress_stream
from common.errors import ArtifactError
from common.quant.grid import GridSpec, QuantizedTensor, dequantize, quantize

FLOAT = GridSpec("f32")


def values_of(tensor):
    return dequantize(tensor) if isinstance(tensor, QuantizedTensor) else tensor


@pytest.mark.parametrize("codecs", [STREAM_CODECS, *[(codec,) for codec in STREAM_CODECS]])
def test_round_trip_in_every_codec(tmp_path, tensors, meta, codecs):
    path = tmp_path / "model.artifact"
    report = save_artifact(path, tensors, meta, codecs)
    assert report.file_bytes == path.stat().st_size
    loaded, loaded_meta = load_artifact(path)
    assert loaded_meta == meta
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == np.float32
        assert loaded[name].shape == tensor.shape
        assert loaded[name].tobytes() == values_of(tensor).tobytes()
        assert loaded[name].flags.writeable
    stored, stored_meta, stored_report = read_artifact(path)
    assert stored_report == report
    assert stored_meta == meta
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            np.testing.assert_array_equal(stored[name], tensor)
            continue
        assert stored[name].spec == tensor.spec
        np.testing.assert_array_equal(stored[name].codes, tensor.codes)
        np.testing.assert_array_equal(stored[name].scales, tensor.scales)
        assert stored[name].codes.dtype == tensor.codes.dtype


def test_every_byte_is_counted_once(tensors, meta):
    data = encode_artifact(tensors, meta)
    _, _, report = decode_artifact(data)
    assert sum(tensor.total_bytes for tensor in report.tensors) + report.overhead_bytes == len(data)
    assert sum(stream.stored_bytes for stream in report.streams) + report.overhead_bytes == len(data)
    assert report.frame_bytes == 42
    assert report.n_weights == sum(values_of(tensor).size for tensor in tensors.values())
    assert {tensor.name for tensor in report.tensors} == set(tensors)


def test_bytes_go_to_the_tensor_that_needs_them():
    rng = np.random.default_rng(0)
    noise = quantize(rng.standard_normal((64, 64)), GridSpec())
    report = decode_artifact(encode_artifact({"a": noise, "z": quantize(np.zeros((64, 64)), GridSpec())}, {}))[2]
    noisy, constant = report.tensors
    assert noisy.bits_per_weight > 2.5
    assert constant.code_bytes <= 1


def test_same_content_gives_the_same_bytes(tensors, meta):
    shuffled = dict(reversed(tensors.items()))
    assert encode_artifact(tensors, meta) == encode_artifact(shuffled, dict(reversed(meta.items())))


def test_strided_arrays_and_empty_models(tmp_path):
    strided = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2]
    save_artifact(tmp_path / "a", {"w": strided, "t": strided.T}, {})
    loaded, meta = load_artifact(str(tmp_path / "a"))
    np.testing.assert_array_equal(loaded["w"], strided)
    np.testing.assert_array_equal(loaded["t"], strided.T)
    assert meta == {}
    report = save_artifact(tmp_path / "b", {}, {"k": 1})
    assert load_artifact(tmp_path / "b") == ({}, {"k": 1})
    assert report.n_weights == 0


def test_codes_of_another_rule_are_stored_as_given(tmp_path):
    """Any codes and scales on a grid can be stored, not only those of quantize: learned steps, error feedback."""
    q = QuantizedTensor(GridSpec(), np.array([[1, -7, 0]], np.int8), np.array([0.0], np.float32), (1, 3))
    save_artifact(tmp_path / "a", {"w": q}, {})
    assert not load_artifact(tmp_path / "a")[0]["w"].any()


def test_real_rows_beat_their_nominal_bits():
    rng = np.random.default_rng(1)
    q = quantize(rng.standard_normal((256, 1024)), GridSpec(bits=4))
    report = decode_artifact(encode_artifact({"w": q}, {}))[2]
    assert 3.0 < report.tensors[0].bits_per_weight < 3.25  # 3.10 bits of entropy, 0.016 of scales, rest is the codec


def test_six_bit_codes_keep_their_bytes_apart():
    rng = np.random.default_rng(2)
    q = quantize(rng.standard_normal((64, 512)), GridSpec(bits=6, clip=12.85))
    report = decode_artifact(encode_artifact({"w": q}, {}))[2]
    assert report.streams[0].layout == "pack8"
    assert report.tensors[0].bits_per_weight < 3.6


def test_write_is_atomic(tmp_path, monkeypatch, tensors):
    path = tmp_path / "model.artifact"
    save_artifact(path, tensors, {"v": 1})
    before = path.read_bytes()

    def full_disk(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_artifact(path, tensors, {"v": 2})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.artifact"]


# ----------------------------------------------------------------------------------------------- refusals of the writer


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[31m", "\ud800", "n" * 513, 5])
def test_unusable_names(name):
    with pytest.raises(ArtifactError, match="tensor name"):
        encode_artifact({name: np.zeros(1, np.float32)}, {})


@pytest.mark.parametrize(
    "meta,fault",
    [
        ({"a": np.float32(1)}, "float32"),
        ({"a": {1: 2}}, "keys must be strings"),
        ({"a": [float("nan")]}, "finite"),
        ({"a": 1 << 63}, "63"),
        ({"a": {1, 2}}, "set"),
        ({"a": b"x"}, "bytes"),
        ({"a": "\ud800"}, "Unicode"),
        ({"a": "x" * (1 << 20)}, "at most 1048576"),
    ],
)
def test_meta_that_json_cannot_hold(meta, fault):
    with pytest.raises(ArtifactError, match=fault):
        encode_artifact({}, meta)


def test_depth_of_meta():
    nested: object = 1
    for _ in range(31):
        nested = [nested]
    assert decode_artifact(encode_artifact({}, {"a": nested}))[1] == {"a": nested}
    with pytest.raises(ArtifactError, match="nested"):
        encode_artifact({}, {"a": [nested]})


def test_tuples_come_back_as_lists():
    assert decode_artifact(encode_artifact({}, {"betas": (0.9, 0.95)}))[1] == {"betas": [0.9, 0.95]}


def broken(q: QuantizedTensor, **changes) -> QuantizedTensor:
    fields = {"spec": q.spec, "codes": q.codes, "scales": q.scales, "shape": q.shape}
    return QuantizedTensor(**{**fields, **changes})


GOOD = quantize(np.ones((2, 3)), GridSpec(bits=4))
BAD_TENSORS = {
    "codes outside": broken(GOOD, codes=np.full((2, 3), 8, np.int8)),
    "most negative code": broken(GOOD, codes=np.full((2, 3), -8, np.int8)),
    "dtype of codes": broken(GOOD, codes=np.zeros((2, 3), np.int64)),
    "shape of codes": broken(GOOD, codes=np.zeros((3, 2), np.int8)),
    "number of scales": broken(GOOD, scales=np.ones(3, np.float32)),
    "dtype of scales": broken(GOOD, scales=np.ones(2)),
    "NaN scale": broken(GOOD, scales=np.array([1, np.nan], np.float32)),
    "infinite scale": broken(GOOD, scales=np.array([1, np.inf], np.float32)),
    "negative scale": broken(GOOD, scales=np.array([1, -1], np.float32)),
    "scale not bf16": broken(GOOD, scales=np.array([1, 1.001], np.float32)),
    "NaN in f32": np.array([1, np.nan], np.float32),
    "infinity in f32": np.array([1, np.inf], np.float32),
    "float64": np.zeros(3),
    "list": [1.0],
    "NaN in fp8": QuantizedTensor(
        GridSpec("fp8_e4m3", scale="none"), np.array([0xFF], np.uint8), np.zeros(0, np.float32), (1,)
    ),
    "NaN in bf16": QuantizedTensor(GridSpec("bf16"), np.array([0x7FC0], np.uint16), np.zeros(0, np.float32), (1,)),
    "nine axes": np.zeros((1,) * 9, np.float32),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_unsound_tensors_are_refused_by_name(tmp_path, case):
    with pytest.raises(ArtifactError, match=r"'the\.w'"):
        save_artifact(tmp_path / "model.artifact", {"the.w": BAD_TENSORS[case]}, {})
    assert not list(tmp_path.iterdir())


def test_a_constant_model_too_large_for_its_file_is_refused_by_the_writer_too(monkeypatch):
    monkeypatch.setattr(container, "ARTIFACT_FREE_ELEMENTS", 1000)
    with pytest.raises(ArtifactError, match="100000 elements declared: a file of"):
        encode_artifact({"w": np.zeros(100_000, np.float32)}, {}, ("zstd",))


def test_unknown_codec():
    with pytest.raises(ArtifactError, match="codec 'zip' is unknown"):
        encode_artifact({"w": np.zeros(3, np.float32)}, {}, ("zip",))


# ----------------------------------------------------------------------------------------------- refusals of the reader


def test_paths_that_cannot_be_read(tmp_path):
    with pytest.raises(ArtifactError, match=r"none\.artifact: cannot be read: No such file"):
        load_artifact(tmp_path / "none.artifact")
    with pytest.raises(ArtifactError, match="not a regular file"):
        load_artifact(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="not a regular file"):
        load_artifact(tmp_path / "pipe")
    (tmp_path / "other").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ArtifactError, match="other: not an artifact"):
        load_artifact(tmp_path / "other")


def test_every_truncation_and_extension_is_named(tensors, meta):
    data = encode_artifact(tensors, meta)
    for length in range(len(data)):
        with pytest.raises(ArtifactError, match="truncated" if length else "not an artifact"):
            decode_artifact(data[:length])
    for tail in (b"\0", b"\n", b"x" * 1000, data):
        with pytest.raises(ArtifactError, match="extended"):
            decode_artifact(data + tail)


def test_every_single_bit_flip_is_detected(meta):
    data = encode_artifact({"w": GOOD, "b": np.ones(3, np.float32)}, meta)
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(ArtifactError):
            decode_artifact(bytes(flipped))


def test_other_version_and_header_codec(seal, canonical):
    header = canonical({"grids": [], "meta": {}, "streams": [], "tensors": []})
    assert decode_artifact(seal(header))[0] == {}
    with pytest.raises(ArtifactError, match="version 1 is unknown"):
        decode_artifact(seal(header, version=1))
    with pytest.raises(ArtifactError, match="codec number 9"):
        decode_artifact(seal(header, codec=9))


def good_header() -> dict:
    """One 2x3 int4 tensor with bf16 row scales, and one float32 number; body in good_body."""
    return {
        "grids": [["int", 4, "row", "bf16", None], ["f32", 32, "none", "bf16", None]],
        "meta": {},
        "streams": [["raw", "pack4", 3], ["raw", "planes2", 4], ["raw", "planes4", 4]],
        "tensors": [["w", [2, 3], 0, 0, 1, "none", -1], ["x", [], 1, 2, -1, "none", -1]],
    }


# codes 0..5 minus 7; scales 1.0 and 2.0 = 3F80 and 4000, rotated 7F00 and 8000; 1.0 = 3F800000, rotated 7F000000
GOOD_BODY = bytes([0x10, 0x32, 0x54]) + bytes([0x00, 0x00, 0x7F, 0x80]) + bytes([0, 0, 0, 0x7F])


def test_a_file_made_by_hand(seal, canonical):
    tensors, _, report = decode_artifact(seal(canonical(good_header()), GOOD_BODY))
    np.testing.assert_array_equal(dequantize(tensors["w"]), [[-7, -6, -5], [-8, -6, -4]])
    assert tensors["x"] == 1.0
    assert [tensor.total_bytes for tensor in report.tensors] == [7, 4]


def set_at(header: dict, path: str, value: object) -> dict:
    *parents, last = [int(part) if part.lstrip("-").isdigit() else part for part in path.split("/")]
    node = header
    for part in parents:
        node = node[part]
    node[last] = value
    return header


HOSTILE_EDITS = [
    ("grids/0/0", "int16", "unknown"), ("grids/0/0", "", "unknown"), ("grids/0/0", ["int"], "unknown"),
    ("grids/0/0", None, "unknown"), ("grids/0/1", 0, "leaves a field out"), ("grids/0/1", 9, "not supported"),
    ("grids/0/1", True, "whole number"), ("grids/0/1", 4.5, "whole number"), ("grids/0/2", "", "leaves a field out"),
    ("grids/0/2", "none", "needs a scale"), ("grids/0/3", "f64", "unknown"), ("grids/0/4", -1, "clip"),
    ("grids/0/4", "3", "clip"), ("grids/0/4", 1e300, "clip"), ("grids/0", [], "rows of 5"), ("grids", {}, "rows of 5"),
    ("grids", "int4", "rows of 5"), ("streams/0/0", "gzip", "codec 'gzip'"), ("streams/0/0", [], "codec"),
    ("streams/0/1", "pack9", "layout"), ("streams/0/1", "pack3", "cannot be in a stream of layout pack3"),
    ("streams/0/1", "planes2", "cannot be in"), ("streams/0/1", {}, "layout"), ("streams/0/2", -1, "declares -1"),
    ("streams/0/2", 2, "declare"), ("streams/0/2", 1 << 62, "declares"), ("streams/0/2", 3.0, "declares"),
    ("streams/0/2", True, "declares"), ("streams/1/0", "zstd", "damaged"), ("streams/0/0", "brotli", "brotli"),
    ("streams/2/0", "lzma", "lzma"), ("streams", [], "there are 0"), ("streams/1/1", "planes4", "cannot be in"),
    ("tensors/0/0", "x", "occurs twice"), ("tensors/0/0", "", "name"), ("tensors/0/0", "a\u0000", "name"),
    ("tensors/0/0", 7, "name"), ("tensors/0/0", "é" * 300, "600 bytes"), ("tensors/0/1", [2, 4], "decodes to 3 bytes"),
    ("tensors/0/1", [2, -3], "axis"), ("tensors/0/1", [2, 3.0], "axis"), ("tensors/0/1", [2, True], "axis"),
    ("tensors/0/1", [1 << 31, 1 << 31], "elements declared"), ("tensors/0/1", [0, 1 << 31], "elements declared"),
    ("tensors/0/1", [1 << 62], "axis"), ("tensors/0/1", [2] * 9, "9 axes"), ("tensors/0/1", [1 << 31] * 8, "elements"),
    ("tensors/0/1", 6, "expected a list"), ("tensors/0/1", {"a": 1}, "expected a list"),
    ("tensors/0/1", [6], "decodes to 4 bytes, expected 2"), ("tensors/0/1", [3, 2], "decodes to 4 bytes, expected 6"),
    ("tensors/0/2", 2, "grid 2"), ("tensors/0/2", -1, "grid"),
    ("tensors/0/2", True, "grid True"), ("tensors/0/2", 0.0, "grid 0.0"), ("tensors/0/3", 3, "stream 3"),
    ("tensors/0/3", -1, "stream -1"), ("tensors/0/3", "0", "stream '0'"), ("tensors/0/4", -1, "stream -1"),
    ("tensors/0/4", 0, "cannot be in"), ("tensors/1/4", 1, "has no scales"), ("tensors/1/4", -1.0, "has no scales"),
    ("tensors/0/5", "row", "not small numbers coded by rans"), ("tensors/0/5", "both", "form"),
    ("tensors/0/5", ["row"], "form"), ("tensors/0/6", 0, "no classes"), ("tensors/0/6", -1.0, "no classes"),
    ("tensors/0", ["w"], "rows of 7"), ("tensors", [], "belongs to no tensor"), ("tensors", None, "rows of 7"),
    ("meta", [], "not an object"), ("meta", {"n": 1 << 70}, "63"), ("extra", 1, "exactly the keys"),
]  # fmt: skip


@pytest.mark.parametrize("path,value,fault", HOSTILE_EDITS)
def test_hostile_headers_behind_a_valid_checksum(seal, canonical, path, value, fault):
    header = set_at(good_header(), path, value)
    with pytest.raises(ArtifactError, match=fault):
        decode_artifact(seal(canonical(header), GOOD_BODY))


@pytest.mark.parametrize(
    "position,value,fault",
    [
        (0, 0xF0, "holds the code 8"),
        (5, 0xFF, "scale that is NaN"),  # exponent byte 0xFF: infinity
        (6, 0xFF, "scale that is NaN"),
        (3, 0x01, "scale that is NaN, negative"),  # lowest bit of the rotated word: the sign
        (10, 0xFF, "NaN or an infinite"),
    ],
)
def test_hostile_values_behind_a_valid_checksum(seal, canonical, position, value, fault):
    body = bytearray(GOOD_BODY)
    body[position] = value
    with pytest.raises(ArtifactError, match=fault):
        decode_artifact(seal(canonical(good_header()), bytes(body)))


def test_unused_bits_and_bytes(seal, canonical):
    header = set_at(set_at(good_header(), "tensors/0/1", [1, 5]), "streams/1/2", 2)
    body = bytes([0x10, 0x32, 0x04]) + bytes([0, 0x7F]) + GOOD_BODY[7:]
    assert decode_artifact(seal(canonical(header), body))[0]["w"].codes.shape == (1, 5)
    with pytest.raises(ArtifactError, match="unused bits"):
        decode_artifact(seal(canonical(header), bytes([0x10, 0x32, 0x54]) + body[3:]))
    with pytest.raises(ArtifactError, match="follow the header"):
        decode_artifact(seal(canonical(good_header()), GOOD_BODY + b"\0"))
    with pytest.raises(ArtifactError, match="follow the header"):
        decode_artifact(seal(canonical(good_header()), GOOD_BODY[:-1]))
    unused = set_at(good_header(), "streams", [*good_header()["streams"], ["raw", "pack8", 0]])
    with pytest.raises(ArtifactError, match="stream 3 of 0 bytes belongs to no tensor"):
        decode_artifact(seal(canonical(unused), GOOD_BODY))


DEEP = 100_000
HOSTILE_TEXTS = {
    "not UTF-8": (b'{"grids":[],"meta":{"a":"\xff"},"streams":[],"tensors":[]}', "not JSON in UTF-8"),
    "UTF-16": ('{"grids":[],"meta":{},"streams":[],"tensors":[]}'.encode("utf-16"), "not JSON in UTF-8"),
    "byte order mark": (b'\xef\xbb\xbf{"grids":[],"meta":{},"streams":[],"tensors":[]}', "not JSON"),
    "empty": (b"", "not JSON"),
    "cut": (b'{"grids":[', "not JSON"),
    "no object": (b"[]", "exactly the keys"),
    "space": (b'{"grids":[], "meta":{},"streams":[],"tensors":[]}', "canonical"),
    "unsorted": (b'{"meta":{},"grids":[],"streams":[],"tensors":[]}', "canonical"),
    "repeated key": (b'{"grids":[],"meta":{"a":1},"meta":{},"streams":[],"tensors":[]}', "canonical"),
    "NaN": (b'{"grids":[],"meta":{"a":NaN},"streams":[],"tensors":[]}', "finite"),
    "overflowing float": (b'{"grids":[],"meta":{"a":1e999},"streams":[],"tensors":[]}', "finite"),
    "long float": (b'{"grids":[],"meta":{"a":0.50},"streams":[],"tensors":[]}', "canonical"),
    "huge integer": (b'{"grids":[],"meta":{"a":' + b"9" * 5000 + b'},"streams":[],"tensors":[]}', "not JSON"),
    "large integer": (b'{"grids":[],"meta":{"a":' + b"9" * 4000 + b'},"streams":[],"tensors":[]}', "at most 63"),
    "large shape": (b'{"grids":[],"meta":{},"streams":[],"tensors":[["w",[' + b"9" * 4000 + b"]]]}", "63"),
    "lone surrogate": (b'{"grids":[],"meta":{"a":"\\ud800"},"streams":[],"tensors":[]}', "Unicode"),
    "surrogate name": (b'{"grids":[],"meta":{},"streams":[],"tensors":[["\\ud800",[],0,0,-1,"none",-1]]}', "Unicode"),
    "deep lists": (b'{"grids":' + b"[" * DEEP + b"]" * DEEP + b',"meta":{},"streams":[],"tensors":[]}', "nested"),
    "deep open": (b"[" * DEEP, "nested"),
    "deep objects": (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "nested"),
    "deep meta": (
        b'{"grids":[],"meta":{"a":' + b"[" * 33 + b"]" * 33 + b'},"streams":[],"tensors":[]}', "nested"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_TEXTS)
def test_hostile_header_texts(seal, case):
    text, fault = HOSTILE_TEXTS[case]
    with pytest.raises(ArtifactError, match=fault):
        decode_artifact(seal(text))


def test_header_sizes_are_bounded(seal, canonical):
    header = canonical({"grids": [], "meta": {}, "streams": [], "tensors": []})
    with pytest.raises(ArtifactError, match="at most 1048576"):
        decode_artifact(seal(header, raw_bytes=1 << 21))
    bomb = brotli.compress(b" " * (1 << 26), quality=1)
    with pytest.raises(ArtifactError, match="too many bytes"):
        decode_artifact(seal(bomb, codec=ARTIFACT_CODECS.index("brotli"), raw_bytes=1000))
    data = bytearray(seal(header))
    struct.pack_into("<I", data, 10, 0xFFFFFFFF)
    data[-16:] = hashlib.blake2b(data[:-16], digest_size=16).digest()
    with pytest.raises(ArtifactError, match="more than the file has"):
        decode_artifact(bytes(data))


@pytest.mark.parametrize("codec", ["brotli", "zstd", "lzma"])
def test_streams_that_expand_to_another_size(seal, canonical, codec):
    bomb = compress_stream(b"\x77" * (1 << 22), codec)
    header = good_header()
    header["streams"][0] = [codec, "pack4", len(bomb)]
    with pytest.raises(ArtifactError, match=r"stream 0: .*expected 3"):
        decode_artifact(seal(canonical(header), bomb + GOOD_BODY[3:]))
