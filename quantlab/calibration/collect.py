"""Watch what enters the linears of half a layer while the calibration tokens pass through it.

True-sequential calibration asks for one stage after the other, each with the weights before it already changed:

    for half in layer.halves:
        for stage in half.stages:
            statistics = collect(Stream(half, hidden), stage, needs={"hessian"})
            …                                   # change the linears of the stage: layer.weights[name].copy_(…)
        advance(Stream(half, hidden))           # now the hidden states are those after this half

A pass stops as soon as the last site asked for has been seen: nothing behind it is computed.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from torch import Tensor, nn

from quantlab.calibration.experts import RoutedExperts
from quantlab.calibration.hidden import HiddenStates
from quantlab.calibration.layer import Half
from quantlab.calibration.statistics import Accumulator, Need, SiteStatistics


@dataclass(frozen=True)
class Stream:
    """Half a layer and the hidden states that enter it."""

    half: Half
    hidden: HiddenStates


def advance(stream: Stream) -> None:
    """Replace the hidden states by those after the half layer."""
    for which, hidden in stream.hidden.batches():
        stream.hidden.write(which, stream.half.forward(hidden))


def collect(
    changed: Stream,
    sites: Collection[str],
    *,
    needs: Collection[Need],
    original: Stream | None = None,
    early_stop: bool = True,
) -> dict[str, SiteStatistics]:
    """Statistics of input sites over all calibration tokens.

    Args:
        changed: the model as it is becoming.
        sites: names among `changed.half.sites`.
        needs: what to compute.
        original: the unchanged model, with its own hidden states; needed for "cross".
        early_stop: whether to leave out what lies behind the last site; it changes no number.

    Raises:
        CheckpointError: an activation is NaN or infinite.
    """
    half, device = changed.half, changed.hidden.device
    accumulators = {site: Accumulator(_width(half.sites[site].module), needs, device=device) for site in sites}
    compared = original if "cross" in needs else None
    assert compared is not None or "cross" not in needs, "the cross term compares with the unchanged model"
    for which, hidden in changed.hidden.batches():
        before: Mapping[str, Tensor] = {}
        if compared is not None:
            before = _inputs(compared.half, sites, compared.hidden.read(which), early_stop=early_stop)
        for site, x in _inputs(half, sites, hidden, early_stop=early_stop).items():
            accumulators[site].update(x, before.get(site))
    return {site: total.result(where=f"{half.block}, input site {site}") for site, total in accumulators.items()}


def _width(module: nn.Module) -> int:
    assert isinstance(module, nn.Linear)
    return module.in_features


class _Stop(Exception):  # noqa: N818 - it is no error
    """All that was wanted has been seen."""


def _inputs(half: Half, sites: Collection[str], hidden: Tensor, *, early_stop: bool) -> dict[str, Tensor]:
    """What enters the sites [B · L, K] when hidden states [B, L, H] enter the half layer."""
    seen: dict[str, Tensor] = {}

    def watch(site: str) -> None:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[site] = arguments[0].reshape(-1, _width(module))
            if early_stop and len(seen) == len(sites):
                raise _Stop

        stack.callback(half.sites[site].module.register_forward_pre_hook(hook).remove)

    with ExitStack() as stack:
        for site in sites:
            watch(site)
        if early_stop and half.experts is not None:
            stack.enter_context(_skipped(half.experts))  # no site of the half reads what the routed experts say
        with suppress(_Stop):
            half.forward(hidden)
    assert len(seen) == len(sites)
    return seen


@contextmanager
def _skipped(experts: RoutedExperts) -> Iterator[None]:
    experts.skipped = True
    try:
        yield
    finally:
        experts.skipped = False


def routing(stream: Stream) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What the router says, batch by batch: what it read [n, H], the experts [n, k] int64 and their weights [n, k]."""
    experts = stream.half.experts
    assert experts is not None, f"{stream.half.block} has no routed experts"
    for _, hidden in stream.hidden.batches():
        heard: list[tuple[Tensor, Tensor, Tensor]] = []

        def record(
            x: Tensor, index: Tensor, weights: Tensor, heard: list[tuple[Tensor, Tensor, Tensor]] = heard
        ) -> None:
            heard.append((x, index, weights))
            raise _Stop

        experts.recorder = record
        try:
            with suppress(_Stop):
                stream.half.forward(hidden)
        finally:
            experts.recorder = None
        yield from heard
        heard.clear()
