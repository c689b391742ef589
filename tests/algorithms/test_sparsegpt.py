"""SparseGPT against least squares on the same support and a column loop with explicit inverses."""

import pytest
import torch
from torch import Tensor

from quantlab.algorithms.alps import fitted_on_support
from quantlab.algorithms.gptq import gptq
from quantlab.algorithms.scales import GridOptions
from quantlab.algorithms.sparsegpt import sparsegpt, sparsegpt_batch
from quantlab.errors import CalibrationError


def problem(rows: int = 12, columns: int = 64, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    X = torch.randn(600, columns) @ (torch.randn(columns, columns) / columns**0.5 + 0.5 * torch.eye(columns))
    X *= torch.exp(torch.randn(columns) * 0.5)
    return torch.randn(rows, columns), X.T @ X / 600


def damped(H: Tensor, damping: float = 0.01) -> Tensor:
    H = H.double()
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)


def best_on_support(W: Tensor, H: Tensor, mask: Tensor) -> Tensor:
    """Solve one linear system per row, in float64."""
    result = torch.zeros(W.shape, dtype=torch.float64)
    for row, (w, removed) in enumerate(zip(W.double(), mask, strict=True)):
        keep = ~removed
        result[row, keep] = torch.linalg.solve(H[keep][:, keep], H[keep] @ w)
    return result


def column_loop(W: Tensor, H: Tensor, *, count: int | None, pattern: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Algorithm 1 within one block; the inverse of the remaining part of H is downdated explicitly."""
    W = W.double().clone()
    inverses = [torch.linalg.inv(H)]
    for k in range(W.shape[1] - 1):
        inverse = inverses[-1]
        inverses.append(inverse - inverse[:, k, None] * inverse[k] / inverse[k, k])
    pivots = torch.stack([inverse[k, k] for k, inverse in enumerate(inverses)])
    mask = torch.zeros(W.shape, dtype=torch.bool)
    if count is not None:
        mask.view(-1)[(W.square() / pivots).flatten().argsort()[:count]] = True
    for k in range(W.shape[1]):
        if pattern is not None and k % pattern[1] == 0:
            part = slice(k, k + pattern[1])
            order = (W[:, part].square() / pivots[part]).argsort(dim=1)[:, : pattern[0]]
            mask[:, part] = torch.zeros_like(mask[:, part]).scatter(1, order, True)
        W -= (W[:, k] * mask[:, k])[:, None] / pivots[k] * inverses[k][k]
    return W.masked_fill(mask, 0), mask


def output_error(delta: Tensor, H: Tensor) -> float:
    """Squared error of the outputs, in units of the mean of diag H."""
    return float(((delta @ H) * delta).sum() / H.diagonal().mean())


@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4), (4, 8)])
def test_pass_is_that_of_the_paper(pattern: tuple[int, int] | None) -> None:
    W, H = problem()
    result = sparsegpt(W, H, ratio=0.5, pattern=pattern, fit_steps=0)
    count = None if pattern else round(0.5 * W.numel())
    expected, mask = column_loop(W, damped(H), count=count, pattern=pattern)
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.W.double(), expected, rtol=1e-3, atol=1e-3)


def test_the_pass_alone_is_exact_where_removed_weights_come_first() -> None:
    """If all weights after the removed ones are free, the pass gives the least-squares solution on its support."""
    W, H = problem(columns=96)
    W[:, :30] *= 1e-4
    result = sparsegpt(W, H, ratio=30 / 96, fit_steps=0)
    assert result.mask[:, :30].all()
    torch.testing.assert_close(result.W.double(), best_on_support(W, damped(H), result.mask), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_fit_is_least_squares_on_the_support(pattern: tuple[int, int] | None) -> None:
    W, H = problem()
    result = sparsegpt(W, H, ratio=0.5, pattern=pattern, fit_steps=200)
    torch.testing.assert_close(result.W.double(), best_on_support(W, damped(H), result.mask), rtol=1e-2, atol=1e-3)


def test_every_step_of_the_fit_lowers_the_error() -> None:
    W, H = problem()
    mask = torch.rand(W.shape) < 0.5
    H = damped(H).float()
    last = None
    for steps in range(8):
        fitted = fitted_on_support(W[None], H[None], W.masked_fill(mask, 0)[None], mask[None], steps=steps)[0]
        assert not fitted[mask].any()
        error = (((W - fitted) @ H) * (W - fitted)).sum(1)
        assert last is None or (error < last).all()
        last = error


@pytest.mark.parametrize("columns", [128, 200, 256])
def test_every_block_loses_the_same_share(columns: int) -> None:
    W, H = problem(columns=columns)
    result = sparsegpt(W, H, ratio=0.3)
    for start in range(0, columns, 128):
        block = result.mask[:, start : start + 128]
        assert int(block.sum()) == round(0.3 * block.numel())
    assert not result.W[result.mask].any()
    passed, masked = sparsegpt(W, H, ratio=0.3, fit_steps=0), W.masked_fill(result.mask, 0)
    assert torch.equal(passed.mask, result.mask)
    assert output_error(W - result.W, H) < output_error(W - passed.W, H) < output_error(W - masked, H)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 6)])
def test_a_pattern_holds_in_every_row(pattern: tuple[int, int]) -> None:
    W, H = problem(columns=192)
    mask = sparsegpt(W, H, ratio=0, pattern=pattern).mask
    assert (mask.view(12, -1, pattern[1]).sum(2) == pattern[0]).all()


def test_batches_are_their_members() -> None:
    problems = [problem(seed=seed) for seed in range(2)]
    batch = sparsegpt_batch(torch.stack([p[0] for p in problems]), torch.stack([p[1] for p in problems]), ratio=0.5)
    for index, (W, H) in enumerate(problems):
        alone = sparsegpt(W, H, ratio=0.5)
        assert torch.equal(batch.member(index).mask, alone.mask)
        torch.testing.assert_close(batch.member(index).W, alone.W, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_removed_and_rounded_together_is_better_than_one_after_the_other() -> None:
    W, H = problem(rows=32, columns=128)
    grid = GridOptions(4, 32, torch.bfloat16, "signed", clip_steps=10)
    pruned = sparsegpt(W, H, ratio=0.5)
    together = gptq(W, H, grid, removed=pruned.mask)
    assert not together.q[pruned.mask].any()
    after = gptq(pruned.W, H, grid, removed=pruned.mask).matrix().dequantize(torch.float32)
    assert together.error.sum() < output_error(W - after, H) * 1.02


def test_nothing_to_remove_changes_nothing() -> None:
    W, H = problem()
    result = sparsegpt(W, H, ratio=0.0)
    assert torch.equal(result.W, W)
    assert not result.mask.any()


def test_a_hopeless_hessian_only_removes() -> None:
    W, H = problem()
    H = H / H.diagonal().mean()
    H[0, 1] = H[1, 0] = 50
    result = sparsegpt(W, H, ratio=0.5)
    assert result.failed
    assert torch.equal(result.W, W.masked_fill(result.mask, 0))


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_ratios_that_leave_nothing_are_refused(ratio: float) -> None:
    W, H = problem()
    with pytest.raises(CalibrationError, match=r"not in \[0, 1\)"):
        sparsegpt(W, H, ratio=ratio)


@pytest.mark.parametrize("pattern", [(4, 4), (0, 4), (2, 5)])
def test_patterns_that_do_not_fit_are_refused(pattern: tuple[int, int]) -> None:
    W, H = problem()
    with pytest.raises(CalibrationError, match="does not fit"):
        sparsegpt(W, H, ratio=0.5, pattern=pattern)
