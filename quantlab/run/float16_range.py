"""The range of float16, checked on the source before the first block: a weight beyond it would end a run after hours.

bfloat16 and float32 hold numbers up to 3e38, float16 up to 65504. Only variants that store float16 are checked, and only if some
variant calibrates: others reach the weight as soon as this check does. For an FP8 weight the scales alone are read.
"""

from collections.abc import Iterable
from typing import Final

import torch

from quantlab.errors import CheckpointError
from quantlab.formats.stored import StoredWeights
from quantlab.plan.model import Step, VariantPlan
from quantlab.run.weights import read_finite

_LARGEST: Final = torch.finfo(torch.float16).max
_LARGEST_FP8: Final = torch.finfo(torch.float8_e4m3fn).max


def check_float16_range(variants: Iterable[VariantPlan], source: StoredWeights) -> None:
    """Refuse variants that store a weight of the source in float16 which is too large for it.

    Args:
        variants: the variants that are about to be made.
        source: the weights of the source.

    Raises:
        CheckpointError: a weight is too large, cannot be read or is not finite.
    """
    variants = list(variants)
    if not any(variant.calibration for variant in variants):
        return
    checked: set[str] = set()
    for variant in variants:
        for step in variant.steps:
            narrowed = step.dtype == "F16" and step.source.dtype != "F16" and step.outputs
            if narrowed and step.tensor.name not in checked:
                checked.add(step.tensor.name)
                _check(step, source, variant=variant.name)


def _check(step: Step, source: StoredWeights, *, variant: str) -> None:
    if step.scale is not None:
        scale = source.reader.read(step.scale.name).float().abs().max().item()
        if scale * _LARGEST_FP8 <= _LARGEST:
            return
    weight = read_finite(step, source)
    largest = weight.abs().max().item() if weight.numel() else 0.0
    if largest > _LARGEST:
        raise CheckpointError(
            "a weight is too large for float16",
            where=f"variant {variant}, {step.source.file}, {step.tensor.name}",
            found=f"largest magnitude {largest:.4g}; float16 ends at {_LARGEST:g}",
            fix="cast to bfloat16 instead",
        )
