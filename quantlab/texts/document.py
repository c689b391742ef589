"""A document: text in pieces, some of which are plain text even where they spell a token.

Documents that a run drew are kept as JSON lines `{"source": n, "text": …}`, or with `pieces` in place of `text` if some are plain.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from quantlab.checkpoint.tokenizer import text_tokens


@dataclass(frozen=True)
class Piece:
    """A part of a document.

    Attributes:
        text: the text, not empty.
        plain: whether it has no tokens of the added vocabulary, even if it spells one.
    """

    text: str
    plain: bool = False


Document = tuple[Piece, ...]


@dataclass(frozen=True)
class DrawnDocument:
    """A document and the source it is from.

    Attributes:
        source: index of the source in its section.
        document: the text.
    """

    source: int
    document: Document

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(piece.text for piece in self.document)


class Encoder:
    """Turns documents into tokens.

    Args:
        tokenizer: as from `load_tokenizer`.
        prefix: token ids that the tokenizer puts before a text; a document that begins with them does not keep them.
    """

    def __init__(self, tokenizer: Tokenizer, prefix: Sequence[int]) -> None:
        self._tokenizer, self._prefix = tokenizer, list(prefix)
        self._plain: Tokenizer | None = None
        self._added = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}

    @property
    def added(self) -> tuple[str, ...]:
        """The texts of the added vocabulary."""
        return tuple(self._added)

    def tokens(self, document: Document) -> list[int]:
        """The ids of a document without the prefix.

        Raises:
            CheckpointError: the tokenizer cannot encode the text.
        """
        if not any(piece.plain for piece in document):
            return text_tokens(self._tokenizer, self._prefix, "".join(piece.text for piece in document))
        ids: list[int] = []
        text = ""
        for piece in document:
            for part in [piece.text] if piece.plain else self._split(piece.text):
                if not piece.plain and part in self._added:
                    ids += self._plainly(text)
                    ids.append(self._added[part])
                    text = ""
                else:
                    text += part
        ids += self._plainly(text)
        return ids[len(self._prefix) :] if ids[: len(self._prefix)] == self._prefix else ids

    def _split(self, text: str) -> list[str]:
        """The text cut at the tokens of the added vocabulary, which are parts of their own."""
        longest = sorted(self._added, key=lambda token: -len(token))
        return re.split(f"({'|'.join(map(re.escape, longest))})", text) if longest else [text]

    def _plainly(self, text: str) -> list[int]:
        if self._plain is None:
            self._plain = Tokenizer.from_str(json.dumps(json.loads(self._tokenizer.to_str()) | {"added_tokens": []}))
        return text_tokens(self._plain, (), text) if text else []


def write_documents(documents: Iterable[DrawnDocument]) -> bytes:
    """Documents as JSON lines."""
    lines = []
    for drawn in documents:
        whole = not any(piece.plain for piece in drawn.document)
        pieces = [[piece.text, piece.plain] for piece in drawn.document]
        content = {"source": drawn.source} | ({"text": drawn.text} if whole else {"pieces": pieces})
        lines.append(json.dumps(content, ensure_ascii=False))
    return "".join(line + "\n" for line in lines).encode()


def read_documents(path: Path) -> list[DrawnDocument]:
    """Read what `write_documents` wrote.

    Raises:
        ValueError, KeyError, OSError: it did not write the file.
    """
    documents = []
    for line in path.read_bytes().decode().split("\n"):
        if line:
            content = json.loads(line)
            pieces = content["pieces"] if "pieces" in content else [[content["text"], False]]
            documents.append(DrawnDocument(content["source"], tuple(Piece(text, plain) for text, plain in pieces)))
    return documents
