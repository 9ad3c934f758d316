"""Classes of rows and columns: they describe what they should and are taken only where they pay."""

from __future__ import annotations

import numpy as np
import pytest

from common.artifact.classes import choose_classes, class_count, spread_classes
from common.artifact.container import decode_artifact, encode_artifact
from common.errors import ArtifactError
from common.quant.grid import GridSpec, QuantizedTensor, quantize

STEP = GridSpec("int", 8, "tensor", clip=127 * 0.4)


def gaussian(shape: tuple[int, int], spread=1.0) -> QuantizedTensor:
    return quantize((spread * np.random.default_rng(0).standard_normal(shape)).astype(np.float32), STEP)


def test_contexts_of_each_form():
    shape = (2, 3)
    assert [class_count(shape, form) for form in ("none", "tensor", "row", "cross")] == [0, 1, 2, 5]
    assert spread_classes(np.zeros(0, np.uint8), shape, "none").tolist() == [0] * 6
    assert spread_classes(np.array([7], np.uint8), shape, "tensor").tolist() == [7] * 6
    assert spread_classes(np.array([1, 2], np.uint8), shape, "row").tolist() == [1, 1, 1, 2, 2, 2]
    assert spread_classes(np.array([1, 2, 0, 10, 20], np.uint8), shape, "cross").tolist() == [1, 11, 21, 2, 12, 22]
    with pytest.raises(ArtifactError, match="exceed 255"):
        spread_classes(np.array([0, 200, 0, 0, 56], np.uint8), shape, "cross")


def test_form_follows_the_weights():
    rng = np.random.default_rng(1)
    rows, columns = np.exp2(3 * rng.random((256, 1))), np.exp2(3 * rng.random(256))
    forms = [choose_classes([gaussian((256, 256), spread)])[0][0] for spread in (1.0, rows, rows * columns)]
    assert forms == ["tensor", "row", "cross"]


def test_classes_shrink_the_file_by_what_they_know():
    rng = np.random.default_rng(2)
    spread = np.exp2(2 * rng.random((256, 1)) + 2 * rng.random(256))
    q = gaussian((256, 256), spread)
    with_classes = decode_artifact(encode_artifact({"w": q}, {}))[2]
    bits = with_classes.tensors[0].bits_per_weight
    sigma = spread / q.scales[0]
    ideal_bits = float(np.log2(sigma * np.sqrt(2 * np.pi * np.e)).clip(0).mean())  # of a Gaussian whose spread is known
    assert ideal_bits - 0.05 < bits < ideal_bits + 0.17
    assert len(encode_artifact({"w": q}, {})) < 0.96 * len(encode_artifact({"w": q}, {}, ("brotli",)))


def test_very_different_tensors_share_one_scale_of_classes():
    tensors = [gaussian((64, 64), 1.0), quantize(np.zeros((64, 64)), STEP), gaussian((3, 5))]
    wide = QuantizedTensor(STEP, np.tile(np.array([-127, 127], np.int8), (64, 32)), np.ones(1, np.float32), (64, 64))
    chosen = choose_classes([*tensors, wide])
    assert [form for form, _ in chosen][2] == "none"
    assert all(classes.size == class_count(q.shape, form) for q, (form, classes) in zip([*tensors, wide], chosen))
    named = {str(i): q for i, q in enumerate([*tensors, wide])}
    back = decode_artifact(encode_artifact(named, {}))[0]
    assert all(np.array_equal(back[name].codes, q.codes) for name, q in named.items())
