"""The lossless codecs behind an artifact's streams, with output bounded to a size known beforehand.

A codec turns bytes into fewer bytes. compress_stream and decompress_stream are the whole interface: another codec is
one more name in ARTIFACT_CODECS and one more branch in each of the two.
"""

from __future__ import annotations

import lzma
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import brotli
import zstandard

from common.errors import ArtifactError

# Order decides ties: the cheapest to decode first.
ARTIFACT_CODECS = ("raw", "zstd", "brotli", "lzma")

_LZMA_DICT_MIN_BYTES = 1 << 12
_LZMA_DICT_MAX_BYTES = 1 << 26
_ZSTD_WINDOW_MAX_BYTES = 1 << 27
_PROBE_BYTES = 1 << 17


def _lzma_filters(raw_bytes: int) -> list[dict[str, int]]:
    """LZMA2 without container. The dictionary follows from the raw size, so that no file can ask for a larger one."""
    dict_size = min(max(_LZMA_DICT_MIN_BYTES, 1 << max(raw_bytes - 1, 0).bit_length()), _LZMA_DICT_MAX_BYTES)
    # lc = lp = pb = 0: packed weights have neither text-like context nor alignment; other settings measured larger.
    return [
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dict_size, "lc": 0, "lp": 0, "pb": 0}
    ]


def compress_stream(raw: bytes, codec: str) -> bytes:
    """Compress at the codec's highest effort; the same input gives the same bytes with the same library version.

    Raises:
        ArtifactError: the codec is unknown.
    """
    if codec == "raw":
        return raw
    if codec == "zstd":
        return zstandard.ZstdCompressor(level=22, write_checksum=False).compress(raw)
    if codec == "brotli":
        return brotli.compress(raw, quality=11, lgwin=24)
    if codec == "lzma":
        return lzma.compress(raw, format=lzma.FORMAT_RAW, filters=_lzma_filters(len(raw)))
    raise ArtifactError(f"codec {codec!r} is unknown: use one of {', '.join(ARTIFACT_CODECS)}")


def compress_smallest(raws: Sequence[bytes], codecs: Sequence[str] = ARTIFACT_CODECS) -> list[tuple[str, bytes]]:
    """Try every codec on every stream, in parallel threads, and keep each stream's smallest result.

    Returns:
        One (codec, compressed bytes) a stream; "raw" where nothing is smaller, even if it is not among `codecs`.
    """
    jobs = [
        (index, codec) for index, raw in enumerate(raws) if raw for codec in dict.fromkeys(codecs) if codec != "raw"
    ]
    jobs.sort(key=lambda job: -len(raws[job[0]]))  # long jobs first: they decide when all is done
    best = [("raw", raw) for raw in raws]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        results = list(pool.map(lambda job: compress_stream(raws[job[0]], job[1]), jobs))
    for (index, codec), stored in zip(jobs, results, strict=True):
        chosen, smallest = best[index]
        # Jobs of one stream may come in any order of codecs: compare (size, preference), not size alone.
        if (len(stored), ARTIFACT_CODECS.index(codec)) < (len(smallest), ARTIFACT_CODECS.index(chosen)):
            best[index] = (codec, stored)
    return best


def compress_if_smaller(raw: bytes, codecs: Sequence[str], coded: bytes | None) -> tuple[str, bytes]:
    """The smallest of a stream's rans form and what the other codecs make of its bytes.

    A long stream is tried on a part first: those codecs at their highest effort take seconds a megabyte, and on weights
    they lose. They see the rest only if they make less of the part than rans makes of as much on average.

    Args:
        raw: the stream's bytes in their layout.
        codecs: those allowed.
        coded: its rans form; None where rans is not allowed.
    """
    if coded is None:
        return compress_smallest([raw], codecs)[0]
    others = [codec for codec in codecs if codec != "rans"]
    start = max(len(raw) - _PROBE_BYTES, 0) // 2
    if len(raw) > 2 * _PROBE_BYTES and len(coded) < len(raw):
        [(_, probe)] = compress_smallest([raw[start : start + _PROBE_BYTES]], others)
        if len(probe) * len(raw) > len(coded) * _PROBE_BYTES:
            return "rans", coded
    [(codec, stored)] = compress_smallest([raw], others)
    return (codec, stored) if len(stored) <= len(coded) else ("rans", coded)


def _brotli_decompress(stored: bytes, raw_bytes: int) -> bytes:
    decoder = brotli.Decompressor()
    try:
        raw = decoder.process(stored, output_buffer_limit=raw_bytes + 1)
        while not decoder.is_finished() and len(raw) <= raw_bytes:
            more = decoder.process(b"", output_buffer_limit=raw_bytes + 1 - len(raw))
            if not more:
                break
            raw += more
    except TypeError as error:
        raise ArtifactError(
            f"brotli {brotli.__version__} cannot bound its output, so a hostile file could exhaust memory: "
            "pip install 'brotli>=1.2'"
        ) from error
    if len(raw) <= raw_bytes and not decoder.is_finished():
        raise ArtifactError("the brotli stream ends too early")
    return raw


def _lzma_decompress(stored: bytes, raw_bytes: int) -> bytes:
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_lzma_filters(raw_bytes))
    raw = decoder.decompress(stored, max_length=raw_bytes + 1)
    if len(raw) <= raw_bytes and not decoder.eof:
        raise ArtifactError("the lzma stream ends too early")
    if decoder.unused_data:
        raise ArtifactError(f"{len(decoder.unused_data)} bytes follow the end of the lzma stream")
    return raw


def _zstd_decompress(stored: bytes, raw_bytes: int) -> bytes:
    declared_bytes = zstandard.frame_content_size(stored)
    if declared_bytes != raw_bytes:  # the decoder allocates what the frame declares: never let it see another size
        raise ArtifactError(f"the zstd frame declares {declared_bytes} bytes, expected {raw_bytes}")
    decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX_BYTES)
    return decoder.decompress(stored, max_output_size=raw_bytes, allow_extra_data=False)


def decompress_stream(stored: bytes, codec: str, raw_bytes: int) -> bytes:
    """Inverse of compress_stream, for a stream whose raw size is known.

    Args:
        stored: the compressed bytes, all of them and nothing else.
        codec: its name.
        raw_bytes: exact size of the result. Memory used is proportional to it, whatever `stored` says.

    Raises:
        ArtifactError: unknown codec; damaged, truncated or extended stream; another size than raw_bytes.
    """
    if codec not in ARTIFACT_CODECS:
        raise ArtifactError(f"codec {codec!r} is unknown: this reader has {', '.join(ARTIFACT_CODECS)}")
    try:
        if codec == "raw" or raw_bytes == 0:
            raw = stored
        elif codec == "brotli":
            raw = _brotli_decompress(stored, raw_bytes)
        elif codec == "lzma":
            raw = _lzma_decompress(stored, raw_bytes)
        else:
            raw = _zstd_decompress(stored, raw_bytes)
    except (brotli.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise ArtifactError(f"the {codec} stream is damaged: {error}") from error
    if len(raw) != raw_bytes:
        held = "too many" if codec != "raw" and len(raw) > raw_bytes else f"{len(raw)}"  # decoding stopped there
        raise ArtifactError(f"the {codec} stream decodes to {held} bytes, expected {raw_bytes}")
    return raw
