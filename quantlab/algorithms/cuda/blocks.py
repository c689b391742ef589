"""The inner loops of GPTQ and of coordinate descent on a GPU: up to 128 columns in turn, in one launch.

In PyTorch the same loops take nine launches per column, whose overhead at 7168 columns exceeds the arithmetic. This
module is imported only where tensors are on a GPU; the loops in `gptq` and `quantease` are the reference.

Legend: B matrices, C columns of the block (at most 128), N rows.
"""

from typing import Final

import torch
import triton
from torch import Tensor

from quantlab.algorithms.cuda import kernels

_ROWS: Final = 32


def round_columns(
    target: Tensor, step: Tensor, U: Tensor, removed: Tensor | None, limits: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Quantize one block of columns by GPTQ.

    Args:
        target: [B, C, N] float32, the weights, updated by the errors of all previous blocks.
        step: [B, C, N] float32, the scale of each weight.
        U: [B, C, C] float32, the block of the upper triangular Cholesky factor of the inverse Hessian.
        removed: [B, C, N] bool, pruned weights, which become zero; None for none.
        limits: least and largest integer of the quantization grid.

    Returns:
        Integers [B, C, N] int8, and the errors divided by the diagonal of U, [B, C, N] float32.
    """
    q = torch.empty(target.shape, dtype=torch.int8, device=target.device)
    errors = torch.empty_like(target, memory_format=torch.contiguous_format)
    _launch(kernels.round_columns, (target.contiguous(), step, U.contiguous()), removed, (q, errors), limits)
    return q, errors


def descend_columns(
    residual: Tensor, step: Tensor, H: Tensor, removed: Tensor | None, q: Tensor, limits: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Update one block of columns by coordinate descent.

    Args:
        residual: [B, C, N] float32, H (w - q s) of these columns.
        step: [B, C, N] float32, the scale s of each weight.
        H: [B, C, C] float32, the block of the Hessian.
        removed: [B, C, N] bool, pruned weights, which stay zero; None for none.
        q: [B, C, N] int8, the present integers.
        limits: least and largest integer of the quantization grid.

    Returns:
        The new integers [B, C, N] int8, and the change of q s, [B, C, N] float32.
    """
    q = q.contiguous().clone()
    moved = torch.empty_like(residual, memory_format=torch.contiguous_format)
    _launch(kernels.descend_columns, (residual.contiguous(), step, H.contiguous()), removed, (q, moved), limits)
    return q, moved


def _launch(
    kernel: triton.JITFunction,
    inputs: tuple[Tensor, ...],
    removed: Tensor | None,
    outputs: tuple[Tensor, Tensor],
    limits: tuple[int, int],
) -> None:
    batch, columns, rows = outputs[0].shape
    mask = outputs[0] if removed is None else removed.contiguous()
    grid = (triton.cdiv(rows, _ROWS), batch)
    with torch.cuda.device(outputs[0].device):
        kernel[grid](
            *inputs,
            mask,
            *outputs,
            columns,
            rows,
            float(limits[0]),
            float(limits[1]),
            MASKED=removed is not None,
            C=triton.next_power_of_2(columns),
            R=_ROWS,
        )
