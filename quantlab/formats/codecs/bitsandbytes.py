"""Decodes the layouts of bitsandbytes; see `quantlab.formats.bitsandbytes`."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from quantlab.formats.bitsandbytes import STATE
from quantlab.formats.codecs.checks import check_scales
from quantlab.formats.misfit import misfit
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.number_format import NumberFormat

_STEPS = 127.0


def decode_integers(name: str, stored: Mapping[str, Tensor], number: NumberFormat) -> QuantizedMatrix:
    """The matrix of a weight in LLM.int8(); rows of zeros may have the scale 0, which becomes 1.

    Raises:
        ArtifactError: there is not one scale per row, or the integers are stored in another order.
        CheckpointError: a scale is negative or not finite.
    """
    q, rows = stored[name], stored[f"{name.removesuffix('weight')}SCB"]
    order = stored.get(f"{name}_format")
    if order is not None and bool((order != 0).any()):
        raise misfit(name, "integers in the order of tiles, not of rows")
    if q.dtype != torch.int8 or rows.shape != q.shape[:1]:
        raise misfit(name, f"scales {list(rows.shape)} for {list(q.shape)} of {q.dtype}")
    empty = (rows == 0) & (q == 0).all(dim=1)
    scale = torch.where(empty, torch.ones_like(rows), rows / _STEPS)[:, None]
    check_scales(f"{name.removesuffix('weight')}SCB", scale)
    return QuantizedMatrix(q, scale, number.bits)


def decode_levels(name: str, stored: Mapping[str, Tensor], number: NumberFormat) -> QuantizedMatrix:
    """The matrix of a weight in NF4: its levels [N, K] float32 and magnitudes [N, K / 64] float32.

    Raises:
        ArtifactError: its tensors do not fit.
    """
    state = json.loads(bytes(stored[name.removesuffix("weight") + STATE].tolist()))
    rows, columns = state["shape"]
    levels, packed = stored[f"{name}.quant_map"].to(torch.float32), stored[name].flatten().to(torch.int64)
    magnitudes = _magnitudes(name, stored, state)
    if levels.numel() != 16 or magnitudes.numel() * (number.group_size or columns) != rows * columns:
        raise misfit(name, f"{levels.numel()} levels and {magnitudes.numel()} magnitudes for {[rows, columns]}")
    values = levels[torch.stack([packed >> 4, packed & 15], dim=1).flatten()].view(rows, columns)
    return QuantizedMatrix(values, magnitudes.view(rows, -1), number.bits)


def _magnitudes(name: str, stored: Mapping[str, Tensor], state: Mapping[str, object]) -> Tensor:
    """The magnitudes of blocks [B] float32; bytes are indices of levels, in blocks with a magnitude each."""
    absmax = stored[f"{name}.absmax"]
    if absmax.dtype != torch.uint8:
        return absmax.to(torch.float32)
    nested = stored.get(f"{name}.nested_absmax")
    levels = stored.get(f"{name}.nested_quant_map")
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if nested is None or levels is None or not isinstance(size, int) or not isinstance(offset, float):
        raise misfit(name, "rounded magnitudes without what restores them")
    each = nested.to(torch.float32).repeat_interleave(size)[: absmax.numel()]
    if levels.numel() != 256 or each.numel() != absmax.numel():
        raise misfit(name, f"{nested.numel()} nested magnitudes for {absmax.numel()}")
    return levels.to(torch.float32)[absmax.to(torch.int64)] * each + offset
