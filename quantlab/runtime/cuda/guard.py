"""Launches where their tensors are: triton launches on the current device, whatever device its arguments are on."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class HasWeight(Protocol):
    """Matrices as the kernels read them."""

    @property
    def weight(self) -> Tensor: ...


def on_its_device(launch: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run a function whose first argument is a tensor, or has a `weight`, with that tensor's device as the current one.

    Where it already is, as always with one GPU, that costs two questions.
    """

    @wraps(launch)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        index = device_index(args[0])  # type: ignore[arg-type]  # a decorator cannot say what its function takes
        if index < 0 or index == torch.cuda.current_device():
            return launch(*args, **kwargs)
        with torch.cuda.device(index):
            return launch(*args, **kwargs)

    return guarded


def device_index(first: Tensor | HasWeight) -> int:
    """Number of the GPU a tensor or its weight is on, -1 for the CPU."""
    tensor = first if isinstance(first, Tensor) else first.weight
    return tensor.get_device()
