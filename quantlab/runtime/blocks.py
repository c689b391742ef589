"""bfloat16 weights in the blocks oneDNN multiplies.

From rows, oneDNN has to block a bfloat16 weight again for every product. What expands integers can write blocks at once, band
by band into one small weight, if the blocks are laid out as it thinks; that is not documented, so it is looked at.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from quantlab.runtime.native.library import library
from quantlab.runtime.products import band_rows


def address(weight: Tensor) -> int:
    """Where a weight in blocks lies in memory."""
    return int(torch.ops.mkldnn.data_ptr(weight))


def product(x: Tensor, rows: int, write: Callable[[int, int, int], None]) -> Tensor:
    """``x @ W^T`` [T, N] bfloat16, for shapes that `take_pairs`.

    Args:
        x: [T, K] bfloat16.
        rows: N.
        write: puts rows `start` to `stop` of W as pairs (`native/pairs.c`) to an address.
    """
    columns = x.shape[1]
    result = torch.empty(x.shape[0], rows, dtype=x.dtype)
    for start, stop, weight in _bands(rows, columns):
        write(start, stop, address(weight))
        result[:, start:stop] = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


def _bands(rows: int, columns: int) -> list[tuple[int, int, Tensor]]:
    """Rows of each band and the weight they are written to, which all of one size share."""
    step = band_rows(columns)
    weights: dict[int, Tensor] = {}
    bands = []
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if stop - start not in weights:
            empty = torch.zeros(stop - start, columns, dtype=torch.bfloat16)
            weights[stop - start] = torch.ops.mkldnn._reorder_linear_weight(empty, None)
        bands.append((start, stop, weights[stop - start]))
    return bands


@cache
def take_pairs(rows: int, columns: int) -> bool:
    """Whether every band of a weight [rows, columns] may be written as pairs, and there are kernels that do so."""
    if library() is None or columns % 32 or not rows or not reorders_bfloat16():
        return False
    step = band_rows(columns)
    return all(lies_in_pairs(size, columns) for size in {min(step, rows), rows % step or min(step, rows)})


@cache
def lies_in_pairs(rows: int, columns: int) -> bool:
    """Whether oneDNN lays a weight [rows, columns] out as the native kernels read and write it.

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
