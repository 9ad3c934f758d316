"""The causal depthwise convolution through the causal-conv1d package (CUDA), behind the contract of this folder.

Letters: B batch, T time, D channels, K taps, S = K - 1 remembered inputs, U = S + T.
"""

from __future__ import annotations

import torch
from torch import Tensor


def causal_conv1d_package(
    x_BTD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    *,
    initial_state_BDS: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution + SiLU by causal-conv1d's CUDA kernel.

    Source: `causal_conv1d_fn` of causal-conv1d 1.7, which takes either an initial state or document ids, never both. A
    state is therefore put in front of the window as ordinary inputs of the first document, and its outputs are dropped.

    Args and Returns: as `causal_conv1d_torch`.

    Raises: ImportError if the package is not installed (the entry asks before it chooses this form).
    """
    from causal_conv1d import causal_conv1d_fn  # pyright: ignore[reportMissingImports]

    remembered = weight_DK.shape[1] - 1
    x_BUD, ids_BU = x_BTD, document_ids_BT
    if initial_state_BDS is not None:
        x_BUD = torch.cat([initial_state_BDS.transpose(1, 2).to(x_BTD.dtype), x_BTD], dim=1)
        if document_ids_BT is not None:
            ids_BU = torch.cat([document_ids_BT[:, :1].expand(-1, remembered), document_ids_BT], dim=1)
    sequence_BU = None if ids_BU is None else ids_BU.to(torch.int32).contiguous()
    y_BDU = causal_conv1d_fn(x_BUD.transpose(1, 2), weight_DK, bias_D, seq_idx=sequence_BU, activation=activation)
    y_BTD = y_BDU.transpose(1, 2)[:, x_BUD.shape[1] - x_BTD.shape[1] :]

    tail_BSD = x_BUD[:, max(x_BUD.shape[1] - remembered, 0) :]
    if ids_BU is not None:
        same_BS = ids_BU[:, -tail_BSD.shape[1] :] == ids_BU[:, -1:] if remembered else ids_BU[:, :0].bool()
        tail_BSD = tail_BSD * same_BS[..., None]
    missing = remembered - tail_BSD.shape[1]
    final_BDS = torch.nn.functional.pad(tail_BSD, (0, 0, missing, 0)).transpose(1, 2)
    return y_BTD, final_BDS
