"""Weights that compensate for the errors of earlier layers.

For the same token a matrix W receives x̃ in the original model and x in the changed one. The output W x̃ should be
reproduced from x: the optimal real-valued weights minimise ``E|W x̃ - Ŵ x|²``; they are ``W* = W E[x̃ xᵀ] H⁻¹`` with H
= E[x xᵀ]. With C = E[(x̃ - x) xᵀ], which keeps the precision of the small difference, this is ``W* = W + W C H⁻¹``. The
objective is quadratic, so for any other Ŵ it is the minimum plus ``tr((W* - Ŵ) H (W* - Ŵ)ᵀ)``: it suffices to round W*
instead of W with the same H. With H + λI the same holds for the objective plus ``λ|W - Ŵ|²``.

Source: Qronos (arXiv 2505.11695), section 3; the limit of GPTAQ (arXiv 2504.02692, equation 5) in which the whole
residual is corrected before the first column.
"""

from torch import Tensor


def corrected_target(W: Tensor, C: Tensor, U: Tensor, *, strength: float) -> Tensor:
    """``W + α W C (H + λI)⁻¹``.

    Args:
        W: [B, N, K] float32.
        C: [B, K, K] float32, E[(x̃ - x) xᵀ] in the unit of H.
        U: [B, K, K] float32, ``(H + λI)⁻¹ = Uᵀ U``.
        strength: α; 0 leaves W unchanged, 1 compensates for the whole error.

    Returns:
        [B, N, K] float32.
    """
    return W + ((strength * (W @ C)) @ U.mT) @ U
