"""RMS normalisation of a gated row in plain torch operations.

Letters: I inner width; the dimensions before it are rows.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gated_norm_check_arguments(y: Tensor, z: Tensor, weight_I: Tensor) -> None:
    """Raise ValueError for shapes or dtypes that do not fit together."""
    if y.dim() < 1 or y.shape != z.shape or weight_I.shape != y.shape[-1:] or y.numel() == 0:
        raise ValueError(
            f"gated_rms_norm: y is {tuple(y.shape)}, z {tuple(z.shape)}, weight {tuple(weight_I.shape)}; expected y and "
            "z (..., I) alike and not empty, and weight (I,)"
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

    Numerics: the gate and the product are rounded to the dtype of y, as is the weight; the norm is PyTorch's.
    """
    gated_norm_check_arguments(y, z, weight_I)
    return F.rms_norm(y * F.silu(z), weight_I.shape, weight_I.to(y.dtype), eps=eps)
