"""DeepSeek's native FP8 checkpoints: which tensor is an FP8 weight and where its scales are."""

from collections.abc import Mapping
from typing import Any

from quantlab.errors import CheckpointError

SCALE_SUFFIX = "_scale_inv"


def weight_block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of an FP8 block, None for a checkpoint that is not FP8.

    Raises:
        CheckpointError: the checkpoint says it is FP8 but not in which blocks.
    """
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != "fp8":
        return None
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)):
        raise CheckpointError(
            "the FP8 checkpoint does not say its block size",
            where="config.json, quantization_config.weight_block_size",
            found=repr(block),
            fix="use the config.json of the original release, which has [128, 128]",
        )
    return block[0], block[1]
