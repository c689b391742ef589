"""The recipes, suites, corpora, claims and the reference model that come with quantlab, known by name.

They stand in `recipes/` and `eval/` of the repository. A wheel holds copies of them in `quantlab/shipped/`, in the same folders, so
that the relative paths inside them hold there, too.
"""

import itertools
import json
from pathlib import Path
from typing import Final, Literal

from quantlab.documents import nearest
from quantlab.errors import RecipeError

Kind = Literal["recipe", "suite", "corpus", "claims", "model"]
"""What a name stands for; names of different kinds may be equal."""

_FOLDERS: Final[dict[Kind, tuple[str, str]]] = {
    "recipe": ("recipes", "*.yaml"),
    "suite": ("eval/suites", "*.yaml"),
    "corpus": ("eval/corpora", "*.jsonl"),
    "claims": ("eval/claims", "*.yaml"),
    "model": ("eval/reference", "*/config.json"),
}
_OTHERWISE: Final[dict[Kind, str]] = {
    "recipe": "the path of a file",
    "suite": "the path of a file",
    "corpus": "the path of a file",
    "claims": "the path of a file",
    "model": "the path of a directory, or a Hugging Face id such as deepseek-ai/DeepSeek-V3-0324",
}
_CALLED: Final[dict[Kind, str]] = {"claims": "file of claims"}
_NAMED: Final = {"calibration": "builtin"}
"""Names of corpora that differ from those of their files."""


def names(kind: Kind) -> dict[str, Path]:
    """Everything of a kind that comes with this installation, by name."""
    folder, pattern = _FOLDERS[kind]
    found = sorted((_root() / folder).glob(pattern))
    if kind == "model":
        return {path.parent.name: path.parent for path in found}
    return {_NAMED.get(path.stem, path.stem): path for path in found}


def locate(word: str, kind: Kind, *, beside: Path, where: str) -> Path:
    """The file, or the directory of a model, that a word stands for: a path if there is something, else a name.

    Args:
        word: as the user wrote it.
        kind: what it should be.
        beside: the directory that relative paths start from.
        where: where the word stands, for messages.

    Returns:
        An absolute path. A word that looks like a path (it has a suffix or a separator) may name nothing: whoever reads it says so.

    Raises:
        RecipeError: the word is neither a path of something nor a name.
    """
    path = beside / word
    if _is_there(path, kind):
        return path.resolve()
    known = names(kind)
    if word in known:
        return known[word].resolve()
    if "/" in word or "\\" in word or Path(word).suffix in {".yaml", ".yml", ".jsonl", ".json"} or path.exists():
        return path.resolve()
    advice = nearest(word, list(known)) if known else "this installation has none of its own"
    raise RecipeError(
        f"neither a path nor the name of a {_CALLED.get(kind, kind)} that comes with quantlab",
        where=where,
        found=repr(word),
        fix=f"{advice} Else give {_OTHERWISE[kind]}"
        if advice.endswith("?")
        else f"{advice}; else give {_OTHERWISE[kind]}",
    )


def description(path: Path, kind: Kind) -> str:
    """What a thing that comes with quantlab is, in one line."""
    match kind:
        case "corpus":
            documents = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            domains = sorted({document["domain"] for document in documents})
            size = sum(len(document["text"].encode()) for document in documents)
            return f"{len(documents)} documents, {size / 1e3:.0f} kB: {', '.join(domains)}"
        case "model":
            paragraphs = (path / "README.md").read_text(encoding="utf-8").split("\n\n")
            return _first_sentence(paragraphs[1])  # the first is the heading
        case _:
            lines = path.read_text(encoding="utf-8").splitlines()
            comment = itertools.takewhile(lambda line: line.startswith("# "), lines)
            return _first_sentence(" ".join(line.removeprefix("# ") for line in comment))


def _first_sentence(text: str) -> str:
    sentence, _, rest = " ".join(text.split()).partition(". ")
    return f"{sentence}." if rest else sentence


def _is_there(path: Path, kind: Kind) -> bool:
    return path.is_dir() if kind == "model" else path.is_file()


def _root() -> Path:
    """The folder with `recipes/` and `eval/`: inside the package where it was installed, else the checkout."""
    inside = Path(__file__).parent / "shipped"
    return inside if inside.is_dir() else Path(__file__).parent.parent
