"""Softcapped cross-entropy fused with the output projection: the logits of a few rows at a time, never of all.

Letters: N rows (tokens), n rows of one piece, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The polynomial u - u^3/3 + u^5/15 rises for every u and reaches 1 here; beyond, the capped logit is the cap itself.
SOFTCAP_POLY_EDGE = 1.6898605928768917
# exp(60) * vocabulary stays finite in float32, and exp(-60) normal: below this bound no maximum has to be subtracted.
_SOFTCAP_SAFE_NATS = 60.0
_SOFTCAP_KINDS = ("poly", "tanh", "none")


def softcap_torch(logits: Tensor, cap: float, kind: str) -> Tensor:
    """Logits bounded to [-cap, cap].

    Source: tanh capping is that of Gemma 2; the polynomial is the seed recipe's: cap * clamp(u - u^3/3 + u^5/15, -1, 1)
    with u = logit/cap clamped to [-2, 2].

    Args:
        logits: any shape, floating.
        cap: bound, > 0; not used by "none".
        kind: "poly", "tanh" or "none".
    Returns:
        capped logits in the shape and dtype of `logits`, differentiable.
    Raises:
        ValueError: unknown kind, or cap <= 0.

    Numerics: elementwise in the dtype of `logits`. For "poly" the gradient is exactly 0 where |logit| > 1.69 * cap.
    """
    _softcap_check(cap, kind)
    if kind == "none":
        return logits
    if kind == "tanh":
        return cap * torch.tanh(logits / cap)
    u = (logits / cap).clamp(-2.0, 2.0)
    v = u * u
    return cap * (u * (1.0 + v * (v / 15.0 - 1.0 / 3.0))).clamp(-1.0, 1.0)


def softcap_xent_torch(
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

    Source: z-loss as in PaLM (Chowdhery et al. 2022, section 5). The gradient with respect to x, W and b is computed
    together with the loss, piece by piece, so that only `chunk_tokens` rows of logits exist at any time.

    Args:
        x_ND: rows that are projected.
        weight_VD, bias_V: output projection; bias may be None.
        targets_N: integers in [0, V).
        cap, kind: as in `softcap_torch`.
        z_weight: weight of the z-loss, >= 0.
        chunk_tokens: rows of logits that exist at once; None for as many as suit the device (half a million logits on a
            CPU, where they stay in cache, 64 million elsewhere).
    Returns:
        loss = ce + z, differentiable once; ce, mean cross-entropy in nats; z = z_weight * mean(lse^2). Scalars in the
        accumulation dtype; ce and z are detached.
    Raises:
        ValueError: shapes do not fit together, unknown kind, cap <= 0, no rows, or chunk_tokens < 1.

    Numerics: float64 for float64 rows. Otherwise capping, exponentials and sums are float32; products are in the dtype
    of x on CUDA (the weight is rounded to it) and in float32 on a CPU; the weight's gradient is summed over the pieces
    in float32. Memory beyond the arguments: chunk_tokens * V * about 5 numbers, and the three gradients.
    """
    softcap_check_arguments(x_ND, weight_VD, bias_V, targets_N, cap, kind, chunk_tokens)
    rows_each = chunk_tokens or max(1, (2**26 if x_ND.is_cuda else 2**19) // weight_VD.shape[0])
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x_ND, weight_VD, bias_V)
    )
    return _SoftcapXent.apply(x_ND, weight_VD, bias_V, targets_N, cap, kind, z_weight, rows_each, differentiable)


@torch.no_grad()
def softcap_nll_torch(
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
        x_ND, weight_VD, bias_V, targets_N, cap, kind, chunk_tokens: as in `softcap_xent_torch`.
        temperature: divides the capped logits, > 0.
    Returns:
        nll_N in nats, float32 (float64 for float64 rows).
    Raises:
        ValueError: as `softcap_xent_torch`, and temperature <= 0.

    Numerics: as `softcap_xent_torch`.
    """
    softcap_check_arguments(x_ND, weight_VD, bias_V, targets_N, cap, kind, chunk_tokens)
    rows_each = chunk_tokens or max(1, (2**26 if x_ND.is_cuda else 2**19) // weight_VD.shape[0])
    if not temperature > 0:
        raise ValueError(f"softcap_nll: temperature is {temperature}, expected a positive number")
    acc, product = _softcap_dtypes(x_ND)
    weight_DV = weight_VD.to(product).t()
    nll_N = torch.empty(x_ND.shape[0], dtype=acc, device=x_ND.device)
    for start in range(0, x_ND.shape[0], rows_each):
        rows = slice(start, start + rows_each)
        capped_nV = softcap_torch(_softcap_logits(x_ND[rows].to(product), weight_DV, bias_V, acc), cap, kind)
        if temperature != 1.0:
            capped_nV = capped_nV / temperature
        lse_n = torch.logsumexp(capped_nV, dim=1)
        nll_N[rows] = lse_n - capped_nV.gather(1, targets_N[rows, None])[:, 0]
    return nll_N


def _softcap_check(cap: float, kind: str) -> None:
    if kind not in _SOFTCAP_KINDS:
        raise ValueError(f"softcap: kind is {kind!r}, expected one of {', '.join(_SOFTCAP_KINDS)}")
    if kind != "none" and not cap > 0:
        raise ValueError(f"softcap: cap is {cap}, expected a positive number (or kind 'none')")


def softcap_check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cap: float,
    kind: str,
    chunk_tokens: int | None,
) -> None:
    """Raises ValueError for what no form of the fused loss can take: kinds, caps, shapes, chunk_tokens."""
    _softcap_check(cap, kind)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or x.shape[0] < 1:
        raise ValueError(
            f"softcap: x is {tuple(x.shape)} and weight {tuple(weight.shape)}; expected (N,D), N >= 1, and (V,D)"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"softcap: bias is {tuple(bias.shape)}, expected {(weight.shape[0],)}")
    if tuple(targets.shape) != (x.shape[0],):
        raise ValueError(f"softcap: targets are {tuple(targets.shape)}, expected {(x.shape[0],)}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"softcap: chunk_tokens is {chunk_tokens}, expected at least 1")


def _softcap_dtypes(x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Dtype of sums, and dtype of the operands of matrix products."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    return acc, x.dtype if x.is_cuda else acc


def _softcap_logits(x_nD: Tensor, weight_DV: Tensor, bias_V: Tensor | None, acc: torch.dtype) -> Tensor:
    """x W^T + b in the accumulation dtype."""
    if x_nD.dtype == acc:
        return torch.mm(x_nD, weight_DV) if bias_V is None else torch.addmm(bias_V.to(acc), x_nD, weight_DV)
    logits_nV = torch.mm(x_nD, weight_DV, out_dtype=acc)
    return logits_nV if bias_V is None else logits_nV.add_(bias_V.to(acc))


class _SoftcapXent(torch.autograd.Function):
    """Loss and gradient in one sweep over pieces of rows; backward only scales."""

    @staticmethod
    def forward(ctx, x_ND, weight_VD, bias_V, targets_N, cap, kind, z_weight, rows_each, differentiable):
        count = x_ND.shape[0]
        acc, product = _softcap_dtypes(x_ND)
        weight_p = weight_VD.to(product)
        dx_ND = torch.empty_like(x_ND) if differentiable else x_ND
        dweight_VD = torch.zeros_like(weight_VD, dtype=acc) if differentiable else weight_VD
        dbias_V = torch.zeros_like(bias_V, dtype=acc) if differentiable and bias_V is not None else None
        # Sums of many rows keep their digits in float64.
        ce_sum = torch.zeros((), dtype=torch.float64, device=x_ND.device)
        z_sum = torch.zeros((), dtype=torch.float64, device=x_ND.device)
        for start in range(0, count, rows_each):
            rows = slice(start, start + rows_each)
            x_nD = x_ND[rows].to(product)
            targets_n1 = targets_N[rows, None]
            logits_nV = _softcap_logits(x_nD, weight_p.t(), bias_V, acc)
            capped_nV, slope_nV = _softcap_with_slope(logits_nV, cap, kind, differentiable)
            picked_n1 = capped_nV.gather(1, targets_n1)
            if kind != "none" and cap <= _SOFTCAP_SAFE_NATS:
                share_nV = capped_nV.exp_()
                total_n1 = share_nV.sum(dim=1, keepdim=True)
                lse_n1 = total_n1.log()
            else:
                top_n1 = capped_nV.amax(dim=1, keepdim=True)
                share_nV = capped_nV.sub_(top_n1).exp_()
                total_n1 = share_nV.sum(dim=1, keepdim=True)
                lse_n1 = total_n1.log() + top_n1
            ce_sum += (lse_n1 - picked_n1).sum(dtype=torch.float64)
            z_sum += lse_n1.double().square().sum()
            if not differentiable:
                continue
            # d loss / d capped = (softmax * (1 + 2 z_weight lse) - onehot) / N
            dlogits_nV = share_nV.mul_((1.0 + 2.0 * z_weight * lse_n1) / (total_n1 * count))
            dlogits_nV.scatter_add_(1, targets_n1, torch.full_like(picked_n1, -1.0 / count))
            if kind == "poly":
                edge = SOFTCAP_POLY_EDGE * cap
                dlogits_nV = torch.ops.aten.hardtanh_backward(dlogits_nV.mul_(slope_nV), logits_nV, -edge, edge)
            elif kind == "tanh":
                dlogits_nV.mul_(slope_nV)
            if dbias_V is not None:
                dbias_V += dlogits_nV.sum(dim=0)
            dlogits_p = dlogits_nV.to(product)
            dx_ND[rows] = torch.mm(dlogits_p, weight_p)
            if product == acc:
                dweight_VD.addmm_(dlogits_p.t(), x_nD)
            else:
                dweight_VD += torch.mm(dlogits_p.t(), x_nD, out_dtype=acc)
        ce = (ce_sum / count).to(acc)
        z = (z_weight * z_sum / count).to(acc)
        if differentiable:
            if dbias_V is not None and bias_V is not None:
                dbias_V = dbias_V.to(bias_V.dtype)
            ctx.save_for_backward(dx_ND, dweight_VD.to(weight_VD.dtype), dbias_V)
        ctx.mark_non_differentiable(ce, z)
        return ce + z, ce, z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, _dce, _dz):
        dx_ND, dweight_VD, dbias_V = ctx.saved_tensors
        grads = [None if grad is None else grad * dloss.to(grad.dtype) for grad in (dx_ND, dweight_VD, dbias_V)]
        return *grads, None, None, None, None, None, None


def _softcap_with_slope(logits_nV: Tensor, cap: float, kind: str, slope: bool) -> tuple[Tensor, Tensor]:
    """Capped logits in fresh memory (kind "none": the logits themselves) and their derivative, in few passes.

    The second result means nothing without `slope`, or for kind "none", whose derivative is 1.

    For "poly" the derivative is that inside the edge; the caller zeroes it outside. Clamping the logit at the edge,
    where the polynomial reaches 1, equals clamping at 2 and then the polynomial at 1.
    """
    if kind == "none":
        return logits_nV, logits_nV
    if kind == "tanh":
        u_nV = torch.mul(logits_nV, 1.0 / cap).tanh_()
        return u_nV * cap, torch.sub(1.0, u_nV * u_nV) if slope else u_nV
    u_nV = torch.clamp(logits_nV, -SOFTCAP_POLY_EDGE * cap, SOFTCAP_POLY_EDGE * cap)
    v_nV = u_nV * u_nV
    one = logits_nV.new_ones(())
    # In the logit itself: u (1 - u^2 / (3 cap^2) + u^4 / (15 cap^4)) and 1 - u^2 / cap^2 + u^4 / (3 cap^4).
    inner_nV = torch.add(one * (-1.0 / (3.0 * cap**2)), v_nV, alpha=1.0 / (15.0 * cap**4))
    u_nV.mul_(torch.addcmul(one, inner_nV, v_nV))
    if not slope:
        return u_nV, inner_nV
    torch.add(one * (-1.0 / cap**2), v_nV, alpha=1.0 / (3.0 * cap**4), out=inner_nV)
    return u_nV, torch.addcmul(one, inner_nV, v_nV, out=v_nV)
