"""Catalogue entries of `ffn`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from common.relu2_ffn.torch_impl import relu2_ffn_torch
from common.relu2_ffn.triton_impl import relu2_ffn_triton
from scripts.bench.catalogue import OpCase, Work

_GRADIENTS = ("x_ND", "up_HD", "down_EH")


def _inputs(
    device: torch.device, rows: int, width: int, hidden: int, dtype: torch.dtype, slope: float
) -> dict[str, Any]:
    shapes = {"x_ND": (rows, width), "up_HD": (hidden, width), "down_EH": (width, hidden)}
    if device.type == "meta":
        tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    else:
        g = torch.Generator(device).manual_seed(rows)
        tensors = {}
        for name, shape in shapes.items():
            scale = 1.0 if name == "x_ND" else shape[1] ** -0.5
            tensors[name] = torch.randn(shape, generator=g, device=device).mul_(scale).to(dtype)
    return {name: t.requires_grad_() for name, t in tensors.items()} | {"negative_slope": slope}


def _compiled(**arguments: Any) -> Tensor:
    return torch.compile(relu2_ffn_torch, dynamic=False)(**arguments)


def _case(where: str, rows: int, width: int, hidden: int, slope: float, fused: bool) -> OpCase:
    flops = 4 * rows * width * hidden
    weights = 2 * width * hidden
    return OpCase(
        name=f"ffn/{where}-{'epilogues' if fused else 'cublas'}-bf16",
        inputs=lambda device: _inputs(device, rows, width, hidden, torch.bfloat16, slope),
        triton_form=functools.partial(relu2_ffn_triton, fuse_matmuls=fused),
        torch_form=relu2_ffn_torch,
        gradients=_GRADIENTS,
        # At least: x, weights and y once; h written forward and read backward.
        forward=Work(bytes=2 * (2 * rows * width + weights + rows * hidden), flops=flops),
        backward=Work(bytes=2 * (4 * rows * width + 3 * weights + rows * hidden), flops=2 * flops),
        peers={"torch.compile of the plain form": _compiled},
        miniature=lambda device: _inputs(device, 37, 24, 40, torch.float32, slope),
    )


CASES: list[OpCase] = [
    _case(where, 65536, 640, 2560, slope, fused)
    for where, slope in (("seed_bpe", 0.0), ("seed_bpe-leaky", 0.5))
    for fused in (False, True)
]
