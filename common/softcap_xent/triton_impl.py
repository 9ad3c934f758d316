"""Softcapped cross-entropy fused with the output projection, in Triton and cuBLAS: no logits in memory.

Letters: N rows (tokens), n rows of one piece, D width, V vocabulary, K tiles of the vocabulary, C columns of the
scaled rows.

One kernel multiplies, caps and exponentiates a tile of logits and writes only e = exp(capped) * slope in the dtype of
the rows; its row sums are the partition. The gradient of the logits is r_n * e_nv with one factor a row,

    r_n = (1 + 2 z_weight lse_n) / (N total_n),

but for the target's entry, which a second kernel corrects, one number a row. So dx = r * (e W) and dW = e^T (r x) are
two matrix products of e as it stands, and r itself, two more columns of (r x), gives the bias's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.softcap_xent.torch_impl import SOFTCAP_POLY_EDGE, softcap_check_arguments
from common.triton_support import kernel_is_interpreted, nearest_bf16, require_triton, tl, triton, triton_kernel

# Numbers of e that exist at once: 256 MiB in bfloat16.
_SOFTCAP_PIECE_NUMBERS = 2**27
# Below this bound no maximum has to be subtracted: exp(40) times rows and vocabulary leaves sums, and their reciprocals
# times x, far inside the range of bfloat16.
_SOFTCAP_UNSHIFTED_NATS = 40.0
_LOG2_E = 1.4426950408889634


@triton_kernel
def _softcap_curve(logit, edge, c1, c3, c5, s2, s4, KIND: tl.constexpr, SLOPE: tl.constexpr):
    """Capped logits in units of ln 2 (over the temperature), and d capped / d logit."""
    if KIND == "none":
        capped = logit * c1
        slope = tl.full(logit.shape, 1.0, tl.float32)
    elif KIND == "tanh":  # c1 = cap log2(e) / temperature, s2 = 2 log2(e) / cap
        bent = 1.0 - 2.0 / (1.0 + tl.exp2(logit * s2))
        capped = bent * c1
        slope = 1.0 - bent * bent
    else:
        bounded = tl.maximum(logit, -edge, propagate_nan=tl.PropagateNan.ALL)  # a run that diverges must show
        bounded = tl.minimum(bounded, edge, propagate_nan=tl.PropagateNan.ALL)
        square = bounded * bounded
        capped = bounded * (c1 + square * (c3 + square * c5))
        slope = 1.0 + square * (s2 + square * s4)
        if SLOPE:
            slope = tl.where(tl.abs(bounded) < edge, slope, 0.0)
    return capped, slope


@triton_kernel
def _softcap_share(
    logit,
    bias_ptr,
    v,
    vocabulary,
    lse,
    edge,
    c1,
    c3,
    c5,
    s2,
    s4,
    KIND: tl.constexpr,
    WRITE: tl.constexpr,
    SHIFTED: tl.constexpr,
    EVEN_V: tl.constexpr,
):
    """Row sums of exp(capped - shift), the shifts, and exp(capped - shift) * slope of some columns."""
    logit += tl.load(bias_ptr + v, mask=v < vocabulary, other=0.0).to(tl.float32)[None, :]
    capped, slope = _softcap_curve(logit, edge, c1, c3, c5, s2, s4, KIND, WRITE)
    shift = lse
    if SHIFTED and not WRITE:
        if not EVEN_V:
            capped = tl.where((v < vocabulary)[None, :], capped, float("-inf"))
        shift = tl.maximum(tl.max(capped, axis=1), -1e30)  # a tile's half may lie wholly beyond the vocabulary
    if SHIFTED:
        capped -= shift[:, None]
    share = tl.exp2(capped)
    if not EVEN_V:
        share = tl.where((v < vocabulary)[None, :], share, 0.0)
    return tl.sum(share, axis=1), shift, share * slope


@triton_kernel
def _softcap_head_kernel(
    x_rows,
    weight_rows,
    bias_ptr,
    lse_ptr,
    e_rows,
    sums_ptr,
    tops_ptr,
    rows,
    vocabulary,
    width,
    tiles,
    edge,
    c1,
    c3,
    c5,
    s2,
    s4,
    KIND: tl.constexpr,
    WRITE: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_V: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of logits. Without SHIFTED: row sums of exp(capped), and e if WRITE. With SHIFTED and not WRITE: row
    maxima and the sums below them; with both: e relative to the known log-partition."""
    tile_n = tl.program_id(0) // tiles
    tile_v = tl.program_id(0) % tiles
    first_n = tile_n * BLOCK_N
    first_v = tile_v * BLOCK_V
    logit = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for d in range(0, width, BLOCK_D):
        x = x_rows.load([first_n, d])
        w = weight_rows.load([first_v, d])
        if WIDEN:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        logit = tl.dot(x, w.T, logit, input_precision="ieee")
    n = first_n + tl.arange(0, BLOCK_N)
    lse = tl.zeros((BLOCK_N,), tl.float32)
    if SHIFTED and WRITE:
        lse = tl.load(lse_ptr + n, mask=n < rows, other=0.0) * 1.4426950408889634
    # One half of the columns after the other: few enough registers for two blocks to share an SM.
    HALF: tl.constexpr = BLOCK_V // 2
    left, right = logit.reshape((BLOCK_N, 2, HALF)).permute(0, 2, 1).split()
    v = first_v + tl.arange(0, HALF)
    sums, tops, e = _softcap_share(
        left, bias_ptr, v, vocabulary, lse, edge, c1, c3, c5, s2, s4, KIND, WRITE, SHIFTED, EVEN_V
    )
    if WRITE:
        if WIDEN and e_rows.dtype == tl.bfloat16:
            e = nearest_bf16(e)
        e_rows.store([first_n, first_v], e.to(e_rows.dtype))
    v += HALF
    more, higher, e = _softcap_share(
        right, bias_ptr, v, vocabulary, lse, edge, c1, c3, c5, s2, s4, KIND, WRITE, SHIFTED, EVEN_V
    )
    if WRITE:
        if WIDEN and e_rows.dtype == tl.bfloat16:
            e = nearest_bf16(e)
        e_rows.store([first_n, first_v + HALF], e.to(e_rows.dtype))
    if SHIFTED and not WRITE:
        top = tl.maximum(tops, higher)
        sums = sums * tl.exp2(tops - top) + more * tl.exp2(higher - top)
        tl.store(tops_ptr + n * tiles + tile_v, top, mask=n < rows)
    else:
        sums += more
    if not (SHIFTED and WRITE):
        tl.store(sums_ptr + n * tiles + tile_v, sums, mask=n < rows)


@triton_kernel
def _softcap_target_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    sums_ptr,
    tops_ptr,
    lse_ptr,
    nll_ptr,
    e_ptr,
    factor_ptr,
    scaled_ptr,
    rows,
    width,
    columns,
    tiles,
    x_stride,
    weight_stride,
    e_stride,
    count,
    z_weight,
    edge,
    c1,
    c3,
    c5,
    s2,
    s4,
    KIND: tl.constexpr,
    SHIFTED: tl.constexpr,
    SUMMED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A few rows: log-partition from the tiles' sums (SUMMED) and nll; the target's entry of e, the row's factor and
    the scaled row (GRADIENT)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = n < rows
    wide_n = n.to(tl.int64)
    target = tl.load(targets_ptr + n, mask=here, other=0)
    dot = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        inside = here[:, None] & (d < width)[None, :]
        x = tl.load(x_ptr + (wide_n * x_stride)[:, None] + d[None, :], mask=inside, other=0.0)
        w = tl.load(weight_ptr + (target.to(tl.int64) * weight_stride)[:, None] + d[None, :], mask=inside, other=0.0)
        dot += x.to(tl.float32) * w.to(tl.float32)
    logit = tl.sum(dot, axis=1)
    logit += tl.load(bias_ptr + target, mask=here, other=0.0).to(tl.float32)
    capped, slope = _softcap_curve(logit, edge, c1, c3, c5, s2, s4, KIND, GRADIENT)
    if SUMMED:
        k = tl.arange(0, BLOCK_K)
        known = here[:, None] & (k < tiles)[None, :]
        part = tl.load(sums_ptr + (wide_n * tiles)[:, None] + k[None, :], mask=known, other=0.0)
        if SHIFTED:
            tops = tl.load(tops_ptr + (wide_n * tiles)[:, None] + k[None, :], mask=known, other=float("-inf"))
            top = tl.where(here, tl.max(tops, axis=1), 0.0)
            total = tl.where(here, tl.sum(part * tl.exp2(tops - top[:, None]), axis=1), 1.0)
            log2_total = tl.log2(total) + top
        else:
            total = tl.where(here, tl.sum(part, axis=1), 1.0)
            log2_total = tl.log2(total)
        lse = log2_total * 0.6931471805599453
        tl.store(lse_ptr + n, lse, mask=here)
        tl.store(nll_ptr + n, (log2_total - capped) * 0.6931471805599453, mask=here)
    else:
        lse = tl.load(lse_ptr + n, mask=here, other=0.0)
        total = tl.full((BLOCK_N,), 1.0, tl.float32)
    if GRADIENT:
        if SHIFTED:
            share = tl.exp2(capped - lse * 1.4426950408889634)
            total = tl.full((BLOCK_N,), 1.0, tl.float32)
        else:
            share = tl.exp2(capped)
        # A row's factor may not be 0: z_weight and lse of the two signs can bring it there.
        outer = 1.0 + 2.0 * z_weight * lse
        outer = tl.where(tl.abs(outer) < 1e-6, 1e-6, outer)
        factor = outer / (total * count)
        e = slope * (share - total / outer)
        NARROW: tl.constexpr = WIDEN and e_ptr.dtype.element_ty == tl.bfloat16
        if NARROW:
            e = nearest_bf16(e)
        tl.store(e_ptr + wide_n * e_stride + target, e.to(e_ptr.dtype.element_ty), mask=here)
        tl.store(factor_ptr + n, factor, mask=here)
        # The factor in two columns of its own: what rounding takes from the first is in the second.
        high = factor
        if NARROW:
            high = nearest_bf16(high)
        high = high.to(scaled_ptr.dtype.element_ty).to(tl.float32)
        for first in range(0, columns, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            inside = here[:, None] & (d < width)[None, :]
            x = tl.load(x_ptr + (wide_n * x_stride)[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
            scaled = x * factor[:, None]
            scaled = tl.where((d == width)[None, :], high[:, None], scaled)
            scaled = tl.where((d == width + 1)[None, :], (factor - high)[:, None], scaled)
            if NARROW:
                scaled = nearest_bf16(scaled)
            place = scaled_ptr + (wide_n * columns)[:, None] + d[None, :]
            tl.store(
                place, scaled.to(scaled_ptr.dtype.element_ty), mask=here[:, None] & (d < columns)[None, :]
            )


def softcap_xent_triton(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    cap: float,
    kind: str,
    z_weight: float = 0.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy of capped logits x W^T + b, plus z_weight times the mean square of their log-partition.

    Source: as `softcap_xent_torch`.

    Args:
        x_ND: bfloat16 or float32.
        weight_VD: is rounded to the dtype of x, as for `softcap_xent_torch` on CUDA.
        bias_V, targets_N, cap, kind, z_weight: as for `softcap_xent_torch`.
        chunk_tokens: rows whose e = exp(capped) * slope exists at once; None for 128 million numbers of it.
    Returns:
        as `softcap_xent_torch`: (loss, ce, z), float32, of which loss is differentiable once.
    Raises:
        ValueError: as `softcap_xent_torch`, or x is neither bfloat16 nor float32.
        RuntimeError: Triton is not installed.

    Numerics: logits, caps, exponentials and sums are float32 and never stored. In bfloat16 e and r x are rounded once
    each before the two products of the gradient, which accumulate in float32; products of float32 rows are those of
    torch.matmul (TF32 if that is allowed), the logits' are full float32. No atomics: equal runs give equal bits. Memory
    beyond the arguments: the piece of e, its scaled rows, and the gradients.
    """
    softcap_check_arguments(x_ND, weight_VD, bias_V, targets_N, cap, kind, chunk_tokens)
    _softcap_check_triton(x_ND)
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x_ND, weight_VD, bias_V)
    )
    return _SoftcapXentTriton.apply(
        x_ND, weight_VD, bias_V, targets_N, cap, kind, z_weight, chunk_tokens, differentiable
    )


@torch.no_grad()
def softcap_nll_triton(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    cap: float,
    kind: str,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Negative log-likelihood of every target under softmax(capped logits / temperature); not differentiable.

    Args:
        as for `softcap_nll_torch`, with x bfloat16 or float32.
        chunk_tokens: rows of one launch; None for all: nothing but a few sums a row is stored.
    Returns:
        nll_N in nats, float32.
    Raises:
        as `softcap_xent_triton`, and ValueError for temperature <= 0.

    Numerics: as `softcap_xent_triton`.
    """
    softcap_check_arguments(x_ND, weight_VD, bias_V, targets_N, cap, kind, chunk_tokens)
    _softcap_check_triton(x_ND)
    if not temperature > 0:
        raise ValueError(f"softcap_nll: temperature is {temperature}, expected a positive number")
    head = _SoftcapHead(x_ND, weight_VD, bias_V, targets_N, cap, kind, temperature)
    rows_each = chunk_tokens or x_ND.shape[0]
    for start in range(0, x_ND.shape[0], rows_each):
        head.likelihood(slice(start, min(start + rows_each, x_ND.shape[0])))
    return head.nll_N


def _softcap_check_triton(x_ND: Tensor) -> None:
    require_triton("softcap_xent_triton")
    if x_ND.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"softcap: x is {x_ND.dtype}, expected bfloat16 or float32; softcap_xent_torch takes others")


def _softcap_aligned(rows: Tensor) -> Tensor:
    """The same matrix with rows that begin at multiples of 16 bytes, as tensor descriptors need."""
    step = 16 // rows.element_size()
    if rows.stride(1) == 1 and rows.stride(0) % step == 0 and rows.data_ptr() % 16 == 0:
        return rows
    columns = rows.shape[1]
    padded = rows.new_zeros(rows.shape[0], -(-columns // step) * step)
    padded[:, :columns] = rows
    return padded[:, :columns]


def _softcap_wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())


class _SoftcapHead:
    """The rows, the projection and what is known of every row; launches over pieces of rows."""

    def __init__(
        self,
        x_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        cap: float,
        kind: str,
        temperature: float,
    ) -> None:
        self.x_ND = _softcap_aligned(x_ND.detach())
        self.weight_VD = _softcap_aligned(weight_VD.detach().to(x_ND.dtype))
        # Zeros where there is none: ptxas spills a few registers of the kernel without a bias, none of that with one.
        self.bias_V = self.weight_VD.new_zeros(weight_VD.shape[0]) if bias_V is None else bias_V.detach().contiguous()
        self.targets_N = targets_N
        self.shifted = kind == "none" or cap / temperature > _SOFTCAP_UNSHIFTED_NATS
        scale = _LOG2_E / temperature
        if kind == "tanh":
            edge, c1, c3, c5, s2, s4 = 0.0, cap * scale, 0.0, 0.0, 2.0 * _LOG2_E / cap, 0.0
        elif kind == "poly":
            edge, c1, c3, c5 = SOFTCAP_POLY_EDGE * cap, scale, -scale / (3.0 * cap**2), scale / (15.0 * cap**4)
            s2, s4 = -1.0 / cap**2, 1.0 / (3.0 * cap**4)
        else:
            edge, c1, c3, c5, s2, s4 = 0.0, scale, 0.0, 0.0, 0.0, 0.0
        self.curve = (edge, c1, c3, c5, s2, s4)
        self.kind = kind
        # Two blocks of 8 warps share an SM, so that the one's exponentials run beside the other's products. Full
        # float32 products run on the ordinary units, from registers.
        interpreted = kernel_is_interpreted(_softcap_head_kernel)
        self.registers = None
        if interpreted:
            self.block_N, self.block_V, self.block_D, self.warps, self.stages = 32, 32, 16, 4, 1
        elif x_ND.dtype == torch.float32:
            self.block_N, self.block_V, self.block_D, self.warps, self.stages = 64, 64, 16, 8, 2
        else:
            self.block_N, self.block_V, self.block_D, self.warps, self.stages = 128, 128, 64, 8, 3
            self.registers = 128
        self.widen = interpreted
        self.tiles = -(-weight_VD.shape[0] // self.block_V)
        self.lse_N, self.nll_N = (
            torch.empty(x_ND.shape[0], dtype=torch.float32, device=x_ND.device) for _ in range(2)
        )

    def _project(self, rows: slice, e_nV: Tensor | None, sums_nK: Tensor | None, tops_nK: Tensor | None) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        x_nD, vocabulary = self.x_ND[rows], self.weight_VD.shape[0]
        _softcap_head_kernel[(-(-x_nD.shape[0] // self.block_N) * self.tiles,)](
            TensorDescriptor.from_tensor(x_nD, [self.block_N, self.block_D]),
            TensorDescriptor.from_tensor(self.weight_VD, [self.block_V, self.block_D]),
            self.bias_V,
            self.lse_N[rows],
            None if e_nV is None else TensorDescriptor.from_tensor(e_nV, [self.block_N, self.block_V // 2]),
            sums_nK,
            tops_nK,
            x_nD.shape[0],
            vocabulary,
            x_nD.shape[1],
            self.tiles,
            *self.curve,
            KIND=self.kind,
            WRITE=e_nV is not None,
            SHIFTED=self.shifted,
            BLOCK_N=self.block_N,
            BLOCK_V=self.block_V,
            BLOCK_D=self.block_D,
            EVEN_V=vocabulary % self.block_V == 0,
            WIDEN=self.widen,
            num_warps=self.warps,
            num_stages=self.stages,
            maxnreg=self.registers,
        )

    def _targets(
        self,
        rows: slice,
        sums_nK: Tensor | None,
        tops_nK: Tensor | None,
        gradient: tuple[Tensor, Tensor, Tensor] | None,
        z_weight: float,
    ) -> None:
        x_nD = self.x_ND[rows]
        e_nV, factor_n, scaled_nC = gradient or (None, None, None)
        block_N = 16
        _softcap_target_kernel[(-(-x_nD.shape[0] // block_N),)](
            x_nD,
            self.weight_VD,
            self.bias_V,
            self.targets_N[rows],
            sums_nK,
            tops_nK,
            self.lse_N[rows],
            self.nll_N[rows],
            e_nV,
            factor_n,
            scaled_nC,
            x_nD.shape[0],
            x_nD.shape[1],
            0 if scaled_nC is None else scaled_nC.shape[1],
            self.tiles,
            x_nD.stride(0),
            self.weight_VD.stride(0),
            0 if e_nV is None else e_nV.stride(0),
            float(self.x_ND.shape[0]),
            z_weight,
            *self.curve,
            KIND=self.kind,
            SHIFTED=self.shifted,
            SUMMED=sums_nK is not None,
            GRADIENT=gradient is not None,
            BLOCK_N=block_N,
            BLOCK_D=128,
            BLOCK_K=triton.next_power_of_2(self.tiles),
            WIDEN=self.widen,
            num_warps=4,
        )

    def _partial_sums(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        sums_nK = self.lse_N.new_empty(rows.stop - rows.start, self.tiles)
        return sums_nK, torch.empty_like(sums_nK) if self.shifted else None

    def likelihood(self, rows: slice) -> None:
        """Fill lse and nll of some rows."""
        sums_nK, tops_nK = self._partial_sums(rows)
        self._project(rows, None, sums_nK, tops_nK)
        self._targets(rows, sums_nK, tops_nK, None, 0.0)

    def gradient(self, rows: slice, z_weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """Fill lse and nll of some rows; return e_nV, the rows' factors and their scaled rows."""
        x_nD, vocabulary = self.x_ND[rows], self.weight_VD.shape[0]
        step = 16 // x_nD.element_size()
        e_nV = x_nD.new_empty(x_nD.shape[0], -(-vocabulary // step) * step)[:, :vocabulary]
        scaled_nC = x_nD.new_empty(x_nD.shape[0], -(-(x_nD.shape[1] + 2) // step) * step)
        factor_n = self.lse_N.new_empty(x_nD.shape[0])
        parts = (e_nV, factor_n, scaled_nC)
        if self.shifted:
            self.likelihood(rows)
            self._project(rows, e_nV, None, None)
            self._targets(rows, None, None, parts, z_weight)
        else:
            sums_nK, _ = self._partial_sums(rows)
            self._project(rows, e_nV, sums_nK, None)
            self._targets(rows, sums_nK, None, parts, z_weight)
        return parts


class _SoftcapXentTriton(torch.autograd.Function):
    """Loss and gradient in one sweep over pieces of rows; backward only scales."""

    @staticmethod
    def forward(ctx, x_ND, weight_VD, bias_V, targets_N, cap, kind, z_weight, chunk_tokens, differentiable):
        count, width = x_ND.shape
        head = _SoftcapHead(x_ND, weight_VD, bias_V, targets_N, cap, kind, 1.0)
        rows_each = chunk_tokens
        if rows_each is None:
            rows_each = max(_SOFTCAP_PIECE_NUMBERS // weight_VD.shape[0] // 128 * 128, 128) if differentiable else count
        dx_ND = torch.empty_like(x_ND) if differentiable else None
        sum_VC = None
        for start in range(0, count, rows_each):
            rows = slice(start, min(start + rows_each, count))
            if dx_ND is None:
                head.likelihood(rows)
                continue
            e_nV, factor_n, scaled_nC = head.gradient(rows, z_weight)
            torch.mul(_softcap_wide_product(e_nV, head.weight_VD), factor_n[:, None], out=dx_ND[rows])
            part_VC = _softcap_wide_product(e_nV.t(), scaled_nC)
            sum_VC = part_VC if sum_VC is None else sum_VC.add_(part_VC)
        ce = head.nll_N.mean(dtype=torch.float64).float()
        z = (z_weight * head.lse_N.double().square().mean()).float()
        if dx_ND is not None and sum_VC is not None:
            dbias_V = None
            if bias_V is not None:
                dbias_V = (sum_VC[:, width] + sum_VC[:, width + 1]).to(bias_V.dtype)
            ctx.save_for_backward(dx_ND, sum_VC[:, :width], dbias_V)
            ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(ce, z)
        return ce + z, ce, z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, _dce, _dz):
        dx_ND, dweight_VD, dbias_V = ctx.saved_tensors
        dweight_VD = (dweight_VD * dloss).to(ctx.weight_dtype)
        dbias_V = None if dbias_V is None else dbias_V * dloss.to(dbias_V.dtype)
        return dx_ND * dloss.to(dx_ND.dtype), dweight_VD, dbias_V, None, None, None, None, None, None
