"""What the artifact tests share: a small model on every grid, and a file builder that signs whatever it is given."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.quant.grid import QuantizedTensor, parse_grid_spec, quantize


def build_tensors() -> dict[str, QuantizedTensor | np.ndarray]:
    rng = np.random.default_rng(20260)
    labels = ["int2/clip2", "int3", "int4", "int5/tensor", "int6/clip12.85", "int7/f32", "int8", "fp8", "fp8/none"]
    labels.append("int8/cross")
    tensors: dict[str, QuantizedTensor | np.ndarray] = {
        f"blocks.{index}.mixer.weight": quantize(rng.standard_normal((6, 10)), parse_grid_spec(label))
        for index, label in enumerate(labels)
    }
    spread = np.exp(rng.standard_normal((48, 1)) + rng.standard_normal(32))  # rows and columns worth their classes
    tensors["blocks.wide"] = quantize(spread * rng.standard_normal((48, 32)) / 4, parse_grid_spec("int8/tensor/clip20"))
    tensors["conv.weight"] = quantize(rng.standard_normal((5, 1, 4)), parse_grid_spec("int4"))
    tensors["norm.größe"] = quantize(1 + 0.1 * rng.standard_normal(17), parse_grid_spec("bf16"))
    tensors["A_log"] = rng.standard_normal((2, 3)).astype(np.float32)
    tensors["temperature"] = np.array(1.25, np.float32)
    tensors["nothing"] = np.zeros((0, 3), np.float32)
    tensors["empty.rows"] = quantize(np.zeros((2, 0)), parse_grid_spec("int4"))
    tensors["zeros"] = quantize(np.zeros((3, 4)), parse_grid_spec("int4"))
    return tensors


GOLDEN = Path(__file__).resolve().parents[2] / "golden"
META = {"config": {"d_model": 512, "lr": 0.025, "name": "größe", "layers": [1, 2.5, None, True]}, "temperature": 1.0}


@pytest.fixture
def tensors() -> dict[str, QuantizedTensor | np.ndarray]:
    return build_tensors()


@pytest.fixture
def meta() -> dict:
    return json.loads(json.dumps(META))


def seal_file(
    header: bytes, body: bytes = b"", *, codec: int = 0, raw_bytes: int | None = None, version: int = 2
) -> bytes:
    """A file with any header and body and a correct length and checksum: reaches the parser behind the checksum."""
    file_bytes = 26 + len(header) + len(body) + 16
    raw_bytes = len(header) if raw_bytes is None else raw_bytes
    prefix = struct.pack("<8sBBIIQ", b"\x93GOLFART", version, codec, len(header), raw_bytes, file_bytes)
    content = prefix + header + body
    return content + hashlib.blake2b(content, digest_size=16).digest()


def canonical_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@pytest.fixture
def seal() -> Callable[..., bytes]:
    return seal_file


@pytest.fixture
def canonical() -> Callable[[object], bytes]:
    return canonical_json


@pytest.fixture
def golden_artifact() -> Path:
    return GOLDEN / "general.artifact"
