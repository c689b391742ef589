"""Linears, MLPs and norms that replace transformers' modules and multiply by banks of matrices."""

import weakref
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from quantlab.runtime.banks.choice import Matrices, QuantizedMatrices
from quantlab.runtime.banks.dense_product import dense_product
from quantlab.runtime.banks.groups import RowGroups, single_group
from quantlab.runtime.cuda.banks import CudaMatrices, rms_norm
from quantlab.runtime.modules.onednn_layout import data_address, has_pair_layout, supports_blocked_bfloat16
from quantlab.runtime.native import kernels
from quantlab.runtime.native.library import library

FEW_ROWS: Final = 64
"""Number of rows up to which native kernels compute the operations between products, in one thread."""
_PAIRED_ROWS: Final = 8
"""Number of rows up to which the native kernel is faster than oneDNN on the same blocks (Zen 4, 2816x2048)."""
Activation = Callable[[Tensor], Tensor]


class DenseLinear(nn.Linear):
    """nn.Linear that is also fast for float16 and many rows on the CPU."""

    def __init__(self, weight: nn.Parameter, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        result = dense_product(x, self.weight)
        return result if self.bias is None else result + self.bias


class ReorderedLinear(nn.Module):
    """A bfloat16 linear whose weight is stored in oneDNN's blocked layout.

    From a row-major bfloat16 weight, oneDNN makes the blocked layout for every product, which takes up to half of the
    time for few rows. The blocked weight replaces the row-major one, without a second copy. The native kernel for few
    rows reads the same blocks.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(weight, None))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._paired = library() is not None and has_pair_layout(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.out_features)
        if self._paired and x.numel() <= _PAIRED_ROWS * self.in_features:
            flat = x.reshape(-1, self.in_features)
            product = kernels.paired_product(flat, data_address(self.weight), self.out_features, self.bias)
            return product.view(*x.shape[:-1], self.out_features)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return result


def dense_linear(weight: Tensor, bias: Tensor | None) -> DenseLinear | ReorderedLinear:
    """The fastest module for a floating-point weight [N, K]."""
    if weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and supports_blocked_bfloat16():
        return ReorderedLinear(weight, bias)
    return DenseLinear(nn.Parameter(weight, requires_grad=False), bias)


class PackedLinear(nn.Module):
    """A linear that multiplies by a bank of one quantized matrix."""

    def __init__(self, matrices: QuantizedMatrices, bias: Tensor | None) -> None:
        super().__init__()
        self.matrices = matrices
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        _, self.out_features, self.in_features = matrices.shape

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]; latents of MLA have four dimensions."""
        flat = x.reshape(-1, self.in_features)
        result = self.matrices.products(flat, single_group(flat.shape[0]))
        if self.bias is not None:
            result = result + self.bias
        return result.view(*x.shape[:-1], self.out_features)


class StackedLinear(nn.Module):
    """Linears that read the same input, stacked into one matrix row-wise.

    transformers calls the linears one by one with the same tensor, which must not change in between. The first call
    computes all outputs; each call returns its own. Pending outputs are dropped after the last call or when the input
    is freed.
    """

    def __init__(self, linear: PackedLinear, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear = linear
        self.sizes = tuple(sizes)
        self._last: tuple[weakref.ref[Tensor], dict[int, Tensor]] | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[..., K] -> the outputs [..., N] of all linears."""
        return self.linear(x).split(self.sizes, dim=-1)  # type: ignore[no-any-return]

    def part(self, x: Tensor, index: int) -> Tensor:
        """[..., K] -> the output [..., N] of linear `index`."""
        last = self._last  # read once: another thread may call with another input
        left = last[1] if last is not None and last[0]() is x else {}
        result = left.pop(index, None)
        if result is None:
            left = dict(enumerate(self(x)))
            result = left.pop(index)
            self._last = (weakref.ref(x, lambda _: left.clear()), left)
        if not left:
            self._last = None
        return result


class StackedLinearPart(nn.Module):
    """One of the linears of a `StackedLinear`."""

    def __init__(self, stack: StackedLinear, index: int) -> None:
        super().__init__()
        self.stack, self.index = stack, index
        self.in_features, self.out_features = stack.linear.in_features, stack.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return self.stack.part(x, self.index)


class GatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))`` with gate and up in one matrix: rows of gate first, then rows of up."""

    def __init__(self, gate_up: Matrices, down: Matrices, act_fn: Activation) -> None:
        super().__init__()
        self.gate_up, self.down, self.act_fn = gate_up, down, act_fn

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        flat = x.reshape(-1, x.shape[-1])
        return gated_mlp(flat, single_group(flat.shape[0]), self.gate_up, self.down, self.act_fn).view(x.shape)


class EmptyMLP(nn.Module):
    """A gated MLP without hidden channels: the sum over none of them. transformers builds one for zero shared experts."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> zeros [..., H]."""
        return torch.zeros_like(x)


def gated_mlp(x: Tensor, groups: RowGroups, gate_up: Matrices, down: Matrices, act_fn: Activation) -> Tensor:
    """Gated MLP of each row with the matrices of its group: [T, H] -> [T, H]."""
    if isinstance(gate_up, CudaMatrices) and is_silu(act_fn) and len(groups.matrices) == 1:
        return down.products(gate_up.product(x, groups.matrices[0], gated=True), groups)
    both = gate_up.products(x, groups)
    if (
        is_silu(act_fn)
        and both.device.type == "cpu"
        and both.dtype != torch.float32
        and both.shape[0] <= FEW_ROWS
        and library() is not None
    ):
        return down.products(kernels.gate(both), groups)
    gate, up = both.chunk(2, dim=-1)
    return down.products(act_fn(gate).mul_(up), groups)


def is_silu(act_fn: Activation) -> bool:
    """Whether an activation function is ``x * sigmoid(x)``, which kernels compute together with the products."""
    return isinstance(act_fn, nn.SiLU | SiLUActivation)


class Norm(nn.Module):
    """Replaces an RMS norm of transformers; few rows take one operation.

    Args:
        module: transformers' norm, with `weight` [K] and `variance_epsilon`.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.weight = module.get_parameter("weight")
        self.variance_epsilon = float(module.variance_epsilon)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., K]; normalized in float32, rounded to the dtype of x, then multiplied by the weight."""
        if x.is_cuda and x.dtype == self.weight.dtype and x.dtype != torch.float32:
            return rms_norm(x, self.weight, self.variance_epsilon)
        few = (
            x.device.type == "cpu"
            and x.numel() <= FEW_ROWS * x.shape[-1]
            and x.is_contiguous()
            and x.dtype == self.weight.dtype
        )
        if few and x.dtype != torch.float32 and library() is not None:
            return kernels.norm(x, self.weight, self.variance_epsilon)
        wide = x.to(torch.float32)
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * scaled.to(x.dtype)
