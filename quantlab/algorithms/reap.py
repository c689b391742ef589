"""REAP: remove the experts whose routed outputs are smallest.

What expert j adds to the residual stream for a token t it was picked for is g_j(t) f_j(x_t): its gate value times its output.
Its saliency is the mean norm of that over the tokens it was picked for, and the least salient experts go. An expert that was
never picked has saliency 0.

The router picks its experts inside a few of several groups, in some families; so that it finds in every group what it found
before, the same number leaves every group. Experts that stay keep their order, and group g of the old numbering is group g of
the new one.

Source: REAP (arXiv 2510.13999), section 4, equation 9.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.errors import CalibrationError, PlanError


@dataclass(frozen=True)
class Surgery:
    """Which experts stay.

    Attributes:
        kept: [E'] int64, old numbers of the experts that stay, rising: the rows of router weight and bias to take, and the
            expert that comes into each slot.
        slot: [E] int64, new number of every old expert, -1 for one that goes.
    """

    kept: Tensor
    slot: Tensor


def saliency(sums: Tensor, tokens: Tensor) -> Tensor:
    """Mean of g ‖f‖ per token of an expert.

    Args:
        sums: [E], sum of g ‖f‖.
        tokens: [E], how many tokens picked the expert.

    Returns:
        [E] float64, 0 for an expert no token picked.

    Raises:
        CalibrationError: a sum is not finite.
    """
    if not sums.isfinite().all():
        raise CalibrationError(
            "The outputs of experts are not finite",
            where=f"experts {(~sums.isfinite()).nonzero().flatten().tolist()}",
            found="a sum of norms that is NaN or infinite",
            fix="look for activations that overflow",
        )
    return torch.where(tokens > 0, sums.to(torch.float64) / tokens.clamp(min=1), 0.0)


def surgery(scores: Tensor, *, kept: int, groups: int, picked: int, open_groups: int) -> Surgery:
    """Choose the experts of one layer that stay: the most salient of every routing group, equally many of each.

    Args:
        scores: [E] saliency; of equals the first stay.
        kept: E', how many stay.
        groups: routing groups, 1 where the router has none.
        picked: experts per token.
        open_groups: groups a token may pick from.

    Returns:
        Who stays and where to.

    Raises:
        PlanError: E or E' is not a multiple of the groups, more are to stay than there are, or fewer than a token picks.
    """
    experts = len(scores)
    if experts % groups or kept % groups or not 0 < kept <= experts:
        raise PlanError(
            "experts do not divide into routing groups",
            found=f"{kept} of {experts} experts to keep in {groups} groups",
            fix=f"keep a multiple of {groups}, at most {experts}",
        )
    each = kept // groups
    if each * open_groups < picked:
        raise PlanError(
            "the router would pick more experts than stay",
            found=f"{each} of {experts // groups} experts in each of {open_groups} open groups, {picked} picked for every token",
            fix=f"keep at least {-(-picked // open_groups) * groups} experts",
        )
    order = scores.view(groups, -1).argsort(dim=1, descending=True, stable=True)[:, :each].sort(dim=1).values
    offsets = torch.arange(groups, device=scores.device)[:, None] * (experts // groups)
    stay = (order + offsets).flatten()
    slot = torch.full((experts,), -1, dtype=torch.int64, device=scores.device)
    slot[stay] = torch.arange(kept, device=scores.device)
    return Surgery(kept=stay, slot=slot)
