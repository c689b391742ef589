"""What a tokenizer puts before a text, texts that begin with it themselves, and tokenizer files that cannot be used."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing, PostProcessor, TemplateProcessing

from quantlab.checkpoint.tokenizer import check_token_settings, encode_text, load_tokenizer, text_tokens
from quantlab.errors import CheckpointError, QuantlabError

BOS, EOS, LANGUAGE = 0, 1, 2
WORDS = {"<bos>": BOS, "<eos>": EOS, "<en>": LANGUAGE, "<unk>": 3, "the": 4, "sun": 5, "a": 6}


def write(
    directory: Path, template: str | PostProcessor | None = None, tokenizer_settings: object = None, vocabulary: int = 7
) -> Path:
    """A tokenizer of seven words with a post-processor, given by its template or as it is."""
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<bos>", "<eos>", "<en>")])
    if isinstance(template, str):
        specials = [(token, number) for token, number in WORDS.items() if token in template]
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=specials)
    elif template is not None:
        tokenizer.post_processor = template
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    if tokenizer_settings is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_settings))
    (directory / "config.json").write_text(json.dumps({"vocab_size": vocabulary}))
    return directory


@pytest.mark.parametrize(
    ("template", "prefix"),
    [
        (None, ()),
        ("$A", ()),
        ("<bos> $A", (BOS,)),
        ("<bos> $A <eos>", (BOS,)),
        ("$A <eos>", ()),
        ("$A <eos> <eos>", ()),
        ("<bos> <en> $A <eos>", (BOS, LANGUAGE)),
        ("<eos> <en> $A", (EOS, LANGUAGE)),
        (BertProcessing(("<eos>", EOS), ("<bos>", BOS)), (BOS,)),
    ],
)
def test_only_what_stands_before_a_text_is_its_prefix(
    tmp_path: Path, template: str | PostProcessor | None, prefix: tuple[int, ...]
) -> None:
    tokenizer, found = load_tokenizer(write(tmp_path, template))
    assert found == prefix
    assert text_tokens(tokenizer, found, "the sun") == [4, 5], "and nothing is added by the tokenizer itself"


def test_a_template_without_beginning_leaves_room_for_that_of_the_settings(tmp_path: Path) -> None:
    asked = {"add_bos_token": True, "bos_token": "<bos>"}
    assert load_tokenizer(write(tmp_path, "$A <eos>", asked))[1] == (BOS,)
    assert load_tokenizer(write(tmp_path, "<bos> $A <eos>", asked))[1] == (BOS,), "not twice"


@pytest.mark.parametrize("words", ["a", "the"])
def test_a_vocabulary_without_unknown_words_has_a_prefix(tmp_path: Path, words: str) -> None:
    """The text that is tried first need not be one that the tokenizer can encode."""
    tokenizer = Tokenizer(WordLevel({"<bos>": 0, "<eos>": 1, words: 2}))
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path)[1] == (0,)


@pytest.mark.parametrize(
    ("prefix", "text", "left"),
    [
        ((BOS,), "the sun", [4, 5]),
        ((BOS,), "<bos>the sun", [4, 5]),
        ((BOS,), "<bos> the sun", [4, 5]),
        ((BOS,), "<bos>", []),
        ((BOS,), "", []),
        ((BOS,), "the <bos>sun", [4, BOS, 5]),
        ((BOS,), "<eos>the sun", [EOS, 4, 5]),
        ((BOS, LANGUAGE), "<bos><en>the sun", [4, 5]),
        ((BOS, LANGUAGE), "<bos>the sun", [4, 5]),
        ((), "<bos>the sun", [BOS, 4, 5]),
    ],
)
def test_a_text_that_begins_with_the_prefix_does_not_get_it_again(
    tmp_path: Path, prefix: tuple[int, ...], text: str, left: list[int]
) -> None:
    tokenizer, _ = load_tokenizer(write(tmp_path))
    assert text_tokens(tokenizer, prefix, text) == left
    encoding, dropped = encode_text(tokenizer, prefix, text)
    assert encoding.ids[dropped:] == left


@pytest.mark.parametrize(
    "asked",
    [
        {"add_bos_token": True, "bos_token": None},
        {"add_bos_token": True},
        {"add_bos_token": False, "bos_token": "<bos>"},
        {"add_bos_token": None, "bos_token": "<bos>"},
        {"bos_token": "<bos>"},
    ],
)
def test_settings_that_ask_for_no_beginning_token(tmp_path: Path, asked: object) -> None:
    assert load_tokenizer(write(tmp_path, None, asked))[1] == ()


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"add_bos_token": "false", "bos_token": "<bos>"}, "add_bos_token is neither true nor false"),
        ({"add_bos_token": True, "bos_token": "<s>"}, "not in the vocabulary"),
        ({"add_bos_token": True, "bos_token": 0}, "not in the vocabulary"),
        ({"add_bos_token": True, "bos_token": {"content": None}}, "not in the vocabulary"),
        ({"add_bos_token": True, "bos_token": "\ud800"}, "not in the vocabulary"),
        ([], "tokenizer_config.json is not a JSON object"),
    ],
)
@pytest.mark.parametrize("template", [None, "<bos> $A"])
def test_settings_that_cannot_be_used(tmp_path: Path, asked: object, what: str, template: str | None) -> None:
    with pytest.raises(CheckpointError, match=what) as raised:
        load_tokenizer(write(tmp_path, template, asked))
    assert raised.value.where
    assert raised.value.found
    assert raised.value.fix


def test_settings_that_are_no_json_are_refused_though_the_template_has_a_prefix(tmp_path: Path) -> None:
    (write(tmp_path, "<bos> $A") / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_smaller_than_the_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="outside the model's vocabulary") as raised:
        load_tokenizer(write(tmp_path, vocabulary=6))
    assert raised.value.found == "token 6 ('a'), a vocabulary of 6"
    assert load_tokenizer(write(tmp_path, vocabulary=7))


def test_text_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    Tokenizer(WordLevel({"a": 0})).save(str(tmp_path / "tokenizer.json"))
    tokenizer, prefix = load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="cannot encode a text"):
        text_tokens(tokenizer, prefix, "b")
    Tokenizer(WordLevel({})).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="encodes no text"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        ("config.json", '{"vocab_size": 7, "eos_token_id": 7}', "end token"),
        ("config.json", '{"vocab_size": 7, "eos_token_id": [1, 7]}', "end token"),
        ("config.json", '{"vocab_size": 7, "eos_token_id": -1}', "end token"),
        ("config.json", '{"vocab_size": 7, "eos_token_id": "<eos>"}', "end token"),
        ("generation_config.json", '{"eos_token_id": 7}', "end token"),
        ("generation_config.json", "", "is not JSON"),
        ("tokenizer_config.json", "<html>", "is not JSON"),
    ],
)
def test_settings_of_tokens_are_checked(tmp_path: Path, file: str, content: str, what: str) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [6, 1]}')
    config: dict[str, object] = {"vocab_size": 7, "eos_token_id": 6}
    check_token_settings(tmp_path, config)
    check_token_settings(tmp_path, config | {"eos_token_id": None})
    if file == "config.json":
        config = json.loads(content)
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=what) as raised:
        check_token_settings(tmp_path, config)
    assert file in str(raised.value.where)


JSON = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.just(10**30), st.floats(), st.text(max_size=3),
    st.sampled_from(["<bos>", "\ud800", {}, [], [None], {"type": "?"}, {"content": "<bos>"}]),
)  # fmt: skip


def _paths(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, child in entries for found in _paths(child, (*path, key)))]


def _changed(content: object, path: tuple[object, ...], change: Callable[[object, object], None]) -> object:
    content = json.loads(json.dumps(content))
    inner = content
    for key in path[:-1]:
        inner = inner[key]  # type: ignore[index]
    change(inner, path[-1])
    return content


def _removed(inner: object, key: object) -> None:
    del inner[key]  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_no_tokenizer_file_ends_in_a_traceback(tmp_path: Path, file: str) -> None:
    """Every value replaced or removed, bytes cut and changed: the tokenizer is read and encodes, or an error says why not."""
    write(tmp_path, "<bos> $A <eos>", {"add_bos_token": True, "bos_token": {"content": "<bos>"}, "eos_token": "<eos>"})
    path = tmp_path / file
    whole = json.loads(path.read_text())
    data, paths = path.read_bytes(), _paths(whole)[1:]
    by_value = st.builds(
        lambda at, value: json.dumps(_changed(whole, at, lambda inner, key: inner.__setitem__(key, value))).encode(),  # type: ignore[attr-defined]
        st.sampled_from(paths),
        JSON,
    )
    by_removal = st.builds(lambda at: json.dumps(_changed(whole, at, _removed)).encode(), st.sampled_from(paths))
    by_bytes = st.builds(
        lambda start, stop, new: data[:start] + new + data[stop:],
        st.integers(0, len(data)),
        st.integers(0, len(data)),
        st.binary(max_size=4),
    )
    read, told = 0, []

    @settings(
        max_examples=2000, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.one_of(by_value, by_removal, by_bytes, JSON.map(lambda value: json.dumps(value).encode())))
    def holds(content: bytes) -> None:
        nonlocal read
        path.write_bytes(content)
        try:
            tokenizer, prefix = load_tokenizer(tmp_path)
            encode_text(tokenizer, prefix, "<bos>the sun")
            check_token_settings(tmp_path, {"vocab_size": 7})
            read += 1
        except QuantlabError as error:
            told.append((error.where, error.found, error.fix))

    holds()
    assert min(read, len(told)) > 100
    assert all(all(parts) for parts in told)
