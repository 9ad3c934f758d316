"""Bits per byte: how many bytes of text each token stands for, and the score that follows.

The challenge's rule: a token counts the UTF-8 bytes of its piece without the leading space mark, plus one for that
space unless the previous token is a control, unknown or unused entry (decoding drops a document's first space); byte
entries count one, control entries none. For a tokenizer that keeps a document's first space, that space counts too.

The sum over a document is the byte length of its *decoded* text; that is the original's length only if the tokenizer is
lossless. Unknown entries count nothing, which can only make a score worse.

Letters: N tokens, V entries of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from common.errors import DataError
from common.text.tokenizer import ByteTokenizer, SentencePieceTokenizer


@dataclass(frozen=True)
class ByteTable:
    """Bytes of text per entry of a vocabulary.

    base_bytes_V: int64, bytes without a leading space. has_space_V: bool, the entry has a leading space.
    is_boundary_V: bool, after this entry a leading space is not text.
    lossless: whether the bytes counted are those of the original text.
    """

    base_bytes_V: np.ndarray
    has_space_V: np.ndarray
    is_boundary_V: np.ndarray
    lossless: bool


def byte_table(tokenizer: ByteTokenizer | SentencePieceTokenizer) -> ByteTable:
    """The byte table of a tokenizer."""
    base_bytes_V, has_space_V, is_control_V = tokenizer.piece_bytes()
    is_boundary_V = is_control_V if tokenizer.strips_first_space else np.zeros_like(is_control_V)
    return ByteTable(base_bytes_V.astype(np.int64), has_space_V, is_boundary_V, tokenizer.lossless)


def token_bytes(table: ByteTable, previous_N: np.ndarray, tokens_N: np.ndarray) -> np.ndarray:
    """Bytes of text that each token stands for, given the token before it.

    Args:
        table: of the tokenizer that made the tokens.
        previous_N: integers of any shape, the token before each one (the model's input x).
        tokens_N: integers of the same shape, the tokens that are scored (the targets y).

    Returns:
        int64 of the same shape, ≥ 0.
    """
    if np.shape(previous_N) != np.shape(tokens_N):
        raise DataError(
            f"previous tokens of shape {np.shape(previous_N)} and tokens of shape {np.shape(tokens_N)}, expected equal "
            "shapes; pass x and y of the same positions."
        )
    return table.base_bytes_V[tokens_N] + (table.has_space_V[tokens_N] & ~table.is_boundary_V[previous_N])


def bits_per_byte(total_nll_nats: float, n_bytes: int) -> float:
    """Total negative log-likelihood in nats over the bytes of text that it covers, in bits per byte.

    Raises:
        DataError: no bytes.
    """
    if n_bytes <= 0:
        raise DataError(f"{n_bytes} bytes of text scored, expected at least 1; score at least one token that is text.")
    return float(total_nll_nats) / (math.log(2.0) * n_bytes)
