"""Packing of codes: against a bit-by-bit definition, round trips, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from common.errors import ArtifactError
from common.quant.bitpack import pack_codes, packed_size_bytes, unpack_codes

CHUNK = 8 << 17  # values that are handled at once


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 63, 1000, CHUNK - 1, CHUNK, CHUNK + 5])
def test_round_trip_and_size(bits, count):
    values = np.random.default_rng(count + bits).integers(0, 1 << bits, count).astype(np.uint8)
    packed = pack_codes(values, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (packed_size_bytes(count, bits),) == (-(-count * bits // 8),)
    np.testing.assert_array_equal(unpack_codes(packed, bits, count), values)
    as_bits = np.unpackbits(values[:, None], axis=1, bitorder="little")[:, :bits].reshape(-1)
    np.testing.assert_array_equal(np.packbits(as_bits, bitorder="little"), packed)


@pytest.mark.parametrize("bits", range(1, 9))
def test_is_one_little_endian_number(bits):
    values = np.random.default_rng(bits).integers(0, 1 << bits, 41).astype(np.uint8)
    number = sum(int(value) << (index * bits) for index, value in enumerate(values))
    assert pack_codes(values, bits).tobytes() == number.to_bytes(packed_size_bytes(41, bits), "little")


def test_nibbles_and_shape():
    assert pack_codes(np.array([[1, 2], [3, 15]], np.uint8), 4).tolist() == [0x21, 0xF3]


@pytest.mark.parametrize("bits", [-1, 0, 9])
def test_unknown_widths_are_refused(bits):
    with pytest.raises(ArtifactError, match="1 to 8"):
        pack_codes(np.zeros(3, np.uint8), bits)
    with pytest.raises(ArtifactError, match="1 to 8"):
        unpack_codes(np.zeros(3, np.uint8), bits, 3)


@pytest.mark.parametrize("bits", range(1, 8))
def test_values_that_do_not_fit_are_refused(bits):
    with pytest.raises(ArtifactError, match=f"value {1 << bits} does not fit in {bits} bits"):
        pack_codes(np.array([0, 1 << bits, 0], np.uint8), bits)


def test_other_dtypes_are_refused():
    with pytest.raises(ArtifactError, match="int8"):
        pack_codes(np.zeros(3, np.int8), 4)
    with pytest.raises(ArtifactError, match="int16"):
        unpack_codes(np.zeros(3, np.int16), 4, 6)


@pytest.mark.parametrize("count", [-1, 0, 4, 7, 2**62])
def test_other_lengths_are_refused(count):
    with pytest.raises(ArtifactError, match="got 3"):
        unpack_codes(np.zeros(3, np.uint8), 4, count)


@pytest.mark.parametrize("bits,count", [(1, 3), (3, 5), (4, 5), (5, 1), (7, 9)])
def test_unused_bits_must_be_zero(bits, count):
    packed = pack_codes(np.zeros(count, np.uint8), bits)
    packed[-1] |= 0x80
    with pytest.raises(ArtifactError, match="unused bits"):
        unpack_codes(packed, bits, count)
