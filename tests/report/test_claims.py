"""Claims are data, verdicts follow from intervals, and numbers that were not measured are reported as such."""

import json
from pathlib import Path

import pytest

from quantlab.errors import RecipeError
from quantlab.evaluation.measured import Measured
from quantlab.evaluation.record import Record
from quantlab.report.claims.check import CheckedClaim, Claim, Claims, load_claims
from quantlab.report.files import CLAIMS_NAME, write_report
from quantlab.report.matrix.html import to_html
from quantlab.report.matrix.markdown import to_markdown
from quantlab.report.matrix.matrix import build_matrix
from tests.report.conftest import measured
from tests.report.test_paired import documents

GUIDE = Path(__file__).parents[2] / "eval" / "claims" / "guide.yaml"


def check(records: list[Record], **claim: object) -> CheckedClaim:
    claims = Claims(title="t", claims=(Claim.model_validate({"text": "c", **claim}),))
    found = build_matrix(records, claims=claims).claims
    assert found is not None
    return found.claims[0]


def with_loss(records: list[Record], loss: Measured) -> list[Record]:
    """The records, w4a16 (the fifth) with this loss."""
    quality = records[4].quality
    assert quality is not None
    changed = records[4].model_copy(update={"quality": quality.model_copy(update={"accuracy_loss_percent": loss})})
    return [*records[:4], changed, *records[5:]]


@pytest.mark.parametrize(
    ("low", "high", "equals", "tolerance", "verdict"),
    [
        (0.9, 1.1, 1.0, 0.0, "holds"),
        (0.5, 1.5, 1.0, 0.0, "not decided"),
        (0.5, 0.9, 1.0, 0.0, "better"),
        (0.7, 0.9, 1.0, 0.1, "holds"),
        (1.1, 1.5, 1.0, 0.0, "does not hold"),
        (1.1, 1.5, 1.0, 0.1, "holds"),
    ],
)
def test_a_number(recipe: list[Record], low: float, high: float, equals: float, tolerance: float, verdict: str) -> None:
    records = with_loss(recipe, Measured(value=(low + high) / 2, low=low, high=high, n=9))
    claim = {"variant": "w4a16", "equals": equals, "tolerance": tolerance}
    assert check(records, metric="accuracy_loss_percent", **claim).verdict == verdict
    mirrored = {"variant": "w4a16", "equals": 100 - equals, "tolerance": tolerance + 1e-9}
    kept = "holds" if verdict == "not decided" else verdict  # relative to 99 the same width is narrow
    assert check(records, metric="accuracy_kept_percent", **mirrored).verdict == kept


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.5, 0.9, "holds"), (0.5, 1.1, "not decided"), (1.1, 1.5, "does not hold")]
)
def test_a_bound(recipe: list[Record], low: float, high: float, verdict: str) -> None:
    records = with_loss(recipe, Measured(value=(low + high) / 2, low=low, high=high, n=9))
    assert check(records, metric="accuracy_loss_percent", variant="w4a16", at_most=1.0).verdict == verdict
    assert check(records, metric="accuracy_kept_percent", variant="w4a16", at_least=99.0).verdict == verdict


def test_one_variant_against_another(recipe: list[Record]) -> None:
    def against(variant: str, other: str) -> CheckedClaim:
        return check(recipe, metric="accuracy_kept_percent", variant=variant, better_than=other)

    assert against("source", "w4a16").verdict == "holds"
    assert against("fp16", "w4a16").verdict == "not decided"
    assert against("fp16", "w4a16").note == "difference to w4a16, unpaired"
    for index, missed in ((1, 0), (2, 0), (4, 2)):
        kept = documents([0.0] * 40)
        right = tuple(count - missed - number % 2 * bool(missed) for number, count in enumerate(kept.correct))
        quality = recipe[index].quality
        assert quality is not None
        update = {"documents": kept.model_copy(update={"correct": right})}
        recipe[index] = recipe[index].model_copy(update={"quality": quality.model_copy(update=update)})
    found = against("fp16", "w4a16")
    assert (found.verdict, found.note) == ("holds", "difference to w4a16")
    assert isinstance(found.value, Measured)
    assert found.value.value == pytest.approx(100 * 2.5 / 52)
    assert against("w4a16", "fp16").verdict == "does not hold"
    assert against("fp16", "int8").value == Measured(value=0, low=0, high=0, n=4000)
    assert check(recipe, metric="speed_over_fp16", variant="w4a16", better_than="int8").verdict == "holds"


def test_speed_and_memory(recipe: list[Record]) -> None:
    assert (
        check(recipe, metric="speed_over_fp16", variant="w4a16", equals=3.2, tolerance=0.05).verdict == "does not hold"
    )
    assert check(recipe, metric="speed_over_fp16", variant="w4a16", equals=1.8).verdict == "better"
    assert (
        check(recipe, metric="memory_percent_of_fp16", variant="w4a16", equals=34.9, tolerance=0.1).verdict == "holds"
    )
    assert check(recipe, metric="memory_percent_of_fp16", variant="w4a16", equals=25).verdict == "does not hold"


def test_claims_about_unmeasured_values_say_so(damaged: list[Record]) -> None:
    assert check(damaged, metric="speed_over_fp16", variant="w4a16", equals=3.2).verdict == "not measured here"
    assert (
        check(damaged, metric="twin_memory_percent_of_fp16", variant="fp16", equals=100).verdict == "not measured here"
    )
    assert check(damaged).verdict == "not measured here"


def test_noise_decides_nothing(recipe: list[Record]) -> None:
    speed = recipe[4].speed
    assert speed is not None
    noise = {"decode_tokens_per_second.1": "others took a core"}
    recipe[4] = recipe[4].model_copy(update={"speed": speed.model_copy(update={"noise": noise})})
    found = check(recipe, metric="speed_over_fp16", variant="w4a16", equals=3.2)
    assert (found.verdict, found.note) == ("not decided", "noisy: others took a core")


def test_the_guide_is_checked_in_every_table(recipe: list[Record], tmp_path: Path) -> None:
    matrix = write_report(recipe, tmp_path, claims=GUIDE)
    assert matrix.claims is not None
    verdicts = {claim.text: claim.verdict for claim in matrix.claims.claims}
    assert verdicts["INT8 loses 3.2 % accuracy"] == "better"
    assert verdicts["W4A16 runs at 3.2x"] == "does not hold"
    assert verdicts["8 % pruning loses at most 1.2 % accuracy"] == "holds"
    assert verdicts["Flash attention saves 40 % of the memory"] == "holds"
    assert (tmp_path / CLAIMS_NAME).read_bytes() == GUIDE.read_bytes()
    for text in (to_html(matrix), to_markdown(matrix, with_plot=False)):
        assert "does not hold" in text
        assert "Flash attention saves 40 % of the memory" in text
    write_report(recipe, tmp_path, claims=tmp_path / CLAIMS_NAME)
    assert (tmp_path / CLAIMS_NAME).is_file()
    write_report(recipe, tmp_path)
    assert not (tmp_path / CLAIMS_NAME).exists()


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ("{text: a, variant: fp16, metric: speed}", "unknown word"),
        ("{text: a, variant: fp16, metric: speed_over_fp16}", "does not say what it claims"),
        ("{text: a, metric: speed_over_fp16, equals: 1}", "does not say what it claims"),
        ("{text: a, variant: fp16, metric: speed_over_fp16, equals: 1, at_most: 2}", "does not say what it claims"),
        ("{text: a, equals: 1}", "without a metric"),
        ("{text: a, measured: 1, at_least: 1}", "needs its source"),
        ("{text: a, measured: 1, source: b, metric: speed_over_fp16, at_least: 1}", "needs its source"),
        ("{text: a, measured: 1, source: b}", "give one of at_most, at_least"),
        ("{text: a, equal: 1}", "unknown key"),
    ],
)
def test_bad_claims_are_refused_with_their_line(tmp_path: Path, claim: str, message: str) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text(f"title: t\nclaims:\n  - {claim}\n")
    with pytest.raises(RecipeError, match=message) as caught:
        load_claims(path)
    assert f"{path}:3" in str(caught.value.where)


def test_a_claim_about_no_row_is_refused_and_nothing_is_written(recipe: list[Record], tmp_path: Path) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text("title: t\nclaims:\n  - {text: a, variant: fp17, metric: speed_over_fp16, equals: 1}\n")
    with pytest.raises(RecipeError, match="not in the matrix"):
        write_report(recipe, tmp_path / "out", claims=path)
    assert not (tmp_path / "out").exists()


def test_an_unmeasured_difference_is_not_decided_by_accident(recipe: list[Record]) -> None:
    unjudged = [*recipe[:2], recipe[2].model_copy(update={"quality": None}), *recipe[3:]]
    found = check(unjudged, metric="accuracy_kept_percent", variant="fp16", better_than="int8")
    assert found.verdict == "not measured here"
    assert (
        check(
            with_loss(recipe, measured(0.0)), metric="accuracy_kept_percent", variant="fp16", better_than="w4a16"
        ).verdict
        == "not decided"
    )


def test_a_number_kept_elsewhere_is_the_one_that_is_kept(recipe: list[Record]) -> None:
    claims, _ = load_claims(GUIDE)
    (claim,) = [claim for claim in claims.claims if claim.source is not None]
    rows = json.loads((GUIDE.parents[2] / str(claim.source)).read_text())["rows"]
    peaks = {row["attention"]: row["prefill_peak_bytes"] for row in rows if row["kind"] == "MLA" and row["context"] == 2048 and "reason" not in row}  # fmt: skip
    assert claim.measured == pytest.approx(100 * (1 - peaks["quantlab_latent_sdpa"] / peaks["eager"]), abs=0.05)
    assert check(recipe, measured=39.0, source="x", at_least=40).verdict == "does not hold"
    assert check(recipe, measured=39.0, source="x", at_most=40).verdict == "holds"
