"""The names by which llama.cpp knows the pre-tokenizers of byte-level BPE tokenizers.

A pre-tokenizer cuts a text into pieces, which byte-pair encoding then merges one by one. llama.cpp contains the rules of the
tokenizers that it knows, and GGUF names one of them. llama.cpp's converter finds the name by a hash of the tokens of a test
text, so every vocabulary needs an entry of its own; here the rules of tokenizer.json decide, so that a vocabulary that was
trained anew with known rules is recognised too.

Source: the regular expressions in `src/llama-vocab.cpp`, beside which stand those of the original tokenizer.json.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from quantlab.exports.gguf.refusal import RefusalError

Steps = tuple[str, ...]
"""The regular expressions that cut a text, one after the other; every match is a piece of its own."""

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AFTER_DIGITS: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2: Final = "the pattern of GPT-2"
"""Stands for the pattern that ByteLevel applies with `use_regex`."""
_DIGIT: Final = r"\p{N}"
_CJK: Final = "[一-龥ࠀ-一가-퟿]+"
_LETTERS: Final = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-Ֆ"
"""The beginning of a list of all cased letters."""
_LLAMA3: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_AFTER_DIGITS}"
_QWEN2: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_AFTER_DIGITS}"
_DEEPSEEK_V3: Final = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_PUNCTUATION: Final = r"\s?[!-/:-~！-／：-～‘-‟　-。]+"

NAMES: Final[Mapping[tuple[Steps, bool], str]] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_V3), False): "deepseek-v3",
    ((r"[\r\n]", _LETTERS, _PUNCTUATION, r"\s+$", _CJK, _DIGIT), False): "deepseek-llm",
    ((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, _DIGIT), False): "deepseek-coder",
}
"""Name by the steps, and by whether pieces that are tokens are taken whole (`ignore_merges`)."""


def name_of(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer of a tokenizer.json.

    Args:
        tokenizer: contents of a tokenizer.json with a byte-level BPE model.

    Raises:
        RefusalError: llama.cpp has no such pre-tokenizer.
    """
    steps = _steps(tokenizer.get("pre_tokenizer"))
    whole = bool(tokenizer["model"].get("ignore_merges"))
    for (known, known_whole), name in NAMES.items():
        if whole == known_whole and _same(steps, known):
            return name
    merged = ", tokens taken whole" if whole else ""
    raise RefusalError(
        f"llama.cpp knows no pre-tokenizer with these steps: {' > '.join(step[:60] for step in steps) or 'none'}{merged}"
    )


def _same(steps: Steps, known: Steps) -> bool:
    """Whether the steps are the known ones; of `_LETTERS` the table has the beginning."""
    return len(steps) == len(known) and all(
        step == pattern or (pattern == _LETTERS and step.startswith(pattern))
        for step, pattern in zip(steps, known, strict=True)
    )


def _steps(pre_tokenizer: object) -> Steps:
    """The steps of a pre-tokenizer that ends in bytes.

    Raises:
        RefusalError: it does not, or it has a step that is no regular expression.
    """
    parts = _parts(pre_tokenizer)
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        found = " > ".join(str(part.get("type")) for part in parts) or "none"
        raise RefusalError(
            f"llama.cpp's byte-level BPE needs a pre-tokenizer that ends in plain ByteLevel, found {found}"
        )
    cuts = [_cut(part) for part in parts[:-1]]
    return (*cuts, _GPT2) if parts[-1].get("use_regex", True) else tuple(cuts)


def _parts(pre_tokenizer: object) -> Sequence[Mapping[str, Any]]:
    if not isinstance(pre_tokenizer, dict):
        return ()
    if pre_tokenizer.get("type") != "Sequence":
        return (pre_tokenizer,)
    return [part for inner in pre_tokenizer.get("pretokenizers", ()) for part in _parts(inner)]


def _cut(part: Mapping[str, Any]) -> str:
    """The regular expression of one step before the bytes, with line breaks spelled as escapes.

    Raises:
        RefusalError: it is none.
    """
    if part.get("type") == "Digits" and part.get("individual_digits"):
        return _DIGIT
    pattern, behaviour = part.get("pattern"), (part.get("behavior"), bool(part.get("invert")))
    isolates = behaviour in {("Isolated", False), ("Removed", True)}
    if part.get("type") != "Split" or not isolates or not isinstance(pattern, dict) or "Regex" not in pattern:
        raise RefusalError(f"llama.cpp knows no pre-tokenizer with the step {str(dict(part))[:160]}")
    return str(pattern["Regex"]).replace("\r", r"\r").replace("\n", r"\n")
