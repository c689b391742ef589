"""The native kernels against float64 products of the dequantized matrices, and the fallback without native kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantlab.recipe.schemes import SCHEMES, SchemeName
from quantlab.runtime.banks.choice import quantized_matrices
from quantlab.runtime.banks.dense import DenseMatrices
from quantlab.runtime.banks.groups import RowGroups, single_group
from quantlab.runtime.banks.int4_native import NativeInt4Matrices
from quantlab.runtime.banks.int4_torch import TorchInt4Matrices
from quantlab.runtime.banks.int8 import Int8Matrices, Int8WeightMatrices
from quantlab.runtime.cpu_operators import cpu_operators
from quantlab.runtime.modules import linear
from quantlab.runtime.modules.linear import Norm, ReorderedLinear, dense_linear
from quantlab.runtime.modules.onednn_layout import has_pair_layout
from quantlab.runtime.native import kernels
from quantlab.runtime.native.library import library, product_library, status
from tests.runtime.test_matrices import exact, made

pytestmark = pytest.mark.usefixtures("two_threads")

ROOT = Path(__file__).parents[2]
SHAPES = ((5, 128), (64, 256), (80, 128), (200, 384), (192, 1152), (1045, 128))
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
needed = pytest.mark.skipif(library() is None, reason=status())
products_needed = pytest.mark.skipif(product_library() is None, reason=status())


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random numbers with a mean of 0.5, so that errors in the correction of offsets show."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5).to(dtype)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative root-mean-square error."""
    return ((found.double() - expected).norm() / expected.norm()).item()


@products_needed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", ["int4_g128", "int4_g64", "int4_g32", "int8_weight"])
def test_weight_only_products(
    scheme: SchemeName, shape: tuple[int, int], scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    matrix = made(scheme, *shape, scale_dtype=scale_dtype)
    integers = matrix.q.double()
    meant = integers * matrix.scale.double().repeat_interleave(shape[1] // matrix.scale.shape[1], dim=1)
    bank = quantized_matrices(SCHEMES[scheme].format, 1, *shape, scale_dtype=scale_dtype)
    bank.fill(0, matrix)
    for count in range(1, 10):
        x = numbers(count, shape[1], dtype=torch.bfloat16).to(dtype)  # no rounding to bfloat16 is left to the kernel
        found = bank.products(x, single_group(count))
        assert found.dtype == dtype
        assert error(found, x.double() @ meant.T) <= ROUNDING[dtype]


@products_needed
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["int4_g128", "int4_g32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_int4_is_expanded_exactly(scheme: SchemeName, shape: tuple[int, int], scale_dtype: torch.dtype) -> None:
    matrix = made(scheme, *shape, scale_dtype=scale_dtype)
    bank = quantized_matrices(SCHEMES[scheme].format, 1, *shape, scale_dtype=scale_dtype)
    assert isinstance(bank, NativeInt4Matrices)
    bank.fill(0, matrix)
    for start, stop in ((0, shape[0]), (48, shape[0] - 3)) if shape[0] > 64 else ((0, shape[0]),):
        for dtype in (torch.float32, torch.bfloat16):
            band = torch.full((shape[1], stop - start), torch.nan, dtype=dtype)
            bank.expand(0, start, band)
            assert torch.equal(band.t(), exact(matrix)[start:stop].to(scale_dtype).to(dtype))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 32), (70, 160), (5, 4128)])
def test_int8_is_expanded_exactly(shape: tuple[int, int], scale_dtype: torch.dtype) -> None:
    matrix = made("int8_weight", *shape, scale_dtype=scale_dtype)
    bank = Int8WeightMatrices(SCHEMES["int8_weight"].format, 1, *shape, scale_dtype=scale_dtype)
    bank.fill(0, matrix)
    for start in (0, shape[0] // 2):
        for dtype in (torch.float32, torch.bfloat16):
            band = torch.full((shape[0] - start, shape[1]), torch.nan, dtype=dtype)
            bank.expand(0, start, band)
            assert torch.equal(band, (matrix.q.to(scale_dtype) * matrix.scale)[start:].to(dtype))


@products_needed
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_is_as_accurate_as_the_operator_of_torch(group_size: int) -> None:
    scheme: SchemeName = {32: "int4_g32", 64: "int4_g64", 128: "int4_g128"}[group_size]
    matrix = made(scheme, 256, 2048)
    banks = [
        kind(SCHEMES[scheme].format, 1, 256, 2048, scale_dtype=torch.bfloat16)
        for kind in (NativeInt4Matrices, TorchInt4Matrices)
    ]
    x = numbers(4, 2048, dtype=torch.bfloat16)
    scale = matrix.scale.double().repeat_interleave(group_size, dim=1)
    expected = x.double() @ (matrix.q.double() * scale).T
    for bank in banks:
        bank.fill(0, matrix)
    ours, torchs = (error(bank.products(x, single_group(4)), expected) for bank in banks)
    assert ours <= 1.05 * torchs


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (5, 7), (130, 100), (3, 65)])
def test_w8a8_gives_the_numbers_of_torch(shape: tuple[int, int], scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    bank = Int8Matrices(SCHEMES["int8"].format, 3, *shape, scale_dtype=scale_dtype)
    for index in range(3):
        bank.fill(index, made("int8", *shape, scale_dtype=scale_dtype, seed=index))
    for count in range(1, 10):
        groups = RowGroups((2, 0), (count, 3), torch.tensor([2] * count + [0] * 3))
        x = numbers(count + 3, shape[1], dtype=dtype)
        x[0] = 0
        assert torch.equal(bank.products(x, groups), bank._torch_products(x, groups))


@needed
def test_w8a8_propagates_infinities_and_nans() -> None:
    bank = Int8Matrices(SCHEMES["int8"].format, 1, 5, 7, scale_dtype=torch.bfloat16)
    bank.fill(0, made("int8", 5, 7))
    x = numbers(4, 7, dtype=torch.float16)
    x[1, 3], x[2, 6] = torch.inf, torch.nan
    found = torch.isfinite(bank.products(x, single_group(4))).all(dim=1)
    assert found.tolist() == [True, False, False, True]


@needed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (5, 7), (130, 100), (3, 33), (6, 9000)])
def test_dense_products(shape: tuple[int, int], dtype: torch.dtype) -> None:
    bank = DenseMatrices(2, *shape, dtype)
    weight = numbers(*shape, dtype=dtype, seed=1)
    bank.fill(1, weight)
    for count in range(1, 10):
        x = numbers(count, shape[1], dtype=dtype)
        out = torch.empty(count, shape[0], dtype=dtype)
        kernels.dense_product(x, bank.weight, RowGroups((1,), (count,), None).slices, out)
        assert error(out, x.double() @ weight.double().T) <= ROUNDING[dtype]


@needed
@pytest.mark.parametrize("shape", [(64, 64), (96, 128), (80, 100), (5, 7), (700, 2048)])
def test_bfloat16_linears_are_right_whatever_the_layout(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN's weight layout depends on the processor; the native kernel reads one of the layouts in place."""
    weight, bias = numbers(*shape, dtype=torch.bfloat16), numbers(shape[0], dtype=torch.bfloat16, seed=2)
    layer = dense_linear(weight, bias)
    if not isinstance(layer, ReorderedLinear):
        pytest.skip("this CPU has no bfloat16 products")
    assert layer._paired == has_pair_layout(*shape)
    named = any(phrase.startswith("bfloat16 products by oneDNN alone") for phrase in cpu_operators())
    assert named == (not has_pair_layout(64, 64))
    for count in range(1, 10):
        x = numbers(count, shape[1], dtype=torch.bfloat16, seed=3)
        found = layer(x[None])
        assert found.shape == (1, count, shape[0])
        assert error(found[0], x.double() @ weight.double().T + bias.double()) <= 4e-3
        with monkeypatch.context() as patch:
            patch.setattr(linear, "_PAIRED_ROWS", 0)
            assert error(found, layer(x[None]).double()) <= 4e-3


SCHEME_NAMES: tuple[SchemeName | None, ...] = (None, "int4_g64", "int8", "int8_weight")


@products_needed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
@pytest.mark.parametrize("counts", [(1, 2, 9), (300, 1, 2), (0, 3, 200), (1,)])
def test_groups_of_few_and_of_many_rows(scheme: SchemeName | None, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    """Several groups in one native call, and groups with too many rows for it."""
    which = (3, 0, 2)[: len(counts)]
    matrices = [made(scheme or "int8_weight", 80, 192, seed=seed) for seed in range(4)]
    if scheme is None:
        bank = DenseMatrices(4, 80, 192, dtype)
        for index, matrix in enumerate(matrices):
            bank.fill(index, exact(matrix))
    else:
        bank = quantized_matrices(SCHEMES[scheme].format, 4, 80, 192, scale_dtype=torch.bfloat16)
        for index, matrix in enumerate(matrices):
            bank.fill(index, matrix)
    x = numbers(sum(counts), 192, dtype=dtype)
    matrix_of_row = torch.tensor(which).repeat_interleave(torch.tensor(counts))
    found = bank.products(x, RowGroups(which, counts, matrix_of_row))
    expected = torch.cat([part.double() @ exact(matrices[i]).T for part, i in zip(x.split(counts), which, strict=True)])
    assert error(found, expected) <= 2e-2


@products_needed
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_one_row_for_all_groups_and_no_row(scheme: SchemeName | None) -> None:
    if scheme in {None, "int8"} and library() is None:
        pytest.skip("torch's products take at least one group")
    if scheme is None:
        bank = DenseMatrices(3, 48, 64, torch.float16)
        bank.weight.normal_()
    else:
        bank = quantized_matrices(SCHEMES[scheme].format, 3, 48, 64, scale_dtype=torch.bfloat16)
        for index in range(3):
            bank.fill(index, made(scheme, 48, 64, seed=index))
    x, groups = numbers(1, 64, dtype=torch.float16), RowGroups((2, 0), (1, 1), torch.tensor([2, 0]))
    assert torch.equal(bank.products(x.expand(2, -1), groups), bank.products(x.repeat(2, 1), groups))
    assert bank.products(x[:0], RowGroups((), (), torch.empty(0, dtype=torch.int64))).shape == (0, 48)
    assert bank.products(x[:0], RowGroups((1,), (0,), torch.empty(0, dtype=torch.int64))).shape == (0, 48)
    across = numbers(64, 3, dtype=torch.float16).t()  # rows are not contiguous
    both = RowGroups((1,), (3,), torch.tensor([1, 1, 1]))
    assert torch.equal(bank.products(across, both), bank.products(across.contiguous(), both))


@needed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [7, 64, 100])
def test_kernels_between_the_products_equal_their_formulas(width: int, dtype: torch.dtype) -> None:
    x = numbers(3, 2 * width, dtype=dtype) * 4
    gate, up = x.double().chunk(2, dim=1)
    assert error(kernels.gate(x), nn.functional.silu(gate) * up) <= 3e-3
    weights = torch.rand(3)
    assert error(kernels.weighted_sum(x, weights), weights.double()[None] @ x.double()) <= 3e-3
    other = numbers(3, 2 * width, dtype=dtype, seed=5)
    assert torch.equal(kernels.add(x.clone(), other), x + other)
    weight = numbers(2 * width, dtype=dtype, seed=4)
    expected = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    assert error(kernels.norm(x, weight, 1e-6), expected) <= 4e-3
    extreme = torch.tensor([[-60000.0, 0, 60000, torch.nan, 1, 1, 1, 1]], dtype=torch.float32).to(dtype)
    assert kernels.gate(extreme)[0, :3].tolist() == [0, 0, extreme[0, 2].item()]
    assert kernels.gate(extreme)[0, 3].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 100])
def test_norms_equal_their_formula(rows: int, dtype: torch.dtype) -> None:
    module = nn.Module()
    module.weight, module.variance_epsilon = nn.Parameter(numbers(48, dtype=dtype)), 1e-6
    x = numbers(2, rows, 48, dtype=dtype, seed=1)
    expected = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6) * module.weight.double()
    found = Norm(module)(x)
    assert found.dtype == dtype
    assert error(found, expected) <= {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


SPEAK = "from quantlab.runtime.native.library import status; print(status())"
COMPUTE = """
import torch, tests.runtime.test_matrices as t, tests.runtime.test_experts as e
from quantlab.runtime.modules.onednn_layout import supports_blocked_bfloat16
for dtype in t.TOLERANCE:
    for scheme in t.WEIGHT_ONLY:
        t.test_weight_only_products_equal_the_dequantized_product(scheme, (192, 256), 2, dtype)
    t.test_w8a8_equals_integer_arithmetic(2, (5, 7), dtype)
    t.test_dense_products(dtype, (7,))
    e.test_experts_equal_a_loop_over_tokens("int4_g64", 1, "spread", dtype)
if supports_blocked_bfloat16():
    t.test_reordered_bfloat16_linears((96, 128), (2, 1, 9))
"""


@pytest.mark.slow
def test_without_native_kernels_torch_computes_the_same() -> None:
    assert run(SPEAK + "\n" + COMPUTE, QUANTLAB_NATIVE="0") == "torch's kernels (QUANTLAB_NATIVE=0)\n"


@pytest.mark.slow
@needed
def test_products_with_avx2_compute_the_same() -> None:
    """A processor with AVX-512 runs the kernels of older ones."""
    assert "with AVX2 (QUANTLAB_NATIVE=avx2)" in run(SPEAK + "\n" + COMPUTE, QUANTLAB_NATIVE="avx2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("/bin/false", "/bin/false failed: exit status 1"), ("no-such-compiler", "no C compiler found")],
)
@products_needed
def test_a_failing_compiler_is_reported_and_torch_is_the_fallback(compiler: str, reason: str, tmp_path: Path) -> None:
    said = run(SPEAK + "\n" + COMPUTE, CC=compiler, XDG_CACHE_HOME=str(tmp_path))
    assert said.startswith("torch's kernels (")
    assert reason in said


@pytest.mark.slow
@needed
def test_processes_that_build_at_once_all_get_the_kernels(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", SPEAK], env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate()[0] for process in running] == ["native kernels\n"] * 3
    assert [path.suffix for path in (tmp_path / "quantlab").iterdir()] == [".so"], "one library and no leftovers"


@pytest.mark.slow
@needed
def test_threads_are_those_of_torch() -> None:
    """The process has one OpenMP runtime, and with one torch thread no other thread computes."""
    code = (
        "import pathlib, torch\n"
        "torch.set_num_threads(1)\n"
        "from quantlab.runtime.native import kernels\n"
        "from quantlab.runtime.banks.groups import single_group\n"
        "x, w = torch.ones(1, 4096).half(), torch.ones(1, 4096, 4096).half()\n"
        "before = len(list(pathlib.Path('/proc/self/task').iterdir()))\n"
        "kernels.dense_product(x, w, single_group(1).slices, torch.empty(1, 4096).half())\n"
        "assert len(list(pathlib.Path('/proc/self/task').iterdir())) == before\n"
        "maps = {line.split()[-1] for line in open('/proc/self/maps') if '.so' in line}\n"
        "print(sum('omp' in pathlib.Path(name).name for name in maps))"
    )
    assert run(code) == "1\n"
