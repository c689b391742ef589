"""The second moment of a matrix's inputs, as the layer-wise objective sees it.

A matrix W [K outputs ... N rows] answers an input x with W x. If Ŵ takes its place, the mean squared error of the output is
``E|(W - Ŵ) x|² = tr(Δ H Δᵀ)`` with Δ = W - Ŵ and H = E[x xᵀ]: a quadratic with the same H for every row, so that rows are
independent problems. Everything here has a leading batch dimension B for matrices that do not share H (experts).

Rounding column after column needs the inverse of H restricted to the columns that are still free. All of these inverses are
in one triangular factor: with ``H⁻¹ = Uᵀ U``, U upper triangular, the optimal change of the columns after j for an error e
in column j is ``-(e / U_jj) U_j,j+1:``. U is the inverse of R in ``H = R Rᵀ``, R upper triangular, and R is the Cholesky
factor of H read backwards: one factorisation of H and one triangular inverse, and H⁻¹ is never formed.

A column whose input was always zero has H_kk = 0. Its weight did not matter to this text, which does not say that it never
will, so it is not set to zero: damping gives it a diagonal of its own and zero couplings, which rounds it to nearest.

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
        failed: [B] bool: no damping made H positive definite; U is that of its diagonal.
    """

    U: Tensor
    damping: Tensor
    failed: Tensor


def check_statistics(W: Tensor, H: Tensor, C: Tensor | None = None) -> None:
    """Refuse statistics that no algorithm can use.

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
                f"The second moment {name} does not fit its weight",
                found=f"{name} {list(matrix.shape)} for a weight {list(W.shape)}",
                fix="collect one square matrix over the input channels of the weight",
            )
        if not matrix.isfinite().all():
            raise CalibrationError(
                f"The second moment {name} is not finite",
                found=f"{int((~matrix.isfinite()).sum())} of {matrix.numel()} entries are NaN or infinite",
                fix="look for activations that overflow; float32 sums of bfloat16 inputs do not",
            )
    if (H.diagonal(dim1=-2, dim2=-1) < 0).any():
        raise CalibrationError(
            "The second moment H has a negative mean square",
            found=f"least diagonal entry {H.diagonal(dim1=-2, dim2=-1).min().item():.3g}",
            fix="collect the mean of x xᵀ",
        )


def normalised(H: Tensor) -> tuple[Tensor, Tensor]:
    """H over the mean of its diagonal, so that no result depends on its unit.

    Args:
        H: [B, K, K], finite.

    Returns:
        [B, K, K] float32, and the mean [B] it was divided by; an H of zeros stays zeros, divided by 1.
    """
    mean = H.diagonal(dim1=-2, dim2=-1).to(torch.float64).mean(dim=-1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean)).to(torch.float32)
    return H.to(torch.float32) / mean[:, None, None], mean


def damped_factor(H: Tensor, *, damping: float) -> Factor:
    """Factor ``H + λI``, with ten times the damping wherever H is not positive definite.

    Args:
        H: [B, K, K] float32, the mean of its diagonal 1 (`normalised`), in the order columns are worked on.
        damping: λ > 0 to begin with.

    Returns:
        The factor; where even λ = 1 is not enough, that of the diagonal alone.
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
    for one, out in zip(lower, inverse, strict=True):  # one by one: batched solvers are made for small matrices
        torch.linalg.solve_triangular(one, identity, upper=False, out=out)
    return Factor(inverse.flip(-2, -1), level, failed)


def _cholesky(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factors [B, K, K] and, for each matrix, whether it was not positive definite [B]."""
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
