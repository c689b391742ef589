"""Strict YAML: read a document into a pydantic model; every error names file, line and YAML path.

Plain PyYAML mishandles three things in hand-written recipes: a repeated key silently overrides the first one,
`on`/`off`/`yes`/`no` become booleans, and `1e-2` becomes a string. All three are handled here (the scalars follow the
core schema of YAML 1.2). The error for an unknown key or word suggests the nearest known one.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from quantlab.errors import RecipeError

Model = TypeVar("Model", bound=BaseModel)

_TYPE_NAMES = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema."""


_CoreLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
):
    _CoreLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first) + ([""] if _tag == "null" else [])
    )


def load_document(path: Path, model: type[Model], *, kind: str) -> tuple[Model, bytes]:
    """Read the YAML file at `path` into `model`.

    Args:
        path: the file.
        model: a pydantic model that forbids unknown keys.
        kind: what the document is, for messages: "recipe", "suite".

    Returns:
        The validated model and the bytes of the file.

    Raises:
        RecipeError: the file is missing, is not YAML or no Unicode, repeats a key, or does not match the model.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise RecipeError(
            f"the {kind} cannot be read", where=str(path), found=error.strerror, fix=f"give the path of a {kind} (YAML)"
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"the {kind} is not UTF-8 text", where=str(path), found=str(error), fix="save the file as UTF-8"
        ) from error
    try:
        _refuse_aliases(text, path)
        root = yaml.compose(text, Loader=_CoreLoader)
        _refuse_lone_surrogates(root, path)
        _refuse_repeated_keys(root, path)
        content = yaml.load(text, Loader=_CoreLoader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(
            f"the {kind} is not valid YAML",
            where=f"{path}:{line}",
            found=error.problem,
            fix="correct the syntax on or just above this line",
        ) from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise RecipeError(
            f"the {kind} is not valid YAML",
            where=str(path),
            found=_shortened(" ".join(str(error).split())),
            fix="write plain mappings, lists, text and numbers",
        ) from error
    if not isinstance(content, dict):
        raise RecipeError(
            f"the {kind} is not a mapping",
            where=f"{path}:1",
            found=type(content).__name__,
            fix=f"start with `{next(iter(model.model_fields))}: …`",
        )
    try:
        return model.model_validate(content), data
    except ValidationError as error:
        raise _explain(error, root, path=path, model=model, kind=kind) from error


def nearest(word: str, known: Sequence[str]) -> str:
    """`did you mean X?` if a known word is similar, else the list of known words, the most similar first."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean `{matches[0]}`?" if matches else "use one of: " + ", ".join(_by_spelling(word, known))


def _nearest_key(word: str, known: Mapping[str, str]) -> str:
    """As `nearest`, for keys with the sentences that describe them: a key whose description has the word comes first."""
    described = [key for key, text in known.items() if re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE)]
    if difflib.get_close_matches(word, known, n=1, cutoff=0.6) or not described:
        return nearest(word, list(known))
    others = _by_spelling(word, [key for key in known if key not in described])
    return "use one of: " + ", ".join([*described, *others])


def _by_spelling(word: str, known: Sequence[str]) -> list[str]:
    """The known words without repetitions, the most similar to `word` first."""
    return sorted(dict.fromkeys(known), key=lambda one: -difflib.SequenceMatcher(None, one, word).ratio())


def _refuse_aliases(text: str, path: Path) -> None:
    """Refuse YAML aliases: recipes do not need them, and nested aliases can expand a small file without bound."""
    for event in yaml.parse(text, Loader=_CoreLoader):
        if isinstance(event, yaml.AliasEvent):
            raise RecipeError(
                "YAML aliases are not supported",
                where=f"{path}:{event.start_mark.line + 1 if event.start_mark else 1}",
                found=f"*{event.anchor}",
                fix="write the value out",
            )


def _refuse_lone_surrogates(node: yaml.Node | None, path: Path) -> None:
    """Refuse text with an escape such as "\\ud800", which stands for no character."""
    keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    for child in (*keys, *_children(node)):
        _refuse_lone_surrogates(child, path)
    if isinstance(node, yaml.ScalarNode) and any("\ud800" <= character <= "\udfff" for character in node.value):
        raise RecipeError(
            "text is not Unicode",
            where=f"{path}:{node.start_mark.line + 1}",
            found=f"half of a surrogate pair in {_shortened(repr(node.value))}",
            fix="write the character itself",
        )


def _refuse_repeated_keys(node: yaml.Node | None, path: Path) -> None:
    for child in _children(node):
        _refuse_repeated_keys(child, path)
    if isinstance(node, yaml.MappingNode):
        first_lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in first_lines:
                raise RecipeError(
                    "a key is repeated",
                    where=f"{path}:{line}",
                    found=f"`{key.value}` again, first on line {first_lines[key.value]}",
                    fix="keep one of the two",
                )
            first_lines[key.value] = line


def _children(node: yaml.Node | None) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        yield from (value for _, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _locate(root: yaml.Node, location: tuple[int | str, ...]) -> tuple[int, list[str]]:
    """The line and the YAML path of a pydantic error location.

    Pydantic adds tags for union members, which do not appear in the document; they are skipped.
    """
    node, line, path = root, root.start_mark.line + 1, []
    for part in location:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    node, line = value, key.start_mark.line + 1
                    path.append(str(part))
                    break
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
            path.append(f"[{part}]")
    return line, path


def _explain(
    error: ValidationError, root: yaml.Node | None, *, path: Path, model: type[BaseModel], kind: str
) -> RecipeError:
    """The first validation error of pydantic as a RecipeError."""
    complaints = error.errors(include_url=False)
    first = min(
        complaints, key=lambda complaint: complaint["type"] != "extra_forbidden"
    )  # a misspelled key is also reported as a missing one
    assert root is not None, "validated content came from a document"
    location = first["loc"]
    if first["type"] == "union_tag_invalid":
        location = (*location, first["ctx"]["discriminator"].strip("'"))
    line, yaml_path = _locate(root, location)
    where = f"{path}:{line}, {'.'.join(yaml_path).replace('.[', '[') or 'top level'}"
    found, last = _shortened(repr(first["input"])), str(location[-1]) if location else kind
    match first["type"]:
        case "extra_forbidden":
            fix = _nearest_key(last, _keys_at(model, location[:-1]))
            return RecipeError("unknown key", where=where, found=f"`{last}`", fix=fix)
        case "missing":
            return RecipeError(f"`{last}` is missing", where=where, found="no such key", fix=f"add `{last}: …`")
        case "literal_error":
            known = re.findall(r"'([^']*)'", first["ctx"]["expected"])
            return RecipeError("unknown word", where=where, found=found, fix=nearest(str(first["input"]), known))
        case "union_tag_invalid":
            known = re.findall(r"'([^']*)'", first["ctx"]["expected_tags"])
            word = first["ctx"]["tag"]
            return RecipeError("unknown word", where=where, found=repr(word), fix=nearest(word, known))
        case "union_tag_not_found":
            return RecipeError("`name` is missing", where=where, found=found, fix="name one: `{name: …}`")
        case "too_short":
            return RecipeError(f"`{last}` is empty", where=where, found=found, fix="give at least one entry")
        case "value_error" | "pass_verb":
            raised = first.get("ctx", {}).get("error")
            what, _, fix = str(raised or first["msg"]).partition("; ")
            return RecipeError(what, where=where, found=found, fix=fix or "see `quantlab run --help`")
        case kind_of_error if kind_of_error in _TYPE_NAMES:
            return RecipeError(
                "wrong type",
                where=where,
                found=f"{found} ({type(first['input']).__name__})",
                fix=f"`{last}` takes {_TYPE_NAMES[kind_of_error]}",
            )
        case _:
            return RecipeError("a value out of range", where=where, found=found, fix=first["msg"])


def _shortened(text: str, *, longest: int = 120) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> dict[str, str]:
    """The keys allowed in the mapping at `location`, with their descriptions, found by walking the model's JSON schema."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    candidates = [schema]
    for part in location:
        following = []
        for candidate in _resolved(candidates, definitions):
            if isinstance(part, int):
                following.append(candidate.get("items", {}))
            elif part in candidate.get("properties", {}):
                following.append(candidate["properties"][part])
            elif "patternProperties" in candidate:
                following.extend(candidate["patternProperties"].values())
            elif isinstance(candidate.get("additionalProperties"), dict):
                following.append(candidate["additionalProperties"])
            elif _is_tagged(candidate, part):
                following.append(candidate)
        candidates = following or candidates
    return {
        key: described.get("description", "")
        for candidate in _resolved(candidates, definitions)
        for key, described in candidate.get("properties", {}).items()
    }


def _is_tagged(schema: dict, tag: str) -> bool:  # type: ignore[type-arg]
    """Whether a member of a union is the one that pydantic calls `tag`: its title, or the one value of its key `name`."""
    return tag in {schema.get("title"), schema.get("properties", {}).get("name", {}).get("const")}


def _resolved(schemas: list[dict], definitions: dict) -> list[dict]:  # type: ignore[type-arg]
    """Resolve references and unions into plain schemas."""
    plain = []
    for schema in schemas:
        members = (
            [definitions[schema["$ref"].rsplit("/", 1)[-1]]]
            if "$ref" in schema
            else schema.get("anyOf", schema.get("oneOf"))
        )
        plain.extend(_resolved(members, definitions) if members else [schema])
    return plain
