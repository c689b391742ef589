"""FP8 e4m3 weights with one fp32 scale per 128x128 block: how DeepSeek-V3 and R1 store their linears.

`weight` [N, K] float8_e4m3fn and `weight_scale_inv` [ceil(N/B), ceil(K/B)] float32 stand for
``W = weight * weight_scale_inv`` block by block. Despite DeepSeek's name `inv`, the weight is multiplied by the scale.
Blocks are counted from the first row and column, so the last block of a matrix whose size is no multiple of B is
ragged: `kv_a_proj_with_mqa` of V3 has 576 rows, four full blocks and one of 64. The block size therefore cannot be
derived from the two shapes (576 / 5 is not a whole number, and 160 / 2 = 80 is whole and wrong); it comes from
`quantization_config.weight_block_size`.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2, and README_WEIGHTS of its release.
"""

import math

import torch
from torch import Tensor

E4M3_MAX = 448.0


def block_grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scale matrix of a weight of `shape` [N, K] under blocks of `block` [rows, columns]."""
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def dequantize_blocks(weight: Tensor, scale_inv: Tensor, *, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Dequantize FP8 blocks.

    Args:
        weight: [N, K] float8_e4m3fn.
        scale_inv: [ceil(N/rows), ceil(K/columns)] float32, multiplied into its block.
        block: rows and columns of a block.
        dtype: dtype of the result; the product is formed in float32 and rounded once.

    Returns:
        [N, K] of `dtype`.

    Raises:
        ValueError: the grid of scales does not fit the weight.
    """
    rows, columns = weight.shape
    if tuple(scale_inv.shape) != block_grid((rows, columns), block):
        raise ValueError(
            f"scale grid {tuple(scale_inv.shape)} does not fit a {rows}x{columns} weight in blocks of "
            f"{block[0]}x{block[1]}; expected {block_grid((rows, columns), block)}"
        )
    if block[0] == 1:  # rows at once
        scales = scale_inv.to(torch.float32).repeat_interleave(block[1], dim=1)[:, :columns]
        return (weight.to(torch.float32) * scales).to(dtype)
    result = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    for index, row_scales in enumerate(scale_inv.to(torch.float32)):
        band = slice(index * block[0], min((index + 1) * block[0], rows))
        scales = row_scales.repeat_interleave(block[1])[:columns]
        result[band] = (weight[band].to(torch.float32) * scales).to(dtype)
    return result


def quantize_blocks(matrix: Tensor, *, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Round a matrix to FP8 blocks: ``scale_inv = max|block| / 448``, then to nearest even on the e4m3 grid.

    Args:
        matrix: [N, K] of any floating dtype.
        block: rows and columns of a block.

    Returns:
        weight [N, K] float8_e4m3fn and scale_inv [ceil(N/rows), ceil(K/columns)] float32; an all-zero block has scale 1.
    """
    rows, columns = matrix.shape
    grid = block_grid((rows, columns), block)
    padded = torch.zeros(grid[0] * block[0], grid[1] * block[1], dtype=torch.float32, device=matrix.device)
    padded[:rows, :columns] = matrix
    blocks = padded.view(grid[0], block[0], grid[1], block[1])
    scale_inv = blocks.abs().amax(dim=(1, 3)) / E4M3_MAX
    scale_inv = torch.where(scale_inv == 0, torch.ones_like(scale_inv), scale_inv)
    scaled = (blocks / scale_inv[:, None, :, None]).view_as(padded)[:rows, :columns]
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).contiguous(), scale_inv
