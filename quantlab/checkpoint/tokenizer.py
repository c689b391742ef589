"""Loads the tokenizer of a checkpoint, for calibration and evaluation."""

from pathlib import Path

from tokenizers import Tokenizer

from quantlab.errors import CheckpointError
from quantlab.files import read_json

_FIX = "copy the tokenizer's files from the original release"


def load_tokenizer(directory: Path) -> tuple[Tokenizer, tuple[int, ...]]:
    """Load the tokenizer of a checkpoint, and the ids it puts before a text.

    tokenizer.json is read directly, because the classes of transformers rebuild parts of it from their own defaults.
    They also add the beginning-of-sequence token if tokenizer_config.json sets `add_bos_token`, which tokenizer.json
    may lack; so does this function. The returned tokenizer neither adds tokens nor truncates nor pads, so that its
    offsets refer to the whole text; the caller adds the ids.

    Raises:
        CheckpointError: there is no usable tokenizer, or its beginning-of-sequence token is not in its vocabulary.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            "the checkpoint has no tokenizer", where=str(directory), found="no tokenizer.json", fix=_FIX
        )
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError("the tokenizer cannot be read", where=str(path), found=str(error), fix=_FIX) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    prefix = tuple(tokenizer.encode("").ids)
    tokenizer.post_processor = None  # it may exclude spaces from the offsets
    if prefix or not (directory / "tokenizer_config.json").is_file():
        return tokenizer, prefix
    settings = read_json(directory / "tokenizer_config.json")
    if not settings.get("add_bos_token"):
        return tokenizer, ()
    token = settings.get("bos_token")
    content = token.get("content") if isinstance(token, dict) else token
    identifier = tokenizer.token_to_id(str(content))
    if identifier is None:
        raise CheckpointError(
            "the beginning-of-sequence token is not in the vocabulary",
            where=str(directory / "tokenizer_config.json"),
            found=repr(content),
            fix=_FIX,
        )
    return tokenizer, (identifier,)
