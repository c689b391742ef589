"""int8 products are exact on every processor, and what computes them is named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantlab.runtime.banks.exact_int8 import chunked_product, integer_product, operator_is_exact
from quantlab.runtime.cpu_operators import cpu_operators
from quantlab.runtime.native import kernels
from quantlab.runtime.native.library import library, product_library, status
from tests.runtime.test_native import COMPUTE

pytestmark = pytest.mark.usefixtures("two_threads")

ROOT = Path(__file__).parents[2]
SHAPES = ((1, 1, 1), (1, 64, 100), (3, 17, 2048), (70, 33, 1025), (2, 600, 4096))


def check(product, shape: tuple[int, int, int]) -> None:
    """Compare with products of 64-bit integers, of drawn operands and of the largest there are."""
    tokens, rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(-128, 128, (n, columns), generator=generator).to(torch.int8) for n in (tokens, rows)]
    largest = [torch.full((n, columns), -128, dtype=torch.int8) for n in (tokens, rows)]
    for x, weight in (drawn, largest):
        found = product(x, weight)
        assert found.dtype == torch.int32
        assert torch.equal(found.to(torch.int64), x.to(torch.int64) @ weight.to(torch.int64).t())


@pytest.mark.parametrize("product", [integer_product, chunked_product])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_64_bit_integers(product, shape: tuple[int, int, int]) -> None:
    check(product, shape)


@pytest.mark.skipif(library() is not None or product_library() is None, reason=status())
@pytest.mark.parametrize("shape", [*SHAPES, (5, 7, 33)])
def test_sums_of_the_kernel_for_avx2(shape: tuple[int, int, int]) -> None:
    check(kernels.int8_sums, shape)


def test_a_saturating_operator_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that adds pairs of products in 16 bits, as oneDNN's does without VNNI."""

    def saturating(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        products = x.to(torch.int32)[:, :, None] * weight.to(torch.int32)[None]
        pairs = products.view(x.shape[0], -1, 2, weight.shape[1]).sum(2).clamp(-(2**15), 2**15 - 1)
        return pairs.sum(1, dtype=torch.int32)

    operator_is_exact.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", saturating)
    try:
        assert not operator_is_exact()
        assert any("int8 products in float32" in phrase for phrase in cpu_operators())
    finally:
        operator_is_exact.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize(
    "variable",
    [
        "ONEDNN_MAX_CPU_ISA=AVX2",
        "ONEDNN_MAX_CPU_ISA=AVX512_CORE",
        "ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI",
        "ATEN_CPU_CAPABILITY=avx2",
    ],
)
def test_products_hold_on_other_processors(variable: str, native: str) -> None:
    """Products of every bank with the instructions of older processors, with native kernels where they run and without."""
    name, _, value = variable.partition("=")
    checks = (
        "import tests.runtime.test_integer_products as i\nfor shape in i.SHAPES: i.check(i.integer_product, shape)\n"
    )
    environment = {**os.environ, name: value, "QUANTLAB_NATIVE": native}
    command = [sys.executable, "-c", COMPUTE + checks]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
