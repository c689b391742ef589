"""How many models of one size a machine can measure at the same time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from quantlab import hardware
from quantlab.errors import QuantlabError
from quantlab.runtime.device import free_bytes
from quantlab.runtime.load import needed_bytes

_CORES: Final = 2
"""Cores for one cell: one launches kernels, one compiles them or reads weights."""
_MODELS: Final = 2
"""Multiples of the float32 weights that a cell may use: weights, activations, logits, the baseline's predictions."""
_CELL_BYTES: Final = 3 << 30
"""Further memory of a cell, on the GPU and on the host: CUDA's context, libraries, buffers."""


def cells_at_once(directories: Sequence[Path], device: torch.device) -> int:
    """Number of cells to measure side by side, at least 1 and at most one per model.

    1 on a CPU, whose cores one cell uses. On a GPU as many as the free memory holds, counting every model in float32 twice, with
    two cores for each.

    Args:
        directories: checkpoints of the models; unreadable ones are ignored.
        device: device of the models.
    """
    if device.type != "cuda":
        return 1
    largest = max((_float32_bytes(directory) for directory in directories), default=0)
    on_gpu, on_host = free_bytes(device), free_bytes(torch.device("cpu"))
    limits = [len(directories), hardware.threads() // _CORES]
    limits += [free // (_MODELS * largest + _CELL_BYTES) for free in (on_gpu, on_host) if free is not None]
    return max(1, min(limits))


def _float32_bytes(directory: Path) -> int:
    try:
        return needed_bytes(directory, torch.float32)
    except QuantlabError:  # measuring it raises the error
        return 0
