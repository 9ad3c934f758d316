"""Catalogue entries of `gated_norm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.gated_norm import triton_impl
from common.gated_norm.torch_impl import gated_rms_norm_torch
from common.gated_norm.triton_impl import gated_rms_norm_triton
from scripts.bench.catalogue import OpCase, Work, with_value

_GRADIENTS = ("y", "z", "weight_I")


def _inputs(device: torch.device, rows: int, width: int, dtype: torch.dtype, row_width: int) -> dict[str, Any]:
    """z is a slice of a wider row, the input projection's, as it is in the entry."""
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        if device.type == "meta":
            return torch.empty(shape, device=device)
        return torch.randn(shape, generator=generator, device=device)

    arguments = {
        "y": normal(rows, width).to(dtype),
        "z": normal(rows, row_width).to(dtype)[:, :width],
        "weight_I": normal(width),
    }
    return {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}


def _compiled(**arguments: Any) -> Tensor:
    return torch.compile(gated_rms_norm_torch, dynamic=False)(**arguments)


def _other_warps(times: int) -> Any:
    usual = triton_impl.gated_norm_triton_launch

    def launch(width: int, dtype: torch.dtype, backward: bool) -> dict[str, Any]:
        chosen = usual(width, dtype, backward)
        return chosen | {"num_warps": chosen["num_warps"] * times}

    return with_value(triton_impl, "gated_norm_triton_launch", launch)


_CHOICES = {
    "twice the warps": _other_warps(2),
    "four times the warps": _other_warps(4),
    "forward 1 row a program": with_value(triton_impl, "GATED_NORM_FORWARD_ROWS", 1),
    "forward 32 rows a program": with_value(triton_impl, "GATED_NORM_FORWARD_ROWS", 32),
}


def _case(
    where: str, rows: int, width: int, row_width: int, dtype: torch.dtype = torch.bfloat16, slow: bool = True
) -> OpCase:
    size, label = (2, "bf16") if dtype == torch.bfloat16 else (4, "fp32")
    return OpCase(
        name=f"gated_norm/{where}-{label}",
        inputs=lambda device: _inputs(device, rows, width, dtype, row_width),
        triton_form=gated_rms_norm_triton,
        torch_form=gated_rms_norm_torch,
        gradients=_GRADIENTS,
        forward=Work(bytes=3 * size * rows * width),
        backward=Work(bytes=5 * size * rows * width),
        peers={"torch.compile of the plain form": _compiled},
        compile_slowly=slow,
        miniature=lambda device: _inputs(device, 9, 40, torch.float32, 57),
        choices=_CHOICES if where != "seed_bpe-unaligned" and size == 2 else {},
    )


CASES: list[OpCase] = [
    _case("seed_bpe", 65536, 640, 1424, slow=False),  # rows of the projection filled up to a multiple of 16
    _case("seed_bpe-unaligned", 65536, 640, 1418),
    _case("expand2", 65536, 1280, 2704),
    _case("seed_bpe", 16384, 640, 1424, dtype=torch.float32),
]
