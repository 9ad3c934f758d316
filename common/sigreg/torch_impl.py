"""SIGReg: distance of projected embeddings from a standard Gaussian, through their empirical characteristic function.

Letters: N samples, T positions, D width, M projections, K knots, n and t those of one block.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor


def sigreg_quadrature(
    knots: int = 17, t_min: float = 0.2, t_max: float = 4.0
) -> tuple[list[float], list[float], list[float]]:
    """Knots, target values and weights of the integral over t.

    Source: Balestriero and LeCun 2025 (LeJEPA), Epps-Pulley statistic; range and window of the seed recipe. The
    integral over |t| in [t_min, t_max] of (distance)^2 exp(-t^2/2) dt is twice that over the positive half, by the
    trapezoid rule.

    Args:
        knots: number of equally spaced knots, >= 2.
        t_min, t_max: ends of the range, t_min < t_max.
    Returns:
        t_K; phi_K = exp(-t^2/2), the characteristic function of a standard Gaussian; weight_K. Python floats.
    Raises:
        ValueError: fewer than two knots or an empty range.
    """
    if knots < 2 or not t_min < t_max:
        raise ValueError(f"sigreg: {knots} knots over [{t_min}, {t_max}], expected at least 2 and t_min < t_max")
    step = (t_max - t_min) / (knots - 1)
    t_K = [t_min + k * step for k in range(knots)]
    phi_K = [math.exp(-t * t / 2.0) for t in t_K]
    weight_K = [2.0 * step * phi * (0.5 if k in (0, knots - 1) else 1.0) for k, phi in enumerate(phi_K)]
    return t_K, phi_K, weight_K


def sigreg_floor(samples: int, *, knots: int = 17, t_min: float = 0.2, t_max: float = 4.0) -> float:
    """Expected value of the statistic for samples that ARE Gaussian: sum of w (1 - phi^2) / samples.

    A statistic at its floor says that no difference from a Gaussian can be seen with so few samples.

    Args:
        samples: samples behind one empirical characteristic function, over all ranks, >= 1.
        knots, t_min, t_max: as in `sigreg_quadrature`.
    Returns:
        the floor, in the unit of the statistic.
    Raises:
        ValueError: no samples.
    """
    if samples < 1:
        raise ValueError(f"sigreg_floor: {samples} samples, expected at least 1")
    _, phi_K, weight_K = sigreg_quadrature(knots, t_min, t_max)
    return sum(w * (1.0 - phi * phi) for w, phi in zip(weight_K, phi_K, strict=True)) / samples


def sigreg_torch(
    z: Tensor,
    A_DM: Tensor,
    *,
    knots: int = 17,
    per_timestep: bool,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean over projections (and positions) of sum_k w_k |phi_hat(t_k) - phi(t_k)|^2.

    Source: as `sigreg_quadrature`. Ours averages cos and sin over the samples of all ranks before it compares them, so
    the statistic is that of the global batch; the statistic is not multiplied by the number of samples.

    Args:
        z: (N, T, D) with per_timestep, one statistic a position over its N samples; else (N, D), one over all N.
        A_DM: projections, columns of unit length; not differentiated.
        knots: of the quadrature on [0.2, 4].
        per_timestep: which of the two forms.
        process_group: ranks whose samples are pooled; None for all ranks when torch.distributed is initialized, else
            this process. T must be equal on all of them; N need not be.
    Returns:
        scalar, float64 for float64 z, else float32; the same on every rank. Its gradient is that of the global
        statistic times the number of ranks, so it is right when gradients are AVERAGED over the ranks afterwards.
    Raises:
        ValueError: shapes do not fit together.

    Numerics: sums over samples are float32 (float64 for float64 z). Knots are equally spaced, so exp(i t_k p) is
    rotated from knot to knot; with 17 knots this loses less than 2e-6. Nothing of the size N*T*M*K exists: backward
    keeps only z and the K averages, and runs over the knots again. One backward pass is supported, not the derivative
    of it.
    """
    sigreg_check_arguments(z, A_DM, per_timestep)
    acc = torch.float64 if z.dtype == torch.float64 else torch.float32
    z_NTD = z if per_timestep else z[:, None]
    return _Sigreg.apply(z_NTD, A_DM.detach().to(acc), knots, process_group)


def sigreg_check_arguments(z: Tensor, A_DM: Tensor, per_timestep: bool) -> None:
    """Raises ValueError for shapes that do not fit together."""
    if z.dim() != (3 if per_timestep else 2) or A_DM.dim() != 2 or z.shape[-1] != A_DM.shape[0] or z.shape[0] < 1:
        form = "(N,T,D)" if per_timestep else "(N,D)"
        raise ValueError(f"sigreg: z is {tuple(z.shape)} and A {tuple(A_DM.shape)}; expected {form} and (D,M)")


def _sigreg_blocks(samples: int, positions: int, width: int, is_cuda: bool) -> list[tuple[slice, slice]]:
    """Slices of samples and positions, such that one knot's work on a block stays in cache on a CPU."""
    wanted = max(1, (2**25 if is_cuda else 2**17) // width)
    rows = min(samples, wanted)
    columns = min(positions, max(1, wanted // rows))
    return [
        (slice(n, n + rows), slice(t, t + columns))
        for n in range(0, samples, rows)
        for t in range(0, positions, columns)
    ]


def _sigreg_constants(values: list[float], like: Tensor) -> Tensor:
    """Numbers as a vector, written by the device itself: a copy from the host could not be captured in a CUDA graph."""
    return torch.stack([like.new_full((), value) for value in values])


class _SigregRotation:
    """cos(t p) and sin(t p) for equally spaced t, each knot from the one before."""

    def __init__(self, p: Tensor, first: float, step: float) -> None:
        self.cos, self.sin = torch.cos(p * first), torch.sin(p * first)
        angle = p * step
        self._cos_step, self._sin_step = torch.cos(angle), torch.sin(angle)

    def advance(self) -> None:
        cos = self.cos * self._cos_step
        cos.addcmul_(self.sin, self._sin_step, value=-1.0)
        self.sin.mul_(self._cos_step).addcmul_(self.cos, self._sin_step)
        self.cos = cos


class _Sigreg(torch.autograd.Function):
    """The statistic of (N, T, D); two sweeps over the knots, one for the averages and one for the gradient."""

    @staticmethod
    def forward(ctx, z_NTD, A_DM, knots, process_group):
        acc = A_DM.dtype
        samples, positions, _ = z_NTD.shape
        projections = A_DM.shape[1]
        t_K, phi_K, weight_K = sigreg_quadrature(knots)
        # One buffer, so that one all-reduce carries the sums and the count.
        buffer = torch.zeros(2 * knots * positions * projections + 1, dtype=acc, device=z_NTD.device)
        cos_KTM, sin_KTM = buffer[:-1].view(2, knots, positions, projections)
        buffer[-1] = samples
        for rows, part in _sigreg_blocks(samples, positions, projections, z_NTD.is_cuda):
            turn = _SigregRotation(torch.matmul(z_NTD[rows, part].to(acc), A_DM), t_K[0], t_K[1] - t_K[0])
            for k in range(knots):
                if k:
                    turn.advance()
                cos_KTM[k, part] += turn.cos.sum(dim=0)
                sin_KTM[k, part] += turn.sin.sum(dim=0)
        ranks = 1
        if dist.is_available() and dist.is_initialized():
            ranks = dist.get_world_size(process_group)
            if ranks > 1:
                dist.all_reduce(buffer, group=process_group)
        count = buffer[-1].clone()
        buffer /= count
        cos_KTM -= _sigreg_constants(phi_K, buffer)[:, None, None]
        error_KTM = _sigreg_constants(weight_K, buffer)[:, None, None] * (cos_KTM * cos_KTM + sin_KTM * sin_KTM)
        ctx.save_for_backward(z_NTD, A_DM, cos_KTM, sin_KTM, count)
        ctx.ranks = ranks
        return error_KTM.sum() / (positions * projections)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        z_NTD, A_DM, cos_KTM, sin_KTM, count = ctx.saved_tensors
        acc = A_DM.dtype
        samples, positions, _ = z_NTD.shape
        knots, _, projections = cos_KTM.shape
        t_K, _, weight_K = sigreg_quadrature(knots)
        # d loss / d p = sum_k 2 w_k t_k / (T M n) * (sin error * cos(t p) - cos error * sin(t p)); times the ranks,
        # because the caller averages over them what belongs to one sum.
        scale = dloss * (2.0 * ctx.ranks / (positions * projections)) / count
        slope_K = scale * _sigreg_constants([w * t for w, t in zip(weight_K, t_K, strict=True)], A_DM)
        by_cos_KTM = sin_KTM * slope_K[:, None, None]
        by_sin_KTM = cos_KTM * slope_K[:, None, None]
        dz_NTD = torch.empty_like(z_NTD)
        for rows, part in _sigreg_blocks(samples, positions, projections, z_NTD.is_cuda):
            p_ntM = torch.matmul(z_NTD[rows, part].to(acc), A_DM)
            turn = _SigregRotation(p_ntM, t_K[0], t_K[1] - t_K[0])
            dp_ntM = torch.zeros_like(p_ntM)
            for k in range(knots):
                if k:
                    turn.advance()
                dp_ntM.addcmul_(turn.cos, by_cos_KTM[k, part]).addcmul_(turn.sin, by_sin_KTM[k, part], value=-1.0)
            dz_NTD[rows, part] = torch.matmul(dp_ntM, A_DM.t())
        return dz_NTD, None, None, None
