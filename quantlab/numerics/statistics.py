"""Statistics of the activations that enter a linear layer: second moments and magnitudes, never the activations themselves.

For rows x [K] of an input site, and rows x~ [K] of the same tokens in the unchanged model:

    mean_square  mean of x²               what Wanda and searched scales weigh errors with
    hessian      mean of x xᵀ             what GPTQ and SparseGPT weigh errors with
    cross        mean of (x~ - x) xᵀ      what lets a layer compensate for the errors of the layers before it
    magnitudes   mean |x| and max |x|     what AWQ and SmoothQuant scale by

Calibration collects them and algorithms read them; neither has to know the other.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Need = Literal["squares", "magnitudes", "hessian", "cross"]
"""A statistic to collect; the squares are part of everything."""


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics of an input site of width K, float32, on the device that computed them.

    Attributes:
        count: tokens seen.
        mean_square: [K], mean of x², the diagonal of the Hessian.
        mean_abs: [K], mean of \\|x\\|.
        max_abs: [K], largest \\|x\\|.
        hessian: [K, K], mean of x xᵀ over tokens, without the factor 2 some papers put there.
        cross: [K, K], mean of (x~ - x) xᵀ; row i belongs to the difference of channel i.
    """

    count: int
    mean_square: Tensor
    mean_abs: Tensor | None = None
    max_abs: Tensor | None = None
    hessian: Tensor | None = None
    cross: Tensor | None = None
