"""Every packed product on a GPU, compared with the float64 product of the dequantized matrix; skipped without a GPU."""

import pytest
import torch
from torch import Tensor, nn

from quantlab.numerics.integer import QuantizedMatrix
from quantlab.recipe.schemes import SCHEMES, SchemeName
from quantlab.runtime.banks.choice import quantized_matrices
from quantlab.runtime.banks.dense import DenseMatrices
from quantlab.runtime.banks.groups import single_group
from quantlab.runtime.banks.int8 import quantize_tokens
from quantlab.runtime.cuda.banks import CudaMatrices, rms_norm
from quantlab.runtime.cuda.tiles import Chip
from quantlab.runtime.cuda.wide_schedule import candidates, token_chunks
from quantlab.runtime.modules.experts import Experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned_gpu"),
]

ALL: tuple[SchemeName, ...] = ("int4_g128", "int4_g64", "int4_g32", "int8_weight", "int8")
DTYPES = (torch.bfloat16, torch.float16)
GPU = torch.device("cuda")


def made(scheme: SchemeName, rows: int, columns: int, dtype: torch.dtype) -> QuantizedMatrix:
    chosen = SCHEMES[scheme].format
    half = 1 << chosen.bits - 1
    q = torch.randint(-half, half, (rows, columns), dtype=torch.int8, device=GPU)
    scale = torch.randn(rows, chosen.groups(columns), device=GPU).mul(0.16 / half).to(dtype)
    return QuantizedMatrix(q, scale, chosen.bits)


def bank_of(scheme: SchemeName, matrices: list[QuantizedMatrix]) -> CudaMatrices:
    rows, columns = matrices[0].q.shape
    bank = quantized_matrices(
        SCHEMES[scheme].format, len(matrices), rows, columns, scale_dtype=matrices[0].scale.dtype, device=GPU
    )
    assert isinstance(bank, CudaMatrices)
    for index, matrix in enumerate(matrices):
        bank.fill(index, matrix)
    return bank


def exact(matrix: QuantizedMatrix) -> Tensor:
    per_weight = matrix.scale.repeat_interleave(matrix.q.shape[1] // matrix.scale.shape[1], dim=1)
    return matrix.q.double() * per_weight.double()


def seen(x: Tensor, scheme: SchemeName) -> Tensor:
    """The activations in float64, rounded as the scheme specifies."""
    if scheme != "int8":
        return x.double()
    q, scale = quantize_tokens(x.cpu())
    return (q.double() * scale.double()).to(GPU)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def gate(both: Tensor) -> Tensor:
    gates, up = both.chunk(2, dim=-1)
    return gates.sigmoid() * gates * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(256, 512), (80, 128), (1, 384), (576, 1408), (130, 96), (130, 3712), (256, 3712)])
@pytest.mark.parametrize("scheme", ALL)
def test_linears(scheme: SchemeName, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if shape[1] % (SCHEMES[scheme].format.group_size or 1):
        pytest.skip("the group does not divide the columns")
    matrix = made(scheme, *shape, dtype)
    bank = bank_of(scheme, [matrix])
    weight = exact(matrix)
    for tokens in (1, 2, 8, 9, 16, 33, 64, 65, 128, 257):
        x = torch.randn(tokens, shape[1], device=GPU).to(dtype)
        found = bank.products(x, single_group(tokens))
        assert found.dtype == dtype
        expected = seen(x, scheme) @ weight.t()
        assert error(found, expected) < (4e-3 if dtype == torch.bfloat16 else 1e-3), tokens
        if shape[0] % 2 == 0:
            assert error(bank.product(x, gated=True), gate(expected)) < 1e-2, tokens
        assert torch.equal(found, bank.products(x, single_group(tokens))), "equal inputs, equal outputs"


@pytest.mark.parametrize("scheme", ALL)
def test_many_tokens_and_float32(scheme: SchemeName) -> None:
    matrix = made(scheme, 384, 1024, torch.bfloat16)
    bank = bank_of(scheme, [matrix])
    for tokens, dtype in ((5000, torch.bfloat16), (1025, torch.bfloat16), (640, torch.bfloat16), (5, torch.float32)):
        x = torch.randn(tokens, 1024, device=GPU).to(dtype)
        weight = exact(matrix) if scheme == "int8" else matrix.dequantize(torch.float32).double()
        limit = 1e-5 if dtype == torch.float32 else 4e-3
        assert error(bank.products(x, single_group(tokens)), seen(x, scheme) @ weight.t()) < limit


@pytest.fixture
def wide_chip() -> Chip:
    from quantlab.runtime.cuda import launch

    chip = launch.chip(GPU)
    if not chip.wide:
        pytest.skip("needs compute capability 9 and the Gluon it is written in")
    return chip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 1024), (576, 1408), (200, 384), (24576, 256), (136, 96)])
@pytest.mark.parametrize("scheme", ["int4_g128", "int4_g64", "int4_g32", "int8_weight"])
def test_every_way_to_deal_out_many_rows(
    scheme: SchemeName, shape: tuple[int, int], dtype: torch.dtype, wide_chip: Chip
) -> None:
    from quantlab.runtime.cuda import launch

    if shape[1] % (SCHEMES[scheme].format.group_size or 1):
        pytest.skip("the group does not divide the columns")
    matrix = made(scheme, *shape, dtype)
    bank = bank_of(scheme, [matrix])
    weight, m = exact(matrix), bank.on_device(0)
    for tokens in (1, 65, 128, 129, 300, 384, 700, 2049):
        x = torch.randn(tokens, shape[1], device=GPU).to(dtype)
        expected = x.double() @ weight.t()
        like = expected.to(dtype)
        every = [
            schedule for size in (128, 192, 256) for schedule in candidates(bank.kind, *shape, tokens, wide_chip, size)
        ]
        found = [
            launch.wide_product(m, x, schedule, torch.full_like(like, torch.nan))
            for schedule in every
            for _ in range(2)
        ]
        assert not bank.arrived.any()
        for schedule, one, again in zip(every, found[::2], found[1::2], strict=True):
            assert error(one, expected) < (4e-3 if dtype == torch.bfloat16 else 1e-3), (tokens, schedule)
            assert torch.equal(one, again), "equal inputs, equal outputs"


@pytest.mark.parametrize("scheme", ["int4_g128", "int8_weight"])
def test_products_that_begin_while_the_one_before_runs(scheme: SchemeName, wide_chip: Chip) -> None:
    from quantlab.runtime.cuda import launch

    matrix = made(scheme, 4096, 1024, torch.bfloat16)
    bank = bank_of(scheme, [matrix])
    m = bank.on_device(0)
    x = torch.randn(700, 1024, device=GPU).bfloat16()
    expected = x.double() @ exact(matrix).t()
    every = [
        schedule for size in (128, 192, 256) for schedule in candidates(bank.kind, 4096, 1024, 700, wide_chip, size)
    ]
    outs = [launch.wide_product(m, x, schedule, expected.bfloat16()) for schedule in every]  # compiles all kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for schedule, out in zip(every, outs, strict=True):
            launch.wide_product(m, x, schedule, out)
    for out in outs:
        out.fill_(torch.nan)
    graph.replay()
    assert not bank.arrived.any()
    for schedule, out in zip(every, outs, strict=True):
        assert error(out, expected) < 4e-3, schedule


@pytest.mark.parametrize("scheme", ["int4_g128", "int8_weight"])
def test_turns_of_different_tiles(scheme: SchemeName, wide_chip: Chip) -> None:
    rows, columns = 7168, 2048
    matrix = made(scheme, rows, columns, torch.bfloat16)
    bank = bank_of(scheme, [matrix])
    weight = exact(matrix)
    tiles = {
        count: {schedule.tokens for _, schedule in token_chunks(bank.kind, rows, columns, count, wide_chip)}
        for count in range(256, 2049, 64)
    }
    mixed = [count for count, each in tiles.items() if len(each) > 1][:4]
    assert mixed
    for tokens in mixed:
        x = torch.randn(tokens - 5, columns, device=GPU).bfloat16()
        assert error(bank.product(x), x.double() @ weight.t()) < 4e-3, tokens


@pytest.mark.parametrize("scheme", ALL)
@pytest.mark.parametrize("tokens", [65, 300])
def test_rows_that_the_copy_engine_does_not_take(scheme: SchemeName, tokens: int) -> None:
    """TMA requires rows aligned to 16 bytes; here the rows of x or of the result are not."""
    for rows, columns, offset in ((130, 256, 0), (192, 256, 1)):
        matrix = made(scheme, rows, columns, torch.bfloat16)
        x = torch.randn(tokens * columns + offset, device=GPU).bfloat16()[offset:].view(tokens, columns)
        found = bank_of(scheme, [matrix]).products(x, single_group(tokens))
        assert error(found, seen(x, scheme) @ exact(matrix).t()) < 4e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [1, 96, 1408, 7168, 18432])
def test_tokens_are_rounded_as_on_the_cpu(columns: int, dtype: torch.dtype) -> None:
    from quantlab.runtime.cuda import launch

    size = torch.logspace(-36, 36, 63, dtype=torch.float64)[:, None]
    x = torch.randn(63, columns, dtype=torch.float64).mul(size).to(dtype).nan_to_num(posinf=1.0, neginf=-1.0)
    halves = torch.arange(-columns, columns, 2).div(2).remainder(255).sub(127).div(2)  # k / 2: half of them are ties
    halves[0] = 127
    x = torch.cat((x, halves.to(dtype)[None], torch.zeros(1, columns, dtype=dtype)))
    expected = quantize_tokens(x)
    for early in (False, True):
        q, scale = launch.quantize_tokens(x.to(GPU), early=early)
        assert torch.equal(scale.cpu(), expected[1][:, 0])
        assert torch.equal(q.cpu(), expected[0])


@pytest.mark.parametrize("scheme", ALL)
def test_activations_that_are_not_finite_are_not_hidden(scheme: SchemeName) -> None:
    bank = bank_of(scheme, [made(scheme, 128, 256, torch.bfloat16)])
    x = torch.randn(3, 256, device=GPU).bfloat16()
    x[1, 7] = float("nan")
    found = bank.products(x, single_group(3))
    assert found[[0, 2]].isfinite().all()
    assert not found[1].isfinite().any()


SHAPES_OF_EXPERTS = [(12, 256, 128, 3), (12, 256, 192, 3), (12, 256, 128, 1), (8, 2048, 1408, 6)]
"""Experts, hidden size, intermediate size, experts per token: plain; ragged columns; one per token; V2-Lite's width."""


def experts_of(
    scheme: SchemeName | None,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    scale_dtype: torch.dtype | None = None,
) -> tuple[Experts, Tensor, Tensor]:
    """Experts and their dequantized float64 weights; skips the test where the group does not divide the width."""
    experts, hidden, width, _ = shape
    if scheme is not None and width % (SCHEMES[scheme].format.group_size or 1):
        pytest.skip("the group does not divide the columns")
    banks = []
    for rows, columns in ((2 * width, hidden), (hidden, width)):
        if scheme is None:
            with GPU:
                dense = DenseMatrices(experts, rows, columns, dtype)
            weights = torch.randn(experts, rows, columns, device=GPU).mul(0.1).to(dtype)
            dense.weight.copy_(weights)
            banks.append((dense, weights.double()))
        else:
            matrices = [made(scheme, rows, columns, scale_dtype or dtype) for _ in range(experts)]
            banks.append((bank_of(scheme, matrices), torch.stack([exact(matrix) for matrix in matrices])))
    (gate_up, first), (down, second) = banks
    return Experts(gate_up, down, nn.SiLU()), first, second


def routed(
    x: Tensor, index: Tensor, weights: Tensor, first: Tensor, second: Tensor, *, scheme: SchemeName | None
) -> Tensor:
    """Oracle: a loop over the experts in float64, with intermediate activations rounded as in the kernels."""
    kind, out = scheme or "int8_weight", torch.zeros(x.shape, dtype=torch.float64, device=GPU)
    rows = seen(x, kind)
    for expert in range(first.shape[0]):
        token, place = (index == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        middle = gate(rows[token] @ first[expert].t()).to(x.dtype)
        outputs = seen(middle, kind) @ second[expert].t()
        out.index_add_(0, token, outputs * weights[token, place, None].double())
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES_OF_EXPERTS)
@pytest.mark.parametrize("scheme", [*ALL, None])
def test_experts(scheme: SchemeName | None, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    experts, hidden, _, top_k = shape
    module, first, second = experts_of(scheme, shape, dtype)
    assert module.routes_on_device(dtype)
    for tokens in (1, 2, 16, 64, 300):
        x = torch.randn(tokens, hidden, device=GPU).to(dtype)
        weights = torch.rand(tokens, top_k, device=GPU)
        even = torch.stack([torch.randperm(experts, device=GPU)[:top_k] for _ in range(tokens)])
        alike = torch.arange(top_k, device=GPU).expand(tokens, -1).contiguous()
        for index in (even, alike):
            expected = routed(x, index, weights, first, second, scheme=scheme)
            # int8 quantizes the intermediate activations too: some round to the neighbouring integer
            assert error(module(x, index, weights), expected) < (3e-2 if scheme == "int8" else 8e-3), tokens


@pytest.mark.parametrize("scheme", ["int4_g128", "int8", "int8_weight", None])
def test_experts_of_more_rows_than_are_computed_at_once(scheme: SchemeName | None) -> None:
    shape, tokens, dtype = (12, 256, 128, 3), 16400, torch.bfloat16
    module, first, second = experts_of(scheme, shape, dtype)
    x = torch.randn(tokens, shape[1], device=GPU).to(dtype)
    index = torch.rand(tokens, shape[0], device=GPU).topk(shape[3], dim=1).indices
    assert index.numel() > 32768
    weights = torch.rand(tokens, shape[3], device=GPU)
    expected = routed(x, index, weights, first, second, scheme=scheme)
    assert error(module(x, index, weights), expected) < (3e-2 if scheme == "int8" else 8e-3)


@pytest.mark.parametrize(
    ("dtype", "scale_dtype"),
    [
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize("scheme", ALL)
def test_scales_of_another_dtype_than_the_activations(
    scheme: SchemeName, dtype: torch.dtype, scale_dtype: torch.dtype
) -> None:
    matrix = made(scheme, 192, 512, scale_dtype)
    bank, weight = bank_of(scheme, [matrix]), exact(matrix)
    for tokens in (1, 16, 65, 300, 2048):
        x = torch.randn(tokens, 512, device=GPU).to(dtype)
        found = bank.products(x, single_group(tokens))
        assert found.dtype == dtype
        assert error(found, seen(x, scheme) @ weight.t()) < 5e-3, tokens
    module, first, second = experts_of(scheme, (12, 256, 128, 3), dtype, scale_dtype=scale_dtype)
    for tokens in (1, 64):
        x = torch.randn(tokens, 256, device=GPU).to(dtype)
        index = torch.rand(tokens, 12, device=GPU).topk(3, dim=1).indices
        weights = torch.rand(tokens, 3, device=GPU)
        expected = routed(x, index, weights, first, second, scheme=scheme)
        assert error(module(x, index, weights), expected) < (3e-2 if scheme == "int8" else 1e-2), tokens


def test_a_step_is_captured_and_follows_the_routing() -> None:
    experts, hidden, width, top_k = 8, 256, 128, 2
    gate_up = bank_of("int4_g128", [made("int4_g128", 2 * width, hidden, torch.bfloat16) for _ in range(experts)])
    down = bank_of("int4_g128", [made("int4_g128", hidden, width, torch.bfloat16) for _ in range(experts)])
    module = Experts(gate_up, down, nn.SiLU())
    x = torch.randn(4, hidden, device=GPU).bfloat16()
    weights = torch.rand(4, top_k, device=GPU)
    index = torch.zeros(4, top_k, dtype=torch.int64, device=GPU)
    module(x, index, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x, index, weights)
    for _ in range(5):
        index.copy_(torch.stack([torch.randperm(experts, device=GPU)[:top_k] for _ in range(4)]))
        x.normal_()
        graph.replay()
        assert torch.equal(out, module(x, index, weights))


@pytest.mark.parametrize("scheme", ALL)
@pytest.mark.parametrize("tokens", [1, 16, 256, 2048])
def test_there_is_never_an_expanded_copy(scheme: SchemeName, tokens: int) -> None:
    """A product allocates its result, a copy of its activations and at most a quarter of the 16-bit matrix."""
    rows, columns = 18432, 7168
    bank = bank_of(scheme, [made(scheme, rows, columns, torch.bfloat16)])
    x = torch.randn(tokens, columns, device=GPU).bfloat16()
    bank.products(x, single_group(tokens))
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    scales = 2 * rows * SCHEMES[scheme].format.groups(columns)
    assert (
        sum(buffer.nbytes for buffer in bank.buffers())
        <= rows * columns * SCHEMES[scheme].format.bits / 8 + scales + 65536
    )
    torch.cuda.reset_peak_memory_stats()
    bank.products(x, single_group(tokens))
    assert torch.cuda.max_memory_allocated() - held < 2 * tokens * rows + x.nbytes + 0.25 * 2 * rows * columns


@pytest.mark.parametrize("scheme", ["int4_g128", "int8", "int8_weight"])
@pytest.mark.parametrize("tokens", [1, 16, 512])
def test_there_is_never_an_expanded_expert(scheme: SchemeName, tokens: int) -> None:
    experts, hidden, width, top_k = 32, 2048, 1408, 6
    module = Experts(
        bank_of(scheme, [made(scheme, 2 * width, hidden, torch.bfloat16) for _ in range(experts)]),
        bank_of(scheme, [made(scheme, hidden, width, torch.bfloat16) for _ in range(experts)]),
        nn.SiLU(),
    )
    x = torch.randn(tokens, hidden, device=GPU).bfloat16()
    index = torch.rand(tokens, experts, device=GPU).topk(top_k, dim=1).indices
    weights = torch.rand(tokens, top_k, device=GPU)
    module(x, index, weights)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    module(x, index, weights)
    between = 3 * tokens * top_k * (hidden + width)  # 16-bit outputs of both products, and their int8 copies
    in_16_bits = 2 * experts * 3 * hidden * width
    assert torch.cuda.max_memory_allocated() - held < between + 0.1 * in_16_bits


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    for columns in (96, 512, 7168):
        x, weight = torch.randn(5, columns, device=GPU).to(dtype), torch.randn(columns, device=GPU).to(dtype)
        wide = x.double()
        expected = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        assert error(rms_norm(x, weight, 1e-6), expected) < 5e-3
