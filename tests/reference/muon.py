"""Muon for the matrices: momentum whose update is orthogonalised by a Newton-Schulz iteration.

Matrices of one shape are stacked, so a layer of experts costs a few batched products. The update of an [R, C] matrix is
``0.2 sqrt(max(R, C)) * UV^T``: as large, per element, as an AdamW update, so both share one learning-rate scale.

Source: Moonlight (arXiv 2502.16982), section 2.2.
"""

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Approximate UV^T of every matrix in a stack [n, R, C]; the singular values end near one, not at it."""
    a, b, c = _COEFFICIENTS
    x = g.to(torch.bfloat16)
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


class Muon:
    """State and step for a list of parameters; 3-D parameters are stacks of matrices."""

    def __init__(self, parameters: list[tuple[Tensor, int]], *, momentum: float, weight_decay: float) -> None:
        """Each parameter comes with the number of matrices its rows hold: 2 for a fused gate and up projection."""
        self.momentum, self.weight_decay = momentum, weight_decay
        self.groups: dict[tuple[int, int], list[tuple[Tensor, int]]] = {}
        for parameter, parts in parameters:
            shape = (parameter.shape[-2] // parts, parameter.shape[-1])
            self.groups.setdefault(shape, []).append((parameter, parts))
        self.buffers = {
            shape: torch.zeros(
                sum(p.numel() for p, _ in group) // (shape[0] * shape[1]), *shape, device=group[0][0].device
            )
            for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update from the gradients, which are dropped."""
        for shape, group in self.groups.items():
            gradients = torch.cat([p.grad.reshape(-1, *shape) for p, _ in group if p.grad is not None])
            buffer = self.buffers[shape]
            buffer.lerp_(gradients, 1 - self.momentum)
            update = orthogonalise(gradients.lerp_(buffer, self.momentum)).float() * (0.2 * max(shape) ** 0.5)
            position = 0
            for parameter, _ in group:
                count = parameter.numel() // (shape[0] * shape[1])
                parameter.mul_(1 - learning_rate * self.weight_decay)
                parameter.sub_(update[position : position + count].view_as(parameter), alpha=learning_rate)
                position += count
                parameter.grad = None
