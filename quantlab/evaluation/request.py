"""What an evaluation is asked for: the artifacts of one recipe, and how to measure them."""

from dataclasses import dataclass
from pathlib import Path

from quantlab.evaluation.record import Foreign, Pass


@dataclass(frozen=True)
class EvaluatedArtifact:
    """One artifact to evaluate.

    Attributes:
        variant: name of its row.
        description: the passes in one line of text.
        directory: the artifact, or the source checkpoint.
        artifact: the same directory as written in records, relative to the run's directory.
        artifact_sha256: hash of its manifest; for `source`, hash of the checkpoint's configuration and weights.
        passes: the passes as data; empty for an unchanged checkpoint.
        foreign: who made it, if another tool did.
    """

    variant: str
    description: str
    directory: Path
    artifact: str
    artifact_sha256: str
    passes: tuple[Pass, ...] = ()
    foreign: Foreign | None = None


@dataclass(frozen=True)
class EvaluationRequest:
    """The artifacts of one recipe, and how to measure them.

    Attributes:
        directory: the run's directory; records are written into its folder `records`.
        recipe: the recipe's name.
        recipe_sha256: hash of its file.
        suite: the suite's file.
        held_out: held-out text that was drawn from the suite's datasets; None if it names a corpus.
        baseline: the variant that losses are relative to; one of the artifacts.
        artifacts: the artifacts to evaluate, in row order; the source checkpoint is first.
        reuse: whether records that are still valid are reused.
        time_limit: limit in seconds for one cell, and for one task.
        command: the command line, for the records.
        device: device of the models: "cpu", "cuda" or "cuda:1".
        gpu: name of the GPU, for the records; empty for the CPU.
        side_by_side: number of cells that are measured at the same time, except timed ones; 1 on a CPU.
    """

    directory: Path
    recipe: str
    recipe_sha256: str
    suite: Path
    baseline: str
    artifacts: tuple[EvaluatedArtifact, ...]
    reuse: bool = True
    time_limit: float = 3600.0
    command: str = ""
    device: str = "cpu"
    gpu: str = ""
    side_by_side: int = 1
    held_out: Path | None = None
