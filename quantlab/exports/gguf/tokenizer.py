"""The tokenizer of an artifact as GGUF stores it: tokens with their types, merges or scores, special tokens and chat template.

Two kinds of BPE, both read from tokenizer.json: byte-level (DeepSeek, Llama 3, Qwen; llama.cpp's `gpt2`), and in the style of
sentencepiece (Llama 2; llama.cpp's `llama`). Unigram models are refused: llama.cpp's `llama` merges, they choose the likeliest cut.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from quantlab.checkpoint.tokenizer import load_tokenizer
from quantlab.exports.gguf.pre_tokenizers import name_of
from quantlab.exports.gguf.refusal import RefusalError
from quantlab.exports.gguf.sentencepiece import Spaces, scored_tokens, spaces_of
from quantlab.exports.gguf.token_types import TokenType
from quantlab.files import read_json

_OTHER_FILES: Final = ("tokenizer.model", "vocab.json", "spiece.model", "tiktoken.model", "qwen.tiktoken")
"""Vocabularies of other tokenizers than tokenizer.json."""


@dataclass(frozen=True)
class Vocabulary:
    """A BPE tokenizer.

    Attributes:
        model: llama.cpp's name of its kind.
        pre: llama.cpp's name of its pre-tokenizer.
        tokens: text of every token of the model's vocabulary, in order; in `gpt2`, bytes are spelled as GPT-2's printable characters.
        types: their types. Special tokens are control tokens; other added tokens are user-defined, which llama.cpp finds in every
            text, as tokenizers does.
        merges: of `gpt2`: pairs of tokens, the first merged first, each with a space between the two.
        scores: of `llama`: one per token; the highest is merged first.
        spaces: of `llama`: what it does with spaces.
        special: token numbers by GGUF's words: "bos", "eos", "eot", "padding", "unknown".
        adds_beginning: whether the beginning-of-sequence token is put before a text.
        normalised: whether tokenizer.json normalises text to NFC, which llama.cpp does not.
        chat_template: Jinja; templates by their names if there are several; None without one.
    """

    model: Literal["gpt2", "llama"]
    pre: str
    tokens: tuple[str, ...] = field(repr=False)
    types: tuple[TokenType, ...] = field(repr=False)
    special: Mapping[str, int]
    adds_beginning: bool
    chat_template: str | Mapping[str, str] | None = field(repr=False)
    merges: tuple[str, ...] = field(default=(), repr=False)
    scores: tuple[float, ...] = field(default=(), repr=False)
    spaces: Spaces | None = None
    normalised: bool = False


def read_vocabulary(directory: Path, config: Mapping[str, Any]) -> Vocabulary | None:
    """The tokenizer of a checkpoint; None if it has none.

    Args:
        directory: of tokenizer.json and tokenizer_config.json.
        config: config.json of the model, with `vocab_size`.

    Raises:
        RefusalError: llama.cpp does not know such a tokenizer.
        CheckpointError: its files cannot be read.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        other = next((name for name in _OTHER_FILES if (directory / name).is_file()), None)
        if other is not None:
            raise RefusalError(f"the tokenizer is {other} without a tokenizer.json; save one with transformers")
        return None
    content = read_json(path)
    read = _scored if (content.get("model") or {}).get("byte_fallback") else _byte_level
    found = read(content, config["vocab_size"])
    tokenizer, prefix = load_tokenizer(directory)
    settings = _optional(directory / "tokenizer_config.json")
    beginning = _token(tokenizer.token_to_id, settings, config, "bos")
    if prefix not in {(), (beginning,)}:
        raise RefusalError(
            f"llama.cpp puts the token `bos` before a text or nothing; the tokenizer puts {list(prefix)}"
        )
    generation = _optional(directory / "generation_config.json")
    special = {
        "bos": beginning,
        **_ends(_token(tokenizer.token_to_id, settings, config, "eos"), config, generation),
        "padding": _token(tokenizer.token_to_id, settings, config, "pad"),
        **found.special,
    }
    return replace(
        found,
        special={name: token for name, token in special.items() if token is not None},
        adds_beginning=bool(prefix),
        chat_template=_chat_template(directory, settings),
    )


def _byte_level(content: Mapping[str, Any], size: int) -> Vocabulary:
    """A byte-level tokenizer without its special tokens and template."""
    _check_kind(content)
    tokens, types = _tokens(content, size)
    merges = tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"])
    normalised = "NFC" in str(content.get("normalizer"))
    return Vocabulary("gpt2", name_of(content), tokens, types, {}, False, None, merges=merges, normalised=normalised)


def _scored(content: Mapping[str, Any], size: int) -> Vocabulary:
    """A tokenizer in the style of sentencepiece, without its special tokens but the unknown one, and without its template."""
    _check_type(content)
    spaces, found = spaces_of(content), scored_tokens(content, size)
    unknown = content["model"]["vocab"].get(content["model"].get("unk_token"))
    special = {} if unknown is None else {"unknown": unknown}
    return Vocabulary(
        "llama", "default", found.texts, found.types, special, False, None, scores=found.scores, spaces=spaces
    )


def _check_type(content: Mapping[str, Any]) -> None:
    """Raise an error for a tokenizer that is not BPE as llama.cpp computes it."""
    model = content.get("model") or {}
    kind = model.get("type")
    if kind != "BPE":
        raise RefusalError(f"the tokenizer is of type {kind}; only BPE is written")
    for word in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(word):
            raise RefusalError(f"llama.cpp's BPE has no {word}, the tokenizer has {model[word]!r}")


def _check_kind(content: Mapping[str, Any]) -> None:
    """Raise an error for a tokenizer that is not byte-level BPE as llama.cpp computes it."""
    _check_type(content)
    normalizer = content.get("normalizer")
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    other = [step.get("type") for step in steps if step.get("type") != "NFC"]
    if other:
        raise RefusalError(f"llama.cpp's byte-level BPE does not normalise text, the tokenizer does: {other[0]}")


def _tokens(content: Mapping[str, Any], size: int) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
    """Text and type of every token; numbers without a token get a text that no tokenizer has."""
    texts = {number: text for text, number in content["model"]["vocab"].items()}
    types = dict.fromkeys(texts, TokenType.NORMAL)
    for added in content.get("added_tokens") or ():
        texts[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
    numbers = range(size)
    return tuple(texts.get(number, f"[PAD{number}]") for number in numbers), tuple(
        types.get(number, TokenType.UNUSED) for number in numbers
    )


def _token(number_of: Any, settings: Mapping[str, Any], config: Mapping[str, Any], word: str) -> int | None:  # noqa: ANN401
    """The number of a special token: by its text in tokenizer_config.json, else the (first) number in config.json."""
    text = settings.get(f"{word}_token")
    text = text.get("content") if isinstance(text, dict) else text
    number = number_of(text) if isinstance(text, str) else None
    if number is None:
        found = config.get(f"{word}_token_id")
        number = found[0] if isinstance(found, list) and found else found
    return number if isinstance(number, int) and number >= 0 else None


def _ends(first: int | None, config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, int | None]:
    """`eos`, and `eot` where another token ends a generation too."""
    found = [content.get("eos_token_id") for content in (generation, config)]
    numbers = [number for entry in found for number in (entry if isinstance(entry, list) else [entry])]
    others = [number for number in numbers if isinstance(number, int) and number not in {first, -1}]
    return {"eos": first, "eot": others[0] if others else None}


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | Mapping[str, str] | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        return {str(entry["name"]): str(entry["template"]) for entry in template}
    return template if isinstance(template, str) else None


def _optional(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.is_file() else {}
