"""The state-space scan through the mamba-ssm package (CUDA), behind the contract of this folder.

Letters: B batch, T time, H heads, P head dim, G groups, N state dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ssd_scan_mamba_ssm(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor | None = None,
    *,
    initial_state_BHPN: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    chunk_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t (x) B_t and y_t = S_t C_t + D x_t, by mamba-ssm's Triton kernels.

    Source: Dao & Gu 2024 (Mamba-2); `mamba_chunk_scan_combined` of mamba-ssm 2.3.

    Args and Returns: as `ssd_scan_torch`. The package numbers documents from 0 and gives the initial state to document 0,
    so ids are shifted to start there.

    Raises: ImportError if the package is not installed (the entry asks before it chooses this form).

    Numerics: states in float32, y in x's dtype.
    """
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # pyright: ignore[reportMissingImports]

    sequence_BT = None
    if document_ids_BT is not None:
        sequence_BT = (document_ids_BT - document_ids_BT[:, :1]).to(torch.int32).contiguous()
    return mamba_chunk_scan_combined(
        x_BTHP,
        dt_BTH,
        A_H,
        B_BTGN,
        C_BTGN,
        chunk_size=chunk_size,
        D=D_H,
        initial_states=initial_state_BHPN,
        seq_idx=sequence_BT,
        return_final_states=True,
    )
