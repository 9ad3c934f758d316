"""Catalogue entries of `fake_quantize`: the masters of a whole model to compute weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.quant.grid import GridSpec
from common.quant.torch_impl import fake_quantize_torch
from common.quant.triton_impl import FakeQuantizeAll
from scripts.bench.catalogue import OpCase, Work

# seed_bpe: shape, number of them, and the bits of an integer grid (8: e4m3, 16: bfloat16, 32: float32).
_SEED_BPE = (
    ((1418, 640), 10, 4),
    ((640, 640), 10, 4),
    ((2560, 640), 5, 4),
    ((640, 2560), 5, 4),
    ((640, 336), 1, 4),
    ((336, 640), 1, 4),
    ((8192, 336), 1, 8),
    ((8192,), 1, 16),
    ((768, 4), 10, 16),
    ((640,), 25, 16),
    ((10,), 30, 32),
)


def _inputs(device: torch.device, shapes: Sequence[tuple[tuple[int, ...], int, int]], clip: float | None) -> Any:
    grids = {8: GridSpec("fp8_e4m3"), 16: GridSpec("bf16"), 32: GridSpec("f32")}
    masters, specs, weights = [], [], []
    for shape, count, bits in shapes:
        for _ in range(count):
            masters.append(torch.randn(shape, device=device))
            specs.append(grids.get(bits) or GridSpec("int", bits=bits, clip=clip))
            weights.append(torch.empty(shape, device=device, dtype=torch.float32 if bits > 8 else torch.bfloat16))
    return {"masters": masters, "specs": specs, "plan": FakeQuantizeAll(masters, specs, weights)}


def _all_at_once(masters: list[Tensor], specs: list[GridSpec], plan: FakeQuantizeAll) -> tuple[Tensor, ...]:
    plan()
    return tuple(plan.weights)


def _one_by_one(masters: list[Tensor], specs: list[GridSpec], plan: FakeQuantizeAll) -> tuple[Tensor, ...]:
    weights = [torch.empty_like(w) for w in plan.weights]
    return tuple(fake_quantize_torch(m, s, out=w) for m, s, w in zip(masters, specs, weights, strict=True))


def _case(where: str, clip: float | None) -> OpCase:
    moved = sum(torch.Size(s).numel() * count * (8 if bits > 8 else 6) for s, count, bits in _SEED_BPE)
    return OpCase(
        name=f"fake_quantize/{where}",
        inputs=lambda device: _inputs(device, _SEED_BPE, clip),
        triton_form=_all_at_once,
        torch_form=_one_by_one,
        gradients=(),
        forward=Work(bytes=moved),
        miniature=lambda device: _inputs(device, (((5, 33), 2, 4), ((7, 9), 1, 8), ((6,), 1, 16), ((3,), 1, 32)), clip),
    )


CASES: list[OpCase] = [_case("seed_bpe", None), _case("seed_bpe-clipped", 4.0)]
