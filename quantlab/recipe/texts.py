"""How a recipe or a suite names text: a dataset of the Hugging Face hub, files, or a mixture of several."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SpecialTokens = Literal["special", "text"]
TextColumn = str | tuple[str, str]


class TextChoices(BaseModel):
    """What is read of a dataset, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    config: str | None = None
    """The configuration (subset) of a dataset that has several."""
    revision: str | None = None
    """A commit, tag or branch of a dataset of the hub; by default its main branch. The commit found is written into the manifest."""
    split: str | None = None
    """The split, by default `train` or the preset's."""
    column: TextColumn | None = None
    """The column with text or messages, or [prompt, completion]; by default `text`, `messages`, `conversations`, or `prompt` with `completion`."""
    chat_template: str | None = None
    """A jinja file for messages, relative to the recipe; by default the checkpoint's own template."""
    special_tokens: SpecialTokens = "special"
    """How text that spells a token of the tokenizer's added vocabulary is read: as that token, or as plain `text`. Tokens of the
    chat template itself, and the tags of reasoning in messages, are always tokens."""

    @property
    def chosen(self) -> tuple[str, ...]:
        """The fields of this class that are not left at their defaults."""
        return tuple(name for name in TextChoices.model_fields if getattr(self, name) != _DEFAULTS[name])


_DEFAULTS = {name: field.default for name, field in TextChoices.model_fields.items()}


class TextSource(TextChoices):
    """A dataset."""

    dataset: str = Field(min_length=1)
    """A preset, a Hugging Face id, or a file or folder relative to the recipe. `./c4` is a folder, `c4` the preset."""


class MixedSource(TextSource):
    """A dataset of a mixture."""

    share: float = Field(gt=0, le=1)
    """Its share; those of a mixture add up to 1."""


def check_text(
    *, corpus: str | None, dataset: str | None, mix: tuple[MixedSource, ...], chosen: tuple[str, ...], example: str
) -> None:
    """Check that a section names its text in one way.

    Args:
        corpus: the section's file of JSON lines.
        dataset: its dataset.
        mix: its mixture.
        chosen: its fields that say what is read of a dataset.
        example: the simplest way to name the text, for messages.

    Raises:
        ValueError: it names no text or names it in several ways, a field has no dataset it could belong to, or shares do not add up to 1.
    """
    named = [name for name, value in (("corpus", corpus), ("dataset", dataset), ("mix", mix)) if value]
    if not named:
        raise ValueError(f"no text is named; write `{example}`, `dataset: NAME` or `mix: […]`")
    if len(named) > 1:
        raise ValueError(f"the text is named by {' and '.join(f'`{name}`' for name in named)}; keep one of them")
    if chosen and not dataset:
        place = "each entry of `mix`" if mix else "a text named by `dataset`"
        raise ValueError(f"`{chosen[0]}` belongs to {place}; move it there or remove it")
    total = math.fsum(source.share for source in mix)
    if mix and not math.isclose(total, 1, abs_tol=1e-6):
        raise ValueError(f"the shares of the mixture add up to {total:g}; change them so that they add up to 1")


def sources_of(section: TextChoices, dataset: str | None, mix: tuple[MixedSource, ...]) -> tuple[TextSource, ...]:
    """The datasets of a section that passed `check_text`; none if it names a corpus."""
    if dataset is None:
        return mix
    return (TextSource(dataset=dataset, **{name: getattr(section, name) for name in TextChoices.model_fields}),)


@dataclass(frozen=True)
class LocatedSource:
    """A dataset whose contents are determined.

    Attributes:
        source: the source, with the fields of its preset.
        share: its share of the samples or documents.
        path: the file or folder; None for a dataset of the hub.
        commit: commit of the hub, or sha256 of the files.
        template: the chat template, empty if there is none.
    """

    source: TextSource
    share: float
    path: Path | None
    commit: str
    template: str

    @property
    def name(self) -> str:
        """The dataset as text, with configuration and split."""
        parts = [self.source.dataset, self.source.config, self.source.split]
        return " ".join(part for part in parts if part)

    def identity(self) -> dict[str, Any]:
        """Everything that decides which texts it gives, except the seed; a local path does not."""
        return {
            "dataset": self.source.dataset if self.path is None else "",
            "config": self.source.config,
            "commit": self.commit,
            "split": self.source.split,
            "column": self.source.column,
            "special_tokens": self.source.special_tokens,
            "template_sha256": hashlib.sha256(self.template.encode()).hexdigest() if self.template else "",
            "share": self.share,
        }

    def written(self) -> dict[str, Any]:
        """The same as stored in manifests."""
        return self.identity() | {"dataset": self.source.dataset}


@dataclass(frozen=True)
class LocatedText:
    """The datasets of a section, located.

    Attributes:
        sources: in the order of the section; their shares add up to 1.
    """

    sources: tuple[LocatedSource, ...]

    @property
    def key(self) -> str:
        """sha256 of what decides the texts: dataset, commit, split, column, template and share of every source."""
        content = json.dumps([source.identity() for source in self.sources], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()
