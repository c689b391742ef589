"""A replay of recorded calls on new tensor contents equals a call of the function."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from quantlab.runtime.native import kernels
from quantlab.runtime.native.calls import IndexTensor
from quantlab.runtime.native.library import library, status
from quantlab.runtime.native.record import CannotRepeatError, Recorded


def mixed(x: Tensor, index: Tensor) -> Tensor:
    """Operators whose schemas do not distinguish views from copies, in-place operators, and several results."""
    wide = x.to(torch.float32)
    same = wide.to(torch.float32).contiguous()
    crossed = same.t().reshape(x.shape)
    first, second = crossed.chunk(2, dim=1)
    best = torch.topk(second, 2, dim=1)
    first.mul_(2).add_(best.values.sum(1, keepdim=True))
    out = torch.zeros(x.shape[0], first.shape[1])
    out[1:] = functional.silu(first[:-1])
    out.index_copy_(0, index, first.index_select(0, index).flip(0))
    return out.to(x.dtype).view(-1)


def test_operators_of_torch_run_again() -> None:
    generator = torch.Generator().manual_seed(0)
    x, index = torch.randn(6, 8, generator=generator).bfloat16(), torch.tensor([0, 5])
    with torch.inference_mode():
        recorded = Recorded(lambda: mixed(x, index))
        assert torch.equal(recorded.result, mixed(x.clone(), index))
        for seed in range(3):
            x.copy_(torch.randn(6, 8, generator=generator))
            index.copy_(torch.tensor([seed, seed + 2]))
            assert torch.equal(recorded.run(), mixed(x.clone(), index))


@pytest.mark.skipif(library() is None, reason=status())
def test_replayed_kernels_use_the_outputs_of_replayed_operators() -> None:
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(64).bfloat16()

    def function() -> Tensor:
        return kernels.add(kernels.gate(kernels.norm(x, weight, 1e-6) * 2), x[:, :32] + 1)

    recorded = Recorded(function)
    before = recorded.result.clone()
    x.copy_(torch.randn(3, 64))
    found = recorded.run()
    assert torch.equal(found, function())
    assert not torch.equal(found, before)


@pytest.mark.skipif(library() is None, reason=status())
def test_functions_that_read_tensor_elements_are_not_recorded() -> None:
    x = torch.tensor([3, 1])
    for reads in (
        lambda: x * int(x[0]),
        lambda: x * IndexTensor(x)[1],
        lambda: x * sum(IndexTensor(x)),
    ):
        with pytest.raises(CannotRepeatError):
            Recorded(reads)
    assert list(IndexTensor(x)) == [3, 1], "reading elements is allowed outside a recording"
