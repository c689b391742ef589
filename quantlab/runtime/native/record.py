"""A computation on tensors that stay where they are, run again without the Python that led to it.

As a CUDA graph, but a list of calls. A step of one token streams hundreds of megabytes through the caches, and what is left of
Python in them afterwards is little: the way to the next kernel, through modules and dispatch, then takes as long as reading a
small matrix does.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from quantlab.runtime.native import kernels

_MAKERS: Final = frozenset(
    {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default, torch.ops.aten.empty_like.default}
)
"""Operators that only take memory."""


class CannotRepeatError(Exception):
    """Python read what a tensor holds, and may do something else where it holds something else."""


class Recorded:
    """What a function came to: kernels and operators of torch, on the memory they had. All tensors it made are kept.

    Args:
        function: runs once, now. Its next run may differ in nothing but the contents of tensors made before. What it looks at by
            other ways than operators (`Tensor.tolist`, numpy) is not seen.

    Raises:
        CannotRepeatError: it read a number of a tensor.
    """

    def __init__(self, function: Callable[[], Tensor]) -> None:
        mode = _Operators()
        with mode, kernels.recording(mode.calls, CannotRepeatError):
            self.result = function()
        self._calls, self._kept = mode.calls, mode.kept

    def run(self) -> Tensor:
        """The result of the function on what the tensors hold now: the same tensor every time."""
        for call in self._calls:
            call()
        return self.result


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operators, and notes those that compute; all tensors they make are kept."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Callable[[], object]] = []
        self.kept: list[Tensor] = []

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - as of torch
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
    """Of views it is that of what they look at; whether an operator gives one its schema does not always say (reshape, to)."""
    return {one.untyped_storage().data_ptr() for one in tensors if one.layout == torch.strided}


def _tensors(result: object) -> list[Tensor]:
    return [one for one in tree_flatten(result)[0] if isinstance(one, Tensor)]
