"""Catalogue entries of `ssd`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.ssd import triton_impl
from common.ssd.mamba_ssm_impl import ssd_scan_mamba_ssm
from common.ssd.torch_impl import ssd_scan_torch
from common.ssd.triton_impl import ssd_scan_triton
from scripts.bench.catalogue import OpCase, Work, with_value

# Why a kernel may spill; common/ssd/README.md weighs it against a second reading of everything.
_SPILLS = {
    "_ssd_gradient_kernel": "dB, dC and three pair matrices of one chunk at once save a second pass over memory",
    "_ssd_states_kernel": "a fifth block on a multiprocessor, so that all programs run at once, for a few bytes",
}

_GRADIENTS = ("x_BTHP", "dt_BTH", "A_H", "B_BTGN", "C_BTGN", "D_H")


def _inputs(
    device: torch.device,
    batch: int,
    length: int,
    heads: int,
    width: int,
    groups: int,
    n: int,
    dtype: torch.dtype,
    documents: bool,
    carried: bool,
) -> dict[str, Any]:
    """x, B and C are slices of one tensor, the convolution's output, as they are in the entry."""
    inner, wide = heads * width, groups * n

    def normal(*shape: int) -> Tensor:
        if device.type == "meta":
            return torch.empty(shape, device=device)
        return torch.randn(shape, generator=generator, device=device)

    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(length)
    packed = normal(batch, length, inner + 2 * wide).to(dtype)
    x, B, C = packed.split([inner, wide, wide], dim=-1)
    arguments: dict[str, Any] = {
        "x_BTHP": x.view(batch, length, heads, width),
        "dt_BTH": torch.nn.functional.softplus(normal(batch, length, heads) - 4.0),
        "A_H": -torch.exp(normal(heads)),
        "B_BTGN": B.view(batch, length, groups, n),
        "C_BTGN": C.view(batch, length, groups, n),
        "D_H": normal(heads),
    }
    if not carried:
        arguments = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    if carried:
        arguments["initial_state_BHPN"] = normal(batch, heads, width, n)
    if documents:
        arguments["document_ids_BT"] = (torch.arange(length, device=device) // 300).expand(batch, -1)
    return arguments | {"chunk_size": 64}


def _mamba_ssm(**arguments: Any) -> tuple[Tensor, Tensor]:
    arguments["chunk_size"] = 256  # its own default
    return ssd_scan_mamba_ssm(**arguments)


def _compiled(**arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.compile(ssd_scan_torch, dynamic=False)(**arguments)


def _other_launch(kernel: str, **options: int) -> Any:
    """One of the large kernels with other options; a register bound that is not named is lifted."""
    usual = triton_impl.ssd_triton_launch

    def launch(name: str, dtype: torch.dtype, width: int, n: int) -> dict[str, Any]:
        chosen = usual(name, dtype, width, n)
        return {"num_warps": chosen["num_warps"], **options} if name == kernel else chosen

    return with_value(triton_impl, "ssd_triton_launch", launch)


_CHOICES = {
    "gradient in 1 stage": _other_launch("gradient", num_stages=1),
    "gradient in 2 stages": _other_launch("gradient", num_stages=2),
    "gradient in 3 stages": _other_launch("gradient", num_stages=3),
    "gradient of 4 warps": _other_launch("gradient", num_warps=4, num_stages=3),
    "gradient of 8 warps": _other_launch("gradient", num_warps=8, num_stages=3),
    "states without a bound": _other_launch("states", num_stages=3),
    "scan in 2 stages": _other_launch("scan", num_stages=2),
}


def _case(
    where: str,
    batch: int,
    length: int,
    heads: int,
    width: int,
    groups: int,
    n: int,
    dtype: torch.dtype = torch.bfloat16,
    documents: bool = False,
    carried: bool = False,
    slow: bool = True,
) -> OpCase:
    """FLOPs are those of the table in common/ssd/README.md at chunks of 64, bytes each tensor once."""
    size, label = (2, "bf16") if dtype == torch.bfloat16 else (4, "fp32")
    positions, inner, wide, chunk = batch * length, heads * width, groups * n, 64
    inside, between = groups * chunk * n, inner * chunk
    states = inner * n
    return OpCase(
        name=f"ssd/{where}-{label}",
        inputs=lambda device: _inputs(
            device, batch, length, heads, width, groups, n, dtype, documents, carried
        ),
        triton_form=ssd_scan_triton,
        torch_form=ssd_scan_torch,
        gradients=() if carried else _GRADIENTS,
        forward=Work(
            bytes=positions * (size * (2 * inner + 2 * wide) + 4 * heads) + 4 * batch * states * (2 if carried else 1),
            flops=2 * positions * (inside + between + 2 * states),
        ),
        backward=None
        if carried
        else Work(
            bytes=positions * (size * (3 * inner + 4 * wide) + 8 * heads),
            flops=2 * positions * (3 * inside + 2 * between + 5 * states),
        ),
        peers={"mamba-ssm": _mamba_ssm, "torch.compile of the plain form": _compiled},
        stack_reasons=_SPILLS,
        compile_slowly=slow,
        miniature=lambda device: _inputs(device, 2, 20, 2, 16, 1, 16, torch.float32, documents, carried),
        choices=_CHOICES if where in ("seed_bpe", "headdim32-state16", "headdim64-state128") and size == 2 else {},
    )


CASES: list[OpCase] = [
    _case("seed_bpe", 64, 1024, 10, 64, 1, 64, slow=False),
    _case("seed_bpe-documents", 32, 2048, 10, 64, 1, 64, documents=True),
    _case("seed_byte", 8, 8192, 12, 64, 1, 64),
    _case("headdim32-state16", 64, 1024, 20, 32, 1, 16),
    _case("headdim64-state128", 64, 1024, 10, 64, 1, 128),
    _case("seed_bpe", 8, 1024, 10, 64, 1, 64, dtype=torch.float32),
    _case("carried-scoring", 8, 1024, 10, 64, 1, 64, documents=True, carried=True),
    _case("one-position", 8, 1, 10, 64, 1, 64, carried=True),
]
