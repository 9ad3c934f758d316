"""Causal depthwise convolution + SiLU over time as Triton kernels, with carried state and document resets.

Letters: B batch, T time, D channels, K taps, S = K - 1 inputs carried from call to call, s segments of time.

One warp takes 128 channels and walks along time with the last three inputs in registers: each input is read once, each
output written once, and the gradient of the taps is summed where it arises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.causal_conv1d.torch_impl import conv1d_check_arguments
from common.triton_support import (
    kernel_is_interpreted,
    nearest_bf16,
    require_triton,
    sigmoid_fast,
    tl,
    triton,
    triton_kernel,
)

# Taps of the longest window that is kept in registers; shorter ones leave some unused.
CONV1D_MOST_TAPS = 4
# Positions that one program walks through, a multiple of 4: short enough to fill the GPU, long enough that the three
# neighbours that two programs both read (2%) and the partial gradients of the taps (4%) stay small.
CONV1D_SEGMENT = 128
CONV1D_CHANNELS = 128


def causal_conv1d_triton(
    x_BTD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None = None,
    *,
    initial_state_BDS: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution y_t = act(bias + sum_k weight[:, k] * x_{t - (K-1) + k}), on the GPU.

    Source: the short convolution of Gu and Dao 2023 (Mamba). Ours keeps time before channels, so that nothing is
    transposed, takes an initial state and document ids together, and sums the gradient of the taps without atomics.

    Args:
        x_BTD: inputs; float32, bfloat16 or float16. Read in place if the last dimension is contiguous.
        weight_DK: taps of every channel, the last one for the present position; at most 4.
        bias_D: added before the activation; None for none.
        initial_state_BDS: the S inputs before position 0, oldest first, of the document of position 0; None for zeros.
        document_ids_BT: integers; a position sees no input from before the last change of id. None for one document.
        activation: "silu" or None.
    Returns:
        y_BTD in the dtype of x, and final_state_BDS, the last S inputs, zero where they are of an earlier document.
    Raises:
        ValueError: shapes do not fit together, more than 4 taps, x is float64, or the activation is unknown.

    Numerics: products and sums are float32 whatever the dtype of x, and y is rounded to it once. The final state is a
    copy of inputs, exact, in the dtype of x. Results are the same bits in every run. One backward pass is supported,
    not the derivative of it.
    """
    require_triton("causal_conv1d_triton")
    conv1d_check_arguments(x_BTD, weight_DK, bias_D, initial_state_BDS, document_ids_BT, activation)
    taps = weight_DK.shape[1]
    if taps > CONV1D_MOST_TAPS or x_BTD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"causal_conv1d_triton: {taps} taps of {x_BTD.dtype}, expected at most {CONV1D_MOST_TAPS} of float32, "
            "bfloat16 or float16; causal_conv1d_torch takes any"
        )
    state_BDS = None if initial_state_BDS is None else initial_state_BDS.to(x_BTD.dtype)
    y_BTD = _CausalConv1dTriton.apply(
        x_BTD,
        weight_DK.float(),
        None if bias_D is None else bias_D.float(),
        state_BDS,
        document_ids_BT,
        activation == "silu",
    )
    return y_BTD, _conv1d_final_state(x_BTD, state_BDS, document_ids_BT, taps - 1)


def _conv1d_final_state(
    x_BTD: Tensor, state_BDS: Tensor | None, document_ids_BT: Tensor | None, carried: int
) -> Tensor:
    """The last inputs of the sequence, oldest first, zero where they are of another document than the last."""
    length = x_BTD.shape[1]
    tail_BSD = x_BTD[:, max(length - carried, 0) :]
    missing = carried - tail_BSD.shape[1]
    if missing:
        if state_BDS is None:
            before_BSD = x_BTD.new_zeros(x_BTD.shape[0], missing, x_BTD.shape[2])
        else:
            before_BSD = state_BDS[:, :, -missing:].transpose(1, 2)
        tail_BSD = torch.cat([before_BSD, tail_BSD], dim=1)
    if document_ids_BT is not None and carried > 1:
        ids_BS = document_ids_BT[:, max(length - carried, 0) :]
        ids_BS = torch.cat([ids_BS[:, :1].expand(-1, missing), ids_BS], dim=1)
        changed_BS = (ids_BS[:, 1:] != ids_BS[:, :-1]).flip(1).cumsum(dim=1).flip(1)
        tail_BSD = tail_BSD * torch.nn.functional.pad(changed_BS == 0, (0, 1), value=True)[..., None]
    return tail_BSD.transpose(1, 2)


@triton_kernel
def _conv1d_input(
    x_ptr, state_ptr, t, length, stride_t, channel_D, exists_D,
    TAPS: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """The input of position t: before position 0 that of the state, zero outside."""
    row_ptr = x_ptr + tl.cast(t, tl.int64) * stride_t
    value_D = tl.load(row_ptr + channel_D, mask=exists_D & (t >= 0) & (t < length), other=0.0).to(tl.float32)
    if HAS_STATE:
        carried = TAPS - 1
        remembered = exists_D & (t < 0) & (t >= -carried)
        state_D = tl.load(state_ptr + channel_D * carried + (t + carried), mask=remembered, other=0.0)
        value_D += state_D.to(tl.float32)
    return value_D


@triton_kernel
def _conv1d_goes_on(ids_ptr, t, length, DOCUMENTS: tl.constexpr):
    """Whether position t is of the document of the position before it."""
    goes_on = True
    if DOCUMENTS:
        inside = (t > 0) & (t < length)
        here = tl.load(ids_ptr + t, mask=inside, other=0)
        goes_on = here == tl.load(ids_ptr + t - 1, mask=inside, other=0)
    return goes_on


@triton_kernel
def _conv1d_taps(weight_ptr, bias_ptr, channel_D, exists_D, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Taps by how far they look back (0 to 3), and the bias; zero where there is none."""
    none_D = tl.zeros(channel_D.shape, tl.float32)
    at = weight_ptr + channel_D * TAPS + (TAPS - 1)
    tap0_D = tl.load(at, mask=exists_D, other=0.0)
    tap1_D = none_D
    tap2_D = none_D
    tap3_D = none_D
    bias_D = none_D
    if TAPS > 1:
        tap1_D = tl.load(at - 1, mask=exists_D, other=0.0)
    if TAPS > 2:
        tap2_D = tl.load(at - 2, mask=exists_D, other=0.0)
    if TAPS > 3:
        tap3_D = tl.load(at - 3, mask=exists_D, other=0.0)
    if HAS_BIAS:
        bias_D = tl.load(bias_ptr + channel_D, mask=exists_D, other=0.0)
    return tap0_D, tap1_D, tap2_D, tap3_D, bias_D


@triton_kernel
def _conv1d_sum_taps(
    now_D, back1_D, back2_D, back3_D, tap0_D, tap1_D, tap2_D, tap3_D, bias_D, TAPS: tl.constexpr
):  # fmt: skip
    """Bias and weighted inputs of one position."""
    sum_D = bias_D + now_D * tap0_D
    if TAPS > 1:
        sum_D += back1_D * tap1_D
    if TAPS > 2:
        sum_D += back2_D * tap2_D
    if TAPS > 3:
        sum_D += back3_D * tap3_D
    return sum_D


@triton_kernel
def _conv1d_window(
    x_ptr, state_ptr, ids_ptr, t, length, stride_t, channel_D, exists_D,
    TAPS: tl.constexpr, HAS_STATE: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The three inputs before position t, nearest first, without those of other documents than position t - 1."""
    back1_D = _conv1d_input(x_ptr, state_ptr, t - 1, length, stride_t, channel_D, exists_D, TAPS, HAS_STATE)
    back2_D = _conv1d_input(x_ptr, state_ptr, t - 2, length, stride_t, channel_D, exists_D, TAPS, HAS_STATE)
    back3_D = _conv1d_input(x_ptr, state_ptr, t - 3, length, stride_t, channel_D, exists_D, TAPS, HAS_STATE)
    if DOCUMENTS:
        near = _conv1d_goes_on(ids_ptr, t - 1, length, DOCUMENTS)
        far = near & _conv1d_goes_on(ids_ptr, t - 2, length, DOCUMENTS)
        back2_D = tl.where(near, back2_D, 0.0)
        back3_D = tl.where(far, back3_D, 0.0)
    return back1_D, back2_D, back3_D


@triton_kernel
def _conv1d_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, ids_ptr, y_ptr, length, segments, channels,
    stride_x_b, stride_x_t, stride_ids_b,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, DOCUMENTS: tl.constexpr,
    SILU: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """One segment of BLOCK channels; four positions are loaded before the first is worked on."""
    blocks = tl.cdiv(channels, BLOCK)  # neighbours in the grid read neighbouring channels
    channel_D = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    exists_D = channel_D < channels
    part = tl.program_id(0) // blocks
    b = (part // segments).to(tl.int64)
    first = (part % segments) * SEGMENT
    x_ptr += b * stride_x_b
    y_ptr += b * length * channels
    if HAS_STATE:
        state_ptr += b * channels * (TAPS - 1)
    if DOCUMENTS:
        ids_ptr += b * stride_ids_b
    tap0_D, tap1_D, tap2_D, tap3_D, bias_D = _conv1d_taps(weight_ptr, bias_ptr, channel_D, exists_D, TAPS, HAS_BIAS)
    back1_D, back2_D, back3_D = _conv1d_window(
        x_ptr, state_ptr, ids_ptr, first, length, stride_x_t, channel_D, exists_D, TAPS, HAS_STATE, DOCUMENTS
    )
    for t0 in range(first, tl.minimum(first + SEGMENT, length), 4):
        at = x_ptr + tl.cast(t0, tl.int64) * stride_x_t + channel_D
        in0_D = tl.load(at, mask=exists_D, other=0.0)
        in1_D = tl.load(at + stride_x_t, mask=exists_D & (t0 + 1 < length), other=0.0)
        in2_D = tl.load(at + 2 * stride_x_t, mask=exists_D & (t0 + 2 < length), other=0.0)
        in3_D = tl.load(at + 3 * stride_x_t, mask=exists_D & (t0 + 3 < length), other=0.0)
        for step in tl.static_range(4):
            t = t0 + step
            if step == 0:
                now_D = in0_D.to(tl.float32)
            elif step == 1:
                now_D = in1_D.to(tl.float32)
            elif step == 2:
                now_D = in2_D.to(tl.float32)
            else:
                now_D = in3_D.to(tl.float32)
            if DOCUMENTS:
                goes_on = _conv1d_goes_on(ids_ptr, t, length, DOCUMENTS)
                back1_D = tl.where(goes_on, back1_D, 0.0)
                back2_D = tl.where(goes_on, back2_D, 0.0)
                back3_D = tl.where(goes_on, back3_D, 0.0)
            y_D = _conv1d_sum_taps(
                now_D, back1_D, back2_D, back3_D, tap0_D, tap1_D, tap2_D, tap3_D, bias_D, TAPS
            )
            if SILU:
                y_D *= sigmoid_fast(y_D)
            # int64: the offset in a sequence may pass 2^31 numbers where many channels meet a long one.
            if NEAREST:
                y_D = nearest_bf16(y_D)
            row = y_ptr + tl.cast(t, tl.int64) * channels
            tl.store(row + channel_D, y_D.to(y_ptr.dtype.element_ty), mask=exists_D & (t < length))
            back3_D = back2_D
            back2_D = back1_D
            back1_D = now_D


@triton_kernel
def _conv1d_backward_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, ids_ptr, dy_ptr, dx_ptr, dstate_ptr, partial_ptr,
    length, segments, channels, stride_x_b, stride_x_t, stride_ids_b, stride_dy_b, stride_dy_t,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, DOCUMENTS: tl.constexpr,
    SILU: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment of BLOCK channels.

    Position t adds to the gradients of the inputs t-3 to t, which wait in registers until they are whole: that of t-3
    after position t. So the walk goes on for four positions after the segment (of which three count) whose own taps'
    gradients belong to the next segment. partial (segments of all sequences, 5, D) holds the sums of the taps'
    gradients, by how far they look back, and of the bias's.
    """
    blocks = tl.cdiv(channels, BLOCK)  # neighbours in the grid read neighbouring channels
    channel_D = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    exists_D = channel_D < channels
    part = tl.program_id(0) // blocks
    b = (part // segments).to(tl.int64)
    first = (part % segments) * SEGMENT
    end = tl.minimum(first + SEGMENT, length)
    x_ptr += b * stride_x_b
    dy_ptr += b * stride_dy_b
    dx_ptr += b * length * channels
    if HAS_STATE:
        state_ptr += b * channels * (TAPS - 1)
        dstate_ptr += b * channels * (TAPS - 1)
    if DOCUMENTS:
        ids_ptr += b * stride_ids_b
    tap0_D, tap1_D, tap2_D, tap3_D, bias_D = _conv1d_taps(weight_ptr, bias_ptr, channel_D, exists_D, TAPS, HAS_BIAS)
    back1_D, back2_D, back3_D = _conv1d_window(
        x_ptr, state_ptr, ids_ptr, first, length, stride_x_t, channel_D, exists_D, TAPS, HAS_STATE, DOCUMENTS
    )
    # Whether the two positions before are of one document with those before them.
    went_on1 = _conv1d_goes_on(ids_ptr, first - 1, length, DOCUMENTS)
    went_on2 = _conv1d_goes_on(ids_ptr, first - 2, length, DOCUMENTS)
    none_D = tl.zeros([BLOCK], tl.float32)
    wait1_D, wait2_D, wait3_D = none_D, none_D, none_D  # gradients of the inputs t-1, t-2, t-3 so far
    dtap0_D, dtap1_D, dtap2_D, dtap3_D, dbias_D = none_D, none_D, none_D, none_D, none_D
    for t0 in range(first, first + SEGMENT + 4, 4):
        at = x_ptr + tl.cast(t0, tl.int64) * stride_x_t + channel_D
        dat = dy_ptr + tl.cast(t0, tl.int64) * stride_dy_t + channel_D
        in0_D = tl.load(at, mask=exists_D & (t0 < length), other=0.0)
        in1_D = tl.load(at + stride_x_t, mask=exists_D & (t0 + 1 < length), other=0.0)
        in2_D = tl.load(at + 2 * stride_x_t, mask=exists_D & (t0 + 2 < length), other=0.0)
        in3_D = tl.load(at + 3 * stride_x_t, mask=exists_D & (t0 + 3 < length), other=0.0)
        out0_D = tl.load(dat, mask=exists_D & (t0 < length), other=0.0)
        out1_D = tl.load(dat + stride_dy_t, mask=exists_D & (t0 + 1 < length), other=0.0)
        out2_D = tl.load(dat + 2 * stride_dy_t, mask=exists_D & (t0 + 2 < length), other=0.0)
        out3_D = tl.load(dat + 3 * stride_dy_t, mask=exists_D & (t0 + 3 < length), other=0.0)
        for step in tl.static_range(4):
            t = t0 + step
            if step == 0:
                now_D = in0_D.to(tl.float32)
                dsum_D = out0_D.to(tl.float32)
            elif step == 1:
                now_D = in1_D.to(tl.float32)
                dsum_D = out1_D.to(tl.float32)
            elif step == 2:
                now_D = in2_D.to(tl.float32)
                dsum_D = out2_D.to(tl.float32)
            else:
                now_D = in3_D.to(tl.float32)
                dsum_D = out3_D.to(tl.float32)
            goes_on = _conv1d_goes_on(ids_ptr, t, length, DOCUMENTS)
            if DOCUMENTS:
                back1_D = tl.where(goes_on, back1_D, 0.0)
                back2_D = tl.where(goes_on, back2_D, 0.0)
                back3_D = tl.where(goes_on, back3_D, 0.0)
            if SILU:
                sum_D = _conv1d_sum_taps(
                    now_D, back1_D, back2_D, back3_D, tap0_D, tap1_D, tap2_D, tap3_D, bias_D, TAPS
                )
                gate_D = sigmoid_fast(sum_D)
                dsum_D *= gate_D * (1.0 + sum_D * (1.0 - gate_D))
            if t0 < first + SEGMENT:
                dbias_D += dsum_D
                dtap0_D += dsum_D * now_D
                dtap1_D += dsum_D * back1_D
                dtap2_D += dsum_D * back2_D
                dtap3_D += dsum_D * back3_D
            reach1_D = dsum_D * tap1_D
            reach2_D = dsum_D * tap2_D
            reach3_D = dsum_D * tap3_D
            if DOCUMENTS:
                reach1_D = tl.where(goes_on, reach1_D, 0.0)
                reach2_D = tl.where(goes_on & went_on1, reach2_D, 0.0)
                reach3_D = tl.where(goes_on & went_on1 & went_on2, reach3_D, 0.0)
            whole_D = wait3_D + reach3_D
            wait3_D = wait2_D + reach2_D
            wait2_D = wait1_D + reach1_D
            wait1_D = dsum_D * tap0_D
            if NEAREST:
                whole_D = nearest_bf16(whole_D)
            done = t - 3
            row = dx_ptr + tl.cast(done, tl.int64) * channels
            tl.store(
                row + channel_D, whole_D.to(dx_ptr.dtype.element_ty), mask=exists_D & (done >= first) & (done < end)
            )
            if HAS_STATE:
                carried = TAPS - 1
                at_state = dstate_ptr + channel_D * carried + (done + carried)
                remembered = exists_D & (first == 0) & (done < 0) & (done >= -carried)
                tl.store(at_state, whole_D.to(dstate_ptr.dtype.element_ty), mask=remembered)
            went_on2 = went_on1
            went_on1 = goes_on
            back3_D = back2_D
            back2_D = back1_D
            back1_D = now_D
    at = partial_ptr + part.to(tl.int64) * 5 * channels + channel_D
    tl.store(at, dtap0_D, mask=exists_D)
    tl.store(at + channels, dtap1_D, mask=exists_D)
    tl.store(at + 2 * channels, dtap2_D, mask=exists_D)
    tl.store(at + 3 * channels, dtap3_D, mask=exists_D)
    tl.store(at + 4 * channels, dbias_D, mask=exists_D)


class _CausalConv1dTriton(torch.autograd.Function):
    """The convolution; saves its inputs only, backward computes the pre-activation again."""

    @staticmethod
    def forward(ctx, x_BTD, weight_DK, bias_D, state_BDS, ids_BT, silu):
        if x_BTD.stride(2) != 1:
            x_BTD = x_BTD.contiguous()
        if ids_BT is not None and ids_BT.stride(1) != 1:
            ids_BT = ids_BT.contiguous()
        weight_DK = weight_DK.contiguous()
        state_BDS = None if state_BDS is None else state_BDS.contiguous()
        batch, length, channels = x_BTD.shape
        y_BTD = x_BTD.new_empty(x_BTD.shape)
        segments = triton.cdiv(length, CONV1D_SEGMENT)
        _conv1d_forward_kernel[(triton.cdiv(channels, CONV1D_CHANNELS) * batch * segments,)](
            x_BTD, weight_DK, bias_D, state_BDS, ids_BT, y_BTD, length, segments, channels,
            *x_BTD.stride()[:2], 0 if ids_BT is None else ids_BT.stride(0),
            **_conv1d_constants(x_BTD, weight_DK, bias_D, state_BDS, ids_BT, silu),
        )  # fmt: skip
        ctx.save_for_backward(x_BTD, weight_DK, bias_D, state_BDS, ids_BT)
        ctx.silu = silu
        return y_BTD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_BTD):
        x_BTD, weight_DK, bias_D, state_BDS, ids_BT = ctx.saved_tensors
        if dy_BTD.stride(2) != 1:
            dy_BTD = dy_BTD.contiguous()
        batch, length, channels = x_BTD.shape
        taps = weight_DK.shape[1]
        segments = triton.cdiv(length, CONV1D_SEGMENT)
        dx_BTD = x_BTD.new_empty(x_BTD.shape)
        dstate_BDS = None if state_BDS is None else torch.empty_like(state_BDS)
        partial_s5D = weight_DK.new_empty(batch * segments, 5, channels)
        _conv1d_backward_kernel[(triton.cdiv(channels, CONV1D_CHANNELS) * batch * segments,)](
            x_BTD, weight_DK, bias_D, state_BDS, ids_BT, dy_BTD, dx_BTD, dstate_BDS, partial_s5D,
            length, segments, channels,
            *x_BTD.stride()[:2], 0 if ids_BT is None else ids_BT.stride(0), *dy_BTD.stride()[:2],
            **_conv1d_constants(x_BTD, weight_DK, bias_D, state_BDS, ids_BT, ctx.silu),
        )  # fmt: skip
        sums_5D = partial_s5D.sum(dim=0)
        dweight_DK = sums_5D[:taps].flip(0).t()
        return dx_BTD, dweight_DK, None if bias_D is None else sums_5D[4], dstate_BDS, None, None


def _conv1d_constants(
    x_BTD: Tensor,
    weight_DK: Tensor,
    bias_D: Tensor | None,
    state_BDS: Tensor | None,
    ids_BT: Tensor | None,
    silu: bool,
) -> dict[str, int]:
    """What both kernels are compiled for."""
    return {
        "TAPS": weight_DK.shape[1],
        "HAS_BIAS": bias_D is not None,
        "HAS_STATE": state_BDS is not None,
        "DOCUMENTS": ids_BT is not None,
        "SILU": silu,
        "SEGMENT": CONV1D_SEGMENT,
        "BLOCK": CONV1D_CHANNELS,
        "NEAREST": kernel_is_interpreted(_conv1d_forward_kernel) and x_BTD.dtype == torch.bfloat16,
        "num_warps": 1,
    }
