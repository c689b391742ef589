"""What a plan can say about the text of a recipe, and the record of its overlap."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from quantlab.errors import EvaluationError, QuantlabError
from quantlab.evaluation.suite import load_suite
from quantlab.files import read_json_lines, write_atomically
from quantlab.recipe.load import LoadedRecipe
from quantlab.texts.overlap import Overlap, overlap_of

OVERLAP_NAME = "overlap.json"
"""File of the run's directory with the overlap of calibration and held-out text."""


def text_notes(recipe: LoadedRecipe) -> Iterator[str]:
    """Lines for a plan: where the calibration text is from, and how much of the held-out text it contains, if both are files.

    Args:
        recipe: the recipe, with its datasets located.
    """
    for source in recipe.datasets.sources if recipe.datasets is not None else ():
        what = f"commit {source.commit}" if source.path is None else f"sha256 {source.commit}"
        yield f"calibration text: {source.name}, {what}, {100 * source.share:g} % of the samples"
    if recipe.suite is None or not recipe.recipe.calibrated:
        return
    try:
        suite = load_suite(recipe.suite)
        if recipe.corpus is None or suite.held_out is None:
            yield "calibration and held-out text: `run` compares them when they are drawn"
        else:
            yield overlap_of(_texts(recipe.corpus), _texts(suite.held_out)).text
    except QuantlabError as error:
        yield f"calibration and held-out text are not compared: {error.what} ({error.where})"


def keep_overlap(overlap: Overlap | None, run: Path) -> None:
    """Write the overlap into the run's directory; nothing without one.

    Raises:
        ArtifactError: the file cannot be written.
    """
    if overlap is not None:
        write_atomically(
            run / OVERLAP_NAME, (json.dumps(asdict(overlap), indent=1, ensure_ascii=False) + "\n").encode()
        )


def _texts(path: Path) -> Iterator[str]:
    return (line["text"] for line in read_json_lines(path, fields=("text",), kind="text", error=EvaluationError))
