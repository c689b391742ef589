"""The difference of two numbers that were not measured together.

The interval of a difference is computed from the intervals of both numbers: for independent estimates
a and b with 95 % limits, the difference d = b - a has the limits d - sqrt((b - low_b)² + (high_a - a)²) and
d + sqrt((high_b - b)² + (a - low_a)²) (G. Y. Zou and A. Donner, "Construction of confidence limits about effect
measures", Statistics in Medicine 2008, equation 8). The errors of two artifacts on the same text are correlated, so the
interval is conservative (too wide).
"""

import math

from quantlab.evaluation.measured import Measured


def exact(found: Measured | float) -> Measured:
    """A number without an interval, as a `Measured` whose interval is a point."""
    return found if isinstance(found, Measured) else Measured(value=found, low=found, high=found, n=0)


def subtract(b: Measured, a: Measured) -> Measured:
    """b - a with its 95 % interval; n is the smaller count."""
    difference = b.value - a.value
    below = math.hypot(b.value - b.low, a.high - a.value)
    above = math.hypot(b.high - b.value, a.value - a.low)
    reasons = [found.reason for found in (a, b) if found.interval == "range"]
    return Measured(
        value=difference,
        low=difference - below,
        high=difference + above,
        n=min(a.n, b.n),
        interval="range" if reasons else "95 %",
        reason=", ".join(dict.fromkeys(reasons)),
    )
