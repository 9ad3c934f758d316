"""Catalogue entries of `causal_conv1d`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.causal_conv1d import triton_impl
from common.causal_conv1d.package_impl import causal_conv1d_package
from common.causal_conv1d.torch_impl import causal_conv1d_torch
from common.causal_conv1d.triton_impl import causal_conv1d_triton
from scripts.bench.catalogue import OpCase, Work, with_value

_GRADIENTS = ("x_BTD", "weight_DK", "bias_D")


def _inputs(
    device: torch.device, batch: int, length: int, channels: int, dtype: torch.dtype, documents: bool, carried: bool
) -> dict[str, Any]:
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(length)

    def normal(*shape: int) -> Tensor:
        if device.type == "meta":
            return torch.empty(shape, device=device)
        return torch.randn(shape, generator=generator, device=device)

    arguments: dict[str, Any] = {
        "x_BTD": normal(batch, length, channels).to(dtype),
        "weight_DK": normal(channels, 4).to(dtype),
        "bias_D": normal(channels).to(dtype),
    }
    if carried:
        arguments["initial_state_BDS"] = normal(batch, channels, 3).to(dtype)
    else:
        arguments = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
    if documents:
        arguments["document_ids_BT"] = (torch.arange(length, device=device) // 300).expand(batch, -1)
    return arguments


def _outputs_only(form: Any) -> Any:
    """Training drops the final state, so its gradient is neither compared nor timed here."""
    return lambda **arguments: form(**arguments)[0]


def _compiled(**arguments: Any) -> Tensor:
    return torch.compile(causal_conv1d_torch, dynamic=False)(**arguments)[0]


_CHOICES = {f"{n} positions a program": with_value(triton_impl, "CONV1D_SEGMENT", n) for n in (32, 64, 256)}


def _case(
    where: str,
    batch: int,
    length: int,
    channels: int,
    dtype: torch.dtype = torch.bfloat16,
    documents: bool = False,
    carried: bool = False,
    slow: bool = True,
) -> OpCase:
    size, label = (2, "bf16") if dtype == torch.bfloat16 else (4, "fp32")
    numbers = batch * length * channels
    return OpCase(
        name=f"causal_conv1d/{where}-{label}",
        inputs=lambda device: _inputs(device, batch, length, channels, dtype, documents, carried),
        triton_form=causal_conv1d_triton if carried else _outputs_only(causal_conv1d_triton),
        torch_form=causal_conv1d_torch if carried else _outputs_only(causal_conv1d_torch),
        gradients=() if carried else _GRADIENTS,
        forward=Work(bytes=2 * size * numbers),
        backward=None if carried else Work(bytes=3 * size * numbers),
        peers={
            "causal-conv1d": causal_conv1d_package if carried else _outputs_only(causal_conv1d_package),
            "torch.compile of the plain form": _compiled,
        },
        compile_slowly=slow,
        miniature=lambda device: _inputs(device, 2, 11, 6, torch.float32, documents, carried),
        choices=_CHOICES if where == "seed_bpe" and size == 2 else {},
    )


CASES: list[OpCase] = [
    _case("seed_bpe", 64, 1024, 768, slow=False),
    _case("seed_bpe-documents", 32, 2048, 768, documents=True),
    _case("seed_byte", 8, 8192, 896),
    _case("seed_bpe", 16, 1024, 768, dtype=torch.float32),
    _case("carried-scoring", 8, 1024, 768, documents=True, carried=True),
    _case("one-position", 8, 1, 768, carried=True),
]
