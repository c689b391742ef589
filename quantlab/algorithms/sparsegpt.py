"""SparseGPT: remove weights column by column; the columns that follow compensate for the error.

The column pass is that of GPTQ with zero in place of the nearest grid point: setting a weight w in column j to zero
increases the error of its row by ``w² / U_jj²`` after the optimal change of the columns after it (``H⁻¹ = Uᵀ U``, see
`hessian`). This is the score of a weight. Weights are chosen for 128 columns at a time when the pass reaches them, or
for every m consecutive columns. Afterwards all remaining weights, those before a removed one too, are fitted on the
chosen support (`alps`).

To prune and quantize jointly, give the original W and the mask from here to `gptq`: it rounds the optimal weights on
the support with scales of their own, and compensates for removal and rounding together.

Source: SparseGPT (arXiv 2301.00774), section 3, algorithm 1 and section 3.3 (n:m).
"""

from dataclasses import dataclass, fields
from typing import Final

import torch
from torch import Tensor

from quantlab.algorithms.alps import fitted_on_support
from quantlab.algorithms.hessian import check_statistics, damped_factor, normalised, with_damping
from quantlab.algorithms.masks import check_sparsity, smallest, smallest_of_each

_BLOCK: Final = 128


@dataclass(frozen=True)
class SparseGptResult:
    """Pruned matrices. The leading dimension is absent for a single matrix.

    Attributes:
        W: [B, N, K] float32, zero where removed.
        mask: [B, N, K] bool, True where a weight is removed.
        damping: [B] float32, λ used; larger than requested if H was not positive definite.
        failed: [B] bool, H was not positive definite at any λ: weights were chosen with the diagonal of H, and the
            remaining weights are unchanged.
    """

    W: Tensor
    mask: Tensor
    damping: Tensor
    failed: Tensor

    def member(self, index: int) -> "SparseGptResult":
        """One matrix of a batch."""
        return SparseGptResult(*(getattr(self, field.name)[index] for field in fields(self)))


def sparsegpt(
    W: Tensor,
    H: Tensor,
    *,
    ratio: float,
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
    fit_steps: int = 20,
) -> SparseGptResult:
    """Prune one matrix, W [N, K] and H [K, K]: `sparsegpt_batch` without the batch dimension."""
    return sparsegpt_batch(W[None], H[None], ratio=ratio, pattern=pattern, damping=damping, fit_steps=fit_steps).member(
        0
    )


def sparsegpt_batch(
    W: Tensor,
    H: Tensor,
    *,
    ratio: float,
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
    fit_steps: int = 20,
) -> SparseGptResult:
    """Prune matrices of one shape, each with its own inputs.

    Args:
        W: [B, N, K] of any floating dtype, finite.
        H: [B, K, K] mean of x xᵀ; any positive multiple gives the same result.
        ratio: fraction of the weights of every 128 columns to remove, 0 <= ratio < 1; ignored with a pattern.
        pattern: (n, m) to remove n of every m consecutive weights of a row, or None.
        damping: λ added to H, in units of the mean of its diagonal; > 0.
        fit_steps: conjugate-gradient steps on the support, 0 for the column pass alone.

    Raises:
        CalibrationError: H has the wrong shape or is not finite, ratio is not in [0, 1), or m does not divide K.
    """
    check_statistics(W, H)
    check_sparsity(W.shape[2], ratio=ratio, pattern=pattern)
    W = W.to(torch.float32)
    H, _ = normalised(H)
    factor = damped_factor(H, damping=damping)
    passed, mask = _column_pass(W, factor.U, ratio=ratio, pattern=pattern)
    masked = W.masked_fill(mask, 0)
    damped = with_damping(H, torch.where(factor.failed, damping, factor.damping))
    start = torch.where(factor.failed[:, None, None], masked, passed)
    fitted = fitted_on_support(W, damped, start, mask, steps=fit_steps)
    fitted = torch.where(factor.failed[:, None, None], masked, fitted)
    return SparseGptResult(
        W=fitted,
        mask=mask,
        damping=factor.damping,
        failed=factor.failed,
    )


def _column_pass(W: Tensor, U: Tensor, *, ratio: float, pattern: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Algorithm 1: weights [B, N, K] float32 and mask [B, N, K] bool. Internally columns come first: [B, K, N]."""
    V = W.mT.contiguous()
    removed = torch.empty(V.shape, dtype=torch.bool, device=V.device)
    columns = V.shape[1]
    unit = _BLOCK if pattern is None else pattern[1]
    block = max(_BLOCK // unit, 1) * unit
    cost = 1 / U.diagonal(dim1=1, dim2=2)[:, :, None]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty_like(V[:, start:stop])
        for j in range(start, stop):
            if (j - start) % unit == 0:
                part = slice(j, min(j + unit, stop))
                removed[:, part] = _chosen((V[:, part] * cost[:, part]).square(), ratio=ratio, pattern=pattern)
            error = (V[:, j] * removed[:, j]) * cost[:, j]
            V[:, j + 1 : stop].addcmul_(U[:, j, j + 1 : stop, None], error[:, None], value=-1)
            errors[:, j - start] = error
        V[:, stop:].baddbmm_(U[:, start:stop, stop:].mT, errors, alpha=-1)
    return V.masked_fill_(removed, 0).mT.contiguous(), removed.mT.contiguous()


def _chosen(scores: Tensor, *, ratio: float, pattern: tuple[int, int] | None) -> Tensor:
    """Mask [B, c, N] of the weights to remove, from their scores [B, c, N]."""
    by_row = scores.mT
    if pattern is not None:
        return smallest_of_each(by_row, removed=pattern[0], of=pattern[1]).mT
    flat = by_row.flatten(1)
    return smallest(flat, round(ratio * flat.shape[1])).view(by_row.shape).mT
