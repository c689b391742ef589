"""Tries everything a run will need before its first block: seconds, also for 671 B parameters, instead of a failure after hours.

The plan has checked the recipe, the headers and the config. Here the model is built without memory, so that a tensor it has no
place for is known now; tokenizer, generation settings and held-out text are read as evaluation will read them.
"""

from importlib.util import find_spec

from quantlab.calibration.corpus import sample_tokens
from quantlab.checkpoint.tokenizer import check_token_settings
from quantlab.errors import ArtifactError
from quantlab.evaluation.suite import load_suite
from quantlab.exports.writers.onnx import engine_python
from quantlab.exports.writers.table import OPTIONAL_PACKAGES
from quantlab.plan.model import Plan
from quantlab.recipe.load import LoadedRecipe


def check_before_running(recipe: LoadedRecipe, plan: Plan) -> None:
    """Check that the checkpoint can be computed with and evaluated, as far as the recipe asks for it.

    Raises:
        ArtifactError: the runtime does not know the model, or a package that writes a format is not installed.
        CheckpointError: a tensor is missing, left over or of the wrong shape; tokenizer or settings cannot be used.
        CalibrationError: the calibration text cannot be used, or is too short.
        EvaluationError: the held-out text or an item of a task cannot be used, or is longer than the model's context.
    """
    _check_packages(plan)
    source, calibration, wanted = plan.checkpoint, recipe.recipe.calibration, recipe.recipe.evaluate
    if wanted is not None or any(variant.calibration for variant in plan.variants):
        from quantlab.runtime.skeleton import check_tensors  # imports transformers, which other recipes do without

        shapes = {step.tensor.name: tuple(step.source.shape) for step in plan.variants[0].steps}
        check_tensors(source.config, shapes, where=str(source.directory))
    check_token_settings(source.directory, source.config)
    if recipe.corpus is not None and calibration is not None:
        sample_tokens(
            recipe.corpus,
            source.directory,
            samples=calibration.samples,
            length=calibration.length,
            seed=calibration.seed,
        )
    if wanted is not None:
        from quantlab.evaluation.text import check_same_tokens, check_suite_text
        from quantlab.runtime.load import read_generation_config

        read_generation_config(source.directory)
        suite = load_suite(recipe.resolve(wanted.suite))
        check_suite_text(suite, source.directory, plan.architecture.context_length(source.config))
        for peer in plan.peers:
            read_generation_config(peer.checkpoint.directory)
            check_same_tokens(suite, source.directory, peer.checkpoint.directory)


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
