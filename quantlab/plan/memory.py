"""How much memory a run will need, estimated from headers.

The run holds one weight at a time: its bytes as read, the matrix in its stored dtype, what it becomes, and float32 working
copies of the algorithm. The constants were measured on Linux with torch 2.13 (largest resident size of a run over one
large matrix, less that of an idle process) and rounded up.
"""

from collections.abc import Iterable

from quantlab.plan.model import Step
from quantlab.recipe.schema import Prune, Quantize

_PROCESS_BYTES = 400_000_000
_WORKING_BYTES_PER_WEIGHT = {"quantize": 14, "clip": 30, "prune": 12}


def peak_memory(steps: Iterable[Step]) -> int:
    """Estimated largest resident size of the run in bytes."""
    return _PROCESS_BYTES + max(_step_bytes(step) for step in steps)


def _step_bytes(step: Step) -> int:
    working = 0
    for change in step.passes:
        match change:
            case Prune():
                working = max(working, _WORKING_BYTES_PER_WEIGHT["prune"])
            case Quantize():
                kind = "clip" if change.algorithm.clip == "mse" else "quantize"
                working = max(working, _WORKING_BYTES_PER_WEIGHT[kind])
    return step.source_bytes + step.output_bytes + step.source.elements * (2 + working)
