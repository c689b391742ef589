"""A recipe file in, a recipe with its places resolved out."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from quantlab.documents import load_document, nearest
from quantlab.errors import RecipeError
from quantlab.recipe.schema import Recipe

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w.-]+)?$")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with where it came from.

    Attributes:
        path: the file.
        content: the file's bytes, which go into every artifact.
        recipe: what they say.
    """

    path: Path
    content: bytes
    recipe: Recipe

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def resolve(self, place: str) -> Path:
        """A path of the recipe, which is relative to the recipe's own directory."""
        return (self.path.parent / place).resolve()

    @property
    def corpus(self) -> Path | None:
        """The calibration text, None where no variant reads it."""
        calibration = self.recipe.calibration
        return None if calibration is None or not self.recipe.calibrated else self.resolve(calibration.corpus)

    def corpus_sha256(self) -> str:
        """Hash of the calibration text, empty where no variant reads it.

        Raises:
            RecipeError: the file is not there.
        """
        if self.corpus is None:
            return ""
        try:
            return hashlib.sha256(self.corpus.read_bytes()).hexdigest()
        except OSError as error:
            raise RecipeError(
                "the calibration text cannot be read",
                where=f"{self.path}, calibration.corpus",
                found=f"{self.corpus}: {error.strerror}",
                fix='give JSON lines with a `text` field, for example {"text": "…"}',
            ) from error

    @property
    def hub_id(self) -> tuple[str, str | None] | None:
        """Hugging Face id and revision of the model, when it is no local directory."""
        model = self.recipe.model
        if self.resolve(model).exists() or not _HUB_ID.match(model):
            return None
        name, _, revision = model.partition("@")
        return name, revision or None


def load_recipe(path: Path) -> LoadedRecipe:
    """Read and check a recipe.

    Raises:
        RecipeError: the file cannot be read, is no YAML, or says something a recipe cannot say.
    """
    recipe, content = load_document(path, Recipe, kind="recipe")
    if recipe.evaluate is not None:
        baselines = ["source", *recipe.variants]
        if recipe.evaluate.baseline not in baselines:
            raise RecipeError(
                "the baseline is no variant",
                where=f"{path}, evaluate.baseline",
                found=repr(recipe.evaluate.baseline),
                fix=nearest(recipe.evaluate.baseline, baselines),
            )
    loaded = LoadedRecipe(path, content, recipe)
    places = [
        recipe.model,
        *([recipe.calibration.corpus] if recipe.calibration else []),
        *([recipe.evaluate.suite] if recipe.evaluate else []),
        *([recipe.evaluate.claims] if recipe.evaluate and recipe.evaluate.claims else []),
    ]
    for place in places:
        try:
            loaded.resolve(place).exists()
        except (OSError, ValueError) as error:
            raise RecipeError(
                "a path cannot be used",
                where=str(path),
                found=repr(place)[:120],
                fix="give a path this system can name",
            ) from error
    return loaded
