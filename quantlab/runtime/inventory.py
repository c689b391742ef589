"""Bytes of a loaded model's weights, and the quantized weights for which no kernel exists."""

from collections import Counter
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor, nn

from quantlab.numerics.number_format import NumberFormat
from quantlab.runtime.banks.choice import QuantizedMatrices, choose_bank
from quantlab.runtime.banks.dense import DenseMatrices
from quantlab.runtime.banks.expanded import ExpandedMatrices

_MARK: Final = "quantlab_unpacked"
"""Attribute of a module that holds a quantized weight in floating point: (name of the number format, reasons)."""


@dataclass(frozen=True)
class WeightBytes:
    """Bytes held for weights, and the bytes of the same weights in 16 bits.

    Attributes:
        total: parameters and buffers of the model, scales included. Rotary tables are computed and do not count; a tied
            head counts once.
        fp16: the same weights at two bytes each; scales do not count as weights.
        quantized: the quantized matrices alone, scales included.
        quantized_fp16: the quantized matrices at two bytes per weight.
    """

    total: int
    fp16: int
    quantized: int
    quantized_fp16: int


def weight_bytes(model: nn.Module) -> WeightBytes:
    """Bytes of the weights of a model made by `runtime.load` or `runtime.random_twin`."""
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


@dataclass(frozen=True)
class Expanded:
    """Quantized matrices for which the device has no kernel.

    Attributes:
        format: name of their number format.
        count: number of matrices; matrices that are stored as one, such as gate and up, count once.
        reasons: the reason of each bank of the device for declining.
        held: "packed" if the stored integers are expanded for every product, "dense" if they were expanded when loaded.
    """

    format: str
    count: int
    reasons: tuple[str, ...]
    held: Literal["packed", "dense"]


def expanded(model: nn.Module) -> tuple[Expanded, ...]:
    """The expanded matrices of a model made by `runtime.load` or `runtime.random_twin`, by format and reasons."""
    found: Counter[tuple[str, tuple[str, ...], Literal["packed", "dense"]]] = Counter()
    for module in model.modules():
        if isinstance(module, ExpandedMatrices):
            found[module.number.name, module.reasons, "packed"] += module.shape[0]
        elif (mark := getattr(module, _MARK, None)) is not None:
            found[*mark, "dense"] += module.shape[0] if isinstance(module, DenseMatrices) else 1
    return tuple(Expanded(name, count, reasons, held) for (name, reasons, held), count in sorted(found.items()))


def mark_unpacked(module: nn.Module, number: NumberFormat, device_type: str) -> None:
    """Record on a module that it holds a quantized weight in floating point, with the reasons."""
    bank, reasons = choose_bank(number, (0, 0), torch.float32, device_type)
    assert bank is None, "a bank would hold it"
    if number.activations is not None:
        reasons += ("activations are not rounded",)
    setattr(module, _MARK, (number.name, reasons))
