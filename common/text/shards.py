"""Token shards in the challenge's format: read, checked, and written.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, token count, zeros) and then exactly that
many little-endian uint16 tokens, so its size is 1024 + 2·count bytes. Reading maps the file into memory; nothing is
copied until it is indexed.

Letters: N tokens of one shard or of one piece of a stream.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.errors import ShardError

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256
SHARD_HEADER_BYTES = 4 * SHARD_HEADER_INTS
SHARD_TOKEN_BYTES = 2
SHARD_MAX_TOKENS = 2**31 - 1  # the header's count is an int32
SHARD_TOKENS_DEFAULT = 100_000_000  # the challenge's shard length
SHARD_CHECK_TOKENS = 1 << 23  # tokens looked at together in a deep check: 16 MiB


def shard_header(count_tokens: int) -> bytes:
    """The 1024 header bytes of a shard of `count_tokens` tokens."""
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, count_tokens
    return header.tobytes()


def read_shard_count(path: str | Path) -> int:
    """Number of tokens of a shard, from its header, held against the size of the file.

    Raises:
        ShardError: the file is missing, not a shard, of another version, truncated or oversized, or holds no token.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(SHARD_HEADER_BYTES)
            size_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ShardError(
            f"{path}: cannot be read ({error.strerror}); expected a token shard. "
            "Make shards with scripts/prepare_text.py."
        ) from error
    if len(raw) < SHARD_HEADER_BYTES:
        raise ShardError(
            f"{path}: {size_bytes} bytes, expected a header of {SHARD_HEADER_BYTES} bytes and then tokens; "
            "the file is truncated or no shard: make or download it again."
        )
    magic, version, count_tokens = (int(value) for value in np.frombuffer(raw, dtype="<i4", count=3))
    if magic != SHARD_MAGIC:
        raise ShardError(
            f"{path}: magic number {magic}, expected {SHARD_MAGIC}; this is no token shard: "
            "check the path, or make shards with scripts/prepare_text.py."
        )
    if version != SHARD_VERSION:
        raise ShardError(
            f"{path}: shard version {version}, expected {SHARD_VERSION}; "
            f"write the data again in version {SHARD_VERSION}."
        )
    if count_tokens <= 0:
        raise ShardError(f"{path}: header says {count_tokens} tokens, expected at least 1; make the shard again.")
    expected_bytes = SHARD_HEADER_BYTES + SHARD_TOKEN_BYTES * count_tokens
    if size_bytes != expected_bytes:
        fault = "truncated" if size_bytes < expected_bytes else "oversized"
        raise ShardError(
            f"{path}: {fault}: {size_bytes} bytes, expected {expected_bytes} for the {count_tokens} tokens that its "
            "header says; delete it and make or download it again."
        )
    return count_tokens


def open_shard(path: str | Path, *, vocab_size: int | None = None, deep: bool = False) -> np.memmap:
    """Map a shard's tokens into memory, read-only.

    Args:
        path: the shard.
        vocab_size: with `deep`, every token must be below it.
        deep: read the whole file once and check its tokens; without it only header and size are checked.

    Returns:
        uint16 memory map of shape (N,).

    Raises:
        ShardError: see `read_shard_count` and `check_tokens`.
    """
    count_tokens = read_shard_count(path)
    tokens_N = np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count_tokens,))
    if deep:
        if vocab_size is None:
            raise ShardError(f"{path}: a deep check needs vocab_size, got None; pass the tokenizer's vocabulary size.")
        check_tokens(tokens_N, vocab_size, path)
    return tokens_N


def check_tokens(tokens_N: np.ndarray, vocab_size: int, path: str | Path) -> None:
    """Refuse tokens outside the vocabulary, naming the first one and its place.

    Raises:
        ShardError: a token is ≥ vocab_size.
    """
    for start in range(0, len(tokens_N), SHARD_CHECK_TOKENS):
        piece_N = np.asarray(tokens_N[start : start + SHARD_CHECK_TOKENS])
        if piece_N.size and int(piece_N.max()) >= vocab_size:
            place = int(np.argmax(piece_N >= vocab_size))
            raise ShardError(
                f"{path}: token {int(piece_N[place])} at position {start + place}, expected all tokens below the "
                f"vocabulary size {vocab_size}; use the tokenizer that made these shards, or make them again."
            )


def list_shards(pattern: str | Path) -> list[Path]:
    """Shards that match a glob pattern, sorted by name.

    Raises:
        ShardError: nothing matches.
    """
    paths = sorted(Path(name) for name in glob.glob(str(pattern)))
    if not paths:
        raise ShardError(
            f"{pattern}: no file matches, expected at least one token shard; check the path, "
            "or make shards with scripts/prepare_text.py --out FOLDER."
        )
    return paths


def sha256_of_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard(path: str | Path, tokens_N: np.ndarray) -> None:
    """Write one shard whole: to a temporary name in the same folder, synced, then renamed.

    Args:
        path: target file; replaced if it exists.
        tokens_N: integers in [0, 65536), shape (N,), N ≥ 1.

    Raises:
        ShardError: wrong shape, no token, too many, or a value that uint16 cannot hold.
    """
    writer = ShardWriter(lambda index: Path(path), shard_tokens=SHARD_MAX_TOKENS)
    try:
        writer.write(tokens_N)
        if writer.total_tokens == 0:
            raise ShardError(f"{path}: no token to write, expected at least 1; check the text that it was made from.")
        writer.close()
    finally:
        writer.abort()


class ShardWriter:
    """Streams tokens into shards, starting a new one after every `shard_tokens` tokens.

    Each shard appears under its final name only when it is complete and on disk. Use it as a context manager: leaving
    it on an exception drops the unfinished shard and keeps the finished ones.

    Args:
        path_of: gives the path of shard number 0, 1, 2, ...
        shard_tokens: length of every shard but the last.
    """

    def __init__(self, path_of: Callable[[int], str | Path], *, shard_tokens: int = SHARD_TOKENS_DEFAULT) -> None:
        if not 1 <= shard_tokens <= SHARD_MAX_TOKENS:
            raise ShardError(
                f"shard_tokens is {shard_tokens}, expected 1 to {SHARD_MAX_TOKENS}; choose a length in between."
            )
        self._path_of = path_of
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._final_path = Path()
        self._temporary_path = Path()
        self._file_tokens = 0
        self.total_tokens = 0
        self.paths: list[Path] = []
        self.counts_tokens: list[int] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind, value, traceback) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write(self, tokens_N: np.ndarray) -> None:
        """Append tokens (integers in [0, 65536), shape (N,)); a piece may run over from one shard into the next."""
        tokens_N = np.asarray(tokens_N)
        if tokens_N.ndim != 1 or (tokens_N.size and tokens_N.dtype.kind not in "iu"):
            raise ShardError(
                f"tokens of shape {tokens_N.shape} and type {tokens_N.dtype}, expected a flat array of integers; "
                "pass what a tokenizer's encode returns."
            )
        if tokens_N.size and tokens_N.dtype != np.uint16:
            lowest, highest = int(tokens_N.min()), int(tokens_N.max())
            if lowest < 0 or highest > 65535:
                raise ShardError(
                    f"tokens from {lowest} to {highest}, expected 0 to 65535: the format stores uint16; "
                    "use a smaller vocabulary."
                )
        tokens_N = tokens_N.astype("<u2", copy=False)
        while tokens_N.size:
            file = self._file or self._open()
            room = self._shard_tokens - self._file_tokens
            piece_N, tokens_N = tokens_N[:room], tokens_N[room:]
            file.write(piece_N.tobytes())
            self._file_tokens += piece_N.size
            self.total_tokens += piece_N.size
            if self._file_tokens == self._shard_tokens:
                self._finish(file)

    def close(self) -> None:
        """Finish the last shard."""
        if self._file is not None:
            self._finish(self._file)

    def abort(self) -> None:
        """Drop the unfinished shard, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._temporary_path.unlink(missing_ok=True)

    def _open(self) -> BinaryIO:
        self._final_path = Path(self._path_of(len(self.paths)))
        self._temporary_path = self._final_path.with_name(f".{self._final_path.name}.{os.getpid()}.tmp")
        file = open(self._temporary_path, "wb")  # noqa: SIM115 - lives until _finish or abort
        self._file = file
        file.write(shard_header(0))
        self._file_tokens = 0
        return file

    def _finish(self, file: BinaryIO) -> None:
        file.seek(0)
        file.write(shard_header(self._file_tokens))
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._file = None
        os.replace(self._temporary_path, self._final_path)
        self.paths.append(self._final_path)
        self.counts_tokens.append(self._file_tokens)
