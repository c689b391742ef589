"""The declaration of a metric: everything that evaluation and tables need to know of one number, stated once.

A metric is a field of a part of a record (`Quality`, `Memory`, `Speed`, `Domain`, `Divergence`) or a property that is computed
from such fields, annotated with a `Metric`:

    bits_per_byte: Annotated[Measured, Metric(heading="bits/byte", unit="plain", better="low", meaning="…", statistic=…)]

The field's name is its key in records, in matrix.json and in matrix.csv. A field of type `dict[str, Measured]` holds one number
for each batch size; `{}` in its texts stands for the batch size. From the declaration follow the value and its interval (where
it is a function of sums over documents), the column in every table, the comparison of two records, and claims.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_origin, get_type_hints

from pydantic import BaseModel

from quantlab.evaluation.statistics import Floats

Unit = Literal[
    "percent", "change", "ratio", "plain", "nats", "share", "points", "bytes", "seconds", "milliseconds", "rate"
]
"""How a number is written; "share" is stored from 0 to 1 and shown in percent, "change" is a signed percentage."""
Table = Literal["headline", "main", "details", "cards", "leaderboard"]
"""Tables in which a metric has a column: the headline columns, the first table of page and terminal, the tables of all other
numbers, model cards, the leaderboard. Every metric is in matrix.json and matrix.csv."""
Sums = Mapping[str, Floats]
"""Sums over documents by field of `Documents`, each of shape [...]: [] for all documents, or one value per draw."""
Statistic = Callable[[Sums], Floats]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """How a change against the baseline is tested and named.

    Attributes:
        name: the lost quantity as verdicts name it: "perplexity".
        tested: the field whose interval and p decide; positive is worse.
    """

    name: str
    tested: str


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The declaration of one number.

    Attributes:
        heading: head of its column.
        meaning: one sentence that explains the head.
        unit: how it is written.
        better: whether a low or a high value is better.
        tables: where it has a column; empty: in matrix.json and matrix.csv only.
        head: two short lines that replace the heading in a terminal; required for the table "main".
        rank: priority of a column of "main" for the width of a terminal, 1 first.
        statistic: function of sums over documents that gives the value; None if it is measured otherwise.
        count: the sum that is the value's n.
        relative: whether it compares with the baseline; the baseline itself then has no value.
        loss: the test against the baseline; None if it is not tested.
        always: whether its column is shown even if no row has the number.
        of_machine: whether it depends on the hardware, beyond the metrics of speed, which all do.
        origin: the field that a computed number comes from, where records and pages link to; empty: its own name.
        made_of: for a ratio, the rate by batch size that it is computed from and whose noise it shares.
        batches: batch sizes that matrix.json always has a key for.
        elsewhere: the batch size that has a separate column under another name.
        claim: its name in claims; empty if claims cannot refer to it.
    """

    heading: str
    meaning: str
    unit: Unit
    better: Literal["low", "high"]
    tables: tuple[Table, ...] = ("details",)
    head: str = ""
    rank: int = 0
    statistic: Statistic | None = None
    count: str = "tokens"
    relative: bool = False
    loss: Loss | None = None
    always: bool = False
    of_machine: bool = False
    origin: str = ""
    made_of: str = ""
    batches: tuple[str, ...] = ()
    elsewhere: str = ""
    claim: str = ""


@dataclass(frozen=True)
class Declared:
    """A metric with its name, in the order of the model.

    Attributes:
        name: of the field or property.
        metric: its declaration.
        by_batch: whether the field holds one number for each batch size.
    """

    name: str
    metric: Metric
    by_batch: bool

    @property
    def origin(self) -> str:
        """Path of the field within its part of a record."""
        return self.metric.origin or self.name


@functools.cache
def metrics_of(model: type[BaseModel]) -> dict[str, Declared]:
    """The metrics that a part of a record declares, by name: computed properties first, then fields."""
    found: dict[str, Declared] = {}
    for name, member in vars(model).items():
        if isinstance(member, property):
            returned = get_type_hints(member.fget, include_extras=True).get("return")
            for metric in getattr(returned, "__metadata__", ()):
                found[name] = Declared(name, metric, by_batch=False)
    for name, field in model.model_fields.items():
        for metric in field.metadata:
            if isinstance(metric, Metric):
                found[name] = Declared(name, metric, by_batch=_is_by_batch(field.annotation))
    return found


def _is_by_batch(annotation: object) -> bool:
    """Whether a field's type is `dict[str, Measured]`, or that or None."""
    return dict in {get_origin(part) for part in (annotation, *getattr(annotation, "__args__", ()))}
