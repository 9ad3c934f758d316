"""Catalogue entries of `sigreg`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.sigreg.torch_impl import sigreg_quadrature, sigreg_torch
from common.sigreg.triton_impl import sigreg_triton
from scripts.bench.catalogue import OpCase, Work


def _inputs(device: torch.device, shape: tuple[int, ...], projections: int, dtype: torch.dtype) -> dict[str, Any]:
    if device.type == "meta":
        z, A_DM = torch.empty(shape, dtype=dtype, device=device), torch.empty(shape[-1], projections, device=device)
    else:
        g = torch.Generator(device).manual_seed(shape[0])
        z = torch.randn(shape, generator=g, device=device).to(dtype)
        A_DM = torch.randn(shape[-1], projections, generator=g, device=device)
        A_DM = A_DM / A_DM.norm(dim=0, keepdim=True)
    return {"z": z.requires_grad_(), "A_DM": A_DM, "per_timestep": len(shape) == 3}


def _whole(z: Tensor, A_DM: Tensor, per_timestep: bool) -> Tensor:
    """What torch.compile is given: all knots at once."""
    t_K, phi_K, weight_K = (torch.tensor(values, device=z.device) for values in sigreg_quadrature())
    angle = (z.float() @ A_DM)[..., None] * t_K
    cos, sin = angle.cos().mean(dim=0), angle.sin().mean(dim=0)
    return (((cos - phi_K).square() + sin.square()) * weight_K).sum(dim=-1).mean()


def _compiled(**arguments: Any) -> Tensor:
    return torch.compile(_whole, dynamic=False)(**arguments)


def _case(where: str, shape: tuple[int, ...], projections: int, dtype: torch.dtype) -> OpCase:
    numbers = torch.Size(shape).numel()
    width = shape[-1]
    positions = shape[1] if len(shape) == 3 else 1
    size = 2 if dtype == torch.bfloat16 else 4
    moments = 4 * 2 * 17 * positions * projections
    flops = 2 * numbers * projections
    return OpCase(
        name=f"sigreg/{where}-{'bf16' if dtype == torch.bfloat16 else 'fp32'}",
        inputs=lambda device: _inputs(device, shape, projections, dtype),
        triton_form=sigreg_triton,
        torch_form=sigreg_torch,
        gradients=("z",),
        forward=Work(bytes=numbers * size + 4 * width * projections + moments, flops=flops),
        backward=Work(bytes=2 * numbers * size + 4 * width * projections + moments, flops=2 * flops),
        peers={"torch.compile of all knots at once": _compiled},
        miniature=lambda device: _inputs(device, (*(5, 3)[: len(shape) - 1], 8), 9, torch.float32),
    )


CASES: list[OpCase] = [
    _case("seed_bpe", (64, 64, 640), 672, torch.bfloat16),
    _case("seed_byte", (8, 64, 768), 512, torch.bfloat16),
    _case("pooled", (65536, 640), 672, torch.bfloat16),
    _case("seed_bpe", (64, 64, 640), 672, torch.float32),
]
