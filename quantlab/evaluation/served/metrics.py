"""Metrics of the served path: an artifact decoded in its own dtype against the same artifact in float32."""

from typing import Annotated

from quantlab.evaluation.measured import Frozen, Measured
from quantlab.evaluation.metric import Metric


class Served(Frozen):
    """An artifact as a user decodes it: loaded in its own dtype, one token per step, on held-out text.

    Intervals are over documents. The order of the fields is the order of the columns.
    """

    served_kl: Annotated[
        Measured,
        Metric(
            heading="served KL, nats",
            meaning="Mean KL divergence of the artifact decoded step by step in its own 16-bit dtype from the same artifact in "
            "float32, per step: rounding, and any fault of the decode path.",
            unit="nats",
            better="low",
            tables=("main", "cards"),
            head="served\nKL nats",
            rank=9,
            of_machine=True,
        ),
    ]
    """KL(float32 || served) of one sequence, teacher-forced."""
    greedy_agreement: Annotated[
        Measured,
        Metric(
            heading="greedy agreement %",
            meaning="Greedily decoded tokens before the first that differs from what the same artifact decodes in float32.",
            unit="share",
            better="high",
            tables=("main", "cards"),
            head="greedy\nagree %",
            rank=10,
            of_machine=True,
        ),
    ]
    """n counts the tokens of all continuations, which are decoded as one batch."""
    served_top1_agreement: Annotated[
        Measured,
        Metric(
            heading="served top-1 agreement %",
            meaning="Steps in which the artifact predicts the same most likely next token in its own 16-bit dtype and in float32.",
            unit="share",
            better="high",
            of_machine=True,
        ),
    ]
    served_kl_to_baseline: Annotated[
        Measured | None,
        Metric(
            heading="served KL to baseline, nats",
            meaning="Mean KL divergence of the artifact decoded in its own 16-bit dtype from the baseline, per step: the loss that "
            "a user meets.",
            unit="nats",
            better="low",
            relative=True,
            of_machine=True,
        ),
    ] = None
    """The baseline computes in the dtype of quality. This and the next are None for the baseline itself and if it failed."""
    float32_kl_to_baseline: Annotated[
        Measured | None,
        Metric(
            heading="KL to baseline on the served steps, nats",
            meaning="The same divergence of the artifact in float32, on the same steps.",
            unit="nats",
            better="low",
            relative=True,
        ),
    ] = None
    served_dtype: str
    """Dtype of the activations: "bfloat16"."""
    served_steps: str
    """How the decoder runs a step, with the reason if it is not fused: "captured, fused steps", "single steps, not fused: a dtype of float32"."""
