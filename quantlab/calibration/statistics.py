"""What is kept of the activations that enter a linear layer: second moments and magnitudes, never the activations.

For rows x of an input site, and rows x~ of the same tokens in the unchanged model:

    hessian     mean of x xᵀ              what GPTQ, SparseGPT and Wanda weigh errors with
    cross       mean of (x~ - x) xᵀ       what lets a layer make up for the errors of the layers before it
    magnitudes  mean |x| and max |x|      what AWQ and SmoothQuant scale by
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantlab.errors import CheckpointError

Need = Literal["squares", "magnitudes", "hessian", "cross"]
"""What to compute; the squares are part of everything."""


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


class Accumulator:
    """Sums over the tokens of one site.

    Args:
        width: K.
        needs: what to compute.
        device: where the activations are.
    """

    def __init__(self, width: int, needs: Collection[Need], *, device: torch.device) -> None:
        self.needs, self.count = frozenset(needs), 0

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        self._squares = zeros(width)
        self._abs = zeros(width) if "magnitudes" in self.needs else None
        self._max = zeros(width) if "magnitudes" in self.needs else None
        self._hessian = zeros(width, width) if "hessian" in self.needs else None
        self._cross = zeros(width, width) if "cross" in self.needs else None

    def update(self, x: Tensor, original: Tensor | None = None) -> None:
        """Add rows.

        Args:
            x: [n, K].
            original: [n, K], the same tokens in the unchanged model; only looked at for the cross term.
        """
        self.count += len(x)
        if self._abs is not None and self._max is not None and len(x):
            magnitude = x.abs()
            self._abs += magnitude.sum(dim=0, dtype=torch.float32)
            torch.maximum(self._max, magnitude.amax(dim=0).to(torch.float32), out=self._max)
        if self._hessian is None:
            self._squares += x.to(torch.float32).square().sum(dim=0)
        else:
            _add_product(self._hessian, x, x)
        if self._cross is not None:
            assert original is not None, "the cross term compares with the unchanged model"
            _add_product(self._cross, original - x, x)

    def result(self, *, where: str) -> SiteStatistics:
        """The means; zeros if no token came.

        Args:
            where: block and site, for the message.

        Raises:
            CheckpointError: an activation was NaN or infinite, or too large for its square.
        """
        count = max(self.count, 1)
        for total in (self._squares, self._abs, self._hessian, self._cross):
            if total is not None:
                total /= count
        if self._hessian is not None:
            self._squares = self._hessian.diagonal().clone()
        self._check(where)
        return SiteStatistics(self.count, self._squares, self._abs, self._max, self._hessian, self._cross)

    def _check(self, where: str) -> None:
        # a value that is not finite shows in the diagonals: its square is none either
        finite = self._squares.isfinite()
        if self._cross is not None:
            finite = finite & self._cross.diagonal().isfinite()
        if not bool(finite.all()):
            raise CheckpointError(
                "activations are not finite",
                where=where,
                found=f"{int((~finite).sum())} of {len(finite)} channels are NaN or infinite",
                fix="check that the checkpoint is whole with `quantlab verify`; if it is, compute in a wider dtype",
            )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += aᵀ b in float32; a and b [n, K]."""
    if a.dtype == torch.bfloat16 and a.device.type == "cuda":
        # products of bfloat16 are exact in float32, where the tensor cores add them up
        total += torch.mm(a.T, b, out_dtype=torch.float32)
    else:
        total.addmm_(a.to(torch.float32).T, b.to(torch.float32))
