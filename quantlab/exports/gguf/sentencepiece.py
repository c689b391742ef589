"""BPE tokenizers in the style of sentencepiece (Llama 2), as llama.cpp's tokenizer `llama` computes them.

llama.cpp joins the two neighbours whose joined text is the token with the highest score, the leftmost first, and spells characters
without a token by their bytes (`llm_tokenizer_spm_session` in src/llama-vocab.cpp). sentencepiece gives the result of the nth merge
the score -n; tokenizer.json has the merges instead, in that order, every way to make a token from two others. So the scores follow
from the merges, if these are of that kind: then each token is made in one place of the list, and by all of its ways.

Types and the scores of added and unused tokens are those of llama.cpp's converter (`_create_vocab_sentencepiece` in
convert_hf_to_gguf.py).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from quantlab.exports.gguf.refusal import RefusalError
from quantlab.exports.gguf.token_types import TokenType

_SPACE: Final = "▁"
_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0
_REPLACES: Final = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPENDS: Final = {"type": "Prepend", "prepend": _SPACE}


class ScoredTokens(NamedTuple):
    """The tokens of a vocabulary.

    Attributes:
        texts: of every token, in order.
        types: their types.
        scores: their scores.
    """

    texts: tuple[str, ...]
    types: tuple[TokenType, ...]
    scores: tuple[float, ...]


class Spaces(NamedTuple):
    """What a tokenizer does with spaces.

    Attributes:
        prefixes: whether it puts a space before a text.
        at_the_start_alone: whether it does so at the start of a text alone, not after special tokens, too, as llama.cpp does.
    """

    prefixes: bool
    at_the_start_alone: bool


def spaces_of(tokenizer: Mapping[str, Any]) -> Spaces:
    """What a tokenizer.json does before merging, which must be what llama.cpp does.

    Raises:
        RefusalError: it does something else.
    """
    normalizer, cut = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    steps = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    if cut is None and steps == [_PREPENDS, _REPLACES]:
        return Spaces(prefixes=True, at_the_start_alone=False)
    if cut is None and steps == [_REPLACES]:
        return Spaces(prefixes=False, at_the_start_alone=False)
    if not steps and isinstance(cut, dict) and cut.get("type") == "Metaspace":
        scheme = cut.get("prepend_scheme")
        if cut.get("replacement") == _SPACE and cut.get("split") is False and scheme in {"first", "always", "never"}:
            return Spaces(prefixes=scheme != "never", at_the_start_alone=scheme == "first")
    words = [str(step.get("type")) for step in (*steps, *([cut] if isinstance(cut, dict) else []))]
    raise RefusalError(
        "llama.cpp's tokenizer in the style of sentencepiece replaces spaces by ▁ and does nothing else to a text; "
        f"the tokenizer has these steps: {' > '.join(words) or 'none'}"
    )


def scored_tokens(tokenizer: Mapping[str, Any], size: int) -> ScoredTokens:
    """Texts, types and scores of all tokens of a tokenizer.json with BPE and byte_fallback; unused numbers get a text of no tokenizer.

    Args:
        tokenizer: its contents.
        size: number of tokens of the model.

    Raises:
        RefusalError: scores cannot express its merges, or bytes have no tokens.
    """
    model = tokenizer["model"]
    vocabulary: Mapping[str, int] = model["vocab"]
    added = {one["content"]: one for one in tokenizer.get("added_tokens") or ()}
    made = _merged([merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]])
    _check_bytes(vocabulary)
    _check_all_ways(vocabulary, made, exempt=added)
    ranks = {text: -float(rank) for rank, text in enumerate(made)}
    texts = [f"[PAD{number}]" for number in range(size)]
    types, scores = [TokenType.UNUSED] * size, [_UNUSED_SCORE] * size
    alone = len(made)  # characters come after what is merged, as in sentencepiece
    for text, number in sorted(vocabulary.items(), key=lambda item: item[1]):
        texts[number], types[number] = text, TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL
        if text in ranks or types[number] is TokenType.BYTE:
            scores[number] = ranks.get(text, 0.0)
        elif text not in added:
            scores[number], alone = -float(alone), alone + 1
    for text, one in added.items():
        number = one["id"]
        texts[number], scores[number] = text, _ADDED_SCORE
        types[number] = TokenType.CONTROL if one.get("special") else TokenType.USER_DEFINED
        if types[number] is TokenType.USER_DEFINED:
            texts[number] = text.replace(_SPACE, " ")  # llama.cpp looks for it in the text before replacing spaces
    unknown = vocabulary.get(model.get("unk_token") or "")
    if unknown is not None:
        types[unknown], scores[unknown] = TokenType.UNKNOWN, 0.0
    return ScoredTokens(tuple(texts), tuple(types), tuple(scores))


def _merged(merges: Sequence[Sequence[str]]) -> dict[str, set[tuple[str, str]]]:
    """The ways to make each token, in the order of the merges.

    Raises:
        RefusalError: a token is made in two places.
    """
    made: dict[str, set[tuple[str, str]]] = {}
    last = None
    for left, right in merges:
        text = left + right
        if text in made and text != last:
            raise RefusalError(
                f"llama.cpp merges by the score of the result, but {text!r} is made by merges of different rank"
            )
        made.setdefault(text, set()).add((left, right))
        last = text
    return made


def _check_bytes(vocabulary: Mapping[str, int]) -> None:
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]
    if missing:
        raise RefusalError(f"the vocabulary has no token for {len(missing)} bytes, the first is {missing[0]}")


def _check_all_ways(
    vocabulary: Mapping[str, int], made: Mapping[str, set[tuple[str, str]]], *, exempt: Mapping[str, object]
) -> None:
    """Raise an error for two tokens that join to a third which no merge makes of them: llama.cpp would merge them."""
    for text in vocabulary:
        if text in exempt or _BYTE.fullmatch(text):
            continue
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in made.get(text, ()):
                raise RefusalError(
                    f"llama.cpp would merge {pair[0]!r} and {pair[1]!r}, which the tokenizer does not: "
                    "its merges are not those of sentencepiece"
                )
