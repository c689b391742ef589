"""Banks of packed matrices on a CUDA device, with the same interface as the CPU banks.

`triton` is only installed with the CUDA builds of torch, so the kernels are imported where they are launched.
"""

from typing import Final

import torch
from torch import Tensor, nn

from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.number_format import INT4, INT8, ROW, Activations, NumberFormat
from quantlab.runtime.banks.groups import RowGroups, join_groups, split_groups
from quantlab.runtime.cuda import layout
from quantlab.runtime.cuda.tiles import EXPANDED_TOKENS, FEW_TOKENS, Kind, band_rows, linear_tiles
from quantlab.runtime.cuda.wide_schedule import WIDE_TOKENS, token_chunks

COUNTERS: Final = 4096
"""Counters per bank: upper bound of the split tiles of one product, and of the programs that share one product."""


class CudaMatrices(nn.Module):
    """int4 matrices with one scale per group of columns, or int8 matrices with one scale per row.

    Activations are 16-bit or int8.

    Buffers: q, the integers of E matrices in the order of `quantlab.runtime.cuda.layout`; scale [E, K / g, N] or [E, N]
    in its stored dtype; arrived, counters of the kernels. All launches share these counters, so only one stream at a
    time may multiply with a bank.
    """

    q: Tensor
    scale: Tensor
    arrived: Tensor

    def __init__(self, number: NumberFormat, count: int, rows: int, columns: int, *, scale_dtype: torch.dtype) -> None:
        super().__init__()
        self.number = number
        self.shape = (count, rows, columns)
        self.group_size = number.group_size or layout.BLOCK
        self.kind = Kind.INT8_TOKENS if number.activations else Kind.INT4 if number.element == INT4 else Kind.INT8
        depth, height = layout.blocks(columns), layout.slabs(rows)
        sizes = {
            Kind.INT4: ((count, depth, height, 2048), torch.int16),
            Kind.INT8: ((count, depth, height, 4096), torch.int16),
            Kind.INT8_TOKENS: ((count, depth, rows, layout.BLOCK), torch.int8),
        }
        shape, dtype = sizes[self.kind]
        by_group = self.kind == Kind.INT4
        scales = (count, depth * layout.BLOCK // self.group_size, rows) if by_group else (count, rows)
        self.register_buffer("q", torch.zeros(shape, dtype=dtype))
        self.register_buffer("scale", torch.zeros(scales, dtype=scale_dtype))
        self.register_buffer("arrived", torch.zeros(COUNTERS, dtype=torch.int32), persistent=False)

    @staticmethod
    def can_hold(number: NumberFormat, shape: tuple[int, int], scale_dtype: torch.dtype) -> str | None:
        """The reason why the kernels cannot multiply by matrices [N, K] of this format; None if they can."""
        if scale_dtype not in {torch.bfloat16, torch.float16, torch.float32}:
            return f"the CUDA kernels: no scales of {scale_dtype}"
        if not number.symmetric:
            return "the CUDA kernels: no zero points"
        if number.element == INT4 and number.activations is None and number.by_row:
            grouped = number.group_size in {32, 64, 128} and number.fits(shape)
            return None if grouped else "the CUDA kernels: int4 in groups of 32, 64 or 128 columns only"
        if number in {NumberFormat(INT8, ROW), NumberFormat(INT8, ROW, activations=Activations(INT8))}:
            return None
        return "the CUDA kernels: int4 by groups and int8 by rows only"

    def fill(self, index: int, matrix: QuantizedMatrix) -> None:
        """Set matrix `index`."""
        q = matrix.q.to(self.q.device)
        if self.kind == Kind.INT8_TOKENS:
            self.q[index].copy_(layout.in_blocks(q))
        else:
            self.q[index].copy_(layout.pack_int4(q) if self.kind == Kind.INT4 else layout.pack_int8(q))
        scale = matrix.scale.to(self.scale.device)
        if self.kind == Kind.INT4:
            self.scale[index, : scale.shape[1]].copy_(scale.t())
        else:
            self.scale[index].copy_(scale[:, 0])

    def integers(self, index: int) -> Tensor:
        """The storage of the integers of matrix `index`; every bit pattern is a valid matrix."""
        return self.q[index]

    def set_scales(self, index: int, scale: float) -> None:
        """Set all scales of matrix `index` to one value."""
        self.scale[index] = scale

    def products(self, x: Tensor, groups: RowGroups) -> Tensor:
        """[T, K] -> [T, N]: multiply each row by the matrix of its group."""
        if len(groups.matrices) == 1:
            return self.product(x, groups.matrices[0])
        parts = zip(split_groups(x, groups), groups.matrices, strict=True)
        return join_groups([self.product(part, index) for part, index in parts], x.dtype)

    def product(self, x: Tensor, index: int = 0, *, gated: bool = False, added: Tensor | None = None) -> Tensor:
        """Multiply x [T, K] by matrix `index`: [T, N], or [T, N / 2] if `gated`.

        If `gated`, the two halves of the matrix's rows give gate and up, and the result is ``silu(gate) * up``.
        `added` [T, N] is added to an ungated product only.
        float32 activations require exact products, so the matrix is expanded band by band. (int8 activations are exact
        in any case.)
        """
        x, dtype = x.contiguous(), x.dtype
        if gated and not self.gates(x):
            gate, up = self.product(x, index).chunk(2, dim=-1)
            return nn.functional.silu(gate).mul_(up)
        if added is not None and (x.dtype == torch.float32 or x.shape[0] > FEW_TOKENS):
            return self.product(x, index).add_(added)
        from quantlab.runtime.cuda import launch

        chip = launch.chip(x.device)
        if chip.wide and self._copied_in_boxes(x):
            return self._wide_product(x, index)
        if self.kind != Kind.INT8_TOKENS and (x.dtype == torch.float32 or x.shape[0] >= EXPANDED_TOKENS):
            return self._expanded_product(x, index)
        m = self.on_device(index)
        tiles = linear_tiles(self.kind, *self.shape[1:], x.shape[0], chip, gated=gated)
        x_scale = None
        if self.kind == Kind.INT8_TOKENS:
            x, x_scale = launch.quantize_tokens(x, early=tiles.parts == 1)
        if tiles.runs:
            assert added is None, "runs are for more tokens"
            return launch.run_product(m, x, x_scale, tiles, dtype=dtype, gated=gated)
        return launch.product(m, x, x_scale, tiles, dtype=dtype, gated=gated, added=added)

    def gates(self, x: Tensor) -> bool:
        """Whether the product kernels can apply the gate in the same launch, which is only faster at few tokens."""
        return x.dtype != torch.float32 and self.shape[1] % (2 * layout.SLAB) == 0 and x.shape[0] <= FEW_TOKENS

    def _copied_in_boxes(self, x: Tensor) -> bool:
        """Whether the wide kernel accepts x: 16-bit, at least `WIDE_TOKENS` tokens, 16-byte aligned rows for TMA."""
        if x.shape[0] < WIDE_TOKENS or self.kind == Kind.INT8_TOKENS or x.dtype == torch.float32:
            return False
        aligned = self.shape[1] % 8 == 0 and self.shape[2] % 8 == 0 and x.data_ptr() % 16 == 0
        return aligned and (self.kind == Kind.INT8 or self.scale.dtype == x.dtype)

    def on_device(self, index: int | None = None):  # type: ignore[no-untyped-def]  # noqa: ANN201 - late import
        """Matrix `index`, or all matrices if None, as the `launch.Matrices` that the kernels read."""
        from quantlab.runtime.cuda import launch

        which = slice(None) if index is None else slice(index, index + 1)
        return launch.Matrices(self.kind, self.shape, self.group_size, self.q[which], self.scale[which], self.arrived)

    def _wide_product(self, x: Tensor, index: int) -> Tensor:
        from quantlab.runtime.cuda import launch

        tokens = x.shape[0]
        out = torch.empty(tokens, self.shape[1], dtype=x.dtype, device=x.device)
        m, chip = self.on_device(index), launch.chip(x.device)
        first = 0
        for count, way in token_chunks(self.kind, *self.shape[1:], tokens, chip):
            launch.wide_product(m, x[first : first + count], way, out[first : first + count])
            first += count
        return out

    def _expanded_product(self, x: Tensor, index: int) -> Tensor:
        from quantlab.runtime.cuda import launch

        _, rows, columns = self.shape
        out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
        band = torch.empty(min(band_rows(columns), rows), columns, dtype=x.dtype, device=x.device)
        m = self.on_device(index)
        for first in range(0, rows, band.shape[0]):
            expanded = band[: rows - first]
            launch.expanded(m, 0, first, expanded.shape[0], expanded)
            torch.mm(x, expanded.t(), out=out[:, first : first + expanded.shape[0]])
        return out


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm of the rows of x [..., K] in one launch.

    Statistics are float32. Normalised values are rounded to x's dtype before they are multiplied by the weight.
    """
    from quantlab.runtime.cuda import launch

    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return launch.rms_norm(flat, weight, epsilon).view(x.shape)
