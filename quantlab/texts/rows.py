"""The rows of a dataset as documents, in an order that seed and commit determine.

The `datasets` library reads everything (streaming, so that a dataset of terabytes costs only the rows that are used): datasets of the hub, folders,
and single files of Parquet, JSON, JSON lines, CSV, text and Arrow, compressed or not. A buffer of `_BUFFER` rows shuffles them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from quantlab.documents import nearest
from quantlab.errors import QuantlabError
from quantlab.files import is_unicode
from quantlab.recipe.texts import LocatedSource, TextColumn
from quantlab.texts.chat import TEMPLATE_ERRORS, ChatTemplate, Message
from quantlab.texts.document import Document, Piece
from quantlab.texts.refusals import patiently, refusal

Row = Mapping[str, Any]

_BUFFER: Final = 4096
_CONVENTIONS: Final[tuple[TextColumn, ...]] = ("text", "messages", "conversations", ("prompt", "completion"))
"""Columns that are found by their names, in this order."""
_FORMATS: Final = {
    ".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".txt": "text", ".md": "text", ".arrow": "arrow",
}  # fmt: skip
_COMPRESSED: Final = {".gz", ".bz2", ".xz", ".zst", ".lz4"}
_ROLES: Final = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
"""Who speaks in `conversations` of `from` and `value`."""


@dataclass(frozen=True)
class Reading:
    """How the rows of a source become documents.

    Attributes:
        source: the dataset.
        tokens: texts of the tokenizer's named tokens, for chat templates.
        added: texts of its added vocabulary.
        seed: seed of the order.
        error: type of the errors raised.
    """

    source: LocatedSource
    tokens: Mapping[str, str]
    added: tuple[str, ...]
    seed: int
    error: type[QuantlabError]

    @property
    def where(self) -> str:
        return f"dataset {self.source.name}"


def documents(reading: Reading) -> Iterator[Document]:
    """The documents of a source that are not empty.

    Raises:
        QuantlabError: of the reading's type: the dataset, configuration, split or column is not there or empty, the hub does not give it, or a row
            has no text, no valid Unicode or messages that the chat template refuses.
    """
    template: ChatTemplate | None = None
    for column, row in _rows(reading):
        content = _content(reading, column, row)
        if isinstance(content, str):
            if content.strip():
                yield (Piece(content, plain=reading.source.source.special_tokens == "text"),)
            continue
        template = template or _template(reading)
        try:
            yield template.document(content)
        except TEMPLATE_ERRORS as problem:
            raise reading.error(
                "the chat template refuses messages",
                where=f"{reading.where}, roles {', '.join(str(one.get('role')) for one in content)[:200]}",
                found=f"{type(problem).__name__}: {problem}; {_excerpt(content[0].get('content'))}",
                fix="give messages in the order that the template allows, or another `chat_template`",
            ) from problem


def _rows(reading: Reading) -> Iterator[tuple[TextColumn, Row]]:
    """The column that is read, and the rows in the order of the seed; errors of the libraries are translated."""
    split = str(reading.source.source.split)
    try:
        splits = _open(reading.source)
        names = sorted(map(str, splits))
        dataset = splits.get(split)
        columns = _columns(dataset) if dataset is not None else []
    except Exception as problem:
        raise refusal(problem, reading.error, where=reading.where) from problem
    if dataset is None:
        raise reading.error(
            "the dataset has no such split",
            where=reading.where,
            found=f"`{split}`; its splits: {', '.join(names)}",
            fix=nearest(split, names),
        )
    if not columns:
        raise reading.error("the split is empty", where=reading.where, found="no rows", fix="name another `split`")
    column = _column(reading, columns)
    rows = shuffled(_in_shards(dataset, _names(column), reading.seed), seed=reading.seed)
    while True:
        try:
            row = next(rows, None)
        except Exception as problem:
            raise refusal(problem, reading.error, where=reading.where) from problem
        if row is None:
            return
        yield column, row


def _columns(dataset: Any) -> list[str]:  # noqa: ANN401 - a dataset of a library without types
    """The names of a split's columns, from its metadata or else its first row; empty if it has no rows."""
    return list(dataset.column_names or next(iter(dataset), ()))


def _in_shards(dataset: Any, columns: tuple[str, ...], seed: int) -> Iterator[Row]:  # noqa: ANN401
    """The columns of all rows, file by file in an order that the seed determines."""
    if dataset.column_names:
        dataset = dataset.select_columns(list(columns))
    count = dataset.num_shards
    generator = Random(seed)  # noqa: S311 - an order, no secret
    for index in sorted(range(count), key=lambda _: generator.random()):
        part = dataset.shard(num_shards=count, index=index) if count > 1 else dataset
        for row in part:
            yield {name: row.get(name) for name in columns}


def shuffled(rows: Iterable[Row], *, seed: int, buffer: int = _BUFFER) -> Iterator[Row]:
    """Rows in an order that the seed determines: each is drawn from a buffer that the next row refills.

    The library's own shuffling reads several files at once and waits for its threads at the end of each, and its order is not promised to
    stay. This one uses `random.Random.random`, whose values Python promises to keep.
    """
    generator = Random(seed)  # noqa: S311 - an order, no secret
    waiting: list[Row] = []
    for row in rows:
        if len(waiting) < buffer:
            waiting.append(row)
            continue
        index = int(generator.random() * buffer)
        yield waiting[index]
        waiting[index] = row
    while waiting:
        index = int(generator.random() * len(waiting))
        waiting[index], waiting[-1] = waiting[-1], waiting[index]
        yield waiting.pop()


def _open(located: LocatedSource) -> Mapping[str, Any]:
    """The splits of a dataset, streaming."""
    from datasets import disable_progress_bars, load_dataset_builder, logging  # seconds that others do without

    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)  # it prints errors that it also raises
    source, path = located.source, located.path
    if path is None:
        _ask_for(source.dataset, located.commit)
        builder = load_dataset_builder(source.dataset, name=source.config, revision=located.commit)
        if builder.hash != located.commit:  # datasets falls back on whatever its cache has
            raise FileNotFoundError(
                f"offline mode: the cache of datasets has commit {builder.hash}, not {located.commit}"
            )
    elif path.is_dir():
        builder = load_dataset_builder(str(path), name=source.config)
    else:
        builder = load_dataset_builder(_format(path), data_files={str(source.split): str(path)})
    splits: Mapping[str, Any] = builder.as_streaming_dataset()
    return splits


def _ask_for(dataset: str, commit: str) -> None:
    """Ask the hub whether it gives a dataset: `datasets` repeats every request for minutes, one after the other, before it says why not."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    with suppress(OfflineModeIsEnabled):  # its cache may have the dataset
        patiently(lambda: HfApi().dataset_info(dataset, revision=commit, timeout=30))


def _format(path: Path) -> str:
    """The reader of a file, by its name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    known = _FORMATS.get(suffixes[-1] if suffixes else "")
    if known is None:
        raise FileNotFoundError(f"DataFilesNotFoundError: {path.name} ends in none of {', '.join(_FORMATS)}")
    return known


def _column(reading: Reading, columns: Sequence[str]) -> TextColumn:
    """The column or columns that are read: the named ones, else by convention."""
    wanted = reading.source.source.column
    found = next(
        (
            one
            for one in ([wanted] if wanted is not None else _CONVENTIONS)
            if all(name in columns for name in _names(one))
        ),
        None,
    )
    if found is None:
        named = ", ".join(_names(wanted)) if wanted is not None else ""
        raise reading.error(
            "the dataset has no such column" if named else "no column is known to hold text",
            where=reading.where,
            found=(f"`{named}`; " if named else "") + f"its columns: {', '.join(columns)}",
            fix=nearest(named, columns)
            if named
            else "name one with `column:`, or prompt and answer with `column: [A, B]`",
        )
    return found


def _names(column: TextColumn) -> tuple[str, ...]:
    return (column,) if isinstance(column, str) else column


def _content(reading: Reading, column: TextColumn, row: Row) -> str | list[Message]:
    """The text of a row, or its messages."""
    if isinstance(column, str):
        value = row.get(column)
        return _checked(reading, column, value) if not isinstance(value, list) else _messages(reading, column, value)
    prompt, completion = (row.get(name) for name in column)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _messages(reading, " and ".join(column), [*prompt, *completion])
    texts = [_checked(reading, name, row.get(name)) for name in column]
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]


def _checked(reading: Reading, column: str, value: object) -> str:
    if not isinstance(value, str):
        raise reading.error(
            "a row has no text",
            where=f"{reading.where}, column {column}",
            found=f"{type(value).__name__}: {_excerpt(value)}" if value is not None else "null",
            fix="name a column of text or messages, or remove the row",
        )
    if not is_unicode(value):
        raise reading.error(
            "a row is not valid Unicode",
            where=f"{reading.where}, column {column}",
            found=f"half of a surrogate pair: {ascii(value)[:120]}",
            fix="write both halves of the pair or the character itself, or remove the row",
        )
    return value


def _messages(reading: Reading, column: str, values: list[Any]) -> list[Message]:
    """Messages with `role` and text as `content`, from those or from `from` and `value`."""
    if not values:
        raise reading.error(
            "a row has no messages",
            where=f"{reading.where}, column {column}",
            found="an empty list",
            fix="remove the row",
        )
    messages: list[Message] = []
    for value in values:
        found = {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else {}
        role, content = found.get("role"), found.get("content", "" if "tool_calls" in found else None)
        if "from" in found:
            role, content = _ROLES.get(str(found.pop("from")).lower()), found.pop("value", None)
        if isinstance(content, list):  # parts of a message, of which this reads the texts
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        if not isinstance(role, str):
            raise reading.error(
                "a message has no role",
                where=f"{reading.where}, column {column}",
                found=_excerpt(value),
                fix="give messages {role: user, content: …} or {from: human, value: …}",
            )
        messages.append(found | {"role": role, "content": _checked(reading, f"{column}, {role}", content)})
    return messages


def _template(reading: Reading) -> ChatTemplate:
    source = reading.source
    if not source.template:
        raise reading.error(
            "the checkpoint has no chat template",
            where=reading.where,
            found="messages, and neither chat_template.jinja nor `chat_template` in tokenizer_config.json",
            fix="name a jinja file with `chat_template:`, or a column of text with `column:`",
        )
    spelled = reading.added if source.source.special_tokens == "text" else ()
    try:
        return ChatTemplate(source.template, reading.tokens, spelled=spelled)
    except TEMPLATE_ERRORS as problem:
        raise reading.error(
            "the chat template is not valid",
            where=reading.where,
            found=f"{type(problem).__name__}: {problem}",
            fix="correct the template, or give another one with `chat_template:`",
        ) from problem


def _excerpt(value: object) -> str:
    return ascii(value)[:160]
