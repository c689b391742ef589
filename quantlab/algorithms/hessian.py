"""The Hessian of the layer-wise objective: the second moment of a matrix's inputs.

A matrix W [N, K] maps an input x [K] to W x. If Ŵ replaces it, the mean squared error of the output is
``E|(W - Ŵ) x|² = tr(Δ H Δᵀ)`` with Δ = W - Ŵ and H = E[x xᵀ]: a quadratic form with the same H for every row, so rows
are independent problems. All functions have a leading batch dimension B for matrices that do not share H (experts).

Rounding column by column needs the inverse of H restricted to the columns not rounded yet. One triangular factor
contains all of these inverses: with ``H⁻¹ = Uᵀ U``, U upper triangular, the optimal change of the columns after j for
an error e in column j is ``-(e / U_jj) U_j,j+1:``. U is the inverse of R in ``H = R Rᵀ``, R upper triangular, and R is
the Cholesky factor of H with reversed rows and columns: one factorisation of H and one triangular inverse; H⁻¹ is never
formed.

A column whose input was always zero has H_kk = 0. Its weight may matter for other text, so it is not set to zero:
damping gives it a positive diagonal entry without couplings, so it is rounded to nearest.

Sources: Optimal Brain Surgeon as in GPTQ (arXiv 2210.17323), section 3.3 and step 3 of the algorithm.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quantlab.errors import CalibrationError

_ESCALATION: Final = 10.0
_LARGEST_DAMPING: Final = 1.0


@dataclass(frozen=True)
class Factor:
    """Factor of a damped H.

    Attributes:
        U: [B, K, K] float32 upper triangular, ``(H + λI)⁻¹ = Uᵀ U``.
        damping: [B] float32, λ in units of the mean of diag H.
        failed: [B] bool: no damping made H positive definite; U is the factor of its diagonal.
    """

    U: Tensor
    damping: Tensor
    failed: Tensor


def check_statistics(W: Tensor, H: Tensor, C: Tensor | None = None) -> None:
    """Check that statistics are usable.

    Args:
        W: [..., N, K].
        H: [..., K, K].
        C: [..., K, K] or None.

    Raises:
        CalibrationError: H or C is not square or not as wide as W, not finite, or H's diagonal is negative.
    """
    for name, matrix in (("H", H), ("C", C)):
        if matrix is None:
            continue
        if matrix.shape != (*W.shape[:-2], W.shape[-1], W.shape[-1]):
            raise CalibrationError(
                f"The second moment {name} has the wrong shape for its weight",
                found=f"{name} {list(matrix.shape)} for a weight {list(W.shape)}",
                fix="collect one square matrix over the input channels of the weight",
            )
        if not matrix.isfinite().all():
            raise CalibrationError(
                f"The second moment {name} is not finite",
                found=f"{int((~matrix.isfinite()).sum())} of {matrix.numel()} entries are NaN or infinite",
                fix="check for activations that overflow; float32 sums of bfloat16 inputs do not",
            )
    if (H.diagonal(dim1=-2, dim2=-1) < 0).any():
        raise CalibrationError(
            "The second moment H has a negative mean square",
            found=f"smallest diagonal entry {H.diagonal(dim1=-2, dim2=-1).min().item():.3g}",
            fix="collect the mean of x xᵀ",
        )


def normalised(H: Tensor) -> tuple[Tensor, Tensor]:
    """H divided by the mean of its diagonal, so that results do not depend on its unit.

    Args:
        H: [B, K, K], finite.

    Returns:
        [B, K, K] float32, and the divisor [B]; the divisor of a zero H is 1.
    """
    mean = H.diagonal(dim1=-2, dim2=-1).to(torch.float64).mean(dim=-1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean)).to(torch.float32)
    return H.to(torch.float32) / mean[:, None, None], mean


def damped_factor(H: Tensor, *, damping: float) -> Factor:
    """Factor ``H + λI``; λ is raised tenfold, up to 1, for matrices that are not positive definite.

    Args:
        H: [B, K, K] float32, mean of the diagonal 1 (`normalised`), in the order of the column pass.
        damping: initial λ > 0.

    Returns:
        The factor; if λ = 1 is not enough, the factor of the diagonal alone.
    """
    size = H.shape[-1]
    identity = torch.eye(size, dtype=torch.float32, device=H.device)
    level = torch.full(H.shape[:1], damping, dtype=torch.float32, device=H.device)
    while True:
        matrix = (H + level[:, None, None] * identity).flip(-2, -1)
        lower, info = _cholesky(matrix)
        failed = info != 0
        if not failed.any() or bool((level[failed] >= _LARGEST_DAMPING).all()):
            break
        level = torch.where(failed & (level < _LARGEST_DAMPING), level * _ESCALATION, level).clamp_(
            max=max(damping, _LARGEST_DAMPING)
        )
    if failed.any():
        diagonal = matrix[failed].diagonal(dim1=-2, dim2=-1).sqrt()
        lower[failed] = torch.diag_embed(diagonal)
    inverse = torch.empty_like(lower)
    for one, out in zip(lower, inverse, strict=True):  # batched solvers are fast for small matrices only
        torch.linalg.solve_triangular(one, identity, upper=False, out=out)
    return Factor(inverse.flip(-2, -1), level, failed)


def _cholesky(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factors [B, K, K], and info [B] int32: nonzero for matrices that are not positive definite."""
    lower, info = torch.empty_like(matrices), torch.empty(len(matrices), dtype=torch.int32, device=matrices.device)
    for index, one in enumerate(matrices):
        torch.linalg.cholesky_ex(one, out=(lower[index], info[index]))
    return lower, info


def with_damping(H: Tensor, damping: Tensor) -> Tensor:
    """``H + λI`` [B, K, K] for λ [B]."""
    result = H.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(damping[:, None])
    return result


def row_errors(delta: Tensor, H: Tensor) -> Tensor:
    """``d H dᵀ`` of every row d of delta [B, N, K]: [B, N] float32."""
    return (delta @ H).mul_(delta).sum(dim=-1)
