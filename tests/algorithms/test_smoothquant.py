"""Smoothing against its definition, and its effect on rounded activations."""

import pytest
import torch
from torch import Tensor

from quantlab.algorithms.smoothquant import smoothing_scales
from quantlab.errors import CalibrationError


def site() -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    X = torch.randn(200, 32)
    X[:, :2] *= 50
    return X, [torch.randn(24, 32), torch.randn(8, 32)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_factors_follow_the_definition(alpha: float) -> None:
    X, weights = site()
    s = smoothing_scales(X.abs().amax(0), weights, alpha=alpha)
    expected = X.abs().amax(0) ** alpha / torch.cat(weights).abs().amax(0) ** (1 - alpha)
    torch.testing.assert_close(s / s[0], expected / expected[0])
    assert (s.max() * s.min()).item() == pytest.approx(1, rel=1e-5)


def test_both_ends_level_one_side() -> None:
    X, weights = site()
    inputs = X.abs().amax(0) / smoothing_scales(X.abs().amax(0), weights, alpha=1.0)
    columns = torch.cat(weights).abs().amax(0) * smoothing_scales(X.abs().amax(0), weights, alpha=0.0)
    torch.testing.assert_close(inputs, inputs[0].expand(32))
    torch.testing.assert_close(columns, columns[0].expand(32))


def per_row(W: Tensor) -> Tensor:
    step = W.abs().amax(1, keepdim=True) / 127
    return (W / step).round() * step


def test_channels_without_input_are_left_alone() -> None:
    X, weights = site()
    X[:, 5] = 0
    weights = [W.index_fill(1, torch.tensor([7]), 0) for W in weights]
    s = smoothing_scales(X.abs().amax(0), weights, alpha=0.5)
    assert s[5] == 1
    assert s[7] == 1
    assert s.isfinite().all()


def test_statistics_that_cannot_be_used_are_refused() -> None:
    X, weights = site()
    for bad in (
        lambda: smoothing_scales(X.abs().amax(0), [], alpha=0.5),
        lambda: smoothing_scales(X.abs().amax(0), weights, alpha=1.5),
        lambda: smoothing_scales(-X.abs().amax(0), weights, alpha=0.5),
    ):
        with pytest.raises(CalibrationError, match="no usable statistics"):
            bad()
