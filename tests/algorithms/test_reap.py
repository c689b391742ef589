"""Expert saliency and selection against loops over tokens and experts."""

import pytest
import torch

from quantlab.algorithms.reap import routed_sums, saliency, surgery
from quantlab.errors import CalibrationError, PlanError


def test_saliency_is_the_mean_norm_of_what_an_expert_added() -> None:
    torch.manual_seed(0)
    index = torch.stack([torch.randperm(7)[:3] for _ in range(40)])
    gate, outputs = torch.rand(40, 3), torch.randn(40, 3, 11)
    parts = [
        routed_sums(index[part], gate[part], outputs[part].norm(dim=2), experts=8)
        for part in (slice(25), slice(25, 40))
    ]
    scores = saliency(parts[0][0] + parts[1][0], parts[0][1] + parts[1][1])
    for expert in range(8):
        added = [
            (gate[t, slot] * outputs[t, slot]).norm().item()
            for t in range(40)
            for slot in range(3)
            if index[t, slot] == expert
        ]
        assert scores[expert].item() == pytest.approx(sum(added) / len(added) if added else 0, rel=1e-5)
    assert scores[7] == 0


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_most_salient_of_every_group_stay_in_order(groups: int) -> None:
    torch.manual_seed(0)
    scores = torch.randn(16)
    result = surgery(scores, kept=8, groups=groups, picked=2, open_groups=1)
    each = 16 // groups
    expected = []
    for group in range(groups):
        members = range(group * each, (group + 1) * each)
        expected += sorted(sorted(members, key=lambda e: -scores[e].item())[: 8 // groups])
    assert result.kept.tolist() == expected
    assert [result.slot[e].item() for e in expected] == list(range(8))
    assert (result.slot == -1).sum() == 8


def test_of_equals_the_first_stay() -> None:
    assert surgery(torch.zeros(8), kept=4, groups=2, picked=2, open_groups=1).kept.tolist() == [0, 1, 4, 5]


def test_the_router_finds_enough_experts() -> None:
    """Two open groups of three experts hold six."""
    surgery(torch.rand(16), kept=12, groups=4, picked=6, open_groups=2)
    with pytest.raises(PlanError, match="more experts than stay"):
        surgery(torch.rand(16), kept=8, groups=4, picked=6, open_groups=2)


@pytest.mark.parametrize(("kept", "groups"), [(7, 2), (0, 1), (17, 1), (6, 3)])
def test_numbers_that_do_not_divide_are_refused(kept: int, groups: int) -> None:
    with pytest.raises(PlanError, match="do not divide"):
        surgery(torch.rand(16), kept=kept, groups=groups, picked=1, open_groups=1)


def test_outputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"experts are not finite\n  where: experts \[1\]"):
        saliency(torch.tensor([1.0, float("nan")]), torch.tensor([1, 1]))
