"""Tries the lm-eval tasks of a suite without a model: a task that cannot be loaded is known before hours of work."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.errors import EvaluationError
from quantlab.evaluation.processes.messages import Progress, TrialRequest, TrialResult
from quantlab.evaluation.processes.worker_client import CellError, Worker
from quantlab.evaluation.suite import LoadedSuite, load_suite


@dataclass(frozen=True)
class EmptyAnswerer:
    """Answers every request of lm-eval at once: nothing is likely, and generated texts are empty."""

    seed: int = 0

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Log-probability 0 for each continuation."""
        return [(0.0, False)] * len(pairs)

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-probability 0 for each text."""
        return [0.0] * len(texts)

    def generate(self, prompts: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """An empty answer to each context."""
        return [""] * len(prompts)


def try_tasks(request: TrialRequest, progress: Progress) -> TrialResult:
    """Score empty answers to one item of every lm-eval task of a suite, in the measuring process.

    Raises:
        EvaluationError: lm-eval is not installed, does not know a task or its metric, or cannot load its data.
    """
    from quantlab.evaluation.tasks import lm_eval_tasks  # imports torch

    loaded = load_suite(request.suite)
    wanted = {run.wanted: None for run in loaded.runs if not run.wanted.ours}
    for number, task in enumerate(wanted):
        progress(f"trying {task.task}", number, len(wanted))
        lm_eval_tasks.answer(EmptyAnswerer(), task.model_copy(update={"items": 1}), loaded.definitions(task))
    return TrialResult(tried=len(wanted))


def check_lm_eval_tasks(suite: LoadedSuite, *, time_limit: float, progress: Progress) -> None:
    """Try the lm-eval tasks of a suite in a measuring process, whose caches and network access are those of the evaluation.

    Args:
        suite: the suite.
        time_limit: limit in seconds for all tasks.
        progress: called with the name of each task.

    Raises:
        EvaluationError: a task cannot be run.
    """
    if all(run.wanted.ours for run in suite.runs):
        return
    with (
        tempfile.TemporaryDirectory(prefix="quantlab-tasks-") as directory,
        Worker(Path(directory), threads=1, time_limit=time_limit) as worker,
    ):
        try:
            worker.run("trial", TrialRequest(suite=suite.path), TrialResult, progress=progress)
        except CellError as error:
            raise EvaluationError(
                "the suite's tasks of lm-eval cannot be run",
                where=str(suite.path),
                found=str(error),
                fix="as it says, or remove the task from the suite",
            ) from error
