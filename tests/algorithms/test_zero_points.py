"""Grids with zero points against loops over single weights, in RTN, GPTQ and the refinement."""

import pytest
import torch
from torch import Tensor

from quantlab.algorithms.gptq import GptqOptions, gptq, gptq_batch
from quantlab.algorithms.quantease import Problem, coordinate_descent, refit_scales
from quantlab.algorithms.rtn import round_to_nearest
from quantlab.algorithms.scales import GridOptions
from quantlab.numerics.integer import QuantizedMatrix

GRID = GridOptions(4, 32, torch.bfloat16, "minmax")
SEARCHED = GridOptions(4, 32, torch.bfloat16, "minmax", clip_steps=8, clip_floor=0.5, refits=2)


def skewed(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    """Groups of one sign, of both signs, and of zeros."""
    torch.manual_seed(seed)
    W = torch.randn(rows, columns) * 0.02 + 0.03 * torch.randn(rows, columns // 32).repeat_interleave(32, 1)
    W[0, :32] = 0
    W[1, :32] = W[1, :32].abs() + 0.01
    W[2, :32] = -W[2, :32].abs() - 0.01
    return W


def exact(matrix: QuantizedMatrix) -> Tensor:
    """Dequantized [N, K] float32; the product is not rounded to the dtype of the scale."""
    assert matrix.zero is not None
    width = matrix.q.shape[1] // matrix.scale.shape[1]
    steps = matrix.q - matrix.zero.repeat_interleave(width, 1)
    return steps.float() * matrix.scale.float().repeat_interleave(width, 1)


def nearest(weights: list[float], scale_of: float) -> tuple[list[int], float, int]:
    """Integers, scale and zero point of one group for `minmax` shrunk by a factor, computed weight by weight."""
    high, low = max(0.0, *weights) * scale_of, min(0.0, *weights) * scale_of
    exact = torch.tensor((high - low), dtype=torch.float32) / 15
    scale = float(exact.to(torch.bfloat16)) or 1.0
    zero = max(-8, min(7, round(float(torch.tensor(-8 - low / scale, dtype=torch.float32)))))
    q = []
    for weight in weights:
        points = [(abs((point - zero) * scale - weight), abs(point), point) for point in range(-8, 8)]
        q.append(min(points)[2])
    return q, scale, zero


def test_rtn_takes_the_nearest_point_of_a_grid_from_the_smallest_to_the_largest_weight() -> None:
    W = skewed(12, 96)
    found = round_to_nearest(W, GRID)
    assert found.zero is not None
    assert found.zero.dtype == torch.int8
    for n in range(12):
        for g in range(3):
            part = slice(32 * g, 32 * g + 32)
            q, scale, zero = nearest(W[n, part].tolist(), 1.0)
            assert float(found.scale[n, g]) == scale
            assert int(found.zero[n, g]) == zero
            distance = (torch.tensor(q) - zero) * scale - W[n, part]
            ours = (found.q[n, part] - found.zero[n, g]).float() * scale - W[n, part]
            assert torch.allclose(ours.abs(), distance.abs(), atol=1e-7), "a tie may go either way"
    assert not found.dequantize(torch.float32)[0, :32].any(), "zeros stay zeros"
    errors = (found.dequantize(torch.float32) - W).abs().view(12, 3, 32)
    assert (errors <= 0.51 * found.scale.float().abs()[:, :, None] + 0.004 * W.abs().view(12, 3, 32)).all()


def test_zero_points_are_finer_than_a_symmetric_grid_where_weights_are_skewed() -> None:
    W = skewed(64, 256)
    symmetric = GridOptions(4, 32, torch.bfloat16, "signed")
    error = [(round_to_nearest(W, grid).dequantize(torch.float32) - W).norm() for grid in (GRID, symmetric)]
    assert error[0] < 0.8 * error[1]


def test_the_search_is_never_worse_and_keeps_the_best_of_the_shrunken_grids() -> None:
    W = skewed(6, 64)
    searched = round_to_nearest(W, GridOptions(4, 32, torch.bfloat16, "minmax", clip_steps=4, clip_floor=0.6))
    errors = (exact(searched) - W).square().view(6, 2, 32).sum(2)
    for n in range(6):
        for g in range(2):
            weights = W[n, 32 * g : 32 * g + 32]
            tried = []
            for step in range(5):
                q, scale, zero = nearest(weights.tolist(), 1 - 0.4 * step / 4)
                tried.append(float((((torch.tensor(q) - zero) * scale - weights) ** 2).sum()))
            assert float(errors[n, g]) == pytest.approx(min(tried), rel=1e-4, abs=1e-12)
    refitted = round_to_nearest(W, SEARCHED)
    plain = round_to_nearest(W, GridOptions(4, 32, torch.bfloat16, "minmax", clip_steps=8, clip_floor=0.5))
    worse = (exact(refitted) - W).square() - (exact(plain) - W).square()
    assert (worse.view(6, 2, 32).sum(2) <= 1e-9).all()


def statistics(columns: int, *, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    X = torch.randn(400, columns // 4) @ torch.randn(columns // 4, columns) + torch.randn(400, columns)
    return X.T @ X / 400


def column_loop(W: Tensor, H: Tensor, grid: QuantizedMatrix, *, damping: float, removed: Tensor | None) -> Tensor:
    """Integers of algorithm 1 in column order in float64; the inverse is downdated explicitly."""
    W, H = W.double().clone(), H.double()
    columns = W.shape[1]
    inverse = torch.linalg.inv(H + damping * H.diagonal().mean() * torch.eye(columns, dtype=torch.float64))
    q = torch.zeros(W.shape, dtype=torch.int8)
    assert grid.zero is not None
    width = columns // grid.scale.shape[1]
    for k in range(columns):
        s, z = grid.scale[:, k // width].double(), grid.zero[:, k // width].double()
        q[:, k] = (W[:, k] / s + z).round().clamp(-8, 7).to(torch.int8)
        if removed is not None:
            q[removed[:, k], k] = z[removed[:, k]].to(torch.int8)
        error = (W[:, k] - (q[:, k] - z) * s) / inverse[k, k]
        W -= error[:, None] * inverse[k]
        inverse = inverse - inverse[:, k, None] * inverse[k] / inverse[k, k]
    return q


def test_gptq_is_the_papers_loop_on_its_grid() -> None:
    W, H = skewed(24, 96), statistics(96)
    result = gptq(W, H, GRID, GptqOptions(rounds=0, act_order=False))
    grid = round_to_nearest(W, GRID, importance=H.diagonal() / H.diagonal().mean() + 0.01)
    assert result.zero is not None
    assert torch.equal(result.zero, grid.zero)
    expected = column_loop(W, H, grid, damping=0.01, removed=None)
    used = ~result.kept_rtn
    assert used.sum() > 12
    assert (result.q[used] == expected[used]).float().mean() > 0.995, "up to ties"


@pytest.mark.parametrize("pruned", [False, True])
def test_gptq_and_its_refinement_lower_the_error_and_keep_zeros(pruned: bool) -> None:
    W, H = skewed(24, 96), statistics(96)
    removed = torch.rand(24, 96) < 0.3 if pruned else None
    results = [gptq(W, H, SEARCHED, GptqOptions(rounds=rounds), removed=removed) for rounds in (0, 2)]
    nearest_error = round_to_nearest(
        W if removed is None else W.masked_fill(removed, 0), SEARCHED, importance=H.diagonal()
    )
    truth = []
    for matrix in (nearest_error, *(result.matrix() for result in results)):
        delta = (matrix.dequantize(torch.float32) - W).double()
        truth.append(float(((delta @ H.double()) * delta).sum()))
        assert int(matrix.q.min()) >= -8
        assert int(matrix.q.max()) <= 7
        if removed is not None:
            assert not matrix.dequantize(torch.float32)[removed].any()
    assert truth[2] < truth[1] < truth[0]


def test_matrices_of_a_batch_are_as_alone() -> None:
    W, H = torch.stack([skewed(8, 64, seed=s) for s in (3, 4)]), torch.stack([statistics(64, seed=s) for s in (5, 6)])
    batch = gptq_batch(W, H, SEARCHED)
    for index in range(2):
        alone = gptq(W[index], H[index], SEARCHED)
        one = batch.member(index)
        assert one.zero is not None
        assert alone.zero is not None
        assert torch.equal(one.zero, alone.zero)
        assert torch.equal(one.q, alone.q)


def test_moves_of_the_refinement_stay_in_the_range_of_each_group() -> None:
    W, H = skewed(8, 64), statistics(64) / 10
    start = round_to_nearest(W, GRID)
    assert start.zero is not None
    zero = start.zero.repeat_interleave(32, 1)
    problem = Problem(W.T[None].contiguous(), H[None], 4, zero=start.zero.T[None].contiguous())
    steps, scale = (start.q - zero).T[None].contiguous(), start.scale.T[None].contiguous()
    moved = coordinate_descent(problem, steps, scale, passes=3)
    refitted = refit_scales(problem, moved, scale)

    def error(p: Tensor, s: Tensor) -> Tensor:
        delta = W - p[0].T * s[0].T.float().repeat_interleave(32, 1)
        return ((delta @ H) * delta).sum(1)

    q = moved[0].T + zero
    assert int(q.min()) >= -8
    assert int(q.max()) <= 7
    assert (error(moved, scale) <= error(steps, scale) + 1e-6).all()
    assert (error(moved, refitted) <= error(moved, scale) + 1e-6).all()
