"""Squared-ReLU feed-forward, plain.

Letters: N rows (all leading axes), D width in, H hidden width, E width out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common.rms_norm import rms_norm_by_hand, rms_scale


def relu2_ffn_torch(
    x_ND: Tensor, up_HD: Tensor, down_EH: Tensor, *, negative_slope: float = 0.0, eps: float = 1e-6
) -> Tensor:
    """y = down (h / rms(h)), h = leaky_relu(up x)^2, rms(h) = sqrt(mean(h^2) + eps).

    Source: ReLU^2 is that of Primer (So et al. 2021), LeakyReLU(0.5)^2 and the norm before the last matrix those of
    parameter-golf entries.

    Args:
        x_ND: any number of leading axes.
        up_HD, down_EH: the two matrices, in the dtype of x.
        negative_slope: of the leaky ReLU, >= 0; 0 for ReLU.
        eps: added to the mean square of h, >= 0.
    Returns:
        y_NE with the leading axes and the dtype of x, differentiable.
    Raises:
        ValueError: shapes do not fit together, or a negative slope or eps.

    Numerics: every step rounds to the dtype of x; the mean square is float32 at least. On a CPU (float32 and float64)
    the backward pass is written by hand, in fewer passes over the hidden rows; it is the only one supported there.
    """
    relu2_check_arguments(x_ND, up_HD, down_EH, negative_slope, eps)
    if rms_norm_by_hand(x_ND):
        y_NE = _Relu2FfnByHand.apply(x_ND.reshape(-1, x_ND.shape[-1]), up_HD, down_EH, negative_slope, eps)
        return y_NE.view(*x_ND.shape[:-1], down_EH.shape[0])
    u_NH = F.linear(x_ND, up_HD)
    h_NH = (F.leaky_relu(u_NH, negative_slope) if negative_slope else F.relu(u_NH)).square()
    return F.linear(F.rms_norm(h_NH, h_NH.shape[-1:], eps=eps), down_EH)


def relu2_check_arguments(x: Tensor, up: Tensor, down: Tensor, negative_slope: float, eps: float) -> None:
    """Raises ValueError for what no form of the feed-forward can take."""
    if (
        x.dim() < 1
        or up.dim() != 2
        or down.dim() != 2
        or x.shape[-1] != up.shape[1]
        or up.shape[0] != down.shape[1]
        or x.numel() == 0
    ):
        raise ValueError(
            f"relu2_ffn: x is {tuple(x.shape)}, up {tuple(up.shape)} and down {tuple(down.shape)}; expected (...,D) "
            "with rows, (H,D) and (E,H)"
        )
    if not (negative_slope >= 0 and eps >= 0):
        raise ValueError(f"relu2_ffn: negative_slope {negative_slope} and eps {eps}, expected neither below 0")


class _Relu2FfnByHand(torch.autograd.Function):
    """Keeps x, leaky_relu(u), the normalised rows and one number a row."""

    @staticmethod
    def forward(ctx, x_ND, up_HD, down_EH, negative_slope, eps):
        s_NH = torch.mm(x_ND, up_HD.t())
        s_NH = F.leaky_relu_(s_NH, negative_slope) if negative_slope else s_NH.relu_()
        normed_NH = s_NH * s_NH
        scale_N1 = rms_scale(normed_NH, eps)
        normed_NH.mul_(scale_N1)
        ctx.save_for_backward(x_ND, up_HD, down_EH, s_NH, normed_NH, scale_N1)
        ctx.negative_slope = negative_slope
        return torch.mm(normed_NH, down_EH.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_NE):
        x_ND, up_HD, down_EH, s_NH, normed_NH, scale_N1 = ctx.saved_tensors
        ddown_EH = torch.mm(dy_NE.t(), normed_NH)
        # d normed -> dh = r (dn - normed mean(dn normed)) -> du = 2 s dh (times the slope below 0). What scales whole
        # rows, 2 r, is taken into dy, which is narrower.
        du_NH = torch.mm(dy_NE * (2.0 * scale_N1), down_EH)
        dot_N1 = torch.linalg.vecdot(du_NH, normed_NH)[:, None].div_(-normed_NH.shape[1])
        du_NH.addcmul_(normed_NH, dot_N1).mul_(s_NH)
        if ctx.negative_slope:
            du_NH = torch.ops.aten.leaky_relu_backward(du_NH, s_NH, ctx.negative_slope, True)
        return torch.mm(du_NH, up_HD), torch.mm(du_NH.t(), x_ND), ddown_EH, None, None
