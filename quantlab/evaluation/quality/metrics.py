"""Metrics of quality: an artifact's predictions on held-out text, and their difference from the baseline on the same tokens.

Almost all are functions of sums over documents (`Documents`): the same function gives the value, its interval, and the paired
difference of two records.
"""

import math
from typing import Annotated, Final

import numpy as np

from quantlab.evaluation.measured import Frozen, Measured, Significance
from quantlab.evaluation.metric import Loss, Metric, Statistic, Sums
from quantlab.evaluation.statistics import Floats

SUMS: Final = (
    "tokens", "bytes", "nll", "correct", "kl", "agreeing", "baseline_nll", "baseline_correct", "to_wrong", "to_right", "kl_tokens"
)  # fmt: skip
"""The sums that every number is computed from: fields of `Documents`."""


class Documents(Frozen):
    """Sums over the scored tokens of each document, so that two records can be compared on the same text. One entry per document."""

    tokens_sha256: str
    """Hash of the tokens that were scored."""
    domain: tuple[str, ...]
    tokens: tuple[int, ...]
    nll: tuple[float, ...]
    """Negative log-probability in nats; `kl` is in nats too."""
    correct: tuple[int, ...]
    """Tokens whose most likely prediction is correct."""
    bytes: tuple[int, ...] = ()
    """UTF-8 bytes of the scored text; empty in records of earlier versions."""
    kl: tuple[float, ...] = ()
    """KL(baseline || artifact); this and the following sums are empty for the baseline itself."""
    kl_tokens: tuple[int, ...] = ()
    """Tokens that `kl` is summed over."""
    agreeing: tuple[int, ...] = ()
    """Tokens with the same most likely prediction in artifact and baseline."""
    to_wrong: tuple[int, ...] = ()
    to_right: tuple[int, ...] = ()
    baseline_nll: tuple[float, ...] = ()
    baseline_correct: tuple[int, ...] = ()

    def sums(self) -> dict[str, Floats]:
        """The sums that the record holds, each [D], by their names in `SUMS`."""
        return {name: np.array(values, dtype=np.float64) for name in SUMS if (values := getattr(self, name))}


def _per_token(name: str, *, count: str = "tokens") -> Statistic:
    return lambda sums: sums[name] / sums[count]


def _perplexity(sums: Sums) -> Floats:
    found: Floats = np.exp(sums["nll"] / sums["tokens"])
    return found


def _bits_per_byte(sums: Sums) -> Floats:
    return sums["nll"] / math.log(2) / sums["bytes"]


def _perplexity_change(sums: Sums) -> Floats:
    found: Floats = 100 * np.expm1((sums["nll"] - sums["baseline_nll"]) / sums["tokens"])
    return found


def _accuracy_loss(sums: Sums) -> Floats:
    return 100 * (sums["baseline_correct"] - sums["correct"]) / sums["baseline_correct"]


def _accuracy_difference(sums: Sums) -> Floats:
    return (sums["baseline_correct"] - sums["correct"]) / sums["tokens"]


class Domain(Frozen):
    """Quality on held-out text of one kind; `{}` in the texts stands for the kind."""

    perplexity: Annotated[
        Measured,
        Metric(
            heading="{}: perplexity",
            meaning="Perplexity on held-out text of the kind {}.",
            unit="plain",
            better="low",
            statistic=_perplexity,
        ),
    ]
    bits_per_byte: Annotated[
        Measured,
        Metric(
            heading="{}: bits/byte",
            meaning="Bits per byte on held-out text of the kind {}.",
            unit="plain",
            better="low",
            tables=(),
            statistic=_bits_per_byte,
        ),
    ]
    perplexity_change_percent: Annotated[
        Measured | None,
        Metric(
            heading="{}: change %",
            meaning="Change of perplexity against the baseline on held-out text of the kind {}.",
            unit="change",
            better="low",
            statistic=_perplexity_change,
            relative=True,
        ),
    ] = None
    """Relative to the baseline, as in `Quality`."""
    kl_to_baseline: Annotated[
        Measured | None,
        Metric(
            heading="{}: KL, nats",
            meaning="Mean KL divergence from the baseline on held-out text of the kind {}.",
            unit="nats",
            better="low",
            statistic=_per_token("kl", count="kl_tokens"),
            count="kl_tokens",
            relative=True,
        ),
    ] = None
    """Mean per token, in nats."""


class Divergence(Frozen):
    """Differences of the artifact's predictions from the baseline's on the same tokens, with measures per layer."""

    kl_mean: Measured
    """Mean over tokens of KL(baseline || artifact), in nats, as are the next two; the same as `Quality.kl_to_baseline`."""
    kl_sample: str = ""
    """Tokens on which the KL is computed, evenly spaced: "all 19,380 tokens", "one in 3 of 160,000 tokens"."""
    predictions_bytes: int = 0
    """Bytes of the baseline's predictions on disk."""
    kl_median: Annotated[
        Measured,
        Metric(
            heading="KL median, nats",
            meaning="Median over tokens of the KL divergence from the baseline.",
            unit="nats",
            better="low",
            relative=True,
        ),
    ]
    kl_p99: Annotated[
        Measured,
        Metric(
            heading="KL 99th %ile, nats",
            meaning="99th percentile over tokens of the KL divergence from the baseline: the worst of a hundred.",
            unit="nats",
            better="low",
            relative=True,
        ),
    ]
    top1_agreement: Measured
    """The same as `Quality.top1_agreement`."""
    flips_to_wrong: Annotated[
        Measured,
        Metric(
            heading="right → wrong %",
            meaning="Tokens that the baseline predicts correctly and the variant wrongly.",
            unit="share",
            better="low",
            statistic=_per_token("to_wrong"),
            relative=True,
        ),
    ]
    flips_to_right: Annotated[
        Measured,
        Metric(
            heading="wrong → right %",
            meaning="Tokens that the variant predicts correctly and the baseline wrongly.",
            unit="share",
            better="high",
            statistic=_per_token("to_right"),
            relative=True,
        ),
    ]
    router_agreement: dict[str, Measured] = {}
    """By layer ("layer 3"): share of tokens sent to the same set of experts as in the baseline; empty without routers."""
    layer_errors: dict[str, Measured] = {}
    """By layer: relative error of the layer's output (its contribution to the residual), given the baseline's hidden states:
    the Frobenius norm of the difference of both models' outputs over that of the baseline's output minus input. A layer at
    fault stands out, because errors of earlier layers do not enter. Measured on `layer_error_tokens` tokens."""
    layer_error_tokens: int = 0


class Quality(Frozen):
    """The artifact's predictions on held-out text, and their differences from the baseline on the same tokens.

    Numbers relative to the baseline are None for the baseline itself and if the baseline failed. The order of
    the fields is the order of the columns.
    """

    compute_dtype: str
    """Dtype of the activations while this was measured."""
    operators: tuple[str, ...] = ()
    """Kernels used on the CPU, and every substitute for a kernel that is wrong or missing there; empty on a GPU."""
    accuracy_loss_percent: Annotated[
        Measured | None,
        Metric(
            heading="accuracy loss %",
            meaning="Next-token accuracy lost on held-out text, in percent of the baseline's. An interval that reaches zero shows "
            "no measurable loss.",
            unit="change",
            better="low",
            tables=("headline", "main", "cards", "leaderboard"),
            head="accuracy\nloss %",
            statistic=_accuracy_loss,
            relative=True,
            loss=Loss(name="accuracy", tested="accuracy_loss"),
            always=True,
            claim="next-token accuracy lost, %",
        ),
    ]
    """Also None if the baseline is never right."""
    perplexity_change_percent: Annotated[
        Measured | None,
        Metric(
            heading="perplexity change %",
            meaning="Change of perplexity against the baseline on the same tokens.",
            unit="change",
            better="low",
            tables=("main", "cards", "leaderboard"),
            head="perplexity\nchange %",
            rank=1,
            statistic=_perplexity_change,
            relative=True,
            loss=Loss(name="perplexity", tested="perplexity_change_percent"),
            always=True,
            claim="perplexity change, %",
        ),
    ]
    kl_to_baseline: Annotated[
        Measured | None,
        Metric(
            heading="KL, nats",
            meaning="Mean KL divergence of the predictions from the baseline's, per token, in nats.",
            unit="nats",
            better="low",
            tables=("main", "cards", "leaderboard"),
            head="KL\nnats",
            rank=2,
            statistic=_per_token("kl", count="kl_tokens"),
            count="kl_tokens",
            relative=True,
            always=True,
        ),
    ]
    """Mean KL(baseline || artifact) per token, in nats."""
    top1_agreement: Annotated[
        Measured | None,
        Metric(
            heading="top-1 agreement %",
            meaning="Tokens for which baseline and variant predict the same most likely next token.",
            unit="share",
            better="high",
            tables=("main", "cards"),
            head="top-1\nagree %",
            rank=3,
            statistic=_per_token("agreeing"),
            relative=True,
            always=True,
        ),
    ]
    """Share of tokens on which both predict the same."""
    perplexity: Annotated[
        Measured,
        Metric(
            heading="perplexity",
            meaning="Perplexity on held-out text.",
            unit="plain",
            better="low",
            tables=("details", "cards"),
            statistic=_perplexity,
            always=True,
        ),
    ]
    next_token_accuracy: Annotated[
        Measured,
        Metric(
            heading="accuracy %",
            meaning="Tokens whose most likely prediction is correct.",
            unit="share",
            better="high",
            statistic=_per_token("correct"),
            always=True,
        ),
    ]
    """Share of tokens, 0 to 1."""
    bits_per_byte: Annotated[
        Measured,
        Metric(
            heading="bits/byte",
            meaning="Bits per byte of held-out text.",
            unit="plain",
            better="low",
            tables=(),
            statistic=_bits_per_byte,
        ),
    ]
    accuracy_loss: Annotated[
        Measured | None,
        Metric(
            heading="accuracy loss, points",
            meaning="Next-token accuracy lost on held-out text, as a difference of shares.",
            unit="points",
            better="low",
            tables=(),
            statistic=_accuracy_difference,
            relative=True,
        ),
    ] = None
    """`accuracy_loss_percent` as a difference of shares: zero exactly if that is zero, and always defined."""
    domains: dict[str, Domain]
    divergence: Divergence | None = None
    significance: dict[str, Significance] = {}
    """Significance of the metrics that declare a `loss`, by metric name; empty for the baseline."""
    documents: Documents | None = None
    """The sums that all of this is computed from; None in records of earlier versions."""
