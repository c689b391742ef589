"""The fields of config.json that a family reads: type, range, default, and the values that its modules compute.

transformers' modules ignore some words of config.json (`scoring_func`), and others they read only when text passes through
them; a config that cannot be right is then noticed late or never. A family therefore declares its fields, and
`ConfigFields.read` checks a config.json against them before anything else is done. Its result has every declared field, so
that all readers, transformers included, take the same value where config.json has none.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from quantlab.architectures.config import Config, unusable
from quantlab.errors import CheckpointError

_LARGEST_SIZE: Final = 10_000_000
_LARGEST_NUMBER: Final = 1e12


class _Meaning:
    """What stands in place of a value."""


REQUIRED: Final = _Meaning()
"""The default of a field that config.json must have."""
LEFT_OUT: Final = _Meaning()
"""The default of a field that stays out, so that transformers takes its own default."""
DEFAULT: Final = _Meaning()
"""The meaning of null where it stands for the default."""
REFUSED: Final = _Meaning()
"""The meaning of null where it has none."""


class ReadConfig(dict[str, Any]):
    """A config.json that was checked, with the defaults of its family filled in."""


@dataclass(frozen=True, kw_only=True)
class Field(ABC):
    """A field of config.json.

    Attributes:
        name: its name.
        default: its value where config.json does not have it, `REQUIRED`, `LEFT_OUT`, or a function of config.json.
        null: its value where config.json says null, `REFUSED` or `DEFAULT`.
        aliases: other names of it; a config.json may have several, with one value.
        computed: the only values that the family's modules compute; empty if they compute all.
    """

    name: str
    default: Any = REQUIRED
    null: Any = REFUSED
    aliases: tuple[str, ...] = ()
    computed: tuple[Any, ...] = ()

    KIND: ClassVar[str]

    @abstractmethod
    def accepts(self, value: object) -> bool:
        """Whether a value has the type and range of the field."""

    def of(self, config: Config) -> Any:  # noqa: ANN401 - the type depends on the field
        """The value in a config.json.

        Raises:
            CheckpointError: it is missing, not of its type, out of its range, not computed by the modules, or two names
                of the field have two values.
        """
        found = {name: config[name] for name in (self.name, *self.aliases) if config.get(name) is not None}
        for name, value in found.items():
            if not self.accepts(value):
                raise unusable(name, shown(value), write=self.KIND)
            if self.computed and value not in self.computed:
                raise CheckpointError(
                    f"the family's modules do not compute this {name}",
                    where=f"config.json, {name}",
                    found=shown(value),
                    fix="supported: " + ", ".join(map(shown, self.computed)),
                )
        if any(value != next(iter(found.values())) for value in found.values()):
            raise contradiction("two names of one field have two values", found, fix="leave one of them out")
        return next(iter(found.values())) if found else self._without(config)

    def _without(self, config: Config) -> Any:  # noqa: ANN401
        """The value where config.json has none, or null."""
        null = next((name for name in (self.name, *self.aliases) if name in config), None)
        value = self.default if null is None or self.null is DEFAULT else self.null
        if value is REFUSED or value is REQUIRED:
            raise unusable(null or self.name, "null" if null else "no such field", write=self.KIND)
        return value(config) if callable(value) else value


@dataclass(frozen=True, kw_only=True)
class Size(Field):
    """A whole number from `least` to `most`."""

    least: int = 1
    most: int = _LARGEST_SIZE
    KIND: ClassVar = "a whole number in a plausible range"

    def accepts(self, value: object) -> bool:
        """See `Field`."""
        return isinstance(value, int) and not isinstance(value, bool) and self.least <= value <= self.most


@dataclass(frozen=True, kw_only=True)
class Number(Field):
    """A number from `least` to `most`; `positive`: zero is excluded."""

    least: float = 0.0
    most: float = _LARGEST_NUMBER
    positive: bool = True
    KIND: ClassVar = "a finite number in a plausible range"

    def accepts(self, value: object) -> bool:
        """See `Field`."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return self.least <= value <= self.most and (value > 0 or not self.positive)

    def of(self, config: Config) -> Any:  # noqa: ANN401
        """A float, since transformers refuses whole numbers; see `Field`."""
        value = super().of(config)
        return float(value) if isinstance(value, int) else value


@dataclass(frozen=True, kw_only=True)
class Switch(Field):
    """true or false."""

    KIND: ClassVar = "true or false"

    def accepts(self, value: object) -> bool:
        """See `Field`."""
        return isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Word(Field):
    """A word."""

    KIND: ClassVar = "a word"

    def accepts(self, value: object) -> bool:
        """See `Field`."""
        return isinstance(value, str)


@dataclass(frozen=True, kw_only=True)
class Words(Field):
    """A list of words, one per layer."""

    KIND: ClassVar = "a list of words"

    def accepts(self, value: object) -> bool:
        """See `Field`."""
        return isinstance(value, list) and all(isinstance(word, str) for word in value)


@dataclass(frozen=True, kw_only=True)
class Section(Field):
    """A mapping: the parameters of a scaled rotary embedding."""

    KIND: ClassVar = "a mapping"

    def accepts(self, value: object) -> bool:
        """See `Field`."""
        return isinstance(value, dict)


@dataclass(frozen=True, kw_only=True)
class Tokens(Field):
    """The number of a token of the vocabulary, -1 for none; `several`: or a list of such numbers."""

    several: bool = False
    KIND: ClassVar = "the number of a token"

    def accepts(self, value: object) -> bool:
        """See `Field`."""
        tokens = value if isinstance(value, list) and self.several else [value]
        return all(
            isinstance(token, int) and not isinstance(token, bool) and -1 <= token <= _LARGEST_SIZE for token in tokens
        )


@dataclass(frozen=True)
class ConfigFields:
    """All fields of a family, and what must hold between them.

    Attributes:
        fields: every field that the plan or transformers' modules read.
        relations: functions of a config.json with all fields; they raise CheckpointError if fields contradict each other.
    """

    fields: tuple[Field, ...]
    relations: tuple[Callable[[Config], None], ...]

    def field(self, name: str) -> Field:
        """The declaration of a field."""
        return next(field for field in self.fields if field.name == name)

    def read(self, config: Config) -> ReadConfig:
        """A config.json with the values of all fields under their own names; its other fields are unchanged.

        Raises:
            CheckpointError: a field is missing or not usable, the family's modules do not compute its value, or two fields
                contradict each other.
        """
        if isinstance(config, ReadConfig):
            return config
        names = {name for field in self.fields for name in (field.name, *field.aliases)}
        values = {field.name: field.of(config) for field in self.fields}
        whole = ReadConfig({name: value for name, value in config.items() if name not in names})
        whole |= {name: value for name, value in values.items() if value is not LEFT_OUT}
        for relation in self.relations:
            relation(whole)
        return whole


def contradiction(what: str, fields: Config, *, fix: str) -> CheckpointError:
    """The error for fields of a config.json, with their values, that contradict each other."""
    return CheckpointError(
        what,
        where="config.json, " + " and ".join(fields),
        found=", ".join(f"{name} = {shown(value)}" for name, value in fields.items()),
        fix=f"{fix}; use the config.json of the original release",
    )


def shown(value: object) -> str:
    """A value as config.json spells it, cut if it is long."""
    return json.dumps(value)[:120]
