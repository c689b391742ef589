"""Recommendations on constructed cases: ties, overlaps, missing cells, and intervals that support no recommendation."""

from collections.abc import Callable

from quantlab.evaluation.record import Record
from quantlab.report.matrix.matrix import build_matrix
from quantlab.report.matrix.recommend import Recommendation, recommend

Make = Callable[..., Record]


def recommended(*records: Record) -> dict[str, Recommendation]:
    return {found.goal: found for found in recommend(build_matrix(records))}


def test_quickstart(recipe: list[Record]) -> None:
    found = recommended(*recipe)
    assert {goal: each.variant for goal, each in found.items()} == {
        "quality": "int8_weight",
        "memory": "w4a16",
        "speed": "w4a16",
    }
    assert "0.05 % (−0.09 to 0.19)" in found["quality"].sentence
    assert "65,536 tokens" in found["quality"].sentence
    assert "pruned-8-w4a16 takes about the same memory" in found["memory"].sentence
    assert "1.58× (1.53 to 1.63) at 8" in found["speed"].sentence


def test_quality_takes_the_smallest_that_keeps_it(recipe: list[Record], constructed: Make) -> None:
    found = recommended(
        recipe[0],
        constructed("large", loss=(0, 0.1), rise=(0, 0.1), memory=90),
        constructed("small", loss=(0.1, 0.2), rise=(0.1, 0.2), memory=40),
    )
    assert found["quality"].variant == "small"
    assert "no measurable loss" in found["quality"].sentence


def test_an_interval_too_wide_to_rule_out_a_loss_is_no_quality(recipe: list[Record], constructed: Make) -> None:
    found = recommended(
        recipe[0],
        constructed("known", loss=(0, 0.1), rise=(0, 0.1), memory=90),
        constructed("vague", loss=(0.5, 3), rise=(0.5, 3), memory=30),
    )
    assert found["quality"].variant == "known"


def test_a_negligible_but_measurable_rise_keeps_quality(recipe: list[Record], constructed: Make) -> None:
    found = recommended(recipe[0], constructed("int8", loss=(0.02, 0.05), rise=(0.04, 0.01)))
    assert found["quality"].variant == "int8"
    assert "surely within 0.1 %" in found["quality"].sentence
    assert "no measurable" not in found["quality"].sentence


def test_measurable_losses_everywhere_keep_the_baseline(recipe: list[Record], constructed: Make) -> None:
    found = recommended(
        recipe[0],
        constructed("a", loss=(1, 0.2), rise=(2, 0.4)),
        constructed("b", loss=(1.2, 0.2), rise=(2.3, 0.4)),
        constructed("c", loss=(3, 0.2), rise=(4, 0.4)),
    )
    assert found["quality"].variant == "source"
    assert "closest is a (not measurably better than b)" in found["quality"].sentence


def test_no_memory_saved_is_said(recipe: list[Record], constructed: Make) -> None:
    found = recommended(recipe[0], constructed("pruned", loss=(0, 0.1), rise=(0, 0.1), memory=100, speed=(1.0, 0.05)))
    assert "saves no memory" in found["quality"].sentence
    assert found["memory"].variant is None
    assert found["speed"].variant is None
    assert "measurably faster" in found["speed"].sentence


def test_equal_memory_goes_to_the_one_that_can_have_lost_least(recipe: list[Record], constructed: Make) -> None:
    found = recommended(
        recipe[0],
        constructed("worse", loss=(1, 0.2), rise=(2, 0.2), memory=27.9),
        constructed("better", loss=(0.5, 0.2), rise=(1, 0.2), memory=28.0),
    )
    assert found["memory"].variant == "better"
    assert "worse takes about the same memory" in found["memory"].sentence


def test_memory_is_not_bought_with_an_unbounded_loss(recipe: list[Record], constructed: Make) -> None:
    found = recommended(
        recipe[0],
        constructed("broken", loss=(20, 1), rise=(80, 3), memory=20, speed=(4, 0.1)),
        constructed("int8", loss=(0, 0.1), rise=(0, 0.1), memory=55),
    )
    assert found["memory"].variant == "int8"
    assert "broken would be smaller" in found["memory"].sentence
    assert found["speed"].variant == "int8"
    alone = recommended(recipe[0], constructed("broken", loss=(20, 1), rise=(80, 3), memory=20, speed=(4, 0.1)))
    assert alone["memory"].variant is None
    assert "smallest is broken" in alone["memory"].sentence
    assert alone["speed"].variant is None


def test_overlapping_speeds_go_to_quality_and_are_named(recipe: list[Record], constructed: Make) -> None:
    found = recommended(
        recipe[0],
        constructed("fastest", loss=(1, 0.2), rise=(3, 0.2), speed=(2.4, 0.2)),
        constructed("kinder", loss=(0, 0.2), rise=(0.5, 0.2), speed=(2.2, 0.2)),
        constructed("third", loss=(1, 0.2), rise=(2, 0.2), speed=(2.1, 0.2)),
        constructed("slow", loss=(0, 0.2), rise=(0, 0.2), speed=(1.2, 0.1)),
    )
    assert found["speed"].variant == "kinder"
    assert "fastest measures 2.40×, but the intervals overlap" in found["speed"].sentence
    assert "the interval of third overlaps" in found["speed"].sentence
    assert "slow" not in found["speed"].sentence


def test_missing_cells_are_not_recommended(recipe: list[Record], constructed: Make) -> None:
    unweighed = constructed("unweighed", loss=(0, 0.1), rise=(0, 0.1), memory=None, speed=(3, 0.1))
    untimed = constructed("untimed", loss=(0, 0.1), rise=(0, 0.1), memory=30, speed=None)
    unjudged = constructed("unjudged", loss=(0, 0.1), rise=(0, 0.1), memory=10, speed=(9, 0.1)).model_copy(
        update={"quality": None}
    )
    found = recommended(recipe[0], unweighed, untimed, unjudged)
    assert found["quality"].variant == "untimed"
    assert found["memory"].variant == "untimed"
    assert found["speed"].variant == "unweighed"
    assert "for want of numbers: unweighed and unjudged" in found["memory"].sentence
    assert "for want of numbers: untimed and unjudged" in found["speed"].sentence


def test_nothing_measured_recommends_nothing(recipe: list[Record]) -> None:
    found = recommended(*(record.model_copy(update={"quality": None}) for record in recipe))
    assert all(each.variant is None for each in found.values())


def test_quality_without_memory_recommends_no_row(recipe: list[Record], constructed: Make) -> None:
    found = recommended(recipe[0], constructed("a", loss=(0, 0.1), rise=(0, 0.1), memory=None))
    assert found["quality"].variant is None
    assert found["quality"].sentence.startswith("a kept the quality, but no memory was measured")
