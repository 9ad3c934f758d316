"""Budget arithmetic and tables."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.artifact.budget import (
    CHALLENGE_BUDGET_BYTES,
    SizeReport,
    StreamSize,
    TensorSize,
    apportion_bytes,
    check_budget,
    format_size_table,
    tensor_group,
)
from common.artifact.container import decode_artifact, encode_artifact
from common.errors import ArtifactError
from common.quant.grid import GridSpec, quantize


def test_one_byte_over_is_an_error():
    assert CHALLENGE_BUDGET_BYTES == 16_000_000
    check_budget(16_000_000)
    with pytest.raises(ArtifactError, match="16,000,001 bytes are 1 over the budget of 16,000,000"):
        check_budget(16_000_001)
    check_budget(10, 10)
    with pytest.raises(ArtifactError):
        check_budget(11, 10)


@given(st.integers(0, 10**9), st.lists(st.integers(0, 10**15), min_size=1, max_size=30))
def test_shares_add_up_and_are_fair(total_bytes, weights):
    shares = apportion_bytes(total_bytes, weights)
    assert sum(shares) == total_bytes
    assert min(shares) >= 0
    if sum(weights):
        for share, weight in zip(shares, weights, strict=True):
            assert abs(share * sum(weights) - total_bytes * weight) < sum(weights)


def test_shares_of_nobody():
    assert apportion_bytes(0, []) == []
    assert apportion_bytes(5, [0, 0]) == [3, 2]


def test_a_report_that_does_not_add_up_cannot_be_made():
    tensor = TensorSize("w", (4,), "int4", 4, 2, 1)
    SizeReport(48, 42, 3, (tensor,), (StreamSize("pack4", "raw", 3, 3),))
    with pytest.raises(AssertionError, match="counted twice or never"):
        SizeReport(49, 42, 3, (tensor,), (StreamSize("pack4", "raw", 3, 3),))


@pytest.mark.parametrize(
    "name,group",
    [
        ("blocks.11.mlp.up.weight", "blocks.*.mlp.up.weight"),
        ("blocks/3/conv1d/kernel", "blocks/*/conv1d/kernel"),
        ("layers_0.layers_12.w", "layers_*.layers_*.w"),
        ("fp8.w2", "fp8.w2"),
        ("7", "*"),
    ],
)
def test_groups(name, group):
    assert tensor_group(name) == group


def test_table_adds_up():
    rng = np.random.default_rng(0)
    tensors = {f"blocks.{i}.w": quantize(rng.standard_normal((8, 64)), GridSpec()) for i in range(3)}
    tensors["norm"] = np.ones(5, np.float32)
    report = decode_artifact(encode_artifact(tensors, {}))[2]
    lines = [line.split() for line in format_size_table(report, code_bytes=50_000).splitlines()]
    cells = {line[0]: line for line in lines}
    assert cells["blocks.*.w"][1:4] == ["int4", "3", "1,536"]

    def count(label):
        return int(cells[label][-1].replace(",", ""))

    overhead = int(next(line for line in lines if line[:2] == ["header,", "checksum"])[-1])
    assert count("blocks.*.w") + count("norm") + overhead == count("artifact") == report.file_bytes
    assert count("total") == report.file_bytes + 50_000
    assert count("margin") == 16_000_000 - count("total")
    assert float(cells["blocks.*.w"][-2]) == pytest.approx(8 * count("blocks.*.w") / 1536, abs=6e-4)
    assert "code" not in format_size_table(report)
    assert "margin" not in format_size_table(report, budget_bytes=None)
    assert "margin" in format_size_table(report, budget_bytes=10)
