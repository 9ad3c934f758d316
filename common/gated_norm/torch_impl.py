"""RMS normalisation of a gated row in plain torch operations.

Letters: I inner width; the dimensions before it are rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common.rms_norm import rms_norm_by_hand, rms_norm_gradient, rms_scale


def gated_norm_check_arguments(y: Tensor, z: Tensor, weight_I: Tensor) -> None:
    """Raise ValueError for shapes or dtypes that do not fit together."""
    if y.dim() < 1 or y.shape != z.shape or weight_I.shape != y.shape[-1:] or y.numel() == 0:
        raise ValueError(
            f"gated_rms_norm: y is {tuple(y.shape)}, z {tuple(z.shape)}, weight {tuple(weight_I.shape)}; expected "
            "y and z (..., I) alike and not empty, and weight (I,)"
        )
    if y.dtype != z.dtype:
        raise ValueError(f"gated_rms_norm: y is {y.dtype} and z {z.dtype}, expected the same dtype")


def gated_rms_norm_torch(y: Tensor, z: Tensor, weight_I: Tensor, *, eps: float = 1e-5) -> Tensor:
    """weight * g / sqrt(mean(g^2) + eps) with g = y * silu(z), over the last dimension.

    Source: Zhang and Sennrich 2019 (RMSNorm), gated before the norm as in Dao and Gu 2024 (Mamba-2).

    Args:
        y, z: (..., I), what is normalised and its gate, of one dtype.
        weight_I: scale of every column.
        eps: added to the mean square.
    Returns:
        (..., I) in the dtype of y.
    Raises:
        ValueError: shapes or dtypes do not fit together.

    Numerics: the gate and the product are rounded to the dtype of y, as is the weight. The norm is PyTorch's; on a CPU
    (float32 and float64) it is one of ours, which keeps fewer rows and differentiates them in fewer passes, and which
    supports one backward pass, not the derivative of it.
    """
    gated_norm_check_arguments(y, z, weight_I)
    if rms_norm_by_hand(y):
        return _GatedRmsNorm.apply(y, z, weight_I.to(y.dtype), eps)
    return F.rms_norm(y * F.silu(z), weight_I.shape, weight_I.to(y.dtype), eps=eps)


class _GatedRmsNorm(torch.autograd.Function):
    """Keeps the inputs and one number a row; backward computes gate and norm again."""

    @staticmethod
    def forward(ctx, y, z, weight_I, eps):
        out = F.silu(z).mul_(y)
        scale = rms_scale(out, eps)
        ctx.save_for_backward(y, z, weight_I, scale)
        return out.mul_(scale).mul_(weight_I)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        y, z, weight_I, scale = ctx.saved_tensors
        gate = F.silu(z)
        normed = (gate * y).mul_(scale)
        dweight_I = torch.mul(dout, normed).flatten(0, -2).sum(dim=0)
        dgated = rms_norm_gradient(dout * weight_I, normed, scale)
        dy = gate.mul_(dgated)
        dz = torch.ops.aten.silu_backward(dgated.mul_(y), z)
        return dy, dz, dweight_I, None
