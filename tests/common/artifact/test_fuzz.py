"""Thousands of damaged and hostile files: the reader raises ArtifactError or reads them, and never uses much memory."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import brotli
import numpy as np
import pytest
import zstandard

from common.artifact.container import ARTIFACT_CODECS, STREAM_CODECS, decode_artifact, encode_artifact
from common.artifact.entropy import compress_stream
from common.errors import ArtifactError
from common.quant.grid import GridSpec, quantize
from scripts.hostile import damage, mutate_tree
from tests.common.artifact.conftest import GOLDEN

ROOT = Path(__file__).resolve().parents[3]
PREFIX_BYTES, DIGEST_BYTES = 26, 16
# Small files. The largest honest allocation is the dictionary of a header of at most 1 MiB.
PEAK_LIMIT_BYTES = 24 << 20


def split_file(data: bytes) -> tuple[bytes, bytes]:
    """(header text, body) of a sound file made with raw or brotli headers."""
    codec, stored_bytes = data[9], struct.unpack_from("<I", data, 10)[0]
    header = data[PREFIX_BYTES : PREFIX_BYTES + stored_bytes]
    text = header if codec == 0 else brotli.decompress(header)
    return text, data[PREFIX_BYTES + stored_bytes : -DIGEST_BYTES]


def seeds_of_the_fuzzer(tensors, meta) -> list[bytes]:
    weights = np.random.default_rng(0).standard_normal((4, 9))
    small = {"w": quantize(weights, GridSpec(bits=5)), "x": np.ones(3, np.float32)}
    sound = [encode_artifact(tensors, meta, (codec,)) for codec in STREAM_CODECS]
    return [*sound, encode_artifact(small, {}, ("raw",)), (GOLDEN / "trellis.artifact").read_bytes()]


def run_campaign(n_files: int, seed: int, sound: list[bytes], seal, canonical) -> Counter:
    """Feed n_files mutants to the reader; count (kind, refused or read). Anything but ArtifactError fails the test."""
    rng = random.Random(seed)
    parts = []
    for data in sound:
        if data[9] not in (0, ARTIFACT_CODECS.index("brotli")):  # give every seed a readable header
            tensors, meta, _ = decode_artifact(data)
            data = encode_artifact(tensors, meta, ("raw",))
        parts.append(split_file(data))
    outcomes: Counter = Counter()
    kinds = ("damage", "cut", "extend", "splice", "prefix", "body", "header bytes", "header tree", "stored header")
    for index in range(n_files):
        kind = kinds[index % len(kinds)]
        original = rng.choice(sound)
        text, body = rng.choice(parts)
        if kind == "damage":
            data = damage(rng, original)
        elif kind == "cut":
            data = original[: rng.randrange(len(original))]
        elif kind == "extend":
            data = original + rng.randbytes(rng.choice((1, 16, 500)))
        elif kind == "splice":
            other = rng.choice(sound)
            data = original[: rng.randrange(len(original))] + other[rng.randrange(len(other)) :]
        elif kind == "prefix":
            content = bytearray(original[:-DIGEST_BYTES])
            content[rng.randrange(8, PREFIX_BYTES)] = rng.choice((0, 1, 2, 3, 4, 127, 128, 255, rng.randrange(256)))
            data = bytes(content) + hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
        elif kind == "body":
            data = seal(text, damage(rng, body))
        elif kind == "header bytes":
            data = seal(damage(rng, text), body)
        elif kind == "header tree":
            data = seal(canonical(mutate_tree(rng, json.loads(text))), body)
        else:
            stored = damage(rng, compress_stream(text, rng.choice(("brotli", "zstd", "lzma"))))
            raw_bytes = rng.choice((len(text), len(text) + 1, 0, 1 << 20))
            data = seal(stored, body, codec=rng.randrange(5), raw_bytes=raw_bytes)
        try:
            decode_artifact(data)
            outcomes[kind, "read"] += 1
        except ArtifactError as error:
            message = str(error)
            assert message
            assert "\n" not in message
            assert len(message) < 1000
            outcomes[kind, "refused"] += 1
        if data in sound:
            outcomes[kind, "unchanged"] += 1
    return outcomes


def assert_outcomes(outcomes: Counter, n_files: int) -> None:
    refused = sum(count for (_, outcome), count in outcomes.items() if outcome == "refused")
    assert refused > 0.8 * n_files
    # without a repaired checksum, nothing but the unchanged file may be read
    for kind in ("damage", "cut", "extend", "splice"):
        assert outcomes[kind, "read"] == outcomes[kind, "unchanged"]
    # behind the checksum both outcomes occur: the parser was reached, and harmless changes (other codes) are read
    for kind in ("body", "header tree"):
        assert outcomes[kind, "read"] > 0
        assert outcomes[kind, "refused"] > 0


def test_2700_mutants_raise_nothing_but_artifact_errors(tensors, meta, seal, canonical):
    n_files = 2700
    sound = seeds_of_the_fuzzer(tensors, meta)
    tracemalloc.start()
    try:
        outcomes = run_campaign(n_files, 1, sound, seal, canonical)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert_outcomes(outcomes, n_files)
    assert peak_bytes < PEAK_LIMIT_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_100000_mutants(tensors, meta, seal, canonical, seed):
    assert_outcomes(run_campaign(10_000, seed, seeds_of_the_fuzzer(tensors, meta), seal, canonical), 10_000)


# ---------------------------------------------------------------------------------------------------------------- bombs

BOMB_BYTES = 1 << 27
ADDRESS_HEADROOM_BYTES = 160 << 20  # 16.8M free elements as packed bytes, codes and float32 at once, and some air

PROBE = """
import resource, sys
from pathlib import Path
import brotli, lzma, zstandard, numpy
from common.artifact.container import load_artifact
from common.errors import ArtifactError
virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (virtual + int(sys.argv[1]),) * 2)
for path in sys.argv[2:]:
    try:
        tensors, _ = load_artifact(path)
        print("read", sum(tensor.size for tensor in tensors.values()))
    except ArtifactError as error:
        print("refused", error)
"""


def brotli_bomb() -> bytes:
    compressor = brotli.Compressor(quality=1)
    pieces = [compressor.process(b"\0" * (1 << 20)) for _ in range(BOMB_BYTES >> 20)]
    return b"".join([*pieces, compressor.finish()])


def zstd_bomb(declared_bytes: int | None) -> bytes:
    """An honest frame of BOMB_BYTES zeros, or one that lies about its size."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=BOMB_BYTES)
    pieces = [compressor.compress(b"\0" * (1 << 20)) for _ in range(BOMB_BYTES >> 20)]
    frame = bytearray(b"".join([*pieces, compressor.flush()]))
    if declared_bytes is not None:
        assert frame[4] >> 6 == 2, "a content size of four bytes"
        offset = 5 if frame[4] & 32 else 6
        assert struct.unpack_from("<I", frame, offset)[0] == BOMB_BYTES
        struct.pack_into("<I", frame, offset, declared_bytes)
    return bytes(frame)


def zstd_of_a_huge_window(n_bytes: int) -> bytes:
    """A hand-made frame: not single-segment, window 2**40, content size in four bytes, one raw last block."""
    block = struct.pack("<I", n_bytes << 3 | 1)[:3] + b"\0" * n_bytes
    return b"\x28\xb5\x2f\xfd\x80\xf0" + struct.pack("<I", n_bytes) + block


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to bound its address space")
def test_bombs_stay_in_bounded_memory(tmp_path, seal, canonical):
    def one_tensor(codec: str, stored: bytes, shape: list[int]) -> bytes:
        header = {
            "grids": [["int", 8, "tensor", "f32", None]], "meta": {}, "streams": [[codec, "pack8", len(stored)],
            ["raw", "planes4", 4]], "tensors": [["w", shape, 0, 0, 1, "none", -1]],
        }  # fmt: skip
        return seal(canonical(header), stored + b"\0\0\0\x7f")

    bomb = brotli_bomb()
    long_zeros = compress_stream(b"\0" * (1 << 25), "lzma")
    free = 1 << 24
    files = {
        "brotli small": one_tensor("brotli", bomb, [1000]),
        "brotli allowed": one_tensor("brotli", bomb, [free]),
        "brotli declared": one_tensor("brotli", bomb, [BOMB_BYTES]),
        "brotli header": seal(bomb, codec=ARTIFACT_CODECS.index("brotli"), raw_bytes=1 << 20),
        "zstd small": one_tensor("zstd", zstd_bomb(None), [1000]),
        "zstd lying": one_tensor("zstd", zstd_bomb(1000), [1000]),
        "zstd window": one_tensor("zstd", zstd_of_a_huge_window(1000), [1000]),
        "lzma small": one_tensor("lzma", long_zeros, [1000]),
        "lzma allowed": one_tensor("lzma", long_zeros, [free]),
        "many axes": one_tensor("raw", b"", [1 << 31] * 8),
        "rows of nothing": one_tensor("raw", b"", [1 << 31, 0]),
        "honest zeros": one_tensor("brotli", brotli.compress(b"\x7f" * free, quality=1), [16, free // 16]),
    }
    paths = []
    for name, data in files.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(data)
    del bomb
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(ADDRESS_HEADROOM_BYTES), *map(str, paths)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcome = dict(zip(files, done.stdout.splitlines(), strict=True))
    assert outcome.pop("honest zeros") == f"read {free}"
    # a raw block of zeros is sound data: the code -127 a thousand times; only its window is absurd
    window = outcome.pop("zstd window")
    assert window == "read 1000" or window.startswith("refused")
    assert all(line.startswith("refused") for line in outcome.values()), outcome
