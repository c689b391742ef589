"""The CUDA kernels of the inner loops against the PyTorch loops, which are tested against their papers."""

from dataclasses import replace

import pytest
import torch

from quantlab.algorithms.gptq import GptqOptions, gptq_batch
from quantlab.algorithms.quantease import Problem, coordinate_descent
from quantlab.algorithms.scales import GridOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def problem(*, batch: int, rows: int, columns: int, sparse: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    W = torch.randn(batch, rows, columns, generator=generator)
    X = torch.randn(batch, 3 * columns, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    removed = torch.rand(batch, rows, columns, generator=generator) < 0.5
    return W, X.mT @ X / X.shape[1], removed if sparse else None


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("batch", "rows", "columns", "group"), [(3, 65, 256, 128), (1, 7, 192, 64), (2, 130, 96, None)]
)
def test_gptq_on_a_gpu_is_as_good_as_on_a_cpu(
    batch: int, rows: int, columns: int, group: int | None, sparse: bool
) -> None:
    W, H, removed = problem(batch=batch, rows=rows, columns=columns, sparse=sparse)
    grid = GridOptions(bits=4, group_size=group, scale_dtype=torch.bfloat16, grid="signed")
    options = replace(GptqOptions(), rounds=1)
    plain = gptq_batch(W, H, grid, options, removed=removed)
    on_gpu = gptq_batch(W.cuda(), H.cuda(), grid, options, removed=None if removed is None else removed.cuda())
    assert (on_gpu.q.cpu() != plain.q).float().mean().item() < 0.02  # ties and another order of summation
    torch.testing.assert_close(on_gpu.error.sum().cpu(), plain.error.sum(), rtol=0.02, atol=0)
    if removed is not None:
        assert not on_gpu.q.cpu()[removed].any()


def test_coordinate_descent_on_a_gpu_makes_the_same_moves() -> None:
    """One block in float32 from the same start: sums differ only in their last bits."""
    W, H, _ = problem(batch=2, rows=40, columns=128, sparse=False)
    H = H / H.diagonal(dim1=1, dim2=2).mean()
    target, scale = W.mT.contiguous(), torch.full((2, 1, 40), 0.3)
    start = (target / 0.3).round().clamp(-8, 7).to(torch.int8)
    plain = coordinate_descent(Problem(target, H, 4), start, scale)
    on_gpu = coordinate_descent(Problem(target.cuda(), H.cuda(), 4), start.cuda(), scale.cuda())
    assert (on_gpu.cpu() != plain).float().mean().item() < 0.01
