"""Integers written as oneDNN's blocks, against torch's own reordering of the same numbers."""

import pytest
import torch
from torch.nn import functional

from quantlab.numerics.integer import QuantizedMatrix
from quantlab.runtime import blocks
from quantlab.runtime.int8 import Int8WeightMatrices
from quantlab.runtime.native import kernels
from quantlab.runtime.native.library import library, status

needed = pytest.mark.skipif(library() is None, reason=status())
SHAPES = ((1, 32), (17, 64), (64, 96), (70, 160), (200, 1408), (576, 2048), (300, 4128))


def integers(rows: int, columns: int) -> torch.Tensor:
    """Every int8 number, the smallest included."""
    return torch.randint(-128, 128, (rows, columns), generator=torch.Generator().manual_seed(rows)).to(torch.int8)


@needed
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_integers_lie_as_pairs(rows: int, columns: int) -> None:
    q, above = integers(rows, columns), -rows % 64
    out = torch.full((rows + above, columns), 7, dtype=torch.bfloat16)
    kernels.int8_pairs(q, out.data_ptr())
    expected = functional.pad(q, (0, 0, 0, above)).bfloat16().view(-1, 64, columns // 2, 2).transpose(1, 2)
    found = out.view(-1, columns // 2, 64, 2)
    whole = rows // 64
    assert torch.equal(found[:whole], expected[:whole])
    assert torch.equal(found[whole:, :, : rows % 64], expected[whole:, :, : rows % 64])


@needed
@pytest.mark.skipif(not blocks.reorders_bfloat16(), reason="torch multiplies no blocks here")
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_of_many_rows(rows: int, columns: int, scale_dtype: torch.dtype) -> None:
    assert blocks.take_pairs(rows, columns)
    q, scale = integers(rows, columns), torch.rand(rows, 1).to(scale_dtype)
    bank = Int8WeightMatrices(2, rows, columns, scale_dtype=scale_dtype)
    bank.fill(1, QuantizedMatrix(q, scale, 8))
    x = torch.randn(130, columns).to(torch.bfloat16)
    expected = x.double() @ (q.double() * scale.double()).T
    found = bank._expanded_product(x, 1)
    assert (found - expected).norm() / expected.norm() <= 2**-8


def test_shapes_blocks_are_not_made_for() -> None:
    assert not blocks.take_pairs(64, 48), "half a pair of vectors"
    assert not blocks.take_pairs(0, 64)
