"""Shards, tokenizer and manifest as the referee reads them: by code of its own.

Nothing here comes from `common`: a fault shared by the entry and its referee would be seen by neither.

Letters: N tokens, V entries of a vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError

HEADER = struct.Struct("<256i")
MAGIC, VERSION = 20240520, 1
BYTE_BOS_ID = 255  # of the byte tokenizer
BOS_ID = 1
MARK = "\u2581"


@dataclass(frozen=True)
class ShardFact:
    """One shard file: what its header says and what its size is."""

    path: Path
    size_bytes: int
    header: tuple[int, int, int] | None  # magic, version, tokens; None if the file is shorter than a header

    @property
    def fault(self) -> str:
        """What is wrong with header or size; '' if nothing is."""
        if self.size_bytes == 0:
            return "an empty file"
        if self.header is None:
            return f"{self.size_bytes} bytes, less than a header of {HEADER.size}"
        magic, version, count = self.header
        if (magic, version) != (MAGIC, VERSION):
            return f"magic {magic} and version {version}, expected {MAGIC} and {VERSION}"
        if count <= 0:
            return f"the header says {count} tokens"
        expected = HEADER.size + 2 * count
        if self.size_bytes != expected:
            return f"{self.size_bytes:,} bytes, but {count:,} tokens take {expected:,}"
        return ""

    def tokens_N(self) -> np.ndarray:
        """uint16 (N,), mapped read-only; empty if the shard is faulty."""
        if self.fault or self.header is None:
            return np.zeros(0, dtype=np.uint16)
        return np.memmap(self.path, dtype="<u2", mode="r", offset=HEADER.size, shape=(self.header[2],))


@dataclass(frozen=True)
class Pieces:
    """Bytes of text that each entry of a vocabulary stands for, by the challenge's rule."""

    base_V: np.ndarray
    spaced_V: np.ndarray  # the entry begins with a space
    silent_V: np.ndarray  # control, unknown or unused: no text, and the space after it is none
    strips_first: bool  # decoding drops the first space of a document


@dataclass(frozen=True)
class Data:
    root: Path
    train: tuple[ShardFact, ...]
    val: tuple[ShardFact, ...]
    tokenizer: Path | None
    manifest: dict[str, Any] | None

    @cached_property
    def val_N(self) -> np.ndarray:
        """All validation tokens, uint16 (N,), in order of shard names."""
        parts = [shard.tokens_N() for shard in self.val]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint16)

    @cached_property
    def processor(self) -> Any:
        """The SentencePiece processor of the tokenizer; None for bytes."""
        if self.tokenizer is None:
            return None
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_file=str(self.tokenizer))

    @property
    def vocab_size(self) -> int:
        return 256 if self.processor is None else self.processor.vocab_size()

    @property
    def bos_id(self) -> int:
        if self.processor is None:
            return BYTE_BOS_ID
        return self.processor.bos_id() if self.processor.bos_id() >= 0 else BOS_ID

    def sha256_of_val(self) -> str:
        digest = hashlib.sha256()
        for shard in self.val:
            digest.update(shard.path.read_bytes())
        return digest.hexdigest()


def read_shard_fact(path: Path) -> ShardFact:
    size = path.stat().st_size
    with open(path, "rb") as file:
        raw = file.read(HEADER.size)
    return ShardFact(path, size, HEADER.unpack(raw)[:3] if len(raw) == HEADER.size else None)


def read_data(root: Path) -> Data:
    """Shards `*_train_*.bin` and `*_val_*.bin`, tokenizer (`*.model`) and manifest of a folder. Raises DataError."""
    if not root.is_dir():
        raise DataError(f"{root} is no folder; give the folder with *_val_*.bin and tokenizer.model")
    models = sorted(root.glob("*.model"))
    if len(models) > 1:
        raise DataError(f"{root} holds {len(models)} tokenizers; leave the one that made the shards")
    manifest = root / "manifest.json"
    data = Data(
        root=root,
        train=tuple(map(read_shard_fact, sorted(root.glob("*_train_*.bin")))),
        val=tuple(map(read_shard_fact, sorted(root.glob("*_val_*.bin")))),
        tokenizer=models[0] if models else None,
        manifest=json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else None,
    )
    if not data.val:
        raise DataError(f"{root} holds no *_val_*.bin; give the folder of the validation shards")
    return data


def documents(shards: tuple[ShardFact, ...], bos_id: int) -> Iterator[np.ndarray]:
    """Documents of a split, each with its BOS, in order; one that runs over into the next shard is put together.

    Tokens before the first BOS come as a document without one.
    """
    rest: list[np.ndarray] = []
    for shard in shards:
        tokens_N = np.asarray(shard.tokens_N())
        starts = np.flatnonzero(tokens_N == bos_id)
        if not len(starts):
            rest.append(tokens_N)
            continue
        head = [*rest, tokens_N[: starts[0]]]
        if sum(map(len, head)):
            yield np.concatenate(head)
        for start, end in itertools.pairwise(starts):
            yield tokens_N[start:end]
        rest = [tokens_N[starts[-1] :]]
    if sum(map(len, rest)):
        yield np.concatenate(rest)


def pieces_of(data: Data) -> Pieces:
    """The byte table of the tokenizer, from its pieces."""
    size, sp = data.vocab_size, data.processor
    base_V, spaced_V, silent_V = np.ones(size, np.int64), np.zeros(size, bool), np.zeros(size, bool)
    if sp is None:
        base_V[BYTE_BOS_ID], silent_V[BYTE_BOS_ID] = 0, True
        return Pieces(base_V, spaced_V, silent_V, strips_first=False)
    strips_first = False
    for token in range(size):
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            base_V[token], silent_V[token] = 0, True
        elif not sp.is_byte(token):
            piece = sp.id_to_piece(token)
            if piece.startswith(MARK) and not spaced_V.any():
                strips_first = not sp.decode([token]).startswith(" ")
            spaced_V[token] = piece.startswith(MARK)
            base_V[token] = len(piece.replace(MARK, " ").encode()) - int(spaced_V[token])
    return Pieces(base_V, spaced_V, silent_V, strips_first)


def table_bytes(pieces: Pieces, tokens_N: np.ndarray) -> int:
    """Bytes of text that tokens[1:] stand for, each given the token before it."""
    before, after = tokens_N[:-1], tokens_N[1:]
    spaces = pieces.spaced_V[after]
    if pieces.strips_first:
        spaces = spaces & ~pieces.silent_V[before]
    return int(pieces.base_V[after].sum() + spaces.sum())


def decoded_bytes(data: Data, document_N: np.ndarray) -> int | None:
    """UTF-8 bytes of a document as its tokenizer decodes it; None where its bytes form no text."""
    if data.processor is None:
        return int((document_N != BYTE_BOS_ID).sum())
    text = data.processor.decode([int(token) for token in document_N])
    return None if "\ufffd" in text else len(text.encode())
