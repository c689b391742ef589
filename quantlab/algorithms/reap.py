"""REAP: remove the routed experts with the smallest saliency.

Expert j adds g_j(x_t) f_j(x_t) to the residual stream of a token t that is routed to it: its gate value times its output. The
saliency of an expert is the mean norm of that over its tokens, and the least salient experts are removed. An expert to which
no token is routed has saliency 0.

Some routers first select a few groups of experts and then pick experts within them. To keep groups of equal size, the
same number of experts is removed from every group. The remaining experts keep their order, and group g stays group g.

Source: REAP (arXiv 2510.13999), section 4, equation 9.
"""

import torch
from torch import Tensor

from quantlab.errors import CalibrationError, PlanError


def saliency(sums: Tensor, tokens: Tensor) -> Tensor:
    """Mean of g ‖f‖ over the tokens of each expert.

    Args:
        sums: [E], sum of g ‖f‖.
        tokens: [E], tokens routed to each expert.

    Returns:
        [E] float64, 0 for an expert without tokens.

    Raises:
        CalibrationError: a sum is not finite.
    """
    if not sums.isfinite().all():
        raise CalibrationError(
            "The outputs of experts are not finite",
            where=f"experts {(~sums.isfinite()).nonzero().flatten().tolist()}",
            found="a sum of norms that is NaN or infinite",
            fix="check for activations that overflow",
        )
    return torch.where(tokens > 0, sums.to(torch.float64) / tokens.clamp(min=1), 0.0)


def select_experts(scores: Tensor, *, kept: int, groups: int, picked: int, open_groups: int) -> Tensor:
    """Choose the experts of one layer that stay: the most salient of every routing group, the same number in each.

    Args:
        scores: [E] saliency; among equal scores the first experts stay.
        kept: E', number of experts that stay.
        groups: number of routing groups, 1 if the router has none.
        picked: experts per token.
        open_groups: number of groups from which a token's experts are picked.

    Returns:
        [E'] int64, old numbers of the experts that stay, ascending: the rows of the router's weight and bias to keep.

    Raises:
        PlanError: E or E' is not a multiple of `groups`, E' exceeds E, or too few experts stay for the router to pick
            from.
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
    return (order + offsets).flatten()
