"""Engines as the command line names them."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from quantlab.documents import nearest
from quantlab.errors import EvaluationError
from quantlab.evaluation.engines.engine import BY_RULES, ENGINES, Engine
from quantlab.evaluation.engines.environments import find_environment, pinned_version
from quantlab.recipe.schema import EngineName

DTYPES = ("float32", "bfloat16", "float16")


def engine_names(words: Sequence[str], dtype: str = "float32") -> tuple[EngineName, ...]:
    """The engines of the command line, each once; checks the dtype too.

    Raises:
        EvaluationError: there is no such engine or dtype.
    """
    names: tuple[EngineName, ...] = get_args(EngineName)
    for word in words:
        if word not in names:
            raise EvaluationError("there is no such engine", where="--engine", found=word, fix=nearest(word, names))
    if dtype not in DTYPES:
        raise EvaluationError("there is no such dtype", where="--dtype", found=dtype, fix=nearest(dtype, DTYPES))
    return tuple(name for word in dict.fromkeys(words) for name in names if name == word)


def pythons_of(words: Sequence[str]) -> dict[str, Path]:
    """The Pythons of `--engine-python ENGINE=PATH`.

    Raises:
        EvaluationError: a word is not of this form, or there is no such engine.
    """
    found = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or not path:
            raise EvaluationError(
                "an engine's Python is not understood", where="--engine-python", found=word, fix="write ENGINE=PATH"
            )
        engine_names((name,))
        found[name] = Path(path).expanduser()
    return found


def described_engines() -> list[tuple[str, str, str, str]]:
    """Every engine: its name, its pinned version, where its Python is, and the formats it reads."""
    return [
        (engine.name, pinned_version(engine) or "–", _python(engine), ", ".join(engine.formats))
        for engine in ENGINES.values()
    ]


def _python(engine: Engine) -> str:
    if not engine.runs:
        return BY_RULES
    try:
        found = find_environment(engine)
    except EvaluationError as error:
        return f"{error.where}: {error.found}"
    return "not installed" if found is None else f"{found.python} ({found.origin})"
