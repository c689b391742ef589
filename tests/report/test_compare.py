"""Comparison of two records: intervals of differences, numbers without a verdict, and the paths that select a side."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from quantlab.errors import ArtifactError
from quantlab.evaluation.measured import Measured
from quantlab.evaluation.record import Record, TaskResult
from quantlab.report.comparison.compare import UNPAIRED, Comparison, Number, Pair, compare
from quantlab.report.comparison.terminal import print_comparison
from quantlab.report.comparison.unpaired import subtract
from quantlab.report.files import find_records
from quantlab.report.matrix.table_cells import interval
from tests.report.conftest import measured

Make = Callable[..., Record]


def wilson(successes: int, n: int) -> Measured:
    """Wilson's score interval of a proportion."""
    z, p = 1.959963984540054, successes / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Measured(value=p, low=(middle - half) / (1 + z * z / n), high=(middle + half) / (1 + z * z / n), n=n)


def test_the_interval_of_a_difference_is_the_published_one() -> None:
    """R. G. Newcombe, Statistics in Medicine 1998, "Interval estimation for the difference", table II (a), method 10."""
    found = subtract(wilson(56, 70), wilson(48, 80))
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))


def test_turning_the_sides_round_turns_the_interval_round() -> None:
    a, b = wilson(3, 40), wilson(9, 50)
    one, other = subtract(b, a), subtract(a, b)
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))


def test_a_range_is_called_one_and_nothing_is_concluded_from_it(recipe: list[Record]) -> None:
    few = Measured(value=2.0, low=1.0, high=3.0, n=3, interval="range", reason="3 repetitions")
    assert interval(few, "plain") == "1.00 to 3.00, range of 3 repetitions"
    assert interval(Measured(value=2.0, low=1.0, high=3.0, n=9), "plain") == "1.00 to 3.00"
    between = subtract(few, wilson(3, 40))
    assert (between.interval, between.reason) == ("range", "3 repetitions")
    memory = recipe[4].memory
    assert memory is not None
    slow = recipe[4].model_copy(update={"memory": memory.model_copy(update={"load_seconds": few})})
    found = numbers(recipe[3], slow)["load_seconds"]
    assert (found.verdict, found.reason) == ("not judged", "too little for an interval: 3 repetitions")


def sides(a: Record, b: Record) -> Comparison:
    return compare([(Path("a.json"), a)], [(Path("b.json"), b)], names=("a.json", "b.json"))


def numbers(a: Record, b: Record) -> dict[str, Number]:
    return {number.key: number for number in only_pair(sides(a, b)).numbers}


def only_pair(comparison: Comparison) -> Pair:
    (pair,) = comparison.pairs
    return pair


def test_verdicts_follow_the_intervals(recipe: list[Record]) -> None:
    found = numbers(recipe[3], recipe[4])  # int8_weight, w4a16
    assert found["accuracy_loss_percent"].reason == UNPAIRED
    assert found["memory_percent_of_fp16"].verdict == "B is better"
    assert found["speed_over_fp16"].verdict == "B is better"
    assert found["perplexity"].verdict == "no measurable difference"
    assert found["peak_memory_bytes"].reason == "measured once, so without an interval"
    assert all(number.verdict == "equal" for number in numbers(recipe[4], recipe[4]).values() if number.a == 100.0)


def test_against_the_baseline_the_paired_interval_is_kept(recipe: list[Record]) -> None:
    found = numbers(recipe[0], recipe[4])["accuracy_loss_percent"]
    assert (found.difference, found.a) == (recipe[4].quality.accuracy_loss_percent.model_copy(update={"n": 0}), 0.0)
    assert found.verdict == "A is better"


def test_identical_artifacts_under_different_names_do_not_differ(recipe: list[Record]) -> None:
    pair = only_pair(sides(recipe[4], recipe[4].model_copy(update={"variant": "twin", "artifact": "artifacts/twin"})))
    assert {number.verdict for number in pair.numbers} <= {"equal", "no measurable difference"}
    assert [difference.what for difference in pair.differences] == ["variant"]


@pytest.mark.parametrize(
    ("change", "refused", "kept"),
    [
        ({"suite_sha256": "0" * 64}, {"perplexity", "kl_to_baseline", "speed_over_fp16"}, {"weights_bytes"}),
        ({"baseline_sha256": "0" * 64}, {"accuracy_loss_percent", "kl_to_baseline"}, {"perplexity", "speed_over_fp16"}),
        ({"hardware": "another"}, {"speed_over_fp16", "load_seconds", "decode_tokens_per_second.1"}, {"perplexity", "weights_bytes"}),
    ],
)  # fmt: skip
def test_incomparable_numbers_are_marked_not_comparable(
    recipe: list[Record], change: dict[str, str], refused: set[str], kept: set[str]
) -> None:
    pair = only_pair(sides(recipe[3], recipe[4].model_copy(update=change)))
    found = {number.key: number for number in pair.numbers}
    assert {
        key for key in refused if found[key].verdict == "not comparable" and found[key].difference is None
    } == refused
    assert not {key for key in kept if found[key].verdict == "not comparable"}
    assert len(pair.warnings) == 1
    assert next(iter(change)).removesuffix("_sha256") in pair.warnings[0]


def test_noise_is_no_finding(recipe: list[Record]) -> None:
    speed = recipe[4].speed
    assert speed is not None
    noisy = recipe[4].model_copy(
        update={"speed": speed.model_copy(update={"noise": {"decode_tokens_per_second.1": "others took a core"}})}
    )
    found = numbers(recipe[3], noisy)
    assert found["speed_over_fp16"].verdict == "not judged"
    assert found["speed_over_fp16"].reason == "noisy in B: others took a core"
    assert found["decode_over_fp16.8"].verdict != "not judged"


def test_tasks_of_other_versions_are_not_compared(recipe: list[Record]) -> None:
    def with_task(record: Record, version: str) -> Record:
        task = TaskResult(name="words", version=version, metric="accuracy", score=measured(0.5, 0.02, 500), n=500)
        return record.model_copy(update={"tasks": (task,)})

    assert (
        numbers(with_task(recipe[3], "1"), with_task(recipe[4], "1"))["task_score.words"].verdict
        == "no measurable difference"
    )
    other = sides(with_task(recipe[3], "1"), with_task(recipe[4], "2"))
    found = {number.key: number for number in only_pair(other).numbers}["task_score.words"]
    assert (found.verdict, found.reason) == ("not comparable", "other version of the task (1 and 2)")
    assert "task words" in {difference.what for difference in only_pair(other).differences}


def test_runs_are_compared_variant_by_variant(recipe: list[Record], tmp_path: Path) -> None:
    for name, records in (("old", recipe[:5]), ("new", recipe[3:])):
        (tmp_path / name / "records").mkdir(parents=True)
        for record in records:
            (tmp_path / name / "records" / f"{record.variant}.json").write_text(record.model_dump_json())
    old, new = tmp_path / "old", tmp_path / "new"
    both = compare(find_records(old), find_records(new), names=("old", "new"))
    assert (
        [pair.variant_a for pair in both.pairs] == [pair.variant_b for pair in both.pairs] == ["int8_weight", "w4a16"]
    )
    assert both.only_in_a == ("source", "fp16", "int8")
    assert set(both.only_in_b) == {"w4a16-experts", "pruned-8", "pruned-8-w4a16"}
    one = compare(find_records(old), find_records(new / "artifacts" / "w4a16"), names=("old", "new"))
    assert [pair.variant_b for pair in one.pairs] == ["w4a16"]
    with pytest.raises(ArtifactError, match="both sides are the same"):
        compare(find_records(old), find_records(old / "records"), names=("old", "old"))
    with pytest.raises(ArtifactError, match="no variant in common"):
        compare(find_records(old), find_records(new / "artifacts" / "pruned-8"), names=("old", "new"))


def test_a_path_to_nothing_says_what_it_can_be(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no such file(?s:.*)fix: +give a run's directory .* or a record"):
        find_records(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"no \*\.json"):
        find_records(tmp_path)


def test_the_terminal_shows_everything_and_json_reads_back(recipe: list[Record]) -> None:
    comparison = sides(recipe[3], recipe[4].model_copy(update={"hardware": "another"}))
    console = Console(file=io.StringIO(), width=160)
    print_comparison(comparison, console)
    text = console.file.getvalue()
    for needed in (
        "warning: other hardware",
        "0.92 (0.61 to 1.23)",
        "B is better",
        "int4_g128 (gptq)",
        "not comparable",
    ):
        assert needed in text
    assert Comparison.model_validate(json.loads(comparison.model_dump_json())) == comparison
