"""Rows of local files as documents: formats, columns, order, and errors for what cannot be read."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from quantlab.errors import CalibrationError
from quantlab.recipe.texts import TextSource
from quantlab.texts.locate import Commits, locate
from quantlab.texts.rows import Reading, documents, shuffled
from tests.texts.conftest import CHAT, parquet

ROWS = [{"text": f"document {n}, café"} for n in range(20)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(directory: Path, name: str, *, seed: int = 0, template: str = "", **fields: Any) -> list[str]:
    """The documents of a file or folder in a directory."""
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    if template:
        (checkpoint / "chat_template.jinja").write_text(template)
    located = locate(
        [TextSource(dataset=name, **fields)],
        lambda path: directory / path,
        checkpoint,
        commits=Commits(directory / "run"),
        error=CalibrationError,
    )
    reading = Reading(located.sources[0], {"bos_token": "<bos>"}, (), seed, CalibrationError)
    return ["".join(piece.text for piece in document) for document in documents(reading)]


def arrow(rows: list[dict[str, Any]]) -> bytes:
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


FORMATS = {
    "a.parquet": parquet(ROWS),
    "a.arrow": arrow(ROWS),
    "a.json": json.dumps(ROWS).encode(),
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.csv": ("text\n" + "".join(f'"{row["text"]}"\n' for row in ROWS)).encode(),
    "a.txt": "".join(f"{row['text']}\n" for row in ROWS).encode(),
}


def test_every_format_gives_the_same_documents_in_the_same_order(tmp_path: Path) -> None:
    found = []
    for name, content in FORMATS.items():
        (tmp_path / name).write_bytes(content)
        found.append(read(tmp_path, name))
        folder = tmp_path / f"folder of {name}"
        folder.mkdir()
        (folder / name).write_bytes(content)
        found.append(read(tmp_path, folder.name))
    assert sorted(found[0]) == sorted(row["text"] for row in ROWS)
    assert found[0] != [row["text"] for row in ROWS]
    assert all(one == found[0] for one in found)
    assert read(tmp_path, "a.parquet", seed=1) != found[0]


def test_a_dataset_saved_by_the_library(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert sorted(read(tmp_path, "saved")) == sorted(row["text"] for row in ROWS)


def test_the_order_of_a_buffer_smaller_than_the_data() -> None:
    rows = [{"n": n} for n in range(1000)]
    found = [row["n"] for row in shuffled(rows, seed=3, buffer=50)]
    assert sorted(found) == list(range(1000))
    assert found == [row["n"] for row in shuffled(rows, seed=3, buffer=50)]
    assert all(value < position + 50 for position, value in enumerate(found))  # no row comes before the buffer holds it
    assert found[:100] != list(range(100))


DIALOGUE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CONVENTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"messages": DIALOGUE, "id": "1"}, {}),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {}),
    ({"prompt": "a", "completion": "b"}, {}),
    ({"prompt": DIALOGUE[:1], "completion": DIALOGUE[1:]}, {}),
    ({"question": "a", "answer": "b"}, {"column": ("question", "answer")}),
    ({"dialogue": DIALOGUE}, {"column": "dialogue"}),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, DIALOGUE[1]]}, {}),
]


@pytest.mark.parametrize(("row", "fields"), CONVENTIONS)
def test_every_form_of_a_dialogue_is_the_same_text(tmp_path: Path, row: dict[str, Any], fields: dict[str, Any]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert read(tmp_path, "a.jsonl", template=CHAT, **fields) == ["<bos><user>a<bot>b<end>"]


def test_a_named_template_and_empty_documents(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content | upper }}")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": DIALOGUE}) + "\n")
    assert read(tmp_path, "a.jsonl", chat_template="mine.jinja") == ["A"]
    (tmp_path / "b.jsonl").write_text('{"text": " "}\n{"text": "w"}\n{"text": ""}\n')
    assert read(tmp_path, "b.jsonl") == ["w"]


def dialogue(*roles: str) -> str:
    return json.dumps({"messages": [{"role": role, "content": "x"} for role in roles]}) + "\n"


MISTAKES: list[tuple[str, str | bytes, dict[str, Any], str, str]] = [
    ("a.jsonl", '{"body": "x", "title": "y"}\n', {}, "no column is known to hold text", "body, title"),
    ("a.jsonl", '{"body": "x"}\n', {"column": "bodi"}, "the dataset has no such column", "body"),
    ("a.jsonl", '{"a": "x"}\n', {"column": ("a", "b")}, "the dataset has no such column", "`a, b`"),
    ("a.jsonl", "", {}, "the dataset is empty", "StopIteration"),
    ("a.txt", "", {}, "the split is empty", "no rows"),
    ("a.jsonl", '{"text": "x"}\n{"text": null}\n', {}, "a row has no text", "null"),
    ("a.jsonl", '{"text": 3}\n', {}, "a row has no text", "int: 3"),
    ("a.jsonl", '{"text": "\\ud800"}\n', {}, "the dataset cannot be read", "surrogate"),
    ("a.jsonl", '{"text": "x"}\n{"text": "y', {}, "the dataset cannot be read", "JSON parse error"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n', {}, "the dataset is not UTF-8 text", "0xe9"),
    ("a.txt", b"caf\xe9\n", {}, "the dataset is not UTF-8 text", "0xe9"),
    ("a.parquet", b"PAR1 nothing", {}, "the dataset cannot be read", "Parquet"),
    ("a.docx", b"x", {}, "no file that can be read was found", ".parquet"),
    ("a.jsonl", '{"messages": []}\n', {}, "a row has no messages", "empty"),
    ("a.jsonl", '{"messages": [{"content": "x"}]}\n', {}, "a message has no role", "content"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": null}]}\n', {}, "a row has no text", "null"),
    ("a.jsonl", dialogue("user", "stranger"), {}, "the chat template refuses messages", "no stranger"),
    ("a.jsonl", dialogue("user"), {"chat_template": "none.jinja"}, "the chat template cannot be read", "none.jinja"),
]


@pytest.mark.parametrize(("name", "content", "fields", "what", "found"), MISTAKES)
def test_a_mistake_says_what_and_where(
    tmp_path: Path, name: str, content: str | bytes, fields: dict[str, Any], what: str, found: str
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CalibrationError) as raised:
        read(tmp_path, name, template=CHAT, **fields)
    assert raised.value.what == what
    assert found in str(raised.value.found)
    assert name in str(raised.value.where)
    assert raised.value.fix


def test_templates_that_are_missing_or_no_jinja(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(dialogue("user"))
    with pytest.raises(CalibrationError, match="the checkpoint has no chat template"):
        read(tmp_path, "a.jsonl")
    with pytest.raises(CalibrationError, match="the chat template is not valid"):
        read(tmp_path, "a.jsonl", template="{% for %}")


def test_a_split_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    for split in ("train", "test"):
        path = tmp_path / "data" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": split}) + "\n")
    assert read(tmp_path, "data", split="test") == ["test"]
    with pytest.raises(CalibrationError) as raised:
        read(tmp_path, "data", split="tests")
    assert raised.value.what == "the dataset has no such split"
    assert "test, train" in str(raised.value.found)


def test_names_that_are_nothing(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="neither a file or folder, nor the id"):
        read(tmp_path, "nothing.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="a folder without files"):
        read(tmp_path, "empty")
