"""The native W8A16 kernel for many rows of activations, compared with float64."""

import pytest
import torch

from quantlab.numerics.integer import QuantizedMatrix
from quantlab.recipe.schemes import SCHEMES
from quantlab.runtime.banks.groups import RowGroups
from quantlab.runtime.banks.int8 import Int8WeightMatrices
from quantlab.runtime.native.library import product_library, status

pytestmark = pytest.mark.usefixtures("two_threads")

needed = pytest.mark.skipif(product_library() is None, reason=status())
SHAPES = ((1, 32), (17, 64), (64, 96), (70, 160), (200, 1408), (576, 2048), (300, 4128))


def integers(rows: int, columns: int) -> torch.Tensor:
    """Random int8 integers over the whole range, -128 included."""
    return torch.randint(-128, 128, (rows, columns), generator=torch.Generator().manual_seed(rows)).to(torch.int8)


@needed
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_of_many_rows(rows: int, columns: int, scale_dtype: torch.dtype) -> None:
    q, scale = integers(rows, columns), torch.rand(rows, 1).to(scale_dtype)
    bank = Int8WeightMatrices(SCHEMES["int8_weight"].format, 2, rows, columns, scale_dtype=scale_dtype)
    bank.fill(1, QuantizedMatrix(q, scale, 8))
    for tokens in (3, 7, 12, 130, 300, 515):
        x = torch.randn(tokens, columns).to(torch.bfloat16)
        expected = x.double() @ (q.double() * scale.double()).T
        found = bank.products(x, RowGroups([1], [tokens], None))
        assert (found - expected).norm() / expected.norm() <= 2**-8, tokens


@needed
def test_large_groups_are_split() -> None:
    bank = Int8WeightMatrices(SCHEMES["int8_weight"].format, 3, 40, 64, scale_dtype=torch.float32)
    for index in range(3):
        bank.fill(index, QuantizedMatrix(integers(40, 64) - index, torch.rand(40, 1), 8))
    counts = (300, 1, 600)
    x = torch.randn(sum(counts), 64).to(torch.bfloat16)
    found = bank.products(x, RowGroups([2, 0, 1], counts, None)).split(counts)
    for part, rows, index in zip(found, x.split(counts), (2, 0, 1), strict=True):
        expected = rows.double() @ (bank.q[index].double() * bank.scale[index, :, None].double()).T
        assert (part - expected).norm() / expected.norm() <= 2**-8
