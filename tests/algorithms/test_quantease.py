"""Refinement of integers and scales against exhaustive single changes and least squares."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlab.algorithms.quantease import Problem, coordinate_descent, dequantized, refit_scales


def example(
    *,
    columns: int = 48,
    rows: int = 5,
    groups: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    bits: int = 4,
) -> tuple[Problem, Tensor, Tensor]:
    """A problem of two matrices, with integers far from the optimum."""
    torch.manual_seed(seed)
    X = torch.randn(2, 200, columns) @ (torch.randn(2, columns, columns) / columns**0.5 + 0.3 * torch.eye(columns))
    target = torch.randn(2, columns, rows) * 0.05
    half = 1 << (bits - 1)
    scale = (target.view(2, groups, -1, rows).abs().amax(2) / half).to(dtype)
    steps = scale.float().repeat_interleave(columns // groups, 1)
    q = (target / steps + torch.randn(target.shape)).round().clamp(-half, half - 1).to(torch.int8)
    H = X.mT @ X / 200 + 0.01 * torch.eye(columns)
    return Problem(target, H, bits), q, scale


def errors(problem: Problem, q: Tensor, scale: Tensor) -> Tensor:
    """[B, N] float64."""
    groups = scale.shape[1]
    delta = problem.target.double() - q.double() * scale.double().repeat_interleave(q.shape[1] // groups, 1)
    return (delta * (problem.H.double() @ delta)).sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_when_converged_no_single_integer_can_be_improved(bits: int) -> None:
    problem, q, scale = example(bits=bits)
    q = coordinate_descent(problem, q, scale, passes=200)
    assert torch.equal(q, coordinate_descent(problem, q, scale))
    best = errors(problem, q, scale)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    for k in range(q.shape[1]):
        for value in range(low, high + 1):
            changed = q.clone()
            changed[:, k] = value
            assert (errors(problem, changed, scale) >= best * (1 - 1e-4)).all()


def test_a_pass_is_that_of_one_column_after_the_other() -> None:
    """More columns than a block, against a float64 loop that recomputes every residual."""
    problem, q, scale = example(columns=192, groups=2, rows=4)
    expected = q.clone()
    steps = scale.double().repeat_interleave(96, 1)
    H = problem.H.double()
    for k in range(192):
        residual = (H[:, k, None] * (problem.target.double() - expected * steps).mT).sum(2)
        free = expected[:, k] + residual / H[:, k, k, None] / steps[:, k]
        expected[:, k] = free.round().clamp(-8, 7).to(torch.int8)
    assert (coordinate_descent(problem, q, scale) == expected).float().mean() > 0.99


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.sampled_from([1, 3, 6]), removing=st.booleans())
def test_no_step_raises_the_error_of_any_row(seed: int, groups: int, removing: bool) -> None:
    problem, q, scale = example(seed=seed, groups=groups)
    removed = torch.rand(q.shape) < 0.4 if removing else None
    if removed is not None:
        q = q.masked_fill(removed, 0)
    problem = Problem(problem.target, problem.H, 4, removed)
    last = errors(problem, q, scale)
    for _ in range(3):
        q = coordinate_descent(problem, q, scale)
        now = errors(problem, q, scale)
        assert (now <= last * (1 + 1e-5)).all()
        scale, last = refit_scales(problem, q, scale), now
        now = errors(problem, q, scale)
        assert (now <= last * (1 + 1e-5)).all()
        last = now
    assert removed is None or not q[removed].any()
    assert scale.dtype == torch.bfloat16


def test_scales_are_the_least_squares_answer() -> None:
    problem, q, scale = example(dtype=torch.float32)
    fitted = refit_scales(problem, q, scale)
    for b in range(2):
        root = torch.linalg.cholesky(problem.H[b].double()).mT
        for n in range(5):
            columns = torch.block_diag(*q[b, :, n].double().view(3, 16, 1))
            answer = torch.linalg.lstsq(root @ columns, (root @ problem.target[b, :, n].double())[:, None]).solution[
                :, 0
            ]
            torch.testing.assert_close(fitted[b, :, n].double(), answer, rtol=1e-4, atol=1e-6)


def test_stored_scales_are_close_to_the_best_stored_ones() -> None:
    """Moving any single scale to a neighbouring number of its dtype does not lower the error."""
    problem, q, scale = example()
    fitted = refit_scales(problem, q, scale)
    best = errors(problem, q, fitted)
    assert (best < errors(problem, q, scale)).all()
    for g in range(3):
        for step in (-1, 1):
            moved = fitted.clone()
            moved[:, g] = (moved[:, g].view(torch.int16) + step).view(torch.bfloat16)
            assert (errors(problem, q, moved) >= best * (1 - 1e-4)).float().mean() > 0.9


def test_groups_of_zeros_keep_their_scale() -> None:
    problem, q, scale = example()
    q[:, :16] = 0
    fitted = refit_scales(problem, q, scale)
    assert torch.equal(fitted[:, 0], scale[:, 0])
    assert fitted.isfinite().all()
    assert not torch.equal(fitted[:, 1], scale[:, 1])


def test_rows_are_refitted_alike_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, q, scale = example(rows=11)
    whole = refit_scales(problem, q, scale)
    monkeypatch.setattr("quantlab.algorithms.quantease._NORMAL_ENTRIES", 300)
    torch.testing.assert_close(refit_scales(problem, q, scale).float(), whole.float(), rtol=1e-2, atol=1e-5)


def test_dequantized_is_integers_times_the_scale_of_their_group() -> None:
    _, q, scale = example()
    assert torch.equal(dequantized(q, scale), q.float() * scale.float().repeat_interleave(16, 1))
