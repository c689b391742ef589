"""Verdicts are determined once, when all rows are known."""

from quantlab.evaluation.holm_correction import with_holm_correction
from quantlab.evaluation.measured import Measured, Significance
from quantlab.evaluation.quality.metrics import Quality
from quantlab.evaluation.record import Record, TaskResult

LOSS = Measured(value=1.0, low=0.1, high=1.9, n=60)
NONE = Measured(value=0.1, low=-0.8, high=1.0, n=60)


def record(variant: str, loss: Measured, p: float) -> Record:
    """A record with the same loss of accuracy and in one task."""
    significance = Significance(p=p, verdict="no measurable loss" if loss is NONE else "loss")
    quality = Quality(
        compute_dtype="float32",
        perplexity=LOSS,
        bits_per_byte=LOSS,
        next_token_accuracy=LOSS,
        domains={},
        perplexity_change_percent=None,
        accuracy_loss_percent=loss,
        accuracy_loss=loss,
        kl_to_baseline=None,
        top1_agreement=None,
        significance={"accuracy_loss_percent": significance},
    )
    task = TaskResult(
        name="t", version="1", metric="accuracy", score=LOSS, n=60, loss=loss, significance=significance
    )  # fmt: skip
    return Record(
        recipe="r", recipe_sha256="r", variant=variant, description="d", artifact="a", artifact_sha256="a", baseline="b", suite="s 1",
        suite_sha256="s", hardware="h", versions={}, quality=quality, memory=None, speed=None, failures=(), tasks=(task,),
    )  # fmt: skip


def verdicts(records: list[Record]) -> dict[str, set[str]]:
    found = {}
    for one in records:
        assert one.quality is not None
        assert one.tasks[0].significance is not None
        found[one.variant] = {
            one.quality.significance["accuracy_loss_percent"].verdict,
            one.tasks[0].significance.verdict,
        }
    return found


def test_a_loss_that_many_rows_explain_is_none() -> None:
    rows = [record("sure", LOSS, 0.001), record("weak", LOSS, 0.03), record("no", NONE, 0.7)]
    judged = with_holm_correction(rows)
    assert verdicts(judged) == {"sure": {"loss"}, "weak": {"no measurable loss"}, "no": {"no measurable loss"}}
    assert judged[1].quality is not None
    assert judged[1].quality.significance["accuracy_loss_percent"].holm_p == 0.06


def test_with_fewer_rows_the_verdict_is_decided_again() -> None:
    judged = with_holm_correction([record("weak", LOSS, 0.03), record("no", NONE, 0.7)])
    assert verdicts(judged) == {"weak": {"no measurable loss"}, "no": {"no measurable loss"}}
    assert verdicts(with_holm_correction(judged[:1])) == {"weak": {"loss"}}, (
        "from its interval and p, not from the verdict before"
    )
    assert with_holm_correction(judged) == judged


def test_without_a_test_there_is_no_verdict() -> None:
    one = record("few", LOSS, 0.01)
    assert one.quality is not None
    one = one.model_copy(update={"quality": one.quality.model_copy(update={"significance": {}}), "tasks": ()})
    assert with_holm_correction([one]) == [one]
