"""Catalogue entries of `muon`: one batch of Newton-Schulz at a time."""

from __future__ import annotations

from typing import Any

import torch

from common.optim import triton_impl
from common.optim.muon import newton_schulz_torch
from common.optim.triton_impl import newton_schulz_triton
from scripts.bench.catalogue import OpCase, Work, with_value

_STEPS = 3


def _inputs(device: torch.device, count: int, rows: int, columns: int, dtype: torch.dtype) -> dict[str, Any]:
    if device.type == "meta":
        G_BMN = torch.empty(count, rows, columns, device=device)
    else:
        g = torch.Generator(device).manual_seed(count)
        G_BMN = torch.randn(count, rows, columns, generator=g, device=device)
    return {"G_BMN": G_BMN, "steps": _STEPS, "dtype": dtype}


def _plain(G_BMN: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    return newton_schulz_torch(G_BMN, steps, dtype=torch.float64 if G_BMN.dtype == torch.float64 else dtype)


def _case(where: str, count: int, rows: int, columns: int) -> OpCase:
    short, long = sorted((rows, columns))
    # X X^T and its square need one triangle each, the last product all of it.
    flops = _STEPS * count * (short * short * long + short**3 + 2 * short * short * long)
    numbers = count * rows * columns
    return OpCase(
        name=f"muon/{where}-bf16",
        inputs=lambda device: _inputs(device, count, rows, columns, torch.bfloat16),
        triton_form=newton_schulz_triton,
        torch_form=_plain,
        gradients=(),
        forward=Work(bytes=8 * numbers, flops=flops),
        miniature=lambda device: _inputs(device, 2, 17, 24, torch.float32),
        choices={
            "tiles of 64": with_value(triton_impl, "MUON_LARGE_TILES_FROM", float("inf")),
            "tiles of 128": with_value(triton_impl, "MUON_LARGE_TILES_FROM", 0.0),
        },
    )


CASES: list[OpCase] = [
    _case("seed_bpe-feed-forward", 12, 640, 2560),
    _case("seed_bpe-in-projection", 10, 1418, 640),
    _case("seed_bpe-square", 12, 640, 640),
    _case("seed_bpe-feed-forward-of-8-ranks", 2, 640, 2560),
]
