"""Products of every bank, compared with the float64 product of the dequantized matrix."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.number_format import NumberFormat
from quantlab.recipe.schemes import SCHEMES, SchemeName
from quantlab.runtime.banks.choice import QuantizedMatrices, quantized_matrices
from quantlab.runtime.banks.dense import DenseMatrices
from quantlab.runtime.banks.dense_product import dense_product
from quantlab.runtime.banks.expanded import ExpandedMatrices
from quantlab.runtime.banks.groups import RowGroups
from quantlab.runtime.banks.int4_native import NativeInt4Matrices
from quantlab.runtime.banks.int4_torch import TorchInt4Matrices, int4_block
from quantlab.runtime.banks.int8 import Int8Matrices, Int8WeightMatrices, quantize_tokens
from quantlab.runtime.modules.linear import (
    DenseLinear,
    GatedMLP,
    PackedLinear,
    ReorderedLinear,
    StackedLinear,
    StackedLinearPart,
    dense_linear,
)
from quantlab.runtime.modules.onednn_layout import supports_blocked_bfloat16
from quantlab.runtime.native.library import product_library
from tests.checkpoints import INTEGERS

pytestmark = pytest.mark.usefixtures("two_threads")

ROWS = (1, 2, 7, 16, 64, 257)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-2}
WEIGHT_ONLY: tuple[SchemeName, ...] = (
    "int4_g128", "int4_g64", "int4_g32", "int8_weight", "int4_g128_asym", "int4_g64_asym", "int4_g32_asym"
)  # fmt: skip


def random_matrix(
    rows: int, columns: int, number: NumberFormat, *, scale_dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> QuantizedMatrix:
    """A random matrix: integers and zero points over the whole grid, scales of both signs."""
    bits, groups = number.bits, number.groups(columns)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-(1 << bits - 1), 1 << bits - 1, (rows, columns), generator=generator, dtype=torch.int8)
    scale = torch.randn(rows, groups, generator=generator).mul(0.02).to(scale_dtype)
    if number.symmetric:
        return QuantizedMatrix(q, scale, bits)
    zero = torch.randint(-(1 << bits - 1), 1 << bits - 1, (rows, groups), generator=generator, dtype=torch.int8)
    return QuantizedMatrix(q, scale, bits, zero)


def exact(matrix: QuantizedMatrix) -> Tensor:
    """The dequantized matrix [N, K] float64; as the format defines it, q * scale is formed in the dtype of the scale."""
    width = matrix.q.shape[1] // matrix.scale.shape[1]
    per_weight = matrix.scale.repeat_interleave(width, dim=1)
    steps = matrix.q if matrix.zero is None else matrix.q - matrix.zero.repeat_interleave(width, dim=1)
    return (steps.to(matrix.scale.dtype) * per_weight).double()


def bank_of(scheme: SchemeName, matrices: list[QuantizedMatrix]) -> QuantizedMatrices:
    rows, columns = matrices[0].q.shape
    bank = quantized_matrices(SCHEMES[scheme].format, len(matrices), rows, columns, scale_dtype=matrices[0].scale.dtype)
    for index, matrix in enumerate(matrices):
        bank.fill(index, matrix)
    return bank


def made(
    scheme: SchemeName, rows: int, columns: int, *, scale_dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> QuantizedMatrix:
    return random_matrix(rows, columns, SCHEMES[scheme].format, scale_dtype=scale_dtype, seed=seed)


def within(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Errors relative to the largest expected magnitude."""
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", ROWS)
@pytest.mark.parametrize("shape", [(64, 128), (192, 256), (80, 128), (1, 384)])
@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_weight_only_products_equal_the_dequantized_product(
    scheme: SchemeName, shape: tuple[int, int], count: int, dtype: torch.dtype
) -> None:
    matrix = made(scheme, *shape)
    x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    result = PackedLinear(bank_of(scheme, [matrix]), None)(x)
    assert result.dtype == dtype
    within(result, x.double() @ exact(matrix).T, TOLERANCE[dtype])


@pytest.mark.parametrize("scheme", ["int4_g64", "int8_weight", "int4_g32", "int4_g128_asym", "int4_g32_asym"])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 64])
def test_scales_finer_than_bfloat16_are_not_rounded(scheme: SchemeName, scale_dtype: torch.dtype, count: int) -> None:
    """The scale is 0.34 % above the nearest bfloat16 value; rounding it would shift the mean of all outputs by 0.34 %."""
    scale = torch.full((256, SCHEMES[scheme].format.groups(128)), 2.0**-6 * (1 + 7 / 2048), dtype=scale_dtype)
    fine = replace(made(scheme, 256, 128), scale=scale)
    assert (fine.scale.bfloat16().double() / fine.scale.double() - 1).abs().max() > 0.003
    x = torch.randn(count, 128, generator=torch.Generator().manual_seed(3)).bfloat16().half()  # exact in both
    linear = PackedLinear(bank_of(scheme, [fine]), None)
    expected = x.double() @ exact(fine).T
    assert ((linear(x).double() * expected).sum() / expected.square().sum() - 1).abs() < 0.0015
    within(linear(x.float()), expected, 2e-6)


def test_kernels_are_chosen_by_shape_and_scale() -> None:
    def kind(scheme: SchemeName, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> type:
        return type(quantized_matrices(SCHEMES[scheme].format, 1, rows, columns, scale_dtype=dtype))

    if int4_block() is not None:
        assert kind("int4_g128_asym", 576, 2048) is TorchInt4Matrices, "the native kernel has no zero points"
    assert kind("int4_g128_asym", 80, 2048) is ExpandedMatrices, "and torch's layout no ragged blocks of rows"
    if product_library() is not None:
        assert kind("int4_g128", 576, 2048) is NativeInt4Matrices
        assert kind("int4_g128", 5, 128) is NativeInt4Matrices
    elif int4_block() is not None:
        assert kind("int4_g128", 576, 2048) is TorchInt4Matrices
        assert kind("int4_g128", 144, 128) is ExpandedMatrices, (
            "the number of rows is not a multiple of the layout's block"
        )
    assert kind("int4_g32", 128, 96, torch.float32) is ExpandedMatrices, "float32 scales are no two bfloat16 numbers"
    assert kind("int8_weight", 5, 64) is Int8WeightMatrices
    assert kind("int8_weight", 64, 100) is ExpandedMatrices, "torch's operator reads past the end of such rows"
    assert kind("int8", 5, 7) is Int8Matrices


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_int4_layout_of_other_vector_widths_is_expanded_correctly_or_declined(capability: str) -> None:
    """torch's int4 layout depends on the vector width chosen at start; a new process requests a narrower one."""
    code = "import tests.runtime.test_matrices as t\n"
    code += "for n in (1, 64): [t.test_weight_only_products_equal_the_dequantized_product('int4_g32', (192, 256), n, d) for d in t.TOLERANCE]"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "QUANTLAB_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 128), (5, 7), (130, 96)])
@pytest.mark.parametrize("count", ROWS)
def test_w8a8_equals_integer_arithmetic(count: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = made("int8", *shape)
    x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    token_scale = x.float().abs().amax(dim=1, keepdim=True) / 127
    integers = (x.float() / token_scale).round()
    sums = integers.long() @ matrix.q.long().T
    expected = sums.double() * token_scale.double() * matrix.scale.double().T
    within(
        PackedLinear(bank_of("int8", [matrix]), None)(x),
        expected,
        {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype],
    )


def test_w8a8_rounds_a_token_independently_of_other_tokens() -> None:
    linear = PackedLinear(bank_of("int8", [made("int8", 64, 128)]), None)
    x = torch.randn(257, 128)
    assert torch.equal(linear(x)[100:101], linear(x[100:101]))


def test_tokens_of_zeros_and_of_infinities() -> None:
    q, scale = quantize_tokens(torch.tensor([[0.0, 0.0], [1.0, torch.inf], [1.0, torch.nan], [3.0, -127.0]]))
    assert q[0].tolist() == [0, 0]
    assert q[3].tolist() == [3, -127]
    assert not torch.isfinite(scale[1:3]).any(), "a lost number must not look like one"


@pytest.mark.parametrize("scheme", INTEGERS)
@pytest.mark.parametrize("leading", [(2, 3), (2, 1, 5), (0,)])
def test_leading_dimensions_and_bias(scheme: SchemeName, leading: tuple[int, ...]) -> None:
    bias = torch.randn(192)
    linear = PackedLinear(bank_of(scheme, [made(scheme, 192, 128)]), bias)
    x = torch.randn(*leading, 128)
    flat = torch.cat([linear(row[None]) for row in x.reshape(-1, 128)]) if x.numel() else torch.empty(0, 192)
    assert linear(x).shape == (*leading, 192)
    assert torch.allclose(linear(x).reshape(-1, 192), flat, atol=1e-5)
    unbiased = PackedLinear(linear.matrices, None)
    assert torch.allclose(linear(x), unbiased(x) + bias)


@pytest.mark.parametrize("scheme", INTEGERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_multiplied_by_the_matrix_of_their_group(scheme: SchemeName, dtype: torch.dtype) -> None:
    matrices = [made(scheme, 64, 128, seed=seed) for seed in range(4)]
    bank = bank_of(scheme, matrices)
    counts, which = (3, 40, 1), (0, 2, 3)
    matrix_of_row = torch.tensor(which).repeat_interleave(torch.tensor(counts))
    x = torch.randn(44, 128).to(dtype)
    found = bank.products(x, RowGroups(which, counts, matrix_of_row))
    each = torch.cat(
        [
            PackedLinear(bank_of(scheme, [matrices[index]]), None)(part)
            for index, part in zip(which, x.split(counts), strict=True)
        ]
    )
    assert torch.allclose(found.float(), each.float(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("leading", [(1,), (7,), (8,), (2, 150), (0,)])
def test_dense_products(dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    weight = torch.randn(700, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = torch.randn(*leading, 4096, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = dense_product(x, weight)
    assert found.shape == (*leading, 700)
    assert found.dtype == dtype
    if x.numel():
        within(found, x.double() @ weight.double().T, TOLERANCE[dtype])
    bias = torch.randn(700).to(dtype)
    assert torch.equal(DenseLinear(torch.nn.Parameter(weight, requires_grad=False), bias)(x), found + bias)


@pytest.mark.parametrize("shape", [(64, 128), (96, 128), (5, 7), (144, 100)])
@pytest.mark.parametrize("leading", [(1,), (2, 1, 9), (257,), (0,)])
def test_reordered_bfloat16_linears(shape: tuple[int, int], leading: tuple[int, ...]) -> None:
    if not supports_blocked_bfloat16():
        pytest.skip("this CPU has no bfloat16 products")
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randn(*leading, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.randn(shape[0]).bfloat16()
    linear = dense_linear(weight, bias)
    assert isinstance(linear, ReorderedLinear)
    found = linear(x)
    assert found.shape == (*leading, shape[0])
    if x.numel():
        within(found, x.double() @ weight.double().T + bias.double(), 2.0**-8)
        within(dense_linear(weight, None)(x), x.double() @ weight.double().T, 2.0**-8)


def test_gated_mlp_equals_its_formula() -> None:
    weights = [torch.randn(256, 64) * 0.1, torch.randn(64, 128) * 0.1]
    gate_up, down = DenseMatrices(1, 256, 64, torch.float32), DenseMatrices(1, 64, 128, torch.float32)
    gate_up.fill(0, weights[0])
    down.fill(0, weights[1])
    x = torch.randn(2, 3, 64)
    gate, up = x @ weights[0][:128].T, x @ weights[0][128:].T
    expected = (torch.nn.functional.silu(gate) * up) @ weights[1].T
    assert torch.allclose(GatedMLP(gate_up, down, torch.nn.SiLU())(x), expected, atol=1e-6)


def stacked(calls: list[Tensor]) -> tuple[StackedLinear, list[StackedLinearPart]]:
    linear = PackedLinear(bank_of("int8_weight", [made("int8_weight", 192, 128)]), torch.randn(192))
    linear.register_forward_hook(lambda module, inputs, output: calls.append(output))
    stack = StackedLinear(linear, (128, 16, 48))
    return stack, [StackedLinearPart(stack, index) for index in range(3)]


def test_parts_of_a_stack_compute_once_and_keep_no_outputs() -> None:
    calls: list[Tensor] = []
    stack, parts = stacked(calls)
    for rows in (1, 5):
        x = torch.randn(2, rows, 128)
        found = [part(x) for part in parts]
        assert len(calls) == 1
        assert [part.shape[-1] for part in found] == [part.out_features for part in parts] == [128, 16, 48]
        assert torch.equal(torch.cat(found, dim=-1), calls.pop())
        assert stack._last is None


def test_parts_of_a_stack_distinguish_inputs_and_release_them() -> None:
    calls: list[Tensor] = []
    stack, (first, second, _) = stacked(calls)
    x, other = torch.randn(2, 128), torch.randn(2, 128)
    one, another = first(x), second(other)
    assert torch.equal(one, calls[0][..., :128])
    assert torch.equal(another, calls[1][..., 128:144])
    assert torch.equal(first(x), one), "asked for again, computed again"
    calls.clear()
    del x  # as after an error in the middle
    assert stack._last is not None
    assert not stack._last[1], "what was computed for an input ends with it"


def test_parts_of_a_stack_work_from_several_threads() -> None:
    stack, parts = stacked([])
    inputs = [torch.randn(1, 128) for _ in range(4)]
    expected = [torch.cat(stack(x), dim=-1) for x in inputs]

    def same(index: int) -> bool:
        return all(
            torch.equal(torch.cat([part(inputs[index]) for part in parts], dim=-1), expected[index]) for _ in range(200)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, range(4)))
