"""How many bytes a loaded model holds for its weights."""

from dataclasses import dataclass

from torch import Tensor, nn

from quantlab.runtime.matrices import QuantizedMatrices


@dataclass(frozen=True)
class WeightBytes:
    """Bytes held for weights, and what the same weights would take at two bytes each.

    Attributes:
        total: everything stored in the model: parameters and buffers, scales included; rotary tables are computed and
            do not count, and a tied head counts once.
        fp16: the same weights at two bytes each (scales are no weights).
        quantized: of the quantized matrices alone, scales included.
        quantized_fp16: the quantized matrices at two bytes per weight.
    """

    total: int
    fp16: int
    quantized: int
    quantized_fp16: int


def weight_bytes(model: nn.Module) -> WeightBytes:
    """Count a model of `runtime.load` or `runtime.random_twin`."""
    seen: set[int] = set()
    total = fp16 = quantized = quantized_fp16 = 0
    for module in model.modules():
        held = [tensor for tensor in _stored(module) if id(tensor) not in seen]
        seen.update(id(tensor) for tensor in held)
        nbytes = sum(tensor.nbytes for tensor in held)
        total += nbytes
        if isinstance(module, QuantizedMatrices):
            count, rows, columns = module.shape
            quantized += nbytes
            quantized_fp16 += 2 * count * rows * columns
            fp16 += 2 * count * rows * columns
        else:
            fp16 += sum(2 * tensor.numel() for tensor in held)
    return WeightBytes(total, fp16, quantized, quantized_fp16)


def _stored(module: nn.Module) -> list[Tensor]:
    computed = module._non_persistent_buffers_set
    buffers = [buffer for name, buffer in module.named_buffers(recurse=False) if name not in computed]
    return [*module.parameters(recurse=False), *buffers]
