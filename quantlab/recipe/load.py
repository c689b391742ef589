"""Load a recipe file and resolve the paths in it."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from quantlab.documents import load_document, nearest
from quantlab.errors import RecipeError
from quantlab.recipe.schema import Recipe
from quantlab.recipe.texts import LocatedText
from quantlab.shipped import Kind, locate

_HUB_ID = re.compile(r"^(?!\.)[\w.-]+/[\w.-]+(@[\w./-]+)?$")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and its file.

    Attributes:
        path: the file.
        content: bytes of the file, which every artifact contains.
        recipe: the parsed recipe.
        datasets: the datasets of its calibration, once they are located (`quantlab.texts.locate`); None for a corpus.
    """

    path: Path
    content: bytes
    recipe: Recipe
    datasets: LocatedText | None = None

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def resolve(self, word: str, kind: Kind) -> Path:
        """Resolve a word of the recipe: a path relative to the recipe's directory, or the name of something that comes with quantlab.

        Raises:
            RecipeError: it is neither.
        """
        return locate(word, kind, beside=self.path.parent, where=str(self.path))

    @property
    def model(self) -> Path:
        """The directory of the model, if `hub_id` is None."""
        return self.resolve(self.recipe.model, "model")

    @property
    def suite(self) -> Path | None:
        """The suite's file, None if nothing is measured."""
        return None if self.recipe.evaluate is None else self.resolve(self.recipe.evaluate.suite, "suite")

    @property
    def claims(self) -> Path | None:
        """The file of claims, None if there is none."""
        claims = self.recipe.evaluate.claims if self.recipe.evaluate else None
        return None if claims is None else self.resolve(claims, "claims")

    @property
    def corpus(self) -> Path | None:
        """The file of calibration text, None if no variant is calibrated or the text is that of datasets."""
        calibration = self.recipe.calibration
        if calibration is None or calibration.corpus is None or not self.recipe.calibrated:
            return None
        return self.resolve(calibration.corpus, "corpus")

    def corpus_sha256(self) -> str:
        """sha256 of what decides the calibration text: the corpus, or the located datasets. Empty if no variant is calibrated.

        Raises:
            RecipeError: the recipe names a file that cannot be read, even if no variant is calibrated.
        """
        if self.recipe.calibration is None:
            return ""
        if self.recipe.calibration.corpus is None:
            assert self.datasets is not None or not self.recipe.calibrated, "datasets are located before the plan"
            return self.datasets.key if self.datasets is not None else ""
        corpus = self.resolve(self.recipe.calibration.corpus, "corpus")
        try:
            content = corpus.read_bytes()
        except OSError as error:
            raise RecipeError(
                "the calibration text cannot be read",
                where=f"{self.path}, calibration.corpus",
                found=f"{corpus}: {error.strerror}",
                fix='give JSON lines with a `text` field, for example {"text": "…"}',
            ) from error
        return hashlib.sha256(content).hexdigest() if self.recipe.calibrated else ""

    @property
    def hub_id(self) -> tuple[str, str | None] | None:
        """Hugging Face id and revision of the model; None if it is a local directory."""
        return hub_id(self.recipe.model, beside=self.path.parent)


def hub_id(word: str, *, beside: Path) -> tuple[str, str | None] | None:
    """Id and revision of `org/name@revision`; None if a word has another form, or is the path of something."""
    if not _HUB_ID.match(word) or (beside / word).exists():
        return None
    name, _, revision = word.partition("@")
    return name, revision or None


def _text_paths(recipe: Recipe) -> list[str]:
    """The paths, or names that could be paths, of the calibration text."""
    if recipe.calibration is None:
        return []
    sources = recipe.calibration.sources
    found = [recipe.calibration.corpus, *(name for one in sources for name in (one.dataset, one.chat_template))]
    return [name for name in found if name is not None]


def load_recipe(path: Path) -> LoadedRecipe:
    """Read and check a recipe.

    Args:
        path: its file, or the name of one that comes with quantlab.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or is not a valid recipe.
    """
    path = path if path.exists() else locate(str(path), "recipe", beside=Path(), where="RECIPE")
    recipe, content = load_document(path, Recipe, kind="recipe")
    if recipe.evaluate is not None:
        baselines = recipe.rows
        if recipe.evaluate.baseline not in baselines:
            raise RecipeError(
                "the baseline is not a variant",
                where=f"{path}, evaluate.baseline",
                found=repr(recipe.evaluate.baseline),
                fix=nearest(recipe.evaluate.baseline, baselines),
            )
    loaded = LoadedRecipe(path, content, recipe)
    paths = [
        recipe.model,
        *_text_paths(recipe),
        *recipe.peers.values(),
        *([recipe.evaluate.suite] if recipe.evaluate else []),
        *([recipe.evaluate.claims] if recipe.evaluate and recipe.evaluate.claims else []),
    ]
    for name in paths:
        try:
            (path.parent / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            continue  # a name, or whoever reads the file says that it is not there
        except (OSError, ValueError) as error:
            raise RecipeError(
                "a path cannot be used",
                where=str(path),
                found=repr(name)[:120],
                fix="use a path that is valid on this system",
            ) from error
    return loaded
