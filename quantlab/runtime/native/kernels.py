"""Calls of the native kernels with tensors.

A kernel multiplies rows of activations with the matrices of a bank, group by group, in one call, whatever the dtype of the
activations: it rounds them as it needs them and answers in their dtype. Scales are of any floating dtype.

Legend: as in `quantlab.runtime.products`.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from quantlab.runtime.native.library import library

_DTYPES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_Pointer: Final = ctypes.c_void_p
_Long: Final = ctypes.c_int64
_Code: Final = ctypes.c_int


_ACTIVATIONS: Final = (_Pointer, _Long, _Long, _Code, _Pointer, _Pointer, _Pointer, _Long, _Pointer)
_ARGUMENTS: Final[Mapping[str, Sequence[Any]]] = {
    "quantlab_int4_product": (_Pointer, _Pointer, _Long, _Long, _Long, _Code, *_ACTIVATIONS),
    "quantlab_int4_expand": (_Pointer, _Pointer, _Long, _Long, _Long, _Code, _Long, _Long, _Pointer),
    "quantlab_int8_product": (_Pointer, _Pointer, _Long, _Long, _Code, *_ACTIVATIONS),
    "quantlab_int8_weight_product": (_Pointer, _Pointer, _Long, _Long, _Code, *_ACTIVATIONS),
    "quantlab_dense_product": (_Pointer, _Long, _Long, *_ACTIVATIONS),
    "quantlab_paired_product": (_Pointer, _Long, _Long, _Pointer, _Long, _Long, _Pointer, _Pointer),
    "quantlab_norm": (_Pointer, _Pointer, _Long, _Long, ctypes.c_float, _Code, _Pointer),
    "quantlab_gate": (_Pointer, _Long, _Long, _Code, _Pointer),
    "quantlab_weighted_sum": (_Pointer, _Pointer, _Long, _Long, _Code, _Pointer),
    "quantlab_latent_attention": (*[_Pointer] * 5, *[_Long] * 7, ctypes.c_float, _Code, _Pointer),
}


class Slices:
    """Groups of rows as the kernels read them: rows start[i] to start[i] + count[i] meet matrix which[i]."""

    def __init__(self, which: Sequence[int], start: Sequence[int], count: Sequence[int]) -> None:
        self.number = len(which)
        array = _Long * self.number
        self.which, self.start, self.count = array(*which), array(*start), array(*count)


def int4_product(x: Tensor, q: Tensor, scale: Tensor, shape: tuple[int, int, int], groups: Slices, out: Tensor) -> None:
    """Rows of `out` [T, N] named by the groups = the rows of x [T, K] times their int4 matrices.

    Args:
        x: activations, rounded to bfloat16.
        q: in the layout of `int4.c`.
        scale: [E, N / 16, G, 16] float16 or bfloat16.
        shape: N, K and the group size.
        groups: which rows, and their matrices.
        out: in the dtype of x.
    """
    weights = (q.data_ptr(), scale.data_ptr(), *shape, _DTYPES[scale.dtype])
    _call("quantlab_int4_product", weights, x, groups, out)


def int4_expand(q: Tensor, scale: Tensor, shape: tuple[int, int, int], start: int, stop: int) -> Tensor:
    """Rows start to stop of one matrix (start a multiple of 16), transposed: [K, stop - start] in the dtype of the scales."""
    out = torch.empty(shape[1], stop - start, dtype=scale.dtype)
    function = _function("quantlab_int4_expand")
    function(q.data_ptr(), scale.data_ptr(), *shape, _DTYPES[scale.dtype], start, stop, out.data_ptr())
    return out


def int8_product(x: Tensor, q: Tensor, scale: Tensor, groups: Slices, out: Tensor) -> None:
    """W8A8: as `int4_product` with q [E, N, K] int8, scale [E, N]; the activations are rounded to int8 per row."""
    weights = (q.data_ptr(), scale.data_ptr(), *q.shape[1:], _DTYPES[scale.dtype])
    _call("quantlab_int8_product", weights, x, groups, out)


def int8_weight_product(x: Tensor, q: Tensor, scale: Tensor, groups: Slices, out: Tensor) -> None:
    """W8A16: as `int8_product` with the activations rounded to bfloat16."""
    weights = (q.data_ptr(), scale.data_ptr(), *q.shape[1:], _DTYPES[scale.dtype])
    _call("quantlab_int8_weight_product", weights, x, groups, out)


def dense_product(x: Tensor, weight: Tensor, groups: Slices, out: Tensor) -> None:
    """The same with weight [E, N, K]; weights, x and out of one 16-bit dtype."""
    _call("quantlab_dense_product", (weight.data_ptr(), *weight.shape[1:]), x, groups, out)


def paired_product(x: Tensor, weight: int, rows: int, bias: Tensor | None) -> Tensor:
    """x [T, K] bfloat16 times one matrix [rows, K] in the layout of `pairs.c`, given by its address,
    and bias [rows] added: [T, rows].
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens, columns = x.shape
    out = torch.empty(tokens, rows, dtype=x.dtype)
    _function("quantlab_paired_product")(
        weight,
        rows,
        columns,
        x.data_ptr(),
        x.stride(0),
        tokens,
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
    )
    return out


def latent_attention(
    query: Tensor, latents: Tensor, rotary: Tensor, weight: Tensor, *, mask: Tensor | None, scaling: float
) -> Tensor:
    """`quantlab.runtime.attention.absorbed` for one new token and contiguous tensors of one 16-bit dtype.

    Args:
        query: [B, H, 1, N + R].
        latents: [B, 1, S, L].
        rotary: [B, 1, S, R].
        weight: kv_b's, [H, N + V, L].
        mask: [B, S] float32, added to the scores.
        scaling: of the scores.

    Returns:
        [B, 1, H, V].
    """
    batch, heads, _, width = query.shape
    (cached, latent), turned, rows = latents.shape[2:], rotary.shape[3], weight.shape[1]
    value = rows - width + turned
    out = torch.empty(batch, 1, heads, value, dtype=query.dtype)
    _function("quantlab_latent_attention")(
        *(query.data_ptr(), latents.data_ptr(), rotary.data_ptr(), weight.data_ptr()),
        None if mask is None else mask.data_ptr(),
        *(batch, heads, cached, latent, width - turned, turned, value),
        scaling,
        _DTYPES[query.dtype],
        out.data_ptr(),
    )
    return out


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm of contiguous x [..., K] with weight [K] of its dtype."""
    out = torch.empty_like(x)
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    _function("quantlab_norm")(
        x.data_ptr(), weight.data_ptr(), rows, columns, epsilon, _DTYPES[x.dtype], out.data_ptr()
    )
    return out


def gate(x: Tensor) -> Tensor:
    """SiLU of the first half of contiguous rows [T, 2 K] times the second: [T, K]."""
    rows, columns = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, columns, dtype=x.dtype)
    _function("quantlab_gate")(x.data_ptr(), rows, columns, _DTYPES[x.dtype], out.data_ptr())
    return out


def weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """The sum of contiguous rows [T, K] with weights [T] float32: [1, K]."""
    rows, columns = x.shape
    out = torch.empty(1, columns, dtype=x.dtype)
    code = _DTYPES[x.dtype]
    _function("quantlab_weighted_sum")(x.data_ptr(), weights.data_ptr(), rows, columns, code, out.data_ptr())
    return out


def _call(name: str, weights: tuple[int, ...], x: Tensor, groups: Slices, out: Tensor) -> None:
    if x.stride(1) != 1:
        x = x.contiguous()
    rows = (x.data_ptr(), x.stride(0), x.shape[0], _DTYPES[x.dtype])
    _function(name)(*weights, *rows, groups.which, groups.start, groups.count, groups.number, out.data_ptr())


@cache
def _function(name: str) -> Callable[..., None]:
    loaded = library()
    assert loaded is not None, "asked for only where there are native kernels"
    function = loaded[name]
    function.argtypes = _ARGUMENTS[name]
    function.restype = None
    return function
