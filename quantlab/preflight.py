"""Tries everything a run will need before its first block: seconds, also for 671 B parameters, instead of a failure after hours.

The plan has checked the recipe, the headers and the config. Here the model is built without memory, so that a tensor it has no
place for is known now; tokenizer, generation settings and held-out text are read as evaluation will read them.
"""

from quantlab.checkpoint.tokenizer import load_tokenizer
from quantlab.evaluation.quality.windows import cut, read_corpus
from quantlab.evaluation.suite import load_suite
from quantlab.plan.model import Plan
from quantlab.recipe.load import LoadedRecipe
from quantlab.runtime.load import read_generation_config
from quantlab.runtime.skeleton import check_tensors


def check_before_running(recipe: LoadedRecipe, plan: Plan) -> None:
    """Check that the checkpoint can be computed with and evaluated, as far as the recipe asks for it.

    Raises:
        QuantlabError: calibration or evaluation would fail.
    """
    calibrates = any(variant.calibration for variant in plan.variants)
    wanted = recipe.recipe.evaluate
    if calibrates or wanted is not None:
        shapes = {step.tensor.name: tuple(step.source.shape) for step in plan.variants[0].steps}
        check_tensors(plan.checkpoint.config, shapes, where=str(plan.checkpoint.directory))
    if wanted is None:
        return
    read_generation_config(plan.checkpoint.directory)
    suite = load_suite(recipe.resolve(wanted.suite))
    tokenizer, prefix = load_tokenizer(plan.checkpoint.directory)
    text = suite.suite.text
    cut(read_corpus(suite.corpus), tokenizer, prefix, length=text.length, tokens_per_domain=text.tokens_per_domain)
