"""GPTQ: round column by column; the remaining columns compensate for each rounding error.

For a row w the error of the output is ``(w - ŵ) H (w - ŵ)ᵀ``. After column j is rounded with an error e, the optimal
change of the columns after it is ``-(e / U_jj) U_j,j+1:`` with ``H⁻¹ = Uᵀ U`` (see `hessian`). Choices around that
step:

- Scales are fixed before the first column, by a search weighted with the mean squares of the inputs.
- Columns with large inputs come first, while many columns remain to compensate for them. Each column keeps the scale of
  its group in W, and the result is in the column order of W: no index per column is stored.
- Matrices that share their inputs (gate and up of an expert) are concatenated by rows and share one H and one order.
- If weights are to be zero, the others are first moved to the real-valued optimum on that support (`alps`) and rounded
  from there: the error of any candidate is that of the optimum plus their distance in the same metric.
- Afterwards integers and scales are refined alternately in the same metric (`quantease`).
- Rows are independent. A row whose error exceeds that of round-to-nearest with the same options is rounded to nearest,
  and counted.

If inputs x̃ of the original model are given beside the inputs x of the changed one, the target is not W but the
real-valued matrix that reproduces W x̃ best from x (`qronos`), and errors are ``E|W x̃ - Ŵ x|²`` minus the error of
that matrix.

Source: GPTQ (arXiv 2210.17323), section 3 and algorithm 1.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Final

import torch
from torch import Tensor

from quantlab.algorithms.alps import fitted_on_support
from quantlab.algorithms.hessian import (
    check_statistics,
    damped_factor,
    normalised,
    row_errors,
    with_damping,
)
from quantlab.algorithms.qronos import corrected_target
from quantlab.algorithms.quantease import (
    Limits,
    Problem,
    coordinate_descent,
    dequantized,
    limits_of_column,
    refit_scales,
)
from quantlab.algorithms.rtn import round_batch
from quantlab.algorithms.scales import GridOptions
from quantlab.numerics.integer import QuantizedMatrix

_BLOCK: Final = 128
_FIT_STEPS: Final = 20


@dataclass(frozen=True)
class GptqOptions:
    """Options of GPTQ.

    Attributes:
        damping: λ added to H, in units of the mean of its diagonal; > 0.
        act_order: visit columns by decreasing mean square of their input instead of in the order of W.
        rounds: rounds of refinement after the last column, each a pass over the integers and a refit of the scales.
        correction: α in [0, 1], fraction of the error inherited from earlier layers that is compensated if C is given.
    """

    damping: float = 0.01
    act_order: bool = True
    rounds: int = 2
    correction: float = 1.0


DEFAULT: Final = GptqOptions()


@dataclass(frozen=True)
class GptqResult:
    """Rounded matrices and their errors. The leading dimension is absent for a single matrix.

    Attributes:
        q: [B, N, K] int8, in the column order of W.
        scale: [B, N, G] in its stored dtype.
        zero: [B, N, G] int8 zero points, None for symmetric integers.
        bits: width of the integers.
        energy: [B, N] float32, ``w H wᵀ`` of every row, in units of the mean of diag H, like all errors.
        rtn_error: [B, N] float32, error of round-to-nearest.
        error: [B, N] float32, error of q and scale. With C, errors are ``E|W x̃ - Ŵ x|²`` minus that of the real-valued
            target.
        kept_rtn: [B, N] bool, rows that are rounded to nearest because their error is smaller.
        damping: [B] float32, λ used; larger than requested if H was not positive definite.
        failed: [B] bool, H was not positive definite at any λ: all rows are rounded to nearest.
        dead: [B] int64, number of columns whose input was always zero; their weights are rounded to nearest.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    energy: Tensor
    rtn_error: Tensor
    error: Tensor
    kept_rtn: Tensor
    damping: Tensor
    failed: Tensor
    dead: Tensor

    def member(self, index: int) -> "GptqResult":
        """One matrix of a batch."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        one: dict[str, Any] = {n: value[index] if isinstance(value, Tensor) else value for n, value in values.items()}
        return GptqResult(**one)

    def matrix(self, rows: slice = slice(None)) -> QuantizedMatrix:
        """A slice of rows of a single matrix, for example one weight of a concatenation."""
        return QuantizedMatrix(self.q, self.scale, self.bits, self.zero).rows(rows)


def gptq(
    W: Tensor,
    H: Tensor,
    grid: GridOptions,
    options: GptqOptions = DEFAULT,
    *,
    C: Tensor | None = None,
    removed: Tensor | None = None,
) -> GptqResult:
    """Quantize one matrix: `gptq_batch` without the batch dimension.

    Args:
        W: [N, K] of any floating dtype, finite.
        H: [K, K] mean of x xᵀ; any positive multiple gives the same result.
        grid: the integer grid and the search for its scales.
        options: options of the algorithm.
        C: [K, K] mean of (x̃ - x) xᵀ in the unit of H, or None.
        removed: [N, K] bool, weights to set to zero, for which the others compensate; or None.

    Returns:
        The rounded matrix and its errors.

    Raises:
        CalibrationError: H or C has the wrong shape or is not finite.
    """
    return gptq_batch(
        W[None],
        H[None],
        grid,
        options,
        C=None if C is None else C[None],
        removed=None if removed is None else removed[None],
    ).member(0)


def gptq_batch(
    W: Tensor,
    H: Tensor,
    grid: GridOptions,
    options: GptqOptions = DEFAULT,
    *,
    C: Tensor | None = None,
    removed: Tensor | None = None,
) -> GptqResult:
    """Quantize matrices of one shape, each with its own inputs. Needs memory for about four float32 copies of W and of
    H.

    Args:
        W: [B, N, K] of any floating dtype, finite.
        H: [B, K, K] mean of x xᵀ.
        grid, options: as in `gptq`.
        C: [B, K, K] mean of (x̃ - x) xᵀ in the unit of H, or None.
        removed: [B, N, K] bool, weights to set to zero, for which the others compensate; or None.

    Raises:
        CalibrationError: H or C has the wrong shape or is not finite.
    """
    check_statistics(W, H, C)
    W = W.to(torch.float32)
    H, mean = normalised(H)
    diagonal = H.diagonal(dim1=1, dim2=2)
    order = diagonal.argsort(dim=1, descending=True, stable=True) if options.act_order else None
    factor = damped_factor(H if order is None else reordered(H, order), damping=options.damping)
    importance = diagonal + factor.damping[:, None]
    target, nearest = W, _round_all(W, grid, importance, removed)
    if C is not None and options.correction > 0:
        target = _target(W, C / mean[:, None, None], factor.U, order, options.correction)
    problem = Problem(target.mT, with_damping(H, factor.damping), grid.bits, None if removed is None else removed.mT)
    start = target if removed is None else _on_support(target, problem.H, removed)
    first = nearest if start is W else _round_all(start, grid, importance, removed)
    scale = first.scale.mT.contiguous()
    problem = replace(problem, zero=None if first.zero is None else first.zero.mT.contiguous())
    q = _column_pass(replace(problem, target=start.mT), factor.U, scale, order)
    judged = _Judge(W, target, H, factor.damping)
    q, scale = _refined(problem, q, scale, options.rounds)
    rtn_error, error = judged.errors(nearest.steps.mT, nearest.scale.mT), judged.errors(q, scale)
    kept = ~(error <= rtn_error) | factor.failed[:, None]
    chosen = nearest.where(kept, _Rounded(q.mT, scale.mT, first.zero))
    return GptqResult(
        q=chosen.integers(),
        scale=chosen.scale,
        zero=chosen.zero,
        bits=grid.bits,
        energy=row_errors(W, H),
        rtn_error=rtn_error,
        error=torch.where(kept, rtn_error, error),
        kept_rtn=kept,
        damping=factor.damping,
        failed=factor.failed,
        dead=(diagonal == 0).sum(dim=1),
    )


def reordered(H: Tensor, order: Tensor) -> Tensor:
    """H [B, K, K] with rows and columns permuted by `order` [B, K]."""
    rows = H.gather(1, order[:, :, None].expand_as(H))
    return rows.gather(2, order[:, None, :].expand_as(H))


@dataclass(frozen=True)
class _Rounded:
    """Matrices on their grids.

    Attributes:
        steps: ``q - z`` [B, N, K] int8.
        scale: [B, N, G] in its stored dtype.
        zero: [B, N, G] int8 zero points, None for symmetric integers.
    """

    steps: Tensor
    scale: Tensor
    zero: Tensor | None

    def where(self, kept: Tensor, other: "_Rounded") -> "_Rounded":
        """These rows where `kept` [B, N] is true, the other's elsewhere."""
        rows, zero = kept[:, :, None], None
        if self.zero is not None and other.zero is not None:
            zero = torch.where(rows, self.zero, other.zero)
        return _Rounded(torch.where(rows, self.steps, other.steps), torch.where(rows, self.scale, other.scale), zero)

    def integers(self) -> Tensor:
        """q [B, N, K] int8."""
        return self.steps if self.zero is None else self.steps + _by_column(self.zero, self.steps.shape[2])


def _by_column(zero: Tensor, columns: int) -> Tensor:
    """Zero points per group [B, N, G] expanded to columns [B, N, K]."""
    return zero.repeat_interleave(columns // zero.shape[2], dim=2)


def _round_all(W: Tensor, grid: GridOptions, importance: Tensor, removed: Tensor | None) -> _Rounded:
    """Round to nearest; removed weights become zero."""
    W = W if removed is None else W.masked_fill(removed, 0)
    rounded = round_batch(W, grid, importance=importance)
    q, scale = rounded.q.view(W.shape), rounded.scale.view(*W.shape[:2], -1)
    if rounded.zero is None:
        return _Rounded(q, scale, None)
    zero = rounded.zero.view(scale.shape)
    return _Rounded(q - _by_column(zero, q.shape[2]), scale, zero)


def _on_support(target: Tensor, H: Tensor, removed: Tensor) -> Tensor:
    """The optimal real-valued weights on the support; rounding them is equivalent to rounding the target with zeros."""
    return fitted_on_support(target, H, target.masked_fill(removed, 0), removed, steps=_FIT_STEPS)


def _target(W: Tensor, C: Tensor, U: Tensor, order: Tensor | None, strength: float) -> Tensor:
    """`corrected_target` for a U whose columns are permuted by `order`."""
    if order is None:
        return corrected_target(W, C, U, strength=strength)
    index = order[:, None, :].expand_as(W)
    moved = corrected_target(W.gather(2, index), reordered(C, order), U, strength=strength)
    return torch.empty_like(moved).scatter_(2, index, moved)


def _column_pass(problem: Problem, U: Tensor, scale: Tensor, order: Tensor | None) -> Tensor:
    """Algorithm 1, with U in the given order and scale [B, G, N]: steps [B, K, N] int8 in the order of the target."""
    target, removed = problem.target, problem.removed
    batch, columns, rows = target.shape
    width = columns // scale.shape[1]
    if order is None:
        order = torch.arange(columns, device=target.device).expand(batch, columns)
    V = target.gather(1, order[:, :, None].expand_as(target))
    result = torch.empty(target.shape, dtype=torch.int8, device=target.device)
    steps = scale.to(torch.float32)
    for start in range(0, columns, _BLOCK):
        part = slice(start, min(start + _BLOCK, columns))
        index = order[:, part, None].expand(-1, -1, rows)
        step = steps.gather(1, index // width)
        gone = None if removed is None else removed.gather(1, index)
        q, errors = _round_columns(V[:, part], step, U[:, part, part], gone, problem.limits(index // width))
        V[:, part.stop :].baddbmm_(U[:, part, part.stop :].mT, errors, alpha=-1)
        result.scatter_(1, index, q)
    return result


def _round_columns(V: Tensor, step: Tensor, U: Tensor, removed: Tensor | None, limits: Limits) -> tuple[Tensor, Tensor]:
    """Round the columns of a block: steps [B, c, N] int8, and errors divided by the diagonal of U. Overwrites V [B, c,
    N].

    The CUDA kernel supports one integer range for all columns only; with zero points the torch loop runs on the GPU.
    """
    low, high = limits
    if V.device.type == "cuda" and isinstance(low, int) and isinstance(high, int):
        from quantlab.algorithms.cuda.blocks import round_columns

        return round_columns(V, step, U, removed, (low, high))
    q, errors = torch.empty_like(step), torch.empty_like(step)
    for j in range(q.shape[1]):
        q[:, j] = (V[:, j] / step[:, j]).round_().clamp_(*limits_of_column(limits, j))
        if removed is not None:
            q[:, j].masked_fill_(removed[:, j], 0)
        errors[:, j] = (V[:, j] - q[:, j] * step[:, j]) / U[:, j, j, None]
        V[:, j + 1 :].addcmul_(U[:, j, j + 1 :, None], errors[:, j, None], value=-1)
    return q.to(torch.int8), errors


def _refined(problem: Problem, q: Tensor, scale: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Refine integers and scales alternately; no row's error increases."""
    for number in range(rounds):
        q = coordinate_descent(problem, q, scale)
        scale = refit_scales(problem, q, scale)
        if number == rounds - 1:
            q = coordinate_descent(problem, q, scale)
    return q, scale


@dataclass(frozen=True)
class _Judge:
    """Errors of every row: ``E|W x̃ - Ŵ x|²`` minus that of the target; this is ``d H dᵀ`` if the target is W itself.

    The target T minimises the damped objective, which is the plain one plus ``λ|W - Ŵ|²``. The damped objective exceeds
    its minimum by ``(T - Ŵ) (H + λI) (T - Ŵ)ᵀ``; the increase of the damping term is subtracted again.
    """

    W: Tensor
    target: Tensor
    H: Tensor
    damping: Tensor

    def errors(self, q: Tensor, scale: Tensor) -> Tensor:
        """Errors [B, N] float32 of q [B, K, N] and scale [B, G, N]."""
        chosen = dequantized(q.contiguous(), scale).mT
        result = row_errors(self.target - chosen, self.H)
        if self.target is not self.W:
            moved = self.target - self.W
            extra = (self.target - chosen).square() - (self.W - chosen).square() + moved.square()
            result += self.damping[:, None] * extra.sum(dim=2)
        return result
