"""The entropy coder: round trips, its distance to the entropy, tables, and each way in which a stream can be wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.artifact.rans import (
    RANS_BITS,
    context_histogram,
    histogram_cost_bits,
    rans_decode,
    rans_encode,
    rans_frequencies,
    rans_lanes,
)
from common.errors import ArtifactError


def sample(count: int, n_symbols: int, n_contexts: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    contexts = rng.integers(0, n_contexts, count).astype(np.uint8)
    return (rng.geometric(0.1 + 0.8 * contexts / n_contexts, count) % n_symbols).astype(np.uint8), contexts


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 3000), st.integers(1, 256), st.integers(1, 64), st.integers(0, 2**32 - 1))
def test_round_trip(count, n_symbols, n_contexts, seed):
    symbols, contexts = sample(count, n_symbols, n_contexts, seed)
    stored = rans_encode(symbols, contexts, n_contexts)
    np.testing.assert_array_equal(rans_decode(stored, count, contexts), symbols)
    assert stored == rans_encode(symbols, contexts, n_contexts)
    plain = rans_encode(symbols, None)
    np.testing.assert_array_equal(rans_decode(plain, count, None), symbols)


@pytest.mark.parametrize("count,lanes", [(0, 1), (63, 1), (64, 2), (16 * 1024**2 - 1, 512), (16 * 1024**2, 1024)])
def test_lanes(count, lanes):
    assert rans_lanes(count) == lanes


def test_size_is_the_entropy_and_little_more():
    symbols, contexts = sample(200_000, 15, 8, 1)
    histogram = context_histogram(symbols, contexts, 8)
    share = histogram / histogram.sum(axis=1, keepdims=True)
    entropy_bits = -(histogram * np.log2(np.where(share > 0, share, 1))).sum()
    stored_bits = 8 * len(rans_encode(symbols, contexts, 8))
    tables_and_states_bits = 8 * (8 * 2 * 15 + 4 * rans_lanes(200_000))
    assert entropy_bits < stored_bits < 1.0005 * entropy_bits + tables_and_states_bits
    assert stored_bits == pytest.approx(histogram_cost_bits(histogram), rel=0.01)
    assert stored_bits < 0.9 * 8 * len(rans_encode(symbols, None))  # the contexts are worth their tables


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=256))
def test_frequencies_add_up_and_keep_every_symbol(counts):
    frequencies = rans_frequencies(np.array(counts, np.int64))
    assert frequencies.sum() == 1 << RANS_BITS
    assert ((frequencies > 0) == (np.array(counts) > 0)).all() or sum(counts) == 0


def damaged(stored: bytes, at: int, value: int) -> bytes:
    return stored[:at] + bytes([value]) + stored[at + 1 :]


def test_wrong_streams_are_named():
    symbols = np.repeat(np.arange(4, dtype=np.uint8), 50)
    stored = rans_encode(symbols, None)  # 1 table: first 0, 3 more symbols, 4 frequencies of 4096 in two bytes each
    head = 1 + 2 + 8
    assert stored[:5] == bytes([1, 0, 3, 0x80, 0x20])
    for data, fault in [
        (b"", "no tables"),
        (damaged(stored, 0, 0), "0 tables"),
        (damaged(stored, 0, 65), "65 tables"),
        (damaged(stored, 1, 253), "beyond symbol 255"),
        (stored[:2], "truncated"),
        (stored[: head - 1], "truncated or too long"),
        (damaged(damaged(stored, 4, 0x80), 5, 0x80), "too long"),
        (damaged(stored, 4, 0x21), "adds up to"),
        (stored[:3] + b"\x00" + stored[5:], "shortest form"),
        (stored[:3] + b"\x80\x00" + stored[5:], "shortest form"),
        (stored[: head + 3], "states need more"),
        (stored[:-1], "states need more"),
        (stored[:-2], "ends too early|does not end"),
        (stored + b"\0\0", "does not end"),
        (damaged(stored, head + 2, 0)[: head + 3] + b"\0" + stored[head + 4 :], "too small"),
    ]:
        with pytest.raises(ArtifactError, match=fault):
            rans_decode(data, symbols.size, None)
    with pytest.raises(ArtifactError, match="no table"):
        rans_decode(stored, symbols.size, np.ones(symbols.size, np.uint8))
    with pytest.raises(ArtifactError, match="of no values"):
        rans_decode(stored, 0, None)
    for other in (symbols.size - 1, symbols.size + 1, 10 * symbols.size):
        with pytest.raises(ArtifactError):
            rans_decode(stored, other, None)
