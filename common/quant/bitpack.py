"""Dense packing of small unsigned numbers: 1 to 8 bits each, least significant bit first.

Value i occupies bits i*bits .. (i+1)*bits - 1 of the byte string read as one little-endian number; unused bits of the
last byte are zero. Four-bit values are nibbles, low nibble first; eight-bit values are plain bytes.
"""

from __future__ import annotations

import numpy as np

from common.errors import ArtifactError

_PACK_CHUNK_GROUPS = 1 << 17  # groups of 8 values handled at once: bounds the 64-bit scratch to about 1 MiB a step


def packed_size_bytes(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take."""
    return (count * bits + 7) // 8


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ArtifactError(f"cannot pack values of {bits} bits: 1 to 8 are supported")


def pack_codes(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack unsigned values densely.

    Args:
        values: uint8, any shape (taken in C order), each below 2**bits.
        bits: 1..8.

    Returns:
        uint8 of packed_size_bytes(values.size, bits).

    Raises:
        ArtifactError: bits, dtype or a value is out of range.
    """
    _check_bits(bits)
    if values.dtype != np.uint8:
        raise ArtifactError(f"values to pack have dtype {values.dtype}: expected uint8")
    values = values.reshape(-1)
    if bits < 8 and values.size and int(values.max()) >> bits:
        raise ArtifactError(f"value {int(values.max())} does not fit in {bits} bits")
    if bits == 8:
        return values.copy()
    packed = np.zeros(packed_size_bytes(values.size, bits), np.uint8)
    # Eight values fill exactly `bits` bytes: shift them into one 64-bit word, keep its low bytes.
    for start in range(0, values.size, 8 * _PACK_CHUNK_GROUPS):
        chunk = values[start : start + 8 * _PACK_CHUNK_GROUPS]
        n_groups = -(-chunk.size // 8)
        padded = np.zeros(8 * n_groups, np.uint8)
        padded[: chunk.size] = chunk
        words = np.zeros(n_groups, np.dtype("<u8"))
        for lane in range(8):
            words |= padded[lane::8].astype(np.uint64) << np.uint64(bits * lane)
        chunk_bytes = words.view(np.uint8).reshape(n_groups, 8)[:, :bits].reshape(-1)
        offset = start * bits // 8
        n_bytes = packed_size_bytes(chunk.size, bits)
        packed[offset : offset + n_bytes] = chunk_bytes[:n_bytes]
    return packed


def unpack_codes(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Inverse of pack_codes.

    Args:
        packed: uint8, one axis, exactly packed_size_bytes(count, bits) long.
        bits: 1..8.
        count: how many values.

    Returns:
        uint8 of `count` values below 2**bits.

    Raises:
        ArtifactError: bits, dtype or length is wrong, or the unused bits at the end are not zero.
    """
    _check_bits(bits)
    if packed.dtype != np.uint8 or packed.ndim != 1:
        raise ArtifactError(f"packed codes are {packed.dtype} of shape {packed.shape}: expected uint8 with one axis")
    if count < 0 or packed.size != packed_size_bytes(count, bits):
        raise ArtifactError(f"{count} values of {bits} bits take {(count * bits + 7) // 8} bytes, got {packed.size}")
    if bits == 8:
        return packed.copy()
    spare_bits = 8 * packed.size - count * bits
    if spare_bits and int(packed[-1]) >> (8 - spare_bits):
        raise ArtifactError(f"the {spare_bits} unused bits after {count} packed values are not zero")
    values = np.empty(count, np.uint8)
    mask = np.uint64((1 << bits) - 1)
    for start in range(0, count, 8 * _PACK_CHUNK_GROUPS):
        n_values = min(8 * _PACK_CHUNK_GROUPS, count - start)
        n_groups = -(-n_values // 8)
        offset = start * bits // 8
        padded = np.zeros(n_groups * bits, np.uint8)
        chunk = packed[offset : offset + packed_size_bytes(n_values, bits)]
        padded[: chunk.size] = chunk
        word_bytes = np.zeros((n_groups, 8), np.uint8)
        word_bytes[:, :bits] = padded.reshape(n_groups, bits)
        words = word_bytes.view(np.dtype("<u8")).reshape(-1)
        unpacked = np.empty((n_groups, 8), np.uint8)
        for lane in range(8):
            unpacked[:, lane] = (words >> np.uint64(bits * lane)) & mask
        values[start : start + n_values] = unpacked.reshape(-1)[:n_values]
    return values
