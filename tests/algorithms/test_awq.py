"""The search for fold factors, checked on sampled outputs."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from quantlab.algorithms.awq import AwqOptions, AwqResult, Reader, awq_scales, balanced
from quantlab.algorithms.rtn import round_to_nearest
from quantlab.algorithms.scales import GridOptions
from quantlab.errors import CalibrationError

GRID = GridOptions(4, 32, torch.bfloat16, "absmax")


def site(*, seed: int = 0, columns: int = 64) -> tuple[Tensor, list[Tensor]]:
    """Inputs with a few large channels, and two weights that read them."""
    torch.manual_seed(seed)
    X = torch.randn(300, columns)
    X[:, :3] *= 20
    return X, [torch.randn(24, columns), torch.randn(16, columns) * 0.3]


def searched(X: Tensor, weights: list[Tensor], options: AwqOptions | None = None, **settings: Tensor) -> AwqResult:
    H = X.T @ X / len(X)
    readers = [Reader(W, H) for W in weights]
    return awq_scales(X.abs().mean(0), weights, readers, GRID, options or AwqOptions(), **settings)


def output_error(X: Tensor, weights: list[Tensor], s: Tensor, *, weighted: bool) -> float:
    total = 0.0
    for W in weights:
        importance = (X / s).square().mean(0) if weighted else None
        changed = round_to_nearest(W * s, GRID, importance=importance).dequantize(torch.float32)
        total += ((X / s) @ changed.T - X @ W.T).square().mean(0).sum().item()
    return total


@pytest.mark.parametrize("weighted", [False, True])
def test_losses_are_errors_of_the_outputs_and_the_least_wins(weighted: bool) -> None:
    X, weights = site()
    result = searched(X, weights, AwqOptions(weighted=weighted))
    assert result.losses[0] == pytest.approx(output_error(X, weights, torch.ones(64), weighted=weighted), rel=1e-3)
    assert min(result.losses) == pytest.approx(output_error(X, weights, result.s, weighted=weighted), rel=1e-3)
    assert result.losses[result.best] == min(result.losses)
    assert min(result.losses) < 0.6 * result.losses[0]
    assert (result.s[:3] > result.s[3:].max()).all()


def test_the_plain_curve_is_powers_of_the_magnitudes() -> None:
    X, weights = site()
    x = X.abs().mean(0)
    result = searched(X, weights, AwqOptions(steps=4, both_curves=False))
    assert len(result.losses) == 5
    assert result.best > 0
    expected = x ** (result.best / 4)
    torch.testing.assert_close(result.s, expected / (expected.max() * expected.min()).sqrt())


def test_no_scaling_wins_where_nothing_can_be_gained() -> None:
    """The weights are already on their grid, so any scaling increases the error."""
    torch.manual_seed(0)
    W = torch.randint(-7, 8, (8, 64)).float()
    W[:, ::32] = 7
    result = awq_scales(torch.rand(64) + 0.1, [W], [Reader(W, torch.eye(64))], GRID)
    assert result.losses[0] == 0
    assert result.best == 0
    assert torch.equal(result.s, torch.ones(64))


def test_a_matrix_with_its_own_inputs_counts_by_them() -> None:
    """An expert without tokens does not affect the loss."""
    X, weights = site()
    H, x, options = X.T @ X / len(X), X.abs().mean(0), AwqOptions(steps=5, both_curves=False)
    alone = awq_scales(x, weights[:1], [Reader(weights[0], H)], GRID, options)
    both = awq_scales(x, weights, [Reader(weights[0], H), Reader(weights[1], H, share=0)], GRID, options)
    assert both.losses == pytest.approx(alone.losses)
    assert torch.equal(both.s, alone.s)
    once = awq_scales(x, weights, [Reader(weights[0], H, 0.25), Reader(weights[1], H, 0.75)], GRID, options)
    apart = [awq_scales(x, weights, [Reader(W, H)], GRID, options).losses for W in weights]
    assert once.losses == pytest.approx([0.25 * a + 0.75 * b for a, b in zip(*apart, strict=True)])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_the_search_scores_factors_as_they_are_applied(seed: int) -> None:
    """Rounding the factors only after the search made a third of them worse than no scaling."""
    X, weights = site(seed=seed)
    X[:, 3:] *= torch.rand(61) * 3
    result = searched(X, weights, AwqOptions(powers_of_two=True, weighted=False))
    assert torch.equal(result.s.log2(), result.s.log2().round())
    assert len(set(result.losses)) > 20, "rounding leaves candidates to choose from"
    assert min(result.losses) == pytest.approx(output_error(X, weights, result.s, weighted=False), rel=1e-3)
    assert min(result.losses) <= result.losses[0]


def test_channels_of_one_row_share_a_factor() -> None:
    X, weights = site()
    shared = torch.arange(64) // 2
    result = searched(X, weights, AwqOptions(weighted=False), shared=shared)
    assert torch.equal(result.s[0::2], result.s[1::2])
    assert result.s.unique().numel() > 8
    assert min(result.losses) == pytest.approx(output_error(X, weights, result.s, weighted=False), rel=1e-3)


@pytest.mark.slow
def test_hessians_are_not_kept() -> None:
    """While one Hessian is created, at most the previous one is still alive."""
    X, weights = site()
    weights = weights * 3
    alive: list[weakref.ref[Tensor]] = []

    def readers() -> Iterator[Reader]:
        for W in weights:
            gc.collect()
            assert [one for one in alive[:-1] if one() is not None] == []
            H = X.T @ X / len(X)
            alive.append(weakref.ref(H))
            yield Reader(W, H)

    awq_scales(X.abs().mean(0), weights, readers(), GRID, AwqOptions(steps=2))
    assert len(alive) == len(weights)


def test_factors_stay_finite_and_balanced() -> None:
    X, weights = site()
    X[:, 10:13] = 0
    X[:, 20] *= 1e9
    result = searched(X, weights)
    assert result.s.isfinite().all()
    assert (result.s > 0).all()
    assert (result.s[10:13] == 1).all()
    s = balanced(torch.tensor([0.0, 1e-3, 10.0, float("inf"), float("nan")]), torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(s, torch.tensor([1.0, 0.01, 100.0, 1.0, 1.0]))
    assert torch.equal(balanced(torch.zeros(3), torch.ones(3, dtype=torch.bool)), torch.ones(3))


def test_statistics_that_cannot_be_used_are_refused() -> None:
    X, weights = site()
    H, x = X.T @ X / len(X), X.abs().mean(0)
    with pytest.raises(CalibrationError, match="no usable statistics"):
        awq_scales(x, [], [], GRID)
    with pytest.raises(CalibrationError, match="no usable statistics"):
        awq_scales(x * float("nan"), weights[:1], [Reader(weights[0], H)], GRID)
    with pytest.raises(CalibrationError, match="wrong shape"):
        awq_scales(x, weights[:1], [Reader(weights[0], H[:32, :32])], GRID)
