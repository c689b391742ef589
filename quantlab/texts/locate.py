"""Locates the datasets that a recipe or a suite names: which commit of the hub or which files, and which chat template.

This decides the identity of the text and reads none of it, so that a plan needs one request per dataset, and none if the revision is a commit.
A run keeps the commits it found (`Commits`), so that continuing it needs no network and reads what it read before.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from quantlab.checkpoint.tokenizer import read_chat_template
from quantlab.errors import ArtifactError, CalibrationError, QuantlabError
from quantlab.files import write_atomically, write_error
from quantlab.recipe.load import LoadedRecipe
from quantlab.recipe.presets import PRESETS, with_preset
from quantlab.recipe.texts import LocatedSource, LocatedText, MixedSource, TextSource
from quantlab.texts.refusals import patiently, refusal

TEXTS: Final = "texts"
"""Folder of a run's directory with the texts that were drawn from datasets, and their commits."""
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_HUB_ID: Final = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_BLOCK: Final = 1 << 20


def keep(path: Path, content: bytes) -> None:
    """Write a file of a run's directory that does not exist yet, with its folder.

    Raises:
        ArtifactError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error
    write_atomically(path, content)


class Commits:
    """The commits that revisions stand for: as an earlier run in the same directory found them, else as the hub says.

    Args:
        run: the run's directory; it may be missing.

    Raises:
        ArtifactError: the file with the earlier answers is damaged.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / TEXTS / "commits.json"
        self.known: dict[str, str] = {}
        try:
            if self._path.is_file():
                self.known = {str(name): str(commit) for name, commit in json.loads(self._path.read_bytes()).items()}
        except (OSError, ValueError, AttributeError) as error:
            raise ArtifactError(
                "the commits of datasets that the run found cannot be read",
                where=str(self._path),
                found=f"{type(error).__name__}: {error}",
                fix="remove the file: the hub is asked again",
            ) from error

    def keep(self) -> None:
        """Write the commits into the run's directory, if there are any.

        Raises:
            ArtifactError: the file cannot be written.
        """
        if self.known:
            keep(self._path, (json.dumps(self.known, indent=1, sort_keys=True) + "\n").encode())

    def of(self, dataset: str, revision: str | None) -> str:
        """The commit of a dataset's revision; asks the hub unless it is one or is known.

        Raises:
            Exception: an error of huggingface_hub.
        """
        if revision is not None and _COMMIT.fullmatch(revision):
            return revision
        name = f"{dataset}@{revision or 'main'}"
        if name not in self.known:
            from huggingface_hub import HfApi  # half a second that recipes without datasets do without

            found = patiently(lambda: HfApi().dataset_info(dataset, revision=revision, timeout=30).sha)
            self.known[name] = str(found)
        return self.known[name]


def locate(
    sources: Sequence[TextSource],
    resolve: Callable[[str], Path],
    checkpoint: Path,
    *,
    commits: Commits,
    error: type[QuantlabError],
) -> LocatedText:
    """Determine what the named datasets contain.

    Args:
        sources: as a section of a recipe or suite names them.
        resolve: turns a path in the section into an absolute one.
        checkpoint: the source checkpoint, for its chat template.
        commits: commits that are known.
        error: type of the errors raised.

    Raises:
        QuantlabError: of type `error`: a name is neither a preset nor a path nor an id, the hub does not know or give the dataset, or a
            file or template cannot be read.
    """
    located = []
    for named in sources:
        share = named.share if isinstance(named, MixedSource) else 1.0
        known = with_preset(named)
        path = None if known is not named else _local(known.dataset, resolve)
        source = TextSource(
            **known.model_dump(include=set(TextSource.model_fields)) | {"split": known.split or "train"}
        )
        template = _template(source, resolve, checkpoint, error)
        if path is not None:
            commit = _sha256_of_files(path, error)
        elif _HUB_ID.fullmatch(source.dataset):
            try:
                commit = commits.of(source.dataset, source.revision)
            except Exception as problem:
                where = f"dataset {source.dataset}" + (f", revision {source.revision}" if source.revision else "")
                raise refusal(problem, error, where=where) from problem
        else:
            raise error(
                "the dataset is not there",
                where=f"dataset {source.dataset}",
                found="neither a file or folder, nor the id of a dataset",
                fix=f"correct the path, write owner/name, or one of the presets {', '.join(PRESETS)}",
            )
        located.append(LocatedSource(source, share, path, commit, template))
    return LocatedText(tuple(located))


def with_located_text(recipe: LoadedRecipe, checkpoint: Path, commits: Commits) -> LoadedRecipe:
    """A recipe with the datasets of its calibration located, if a variant is calibrated on any.

    Raises:
        CalibrationError: see `locate`.
    """
    calibration = recipe.recipe.calibration
    if calibration is None or not calibration.sources or not recipe.recipe.calibrated:
        return recipe

    def resolve(word: str) -> Path:
        return (recipe.path.parent / word).resolve()

    found = locate(calibration.sources, resolve, checkpoint, commits=commits, error=CalibrationError)
    return replace(recipe, datasets=found)


def _local(name: str, resolve: Callable[[str], Path]) -> Path | None:
    path = resolve(name)
    return path if path.exists() else None


def _template(source: TextSource, resolve: Callable[[str], Path], checkpoint: Path, error: type[QuantlabError]) -> str:
    """The template that the source names, else the checkpoint's own; empty without either."""
    if source.chat_template is None:
        return read_chat_template(checkpoint)
    path = resolve(source.chat_template)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise error(
            "the chat template cannot be read",
            where=f"dataset {source.dataset}, chat_template",
            found=f"{path}: {problem}",
            fix="give a jinja file in UTF-8",
        ) from problem


def _sha256_of_files(path: Path, error: type[QuantlabError]) -> str:
    """sha256 of a file, or of the names and contents of the files of a folder."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    total = hashlib.sha256()
    try:
        for file in files:
            digest = hashlib.sha256()
            with file.open("rb") as content:
                while block := content.read(_BLOCK):
                    digest.update(block)
            name = "" if path.is_file() else file.relative_to(path).as_posix()
            total.update(f"{name} {digest.hexdigest()}\n".encode())
    except OSError as problem:
        raise error(
            "the dataset cannot be read", where=str(file), found=str(problem.strerror), fix="make the file readable"
        ) from problem
    if not files:
        raise error(
            "the dataset is empty", where=str(path), found="a folder without files", fix="give the folder of its files"
        )
    return total.hexdigest()
