"""The search for scales with importance and closed form, against trying all candidates group by group."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlab.algorithms.rtn import round_to_nearest, rtn
from quantlab.algorithms.scales import GridOptions

GRID = GridOptions(4, 32, torch.bfloat16, "signed", clip_steps=10, clip_floor=0.5)


def weighted_errors(W: Tensor, importance: Tensor, grid: GridOptions) -> Tensor:
    """Errors [N, G] float64 of the stored weights."""
    result = round_to_nearest(W, grid, importance=importance)
    width = W.shape[1] // result.scale.shape[1]
    delta = result.q.double() * result.scale.double().repeat_interleave(width, 1) - W.double()
    return (importance.double() * delta.square()).view(len(W), -1, width).sum(2)


def heavy(seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(6, 128) ** 3 * 0.02, torch.exp(torch.randn(128))


@pytest.mark.parametrize("grid", ["absmax", "half", "signed"])
def test_search_finds_the_factor_of_least_weighted_error(grid: str) -> None:
    W, importance = heavy(0)
    options = replace(GRID, grid=grid)
    found = weighted_errors(W, importance, options)
    first = rtn(W, bits=4, group_size=32, scale_dtype=torch.float32, grid=grid).scale
    best = torch.full(found.shape, float("inf"), dtype=torch.float64)
    for step in range(11):
        scale = (first * (1 - 0.05 * step)).bfloat16().double().repeat_interleave(32, 1)
        delta = (W / scale).round().clamp(-8, 7) * scale - W
        best = torch.minimum(best, (importance * delta.square()).view(6, 4, 32).sum(2))
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), grid=st.sampled_from(["absmax", "half", "signed"]), bits=st.sampled_from([4, 8]))
def test_more_search_is_never_worse(seed: int, grid: str, bits: int) -> None:
    W, importance = heavy(seed)
    options = GridOptions(bits, 32, torch.bfloat16, grid)
    last = weighted_errors(W, importance, options)
    for more in (
        replace(options, clip_steps=10),
        replace(options, clip_steps=10, refits=1),
        replace(options, clip_steps=10, refits=3),
    ):
        now = weighted_errors(W, importance, more)
        assert (now <= last * (1 + 1e-5)).all()
        last = now


def test_refit_reaches_the_closed_form() -> None:
    """In float32 the scale converges to the least-squares solution for its integers."""
    W, importance = heavy(0)
    result = round_to_nearest(W, replace(GRID, scale_dtype=torch.float32, refits=30), importance=importance)
    q, w, m = (tensor.double().view(-1, 4, 32) for tensor in (result.q, W, importance.expand_as(W)))
    closed = (m * w * q).sum(2) / (m * q * q).sum(2)
    torch.testing.assert_close(result.scale.double(), closed, rtol=1e-4, atol=0)


def test_equal_importance_is_none() -> None:
    W, _ = heavy(0)
    plain, equal = round_to_nearest(W, GRID), round_to_nearest(W, GRID, importance=torch.ones(128))
    assert torch.equal(plain.q, equal.q)
    assert torch.equal(plain.scale, equal.scale)


def test_groups_of_zeros_and_of_no_importance() -> None:
    W, importance = heavy(0)
    W[:, :32] = 0
    importance[32:64] = 0
    result = round_to_nearest(W, replace(GRID, refits=2), importance=importance)
    assert not result.q[:, :32].any()
    assert result.q[:, 32:64].any()
    assert result.scale.isfinite().all()
