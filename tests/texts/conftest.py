"""A checkpoint with a chat template, and a hub with datasets."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tests.fake_hub import FakeHub, serving

CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<bot>{{ m.content.split('</think>')[-1] }}<end>"
    "{% else %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot><think>\n{% endif %}"
)
"""Like DeepSeek-R1's: reasoning is dropped, and the generation prompt opens it."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Token n is the word "wn", from 10 on."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    marks = ["<unk>", "<bos>", "<user>", "<bot>", "<end>", "<think>", "</think>"]
    words = {mark: n for n, mark in enumerate(marks)} | {f"w{n}": n for n in range(10, 512)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(marks[1:])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"add_bos_token": True, "bos_token": "<bos>", "eos_token": {"content": "<end>"}, "chat_template": CHAT}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps({"vocab_size": 512}))
    return directory


def parquet(rows: list[dict[str, Any]]) -> bytes:
    datasets.disable_progress_bars()
    file = io.BytesIO()
    datasets.Dataset.from_list(rows).to_parquet(file)
    return file.getvalue()


def words(start: int, count: int) -> str:
    return " ".join(f"w{10 + (start + n) % 500}" for n in range(count))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """`me/text` in two files, `me/two` with two configurations, `me/script`, a program."""
    monkeypatch.setattr("quantlab.texts.refusals.WAITS", [0.0, 0.0, 0.0])
    head = (
        b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train_sft\n    path: data/train_sft-*\n---\n"
    )
    two = b"---\nconfigs:\n- config_name: a\n  data_files: a/*\n- config_name: b\n  data_files: b/*\n---\n"
    content = {
        "me/text": {
            "README.md": head,
            **{
                f"data/train_sft-{part}.parquet": parquet([{"text": words(40 * part + row, 12)} for row in range(20)])
                for part in (0, 1)
            },
        },
        "me/two": {"README.md": two, "a/train.jsonl": b'{"text": "w10"}\n', "b/train.jsonl": b'{"text": "w11"}\n'},
        "me/script": {"script.py": b"import os"},
    }
    with serving(FakeHub(content), monkeypatch, str(tmp_path / "cache")) as served:
        yield served
