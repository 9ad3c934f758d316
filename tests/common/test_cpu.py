"""What a process on a CPU is set to: float32 products stay float32, and it says what it chose."""

from __future__ import annotations

import pytest
import torch

import common.cpu
from common.cpu import float32_product_error, processor_name, tune_cpu_process


@pytest.fixture(autouse=True)
def precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def fast_machine(monkeypatch, capability="AVX512"):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)


def test_products_stay_float32_on_this_machine():
    said = tune_cpu_process()
    assert float32_product_error() < 1e-5
    assert ("oneDNN" in said) == (torch.get_float32_matmul_precision() == "medium")
    left, right = torch.randn(2, 500, 64, dtype=torch.float64).unbind()
    inner = float(((left.float().T @ right.float()).double() - left.T @ right).abs().max())
    assert inner < 1e-3  # of sums of 500 products of about 1; in bfloat16 they err by 0.1


def test_the_probe_tells_bfloat16_from_float32(monkeypatch):
    multiply = torch.Tensor.__matmul__

    def rounded(a, b):
        return multiply(a.bfloat16().float(), b.bfloat16().float()) if a.dtype == torch.float32 else multiply(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert float32_product_error() > 1e-4


@pytest.mark.parametrize(("error", "chosen"), [(1e-6, "medium"), (2e-3, "highest")])
def test_leave_to_round_is_withdrawn_where_it_is_used(error, chosen, monkeypatch):
    fast_machine(monkeypatch)
    monkeypatch.setattr(common.cpu, "float32_product_error", lambda: error)
    said = tune_cpu_process()
    assert torch.get_float32_matmul_precision() == chosen
    assert ("by oneDNN" in said, "would round" in said) == (chosen == "medium", chosen == "highest")


@pytest.mark.parametrize("obstacle", ["cuda", "instructions", "library"])
def test_nothing_is_set_where_it_would_do_harm_or_nothing(obstacle, monkeypatch):
    fast_machine(monkeypatch, "AVX2" if obstacle == "instructions" else "AVX512")
    if obstacle == "cuda":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if obstacle == "library":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "PyTorch's default" in tune_cpu_process()
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_processor_is_known_by_name_and_instructions(monkeypatch):
    fast_machine(monkeypatch, "AVX512")
    wide = processor_name()
    fast_machine(monkeypatch, "AVX2")
    assert wide.endswith(", AVX512")
    assert processor_name() == wide.replace("AVX512", "AVX2")
    if common.cpu.Path("/proc/cpuinfo").is_file():
        assert wide.partition(",")[0] in common.cpu.Path("/proc/cpuinfo").read_text()
