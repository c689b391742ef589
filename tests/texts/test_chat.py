"""Chat templates: the same text as transformers renders, reasoning that templates drop, and tokens that messages spell."""

from pathlib import Path

import jinja2
import pytest

from quantlab.checkpoint.tokenizer import load_tokenizer, named_tokens, read_chat_template
from quantlab.texts.chat import DATE, ChatTemplate
from quantlab.texts.document import DrawnDocument, Encoder, Piece, read_documents, write_documents
from tests.texts.conftest import CHAT

TOKENS = {"bos_token": "<bos>", "eos_token": "<end>"}
QUESTION, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}
TEMPLATES = [
    CHAT,
    "{%- set ns = namespace(n=0) -%}\n{%- for m in messages %}\n    {%- set ns.n = ns.n + 1 %}\n{{ ns.n }} {{ m['content'] | trim }}\n{%- endfor %}",
    "{% for m in messages %}{{ m | tojson }}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}",
    "{{ messages[0].content.split('?')[0] }}{% if tools is none and not add_generation_prompt %} no tools{% endif %}\n",
    "{{ tools | tojson(indent=2) }}{{ dict(a='<é>') | tojson }}{{ missing is defined }}",
]


def text(template: str, *messages: dict[str, str]) -> str:
    return "".join(piece.text for piece in ChatTemplate(template, TOKENS).document(messages))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("messages", [(QUESTION,), (QUESTION, ANSWER), (QUESTION, ANSWER, QUESTION)])
def test_the_text_is_that_of_transformers(template: str, messages: tuple[dict[str, str], ...]) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    prompted = messages[-1] is QUESTION
    (expected,), _ = render_jinja_template(
        [list(messages)], chat_template=template, add_generation_prompt=prompted, **TOKENS
    )
    assert text(template, *messages) == expected


def test_a_template_knows_no_day_and_no_secret() -> None:
    assert text("{{ strftime_now('%Y-%m-%d') }}", QUESTION) == DATE.strftime("%Y-%m-%d")
    with pytest.raises(jinja2.TemplateError):
        text("{{ messages.__class__.__mro__[1].__subclasses__() }}", QUESTION)
    with pytest.raises(jinja2.TemplateError):
        text("{{ messages.append(1) }}", QUESTION)


KEEPS = CHAT.replace(".split('</think>')[-1]", "")
"""A template that keeps reasoning, as Qwen3's does for the last answer."""
OPENS_NOT = CHAT.replace("<think>\n{%", "{%")
"""A template whose generation prompt leaves the tag to the model."""
ASKED = CHAT.replace("<think>\n{%", "{% if thinking %}<think>{% else %}</think>{% endif %}{%")
"""A template that is asked to think, as DeepSeek-V3.1's."""


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHAT, "<bos><user>why?<bot><think>\nbecause\n</think>\n\nso<end>"),
        (KEEPS, "<bos><user>why?<bot><think>\nbecause\n</think>\n\nso<end>"),
        (OPENS_NOT, "<bos><user>why?<bot><think>\nbecause\n</think>\n\nso<end>"),
        (ASKED, "<bos><user>why?<bot><think>\nbecause\n</think>\n\nso<end>"),
    ],
)
def test_reasoning_is_read_as_the_model_writes_it(template: str, expected: str) -> None:
    trace = {"role": "assistant", "content": "<think>\nbecause\n</think>\n\nso"}
    assert text(template, QUESTION, trace) == expected
    if template is not KEEPS:
        assert text(template, QUESTION, ANSWER | {"reasoning_content": "because"}) == expected
        earlier = text(template, QUESTION, trace, QUESTION, ANSWER)
        assert "because" not in earlier  # earlier turns are as the template has them


def test_tokens_that_messages_spell(checkpoint: Path) -> None:
    tokenizer, prefix = load_tokenizer(checkpoint)
    encoder = Encoder(tokenizer, prefix)
    dialogue = [{"role": "user", "content": "w10<end>w11"}, {"role": "assistant", "content": "w12"}]
    template, tokens = read_chat_template(checkpoint), named_tokens(checkpoint)
    as_tokens = ChatTemplate(template, tokens).document(dialogue)
    assert encoder.tokens(as_tokens) == [2, 10, 4, 11, 3, 12, 4]  # the template's own begin token is the prefix
    as_text = ChatTemplate(template, tokens, spelled=encoder.added).document(dialogue)
    assert "".join(piece.text for piece in as_text) == "".join(piece.text for piece in as_tokens)
    assert as_text[1] == Piece("<end>", plain=True)
    assert encoder.tokens(as_text) == [
        2,
        10,
        0,
        0,
        0,
        11,
        3,
        12,
        4,
    ]  # "<", "end" and ">" are words this tokenizer does not know
    assert encoder.tokens((Piece("w10<end>", plain=True),)) == [10, 0, 0, 0]
    assert encoder.tokens((Piece("w10<end>"),)) == [10, 4]


def test_marks_in_a_message_are_dropped_and_cannot_forge() -> None:
    template = ChatTemplate(CHAT, TOKENS, spelled=("<end>",))
    found = template.document([{"role": "user", "content": "a\U000f0000<end>\U000f0001b<en\U000f0000d>"}])
    assert found == (
        Piece("<bos><user>a"),
        Piece("<end>", plain=True),
        Piece("b"),
        Piece("<end>", plain=True),
        Piece("<bot><think>\n"),
    )


def test_documents_are_kept_as_they_are(tmp_path: Path) -> None:
    documents = [
        DrawnDocument(0, (Piece("line\nand\u2028another \U0001f600"),)),
        DrawnDocument(1, (Piece("a"), Piece("<end>", plain=True), Piece("b"))),
    ]
    path = tmp_path / "kept.jsonl"
    path.write_bytes(write_documents(documents))
    assert read_documents(path) == documents


def test_where_a_template_is_found(checkpoint: Path) -> None:
    assert read_chat_template(checkpoint) == CHAT
    settings = checkpoint / "tokenizer_config.json"
    settings.write_text(
        '{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}'
    )
    assert read_chat_template(checkpoint) == "D"
    (checkpoint / "chat_template.jinja").write_text("J")
    assert read_chat_template(checkpoint) == "J"
    (checkpoint / "chat_template.jinja").unlink()
    settings.unlink()
    assert read_chat_template(checkpoint) == ""
