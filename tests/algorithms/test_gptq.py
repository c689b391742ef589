"""GPTQ against the paper's column loop in float64 with explicit inverses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlab.algorithms.alps import fitted_on_support
from quantlab.algorithms.gptq import GptqOptions, GptqResult, gptq, gptq_batch
from quantlab.algorithms.rtn import round_to_nearest
from quantlab.algorithms.scales import GridOptions
from quantlab.errors import CalibrationError

GRID = GridOptions(4, 32, torch.bfloat16, "signed", clip_steps=10, clip_floor=0.5)
PLAIN = GptqOptions(rounds=0)


def problem(rows: int = 24, columns: int = 96, *, seed: int = 0, tokens: int = 600) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, correlated inputs of different magnitudes, and their second moment."""
    torch.manual_seed(seed)
    mix = torch.randn(columns // 4, columns)
    X = (torch.randn(tokens, columns // 4) @ mix + torch.randn(tokens, columns)) * torch.exp(torch.randn(columns) * 0.5)
    W = torch.randn(rows, columns) * 0.02 * (1 + 3 * (torch.rand(rows, columns) < 0.02))
    return W, X, X.T @ X / tokens


def column_loop(
    W: Tensor, H: Tensor, scale: Tensor, *, order: list[int], damping: float, removed: Tensor | None = None
) -> Tensor:
    """Integers [N, K] of the column loop; the inverse of the remaining part of H is downdated explicitly."""
    W, H = W.double().clone(), H.double()
    columns = W.shape[1]
    inverse = torch.linalg.inv(H + damping * H.diagonal().mean() * torch.eye(columns, dtype=torch.float64))
    q = torch.zeros(W.shape, dtype=torch.int8)
    width = columns // scale.shape[1]
    for k in order:
        s = scale[:, k // width].double()
        q[:, k] = (W[:, k] / s).round().clamp(-8, 7).to(torch.int8)
        if removed is not None:
            q[removed[:, k], k] = 0
        error = (W[:, k] - q[:, k] * s) / inverse[k, k]
        W -= error[:, None] * inverse[k]
        inverse = inverse - inverse[:, k, None] * inverse[k] / inverse[k, k]
    return q


def best_on_support(W: Tensor, H: Tensor, removed: Tensor) -> Tensor:
    """Start of the pass with removed weights; the tests of SparseGPT compare it with linear systems."""
    unit = H.diagonal().mean()
    start = W.masked_fill(removed, 0)
    return fitted_on_support(
        W[None], (H / unit + 0.01 * torch.eye(len(H)))[None], start[None], removed[None], steps=20
    )[0]


def relative(W: Tensor, result: GptqResult, H: Tensor) -> float:
    delta = W.double() - result.q.double() * result.scale.double().repeat_interleave(
        W.shape[1] // result.scale.shape[1], 1
    )
    return (((delta @ H.double()) * delta).sum() / ((W.double() @ H.double()) * W.double()).sum()).item()


@pytest.mark.slow
@pytest.mark.parametrize("columns", [96, 288])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_integers_are_those_of_the_papers_loop(columns: int, act_order: bool, sparse: bool) -> None:
    """288 columns are more than two blocks."""
    W, _, H = problem(columns=columns, tokens=2000)
    removed = torch.rand(W.shape) < 0.3 if sparse else None
    result = gptq(W, H, GRID, GptqOptions(rounds=0, act_order=act_order), removed=removed)
    assert not result.kept_rtn.any()
    if removed is not None:
        W = best_on_support(W, H, removed)
    order = H.diagonal().argsort(descending=True).tolist() if act_order else list(range(columns))
    expected = column_loop(W, H, result.scale, order=order, damping=0.01, removed=removed)
    # if float32 and float64 break a tie differently, later columns of the row differ too
    same_rows = (result.q == expected).all(dim=1).float().mean()
    assert same_rows >= 0.95


def test_scales_are_searched_with_the_mean_squares_of_the_inputs() -> None:
    W, _, H = problem()
    result = gptq(W, H, GRID, PLAIN)
    importance = H.diagonal() / H.diagonal().mean() + 0.01
    assert torch.equal(result.scale, round_to_nearest(W, GRID, importance=importance).scale)


def test_order_of_columns_is_that_of_permuting_by_hand() -> None:
    """With one scale per row, which does not depend on the order, ordering columns equals permuting the matrices."""
    W, _, H = problem()
    grid = GridOptions(4, None, torch.float32, "signed")
    order = H.diagonal().argsort(descending=True)
    ordered = gptq(W, H, grid, PLAIN)
    by_hand = gptq(W[:, order], H[order][:, order], grid, GptqOptions(rounds=0, act_order=False))
    assert torch.equal(ordered.q[:, order], by_hand.q)
    assert torch.equal(ordered.scale, by_hand.scale)


def test_errors_and_energy_are_those_of_the_outputs() -> None:
    W, X, H = problem()
    result = gptq(W, H, GRID)
    unit = H.diagonal().mean()
    Wh = result.matrix().q.float() * result.scale.float().repeat_interleave(32, 1)
    torch.testing.assert_close(result.error * unit, ((X @ (W - Wh).T) ** 2).mean(0), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(result.energy * unit, ((X @ W.T) ** 2).mean(0), rtol=1e-3, atol=1e-7)
    unrefined = gptq(W, H, GRID, GptqOptions(rounds=0))
    assert result.error.sum() < unrefined.error.sum() < 0.7 * result.rtn_error.sum()


@pytest.mark.parametrize("matrices", [2, 3])
def test_matrices_that_share_inputs_share_them_unharmed(matrices: int) -> None:
    """Concatenated matrices give the results of single ones; the second must not see an H permuted for the first."""
    W, _, H = problem(rows=24)
    parts = W.split(24 // matrices)
    together = gptq(W, H, GRID)
    before = H.clone()
    for index, part in enumerate(parts):
        rows = slice(index * len(part), (index + 1) * len(part))
        alone = gptq(part, H, GRID)
        assert (together.matrix(rows).q == alone.q).float().mean() > 0.999
        assert relative(part, alone, H) == pytest.approx(
            float(together.error[rows].sum() / together.energy[rows].sum()), rel=2e-2
        )
    assert torch.equal(H, before)


def test_a_batch_is_its_members() -> None:
    problems = [problem(seed=seed) for seed in range(3)]
    W, H = torch.stack([p[0] for p in problems]), torch.stack([p[2] for p in problems])
    batch = gptq_batch(W, H, GRID)
    for index in range(3):
        alone = gptq(W[index], H[index], GRID)
        assert (batch.member(index).q == alone.q).float().mean() > 0.999
        torch.testing.assert_close(batch.member(index).rtn_error, alone.rtn_error)


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**60])
def test_the_unit_of_the_inputs_does_not_matter(factor: float) -> None:
    W, _, H = problem()
    C = 0.1 * H.roll(1, 0)
    a, b = gptq(W, H, GRID, C=C), gptq(W, H * factor, GRID, C=C * factor)
    assert torch.equal(a.q, b.q)
    assert torch.equal(a.scale, b.scale)


def test_a_column_without_input_is_rounded_to_nearest() -> None:
    W, X, _ = problem()
    X[:, [3, 40]] = 0
    H = X.T @ X / len(X)
    result = gptq(W, H, GRID, PLAIN)
    assert result.dead == 2
    scale = result.scale.float().repeat_interleave(32, 1)
    nearest = (W / scale).round().clamp(-8, 7)
    assert torch.equal(result.q[:, [3, 40]].float(), nearest[:, [3, 40]])
    assert result.q[:, [3, 40]].any()


def test_no_input_at_all_is_rounding_to_nearest() -> None:
    W, _, H = problem()
    result = gptq(W, torch.zeros_like(H), GRID, PLAIN)
    assert torch.equal(result.q, round_to_nearest(W, GRID, importance=torch.full((96,), 0.01)).q)
    assert result.energy.sum() == 0
    assert not result.failed


def test_fewer_tokens_than_columns() -> None:
    W, X, _ = problem()
    H = X[:20].T @ X[:20] / 20
    result = gptq(W, H, GRID)
    assert not result.failed
    assert result.error.sum() < 0.5 * result.rtn_error.sum()


def test_an_indefinite_hessian_is_damped_more_and_counted() -> None:
    W, _, H = problem()
    H = H / H.diagonal().mean()
    H[0, 1] = H[1, 0] = (H[0, 0] * H[1, 1]).sqrt() + 0.03
    result = gptq(W, H, GRID)
    assert 0.01 < result.damping <= 1
    assert not result.failed
    assert (result.error <= result.rtn_error).all()


def test_a_hopeless_hessian_is_rounding_to_nearest_and_counted() -> None:
    W, _, H = problem()
    other = problem(seed=1)[2]
    bad = H / H.diagonal().mean()
    bad[0, 1] = bad[1, 0] = 50.0
    batch = gptq_batch(torch.stack([W, W]), torch.stack([bad, other]), GRID)
    assert batch.failed.tolist() == [True, False]
    assert batch.member(0).kept_rtn.all()
    importance = bad.diagonal() + batch.damping[0]
    assert torch.equal(batch.q[0], round_to_nearest(W, GRID, importance=importance).q)
    alone = gptq(W, other, GRID)
    assert (batch.q[1] == alone.q).float().mean() > 0.999
    assert batch.damping[1] == alone.damping


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(value: float) -> None:
    W, _, H = problem()
    H[3, 4] = value
    with pytest.raises(CalibrationError, match="not finite"):
        gptq(W, H, GRID)


def test_statistics_of_another_width_are_refused() -> None:
    W, _, H = problem()
    with pytest.raises(CalibrationError, match="wrong shape"):
        gptq(W, H[:, :95], GRID)
    with pytest.raises(CalibrationError, match="wrong shape"):
        gptq(W, H, GRID, C=H[:95, :95])
    with pytest.raises(CalibrationError, match="negative"):
        gptq(W, -H, GRID)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.sampled_from([4, 8]), grid=st.sampled_from(["absmax", "half", "signed"]))
def test_no_row_is_worse_than_rounded_to_nearest(seed: int, bits: int, grid: str) -> None:
    W, _, H = problem(rows=6, columns=64, seed=seed, tokens=40 + seed % 200)
    options = GridOptions(bits, None if bits == 8 else 32, torch.bfloat16, grid, clip_steps=5)
    result = gptq(W, H, options)
    assert (result.error <= result.rtn_error).all()
    assert result.scale.isfinite().all()
    assert (result.scale != 0).all()


def test_removed_weights_are_zero_and_compensated() -> None:
    W, _, H = problem()
    removed = torch.rand(W.shape) < 0.4
    result = gptq(W, H, GRID, removed=removed)
    assert not result.q[removed].any()
    masked = W.masked_fill(removed, 0)
    only_masked = (((W - masked) @ H) * (W - masked)).sum() / H.diagonal().mean()
    assert result.error.sum() < 0.6 * only_masked


def test_nothing_handed_in_is_changed() -> None:
    W, _, H = problem()
    C, removed = 0.1 * H, torch.rand(W.shape) < 0.1
    before = [tensor.clone() for tensor in (W, H, C, removed)]
    gptq(W, H, GRID, C=C, removed=removed)
    assert all(torch.equal(a, b) for a, b in zip(before, (W, H, C, removed), strict=True))


def shifted(W: Tensor, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the original model, and H and C for the inputs of a changed one."""
    torch.manual_seed(7)
    original = X + 0.2 * X.roll(1, 1) + 0.1 * torch.randn_like(X)
    return original, X.T @ X / len(X), (original - X).T @ X / len(X)


def test_errors_with_correction_are_those_of_the_original_outputs() -> None:
    """Errors differ like the sampled objective, and are zero at the real-valued target."""
    W, X, _ = problem()
    original, H, C = shifted(W, X)
    result = gptq(W, H, GRID, C=C)
    unit = H.diagonal().mean()

    def sampled(Wh: Tensor) -> Tensor:
        return ((original @ W.T - X @ Wh.T).double() ** 2).mean(0)

    nearest = round_to_nearest(W, GRID, importance=H.diagonal() / unit + 0.01)
    expand = [m.q.float() * m.scale.float().repeat_interleave(32, 1) for m in (result.matrix(), nearest)]
    difference = sampled(expand[1]) - sampled(expand[0])
    torch.testing.assert_close(((result.rtn_error - result.error) * unit).double(), difference, rtol=1e-2, atol=1e-6)
    target = W + W @ C @ torch.linalg.inv(H + 0.01 * unit * torch.eye(96))
    torch.testing.assert_close(
        (result.error * unit).double(), sampled(expand[0]) - sampled(target), rtol=1e-2, atol=1e-6
    )


@pytest.mark.slow
def test_correction_helps_and_its_strength_is_between() -> None:
    W, X, _ = problem()
    original, H, C = shifted(W, X)
    sampled = []
    for strength in (0.0, 0.5, 1.0):
        result = gptq(W, H, GRID, GptqOptions(correction=strength), C=C)
        Wh = result.q.float() * result.scale.float().repeat_interleave(32, 1)
        sampled.append(((original @ W.T - X @ Wh.T) ** 2).mean().item())
    assert sampled[2] < sampled[1] < sampled[0]
    assert torch.equal(gptq(W, H, GRID, GptqOptions(correction=0.0), C=C).q, gptq(W, H, GRID).q)
