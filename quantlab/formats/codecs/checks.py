"""Checks of stored values: usable scales, columns in order, zero points in the middle of the grid."""

import torch
from torch import Tensor

from quantlab.errors import ArtifactError, CheckpointError


def check_scales(name: str, scale: Tensor, *, signed: bool = False) -> None:
    """Refuse scales that cannot multiply anything.

    Args:
        name: name of the tensor of scales.
        scale: its values, of any shape and floating dtype.
        signed: whether scales may be negative: integer grids use the sign to reach the end of their range.

    Raises:
        CheckpointError: a scale is zero, negative without `signed`, or not finite.
    """
    values = scale.to(torch.float32)
    usable = values.isfinite() & (values != 0 if signed else values > 0)
    if bool(usable.all()):
        return
    broken = (~usable).nonzero()
    first = broken[0].tolist()
    raise CheckpointError(
        "a scale is not usable",
        where=name,
        found=f"{values[tuple(first)].item():g} at {first}; {len(broken)} of {scale.numel()} scales are zero, "
        + ("" if signed else "negative ")
        + "or not finite",
        fix="download the shard again; if the error persists, the checkpoint itself is damaged",
    )


def check_order(name: str, group_of: Tensor, *, columns: int, groups: int) -> None:
    """Refuse columns that were reordered by activation.

    Args:
        name: name of the weight.
        group_of: [K] group index of every column; all -1 if not recorded.
        columns: K.
        groups: scales per row.

    Raises:
        ArtifactError: the groups are not consecutive blocks of equal length.
    """
    if group_of.numel() == columns and bool((group_of == -1).all()):
        return
    expected = torch.arange(columns, device=group_of.device) // (columns // groups)
    if group_of.shape != expected.shape or not torch.equal(group_of.to(torch.int64), expected):
        raise ArtifactError(
            "the columns of a weight are ordered by activation",
            where=name,
            found="an index of groups (g_idx) that is not in order",
            fix="quantize again with desc_act=False, or with an activation order that is folded back (actorder static, GAR)",
        )


def asymmetric(name: str) -> ArtifactError:
    """The error for zero points off the middle of the grid in a format described as symmetric."""
    return ArtifactError(
        "a weight is quantized asymmetrically",
        where=name,
        found="zero points that are not the middle of the grid",
        fix="quantize again with symmetric integers (sym=True, symmetric: true)",
    )
