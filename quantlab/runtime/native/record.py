"""Record the operator and kernel calls of a function once, and replay them on the same memory without its Python code.

This is the CPU's counterpart of a CUDA graph, as a list of calls. A decode step streams hundreds of megabytes of
weights through the caches and evicts the interpreter's code and data. The path through modules and dispatch to the next
kernel then takes as long as reading a small matrix from memory.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from quantlab.runtime.native import calls

_MAKERS: Final = frozenset(
    {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default, torch.ops.aten.empty_like.default}
)
"""Operators that only allocate memory."""


class CannotRepeatError(Exception):
    """Python read an element of a tensor, so the calls may depend on the tensor's contents."""


class Recorded:
    """The calls of native kernels and torch operators that a function made; keeps all its tensors alive.

    Args:
        function: called once, by the constructor. Its calls may depend only on shapes, because the contents of tensors
            that existed before may differ at a replay. Reads that bypass operators (`Tensor.tolist`, numpy) are not
            detected.

    Attributes:
        result: the tensor that the function returned.

    Raises:
        CannotRepeatError: the function read an element of a tensor.
    """

    def __init__(self, function: Callable[[], Tensor]) -> None:
        mode = _Operators()
        with mode, calls.recording(mode.calls, CannotRepeatError):
            self.result = function()
        self._calls, self._kept = mode.calls, mode.kept

    def run(self) -> Tensor:
        """Replay the calls on the tensors' current contents; returns `result`, the same tensor every time."""
        for call in self._calls:
            call()
        return self.result


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Executes operators, records those that compute, and keeps all returned tensors alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Callable[[], object]] = []
        self.kept: list[Tensor] = []

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - torch's signature
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise CannotRepeatError
        call = partial(func, *args, **(kwargs or {}))
        result = call()
        tensors = _tensors(result)
        self.kept += tensors
        if func._schema.is_mutable:
            self.calls.append(call)
        elif tensors and func not in _MAKERS and not _memories(tensors) <= _memories(_tensors((args, kwargs))):
            self.calls.append(partial(_again, call, tensors))
        return result


def _again(call: Callable[[], object], results: Sequence[Tensor]) -> None:
    for result, found in zip(results, _tensors(call()), strict=True):
        result.copy_(found)


def _memories(tensors: Sequence[Tensor]) -> set[int]:
    """Addresses of the tensors' storages. A view shares its base's storage.

    Operators that return their input's storage compute nothing. Their schema does not always say so (`reshape`, `to`).
    """
    return {one.untyped_storage().data_ptr() for one in tensors if one.layout == torch.strided}


def _tensors(result: object) -> list[Tensor]:
    return [one for one in tree_flatten(result)[0] if isinstance(one, Tensor)]
