"""Causal depthwise convolution over time in plain torch operations, with carried state.

Letters: B batch, T time, D channels, K taps, S = K - 1 inputs carried from call to call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_torch(
    x_BTD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    *,
    initial_state_BDS: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution y_t = act(bias + sum_k weight[:, k] * x_{t - (K-1) + k}).

    Source: the short convolution of Gu and Dao 2023 (Mamba). Ours keeps time before channels, as the rest of the model
    does, so that nothing is transposed, and stops at changes of document.

    Args:
        x_BTD: inputs; any floating dtype.
        weight_DK: taps of every channel, the last one for the present position.
        bias_D: added before the activation; None for none.
        initial_state_BDS: the S inputs before position 0, oldest first, of the document of position 0; None for zeros.
        document_ids_BT: integers; a position sees no input from before the last change of id. None for one document.
        activation: "silu" or None.
    Returns:
        y_BTD in the dtype of x, and final_state_BDS, the last S inputs, zero where they are of an earlier document.
    Raises:
        ValueError: shapes do not fit together, or the activation is unknown.

    Numerics: float64 for float64 inputs; otherwise products and sums are float32 whatever the dtype of x, and y is
    rounded to it once. The final state is a copy of inputs, exact, in the dtype of x. One backward pass is supported,
    not the derivative of it.
    """
    conv1d_check_arguments(x_BTD, weight_DK, bias_D, initial_state_BDS, document_ids_BT, activation)
    length, carried = x_BTD.shape[1], weight_DK.shape[1] - 1
    acc_dtype = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32

    # From here on the carried inputs are simply earlier positions.
    if initial_state_BDS is None:
        padded_BtD = F.pad(x_BTD, (0, 0, carried, 0))
    else:
        padded_BtD = torch.cat([initial_state_BDS.transpose(1, 2).to(x_BTD.dtype), x_BTD], dim=1)
    run_Bt = None
    if document_ids_BT is not None:
        changed = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
        run_Bt = F.pad(changed.to(torch.int64).cumsum(dim=1), (carried + 1, 0))
    y_BTD = _CausalConv1d.apply(
        padded_BtD,
        weight_DK.to(acc_dtype),
        None if bias_D is None else bias_D.to(acc_dtype),
        run_Bt,
        activation == "silu",
    )
    last_BSD = padded_BtD[:, length:]
    if run_Bt is not None:
        last_BSD = last_BSD * (run_Bt[:, length:] == run_Bt[:, -1:])[..., None]
    return y_BTD, last_BSD.transpose(1, 2)


def conv1d_check_arguments(
    x_BTD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    initial_state_BDS: Tensor | None,
    document_ids_BT: Tensor | None,
    activation: str | None,
) -> None:
    """Raise ValueError for the first argument that does not fit x and the weight."""
    if x_BTD.dim() != 3 or weight_DK.dim() != 2 or x_BTD.shape[2] != weight_DK.shape[0]:
        raise ValueError(
            f"causal_conv1d: x is {tuple(x_BTD.shape)} and weight {tuple(weight_DK.shape)}; expected (B,T,D) and (D,K)"
        )
    batch, length, channels = x_BTD.shape
    carried = weight_DK.shape[1] - 1
    expected = {
        "bias": (bias_D, (channels,)),
        "initial_state": (initial_state_BDS, (batch, channels, carried)),
        "document_ids": (document_ids_BT, (batch, length)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"causal_conv1d: {name} is {tuple(tensor.shape)}, expected {shape}")
    if length < 1 or carried < 0:
        raise ValueError(f"causal_conv1d: {length} positions and {carried + 1} taps, expected at least 1 of both")
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation is {activation!r}, expected 'silu' or None")


def _conv1d_same_document(run_Bt: Tensor | None, shift: int, carried: int) -> Tensor | None:
    """Boolean (B, T, 1): the input `shift` positions earlier is of the same document; None where all are."""
    if run_Bt is None or shift == 0:
        return None
    return (run_Bt[:, carried:] == run_Bt[:, carried - shift : run_Bt.shape[1] - shift])[..., None]


class _CausalConv1d(torch.autograd.Function):
    """The convolution over inputs with S earlier ones in front; backward computes the pre-activation again."""

    @staticmethod
    def forward(ctx, padded_BtD, weight_DK, bias_D, run_Bt, silu):
        ctx.save_for_backward(padded_BtD, weight_DK, bias_D, run_Bt)
        ctx.silu = silu
        y_BTD = _conv1d_sum(padded_BtD, weight_DK, bias_D, run_Bt)
        if silu:
            y_BTD = F.silu(y_BTD, inplace=True)
        return y_BTD.to(padded_BtD.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_BTD):
        padded_BtD, weight_DK, bias_D, run_Bt = ctx.saved_tensors
        dsum_BTD = dy_BTD.to(weight_DK.dtype)
        if ctx.silu:
            dsum_BTD = torch.ops.aten.silu_backward(dsum_BTD, _conv1d_sum(padded_BtD, weight_DK, bias_D, run_Bt))
        carried = weight_DK.shape[1] - 1
        length = dy_BTD.shape[1]
        taps_KD = weight_DK.t().contiguous()
        dpadded_BtD = torch.zeros_like(padded_BtD, dtype=weight_DK.dtype)
        dtaps_KD = torch.empty_like(taps_KD)
        for shift in range(carried + 1):
            part = slice(carried - shift, carried - shift + length)
            same = _conv1d_same_document(run_Bt, shift, carried)
            reached_BTD = dsum_BTD if same is None else dsum_BTD * same
            dtaps_KD[carried - shift] = (reached_BTD * padded_BtD[:, part]).sum(dim=(0, 1))
            dpadded_BtD[:, part].addcmul_(reached_BTD, taps_KD[carried - shift])
        dbias_D = None if bias_D is None else dsum_BTD.sum(dim=(0, 1))
        return dpadded_BtD.to(padded_BtD.dtype), dtaps_KD.t(), dbias_D, None, None


def _conv1d_sum(padded_BtD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, run_Bt: Tensor | None) -> Tensor:
    """Weighted sum over the taps plus bias, (B, T, D) in the dtype of the weight."""
    carried = weight_DK.shape[1] - 1
    length = padded_BtD.shape[1] - carried
    taps_KD = weight_DK.t().contiguous()
    present_BTD = padded_BtD[:, carried:]
    if bias_D is None:
        sum_BTD = present_BTD * taps_KD[carried]
    else:
        sum_BTD = torch.addcmul(bias_D, present_BTD, taps_KD[carried])
    for shift in range(1, carried + 1):
        earlier_BTD = padded_BtD[:, carried - shift : carried - shift + length]
        same = _conv1d_same_document(run_Bt, shift, carried)
        if same is not None:
            earlier_BTD = earlier_BTD * same
        sum_BTD.addcmul_(earlier_BTD, taps_KD[carried - shift])
    return sum_BTD
