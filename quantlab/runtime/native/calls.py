"""Calls of the native library: the types of every function's arguments, and the record of calls that are repeated later."""

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Final

from torch import Tensor

from quantlab.runtime.native.library import product_library

Pointer: Final = ctypes.c_void_p
Long: Final = ctypes.c_int64
Code: Final = ctypes.c_int


_ACTIVATIONS: Final = (Pointer, Long, Long, Code, Pointer, Pointer, Pointer, Long, Pointer)
ARGUMENTS: Final[Mapping[str, Sequence[Any]]] = {
    "quantlab_int4_product": (Pointer, Pointer, Long, Long, Long, Code, *_ACTIVATIONS),
    "quantlab_int4_expand": (Pointer, Pointer, Long, Long, Long, Code, Long, Long, Code, Pointer),
    "quantlab_int8_expand": (Pointer, Pointer, Long, Code, Long, Long, Code, Pointer),
    "quantlab_int8_sums": (Pointer, Long, Long, Pointer, Long, Pointer),
    "quantlab_int8_product": (Pointer, Pointer, Long, Long, Code, *_ACTIVATIONS),
    "quantlab_int8_weight_product": (Pointer, Pointer, Long, Long, Code, *_ACTIVATIONS),
    "quantlab_dense_product": (Pointer, Long, Long, *_ACTIVATIONS),
    "quantlab_paired_product": (Pointer, Long, Long, Pointer, Long, Long, Pointer, Pointer),
    "quantlab_norm": (Pointer, Long, Pointer, Long, Long, ctypes.c_float, Code, Pointer, Long, Pointer),
    "quantlab_add": (Pointer, Pointer, Long, Code),
    "quantlab_turn": (*[Pointer] * 4, *[Long] * 3, *[Pointer] * 4, Code),
    "quantlab_choose": (Pointer, Long, Long, Code, Pointer, Code, *[Pointer] * 4),
    "quantlab_gate": (Pointer, Long, Long, Code, Pointer),
    "quantlab_weighted_sum": (Pointer, Pointer, Long, Long, Code, Pointer),
    "quantlab_latent_attention": (*[Pointer] * 7, *[Long] * 7, ctypes.c_float, Code, Pointer),
    "quantlab_grouped_attention": (*[Pointer] * 5, *[Long] * 5, ctypes.c_float, Code, Pointer),
}


_recording = threading.local()


class IndexTensor(Sequence[int]):
    """The elements of a contiguous int64 tensor, as a sequence.

    Kernels read the tensor's memory when they run. Python may not read the elements while calls are recorded
    (`recording`).
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - int, or a list for a slice
        if (error := getattr(_recording, "error", None)) is not None:
            raise error
        return self.tensor[index].tolist()


@contextmanager
def recording(calls: list[Callable[[], object]], error: type[Exception]) -> Iterator[None]:
    """Append every kernel call of this thread within the block to `calls`; each can be repeated on the same memory.

    Reading an element of an `IndexTensor` in Python raises `error`, since a repetition may find another element there.
    """
    _recording.calls, _recording.error = calls, error
    try:
        yield
    finally:
        _recording.calls = _recording.error = None


def run(name: str, *arguments: object) -> None:
    """Call a function of the library, and record the call within a block of `recording`."""
    call = partial(_function(name), *arguments)
    call()
    if (calls := getattr(_recording, "calls", None)) is not None:
        calls.append(call)


@cache
def _function(name: str) -> Callable[..., None]:
    loaded = product_library()
    assert loaded is not None, "asked for only where there are native kernels"
    function = loaded[name]
    function.argtypes = ARGUMENTS[name]
    function.restype = None
    return function
