"""Catalogue entries of `softcap_xent`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.softcap_xent.torch_impl import softcap_nll_torch, softcap_torch, softcap_xent_torch
from common.softcap_xent.triton_impl import softcap_nll_triton, softcap_xent_triton
from scripts.bench.catalogue import OpCase, Work


def _inputs(device: torch.device, rows: int, vocabulary: int, width: int, dtype: torch.dtype, scoring: bool) -> Any:
    if device.type == "meta":
        x, weight, bias, targets = (
            torch.empty(s, dtype=d, device=device)
            for s, d in (
                ((rows, width), dtype),
                ((vocabulary, width), dtype),
                ((vocabulary,), torch.float32),
                ((rows,), torch.int64),
            )
        )
    else:
        g = torch.Generator(device).manual_seed(rows)
        x = torch.randn(rows, width, generator=g, device=device).to(dtype)
        weight = torch.randn(vocabulary, width, generator=g, device=device).mul_(0.2).to(dtype)
        bias = torch.randn(vocabulary, generator=g, device=device)
        targets = torch.randint(0, vocabulary, (rows,), generator=g, device=device)
    arguments = {"x_ND": x, "weight_VD": weight, "bias_V": bias, "targets_N": targets, "cap": 15.0, "kind": "poly"}
    if scoring:
        return arguments | {"temperature": 0.9}
    return {k: v.requires_grad_() if k in _GRADIENTS else v for k, v in arguments.items()} | {"z_weight": 1e-4}


_GRADIENTS = ("x_ND", "weight_VD", "bias_V")


def _whole_logits(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    targets_N: Tensor,
    *,
    cap: float,
    kind: str,
    z_weight: float,
) -> Tensor:
    """What torch.compile is given: whole logits."""
    logits_NV = torch.nn.functional.linear(x_ND, weight_VD, bias_V.to(x_ND.dtype))
    capped_NV = softcap_torch(logits_NV.float(), cap, kind)
    lse_N = torch.logsumexp(capped_NV, dim=1)
    picked_N = capped_NV.gather(1, targets_N[:, None])[:, 0]
    return (lse_N - picked_N).mean() + z_weight * lse_N.square().mean()


def _compiled(**arguments: Any) -> Tensor:
    return torch.compile(_whole_logits, dynamic=False)(**arguments)


def _loss(form: Any) -> Any:
    return lambda **arguments: form(**arguments)[0]


def _case(where: str, rows: int, vocabulary: int, width: int, dtype: torch.dtype, slow: bool = False) -> OpCase:
    size, label = (2, "bf16") if dtype == torch.bfloat16 else (4, "fp32")
    flops = 2 * rows * vocabulary * width
    numbers = (rows + vocabulary) * width
    return OpCase(
        name=f"softcap_xent/{where}-{label}",
        inputs=lambda device: _inputs(device, rows, vocabulary, width, dtype, scoring=False),
        triton_form=_loss(softcap_xent_triton),
        torch_form=_loss(softcap_xent_torch),
        gradients=_GRADIENTS,
        forward=Work(bytes=2 * numbers * size, flops=3 * flops),
        backward=Work(bytes=2 * numbers * size),
        peers={"torch.compile of whole logits": _compiled},
        compile_slowly=slow,
        miniature=lambda device: _inputs(device, 37, 50, 20, torch.float32, scoring=False),
    )


CASES: list[OpCase] = [
    _case("seed_bpe", 65536, 8192, 336, torch.bfloat16),
    _case("seed_byte", 65536, 256, 256, torch.bfloat16),
    _case("seed_bpe", 4096, 8192, 336, torch.float32),
    OpCase(
        name="softcap_xent/seed_bpe-scoring-bf16",
        inputs=lambda device: _inputs(device, 65536, 8192, 336, torch.bfloat16, scoring=True),
        triton_form=softcap_nll_triton,
        torch_form=softcap_nll_torch,
        gradients=(),
        forward=Work(bytes=2 * (65536 + 8192) * 336, flops=2 * 65536 * 8192 * 336),
        miniature=lambda device: _inputs(device, 37, 50, 20, torch.float32, scoring=True),
    ),
]
