"""Bank of floating-point matrices."""

import torch
from torch import Tensor, nn

from quantlab.runtime.banks.dense_product import dense_product, native_dense_limit
from quantlab.runtime.banks.groups import RowGroups, dispatch_by_rows, join_groups, split_groups
from quantlab.runtime.cuda.banks import COUNTERS
from quantlab.runtime.native import kernels


class DenseMatrices(nn.Module):
    """Floating-point matrices: weight [E, N, K] of `dtype`; on CUDA also the counters of the kernels."""

    weight: nn.Parameter
    arrived: Tensor

    def __init__(self, count: int, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = (count, rows, columns)
        self.weight = nn.Parameter(torch.empty(count, rows, columns, dtype=dtype), requires_grad=False)
        self._each = self.weight.unbind(0)
        if self.weight.is_cuda:
            counters = torch.zeros(COUNTERS, dtype=torch.int32, device=self.weight.device)
            self.register_buffer("arrived", counters, persistent=False)

    def fill(self, index: int, matrix: Tensor) -> None:
        """Set matrix `index` from [N, K] of any floating dtype."""
        self.weight[index].copy_(matrix)

    def products(self, x: Tensor, groups: RowGroups) -> Tensor:
        """[T, K] -> [T, N], each row times the matrix of its group."""
        limit = native_dense_limit(x, self.weight)
        if limit < 0:
            parts = zip(split_groups(x, groups), groups.matrices, strict=True)
            return join_groups([dense_product(part, self._each[index]) for part, index in parts], x.dtype)
        return dispatch_by_rows(
            x,
            self.shape[1],
            groups,
            limit=limit,
            few=lambda slices, out: kernels.dense_product(x, self.weight, slices, out),
            many=lambda part, index: dense_product(part, self._each[index]),
        )
