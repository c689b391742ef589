"""oneDNN's blocked layout of bfloat16 weights.

From a row-major bfloat16 weight, oneDNN makes its blocked layout for every product. The native kernel for few rows can
read the blocked weight too, if the blocks have the layout it expects. oneDNN does not document its layout, so it is
inspected at run time.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional


def data_address(weight: Tensor) -> int:
    """Memory address of a blocked weight."""
    return int(torch.ops.mkldnn.data_ptr(weight))


@cache
def has_pair_layout(rows: int, columns: int) -> bool:
    """Whether oneDNN's layout of a weight [rows, columns] is the one that the native kernel reads.

    The layout may depend on the shape, so a known matrix of this shape is reordered and compared.
    """
    numbers = torch.arange(rows * columns, dtype=torch.int32).remainder(32749).to(torch.int16).view(rows, columns)
    reordered = torch.ops.mkldnn._reorder_linear_weight(numbers.view(torch.bfloat16), None)
    padded = functional.pad(numbers, (0, -columns % 32, 0, -rows % 64))
    expected = padded.view(-1, 64, padded.shape[1] // 2, 2).transpose(1, 2).contiguous()
    if torch.ops.mkldnn._nbytes(reordered) != expected.nbytes:
        return False
    found = torch.frombuffer((ctypes.c_char * expected.nbytes).from_address(data_address(reordered)), dtype=torch.int16)
    return torch.equal(found, expected.flatten())


@cache
def supports_blocked_bfloat16() -> bool:
    """Whether this CPU and this build of torch support blocked bfloat16 weights."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # type: ignore[no-untyped-call]
