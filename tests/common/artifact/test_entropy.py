"""The codecs: round trips, the smallest is kept, output is bounded, damage has a name."""

from __future__ import annotations

import types

import brotli
import numpy as np
import pytest

from common.artifact import entropy
from common.artifact.entropy import ARTIFACT_CODECS, compress_smallest, compress_stream, decompress_stream
from common.errors import ArtifactError

RNG = np.random.default_rng(0)
SAMPLES = {
    "one byte": b"x",
    "zeros": b"\0" * 100_000,
    "noise": RNG.bytes(5000),
    "skewed": RNG.binomial(15, 0.5, 70_000).astype(np.uint8).tobytes(),
    "long": RNG.integers(0, 3, 200_000).astype(np.uint8).tobytes(),
}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("codec", ARTIFACT_CODECS)
def test_round_trip(codec, sample):
    raw = SAMPLES[sample]
    stored = compress_stream(raw, codec)
    assert decompress_stream(stored, codec, len(raw)) == raw
    assert stored == compress_stream(raw, codec)


@pytest.mark.parametrize("codec", ARTIFACT_CODECS)
def test_empty(codec):
    assert decompress_stream(b"", codec, 0) == b""
    with pytest.raises(ArtifactError, match="expected 0"):
        decompress_stream(b"x", codec, 0)


def test_the_smallest_is_kept_and_raw_wins_on_noise():
    chosen = compress_smallest(list(SAMPLES.values()))
    for raw, (codec, stored) in zip(SAMPLES.values(), chosen, strict=True):
        sizes = {name: len(compress_stream(raw, name)) for name in ARTIFACT_CODECS}
        assert len(stored) == sizes[codec] == min(sizes.values())
        assert decompress_stream(stored, codec, len(raw)) == raw
    assert chosen[list(SAMPLES).index("noise")][0] == "raw"
    assert compress_smallest([b"", b"\0" * 1000], ("lzma",))[0] == ("raw", b"")
    assert compress_smallest([]) == []


@pytest.mark.parametrize("codec", ["zstd", "brotli", "lzma"])
@pytest.mark.parametrize("sample", ["skewed", "zeros", "one byte"])
def test_wrong_sizes_cuts_and_tails(codec, sample):
    raw = SAMPLES[sample]
    stored = compress_stream(raw, codec)
    for data, raw_bytes in [
        (stored, len(raw) - 1), (stored, len(raw) + 1), (stored, 10 * len(raw)), (stored[:-1], len(raw)),
        (stored[: len(stored) // 2], len(raw)), (stored + b"\0", len(raw)), (stored + stored, len(raw)),
        (b"", len(raw)), (b"\xff" * 40, len(raw)),
    ]:  # fmt: skip
        with pytest.raises(ArtifactError, match=codec):
            decompress_stream(data, codec, raw_bytes)


def test_unknown_codec():
    for call in (lambda: compress_stream(b"x", "gzip"), lambda: decompress_stream(b"x", "gzip", 1)):
        with pytest.raises(ArtifactError, match="codec 'gzip' is unknown"):
            call()


def test_a_brotli_without_bounds_is_refused_with_the_remedy(monkeypatch):
    class OldDecompressor:
        def process(self, data: bytes) -> bytes:
            raise AssertionError("never reached: the call has one argument too many")

    old = types.SimpleNamespace(Decompressor=OldDecompressor, error=brotli.error, __version__="1.1.0")
    monkeypatch.setattr(entropy, "brotli", old)
    with pytest.raises(ArtifactError, match=r"pip install 'brotli>=1\.2'"):
        decompress_stream(compress_with_real_brotli(), "brotli", 10)


def compress_with_real_brotli() -> bytes:
    return brotli.compress(b"x" * 10)
