"""The weights of the golden files, a formula."""

import torch


def weight(rows: int, columns: int) -> torch.Tensor:
    """Uneven bfloat16 numbers; the sums of magnitudes of blocks are exact in float32, whatever their order."""
    steps = torch.arange(rows * columns) * 7919 % 4093 - 2046
    matrix = steps.view(rows, columns) / 2046 * (0.02 + torch.arange(rows)[:, None] % 7 * 0.013)
    matrix[1] = 0
    return matrix.to(torch.bfloat16)
