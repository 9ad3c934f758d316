"""An entropy coder for weights: interleaved range asymmetric numeral systems (rANS) with tables chosen by context.

Source: Duda 2013 (arXiv:1311.2540), with interleaved lanes as in Giesen 2014 (arXiv:1402.3392). Ours is written for
NumPy: value i belongs to lane i mod N, all lanes take one step together, and the words they give up or need stand in
lane order. Everything is integer arithmetic on tables that the stream itself carries, so every machine decodes the same
values; FORMAT.md gives the bytes.

A context says which table codes a value; how contexts come about is the container's business. What makes them pay is
that the size of a weight's code is predicted well by its row and its column (code_classes below).
"""

from __future__ import annotations

import numpy as np

from common.errors import ArtifactError

RANS_BITS = 14  # the frequencies of a table add up to 2**RANS_BITS
RANS_LOW = 1 << 16  # a lane's state lies in RANS_LOW .. 2**32 - 1 between steps; a word has 16 bits
RANS_MAX_TABLES = 64


def rans_lanes(count: int) -> int:
    """Lanes of a stream of `count` values: the largest power of two N with 16 N**2 <= count, at least 1.

    Each lane costs 4 bytes, each step of all lanes a fixed time: the square root balances the two.
    """
    lanes = 1
    while 16 * (2 * lanes) ** 2 <= count:
        lanes *= 2
    return lanes


def rans_frequencies(counts: np.ndarray) -> np.ndarray:
    """Whole frequencies of sum 2**RANS_BITS for counts (A,); a symbol that occurs gets at least 1. Deterministic."""
    total = int(counts.sum())
    top = 1 << RANS_BITS
    if total == 0:
        frequencies = np.zeros(counts.shape, np.int64)
        frequencies[0] = top
        return frequencies
    wanted = counts.astype(np.int64) * top  # exact: counts below 2**31
    frequencies = np.where(counts > 0, np.maximum(wanted // total, 1), 0)
    remainder = np.where(counts > 0, wanted - frequencies * total, -total * top)
    missing = top - int(frequencies.sum())
    if missing > 0:  # fewer than there are symbols: one each to the largest remainders
        frequencies[np.argsort(-remainder, kind="stable")[:missing]] += 1
    for _ in range(-missing):  # rare symbols were rounded up: take from where a unit costs least
        cost = np.where(frequencies > 1, counts / np.maximum(frequencies - 1, 1), np.inf)
        frequencies[int(np.argmin(cost))] -= 1
    return frequencies


def _table_bytes(frequencies: np.ndarray) -> bytes:
    """First symbol, number of symbols - 1, then each frequency, 7 bits a byte, low bits first."""
    used = np.flatnonzero(frequencies)
    first, last = int(used[0]), int(used[-1])
    out = bytearray([first, last - first])
    for frequency in map(int, frequencies[first : last + 1]):
        while frequency >= 128:
            out.append(frequency & 127 | 128)
            frequency >>= 7
        out.append(frequency)
    return bytes(out)


def _read_tables(stored: bytes) -> tuple[np.ndarray, int]:
    """Frequencies (T, 256) and how many bytes they took."""
    if not stored or not 1 <= stored[0] <= RANS_MAX_TABLES:
        raise ArtifactError(f"the rans stream declares {stored[0] if stored else 'no'} tables: 1..{RANS_MAX_TABLES}")
    tables = np.zeros((stored[0], 256), np.int64)
    at = 1
    for table in tables:
        if at + 2 > len(stored) or stored[at] + stored[at + 1] > 255:
            raise ArtifactError("a table of the rans stream is truncated or reaches beyond symbol 255")
        first, last = stored[at], stored[at] + stored[at + 1]
        at += 2
        for symbol in range(first, last + 1):
            frequency = shift = 0
            while True:
                if at >= len(stored) or shift > 14:
                    raise ArtifactError("a frequency of the rans stream is truncated or too long")
                byte = stored[at]
                at += 1
                frequency |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
            if (frequency == 0 and (shift > 7 or symbol in (first, last))) or (shift > 7 and byte == 0):
                raise ArtifactError("a table of the rans stream is not in its shortest form")
            table[symbol] = frequency
        if int(table.sum()) != 1 << RANS_BITS:
            raise ArtifactError(f"a table of the rans stream adds up to {int(table.sum())}, not {1 << RANS_BITS}")
    return tables, at


def rans_encode(symbols: np.ndarray, contexts: np.ndarray | None, n_tables: int = 1) -> bytes:
    """Code values with the tables that fit them best.

    Args:
        symbols: (n,) uint8.
        contexts: (n,) uint8, each below n_tables; None is all 0.
        n_tables: 1..RANS_MAX_TABLES.

    Returns:
        Tables, states and words; nothing for no values. A function of the arguments alone.
    """
    count = symbols.size
    if count == 0:
        return b""
    histogram = context_histogram(symbols, contexts, n_tables)
    tables = np.stack([rans_frequencies(row) for row in histogram])
    frequency_of = tables.astype(np.uint32).reshape(-1)
    start_of = (np.cumsum(tables, axis=1) - tables).astype(np.uint32).reshape(-1)
    lanes = rans_lanes(count)
    state = np.full(lanes, RANS_LOW, np.uint32)
    words: list[np.ndarray] = []
    word_bits, limit_bits = np.uint32(16), np.uint32(32 - RANS_BITS)
    for at in range((count - 1) // lanes * lanes, -1, -lanes):  # what is coded last is decoded first
        key = symbols[at : at + lanes].astype(np.intp)
        if contexts is not None:
            key += contexts[at : at + lanes].astype(np.intp) << 8
        frequency = frequency_of.take(key)
        live = state[: key.size]
        full = np.flatnonzero((live >> limit_bits) >= frequency)
        if full.size:
            over = live.take(full)
            words.append(over.astype("<u2")[::-1])
            live[full] = over >> word_bits
        quotient = live // frequency
        live += quotient * (np.uint32(1 << RANS_BITS) - frequency) + start_of.take(key)
    head = bytes([n_tables]) + b"".join(map(_table_bytes, tables))
    body = np.concatenate(words)[::-1].tobytes() if words else b""
    return head + state.astype("<u4").tobytes() + body


def rans_decode(stored: bytes, count: int, contexts: np.ndarray | None) -> np.ndarray:
    """Inverse of rans_encode.

    Args:
        stored: the stream, all of it.
        count: how many values it holds.
        contexts: (count,) uint8, or None for all 0.

    Returns:
        (count,) uint8.

    Raises:
        ArtifactError: the stream is damaged, truncated or extended, or has fewer tables than contexts. Memory used is
            proportional to count and to the stream's size.
    """
    if count == 0:
        if stored:
            raise ArtifactError(f"a rans stream of no values has {len(stored)} bytes")
        return np.zeros(0, np.uint8)
    tables, at = _read_tables(stored)
    n_tables = len(tables)
    if contexts is not None and int(contexts.max()) >= n_tables:
        raise ArtifactError(f"context {int(contexts.max())} has no table: the rans stream has {n_tables}")
    lanes = rans_lanes(count)
    if (len(stored) - at) % 2 or len(stored) - at < 4 * lanes:
        raise ArtifactError(f"the rans stream has {len(stored) - at} bytes after its tables: {lanes} states need more")
    state = np.frombuffer(stored, "<u4", lanes, at).astype(np.uint32)
    if int(state.min()) < RANS_LOW:
        raise ArtifactError("a state of the rans stream is too small")
    words = np.frombuffer(stored, "<u2", offset=at + 4 * lanes)
    symbol_of = np.repeat(np.tile(np.arange(256, dtype=np.uint8), n_tables), tables.reshape(-1))
    start = np.cumsum(tables, axis=1) - tables
    entry_of = ((np.maximum(tables, 1) - 1) << RANS_BITS | start & ((1 << RANS_BITS) - 1)).astype(np.uint32).reshape(-1)
    symbols = np.empty(count, np.uint8)
    low, bits, word_bits, one = np.uint32(RANS_LOW), np.uint32(RANS_BITS), np.uint32(16), np.uint32(1)
    mask = np.uint32((1 << RANS_BITS) - 1)
    used = 0
    for first in range(0, count, lanes):
        out = symbols[first : first + lanes]
        live = state[: out.size]
        slot = live & mask
        if contexts is None:
            out[:] = symbol_of.take(slot)
            entry = entry_of.take(out)
        else:
            context = contexts[first : first + lanes].astype(np.uint32)
            out[:] = symbol_of.take((context << bits) | slot)
            entry = entry_of.take((context << np.uint32(8)) | out)
        live >>= bits
        live *= (entry >> bits) + one
        live += slot - (entry & mask)
        empty = (live < low).nonzero()[0]
        if empty.size:
            fresh = words[used : used + empty.size]
            if fresh.size < empty.size:
                raise ArtifactError("the rans stream ends too early")
            live[empty] = (live.take(empty) << word_bits) | fresh
            used += empty.size
    if used != words.size or bool((state != low).any()):
        raise ArtifactError("the rans stream does not end where its values end")
    return symbols


def context_histogram(symbols: np.ndarray, contexts: np.ndarray | None, n_tables: int) -> np.ndarray:
    """How often each symbol (axis 1, 256) occurs in each context (axis 0)."""
    if contexts is None:
        return np.bincount(symbols, minlength=256 * n_tables).reshape(n_tables, 256)
    counts = np.zeros(256 * n_tables, np.int64)
    for at in range(0, symbols.size, 1 << 22):
        key = contexts[at : at + (1 << 22)].astype(np.uint16) << np.uint16(8) | symbols[at : at + (1 << 22)]
        counts += np.bincount(key, minlength=counts.size)
    return counts.reshape(n_tables, 256)


def histogram_cost_bits(histogram: np.ndarray) -> float:
    """Bits that values cost under tables fitted to them, tables included (about 12 bits an entry)."""
    counts = histogram[histogram > 0].astype(np.float64)
    totals = histogram.sum(axis=-1)
    totals = totals[totals > 0].astype(np.float64)
    entropy = float((totals * np.log2(totals)).sum() - (counts * np.log2(counts)).sum())
    return entropy + 12.0 * counts.size + 16.0 * totals.size
