"""What a process on a CPU is set to: float32 products stay float32, and it says what it chose."""

from __future__ import annotations

import pytest
import torch

import common.cpu
from common.cpu import (
    compile_obstacle,
    float32_product_error,
    in_default_products,
    processor_name,
    tune_cpu_process,
)


@pytest.fixture(autouse=True)
def precision(monkeypatch):
    monkeypatch.setattr(common.cpu, "_products_by_onednn", False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def fast_machine(monkeypatch, capability="AVX512", vendor="AuthenticAMD"):
    known = {"vendor_id": vendor, "model name": "Some Processor"}
    monkeypatch.setattr(common.cpu, "_cpuinfo", known.__getitem__)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
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
    assert common.cpu._products_by_onednn == (chosen == "medium")
    assert ("by oneDNN" in said, "would round" in said) == (chosen == "medium", chosen == "highest")


@pytest.mark.parametrize("obstacle", ["cuda", "instructions", "library", "vendor"])
def test_nothing_is_set_where_it_would_do_harm_or_nothing(obstacle, monkeypatch):
    vendor = "GenuineIntel" if obstacle == "vendor" else "AuthenticAMD"
    fast_machine(monkeypatch, "AVX2" if obstacle == "instructions" else "AVX512", vendor)
    if obstacle == "cuda":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if obstacle == "library":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "PyTorch's default" in tune_cpu_process()
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("setting", ["highest", "medium"])
def test_default_products_hold_forward_and_backward_and_not_longer(setting):
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, left, right):
            seen.append(torch.get_float32_matmul_precision())
            ctx.save_for_backward(left, right)
            return left @ right

        @staticmethod
        def backward(ctx, dy):
            seen.append(torch.get_float32_matmul_precision())
            left, right = ctx.saved_tensors
            return dy @ right.T, left.T @ dy

    torch.set_float32_matmul_precision(setting)
    left, right, scale = torch.randn(5, 3, requires_grad=True), torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    y = in_default_products(lambda a, b, c: Watched.apply(a, b) * c, left, right, scale)
    (2 * y).sum().backward()
    assert seen == ["highest", "highest"]
    assert torch.get_float32_matmul_precision() == setting
    torch.testing.assert_close(y, (left @ right) * scale)
    torch.testing.assert_close(left.grad, 2 * scale @ right.T)
    torch.testing.assert_close(right.grad, 2 * left.T @ scale)
    assert scale.grad is None


def test_default_products_end_with_an_error():
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(RuntimeError):
        in_default_products(torch.matmul, torch.zeros(2, 3), torch.zeros(2, 3))
    assert torch.get_float32_matmul_precision() == "medium"


def test_default_products_do_not_break_a_compiled_graph():
    compiled = torch.compile(lambda a, b: in_default_products(torch.matmul, a, b) + 1, backend="eager", fullgraph=True)
    left, right = torch.randn(2, 3), torch.randn(3, 2)
    torch.testing.assert_close(compiled(left, right), left @ right + 1)


def test_default_products_under_a_compiler_where_onednn_has_the_others(monkeypatch):
    monkeypatch.setattr(common.cpu, "_products_by_onednn", True)
    torch.set_float32_matmul_precision("medium")
    left, right = torch.randn(5, 3, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    compiled = torch.compile(lambda a, b: in_default_products(torch.matmul, 2 * a, b) + 1, backend="eager")
    y = compiled(left, right)
    torch.testing.assert_close(y, 2 * left @ right + 1)
    y.sum().backward()
    torch.testing.assert_close(left.grad, 2 * torch.ones(5, 4) @ right.detach().T)
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_keeps_torch_compile_from_a_cpu_is_said(device, monkeypatch):
    class Broken(RuntimeError):
        pass

    def refuse(*arguments, **options):
        raise Broken("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", refuse)
    assert compile_obstacle(torch.device(device)) == ("Broken: no compiler" if device == "cpu" else "")


def test_a_processor_is_known_by_name_and_instructions(monkeypatch):
    named = processor_name()
    if common.cpu.Path("/proc/cpuinfo").is_file():
        assert named.partition(",")[0] in common.cpu.Path("/proc/cpuinfo").read_text()
    fast_machine(monkeypatch, "AVX512")
    assert processor_name() == "Some Processor, AVX512"
    fast_machine(monkeypatch, "AVX2")
    assert processor_name() == "Some Processor, AVX2"
