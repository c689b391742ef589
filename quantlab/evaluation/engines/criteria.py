"""When an engine agrees with quantlab's runtime: the criteria, by dtype and scheme.

- **Weights alone are quantized.** Both programs compute the same function, so only the order of float32 sums may differ: root mean
  square (rms) of the differences at most 1e-4 nats. Integers times scales may be rounded to the 16 bits of the scales, as quantlab's
  runtime does, or kept in float32: the nearer one is the reference, and the verdict says which. In 16 bits an engine differs from
  float32 by its rounding alone, which the source model in the same engine and dtype measures: at most 1.5 times that.
- **Inputs of 16-bit matrices are rounded to their dtype**, as llama.cpp does. Where routing is nearly tied, any rounding sends a token to
  another expert, and these few tokens make most of the rms: five programs that round the same model in slightly different places have
  an rms of 0.004 to 0.011 nats and a median of absolute differences of 0.00057 to 0.00063. So the median is at most 1.5 times what the
  rounding changes, and the mean must be equal within its interval.
- **Routed experts are computed in 16 bits** although float32 was asked for, as transformers does with packed ones. The reference rounds
  them in the same places. A value that rounds the other way changes later layers here too: 0.01 of what the rounding changes was seen
  with three layers, 0.66 with eight; so the rms is at most 1.5 times that, and single experts must be equal from the same inputs.
- **Activations are rounded** (int8). No two programs agree token by token: a value that rounds the other way is a whole step, and
  all later layers see it. So the means must be equal within their interval, the rms at most 1.5 times what rounding activations itself
  changes, and single linears must be equal to float rounding from the same inputs (`layers.py`), which finds what means hide.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quantlab.evaluation.engines.layers import EXPERTS, bound
from quantlab.evaluation.engines.process import EngineResult
from quantlab.evaluation.engines.text import JudgedText
from quantlab.evaluation.engines.verdict import Outcome, SingleLayer
from quantlab.evaluation.measured import Measured
from quantlab.evaluation.statistics import Floats, resample

FLOAT32_RMS: Final = 1e-4
"""Nats. Seen between right programs: 1e-5."""
NOISE_FACTOR: Final = 1.5
SOURCE_FACTOR: Final = 4.0
"""An engine computes the source model wrongly above this multiple of the rounding of quantlab's runtime in the same dtype."""


@dataclass(frozen=True)
class Differences:
    """How an engine's results differ from the reference.

    Attributes:
        mean: of the differences of the negative log-likelihoods, nats per token, with its interval over texts.
        rms: their root mean square.
        median: of their absolute values.
        top1: share of tokens with the same most likely token.
        greedy: share of greedy tokens before the first that differs, mean over prompts; None if none were decoded.
    """

    mean: Measured
    rms: float
    median: float
    top1: float
    greedy: float | None


@dataclass(frozen=True)
class Ground:
    """What a criterion rests on.

    Attributes:
        dtype: the dtype that the engine computed in.
        rounding_rms: rms that the dtype's rounding explains, nats; None in float32.
        rounding_of: what `rounding_rms` was measured on.
        activation_rms: rms that rounding activations explains, nats; None if they are not rounded.
        layers_wanted: whether single linears must be compared.
        experts_dtype: dtype of the routed experts if it is another one; the reference rounds them too.
        experts_rms: rms of what that changes, nats; None if it is not another one.
        inputs_dtype: dtype that the inputs of matrices are rounded to.
        inputs_median: median of the absolute values of what that changes, nats; None if they are not rounded.
    """

    dtype: str
    rounding_rms: float | None = None
    rounding_of: str = ""
    activation_rms: float | None = None
    layers_wanted: bool = False
    experts_dtype: str = ""
    experts_rms: float | None = None
    inputs_dtype: str = ""
    inputs_median: float | None = None

    @property
    def is_exact(self) -> bool:
        """Whether only the order of float32 sums may differ."""
        explained = (self.rounding_rms, self.activation_rms, self.experts_rms, self.inputs_median)
        return all(one is None for one in explained)

    def dtype_of(self, module: str) -> str:
        """The dtype that a module is computed in."""
        return self.experts_dtype if self.experts_dtype and module.endswith(EXPERTS) else self.dtype


def differences(result: EngineResult, nll: Floats, top: NDArray[np.int64], text: JudgedText) -> Differences:
    """Compare an engine's finite results with the reference.

    Args:
        result: of the engine.
        nll: negative log-likelihoods of the reference [N].
        top: its most likely tokens [N].
        text: the texts that both computed.
    """
    difference = result.nll - nll
    ends = np.cumsum(text.lengths)[:-1]
    table = np.array([[part.sum(), len(part)] for part in np.split(difference, ends)])
    mean = resample(table, text.strata).measure(lambda sums: sums[..., 0] / sums[..., 1], n=len(difference))
    return Differences(mean, rms(difference), median(difference), float((result.top == top).mean()), None)


def rms(difference: Floats) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(difference))))


def median(difference: Floats) -> float:
    """Median of absolute values."""
    return float(np.median(np.abs(difference)))


def greedy_agreement(found: NDArray[np.int64], expected: NDArray[np.int64]) -> float:
    """Share of tokens before the first that differs [P, G], mean over prompts; -1 ends a continuation."""
    shares = []
    for mine, theirs in zip(found, expected, strict=True):
        ended = np.flatnonzero((mine < 0) | (theirs < 0))
        length = int(ended[0]) if len(ended) else len(mine)
        unequal = np.flatnonzero(mine[:length] != theirs[:length])
        shares.append(1.0 if not length else (int(unequal[0]) if len(unequal) else length) / length)
    return float(np.mean(shares))


def criterion(ground: Ground) -> tuple[float, str]:
    """The bound on the rms in nats, on the median where inputs are rounded to 16 bits, and the criterion in words."""
    if ground.inputs_median is not None:
        words = (
            f"inputs of matrices are rounded to {ground.inputs_dtype}: mean difference 0 within its interval, median of absolute "
            f"differences at most {NOISE_FACTOR} × {ground.inputs_median:.2g} nats (what rounding them changes)"
        )
        return max(NOISE_FACTOR * ground.inputs_median, FLOAT32_RMS), words
    if ground.activation_rms is not None:
        noise = max(ground.activation_rms, ground.rounding_rms or 0.0)
        words = (
            f"activations are rounded: mean difference 0 within its interval, rms at most {NOISE_FACTOR} × {noise:.2g} nats "
            f"({'what rounding them changes' if noise == ground.activation_rms else ground.rounding_of})"
        )
        layers = f", single linears equal from the same inputs (median over tokens at most {bound(ground.dtype):.1g})"
        return NOISE_FACTOR * noise, words + (layers if ground.layers_wanted else "; no single linear was compared")
    if ground.rounding_rms is not None:
        words = f"rms at most {NOISE_FACTOR} × {ground.rounding_rms:.2g} nats ({ground.rounding_of}, {ground.dtype})"
        return NOISE_FACTOR * ground.rounding_rms, words
    if ground.experts_rms is not None:
        words = (
            f"routed experts are computed in {ground.experts_dtype}, by the reference too: rms at most {NOISE_FACTOR} × "
            f"{ground.experts_rms:.2g} nats (what that changes), single experts equal from the same inputs "
            f"(each token to {bound(ground.experts_dtype):.1g})"
        )
        return max(NOISE_FACTOR * ground.experts_rms, FLOAT32_RMS), words
    return FLOAT32_RMS, f"rms at most {FLOAT32_RMS:g} nats ({ground.dtype})"


def outcome(ground: Ground, found: Differences, layers: tuple[SingleLayer, ...]) -> tuple[Outcome, str]:
    """The verdict on finite results, and the reasons where it is not `agrees`."""
    most, _ = criterion(ground)
    reasons = []
    mean = found.mean
    if (ground.activation_rms is not None or ground.inputs_median is not None) and not mean.low <= 0 <= mean.high:
        reasons.append(f"mean difference {mean.value:+.4g} nats ({mean.low:.4g} to {mean.high:.4g})")
    if ground.activation_rms is not None or ground.experts_rms is not None:
        unequal = [layer for layer in layers if layer.difference > bound(ground.dtype_of(layer.module))]
        if unequal:
            reasons.append(_unequal(unequal, len(layers)))
    name, size = ("rms", found.rms) if ground.inputs_median is None else ("median", found.median)
    if not size <= most:
        reasons.append(f"{name} {size:.3g} nats, at most {most:.3g} are explained")
    if reasons:
        return "differs", "; ".join(reasons)
    if ground.layers_wanted and not layers:
        return "not here", "the engine's script returned no single linear, and means alone would hide a wrong rule"
    return "agrees", ""


def _unequal(layers: list[SingleLayer], count: int) -> str:
    worst = max(layers, key=lambda layer: layer.difference)
    rules = sorted({layer.rule for layer in layers})
    how = f"the engine's rule is: {', '.join(rules)}" if all(rules) else "no known rule explains it"
    return f"{len(layers)} of {count} single modules differ, {worst.module} by {worst.difference:.2g}; {how}"
