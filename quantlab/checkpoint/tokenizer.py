"""Loads the tokenizer of a checkpoint and turns text into tokens, the same way for calibration and evaluation.

Models read a text after the tokens that their tokenizer puts before it, usually the beginning-of-sequence token. Here these are
the *prefix*: callers put it before every piece of text that a model reads, `encode_text` gives the tokens of the text. What the
tokenizer puts after a text (an end-of-sequence token) is never added: the text goes on.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from quantlab.errors import CheckpointError
from quantlab.files import is_unicode, read_json

_FIX = "copy the tokenizer's files from the original release"


def load_tokenizer(directory: Path) -> tuple[Tokenizer, tuple[int, ...]]:
    """Load the tokenizer of a checkpoint, and the ids it puts before a text.

    tokenizer.json is read directly, because the classes of transformers rebuild parts of it from their own defaults.
    They also add the beginning-of-sequence token if tokenizer_config.json sets `add_bos_token`, which tokenizer.json
    may lack; so does this function. The returned tokenizer neither adds tokens nor truncates nor pads, so that its
    offsets refer to the whole text; the caller adds the ids.

    Raises:
        CheckpointError: there is no usable tokenizer, its beginning-of-sequence token is not in its vocabulary, or its
            vocabulary is larger than that of config.json.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            "the checkpoint has no tokenizer", where=str(directory), found="no tokenizer.json", fix=_FIX
        )
    with _errors_of_the_library("the tokenizer cannot be read", where=str(path), fix=_FIX):
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    prefix = _put_before_a_text(tokenizer, path)
    tokenizer.post_processor = None  # it may exclude spaces from the offsets
    beginning = _beginning_token(tokenizer, directory / "tokenizer_config.json")
    _check_vocabulary(tokenizer, directory)
    return tokenizer, prefix or beginning


def encode_text(tokenizer: Tokenizer, prefix: Sequence[int], text: str) -> tuple[Encoding, int]:
    """The tokens of a text that the prefix is put before.

    A text may spell the beginning-of-sequence token itself, as chat templates do. It is then not put there twice: the first
    tokens of the text that equal the beginning of the prefix belong to the prefix, not to the text.

    Args:
        tokenizer: as from `load_tokenizer`.
        prefix: as from `load_tokenizer`.
        text: the text, Unicode without lone surrogates.

    Returns:
        The encoding of the whole text, and how many of its first tokens belong to the prefix.

    Raises:
        CheckpointError: the tokenizer cannot encode the text.
    """
    fix = f"remove the text, or {_FIX}"
    with _errors_of_the_library("the tokenizer cannot encode a text", where=f"text {text[:60]!a}", fix=fix):
        encoding = tokenizer.encode(text, add_special_tokens=False)
    first = encoding.ids[: len(prefix)]
    same = next(
        (at for at, (ours, theirs) in enumerate(zip(prefix, first, strict=False)) if ours != theirs), len(first)
    )
    return encoding, same


def text_tokens(tokenizer: Tokenizer, prefix: Sequence[int], text: str) -> list[int]:
    """The ids of `encode_text` that follow the prefix.

    Raises:
        CheckpointError: the tokenizer cannot encode the text.
    """
    encoding, before = encode_text(tokenizer, prefix, text)
    return encoding.ids[before:]


def check_token_settings(directory: Path, config: Mapping[str, Any]) -> None:
    """Check the settings of generation and tokenizer that an artifact takes over from a checkpoint.

    Args:
        directory: the checkpoint; its tokenizer_config.json and generation_config.json may be missing.
        config: its config.json.

    Raises:
        CheckpointError: a file cannot be read, or a token that ends generation is not in the model's vocabulary.
    """
    optional = [name for name in ("generation_config.json", "tokenizer_config.json") if (directory / name).is_file()]
    files = {"config.json": config} | {name: read_json(directory / name) for name in optional}
    vocabulary = config.get("vocab_size")
    for name, content in files.items():
        end = content.get("eos_token_id")
        for token in end if isinstance(end, list) else [] if end is None else [end]:
            known = isinstance(token, int) and not isinstance(token, bool) and token >= 0
            if not known or (isinstance(vocabulary, int) and token >= vocabulary):
                raise CheckpointError(
                    "an end token is not in the model's vocabulary",
                    where=f"{directory / name}, eos_token_id",
                    found=f"{end!r}, a vocabulary of {vocabulary}",
                    fix=f"use the {name} of the original release",
                )


def read_chat_template(directory: Path) -> str:
    """The chat template of a checkpoint, a jinja text; empty if it has none.

    chat_template.jinja comes before the key of tokenizer_config.json, as in transformers; of several named templates the one
    called `default` is taken.

    Raises:
        CheckpointError: a file cannot be read, or the template is no text.
    """
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                "the chat template cannot be read", where=str(path), found=str(error), fix=_FIX
            ) from error
    path = directory / "tokenizer_config.json"
    found = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    if not isinstance(found, str | None):
        raise CheckpointError("the chat template is no text", where=str(path), found=repr(found)[:120], fix=_FIX)
    return found or ""


def named_tokens(directory: Path) -> dict[str, str]:
    """The texts of a tokenizer's named tokens, for chat templates: `bos_token`, `eos_token` and the like.

    Raises:
        CheckpointError: tokenizer_config.json cannot be read.
    """
    path = directory / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    tokens = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in settings.items()
        if name.endswith("_token") and not name.startswith("add_")
    }
    return {name: token for name, token in tokens.items() if isinstance(token, str)}


def _put_before_a_text(tokenizer: Tokenizer, path: Path) -> tuple[int, ...]:
    """The ids that the tokenizer's own template puts before a text, without those it puts after it."""
    for probe in _probes(tokenizer):
        with suppress(CheckpointError), _errors_of_the_library("not a probe", where=str(path), fix=_FIX):
            encoding = tokenizer.encode(probe)  # fails for a text that a vocabulary of words does not know
            owners = encoding.sequence_ids
            if 0 in owners:
                return tuple(encoding.ids[: owners.index(0)])
    raise CheckpointError("the tokenizer encodes no text", where=str(path), found="no token for any text", fix=_FIX)


def _probes(tokenizer: Tokenizer) -> Iterator[str]:
    yield "a"
    vocabulary = tokenizer.get_vocab()
    yield from sorted(vocabulary, key=lambda token: vocabulary[token])[:1000]


def _beginning_token(tokenizer: Tokenizer, path: Path) -> tuple[int, ...]:
    """The beginning-of-sequence token if tokenizer_config.json asks for it; without a token there is none to add."""
    if not path.is_file():
        return ()
    settings = read_json(path)
    wanted, token = settings.get("add_bos_token"), settings.get("bos_token")
    if wanted is not None and not isinstance(wanted, bool):
        raise CheckpointError(
            "add_bos_token is neither true nor false", where=str(path), found=repr(wanted)[:120], fix=_FIX
        )
    content = token.get("content") if isinstance(token, dict) else token
    if not wanted or token is None:
        return ()
    identifier = tokenizer.token_to_id(content) if isinstance(content, str) and is_unicode(content) else None
    if identifier is None:
        raise CheckpointError(
            "the beginning-of-sequence token is not in the vocabulary",
            where=str(path),
            found=repr(content)[:120],
            fix=_FIX,
        )
    return (identifier,)


def _check_vocabulary(tokenizer: Tokenizer, directory: Path) -> None:
    path = directory / "config.json"
    vocabulary = read_json(path).get("vocab_size") if path.is_file() else None
    largest = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if isinstance(vocabulary, int) and largest[1] >= vocabulary:
        raise CheckpointError(
            "the tokenizer produces tokens outside the model's vocabulary",
            where=str(directory / "tokenizer.json"),
            found=f"token {largest[1]} ({largest[0]!r}), a vocabulary of {vocabulary}",
            fix=_FIX,
        )


@contextmanager
def _errors_of_the_library(what: str, *, where: str, fix: str) -> Iterator[None]:
    """Raise errors of the tokenizers library as CheckpointError: plain Exception, and where its authors expected none a
    PanicException, which is no Exception and cannot be imported."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(what, where=where, found=str(error), fix=fix) from error
