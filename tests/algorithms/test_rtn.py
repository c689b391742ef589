"""RTN against a loop over groups that follows the definitions."""

import pytest
import torch
from torch import Tensor

from quantlab.algorithms.rtn import round_batch, round_to_nearest, rtn
from quantlab.algorithms.scales import GridOptions
from quantlab.numerics import bands

CASES = [(4, 128), (4, 32), (4, None), (8, None), (8, 64)]


def oracle(group: Tensor, *, bits: int, grid: str, dtype: torch.dtype, factor: float = 1.0) -> tuple[float, list[int]]:
    """One group, one weight at a time, in Python floats."""
    weights = group.tolist()
    largest = max(weights, key=lambda weight: (abs(weight), -weight))
    half = 2 ** (bits - 1)
    scale = {"absmax": abs(largest) / (half - 1), "half": 2 * abs(largest) / (2 * half - 1), "signed": -largest / half}[
        grid
    ]
    stored = torch.tensor(scale * factor, dtype=torch.float32).to(dtype).item() or 1.0
    return stored, [max(-half, min(half - 1, round(weight / stored))) for weight in weights]


@pytest.mark.parametrize("grid", ["absmax", "half", "signed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "group"), CASES)
def test_every_integer_and_scale_equals_the_oracle(bits: int, group: int | None, grid: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    W = torch.randn(5, 256, dtype=torch.bfloat16) * 0.05
    result = rtn(W, bits=bits, group_size=group, scale_dtype=dtype, grid=grid)
    width = group or 256
    for row in range(5):
        for index in range(256 // width):
            part = slice(index * width, (index + 1) * width)
            scale, integers = oracle(W[row, part].float(), bits=bits, grid=grid, dtype=dtype)
            assert result.scale[row, index].item() == scale
            # float32 and float64 division may differ on exact ties only
            differs = [i for i, (a, b) in enumerate(zip(result.q[row, part].tolist(), integers, strict=True)) if a != b]
            assert all(abs(W[row, part][i].item() / scale % 1 - 0.5) < 1e-5 for i in differs)


def test_signed_grid_puts_the_extreme_on_the_lowest_point() -> None:
    W = torch.tensor([[0.1, -0.2, 0.8, 0.3] * 8, [0.1, -0.8, 0.2, 0.3] * 8])
    result = rtn(W, bits=4, group_size=32, scale_dtype=torch.bfloat16, grid="signed")
    assert result.q[0, 2] == -8
    assert result.scale[0, 0] < 0
    assert result.q[1, 1] == -8
    assert result.scale[1, 0] > 0


def test_zeros_stay_zeros_on_every_grid() -> None:
    W = torch.randn(4, 128)
    W[:, ::3] = 0
    W[2] = 0
    for grid in ("absmax", "half", "signed"):
        result = rtn(W, bits=4, group_size=32, scale_dtype=torch.bfloat16, grid=grid, clip_steps=20)
        assert not result.dequantize(torch.float32)[W == 0].any()
        assert result.scale.isfinite().all()


@pytest.mark.parametrize("grid", ["absmax", "signed"])
def test_clip_search_finds_the_best_factor_of_every_group(grid: str) -> None:
    torch.manual_seed(3)
    W = torch.randn(3, 128) ** 3
    result = rtn(W, bits=4, group_size=64, scale_dtype=torch.bfloat16, grid=grid, clip_steps=10, clip_floor=0.5)
    for row in range(3):
        for index in range(2):
            part = slice(index * 64, (index + 1) * 64)
            errors = []
            for step in range(11):
                scale, integers = oracle(W[row, part], bits=4, grid=grid, dtype=torch.bfloat16, factor=1 - 0.05 * step)
                errors.append(sum((q * scale - w) ** 2 for q, w in zip(integers, W[row, part].tolist(), strict=True)))
            exact = result.q[row, part].double() * result.scale[row, index].double()
            assert (exact - W[row, part].double()).square().sum().item() == pytest.approx(min(errors), rel=1e-4)


def test_the_weight_is_not_changed() -> None:
    W = torch.randn(4, 64)
    before = W.clone()
    rtn(W, bits=4, group_size=32, scale_dtype=torch.bfloat16, grid="signed", clip_steps=5)
    assert torch.equal(W, before)


@pytest.mark.parametrize("grid", ["signed", "minmax"])
def test_matrices_of_a_batch_are_rounded_as_if_each_were_alone(grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of rows cross from one matrix into the next, and every row keeps the importance of its own matrix."""
    monkeypatch.setattr(bands, "_WEIGHTS", {"cpu": 3 * 64})
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(4, 5, 64, generator=generator)
    importance = torch.rand(4, 64, generator=generator)
    options = GridOptions(4, 32, torch.bfloat16, grid, clip_steps=8, clip_floor=0.5, refits=1)
    together = round_batch(W, options, importance=importance)
    for index in range(4):
        alone = round_to_nearest(W[index], options, importance=importance[index])
        rows = slice(5 * index, 5 * index + 5)
        assert torch.equal(together.q[rows], alone.q)
        assert torch.equal(together.scale[rows], alone.scale)
        assert grid != "minmax" or torch.equal(together.zero[rows], alone.zero)
