"""Wanda against sorting row by row."""

import pytest
import torch

from quantlab.algorithms.wanda import wanda_mask
from quantlab.errors import CalibrationError


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("ties", [False, True])
def test_every_row_loses_its_smallest_scores(ratio: float, ties: bool) -> None:
    torch.manual_seed(0)
    X, W = torch.randn(50, 24), torch.randn(7, 24)
    if ties:
        X, W = torch.ones(50, 24), (W * 2).round()
    mask = wanda_mask(W, X.square().mean(0), ratio=ratio)
    norms = X.norm(dim=0)
    for row in range(7):
        scores = [round(abs(W[row, k].item()) * norms[k].item(), 5) for k in range(24)]
        expected = sorted(range(24), key=lambda k: (scores[k], k))[: round(ratio * 24)]
        assert mask[row].nonzero().flatten().tolist() == sorted(expected)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
def test_every_few_neighbours_lose_their_smallest_scores(pattern: tuple[int, int]) -> None:
    torch.manual_seed(0)
    W, squares = torch.randn(5, 24, dtype=torch.bfloat16), torch.rand(24) + 0.1
    mask = wanda_mask(W, squares, ratio=0.5, pattern=pattern)
    removed, of = pattern
    for row in range(5):
        for start in range(0, 24, of):
            scores = (W[row].float().abs() * squares.sqrt())[start : start + of].tolist()
            expected = sorted(sorted(range(of), key=lambda k: (scores[k], k))[:removed])
            assert mask[row, start : start + of].nonzero().flatten().tolist() == expected


def test_the_unit_of_the_inputs_does_not_matter() -> None:
    torch.manual_seed(0)
    W, squares = torch.randn(6, 32), torch.rand(32)
    assert torch.equal(wanda_mask(W, squares, ratio=0.4), wanda_mask(W, squares * 4096, ratio=0.4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_mean_squares_that_are_none_are_refused(value: float) -> None:
    squares = torch.ones(8)
    squares[2] = value
    with pytest.raises(CalibrationError, match="negative or not finite"):
        wanda_mask(torch.randn(2, 8), squares, ratio=0.5)
