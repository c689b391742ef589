"""Binds passes to their algorithms: the weights of one input site and its statistics in, changed weights out."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Final, assert_never

import torch
from torch import Tensor

from quantlab.algorithms.gptq import GptqOptions, GptqResult, gptq_batch
from quantlab.algorithms.magnitude import magnitude_mask
from quantlab.algorithms.rtn import round_to_nearest
from quantlab.algorithms.scales import GridOptions
from quantlab.algorithms.sparsegpt import SparseGptResult, sparsegpt_batch
from quantlab.algorithms.wanda import wanda_mask
from quantlab.numerics.change import change_of
from quantlab.numerics.fp8 import quantize_blocks
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.number_format import Granularity
from quantlab.numerics.statistics import Need, SiteStatistics
from quantlab.recipe.algorithms import Awq, ExpertRemoval, Gptq, Magnitude, Rtn, SmoothQuant, SparseGpt, Wanda
from quantlab.recipe.schema import Prune, Quantize
from quantlab.recipe.schemes import SCHEMES

_CLIP_STEPS = 20
_CLIP_FLOORS: Final = {"mse": 0.6, "activations": 0.4}
_REFITS: Final = {"mse": 0, "activations": 2}
_PRIOR_STRENGTH: Final = 1.0
"""Weight of the prior in an expert's statistics, in tokens per channel, for algorithms without a `shrinkage` option."""

_UNSEEN: Final = "no calibration token reached it: changed by the statistics of all tokens"
_UNSEEN_ALONE: Final = "no calibration token reached it: changed as if all its inputs mattered alike"

Changed = tuple[Tensor | QuantizedMatrix, "WeightReport | None"]
"""The result for a weight, and the report on it; None where no pass changed it."""


@dataclass(frozen=True)
class WeightReport:
    """Report on one weight that passes changed.

    Attributes:
        relative_error: Frobenius norm of the change over that of the weight.
        sparsity: share of weights that are zero now.
        output_error: squared error of its outputs on the calibration text over the squared outputs; None without a Hessian.
        rtn_output_error: the same for rounding to nearest on the same grid.
        tokens: calibration tokens in its statistics.
        fallback: the method used instead of the recipe's; empty without a fallback.
        damping: damping of the Hessian, if it exceeds the recipe's.
        dead_columns: number of inputs that were always zero, None for 0; their weights are rounded to nearest.
        kept_rows: number of rows that are rounded to nearest because their error is smaller, None for 0.
    """

    relative_error: float
    sparsity: float
    output_error: float | None = None
    rtn_output_error: float | None = None
    tokens: int | None = None
    fallback: str = ""
    damping: float | None = None
    dead_columns: int | None = None
    kept_rows: int | None = None

    def known(self) -> dict[str, float | int | str]:
        """The fields that have a value, by name."""
        return {name: value for name, value in asdict(self).items() if value not in {None, ""}}


@dataclass(frozen=True)
class Inputs:
    """Statistics of the activations that enter a weight.

    Attributes:
        own: statistics of the tokens that reach the weight.
        prior: statistics of the tokens of all experts; None if the weight does not belong to an expert.
    """

    own: SiteStatistics
    prior: SiteStatistics | None = None

    def shrunk(self, strength: float) -> SiteStatistics:
        """Own statistics shrunk towards the prior, which gives experts with few tokens a usable Hessian.

        Args:
            strength: weight of the prior, in tokens per input channel.
        """
        if self.prior is None or strength == 0:
            return self.own
        own, prior = self.own, self.prior
        share = own.count / (own.count + strength * len(own.mean_square))

        def mix(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            return None if mine is None or theirs is None else share * mine + (1 - share) * theirs

        squares = share * own.mean_square + (1 - share) * prior.mean_square
        return SiteStatistics(
            own.count, squares, hessian=mix(own.hessian, prior.hessian), cross=mix(own.cross, prior.cross)
        )


def needs_of(passes: Collection[Prune | Quantize]) -> frozenset[Need]:
    """The input statistics that the passes of a weight need."""
    needs: set[Need] = set()
    for step in passes:
        algorithm = step.algorithm
        assert not isinstance(algorithm, ExpertRemoval), "the plan turns it into fewer experts"
        match algorithm:
            case Gptq(correction=correction):
                needs |= {"hessian", "cross"} if correction else {"hessian"}
            case SparseGpt() | Awq():
                needs.add("hessian")
            case Wanda() | Rtn(clip="activations"):
                needs.add("squares")
            case SmoothQuant() | Magnitude() | Rtn():
                pass
            case _:
                assert_never(algorithm)
    return frozenset(needs)


@dataclass(frozen=True)
class Group:
    """Weights that read the same activations.

    Attributes:
        weights: [N, K] each, of any floating dtype, finite, all with the same K.
        inputs: statistics of their inputs; required by calibrated passes.
    """

    weights: Mapping[str, Tensor]
    inputs: Inputs | None = None


def apply_passes(
    groups: Sequence[Group], passes: Sequence[Prune | Quantize], *, dtype: torch.dtype
) -> dict[str, Changed]:
    """Apply passes to weights.

    Args:
        groups: the weights; for experts several groups of one shape, because a single expert does not saturate a
            device.
        passes: at least one, in order; a quantize pass comes last.
        dtype: stored dtype of the weights or of their scales.

    Returns:
        Each weight in `dtype` or quantized, and its report.
    """
    works = [_Work(group.weights, group.inputs) for group in groups]
    for step in passes:
        if isinstance(step, Quantize) and isinstance(step.algorithm, Gptq):
            _gptq_all(works, step, step.algorithm, dtype)
            continue
        if isinstance(step, Prune) and isinstance(step.algorithm, SparseGpt):
            _sparsegpt_all(works, step, step.algorithm)
            continue
        for work in works:
            match step:
                case Prune():
                    work.prune(step)
                case Quantize():
                    work.quantize(step, dtype)
                case _:
                    assert_never(step)
    return {name: changed for work in works for name, changed in work.finish(dtype).items()}


def _gptq_all(works: Sequence["_Work"], step: Quantize, algorithm: Gptq, dtype: torch.dtype) -> None:
    """Apply GPTQ to a batch of matrices of one shape."""
    inputs = [work.known.shrunk(algorithm.shrinkage) for work in works]
    options = GptqOptions(
        damping=algorithm.damping,
        act_order=algorithm.order == "activations",
        rounds=algorithm.refine,
        correction=algorithm.correction,
    )
    done = gptq_batch(
        torch.stack([work.original for work in works]),
        _stacked([one.hessian for one in inputs]),
        grid_of(step, dtype),
        options,
        C=None if inputs[0].cross is None else _stacked([one.cross for one in inputs]),
        removed=None if works[0].mask is None else _stacked([work.mask for work in works]),
    )
    for index, work in enumerate(works):
        work.set_gptq_result(done.member(index), algorithm)


def _sparsegpt_all(works: Sequence["_Work"], step: Prune, algorithm: SparseGpt) -> None:
    """SparseGPT of matrices of one shape at once."""
    pruned = sparsegpt_batch(
        torch.stack([work.original for work in works]),
        _stacked([work.shrunk().hessian for work in works]),
        ratio=step.ratio,
        pattern=_pattern(step),
        damping=algorithm.damping,
    )
    for index, work in enumerate(works):
        work.set_sparsegpt_result(pruned.member(index), algorithm)


def _pattern(step: Prune) -> tuple[int, int] | None:
    return None if step.pattern is None else (step.pattern.removed, step.pattern.of)


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor:
    known = [tensor for tensor in tensors if tensor is not None]
    assert len(known) == len(tensors), "collected for all or for none, by needs_of"
    return torch.stack(known)


class _Work:
    """The weights of one group, concatenated by rows into one matrix, while passes change them.

    The mask of removed weights is kept, so that a pass after pruning changes only the remaining weights.
    """

    def __init__(self, weights: Mapping[str, Tensor], inputs: Inputs | None) -> None:
        self._weights, self._inputs = weights, inputs
        self._rows = [len(weight) for weight in weights.values()]
        first = next(iter(weights.values()))
        self.original = first if len(weights) == 1 else torch.cat(list(weights.values()))
        self._matrix: Tensor | QuantizedMatrix = self.original
        self._blocks: list[QuantizedMatrix] = []
        self.mask: Tensor | None = None
        self._fallback = [""] * len(self._rows)
        self._rtn_errors: list[float] | None = None
        self._damping: float | None = None
        self._dead: int | None = None
        self._kept: list[int] = [0] * len(self._rows)
        self._used_prior = False

    @property
    def _dense(self) -> Tensor:
        assert isinstance(self._matrix, Tensor), "nothing follows a quantize pass"
        return self._matrix

    @property
    def known(self) -> Inputs:
        assert self._inputs is not None, "a calibrated pass has inputs"
        return self._inputs

    def prune(self, step: Prune) -> None:
        """Remove weights."""
        ratio, pattern = step.ratio, _pattern(step)
        algorithm = step.algorithm
        assert not isinstance(algorithm, ExpertRemoval), "the plan turns it into fewer experts"
        match algorithm:
            case Magnitude():
                masks = [magnitude_mask(part, ratio=ratio, pattern=pattern) for part in self._apart(self._dense)]
                self.mask = masks[0] if len(masks) == 1 else torch.cat(masks)
            case Wanda():
                squares = self.shrunk().mean_square
                self.mask = wanda_mask(self._dense, squares, ratio=ratio, pattern=pattern)
            case SparseGpt():
                raise AssertionError("done for all matrices at once")
            case _:
                assert_never(algorithm)
        self._matrix = self._dense.masked_fill(self.mask, 0)

    def quantize(self, step: Quantize, dtype: torch.dtype) -> None:
        """Round the matrix to the number format of a scheme; blocks start at the first row of each weight."""
        algorithm = step.algorithm
        match algorithm:
            case Gptq():
                raise AssertionError("done for all matrices at once")
            case Rtn(clip="activations") | Awq(clip="activations"):
                squares = self.shrunk().mean_square
                self._matrix = round_to_nearest(self._dense, grid_of(step, dtype), importance=squares)
            case Rtn() if not SCHEMES[step.quantize].format.is_integer:
                granularity = SCHEMES[step.quantize].format.granularity
                self._blocks = [_in_blocks(part, granularity) for part in self._apart(self._dense)]
            case Rtn() | Awq() | SmoothQuant():
                self._matrix = round_to_nearest(self._dense, grid_of(step, dtype))
            case _:
                assert_never(algorithm)

    def shrunk(self) -> SiteStatistics:
        """Statistics of its inputs, shrunk towards the prior where it is an expert's."""
        self._used_prior = True
        return self.known.shrunk(_PRIOR_STRENGTH)

    def _damped(self, needed: float, wanted: float) -> None:
        """Record damping above the recipe's, with a tolerance because λ is float32."""
        if needed > 1.001 * wanted:
            self._damping = _four_digits(max(needed, self._damping or 0.0))

    def set_sparsegpt_result(self, done: SparseGptResult, algorithm: SparseGpt) -> None:
        """Replace the matrix by the result of SparseGPT."""
        self._matrix, self.mask = done.W, done.mask
        self._damped(float(done.damping), algorithm.damping)
        if done.failed:
            self._note("pruned without compensation, the Hessian is singular at every damping")

    def set_gptq_result(self, done: GptqResult, algorithm: Gptq) -> None:
        """Replace the matrix by the result of GPTQ."""
        self._matrix = done.matrix()
        self._used_prior = self._used_prior or algorithm.shrinkage > 0
        self._damped(float(done.damping), algorithm.damping)
        self._dead = int(done.dead) or None
        parts = zip(self._apart(done.rtn_error), self._apart(done.energy), strict=True)
        self._rtn_errors = [_ratio(float(error.sum()), float(energy.sum())) for error, energy in parts]
        if done.failed:
            self._note("rounded to nearest, the Hessian is singular at every damping")
        for index, kept in enumerate(self._apart(done.kept_rtn)):
            self._kept[index] = int(kept.sum())
            if self._kept[index] and not done.failed:
                self._fallback[index] = "some rows rounded to nearest, which is better there"

    def _note(self, what: str) -> None:
        self._fallback = [what] * len(self._rows)

    def _apart(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Split the rows of the matrix by weight."""
        return torch.split_with_sizes(rows, self._rows)

    def finish(self, dtype: torch.dtype) -> dict[str, Changed]:
        """The result and the report of each weight."""
        parts: list[Tensor | QuantizedMatrix]
        if self._blocks:
            parts = [*self._blocks]
        elif isinstance(self._matrix, QuantizedMatrix):
            ends = list(accumulate(self._rows))
            parts = [self._matrix.rows(slice(end - rows, end)) for rows, end in zip(self._rows, ends, strict=True)]
        else:
            parts = [part.to(dtype) for part in self._apart(self._matrix)]
        return {
            name: (part, self._report(weight, part, index))
            for index, ((name, weight), part) in enumerate(zip(self._weights.items(), parts, strict=True))
        }

    def _report(self, W: Tensor, result: Tensor | QuantizedMatrix, index: int) -> WeightReport:
        """The report; numbers are rounded to four digits, so that they do not depend on the order of summation."""
        change = change_of(W, result)
        output_error = None
        if self._inputs is not None and self._inputs.own.hessian is not None:
            H = self._inputs.own.hessian
            output_error = _four_digits(_ratio(_energy(change.delta, H), _energy(change.before, H)))
        return WeightReport(
            relative_error=_four_digits(_ratio(change.delta.norm().item(), change.before.norm().item())),
            sparsity=_four_digits(1 - change.nonzero / W.numel()),
            output_error=output_error,
            rtn_output_error=None if self._rtn_errors is None else _four_digits(self._rtn_errors[index]),
            tokens=None if self._inputs is None else self._inputs.own.count,
            fallback=self._unseen()
            if self._inputs is not None and self._inputs.own.count == 0
            else self._fallback[index],
            damping=self._damping,
            dead_columns=self._dead,
            kept_rows=self._kept[index] or None,
        )

    def _unseen(self) -> str:
        return _UNSEEN if self._used_prior and self.known.prior is not None else _UNSEEN_ALONE


def _in_blocks(W: Tensor, granularity: Granularity) -> QuantizedMatrix:
    """A weight [N, K] as FP8 e4m3 with a float32 scale per block."""
    rows, columns = granularity.rows, granularity.columns
    assert rows is not None and columns is not None, "floating-point schemes have blocks"  # noqa: PT018
    q, scale = quantize_blocks(W, block=(rows, columns))
    return QuantizedMatrix(q, scale, 8, block=(rows, columns))


def grid_of(step: Quantize, dtype: torch.dtype) -> GridOptions:
    """The integer grid of a pass, its scales of `dtype`."""
    scheme = SCHEMES[step.quantize]
    grid = step.algorithm.grid or scheme.grid
    assert grid is not None, "the recipe allows integer formats only to algorithms that choose integers"
    return GridOptions(
        bits=scheme.format.bits,
        group_size=scheme.format.group_size,
        scale_dtype=dtype,
        grid=grid,
        clip_steps=0 if step.clip == "none" else _CLIP_STEPS,
        clip_floor=_CLIP_FLOORS.get(step.clip, 1.0),
        refits=_REFITS.get(step.clip, 0),
    )


def _energy(rows: Tensor, H: Tensor) -> float:
    return float((rows @ H).mul_(rows).sum())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")
