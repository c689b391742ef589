"""Messages as the text that a model reads: rendered by a chat template.

Templates are jinja programs of the checkpoint. They run in jinja's sandbox with the globals that transformers gives them
(`raise_exception`, `strftime_now`, `tojson` without HTML escapes, loop controls, the `generation` tag). One thing differs: the date is
fixed, so that a text does not depend on the day.

**Reasoning.** The templates of DeepSeek-R1 and its distilled models drop what an assistant wrote before `</think>`, because earlier turns of
a dialogue are read without it. The model itself does write it. So if the last message has reasoning that its template drops, the text is
what serving it makes: the prompt with the generation prompt (`thinking` switched on, which DeepSeek-V3.1 asks), then the message as the
model would have written it, then what the template puts after an answer.

**Spelled tokens.** With `special_tokens: text`, tokens of the added vocabulary that a message merely spells are read as plain text, those of
the template and the tags of reasoning as tokens. They are marked by private-use characters before rendering, and told apart after it (the same idea is in
transformers' `mark_control_tokens`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quantlab.texts.document import Document, Piece

Message = Mapping[str, Any]

DATE: Final = datetime(2026, 1, 1)
"""What `strftime_now` writes."""
TEMPLATE_ERRORS: Final = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip
"""What rendering can raise: a template is a program."""
_OPEN, _CLOSE = "\U000f0000", "\U000f0001"
_THINK, _END_THINK = "<think>", "</think>"


class ChatTemplate:
    """A chat template and the tokens it may name.

    Args:
        template: the jinja text.
        tokens: texts of named tokens, for example `bos_token`.
        spelled: texts of the added vocabulary that messages are to spell as plain text; empty if they are read as tokens.

    Raises:
        jinja2.TemplateError: the template is no jinja.
    """

    def __init__(self, template: str, tokens: Mapping[str, str], *, spelled: Sequence[str] = ()) -> None:
        self._template = _environment().from_string(template)
        self._tokens = dict(tokens)
        marked = [text for text in sorted(spelled, key=lambda text: -len(text)) if text not in {_THINK, _END_THINK}]
        texts = "|".join(map(re.escape, marked))
        self._spelled = re.compile(texts) if texts else None
        self._marked = re.compile(f"{_OPEN}({texts}){_CLOSE}|[{_OPEN}{_CLOSE}]")

    def document(self, messages: Sequence[Message]) -> Document:
        """The text of a dialogue. It ends with the generation prompt if the last message is not the assistant's.

        Args:
            messages: `role`, `content` and whatever else the template reads; at least one.

        Raises:
            one of TEMPLATE_ERRORS: the template refuses the messages, or fails.
        """
        if self._spelled is None:
            return (Piece(self._text(messages)),)
        text = self._text([_marked(message, self._spelled) for message in messages])
        parts = self._marked.split(text)
        pieces = [Piece(part, plain=index % 2 == 1) for index, part in enumerate(parts) if part]
        return tuple(pieces)

    def _text(self, messages: Sequence[Message]) -> str:
        last = messages[-1]
        if last.get("role") != "assistant":
            return self._render(messages, add_generation_prompt=True)
        text = self._render(messages, add_generation_prompt=False)
        reasoning, answer = _reasoning(last)
        if not reasoning or reasoning in text:
            return text
        prompt = self._render(messages[:-1], add_generation_prompt=True, thinking=True, enable_thinking=True)
        begun = prompt.rstrip().endswith(_THINK)
        written = f"{'' if begun else _THINK + chr(10)}{reasoning}\n{_END_THINK}\n\n{answer}"
        if begun and prompt.endswith(_THINK):
            written = "\n" + written
        _, found, end = text.rpartition(answer) if answer else ("", "", "")
        return prompt + written + (end if found else self._tokens.get("eos_token", ""))

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **options: bool) -> str:
        return self._template.render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **options,
            **self._tokens,
        )


def _reasoning(message: Message) -> tuple[str, str]:
    """The reasoning of a message, without its tags and outer space, and the answer after it."""
    content = str(message.get("content") or "")
    for name in ("reasoning_content", "thinking", "reasoning"):
        if isinstance(message.get(name), str) and message[name].strip():
            return message[name].strip(), content.strip()
    before, end, answer = content.partition(_END_THINK)
    return (before.strip().removeprefix(_THINK).strip(), answer.strip()) if end else ("", content.strip())


def _marked(message: Message, spelled: re.Pattern[str]) -> Message:
    """A message whose texts have marks around the tokens that they spell."""

    def mark(value: Any) -> Any:  # noqa: ANN401 - values of JSON
        if isinstance(value, str):
            return spelled.sub(f"{_OPEN}\\g<0>{_CLOSE}", value.replace(_OPEN, "").replace(_CLOSE, ""))
        if isinstance(value, list):
            return [mark(one) for one in value]
        return {key: mark(one) for key, one in value.items()} if isinstance(value, dict) else value

    return {key: value if key == "role" else mark(value) for key, value in message.items()}


class _Generation(Extension):
    """The tag around what an assistant writes, which marks nothing here."""

    tags: Final = {"generation"}  # type: ignore[misc]  # jinja's own declaration is a plain attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the tags."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = DATE.strftime
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,  # noqa: ANN401 - values of JSON
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
