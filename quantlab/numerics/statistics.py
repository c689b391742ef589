"""Statistics of the activations that enter a linear layer: second moments and magnitudes.

For rows x [K] of an input site, and rows x~ [K] of the same tokens in the unchanged model:

    mean_square  mean of x²               used by Wanda and the search for scales
    hessian      mean of x xᵀ             used by GPTQ, SparseGPT and AWQ
    cross        mean of (x~ - x) xᵀ      used by GPTQ to compensate for the errors of earlier layers
    magnitudes   mean |x| and max |x|     used by AWQ and SmoothQuant

Calibration collects them, algorithms read them; neither imports the other.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Need = Literal["squares", "magnitudes", "hessian", "cross"]
"""A statistic to collect; "squares" are always collected."""


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
