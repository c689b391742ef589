"""The factor against explicit inverses, and shrinkage against a mean over tokens."""

import pytest
import torch

from quantlab.algorithms.hessian import damped_factor, normalised, row_errors


@pytest.mark.parametrize("size", [1, 7, 150])
def test_factor_gives_the_inverse_of_every_tail(size: int) -> None:
    """The inverse of H without its first j columns follows from the factor without its first j columns."""
    torch.manual_seed(0)
    X = torch.randn(3, 400, size)
    H, _ = normalised(X.mT @ X)
    factor = damped_factor(H, damping=0.01)
    damped = H.double() + 0.01 * torch.eye(size, dtype=torch.float64)
    assert torch.equal(factor.U, factor.U.triu())
    for start in {0, size // 2, size - 1}:
        tail = factor.U[:, start:, start:].double()
        torch.testing.assert_close(tail.mT @ tail, torch.linalg.inv(damped[:, start:, start:]), rtol=1e-3, atol=1e-3)
    assert (factor.damping == 0.01).all()


def test_damping_grows_only_where_it_must() -> None:
    good, bad, hopeless = torch.eye(4), torch.eye(4), torch.eye(4)
    bad[0, 1] = bad[1, 0] = 1.05
    hopeless[0, 1] = hopeless[1, 0] = 3.0
    factor = damped_factor(torch.stack([good, bad, hopeless]), damping=0.01)
    assert factor.damping.tolist() == pytest.approx([0.01, 0.1, 1.0])
    assert factor.failed.tolist() == [False, False, True]
    assert torch.equal(factor.U[2], factor.U[2].diagonal().diag())


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_normalised_has_a_mean_of_one_in_any_unit(factor: float) -> None:
    X = torch.randn(50, 8)
    H, mean = normalised((X.T @ X * factor)[None])
    assert H.diagonal(dim1=1, dim2=2).mean().item() == pytest.approx(1, rel=1e-5)
    assert mean.item() == pytest.approx((X.square().sum() / 8).item() * factor, rel=1e-5)


def test_row_errors_are_mean_squares_of_outputs() -> None:
    torch.manual_seed(0)
    X, delta = torch.randn(100, 6), torch.randn(1, 4, 6)
    torch.testing.assert_close(row_errors(delta, (X.T @ X / 100)[None])[0], (X @ delta[0].T).square().mean(0))
