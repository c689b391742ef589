"""Statistics of the inputs of half a layer, read from an archive or collected on demand.

`collect` and `collect_moe` pass the whole calibration text through half a layer. Layer edits request statistics here,
by input site and expert; the text passes through only if a statistic is not in the archive, and the routing is computed
once.
"""

from collections.abc import Callable, Collection, Sequence
from functools import cached_property, partial
from typing import Final, Protocol

import torch
from torch import Tensor

from quantlab.calibration.collect import Stream, collect
from quantlab.calibration.layer import Half
from quantlab.calibration.moe import MoeInputs, collect_moe
from quantlab.numerics.statistics import Need, SiteStatistics

_SAMPLE_PER_CHANNEL: Final = 4
"""Tokens per channel in the prior of an expert's down projection."""


class Archive(Protocol):
    """Statistics by name; missing ones are computed."""

    def statistics(self, name: str, needs: Collection[Need], compute: Callable[[], SiteStatistics]) -> SiteStatistics:
        """Statistics under a name; the same name with other needs is another entry."""
        ...

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors under a name."""
        ...


class NoArchive:
    """No archive: statistics of one variant, always computed."""

    def statistics(self, name: str, needs: Collection[Need], compute: Callable[[], SiteStatistics]) -> SiteStatistics:
        """What `compute` returns."""
        return compute()

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `compute` returns."""
        return compute()


class ExpertInputs:
    """Statistics of the inputs of the routed experts of a layer.

    Args:
        block: name of the layer's block, for names in the archive.
        route: routes all calibration tokens; called at most once.
        archive: is searched first.
    """

    def __init__(self, block: str, route: Callable[[], MoeInputs], archive: Archive) -> None:
        self._block, self._route, self._archive = block, route, archive

    @cached_property
    def routed(self) -> MoeInputs:
        """The tokens of every expert."""
        return self._route()

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Tokens routed to each expert."""
        found = self._archive.tensors(
            f"{self._block} tokens per expert",
            lambda: {"tokens_per_expert": torch.tensor(self.routed.tokens_per_expert)},
        )
        return tuple(found["tokens_per_expert"].tolist())

    def gate_up(self, expert: int, needs: Collection[Need]) -> SiteStatistics:
        """Statistics of the inputs of an expert's gate and up."""
        return self._known(f"expert {expert} mlp", needs, lambda: self.routed.statistics(expert, needs))

    def gate_up_prior(self, needs: Collection[Need]) -> SiteStatistics:
        """The same over all tokens of the layer; `needs` must be a subset of those given to `HalfInputs.experts`."""
        return self._known("mlp of all tokens", needs, lambda: self.routed.layer)

    def down(
        self, expert: int, gate: Tensor, up: Tensor, needs: Collection[Need], *, unchanged_expert: int | None = None
    ) -> SiteStatistics:
        """Statistics of the inputs of an expert's down projection; arguments as those of `MoeInputs.down_statistics`."""
        return self._known(
            f"expert {expert} down",
            needs,
            lambda: self.routed.down_statistics(expert, gate, up, needs, unchanged_expert=unchanged_expert),
        )

    def down_prior(
        self, expert: int, gate: Tensor, up: Tensor, needs: Collection[Need], *, unchanged_expert: int | None = None
    ) -> SiteStatistics:
        """The same statistics over a sample of all tokens."""

        def compute() -> SiteStatistics:
            rows = self.routed.sample(_SAMPLE_PER_CHANNEL * gate.shape[0])
            return self.routed.down_statistics(expert, gate, up, needs, rows=rows, unchanged_expert=unchanged_expert)

        return self._known(f"expert {expert} down of all tokens", needs, compute)

    def _known(self, name: str, needs: Collection[Need], compute: Callable[[], SiteStatistics]) -> SiteStatistics:
        return self._archive.statistics(f"{self._block} {name}", needs, compute)


class HalfInputs:
    """Statistics of the inputs of half a layer with its current weights.

    Args:
        block: name of the layer's block, for names in the archive.
        enter: returns the half layer with the hidden states that enter it; called when a statistic must be computed.
        original: the same for the unchanged model; required for "cross".
        archive: is searched first.
    """

    def __init__(
        self, block: str, enter: Callable[[], Stream], *, original: Stream | None = None, archive: Archive | None = None
    ) -> None:
        self._block, self._enter, self._original = block, enter, original
        self._archive = archive or NoArchive()

    def sites(self, sites: Sequence[str], needs: Collection[Need]) -> dict[str, SiteStatistics]:
        """Statistics of input sites outside the routed experts; all missing ones are collected in one forward pass."""
        collected: dict[str, SiteStatistics] = {}

        def compute(site: str) -> SiteStatistics:
            if not collected:
                collected.update(collect(self._enter(), sites, needs=needs, original=self._original))
            return collected[site]

        return {
            site: self._archive.statistics(f"{self._block} {site}", needs, partial(compute, site)) for site in sites
        }

    def excerpt(self, tokens: int) -> tuple[Half, Tensor]:
        """The half layer, and the hidden states [1, L, H] of at most `tokens` tokens of the first sample that enter it."""
        stream = self._enter()
        return stream.half, stream.hidden.read(slice(0, 1))[:, :tokens]

    def experts(self, needs: Collection[Need] = ()) -> ExpertInputs:
        """Statistics of the routed experts' inputs.

        Args:
            needs: the statistics to collect over all tokens of the layer.
        """
        return ExpertInputs(
            self._block, lambda: collect_moe(self._enter(), needs=needs, original=self._original), self._archive
        )
