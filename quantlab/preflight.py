"""Tries everything a run will need before its first block: seconds, also for 671 B parameters, instead of a failure after hours.

The plan has checked the recipe, the headers and the config. Here the model is built without memory, so that a tensor it has no
place for is known now; tokenizer, generation settings and held-out text are read as evaluation will read them, and one item of
each lm-eval task is answered.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from quantlab.calibration.corpus import read_calibration_text, sample_tokens
from quantlab.calibration.drawn import DrawnText, draw_text
from quantlab.checkpoint.tokenizer import check_token_settings
from quantlab.errors import ArtifactError
from quantlab.evaluation.held_out import draw_held_out
from quantlab.evaluation.processes.messages import Progress
from quantlab.evaluation.quality.windows import read_corpus
from quantlab.evaluation.suite import load_suite
from quantlab.evaluation.tasks.trial import check_lm_eval_tasks
from quantlab.exports.writers.onnx import engine_python
from quantlab.exports.writers.table import OPTIONAL_PACKAGES
from quantlab.plan.model import Plan
from quantlab.recipe.load import LoadedRecipe
from quantlab.texts.locate import Commits
from quantlab.texts.overlap import Overlap, overlap_of


@dataclass(frozen=True)
class Checked:
    """What the check has read.

    Attributes:
        held_out: the file of held-out text that was drawn from the suite's datasets; None if there is none.
        overlap: how much of the held-out text the calibration text contains; None without one of them.
    """

    held_out: Path | None
    overlap: Overlap | None


def check_before_running(
    recipe: LoadedRecipe, plan: Plan, run: Path, commits: Commits, *, progress: Progress, time_limit: float
) -> Checked:
    """Check that the checkpoint can be computed with and evaluated, as far as the recipe asks for it.

    Args:
        recipe: the recipe, with its datasets located.
        plan: the compiled recipe.
        run: the run's directory; text that is drawn from datasets is kept there if nothing is wrong.
        commits: the commits of datasets.
        progress: called with the name of each task of lm-eval that is tried.
        time_limit: limit in seconds for these tasks together.

    Raises:
        ArtifactError: the runtime does not know the model, or a package that writes a format is not installed.
        CheckpointError: a tensor is missing, left over or of the wrong shape; tokenizer or settings cannot be used.
        CalibrationError: the calibration text cannot be used, or is too short.
        EvaluationError: the held-out text or an item of a task cannot be used, or is longer than the model's context;
            lm-eval does not know a task, or cannot load its data.
    """
    _check_packages(plan)
    source, calibration, suite = plan.checkpoint, recipe.recipe.calibration, recipe.suite
    if suite is not None or any(variant.calibration for variant in plan.variants):
        from quantlab.runtime.skeleton import check_tensors  # imports transformers, which other recipes do without

        shapes = {step.tensor.name: tuple(step.source.shape) for step in plan.variants[0].steps}
        check_tensors(source.config, shapes, where=str(source.directory))
    check_token_settings(source.directory, source.config)
    drawn = None
    if recipe.datasets is not None and calibration is not None:
        drawn = draw_text(recipe.datasets, calibration, source.directory, run)
    if recipe.corpus is not None and calibration is not None:
        sample_tokens(
            recipe.corpus,
            source.directory,
            samples=calibration.samples,
            length=calibration.length,
            seed=calibration.seed,
        )
    text = list(_calibration_texts(recipe, drawn))
    checked = Checked(None, None)
    if suite is not None:
        from quantlab.runtime.load import read_generation_config

        read_generation_config(source.directory)
        for peer in plan.peers:
            read_generation_config(peer.checkpoint.directory)
        checked = _check_suite(suite, plan, run, commits, text)
        check_lm_eval_tasks(load_suite(suite, held_out=checked.held_out), time_limit=time_limit, progress=progress)
    if drawn is not None:
        drawn.keep()
    commits.keep()
    return checked


def _check_suite(path: Path, plan: Plan, run: Path, commits: Commits, text: Sequence[str]) -> Checked:
    """Check a suite, keep the text that is drawn for it, and compare the text with that of the calibration."""
    from quantlab.evaluation.text import check_same_tokens, check_suite_text

    source = plan.checkpoint
    suite = load_suite(path)
    drawn = draw_held_out(suite, source.directory, run, commits)
    with TemporaryDirectory() as folder:
        if drawn is not None:
            file = Path(folder) / drawn.path.name
            file.write_bytes(drawn.content)
            suite = load_suite(path, held_out=file)
        check_suite_text(suite, source.directory, plan.architecture.context_length(source.config))
        for peer in plan.peers:
            check_same_tokens(suite, source.directory, peer.checkpoint.directory)
        overlap = overlap_of(text, (one.text for one in read_corpus(suite.corpus))) if text else None
    if drawn is not None:
        drawn.keep()
    return Checked(drawn.path if drawn is not None else None, overlap)


def _calibration_texts(recipe: LoadedRecipe, drawn: DrawnText | None) -> Iterator[str]:
    """The documents of the calibration text; none without calibration."""
    if drawn is not None:
        yield from (document.text for document in drawn.documents)
    elif recipe.corpus is not None:
        yield from (line["text"] for line in read_calibration_text(recipe.corpus))


def _check_packages(plan: Plan) -> None:
    """Check that the formats that variants are also written in can be written here.

    Raises:
        ArtifactError: a package, or the environment of the format onnx, is not there.
    """
    for variant in plan.variants:
        for name in variant.exports:
            if name == "onnx":
                engine_python()
            package = OPTIONAL_PACKAGES.get(name)
            if package is not None and find_spec(package) is None:
                raise ArtifactError(
                    f"the package {package} is not installed",
                    where=f"variant {variant.name}, format {name}",
                    found="no module of this name",
                    fix=f"pip install 'quantlab[{package}]'",
                )
