"""A measured number with its interval, and the significance of a difference to the baseline."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

FEWEST_DEGREES = 10
"""Minimum degrees of freedom of an interval over documents: number of documents minus number of domains."""
LEVEL = 0.05
"""Level of significance that belongs to a 95 % interval."""


class Frozen(BaseModel):
    """Strict and immutable; the strings under the fields document them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Measured(Frozen):
    """A number with its 95 % interval or the range of its values, and the count n behind it."""

    value: float
    low: float
    high: float
    n: int
    interval: Literal["95 %", "range"] = "95 %"
    """Meaning of `low` and `high`: a 95 % interval, or the smallest and largest value if there are too few for an interval."""
    reason: str = ""
    """The values that a range spans: "3 repetitions", "5 documents"; empty for a 95 % interval."""

    @model_serializer(mode="wrap")
    def _plain(self, inner: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Write a 95 % interval with its four keys only, which all readers of records and matrices expect."""
        written: dict[str, object] = inner(self)
        return written if self.interval == "range" else {name: written[name] for name in ("value", "low", "high", "n")}


Verdict = Literal["no measurable loss", "loss", "gain"]
"""Verdict on a paired difference to the baseline. "no measurable loss": its 95 % interval covers zero, or its `holm_p` is above 0.05."""


class Significance(Frozen):
    """Whether a difference to the baseline could be chance.

    `p` is two-sided. A bootstrap p inverts the interval of the same number: the interval excludes zero exactly if p < 0.05.
    `holm_p` corrects for the number of rows of a table: the probability that any row without a true loss has holm_p <= 0.05 is
    at most 5 % (S. Holm 1979, "A simple sequentially rejective multiple test procedure").
    """

    p: float
    holm_p: float | None = None
    """p corrected for all rows of the matrix that have this number; None until all of them are measured."""
    verdict: Verdict
    """Determined once all rows of the matrix are known; tables and recommendations use it."""


def verdict(loss: Measured, holm_p: float | None = None) -> Verdict:
    """The verdict on a paired loss, which is positive where the artifact is worse.

    Args:
        loss: the loss with its 95 % interval.
        holm_p: its corrected p, once all rows of the matrix are known; above 0.05 the loss is not significant.
    """
    if loss.low <= 0 <= loss.high or (holm_p is not None and holm_p > LEVEL):
        return "no measurable loss"
    return "loss" if loss.low > 0 else "gain"
