"""The suite: what is measured of every artifact, and how much of it, as one YAML file of eval/suites."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from quantlab.documents import load_document
from quantlab.errors import EvaluationError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TextSuite(_Strict):
    """The held-out text that quality is measured on."""

    corpus: str
    """JSON lines with `id`, `domain` and `text`; path relative to the suite."""
    length: int = Field(default=512, ge=8)
    """Tokens the model sees at once, a beginning-of-sequence token included."""
    tokens_per_domain: int = Field(gt=0)
    """Most tokens scored per domain; the first window of every document comes before any document's second."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the activations. A router that picks experts amplifies rounding, so differences of artifacts show best in float32."""


class SpeedSuite(_Strict):
    """The random-weight twin that speed is measured on, and how long."""

    description: str = Field(min_length=1)
    """The twin in a few words, for the heads of tables."""
    shape: dict[str, JsonValue] = Field(min_length=1)
    """The config.json of the twin."""
    batches: tuple[int, ...] = Field(default=(1, 8), min_length=1)
    """Sequences decoded at once."""
    prompt: int = Field(default=64, gt=0)
    """Tokens in the cache when decoding starts, and tokens of a prefill."""
    steps: int = Field(default=4, gt=0)
    """Tokens decoded per sequence and round."""
    rounds: int = Field(default=15, ge=7)
    """Most rounds; each times every twin once. Seven at least: a median of fewer has no 95 % interval."""
    seconds: float = Field(default=30.0, gt=0)
    """After this long no further round starts, unless fewer than seven are done."""


class Suite(_Strict):
    """One set of measurements, the same for every artifact."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)
    """The suite's name."""
    version: int = Field(gt=0)
    """Raised by every change that alters numbers."""
    text: TextSuite
    """Quality."""
    speed: SpeedSuite | None = None
    """Speed; left out, it is not measured."""


@dataclass(frozen=True)
class LoadedSuite:
    """A suite and where it came from.

    Attributes:
        path: the file.
        suite: what it says.
        sha256: hash of the file and of the corpus it names, so that the same hash means the same questions.
    """

    path: Path
    suite: Suite
    sha256: str

    @property
    def corpus(self) -> Path:
        return (self.path.parent / self.suite.text.corpus).resolve()

    @property
    def title(self) -> str:
        """Name and version, as records give it."""
        return f"{self.suite.name} {self.suite.version}"


def load_suite(path: Path) -> LoadedSuite:
    """Read and check a suite.

    Raises:
        RecipeError: the file cannot be read, is no YAML, or says something a suite cannot say.
        EvaluationError: the corpus it names cannot be read.
    """
    suite, content = load_document(path, Suite, kind="suite")
    corpus = (path.parent / suite.text.corpus).resolve()
    try:
        text = corpus.read_bytes()
    except OSError as error:
        raise EvaluationError(
            "the held-out text cannot be read",
            where=str(corpus),
            found=error.strerror,
            fix=f"correct `text.corpus` in {path}",
        ) from error
    digest = hashlib.sha256(hashlib.sha256(content).digest() + hashlib.sha256(text).digest())
    return LoadedSuite(path, suite, digest.hexdigest())
