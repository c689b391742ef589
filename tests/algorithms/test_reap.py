"""Expert saliency and selection against loops over tokens and experts."""

import pytest
import torch

from quantlab.algorithms.reap import saliency, select_experts
from quantlab.errors import CalibrationError, PlanError


def test_saliency_is_the_mean_over_the_tokens_of_an_expert() -> None:
    scores = saliency(torch.tensor([6.0, 0.0, 5.0]), torch.tensor([3, 0, 10]))
    assert scores.tolist() == [2.0, 0.0, 0.5]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_most_salient_of_every_group_stay_in_order(groups: int) -> None:
    torch.manual_seed(0)
    scores = torch.randn(16)
    result = select_experts(scores, kept=8, groups=groups, picked=2, open_groups=1)
    each = 16 // groups
    expected = []
    for group in range(groups):
        members = range(group * each, (group + 1) * each)
        expected += sorted(sorted(members, key=lambda e: -scores[e].item())[: 8 // groups])
    assert result.tolist() == expected


def test_ties_keep_the_first_experts() -> None:
    assert select_experts(torch.zeros(8), kept=4, groups=2, picked=2, open_groups=1).tolist() == [0, 1, 4, 5]


def test_the_router_finds_enough_experts() -> None:
    """Two open groups of three experts have six experts."""
    select_experts(torch.rand(16), kept=12, groups=4, picked=6, open_groups=2)
    with pytest.raises(PlanError, match="more experts than stay"):
        select_experts(torch.rand(16), kept=8, groups=4, picked=6, open_groups=2)


@pytest.mark.parametrize(("kept", "groups"), [(7, 2), (0, 1), (17, 1), (6, 3)])
def test_numbers_that_do_not_divide_are_refused(kept: int, groups: int) -> None:
    with pytest.raises(PlanError, match="do not divide"):
        select_experts(torch.rand(16), kept=kept, groups=groups, picked=1, open_groups=1)


def test_outputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"experts are not finite\n  where: experts \[1\]"):
        saliency(torch.tensor([1.0, float("nan")]), torch.tensor([1, 1]))
