"""bfloat16 weights in the blocks oneDNN multiplies.

From rows, oneDNN has to block a bfloat16 weight again for every product. Our native kernel for few rows reads its blocks too, if they
are laid out as it thinks; that is not documented, so it is looked at.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional


def address(weight: Tensor) -> int:
    """Where a weight in blocks lies in memory."""
    return int(torch.ops.mkldnn.data_ptr(weight))


@cache
def lies_in_pairs(rows: int, columns: int) -> bool:
    """Whether oneDNN lays a weight [rows, columns] out as the native kernel reads it.

    The layout may depend on the shape, so numbers of this shape are reordered and looked at.
    """
    numbers = torch.arange(rows * columns, dtype=torch.int32).remainder(32749).to(torch.int16).view(rows, columns)
    reordered = torch.ops.mkldnn._reorder_linear_weight(numbers.view(torch.bfloat16), None)
    padded = functional.pad(numbers, (0, -columns % 32, 0, -rows % 64))
    expected = padded.view(-1, 64, padded.shape[1] // 2, 2).transpose(1, 2).contiguous()
    if torch.ops.mkldnn._nbytes(reordered) != expected.nbytes:
        return False
    found = torch.frombuffer((ctypes.c_char * expected.nbytes).from_address(address(reordered)), dtype=torch.int16)
    return torch.equal(found, expected.flatten())


@cache
def reorders_bfloat16() -> bool:
    """Whether this CPU and this build of torch multiply blocked bfloat16 weights natively."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # type: ignore[no-untyped-call]
