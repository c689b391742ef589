"""Python bindings of the native kernels: functions that take tensors.

One call multiplies rows of activations by the matrices of a bank, group by group. Activations may have any floating
dtype; the kernel rounds them as it needs and returns their dtype. Scales may have any floating dtype. `int4_product`,
`int8_weight_product` and the functions `…_expand` need `product_library`, `int8_sums` that of AVX2, all others
`library`.

Legend: as in `quantlab.runtime.banks`.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from quantlab.architectures.layer import Routing
from quantlab.runtime.decoding.kernel_interface import CachePosition
from quantlab.runtime.native.calls import Code, IndexTensor, Long, run

_DTYPES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Slices:
    """Groups of rows as the kernels read them: matrices[i] multiplies rows start[i] to start[i] + count[i]."""

    def __init__(self, matrices: Sequence[int], start: Sequence[int], count: Sequence[int]) -> None:
        self.number = len(matrices)
        array = Long * self.number
        self.matrices: Any = matrices.tensor.data_ptr() if isinstance(matrices, IndexTensor) else array(*matrices)
        self.start, self.count = array(*start), array(*count)


def int4_product(x: Tensor, q: Tensor, scale: Tensor, shape: tuple[int, int, int], groups: Slices, out: Tensor) -> None:
    """Multiply the rows of x [T, K] in the groups by their int4 matrices, into the same rows of `out` [T, N].

    Args:
        x: activations, of any floating dtype; rounded to bfloat16, or with AVX2 not at all.
        q: in the layout of `int4.c`.
        scale: [E, N / 16, G, 16] float16 or bfloat16.
        shape: N, K and the group size.
        groups: the rows and their matrices.
        out: in the dtype of x.
    """
    weights = (q.data_ptr(), scale.data_ptr(), *shape, _DTYPES[scale.dtype])
    _call("quantlab_int4_product", weights, x, groups, out)


def int4_expand(q: Tensor, scale: Tensor, shape: tuple[int, int, int], start: int, out: Tensor) -> None:
    """Dequantize some rows of one matrix.

    Args:
        q: [N', K / 2], in the layout of `int4.c`.
        scale: [N' / 16, G, 16] float16 or bfloat16.
        shape: N, K and the group size.
        start: the first row, a multiple of 16.
        out: [K, n] float32 or bfloat16, contiguous; receives rows start to start + n, transposed.
    """
    weights = (q.data_ptr(), scale.data_ptr(), *shape, _DTYPES[scale.dtype])
    run("quantlab_int4_expand", *weights, start, start + out.shape[1], _DTYPES[out.dtype], out.data_ptr())


def int8_expand(q: Tensor, scale: Tensor, start: int, out: Tensor) -> None:
    """Dequantize some rows of one matrix.

    Args:
        q: [N, K] int8, contiguous; K is a multiple of 8.
        scale: [N] of any floating dtype.
        start: the first row.
        out: [n, K] float32 or bfloat16, contiguous; receives rows start to start + n.
    """
    weights = (q.data_ptr(), scale.data_ptr(), q.shape[1], _DTYPES[scale.dtype])
    run("quantlab_int8_expand", *weights, start, start + out.shape[0], _DTYPES[out.dtype], out.data_ptr())


def int8_sums(x: Tensor, q: Tensor) -> Tensor:
    """``x @ q^T`` [T, N] int32 in exact integer arithmetic; x [T, K] and q [N, K] are int8, q is contiguous."""
    x = x.contiguous()
    out = torch.empty(x.shape[0], q.shape[0], dtype=torch.int32)
    run("quantlab_int8_sums", q.data_ptr(), *q.shape, x.data_ptr(), x.shape[0], out.data_ptr())
    return out


def int8_product(x: Tensor, q: Tensor, scale: Tensor, groups: Slices, out: Tensor) -> None:
    """W8A8: like `int4_product`, with q [E, N, K] int8 and scale [E, N]; activations are quantized to int8 per row."""
    weights = (q.data_ptr(), scale.data_ptr(), *q.shape[1:], _DTYPES[scale.dtype])
    _call("quantlab_int8_product", weights, x, groups, out)


def int8_weight_product(x: Tensor, q: Tensor, scale: Tensor, groups: Slices, out: Tensor) -> None:
    """W8A16: like `int8_product`, with the activations rounded to bfloat16, or with AVX2 not at all."""
    weights = (q.data_ptr(), scale.data_ptr(), *q.shape[1:], _DTYPES[scale.dtype])
    _call("quantlab_int8_weight_product", weights, x, groups, out)


def dense_product(x: Tensor, weight: Tensor, groups: Slices, out: Tensor) -> None:
    """Like `int4_product`, with weight [E, N, K]; weight, x and out have the same 16-bit dtype."""
    _call("quantlab_dense_product", (weight.data_ptr(), *weight.shape[1:]), x, groups, out)


def paired_product(x: Tensor, weight: int, rows: int, bias: Tensor | None) -> Tensor:
    """x [T, K] bfloat16 times one matrix [rows, K] in the layout of `pairs.c`, plus bias [rows]: [T, rows].

    Args:
        x: activations.
        weight: the address of the matrix.
        rows: of the matrix.
        bias: [rows], or None.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens, columns = x.shape
    out = torch.empty(tokens, rows, dtype=x.dtype)
    run(
        "quantlab_paired_product",
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
    query: Tensor,
    latents: Tensor,
    rotary: Tensor,
    weight: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    cache_position: CachePosition | None = None,
) -> Tensor:
    """`quantlab.runtime.modules.attention.absorbed` for one new token per sequence.

    Tensors are contiguous and have the same 16-bit dtype.

    Args:
        query: [B, H, 1, N + R].
        latents: [B, 1, S, L].
        rotary: [B, 1, S, R].
        weight: of kv_b, [H, N + V, L].
        scaling: factor of the scores.
        mask: [B, S] float32, added to the scores.
        cache_position: of the new tokens. They attend to positions from the end of the padding up to their own;
            without it, to all positions.

    Returns:
        [B, 1, H, V].
    """
    batch, heads, _, width = query.shape
    (length, latent), turned, rows = latents.shape[2:], rotary.shape[3], weight.shape[1]
    value = rows - width + turned
    out = torch.empty(batch, 1, heads, value, dtype=query.dtype)
    run(
        "quantlab_latent_attention",
        *(query.data_ptr(), latents.data_ptr(), rotary.data_ptr(), weight.data_ptr()),
        None if mask is None else mask.data_ptr(),
        *(
            (None, None)
            if cache_position is None
            else (cache_position.index.data_ptr(), cache_position.padding.data_ptr())
        ),
        *(batch, heads, length, latent, width - turned, turned, value),
        scaling,
        _DTYPES[query.dtype],
        out.data_ptr(),
    )
    return out


def grouped_attention(
    query: Tensor, keys: Tensor, values: Tensor, cache_position: CachePosition, *, scaling: float
) -> Tensor:
    """Grouped-query attention of one new token per sequence to a cache.

    Tensors are contiguous and have the same 16-bit dtype.

    Args:
        query: [B, H, D].
        keys, values: [B, G, S, D]; H / G query heads share a key head.
        cache_position: of the new tokens. They attend to positions from the end of the padding up to their own.
        scaling: factor of the scores.

    Returns:
        [B, H, D].
    """
    (batch, heads, width), (_, key_heads, length, _) = query.shape, keys.shape
    out = torch.empty_like(query)
    run(
        "quantlab_grouped_attention",
        *(
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            cache_position.index.data_ptr(),
            cache_position.padding.data_ptr(),
        ),
        *(batch, heads, key_heads, length, width),
        scaling,
        _DTYPES[query.dtype],
        out.data_ptr(),
    )
    return out


def turn(
    x: Tensor, cache_position: CachePosition, out: Tensor, *, in_pairs: bool = False, out_in_pairs: bool = False
) -> None:
    """Rotary embedding: rotate x [B, H, R] by the angles of each token, into `out`.

    Args:
        x: of any floating dtype; rows are contiguous.
        cache_position: cache position and angles of the tokens.
        out: [B, H, R], may be x; or a contiguous cache [B, H, S, R], which is written at the tokens' position.
        in_pairs, out_in_pairs: whether the two elements of a pair are neighbours in x and in `out`, or R / 2 apart.
    """
    _put(
        x, cache_position, out, (cache_position.cos.data_ptr(), cache_position.sin.data_ptr()), (in_pairs, out_in_pairs)
    )


def put(x: Tensor, cache_position: CachePosition, out: Tensor) -> None:
    """Write x [B, H, R] to a contiguous cache [B, H, S, R] at the tokens' position."""
    _put(x, cache_position, out, (None, None), (False, False))


def _put(
    x: Tensor,
    cache_position: CachePosition,
    out: Tensor,
    angles: tuple[int | None, int | None],
    in_pairs: tuple[bool, bool],
) -> None:
    position_stride = out.shape[-1] if out.dim() == 4 else 0
    of = _RotaryStrides(x.stride(0), x.stride(1), 0, in_pairs[0])
    to = _RotaryStrides(out.stride(0), out.stride(1), position_stride, in_pairs[1])
    run(
        "quantlab_turn",
        *(x.data_ptr(), ctypes.byref(of), out.data_ptr(), ctypes.byref(to)),
        *x.shape,
        *angles,
        *(cache_position.index.data_ptr(), cache_position.padding.data_ptr()),
        _DTYPES[x.dtype],
    )


class _RotaryStrides(ctypes.Structure):
    """`RotaryStrides` of kernels.h."""

    _fields_ = (("token", Long), ("head", Long), ("position", Long), ("in_pairs", Code))


class _Choice(ctypes.Structure):
    """`Choice` of kernels.h."""

    _fields_ = (
        *((name, Long) for name in ("experts", "groups", "top_groups", "top_k")),
        ("scaling", ctypes.c_float),
        *((name, Code) for name in ("sigmoid", "normed")),
    )


def choose(x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """The experts [T, k] int64 of contiguous x [T, H] and their weights [T, k] float32.

    Args:
        x: of any floating dtype.
        weight: the router's, [E, H] of any floating dtype.
        bias: [E] float32, if there is one.
        routing: how they are chosen; the scoring is the sigmoid's where there is a bias, else the softmax's.
    """
    tokens, hidden = x.shape
    index = torch.empty(tokens, routing.top_k, dtype=torch.int64)
    weights = torch.empty(tokens, routing.top_k, dtype=torch.float32)
    sizes = (len(weight), routing.groups, routing.top_groups, routing.top_k)
    asked = _Choice(*sizes, routing.scaling, routing.scoring == "sigmoid", routing.normalised)
    run(
        "quantlab_choose",
        *(x.data_ptr(), tokens, hidden, _DTYPES[x.dtype]),
        *(weight.data_ptr(), _DTYPES[weight.dtype]),
        None if bias is None else bias.data_ptr(),
        ctypes.byref(asked),
        *(index.data_ptr(), weights.data_ptr()),
    )
    return index, weights


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm of x with weight [K] of the same dtype; x is contiguous [..., K], or [T, K] with contiguous rows."""
    out = torch.empty(x.shape, dtype=x.dtype)
    _norm(x, weight, epsilon, (out.data_ptr(), x.shape[-1], None))
    return out


def put_norm(x: Tensor, weight: Tensor, epsilon: float, cache_position: CachePosition, out: Tensor) -> None:
    """RMS norm of x [B, K], written to a contiguous cache [B, 1, S, K] at the tokens' position."""
    _norm(x, weight, epsilon, (out.data_ptr(), out.stride(0), cache_position.index.data_ptr()))


def _norm(x: Tensor, weight: Tensor, epsilon: float, out: tuple[int, int, int | None]) -> None:
    columns = x.shape[-1]
    row_stride = x.stride(0) if x.dim() == 2 else columns
    run(
        "quantlab_norm",
        *(x.data_ptr(), row_stride, weight.data_ptr(), x.numel() // columns, columns, epsilon),
        _DTYPES[x.dtype],
        *out,
    )


def add(out: Tensor, x: Tensor) -> Tensor:
    """Add x to `out` in place; both are contiguous and have the same shape and dtype."""
    run("quantlab_add", out.data_ptr(), x.data_ptr(), out.numel(), _DTYPES[out.dtype])
    return out


def gate(x: Tensor) -> Tensor:
    """``silu(gate) * up`` [T, K], where gate and up are the halves of contiguous rows x [T, 2 K]."""
    rows, columns = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, columns, dtype=x.dtype)
    run("quantlab_gate", x.data_ptr(), rows, columns, _DTYPES[x.dtype], out.data_ptr())
    return out


def weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum [1, K] of contiguous rows x [T, K], with weights [T] float32."""
    rows, columns = x.shape
    out = torch.empty(1, columns, dtype=x.dtype)
    code = _DTYPES[x.dtype]
    run("quantlab_weighted_sum", x.data_ptr(), weights.data_ptr(), rows, columns, code, out.data_ptr())
    return out


def _call(name: str, weights: tuple[int, ...], x: Tensor, groups: Slices, out: Tensor) -> None:
    if x.stride(1) != 1:
        x = x.contiguous()
    rows = (x.data_ptr(), x.stride(0), x.shape[0], _DTYPES[x.dtype])
    run(name, *weights, *rows, groups.matrices, groups.start, groups.count, groups.number, out.data_ptr())
