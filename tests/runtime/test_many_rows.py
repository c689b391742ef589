"""Products of many rows with bands of the weight, as processors with and without 16-bit products compute them."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

from quantlab.recipe.schemes import SchemeName
from quantlab.runtime.banks import dense_product as bands
from quantlab.runtime.banks import int4_native, int8
from quantlab.runtime.banks.dense_product import band_rows, in_bands
from quantlab.runtime.modules.linear import PackedLinear
from tests.runtime.test_matrices import TOLERANCE, bank_of, exact, made, within

pytestmark = pytest.mark.usefixtures("two_threads")

SCHEME_NAMES: tuple[SchemeName, ...] = ("int4_g128", "int4_g32", "int4_g128_asym", "int8_weight", "int8")
SHAPE = (1216, 1024)
"""Several bands, the last of fewer rows."""


@pytest.fixture
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the path of a processor with AMX: bands in bfloat16. torch computes the same products without AMX."""
    monkeypatch.setattr(bands, "multiplies_bfloat16", lambda: True)
    for module in (bands, int4_native, int8):
        monkeypatch.setattr(module, "has_matrix_units", lambda: True)


def inputs(rows: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, SHAPE[1], generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.usefixtures("matrix_units")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEME_NAMES[:-1])
def test_matrix_units_multiply_bands(scheme: SchemeName, dtype: torch.dtype) -> None:
    matrix = made(scheme, *SHAPE)
    linear = PackedLinear(bank_of(scheme, [matrix]), None)
    for rows in (16, 17):
        x = inputs(rows, dtype)
        within(linear(x), x.double() @ exact(matrix).T, TOLERANCE[dtype])


@pytest.mark.parametrize("scheme", SCHEME_NAMES[:-1])
def test_float32_products_of_many_bands_are_exact(scheme: SchemeName) -> None:
    matrix = made(scheme, *SHAPE)
    x = inputs(130, torch.float32)
    within(PackedLinear(bank_of(scheme, [matrix]), None)(x), x.double() @ exact(matrix).T, TOLERANCE[torch.float32])


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_threads_share_a_matrix(scheme: SchemeName) -> None:
    linear = PackedLinear(bank_of(scheme, [made(scheme, *SHAPE)]), None)
    calls = [inputs(rows, torch.float32) for rows in (40, 41, 42, 43)]
    expected = [linear(x) for x in calls]
    with ThreadPoolExecutor(4, initializer=partial(torch.set_num_threads, 2)) as pool:  # sums depend on their number
        for _ in range(3):
            assert all(map(torch.equal, pool.map(linear, calls), expected))


def test_a_band_is_all_the_memory_of_a_product() -> None:
    """Every band is expanded into the same memory."""
    weight, memory = torch.randn(3000, 1024), set()
    starts: list[int] = []

    def expand(start: int, out: Tensor) -> None:
        starts.append(start)
        memory.add((out.untyped_storage().data_ptr(), out.untyped_storage().nbytes()))
        out.copy_(weight[start : start + len(out)])

    x = inputs(3, torch.float32)
    torch.testing.assert_close(in_bands(x, 3000, expand, torch.float32), x @ weight.T)
    assert starts == list(range(0, 3000, band_rows(1024)))
    assert [nbytes for _, nbytes in memory] == [4 * 1024 * min(band_rows(1024), 3000)]
