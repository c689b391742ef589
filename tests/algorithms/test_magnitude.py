"""Magnitude pruning against sorting."""

import pytest
import torch

from quantlab.algorithms.magnitude import magnitude_mask


@pytest.mark.parametrize("ratio", [0.0, 0.001, 0.08, 0.5, 0.93])
@pytest.mark.parametrize("ties", [False, True])
def test_exactly_the_smallest_go_and_of_equals_the_first(ratio: float, ties: bool) -> None:
    torch.manual_seed(0)
    W = torch.randn(23, 41)
    if ties:
        W = (W * 3).round()
    mask = magnitude_mask(W, ratio=ratio)
    order = sorted(range(W.numel()), key=lambda i: (abs(W.flatten()[i].item()), i))
    expected = torch.zeros(W.numel(), dtype=torch.bool)
    expected[order[: round(ratio * W.numel())]] = True
    assert torch.equal(mask.flatten(), expected)


def test_bfloat16_ties_across_signs_are_counted_exactly() -> None:
    W = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.bfloat16)
    assert magnitude_mask(W, ratio=0.5).tolist() == [[True, True, False, False]]
