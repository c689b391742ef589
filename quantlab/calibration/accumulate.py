"""Sums of statistics over the calibration tokens of one input site."""

from collections.abc import Collection

import torch
from torch import Tensor

from quantlab.errors import CheckpointError
from quantlab.numerics.statistics import Need, SiteStatistics


class Accumulator:
    """Running sums over the tokens of one input site.

    Args:
        width: K.
        needs: the statistics to compute.
        device: device of the activations.
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
            original: [n, K], the same tokens in the unchanged model; used only for the cross term.
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
        """The means; zeros if there was no token.

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
        # a value that is not finite makes the diagonals not finite
        finite = self._squares.isfinite()
        if self._cross is not None:
            finite = finite & self._cross.diagonal().isfinite()
        if not bool(finite.all()):
            raise CheckpointError(
                "activations are not finite",
                where=where,
                found=f"{int((~finite).sum())} of {len(finite)} channels are NaN or infinite",
                fix="check the checkpoint with `quantlab verify`; if it is intact, calibrate in float32",
            )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += aᵀ b in float32; a and b [n, K]."""
    if a.dtype == torch.bfloat16 and a.device.type == "cuda":
        # products of bfloat16 numbers are exact in float32, in which tensor cores accumulate
        total += torch.mm(a.T, b, out_dtype=torch.float32)
    else:
        total.addmm_(a.to(torch.float32).T, b.to(torch.float32))
