"""The attention section of a suite: every implementation at every context length, each in its own process.

Attention computes on activations and does not depend on the weights, so it is measured once, on a twin with the baseline's
layout, and stored in the baseline's record.
"""

from pathlib import Path

from quantlab.evaluation.processes.messages import AttentionRequest, AttentionResult, Progress
from quantlab.evaluation.processes.worker_client import CellError
from quantlab.evaluation.processes.workers import Workers
from quantlab.evaluation.record import Attention, AttentionCell
from quantlab.evaluation.speed.own_layers import own_layers
from quantlab.evaluation.suite import LoadedSuite
from quantlab.files import read_json


def measure_contexts(
    workers: Workers, suite: LoadedSuite, directory: Path, *, device: str, progress: Progress
) -> Attention | None:
    """Measure every combination; a failed one stores its reason. None if the suite has no attention section.

    Args:
        workers: run the cells.
        suite: the suite.
        directory: the artifact whose layout the twin uses.
        device: device of the twin.
        progress: called with the number of completed combinations.
    """
    wanted = suite.suite.attention
    if wanted is None:
        return None
    combinations = [(name, context) for name in wanted.implementations for context in wanted.contexts]
    cells: list[AttentionCell] = []
    layouts: list[str] = []
    for done, (name, context) in enumerate(combinations):
        progress("attention", done, len(combinations))
        request = AttentionRequest(
            directory=directory, suite=suite.path, implementation=name, context=context, device=device
        )
        try:
            found = workers.run(f"attention-{name}-{context}", request, AttentionResult, progress=_silent)
        except CellError as error:
            cells.append(AttentionCell(implementation=name, context=context, reason=str(error)))
        else:
            cells.append(found.cell)
            layouts += [found.layout] if found.layout else []
    progress("attention", len(combinations), len(combinations))
    return Attention(
        twin=suite.suite.attention_twin[0] or own_layers(read_json(directory / "config.json")).description,
        layout=layouts[0] if layouts else "",
        memory="process" if device == "cpu" else "cuda",
        cells=tuple(cells),
    )


def _silent(stage: str, done: int, total: int) -> None:
    """Progress within a combination is not shown."""
