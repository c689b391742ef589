"""Calls of the native kernels with tensors.

A kernel multiplies rows of activations with the matrices of a bank, group by group, in one call, whatever the dtype of the
activations: it rounds them as it needs them and answers in their dtype. Scales are of any floating dtype.

Legend: as in `quantlab.runtime.products`.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Final

import torch
from torch import Tensor

from quantlab.architectures.layer import Routing
from quantlab.runtime.native.library import library
from quantlab.runtime.step_kernels import Place

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
    "quantlab_norm": (_Pointer, _Long, _Pointer, _Long, _Long, ctypes.c_float, _Code, _Pointer, _Long, _Pointer),
    "quantlab_add": (_Pointer, _Pointer, _Long, _Code),
    "quantlab_turn": (*[_Pointer] * 4, *[_Long] * 3, *[_Pointer] * 4, _Code),
    "quantlab_choose": (_Pointer, _Long, _Long, _Code, _Pointer, _Code, *[_Pointer] * 4),
    "quantlab_gate": (_Pointer, _Long, _Long, _Code, _Pointer),
    "quantlab_weighted_sum": (_Pointer, _Pointer, _Long, _Long, _Code, _Pointer),
    "quantlab_latent_attention": (*[_Pointer] * 7, *[_Long] * 7, ctypes.c_float, _Code, _Pointer),
    "quantlab_grouped_attention": (*[_Pointer] * 5, *[_Long] * 5, ctypes.c_float, _Code, _Pointer),
}


class Held(Sequence[int]):
    """The numbers of a contiguous tensor of int64: kernels read those it holds when they run; Python must not while they are recorded."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - a number, or those of a slice
        if (error := getattr(_recording, "error", None)) is not None:
            raise error
        return self.tensor[index].tolist()


class Slices:
    """Groups of rows as the kernels read them: rows start[i] to start[i] + count[i] meet matrix which[i]."""

    def __init__(self, which: Sequence[int], start: Sequence[int], count: Sequence[int]) -> None:
        self.number = len(which)
        array = _Long * self.number
        self.which: Any = which.tensor.data_ptr() if isinstance(which, Held) else array(*which)
        self.start, self.count = array(*start), array(*count)


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
    weights = (q.data_ptr(), scale.data_ptr(), *shape, _DTYPES[scale.dtype])
    _run("quantlab_int4_expand", *weights, start, stop, out.data_ptr())
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
    _run(
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
    place: Place | None = None,
) -> Tensor:
    """`quantlab.runtime.attention.absorbed` for one new token and contiguous tensors of one 16-bit dtype.

    Args:
        query: [B, H, 1, N + R].
        latents: [B, 1, S, L].
        rotary: [B, 1, S, R].
        weight: kv_b's, [H, N + V, L].
        scaling: of the scores.
        mask: [B, S] float32, added to the scores.
        place: of the tokens, which attend to what stands up to there behind the padding; None: they attend to all.

    Returns:
        [B, 1, H, V].
    """
    batch, heads, _, width = query.shape
    (length, latent), turned, rows = latents.shape[2:], rotary.shape[3], weight.shape[1]
    value = rows - width + turned
    out = torch.empty(batch, 1, heads, value, dtype=query.dtype)
    _run(
        "quantlab_latent_attention",
        *(query.data_ptr(), latents.data_ptr(), rotary.data_ptr(), weight.data_ptr()),
        None if mask is None else mask.data_ptr(),
        *((None, None) if place is None else (place.position.data_ptr(), place.padding.data_ptr())),
        *(batch, heads, length, latent, width - turned, turned, value),
        scaling,
        _DTYPES[query.dtype],
        out.data_ptr(),
    )
    return out


def grouped_attention(query: Tensor, keys: Tensor, values: Tensor, place: Place, *, scaling: float) -> Tensor:
    """Attention of one new token per sequence to a cache, in contiguous tensors of one 16-bit dtype.

    Args:
        query: [B, H, D].
        keys, values: [B, G, S, D]; H / G heads each attend to one.
        place: of the tokens, which attend to what stands up to there behind the padding.
        scaling: of the scores.

    Returns:
        [B, H, D].
    """
    (batch, heads, width), (_, key_heads, length, _) = query.shape, keys.shape
    out = torch.empty_like(query)
    _run(
        "quantlab_grouped_attention",
        *(query.data_ptr(), keys.data_ptr(), values.data_ptr(), place.position.data_ptr(), place.padding.data_ptr()),
        *(batch, heads, key_heads, length, width),
        scaling,
        _DTYPES[query.dtype],
        out.data_ptr(),
    )
    return out


def turn(x: Tensor, place: Place, out: Tensor, *, in_pairs: bool = False, out_in_pairs: bool = False) -> None:
    """Rotary embedding of x [B, H, R], rows contiguous, by the angles of each token, into `out`.

    Args:
        x: of any floating dtype.
        place: of the tokens.
        out: [B, H, R], may be x; or a contiguous cache [B, H, S, R], of which the place of the tokens is written.
        in_pairs, out_in_pairs: whether numbers that are turned together are neighbours in x and in `out`; half of R apart if not.
    """
    _put(x, place, out, (place.cos.data_ptr(), place.sin.data_ptr()), (in_pairs, out_in_pairs))


def put(x: Tensor, place: Place, out: Tensor) -> None:
    """x [B, H, R] into the place of the tokens in a contiguous cache [B, H, S, R]."""
    _put(x, place, out, (None, None), (False, False))


def _put(
    x: Tensor, place: Place, out: Tensor, angles: tuple[int | None, int | None], in_pairs: tuple[bool, bool]
) -> None:
    between_places = out.shape[-1] if out.dim() == 4 else 0
    of = _Rows(x.stride(0), x.stride(1), 0, in_pairs[0])
    to = _Rows(out.stride(0), out.stride(1), between_places, in_pairs[1])
    _run(
        "quantlab_turn",
        *(x.data_ptr(), ctypes.byref(of), out.data_ptr(), ctypes.byref(to)),
        *x.shape,
        *angles,
        *(place.position.data_ptr(), place.padding.data_ptr()),
        _DTYPES[x.dtype],
    )


class _Rows(ctypes.Structure):
    """`Rows` of rows.c."""

    _fields_ = (("token", _Long), ("head", _Long), ("place", _Long), ("in_pairs", _Code))


class _Choice(ctypes.Structure):
    """`Choice` of router.c."""

    _fields_ = (
        *((name, _Long) for name in ("experts", "groups", "top_groups", "top_k")),
        ("scaling", ctypes.c_float),
        *((name, _Code) for name in ("sigmoid", "normed")),
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
    _run(
        "quantlab_choose",
        *(x.data_ptr(), tokens, hidden, _DTYPES[x.dtype]),
        *(weight.data_ptr(), _DTYPES[weight.dtype]),
        None if bias is None else bias.data_ptr(),
        ctypes.byref(asked),
        *(index.data_ptr(), weights.data_ptr()),
    )
    return index, weights


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm of x [..., K], contiguous or [T, K] with contiguous rows, with weight [K] of its dtype."""
    out = torch.empty(x.shape, dtype=x.dtype)
    _norm(x, weight, epsilon, (out.data_ptr(), x.shape[-1], None))
    return out


def put_norm(x: Tensor, weight: Tensor, epsilon: float, place: Place, out: Tensor) -> None:
    """RMS norm of x [B, K] into the place of the tokens in a contiguous cache [B, 1, S, K]."""
    _norm(x, weight, epsilon, (out.data_ptr(), out.stride(0), place.position.data_ptr()))


def _norm(x: Tensor, weight: Tensor, epsilon: float, out: tuple[int, int, int | None]) -> None:
    columns = x.shape[-1]
    apart = x.stride(0) if x.dim() == 2 else columns
    _run(
        "quantlab_norm",
        *(x.data_ptr(), apart, weight.data_ptr(), x.numel() // columns, columns, epsilon),
        _DTYPES[x.dtype],
        *out,
    )


def add(out: Tensor, x: Tensor) -> Tensor:
    """out plus x, contiguous and of one shape and dtype, in place."""
    _run("quantlab_add", out.data_ptr(), x.data_ptr(), out.numel(), _DTYPES[out.dtype])
    return out


def gate(x: Tensor) -> Tensor:
    """SiLU of the first half of contiguous rows [T, 2 K] times the second: [T, K]."""
    rows, columns = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, columns, dtype=x.dtype)
    _run("quantlab_gate", x.data_ptr(), rows, columns, _DTYPES[x.dtype], out.data_ptr())
    return out


def weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """The sum of contiguous rows [T, K] with weights [T] float32: [1, K]."""
    rows, columns = x.shape
    out = torch.empty(1, columns, dtype=x.dtype)
    code = _DTYPES[x.dtype]
    _run("quantlab_weighted_sum", x.data_ptr(), weights.data_ptr(), rows, columns, code, out.data_ptr())
    return out


def _call(name: str, weights: tuple[int, ...], x: Tensor, groups: Slices, out: Tensor) -> None:
    if x.stride(1) != 1:
        x = x.contiguous()
    rows = (x.data_ptr(), x.stride(0), x.shape[0], _DTYPES[x.dtype])
    _run(name, *weights, *rows, groups.which, groups.start, groups.count, groups.number, out.data_ptr())


_recording = threading.local()


@contextmanager
def recording(calls: list[Callable[[], object]], error: type[Exception]) -> Iterator[None]:
    """Kernels that this thread runs in the block are added to `calls`, to be run again on the same memory.

    Where Python reads which matrices are met, of a `Held`, `error` is raised: the next run may meet others.
    """
    _recording.calls, _recording.error = calls, error
    try:
        yield
    finally:
        _recording.calls = _recording.error = None


def _run(name: str, *arguments: object) -> None:
    call = partial(_function(name), *arguments)
    call()
    if (calls := getattr(_recording, "calls", None)) is not None:
        calls.append(call)


@cache
def _function(name: str) -> Callable[..., None]:
    loaded = library()
    assert loaded is not None, "asked for only where there are native kernels"
    function = loaded[name]
    function.argtypes = _ARGUMENTS[name]
    function.restype = None
    return function
