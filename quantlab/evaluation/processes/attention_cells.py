"""The attention section of a suite: every implementation at every context, each in a process of its own.

Attention computes on activations, whatever the weights are, so it is measured once, on a twin with the baseline's layout,
and stands in the baseline's record.
"""

from pathlib import Path

from quantlab.evaluation.processes.messages import AttentionRequest, AttentionResult, Progress
from quantlab.evaluation.processes.worker_client import CellError, Worker
from quantlab.evaluation.record import Attention, AttentionCell
from quantlab.evaluation.speed.own_layers import own_layers
from quantlab.evaluation.suite import LoadedSuite
from quantlab.files import read_json


def measure_contexts(
    worker: Worker, suite: LoadedSuite, directory: Path, *, device: str, progress: Progress
) -> Attention | None:
    """Measure every combination; one that cannot be measured says why. None if the suite asks for none.

    Args:
        worker: runs the cells.
        suite: what to measure.
        directory: the artifact whose layout the twin has.
        device: where it computes.
        progress: told how many combinations are done.
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
            found = worker.run(f"attention-{name}-{context}", request, AttentionResult, progress=_silent)
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
    """A combination is one step of a bar."""
