"""Collects statistics of the inputs of half a layer while the calibration tokens pass through it.

Sequential calibration collects the statistics of one stage at a time, after the linears of earlier stages were changed:

    for half in layer.halves:
        for stage in half.stages:
            statistics = collect(Stream(half, hidden), stage, needs={"hessian"})
            …                                   # change the linears of the stage: layer.weights[name].copy_(…)
        advance(Stream(half, hidden))           # the hidden states are now those after this half

The forward pass stops at the last site to collect. Cross terms also need a forward pass of the unchanged model per
stage; because its weights do not change, `record` runs it once for all stages if the inputs of all its sites fit into
memory. Similarly, `keep_last_inputs` keeps the inputs of the last linear of the changed half, so that `advance` does
not recompute them.
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
    """Inputs of the last site of half a layer [S, L, K], from the last call of `collect`.

    Attributes:
        states: the inputs.
        known: whether that call collected the site; if not, `states` is undefined.
    """

    states: HiddenStates
    known: bool = False


@dataclass(frozen=True)
class Stream:
    """Half a layer and the hidden states that enter it.

    Attributes:
        half: the half layer.
        hidden: the hidden states.
        recorded: inputs of each site [S, L, K], if the hidden states already passed through the half layer, see
            `record`.
        last: buffer for the inputs of the last site, see `keep_last_inputs`.
    """

    half: Half
    hidden: HiddenStates
    recorded: Mapping[str, HiddenStates] | None = None
    last: LastInputs | None = None


def advance(stream: Stream) -> None:
    """Replace the hidden states by those after the half layer, unless `record` did."""
    if stream.recorded is not None:
        return
    for which, hidden in stream.hidden.batches():
        last = stream.last.states.read(which) if stream.last is not None and stream.last.known else None
        stream.hidden.write(which, stream.half.forward(hidden) if last is None else stream.half.finish(hidden, last))


def keep_last_inputs(stream: Stream, workspace: Workspace) -> Stream:
    """Keep the inputs of the last site in `collect`, so that `advance` computes only the last linear.

    After the last stage was collected, the caller may change only the linears of that stage, until a stage is collected
    again. If memory is short, or if routed experts end the half layer, the stream is returned without a buffer; results
    are the same.
    """
    half, (samples, length, _), dtype = stream.half, stream.hidden.shape, stream.hidden.dtype
    if half.last is None:
        return stream
    width = half.sites[half.last].width
    if not workspace.has_memory(stream.hidden.tokens * width * dtype.itemsize):
        return stream
    return replace(stream, last=LastInputs(workspace.stream(samples, length, width, dtype=dtype)))


def record(stream: Stream, workspace: Workspace) -> Stream:
    """Run half a layer of the unchanged model once, and record the inputs of all its sites.

    The weights must not change afterwards. If memory is short, or if routed experts need single hidden states, the
    stream is returned unchanged and runs again in every `collect`; results are the same.

    Args:
        stream: the unchanged half layer; its hidden states are replaced by those after it.
        workspace: allocates the buffers.

    Returns:
        The stream to pass to `collect` and `advance`.
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
        original: the stream of the unchanged model; required for "cross".
        early_stop: whether to stop the forward pass at the last site; results are the same.

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


class _Stop(Exception):  # noqa: N818 - not an error
    """Ends a forward pass after all required inputs were seen."""


def _inputs_before(original: Stream, sites: Collection[str], samples: slice) -> dict[str, Tensor]:
    """Inputs of the sites in the unchanged model [B · L, K], recorded or computed now."""
    if original.recorded is not None:
        return {site: original.recorded[site].read(samples).flatten(0, 1) for site in sites}
    return _inputs(original.half, sites, original.hidden.read(samples), early_stop=True)


def _inputs(half: Half, sites: Collection[str], hidden: Tensor, *, early_stop: bool) -> dict[str, Tensor]:
    """Inputs of the sites [B · L, K] for hidden states [B, L, H] that enter the half layer."""
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
    """Store the inputs of the sites in `seen`; with `early_stop`, end the forward pass when all were seen."""

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
    """Inputs of the router [n, H], experts it picks [n, k] int64 and their routing weights [n, k], batch by batch."""
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
