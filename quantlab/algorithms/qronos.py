"""The weights that best make good for what earlier layers got wrong.

In the original model a matrix W sees x̃; in the changed one it sees x of the same token. What is to be met is W x̃, with x to
work on: the best real-valued weights minimise ``E|W x̃ - Ŵ x|²``, which is solved by ``Ŵ = W E[x̃ xᵀ] H⁻¹``, H = E[x xᵀ].
With C = E[(x̃ - x) xᵀ], the form in which the small difference is not lost, that is ``W + W C H⁻¹``. And since the objective
is quadratic, for every other Ŵ it is that minimum plus ``tr((W* - Ŵ) H (W* - Ŵ)ᵀ)``: rounding W* instead of W on the same H
is all there is to do. With H + λI the same holds for the objective plus ``λ|W - Ŵ|²``.

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
        strength: α, 0 leaves W as it is, 1 makes the whole error good.

    Returns:
        [B, N, K] float32.
    """
    return W + ((strength * (W @ C)) @ U.mT) @ U
