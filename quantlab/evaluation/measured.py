"""A measured number with its interval, and what a difference to the baseline signifies."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

FEWEST_DEGREES = 10
"""Degrees of freedom that an interval over documents takes: the number of documents less the number of their domains."""
LEVEL = 0.05
"""Level of significance that belongs to a 95 % interval."""


class Frozen(BaseModel):
    """Strict and immutable; the strings under the fields document them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Measured(Frozen):
    """A number with its 95 % interval, or the range it was found in, and the count it rests on."""

    value: float
    low: float
    high: float
    n: int
    interval: Literal["95 %", "range"] = "95 %"
    """Meaning of `low` and `high`: a 95 % interval, or the smallest and largest value found where there were too few for one."""
    reason: str = ""
    """Where it is a range: the values it spans, "3 repetitions", "5 documents"; empty for a 95 % interval."""

    @model_serializer(mode="wrap")
    def _plain(self, inner: SerializerFunctionWrapHandler) -> dict[str, object]:
        """A 95 % interval is written with the four keys that every reader of a record or a matrix knows."""
        written: dict[str, object] = inner(self)
        return written if self.interval == "range" else {name: written[name] for name in ("value", "low", "high", "n")}


Verdict = Literal["no measurable loss", "loss", "gain"]
"""Verdict on a paired difference to the baseline. "no measurable loss": its 95 % interval covers zero, or its `holm_p` is above 0.05."""


class Significance(Frozen):
    """Whether a difference to the baseline could be chance.

    `p` is two-sided. Where it comes from the bootstrap it inverts the interval that stands beside it: the interval leaves
    zero out exactly when p < 0.05. `holm_p` corrects for the number of rows in a table: of all rows that truly lose nothing,
    the chance that even one has holm_p <= 0.05 is 5 % (S. Holm 1979, "A simple sequentially rejective multiple test procedure").
    """

    p: float
    holm_p: float | None = None
    """p adjusted over the rows of the matrix that have this number; None until all of them are measured."""
    verdict: Verdict
    """Decided once, when all rows of the matrix are known; tables and recommendations read it here."""


def verdict(loss: Measured, holm_p: float | None = None) -> Verdict:
    """The verdict on a paired loss, which is positive where the artifact is worse.

    Args:
        loss: with its 95 % interval.
        holm_p: its p adjusted over the rows of a matrix, once all of them are known; above 0.05 the loss could be chance.
    """
    if loss.low <= 0 <= loss.high or (holm_p is not None and holm_p > LEVEL):
        return "no measurable loss"
    return "loss" if loss.low > 0 else "gain"
