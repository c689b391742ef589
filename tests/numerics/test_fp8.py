"""FP8 blocks against an element-by-element reference, ragged shapes included."""

import pytest
import torch

from quantlab.numerics.fp8 import dequantize_blocks, quantize_blocks
from tests.checkpoints import reference_dequantize

SHAPES = [(128, 128), (160, 256), (576, 128), (1, 1), (129, 127), (64, 300)]


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_equals_elementwise_reference(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)) + 0.1
    result = dequantize_blocks(weight, scale, block=(128, 128), dtype=torch.bfloat16)
    assert torch.equal(result, reference_dequantize(weight, scale))


@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_rounds_each_value_to_the_nearest_point_of_its_block(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    weight, scale = quantize_blocks(matrix, block=(128, 128))
    points = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = points[points.isfinite()]
    row_scale = scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    scaled = matrix / row_scale
    nearest = (scaled[:, :, None] - points).abs().amin(dim=2)
    assert torch.allclose((scaled - weight.float()).abs(), nearest, atol=1e-4)
    assert weight.float().abs().max() == 448


def test_zero_block_stays_zero() -> None:
    weight, scale = quantize_blocks(torch.zeros(200, 130), block=(128, 128))
    assert not dequantize_blocks(weight, scale, block=(128, 128), dtype=torch.float32).any()
    assert scale.isfinite().all()


def test_a_grid_that_does_not_fit_is_refused() -> None:
    weight = torch.zeros(160, 256).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"\(1, 2\) does not fit a 160x256 weight"):
        dequantize_blocks(weight, torch.ones(1, 2), block=(128, 128), dtype=torch.float32)
