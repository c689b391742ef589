"""Two traps of triton around a launch: the current device, and the keys of its cache of compiled kernels."""

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class HasWeight(Protocol):
    """An object with a weight tensor, such as `launch.Matrices`."""

    @property
    def weight(self) -> Tensor: ...


def hash_in_order(*modules: ModuleType) -> None:
    """Compute the cache keys of the kernels of `modules` now, each function before those that call it.

    A kernel's key is to contain the global constants of the functions it calls, but triton (3.6, `DependenciesFinder._update_hash`)
    reads them before it has hashed such a function. So without this the key of a kernel depends on which kernel a process launches
    first: another process compiles it again, for half a second to a second each. Functions of a module are defined before they are called.
    """
    from triton.runtime.jit import JITCallable

    for module in modules:
        for function in vars(module).values():
            if isinstance(function, JITCallable):
                function.cache_key  # noqa: B018  # computed at first access


def on_its_device(launch: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run a function with the device of its first argument as the current device.

    The argument is a tensor or an object with a `weight`. Where its device is already current, as always with one
    GPU, the check costs two queries.
    """

    @wraps(launch)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        index = device_index(args[0])  # type: ignore[arg-type]  # the type of the first argument is not expressible
        if index < 0 or index == torch.cuda.current_device():
            return launch(*args, **kwargs)
        with torch.cuda.device(index):
            return launch(*args, **kwargs)

    return guarded


def device_index(first: Tensor | HasWeight) -> int:
    """Index of the GPU that holds a tensor, or an object's weight; -1 for the CPU."""
    tensor = first if isinstance(first, Tensor) else first.weight
    return tensor.get_device()
