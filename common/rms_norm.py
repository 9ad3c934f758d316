"""Root-mean-square normalisation of rows with a hand-written backward pass, for CPUs.

Letters: N rows (all leading axes), D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_torch(x_ND: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) along the last axis.

    Source: Zhang and Sennrich 2019. On a CPU PyTorch differentiates its own form operator by operator, in about twelve
    passes over the rows; this one takes two passes forward and four backward. On other devices it is PyTorch's.

    Args:
        x_ND: any number of leading axes; floating.
        eps: added to the mean square, >= 0.
    Returns:
        the shape and dtype of x.

    Numerics: statistics in float32 at least (float64 for float64). One backward pass is supported, not the derivative
    of it.
    """
    if not rms_norm_by_hand(x_ND):
        return F.rms_norm(x_ND, x_ND.shape[-1:], eps=eps)
    return _RmsNorm.apply(x_ND, eps)


def rms_norm_by_hand(x: Tensor) -> bool:
    """Whether the forms of this repository beat PyTorch's: on a CPU, where no compiler fuses PyTorch's."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()


def rms_scale(x_ND: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each row, (N, 1)."""
    norm_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True)
    return norm_N1.square_().div_(x_ND.shape[-1]).add_(eps).rsqrt_()


def rms_norm_gradient(g_ND: Tensor, normed_ND: Tensor, scale_N1: Tensor) -> Tensor:
    """Gradient of x from that of the normalised rows: scale (g - normed mean(g normed))."""
    dot_N1 = torch.linalg.vecdot(g_ND, normed_ND)[..., None].div_(-g_ND.shape[-1])
    return torch.addcmul(g_ND, normed_ND, dot_N1).mul_(scale_N1)


class _RmsNorm(torch.autograd.Function):
    """Keeps the normalised rows, which the next product keeps anyway, and one number a row."""

    @staticmethod
    def forward(ctx, x_ND, eps):
        scale_N1 = rms_scale(x_ND, eps)
        normed_ND = x_ND * scale_N1
        ctx.save_for_backward(normed_ND, scale_N1)
        return normed_ND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dnormed_ND):
        normed_ND, scale_N1 = ctx.saved_tensors
        return rms_norm_gradient(dnormed_ND, normed_ND, scale_N1), None
