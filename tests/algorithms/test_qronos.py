"""The corrected target against least squares on sampled inputs."""

import torch

from quantlab.algorithms.hessian import damped_factor, normalised
from quantlab.algorithms.qronos import corrected_target


def test_target_is_the_least_squares_answer() -> None:
    torch.manual_seed(0)
    mix = torch.randn(24, 24, dtype=torch.float64) / 24**0.5 + torch.eye(24, dtype=torch.float64)
    X = torch.randn(4000, 24, dtype=torch.float64) @ mix
    original = X + 0.3 * torch.tanh(X.roll(1, 1)) + 0.2 * torch.randn_like(X)
    W = torch.randn(5, 24, dtype=torch.float64)
    H, C = X.T @ X / len(X), (original - X).T @ X / len(X)
    scaled, mean = normalised(H.float()[None])
    factor = damped_factor(scaled, damping=1e-7)
    target = corrected_target(W.float()[None], C.float()[None] / mean, factor.U, strength=1.0)[0]
    expected = torch.linalg.lstsq(X, original @ W.T).solution.T
    torch.testing.assert_close(target.double(), expected, rtol=2e-3, atol=2e-3)
    half = corrected_target(W.float()[None], C.float()[None] / mean, factor.U, strength=0.5)[0]
    torch.testing.assert_close(half, (W.float() + target) / 2, rtol=1e-4, atol=1e-4)


def test_damped_target_is_ridge_regression_towards_the_weight() -> None:
    """Rows for the penalty are stacked below the samples."""
    torch.manual_seed(1)
    X = torch.randn(500, 16, dtype=torch.float64)
    original = X + 0.5 * torch.randn_like(X)
    W = torch.randn(3, 16, dtype=torch.float64)
    H, C = X.T @ X / 500, (original - X).T @ X / 500
    scaled, mean = normalised(H.float()[None])
    factor = damped_factor(scaled, damping=0.2)
    target = corrected_target(W.float()[None], C.float()[None] / mean, factor.U, strength=1.0)[0]
    penalty = (0.2 * mean.double() * 500).sqrt() * torch.eye(16, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([X, penalty]), torch.cat([original, penalty]) @ W.T).solution.T
    torch.testing.assert_close(target.double(), expected, rtol=1e-3, atol=1e-3)
