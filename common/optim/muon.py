"""Muon: momentum whose matrices are orthogonalised before they are applied, shared among the ranks.

Letters: B matrices of one shape, M rows, N columns, S the shorter side, L the longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Coefficients (a, b, c) of each iteration; the last ones serve all that follow.
Polynomials = tuple[tuple[float, float, float], ...]
# One quintic of Jordan 2024: it drives singular values in (0, 1] into about [0.7, 1.2], steepest at 0.
JORDAN_POLYNOMIALS: Polynomials = ((3.4445, -4.7750, 2.0315),)
# Polar Express (Amsel et al. 2025): each the best for what the one before leaves of [0.001, 1], towards 1. Its safety
# factor 1.01 keeps values that rounding has lifted above 1 where the polynomials are bounded.
POLAR_EXPRESS_POLYNOMIALS: Polynomials = (
    *(
        (a / 1.01, b / 1.01**3, c / 1.01**5)
        for a, b, c in (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        )
    ),
    (1.875, -1.25, 0.375),
)
NEWTON_SCHULZ_POLYNOMIALS = {"jordan": JORDAN_POLYNOMIALS, "polar_express": POLAR_EXPRESS_POLYNOMIALS}


def iterations_of(polynomials: Polynomials, steps: int) -> Polynomials:
    """The coefficients of `steps` iterations."""
    return tuple(polynomials[min(k, len(polynomials) - 1)] for k in range(steps))


def newton_schulz_torch(
    G_BMN: Tensor, steps: int, *, dtype: torch.dtype | None = None, polynomials: Polynomials = JORDAN_POLYNOMIALS
) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: U V^T of G = U S V^T with singular values in about [0.7, 1.2].

    Source: Jordan et al. 2024, "Muon"; Bernstein and Newhouse 2024. X <- a X + (b X X^T + c (X X^T)^2) X with X of
    Frobenius norm 1 at first, on the side where X X^T is the smaller.

    Args:
        G_BMN: matrices of one shape; a single (M, N) is allowed.
        steps: iterations, >= 0.
        dtype: of the products; None for bfloat16 on CUDA and the dtype of G elsewhere.
        polynomials: (a, b, c) of each iteration.
    Returns:
        the same shape, in the dtype of G. A zero matrix stays zero.
    Raises:
        ValueError: fewer than two dimensions or negative steps.

    Numerics: the norm is taken in float32 at least; the iteration amplifies rounding of the smallest singular values
    only.
    """
    if G_BMN.dim() not in (2, 3) or steps < 0:
        raise ValueError(f"newton_schulz: G is {tuple(G_BMN.shape)} and steps {steps}; expected (B,M,N) and steps >= 0")
    if G_BMN.dim() == 2:
        return newton_schulz_torch(G_BMN[None], steps, dtype=dtype, polynomials=polynomials)[0]
    if dtype is None:
        dtype = torch.bfloat16 if G_BMN.is_cuda else G_BMN.dtype
    wide = G_BMN if G_BMN.dtype == torch.float64 else G_BMN.float()
    X_BSL = (wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    tall = X_BSL.shape[1] > X_BSL.shape[2]
    if tall:
        X_BSL = X_BSL.mT.contiguous()
    for a, b, c in iterations_of(polynomials, steps):
        gram_BSS = torch.bmm(X_BSL, X_BSL.mT)
        mix_BSS = torch.baddbmm(gram_BSS, gram_BSS, gram_BSS, beta=b, alpha=c)
        X_BSL = torch.baddbmm(X_BSL, mix_BSS, X_BSL, beta=a)
    return (X_BSL.mT if tall else X_BSL).to(G_BMN.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz, for matrices.

    Source: Jordan et al. 2024, "Muon"; optional row normalisation and row blocks as in the seed recipe. Ours
    batches matrices of one pair of sides, lying or standing, in one product, and every rank orthogonalises its share of
    them: the results of a batch are exchanged by one all-gather, while the next batch is computed, so parameters and
    momentum stay equal on all ranks, and a state dict saved by one restores all.

    Per matrix: m <- momentum * m + g;  u = g + momentum * m (Nesterov) or m;  o = newton_schulz(u), block by block of
    `row_splits`;  p <- p * (1 - lr * weight_decay) - lr * max(1, rows/columns)^0.5 * o, rows and columns those of the
    block.

    Args (each also a key of a parameter group):
        params: 2-D parameters or groups of them, equal and in equal order on all ranks; gradients must already be
            averaged.
        lr: learning rate, a change of the entries' scale per step, >= 0.
        momentum: in [0, 1). Between steps, lr and momentum of a group may be replaced by scalar tensors on the device,
            which a captured CUDA graph reads anew at every replay.
        nesterov: look one step ahead.
        steps: Newton-Schulz iterations, >= 0.
        weight_decay: decoupled decay, times lr, >= 0.
        row_splits: row counts of blocks that are orthogonalised apart (as z, x, B, C, dt of an in-projection); they sum
            up to the rows of every matrix of the group. None for whole matrices.
        normalize_rows: divide each row of the momentum's result by its root mean square before Newton-Schulz.
        dtype: of the Newton-Schulz products; None as in `newton_schulz_torch`. Not a group key.
        polynomials: of Newton-Schulz. Not a group key.
        process_group: the ranks that share the work; None for all. Not a group key.
        newton_schulz: what orthogonalises a batch; `newton_schulz_torch` or another form of it. Not a group key.
    Raises:
        ValueError: an option out of range, a parameter that is not a matrix, or row_splits that do not add up.

    Numerics: momentum and parameters keep the dtype of the parameter (meant to be float32). State: `momentum`, one
    tensor a parameter. A parameter without gradient is not touched; it must lack one on all ranks.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        steps: int = 5,
        weight_decay: float = 0.0,
        row_splits: tuple[int, ...] | None = None,
        normalize_rows: bool = False,
        dtype: torch.dtype | None = None,
        polynomials: Polynomials = JORDAN_POLYNOMIALS,
        process_group: dist.ProcessGroup | None = None,
        newton_schulz: Callable[..., Tensor] = newton_schulz_torch,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "steps": steps,
            "weight_decay": weight_decay,
            "row_splits": row_splits,
            "normalize_rows": normalize_rows,
        }
        self._dtype, self._polynomials = dtype, polynomials
        self._process_group = process_group
        self._newton_schulz = newton_schulz
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group after checking its options and shapes (torch.optim.Optimizer calls this for every group)."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not (group["lr"] >= 0 and 0 <= group["momentum"] < 1 and group["steps"] >= 0 and group["weight_decay"] >= 0):
            options = {key: group[key] for key in ("lr", "momentum", "steps", "weight_decay")}
            raise ValueError(f"Muon: {options}; expected lr, steps, weight_decay >= 0 and momentum in [0, 1)")
        for p in group["params"]:
            if p.dim() != 2:
                raise ValueError(
                    f"Muon: a parameter of shape {tuple(p.shape)}; expected matrices, give the rest to AdamW"
                )
            splits = group["row_splits"]
            if splits is not None and (sum(splits) != p.shape[0] or min(splits) < 1):
                raise ValueError(
                    f"Muon: row_splits {tuple(splits)} for {p.shape[0]} rows; expected positive counts of that sum"
                )

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient.

        Args:
            closure: recomputes and returns the loss, or None.
        Returns:
            the closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Blocks of one pair of sides and number of iterations are one batch, across groups.
        batches: dict[tuple, list[tuple[Tensor, Tensor, float | Tensor]]] = {}
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            buffers = []
            for p in params:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                buffers.append(state["momentum"])
            grads = [p.grad for p in params]
            momentum = group["momentum"]
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, grads)
            updates = buffers
            if group["nesterov"] and isinstance(momentum, Tensor):  # alpha= would wait for its value
                updates = torch._foreach_mul(buffers, momentum)
                torch._foreach_add_(updates, grads)
            elif group["nesterov"]:
                updates = torch._foreach_add(grads, buffers, alpha=momentum)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])
            for p, update in zip(params, updates, strict=True):
                splits = group["row_splits"] or (p.shape[0],)
                for target, block in zip(p.split(splits), update.split(splits), strict=True):
                    sides = tuple(sorted(block.shape))
                    key = (sides, group["steps"], group["normalize_rows"], p.dtype, p.device)
                    batches.setdefault(key, []).append((target, block, group["lr"]))
        self._apply(batches)
        return loss

    def _apply(self, batches: dict[tuple, list[tuple[Tensor, Tensor, float | Tensor]]]) -> None:
        """Orthogonalise this rank's share of every batch, exchange the shares and take the step."""
        ranks, rank = 1, 0
        if dist.is_available() and dist.is_initialized():
            ranks, rank = dist.get_world_size(self._process_group), dist.get_rank(self._process_group)
        # The heaviest batch first: each exchange runs beside the next batch's products, the last beside nothing.
        ordered = sorted(batches.items(), key=lambda item: -len(item[1]) * item[0][0][0] ** 2 * item[0][0][1])
        first_rank, before = 0, None
        for ((short, long), steps, normalize_rows, dtype, _), entries in ordered:
            share = -(-len(entries) // ranks)
            # Ranks without a share of one batch come first in the next.
            own = (rank - first_rank) % ranks
            blocks = [block for _, block, _ in entries[own * share : (own + 1) * share]]
            done_BSL = entries[0][1].new_empty(0, short, long)
            if blocks:
                done_BSL = self._orthogonal(blocks, steps, normalize_rows)
            exchange = None
            if ranks > 1:
                done_BSL, exchange = self._gather(done_BSL, share, ranks, first_rank)
            if before is not None:
                self._take_step(*before)
            before = (entries, done_BSL, exchange, dtype)
            first_rank = (first_rank + -(-len(entries) // share)) % ranks
        if before is not None:
            self._take_step(*before)

    def _orthogonal(self, blocks: list[Tensor], steps: int, normalize_rows: bool) -> Tensor:
        """Orthogonal forms of blocks of one pair of sides, in their order, all lying."""
        parts: list[Tensor] = [blocks[0]] * len(blocks)
        for tall in (False, True):
            places = [k for k, block in enumerate(blocks) if (block.shape[0] > block.shape[1]) == tall]
            if not places:
                continue
            block_BMN = torch.stack([blocks[k] for k in places])
            if normalize_rows:
                block_BMN = block_BMN * torch.rsqrt(block_BMN.square().mean(dim=2, keepdim=True) + 1e-20)
            block_BSL = block_BMN.mT if tall else block_BMN
            if len(places) == len(blocks):
                return self._newton_schulz(block_BSL, steps, dtype=self._dtype, polynomials=self._polynomials)
            for k, block in zip(places, block_BSL, strict=True):
                parts[k] = block
        return self._newton_schulz(torch.stack(parts), steps, dtype=self._dtype, polynomials=self._polynomials)

    def _gather(self, done_BSL: Tensor, share: int, ranks: int, first_rank: int) -> tuple[Tensor, Any]:
        """Start to collect the shares of all ranks, the first from `first_rank`; the last ones may be short or empty.

        Returns: room for all shares in order, filled once the second result has been waited for.
        """
        # What was computed in bfloat16 travels as bfloat16: nothing is lost.
        bf16 = self._dtype == torch.bfloat16 or (self._dtype is None and done_BSL.is_cuda)
        own = done_BSL.new_zeros(share, *done_BSL.shape[1:], dtype=torch.bfloat16 if bf16 else done_BSL.dtype)
        own[: done_BSL.shape[0]] = done_BSL
        every = own.new_empty(ranks * share, *done_BSL.shape[1:])
        work = dist.all_gather_into_tensor(every, own, group=self._process_group, async_op=True)
        order = [(first_rank + k) % ranks for k in range(ranks)]
        return every, (work, order, share)

    def _take_step(
        self, entries: list[tuple[Tensor, Tensor, float | Tensor]], done_BSL: Tensor, exchange: Any, dtype: torch.dtype
    ) -> None:
        """Add a batch's results to its parameters, after they have arrived."""
        order, share = [0], len(entries)
        if exchange is not None:
            work, order, share = exchange
            work.wait()
        done_BSL = done_BSL.to(dtype)
        by_change: dict[tuple, tuple[float | Tensor, list[Tensor], list[Tensor]]] = {}
        for k, (target, _, lr) in enumerate(entries):
            rows, columns = target.shape
            update = done_BSL[order[k // share] * share + k % share]
            scale = max(1.0, rows / columns) ** 0.5
            key = (id(lr) if isinstance(lr, Tensor) else lr, scale)
            if key not in by_change:
                by_change[key] = (-lr * scale, [], [])
            by_change[key][1].append(target)
            by_change[key][2].append(update.mT if rows > columns else update)
        for change, targets, updates in by_change.values():
            if isinstance(change, Tensor):  # alpha= would wait for its value
                torch._foreach_add_(targets, torch._foreach_mul(updates, change))
            else:
                torch._foreach_add_(targets, updates, alpha=change)
