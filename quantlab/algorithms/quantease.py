"""Refinement of integers and scales that minimises the error of the layer's output.

For one row with target w, integers q and scales s the error is ``(w - q s) H (w - q s)ᵀ``; with zero points, q means
the steps from them throughout. Neither of the two updates increases the error:

- Coordinate descent on the integers: each is set to its optimum, the others fixed. With the residual
  ``r = (w - q s) H`` the unconstrained optimum of weight k is ``q_k s + r_k / H_kk``; the nearest grid point is the
  best integer. Columns are visited in order, in blocks, so that most of the work is matrix products.
- Refit of all scales of a row, the integers fixed: least squares in G unknowns, ``Σ_h A_gh s_h = b_g`` with A_gh the
  sum of ``q_k H_kl q_l`` over k in group g, l in group h. Rounding the solution to the stored dtype loses part of the
  gain; coordinate descent over the stored scales recovers some of it.

All tensors are [B, K, N] here, columns first: a column of all rows is contiguous.

Sources: QuantEase (arXiv 2309.01885), section 3 and algorithm 2; the scales are the layer-wise objective of GPTQ
(arXiv 2210.17323, equation 1) as a function of the scales alone.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quantlab.numerics.integer import integer_range

_NORMAL_ENTRIES: Final = 1 << 26
"""Largest number of entries of the least-squares matrices in memory; rows are independent and processed in chunks."""
_SCALE_PASSES: Final = 3
_RIDGE: Final = 1e-6
_BLOCK: Final = 128


@dataclass(frozen=True)
class Problem:
    """A rounding problem: target, metric and grid.

    Attributes:
        target: w [B, K, N] float32.
        H: [B, K, K] float32, positive definite.
        bits: width of the integers.
        removed: [B, K, N] bool, weights that stay zero; or None.
        zero: [B, G, N] int8 zero points; None for symmetric integers.
    """

    target: Tensor
    H: Tensor
    bits: int
    removed: Tensor | None = None
    zero: Tensor | None = None

    def limits(self, groups: Tensor) -> "Limits":
        """Smallest and largest step of c columns.

        Args:
            groups: [B, c, N] int64, group index of each column, for `Tensor.gather` along G.
        """
        low, high = integer_range(self.bits)
        if self.zero is None:
            return low, high
        zero = self.zero.to(torch.float32).gather(1, groups)
        return low - zero, high - zero


Limits = tuple[int, int] | tuple[Tensor, Tensor]
"""Smallest and largest step: two integers for all columns, or two float32 tensors [B, c, N]."""


def limits_of_column(limits: Limits, j: int) -> Limits:
    """The limits of one column of a block; tensors [B, N] if limits differ between columns."""
    low, high = limits
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return low[:, j], high[:, j]
    return limits


def dequantized(q: Tensor, scale: Tensor) -> Tensor:
    """``q s`` float32 [B, K, N] of q [B, K, N] and scale [B, G, N]."""
    batch, columns, rows = q.shape
    grouped = q.view(batch, scale.shape[1], -1, rows).to(torch.float32)
    return (grouped * scale.to(torch.float32)[:, :, None]).view(batch, columns, rows)


def coordinate_descent(problem: Problem, q: Tensor, scale: Tensor, *, passes: int = 1) -> Tensor:
    """Set each integer in turn to its optimum, the others fixed.

    Args:
        problem: target, metric and grid.
        q: [B, K, N] int8, initial integers, zero where removed.
        scale: [B, G, N] in its stored dtype, not zero.
        passes: largest number of passes over all columns; stops early if a pass changes nothing.

    Returns:
        [B, K, N] int8; no row's error increases.
    """
    q = q.clone()
    width = q.shape[1] // scale.shape[1]
    residual = problem.H @ (problem.target - dequantized(q, scale))
    for _ in range(passes):
        before = q.clone()
        for start in range(0, q.shape[1], _BLOCK):
            part = slice(start, min(start + _BLOCK, q.shape[1]))
            steps = scale.to(torch.float32)[:, torch.arange(part.start, part.stop, device=q.device) // width]
            mask = None if problem.removed is None else problem.removed[:, part]
            groups = torch.arange(part.start, part.stop, device=q.device)[None, :, None] // width
            limits = problem.limits(groups.expand(q.shape[0], -1, q.shape[2]))
            q[:, part], moved = _descend_columns(
                residual[:, part].clone(), steps, problem.H[:, part, part], mask, q[:, part], limits
            )
            residual.baddbmm_(problem.H[:, :, part], moved, alpha=-1)
        if torch.equal(before, q):
            break
    return q


def _descend_columns(
    residual: Tensor, steps: Tensor, H: Tensor, removed: Tensor | None, q: Tensor, limits: Limits
) -> tuple[Tensor, Tensor]:
    """Visit the columns of a block [B, c, N]: the new integers and the change of q s. Overwrites the residual.

    The CUDA kernel supports one integer range for all columns only; with zero points the torch loop runs on the GPU.
    """
    low, high = limits
    if residual.device.type == "cuda" and isinstance(low, int) and isinstance(high, int):
        from quantlab.algorithms.cuda.blocks import descend_columns

        return descend_columns(residual, steps, H, removed, q, (low, high))
    chosen, moved = torch.empty_like(q), torch.empty_like(residual)
    for j in range(residual.shape[1]):
        old = q[:, j].to(torch.float32)
        best = (old + residual[:, j] / H[:, j, j, None] / steps[:, j]).round_().clamp_(*limits_of_column(limits, j))
        if removed is not None:
            best.masked_fill_(removed[:, j], 0)
        moved[:, j] = (best - old) * steps[:, j]
        chosen[:, j] = best.to(torch.int8)
        residual[:, j + 1 :].addcmul_(H[:, j + 1 :, j, None], moved[:, j, None], value=-1)
    return chosen, moved


def refit_scales(problem: Problem, q: Tensor, scale: Tensor) -> Tensor:
    """Refit the scales with the integers fixed.

    Args:
        problem: target, metric and grid.
        q: [B, K, N] int8.
        scale: [B, G, N] in its stored dtype, not zero: initial scales.

    Returns:
        [B, G, N] in the same dtype; no row's error increases.
    """
    result = scale.clone()
    batch, groups, rows = scale.shape
    step = max(1, _NORMAL_ENTRIES // (batch * max(groups * groups, q.shape[1])))
    for start in range(0, rows, step):
        some = slice(start, start + step)
        A, r = _normal_equations(problem, q[:, :, some], problem.target[:, :, some], scale[:, :, some])
        result[:, :, some] = _stored_solution(A, r, scale[:, :, some].mT).mT
    return result


def _normal_equations(problem: Problem, q: Tensor, target: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The normal equations ``A δ = r`` of every row for the change δ of its scales: A [B, N, G, G], r [B, N, G]."""
    batch, columns, rows = q.shape
    groups = scale.shape[1]
    width = columns // groups
    Q = q.to(torch.float32)

    def per_group(products: Tensor) -> Tensor:
        return products.mul_(Q).view(batch, groups, width, rows).sum(dim=2)

    A = torch.empty(batch, rows, groups, groups, dtype=torch.float32, device=q.device)
    for g in range(groups):
        part = slice(g * width, (g + 1) * width)
        A[:, :, :, g] = per_group(problem.H[:, :, part] @ Q[:, part]).mT
    return A, per_group(problem.H @ (target - dequantized(q.contiguous(), scale))).mT.contiguous()


def _stored_solution(A: Tensor, r: Tensor, old: Tensor) -> Tensor:
    """Solve the least squares, then adjust the stored scales one by one; rows without gain keep `old` [B, N, G]."""
    diagonal = A.diagonal(dim1=2, dim2=3)
    used = diagonal > 0
    pivot = torch.where(used, diagonal, torch.ones_like(diagonal))
    damped = A + torch.diag_embed(pivot * _RIDGE + (~used).to(torch.float32))
    lower, info = torch.linalg.cholesky_ex(damped)
    change = torch.cholesky_solve(r[..., None], lower)[..., 0]
    change = torch.where((info == 0)[:, :, None] & change.isfinite().all(dim=2, keepdim=True), change, 0.0)
    before = old.to(torch.float32)
    best = _never_zero((before + change).to(old.dtype), old)
    left = r - (A @ (best.to(torch.float32) - before)[..., None])[..., 0]
    for _ in range(_SCALE_PASSES):
        for g in range(old.shape[2]):
            now = best[:, :, g].to(torch.float32)
            new = _never_zero((now + left[:, :, g] / pivot[:, :, g] * used[:, :, g]).to(old.dtype), best[:, :, g])
            left -= A[:, :, :, g] * (new.to(torch.float32) - now)[:, :, None]
            best[:, :, g] = new
    change = best.to(torch.float32) - before
    gain = (change * (r + left)).sum(dim=2)
    return torch.where((gain > 0)[:, :, None], best, old)


def _never_zero(scale: Tensor, otherwise: Tensor) -> Tensor:
    """Replace scales that are zero or not finite by `otherwise`."""
    return torch.where((scale == 0) | ~scale.isfinite(), otherwise, scale)
