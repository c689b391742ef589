"""Collect statistics of the inputs of half a layer while the calibration tokens pass through it.

Sequential calibration collects one stage after the other, each with the weights before it already changed:

    for half in layer.halves:
        for stage in half.stages:
            statistics = collect(Stream(half, hidden), stage, needs={"hessian"})
            …                                   # change the linears of the stage: layer.weights[name].copy_(…)
        advance(Stream(half, hidden))           # now the hidden states are those after this half

A pass stops at the last site that is collected: nothing after it is computed. For cross terms the unchanged model runs
beside, once per stage too; since its weights never change, `record` runs it once for all stages if there is memory for the
inputs of all its sites. Likewise `settle` keeps the inputs of the last linear of the changed half, so that `advance` does not
compute them again.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace

from torch import Tensor, nn

from quantlab.calibration.accumulate import Accumulator
from quantlab.calibration.experts import RoutedExperts
from quantlab.calibration.hidden import HiddenStates, Workspace
from quantlab.calibration.layer import Half
from quantlab.numerics.statistics import Need, SiteStatistics


@dataclass
class LastInputs:
    """Inputs of the last site of half a layer [S, L, K] from the last `collect`; known only if that collected the site."""

    states: HiddenStates
    known: bool = False


@dataclass(frozen=True)
class Stream:
    """Half a layer and the hidden states that enter it.

    Attributes:
        half: the half layer.
        hidden: the hidden states.
        recorded: inputs of each site [S, L, K], if the hidden states have already passed through the half layer.
        last: memory for the inputs of the last site, see `settle`.
    """

    half: Half
    hidden: HiddenStates
    recorded: Mapping[str, HiddenStates] | None = None
    last: LastInputs | None = None


def advance(stream: Stream) -> None:
    """Replace the hidden states by those after the half layer, unless that has been done."""
    if stream.recorded is not None:
        return
    for which, hidden in stream.hidden.batches():
        last = stream.last.states.read(which) if stream.last is not None and stream.last.known else None
        stream.hidden.write(which, stream.half.forward(hidden) if last is None else stream.half.finish(hidden, last))


def settle(stream: Stream, workspace: Workspace) -> Stream:
    """Let `advance` continue from where the last `collect` stopped, instead of from the start of the half layer.

    The caller guarantees that once the last stage has been collected, only the linears of that stage change; collecting any
    stage again ends the guarantee. Without memory for it, or where routed experts end the half layer, the stream is returned
    unchanged; the numbers are the same.
    """
    half, (samples, length, _), dtype = stream.half, stream.hidden.shape, stream.hidden.dtype
    if half.last is None:
        return stream
    width = half.sites[half.last].width
    if not workspace.has_memory(stream.hidden.tokens * width * dtype.itemsize):
        return stream
    return replace(stream, last=LastInputs(workspace.stream(samples, length, width, dtype=dtype)))


def record(stream: Stream, workspace: Workspace) -> Stream:
    """Run half a layer of the unchanged model once, for the inputs of all stages and the hidden states after it.

    Only for weights that will not change. Without memory for the inputs of all sites, or where routed experts need single
    hidden states, the stream is returned unchanged and is run for every `collect`; the numbers are the same.

    Args:
        stream: the unchanged half layer; its hidden states are replaced by those after it.
        workspace: where the memory comes from.

    Returns:
        The stream to give to `collect` and `advance`.
    """
    half, (samples, length, _), dtype = stream.half, stream.hidden.shape, stream.hidden.dtype
    widths = {name: site.width for name, site in half.sites.items()}
    if half.experts is not None or not workspace.has_memory(
        stream.hidden.tokens * sum(widths.values()) * dtype.itemsize
    ):
        return stream
    recorded = {site: workspace.stream(samples, length, width, dtype=dtype) for site, width in widths.items()}
    for which, hidden in stream.hidden.batches():
        seen: dict[str, Tensor] = {}
        with _watched(half, half.sites, seen, early_stop=False):
            stream.hidden.write(which, half.forward(hidden))
        for site, x in seen.items():
            recorded[site].write(which, x.view(-1, length, widths[site]))
    return replace(stream, recorded=recorded)


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
        changed: the stream of the model with the changes so far.
        sites: names among `changed.half.sites`.
        needs: the statistics to compute.
        original: the stream of the unchanged model; needed for "cross".
        early_stop: whether to stop the forward pass at the last site; it changes no number.

    Raises:
        CheckpointError: an activation is NaN or infinite.
    """
    half, device, last = changed.half, changed.hidden.device, changed.last
    if last is not None:
        last.known = False
    accumulators = {site: Accumulator(half.sites[site].width, needs, device=device) for site in sites}
    for which, hidden in changed.hidden.batches():
        before: Mapping[str, Tensor] = {}
        if "cross" in needs:
            assert original is not None, "the cross term compares with the unchanged model"
            before = _inputs_before(original, sites, which)
        for site, x in _inputs(half, sites, hidden, early_stop=early_stop).items():
            accumulators[site].update(x, before.get(site))
            if last is not None and site == half.last:
                last.states.write(which, x.view(*hidden.shape[:2], -1))
                last.known = True
    return {site: total.result(where=f"{half.block}, input site {site}") for site, total in accumulators.items()}


class _Stop(Exception):  # noqa: N818 - it is no error
    """Every site that is collected has been reached."""


def _inputs_before(original: Stream, sites: Collection[str], samples: slice) -> dict[str, Tensor]:
    """Inputs of the sites of the unchanged model [B · L, K], recorded or computed now."""
    if original.recorded is not None:
        return {site: original.recorded[site].read(samples).flatten(0, 1) for site in sites}
    return _inputs(original.half, sites, original.hidden.read(samples), early_stop=True)


def _inputs(half: Half, sites: Collection[str], hidden: Tensor, *, early_stop: bool) -> dict[str, Tensor]:
    """Inputs of the sites [B · L, K] when hidden states [B, L, H] enter the half layer."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(_watched(half, sites, seen, early_stop=early_stop))
        if early_stop and half.experts is not None:
            stack.enter_context(_skipped(half.experts))  # no site of the half reads the outputs of the routed experts
        with suppress(_Stop):
            half.forward(hidden)
    assert len(seen) == len(sites)
    return seen


@contextmanager
def _watched(half: Half, sites: Collection[str], seen: dict[str, Tensor], *, early_stop: bool) -> Iterator[None]:
    """Put the inputs of the sites into `seen`, and end the forward pass when all have been reached."""

    def hook_for(site: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[site] = arguments[0].reshape(-1, half.sites[site].width)
            if early_stop and len(seen) == len(sites):
                raise _Stop

        return hook

    with ExitStack() as stack:
        for site in sites:
            stack.callback(half.sites[site].module.register_forward_pre_hook(hook_for(site)).remove)
        yield


@contextmanager
def _skipped(experts: RoutedExperts) -> Iterator[None]:
    experts.skipped = True
    try:
        yield
    finally:
        experts.skipped = False


def routing(stream: Stream) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs of the router [n, H], the experts it picks [n, k] int64 and their weights [n, k], batch by batch."""
    experts = stream.half.experts
    assert experts is not None, f"{stream.half.block} has no routed experts"
    for _, hidden in stream.hidden.batches():
        recorded_calls: list[tuple[Tensor, Tensor, Tensor]] = []

        def record(
            x: Tensor,
            index: Tensor,
            weights: Tensor,
            recorded_calls: list[tuple[Tensor, Tensor, Tensor]] = recorded_calls,
        ) -> None:
            recorded_calls.append((x, index, weights))
            raise _Stop

        experts.recorder = record
        try:
            with suppress(_Stop):
                stream.half.forward(hidden)
        finally:
            experts.recorder = None
        yield from recorded_calls
        recorded_calls.clear()
