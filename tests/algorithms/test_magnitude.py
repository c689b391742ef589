"""Magnitude pruning against sorting."""

import pytest
import torch

from quantlab.algorithms.magnitude import magnitude_mask
from quantlab.errors import CalibrationError


@pytest.mark.parametrize("ratio", [0.0, 0.001, 0.08, 0.5, 0.93])
@pytest.mark.parametrize("ties", [False, True])
def test_exactly_the_smallest_are_removed_and_ties_remove_the_first(ratio: float, ties: bool) -> None:
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", [0.0001, 0.25, 0.5, 0.999])
def test_counted_magnitudes_give_the_mask_of_sorted_ones(dtype: torch.dtype, ratio: float) -> None:
    """16-bit weights hold many equal magnitudes, zeros of both signs and subnormal numbers."""
    torch.manual_seed(0)
    W = torch.randn(61, 67) * 0.01
    W[::7] *= 1e-6
    W[3, :5] = 0
    W[4, :5] = -0.0
    W = W.to(dtype)
    mask = magnitude_mask(W, ratio=ratio)
    order = W.float().abs().flatten().argsort(stable=True)
    expected = torch.zeros(W.numel(), dtype=torch.bool)
    expected[order[: round(ratio * W.numel())]] = True
    assert torch.equal(mask.flatten(), expected)
    assert torch.equal(mask, magnitude_mask(W.float(), ratio=ratio))


@pytest.mark.parametrize("pattern", [(2, 4), (3, 4), (4, 8)])
def test_every_few_neighbours_lose_their_smallest(pattern: tuple[int, int]) -> None:
    torch.manual_seed(0)
    removed, of = pattern
    W = (torch.randn(5, 24) * 2).round().bfloat16()
    mask = magnitude_mask(W, ratio=0.5, pattern=pattern)
    for group, marks in zip(W.float().abs().view(-1, of).tolist(), mask.view(-1, of), strict=True):
        expected = sorted(sorted(range(of), key=lambda k: (group[k], k))[:removed])
        assert marks.nonzero().flatten().tolist() == expected


def test_invalid_ratios_and_patterns_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"not in \[0, 1\)"):
        magnitude_mask(torch.randn(4, 8), ratio=1.0)
    with pytest.raises(CalibrationError, match="does not fit"):
        magnitude_mask(torch.randn(4, 10), ratio=0.5, pattern=(2, 4))
