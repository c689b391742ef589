"""Products that vLLM's CPU build lacks, in plain torch, for `vllm.py`.

vLLM chooses schemes and loads parameters as always; only where it finds no kernel do these compute, from the parameters that it
loaded. They are offered behind vLLM's own kernels, through its table of kernels where it has one.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any


def allow_plain_products(replaced: set[str], dtype: str) -> None:
    """Offer plain torch to vLLM behind its own kernels: it is chosen where vLLM finds none.

    Args:
        replaced: receives the products that plain torch computes.
        dtype: of config.json; packed integers are expanded to it, as in an engine that computes in it.
    """
    import torch
    from vllm import _custom_ops  # noqa: F401 - loads the operators
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    linear.register_linear_kernel(packed_linear(replaced, dtype), PlatformEnum.CPU, "mp")
    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].append(block_linear(replaced))
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):  # the kernel is there, and the operator that it calls is not
        os.environ["VLLM_DISABLED_KERNELS"] = "CPUWNA16LinearKernel"
    replace_packed_experts(replaced, dtype)
    replace_int8_experts(replaced)
    replace_block_experts(replaced)


def unpacked(words: Any, bits: int, dim: int) -> Any:
    """Words int32 along a dimension -> unsigned numbers float32, 32 / bits from each word, lowest bits first."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    numbers = (words.movedim(dim, -1)[..., None] >> shifts) & ((1 << bits) - 1)
    return numbers.flatten(-2).movedim(-1, dim).float()


def dequantized(numbers: Any, scale: Any, zero: Any) -> Any:
    """Numbers [..., N, K], scales [..., N, groups], a zero point for all or [..., N, groups] -> weights float32 [..., N, K]."""
    groups = numbers.unflatten(-1, (scale.shape[-1], -1))
    return ((groups - (zero if isinstance(zero, int) else zero[..., None])) * scale.float()[..., None]).flatten(-2)


def expanded(weight: Any, scale: Any) -> Any:
    """Float8 [..., N, K] and the scale of each block of 128 x 128 -> float32."""
    rows, columns = weight.shape[-2:]
    spread = scale.float().repeat_interleave(128, dim=-2).repeat_interleave(128, dim=-1)
    return weight.float() * spread[..., :rows, :columns]


def as_int8(x: Any) -> Any:
    """Values rounded to int8 with a scale per row, the largest number being 127."""
    scale = (x.abs().amax(dim=-1, keepdim=True) / 127).clamp_min(1e-30)
    return (x / scale).round() * scale


def packed_linear(replaced: set[str], dtype: str) -> type:
    """Weight-only integers: weights are expanded once."""
    import torch
    from vllm.model_executor.kernels.linear import MPLinearKernel

    class TorchPackedLinear(MPLinearKernel):
        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            words, scale, zeros = self._get_weight_params(layer)
            kind = self.config.weight_type
            replaced.add(f"linear with {kind} weights")
            numbers = unpacked(words.data, kind.size_bits, words.packed_dim)
            zero = unpacked(zeros.data, kind.size_bits, 0) if self.config.zero_points else kind.bias
            weight = dequantized(numbers, scale.data, zero).to(getattr(torch, dtype))
            layer.plain_weight = weight.to(self.config.act_type)

        def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> Any:
            return torch.nn.functional.linear(x, layer.plain_weight, bias)

    return TorchPackedLinear


def block_linear(replaced: set[str]) -> type:
    """FP8 in blocks of 128 x 128; inputs are not rounded, as in vLLM's kernels for CPUs with AMX."""
    from vllm.model_executor.kernels.linear import Fp8BlockScaledMMLinearKernel

    class TorchBlockLinear(Fp8BlockScaledMMLinearKernel):
        apply_input_quant = False

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            replaced.add("linear with FP8 blocks")

        def apply_block_scaled_mm(self, A: Any, B: Any, As: Any, Bs: Any) -> Any:  # noqa: N803 - vLLM's names
            return A.float() @ expanded(B, Bs).t()

    return TorchBlockLinear


def plain_experts(round_inputs: Callable[[Any], Any]) -> type:
    """Experts in plain torch on weights w13 [E, 2 I, H] and w2 [E, H, I]; inputs of both products are rounded."""
    import torch
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    class TorchExperts(CPUUnquantizedExperts):
        def process_weights_after_loading(self, layer: Any) -> None:
            pass

        def apply(self, output: Any, hidden_states: Any, w1: Any, w2: Any, *rest: Any, **named: Any) -> None:
            weights, experts, activation = (
                rest[place] if place < len(rest) else named[name]
                for place, name in enumerate(("topk_weights", "topk_ids", "activation"))
            )
            assert activation == MoEActivation.SILU, f"experts in plain torch have SiLU, not {activation}"
            x = hidden_states.float()
            total = torch.zeros_like(x)
            for expert in experts.unique().tolist():
                tokens, slots = (experts == expert).nonzero(as_tuple=True)
                gate, up = (round_inputs(x[tokens]) @ w1[expert].float().t()).chunk(2, dim=-1)
                inner = round_inputs(torch.nn.functional.silu(gate) * up)
                y = inner @ w2[expert].float().t()
                total.index_add_(0, tokens, y * weights[tokens, slots, None].float())
            output.copy_(total)

    return TorchExperts


def use_plain_experts(method: Any, layer: Any, weights: Sequence[Any], round_inputs: Callable[[Any], Any]) -> None:
    """Give a layer of experts its expanded weights, and its method the experts in plain torch."""
    import torch
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    for name, weight in zip(("w13_weight", "w2_weight"), weights, strict=True):
        layer._parameters.pop(name, None)
        layer.register_parameter(name, torch.nn.Parameter(weight.to(method.moe.in_dtype), requires_grad=False))
    method.moe_quant_config = FusedMoEQuantConfig.make()
    method.moe_kernel = unquantized.make_unquantized_moe_kernel(
        quant_config=method.moe_quant_config,
        moe_config=method.moe,
        backend=unquantized.UnquantizedMoeBackend.CPU,
        experts_cls=plain_experts(round_inputs),
        routing_tables=layer._expert_routing_tables(),
    )


def replace_packed_experts(replaced: set[str], dtype: str) -> None:
    import torch
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as module,
    )

    class PackedExperts(module.CompressedTensorsWNA16MoEMethod):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            self.plain = False
            try:
                super().__init__(*arguments, **named)
            except NotImplementedError:  # no backend
                self.plain, self.is_marlin, self.is_transposed = True, False, False

        def process_weights_after_loading(self, layer: Any) -> None:
            if not self.plain:
                super().process_weights_after_loading(layer)
                return
            replaced.add(f"experts with {self.quant_type} weights")
            use_plain_experts(self, layer, [self.weights_of(layer, part) for part in ("w13", "w2")], lambda x: x)

        def weights_of(self, layer: Any, part: str) -> Any:
            numbers = unpacked(getattr(layer, f"{part}_weight_packed").data, self.num_bits, -1)
            zeros = getattr(layer, f"{part}_weight_zero_point", None)
            zero = self.quant_type.bias if zeros is None else unpacked(zeros.data, self.num_bits, -2)
            return dequantized(numbers, getattr(layer, f"{part}_weight_scale").data, zero).to(getattr(torch, dtype))

    module.CompressedTensorsWNA16MoEMethod = PackedExperts


def replace_int8_experts(replaced: set[str]) -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_int8 as module,
    )

    class Int8Experts(module.CompressedTensorsW8A8Int8MoEMethod):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            self.plain = False
            try:
                super().__init__(*arguments, **named)
            except NotImplementedError:  # no backend
                self.plain = True

        def process_weights_after_loading(self, layer: Any) -> None:
            if not self.plain:
                super().process_weights_after_loading(layer)
                return
            replaced.add("experts with int8 weights and inputs")
            pairs = ((layer.w13_weight, layer.w13_weight_scale), (layer.w2_weight, layer.w2_weight_scale))
            use_plain_experts(self, layer, [weight.data.float() * scale.data for weight, scale in pairs], as_int8)

    module.CompressedTensorsW8A8Int8MoEMethod = Int8Experts


def replace_block_experts(replaced: set[str]) -> None:
    from vllm.model_executor.layers.quantization import fp8 as module

    class BlockExperts(module.Fp8MoEMethod):
        def process_weights_after_loading(self, layer: Any) -> None:
            if self.experts_cls is not None or not self.block_quant:
                super().process_weights_after_loading(layer)
                return
            replaced.add("experts with FP8 blocks")
            pairs = ((layer.w13_weight, layer.w13_weight_scale_inv), (layer.w2_weight, layer.w2_weight_scale_inv))
            use_plain_experts(self, layer, [expanded(weight.data, scale.data) for weight, scale in pairs], lambda x: x)

    module.Fp8MoEMethod = BlockExperts
