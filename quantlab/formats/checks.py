"""What every layout of integers has to keep: scales that fit, columns in their own order, zero points in the middle."""

import torch
from torch import Tensor

from quantlab.errors import ArtifactError


def misfit(name: str, found: str) -> ArtifactError:
    """The error of a weight whose parts contradict each other or config.json."""
    return ArtifactError(
        "the parts of a quantized weight disagree with each other or with config.json",
        where=name,
        found=found,
        fix="use the config.json and the shards of one release",
    )


def check_order(name: str, group_of: Tensor, *, columns: int, groups: int) -> None:
    """Refuse columns that were reordered by activation.

    Args:
        name: the weight's.
        group_of: [K] the group of every column; -1 throughout says nothing.
        columns: K.
        groups: scales per row.

    Raises:
        ArtifactError: the groups are not runs of equal length.
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
    """The error of zero points anywhere but in the middle of the grid."""
    return ArtifactError(
        "a weight is quantized asymmetrically",
        where=name,
        found="zero points that are not the middle of the grid",
        fix="quantize again with symmetric integers (sym=True, symmetric: true)",
    )
