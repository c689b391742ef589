"""Metrics of speed: tokens per second, ratios to FP16, time to the first token, energy."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Final, Literal, NamedTuple

from quantlab.evaluation.measured import Frozen, Measured
from quantlab.evaluation.metric import Metric

Timed = Literal["artifact", "own layers", "twin"]
"""The model that speed is measured on: the whole artifact; a random-weight twin of one of its layers of each kind; a random-weight
twin of the shape that the suite fixes."""


class TimedWords(NamedTuple):
    """Names of a kind of model in tables."""

    head: str
    """Shown beside a column's heading."""
    meaning: str
    """In sentences: replaces `{timed}` in the metrics' texts."""
    short: str
    """In a terminal: replaces `{short}` in the metrics' heads."""


TIMED_WORDS: Final[Mapping[Timed, TimedWords]] = {
    "artifact": TimedWords("the artifact itself", "the artifact itself", ""),
    "own layers": TimedWords(
        "own layers, random weights", "a random-weight twin of the model's own layers", ", layers"
    ),
    "twin": TimedWords("random-weight twin", "a random-weight twin", ", twin"),
}


def timed_words(kinds: Iterable[Timed]) -> TimedWords:
    """The names for the models of several rows, joined if they differ."""
    found = [TIMED_WORDS[kind] for kind in dict.fromkeys(kinds)] or [TIMED_WORDS["twin"]]
    return TimedWords(*(" or ".join(dict.fromkeys(texts)) for texts in zip(*found, strict=True)))


class Speed(Frozen):
    """Tokens per second, interleaved with those of FP16. Keys are batch sizes.

    An interval contains the number of another evaluation on the same machine 19 times in 20. The order of the fields is
    the order of the columns.
    """

    timed: Timed = "twin"
    """Kind of the timed model; the FP16 reference is of the same kind."""
    twin: str
    """The timed model in words: width and layers, context, device and how steps ran."""
    layout: str
    """Its layout: "int4_g128 on 95 % of the weights, the rest bfloat16"."""
    timed_with: tuple[str, ...] = ()
    """Other variants of the same layout; one timing stands for all of them."""
    twin_memory_percent_of_fp16: Annotated[
        float | None,
        Metric(
            heading="twin's memory %",
            meaning="Bytes a random-weight twin of real width holds for its weights, in percent of the same weights at two bytes each.",
            unit="percent",
            better="low",
            claim="weights of the twin in memory, % of FP16",
        ),
    ] = None
    """Including scales; None if the artifact itself was timed, whose memory is part of `Memory`."""
    processes: int = 1
    """Number of timing processes; each number is the mean of their medians, and its n counts the turns of all."""
    decode_tokens_per_second: Annotated[
        dict[str, Measured],
        Metric(
            heading="decode tok/s at {}",
            meaning="Tokens per second of decode at batch size {}, all sequences together, measured on {timed}.",
            unit="rate",
            better="high",
            tables=("main",),
            head="decode {}\ntok/s{short}",
            rank=5,
            batches=("1", "8"),
        ),
    ]
    prefill_tokens_per_second: Annotated[
        dict[str, Measured],
        Metric(
            heading="prefill tok/s at {}",
            meaning="Tokens per second of prefill at batch size {}, all sequences together, measured on {timed}.",
            unit="rate",
            better="high",
            tables=("main",),
            head="prefill {}\ntok/s{short}",
            rank=8,
            batches=("1",),
        ),
    ]
    decode_over_fp16: Annotated[
        dict[str, Measured],
        Metric(
            heading="decode × FP16 at {}",
            meaning="Speed of decode at batch size {} over that of FP16, measured on {timed}.",
            unit="ratio",
            better="high",
            made_of="decode_tokens_per_second",
            batches=("1", "8"),
            elsewhere="1",
        ),
    ]
    prefill_over_fp16: Annotated[
        dict[str, Measured],
        Metric(
            heading="prefill × FP16 at {}",
            meaning="Speed of prefill at batch size {} over that of FP16, measured on {timed}.",
            unit="ratio",
            better="high",
            made_of="prefill_tokens_per_second",
            batches=("1",),
        ),
    ]
    time_to_first_token_seconds: Annotated[
        dict[str, Measured],
        Metric(
            heading="first token at {}, ms",
            meaning="Milliseconds from a prompt to its first new token at batch size {}, measured on {timed}.",
            unit="milliseconds",
            better="low",
        ),
    ] = {}
    energy_joules_per_token: Annotated[
        dict[str, Measured] | None,
        Metric(
            heading="energy at {}, J/token",
            meaning="Joules the device reports per decoded token at batch size {}, measured on {timed}.",
            unit="plain",
            better="low",
        ),
    ] = None
    """None if the device does not report its energy."""
    quartiles: dict[str, tuple[float, float]] = {}
    """First and third quartile over rounds, by cell: "decode_tokens_per_second.1"."""
    not_fused: str | None = None
    """Reason why decode steps were not fused; "" if they were, None in records of earlier versions."""
    noise: dict[str, str] = {}
    """Reason why a cell is noisy, by cell as in `quartiles`: "other processes took 0.9 of 2 cores". Cells without an entry are
    not noisy."""

    @property
    def speed_over_fp16(
        self,
    ) -> Annotated[
        Measured | None,
        Metric(
            heading="speed × FP16",
            meaning="Decode speed at batch size 1 over that of FP16, measured on {timed} in runs interleaved with it.",
            unit="ratio",
            better="high",
            tables=("headline", "main", "cards", "leaderboard"),
            head="speed ×\nFP16{short}",
            always=True,
            origin="decode_over_fp16.1",
            claim="decode speed of the twin, × FP16",
        ),
    ]:
        """None if batch size 1 was not timed."""
        return self.decode_over_fp16.get("1")
