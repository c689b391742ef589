"""Optimal weights on a given support.

With some weights of a row fixed at zero, the others minimise ``(w - ŵ) H (w - ŵ)ᵀ``: one linear system per row, each
with a different submatrix of H. Preconditioned conjugate gradients solve all rows together with one product with H per
step: the residual is masked to the support, and the preconditioner is the diagonal of H. Each step lowers the error of
    every row.

Source: ALPS (arXiv 2406.07831), section 3.3, algorithm 2 (preconditioned conjugate gradients on a fixed support).
"""

import torch
from torch import Tensor


def fitted_on_support(target: Tensor, H: Tensor, start: Tensor, removed: Tensor, *, steps: int) -> Tensor:
    """Minimise ``(w - ŵ) H (w - ŵ)ᵀ`` of every row over its remaining weights.

    Args:
        target: w [B, N, K] float32.
        H: [B, K, K] float32, positive definite.
        start: initial ŵ, [B, N, K] float32, zero where removed.
        removed: [B, N, K] bool.
        steps: number of iterations, one product with H each.

    Returns:
        ŵ [B, N, K] float32, zero where removed.
    """
    precondition = 1 / H.diagonal(dim1=1, dim2=2)[:, None]
    weights = start.clone()
    residual = ((target - start) @ H).masked_fill_(removed, 0)
    scaled = residual * precondition
    direction = scaled.clone()
    size = (residual * scaled).sum(dim=2, keepdim=True)
    for _ in range(steps):
        image = (direction @ H).masked_fill_(removed, 0)
        length = _ratio(size, (direction * image).sum(dim=2, keepdim=True))
        weights += length * direction
        residual -= length * image
        scaled = residual * precondition
        size, last = (residual * scaled).sum(dim=2, keepdim=True), size
        direction = scaled + _ratio(size, last) * direction
    return weights


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where whole is 0: the row has converged."""
    return torch.where(whole > 0, part / whole, torch.zeros_like(part))
