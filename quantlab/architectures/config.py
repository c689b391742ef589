"""Validated reading of sizes and numbers from a config.json, which users may have edited or damaged."""

from collections.abc import Mapping
from typing import Any

from quantlab.errors import CheckpointError

Config = Mapping[str, Any]
"""The contents of a config.json."""

_LARGEST_SIZE = 10_000_000


def size_of(config: Config, field: str, *, default: int | None = None, least: int = 0) -> int:
    """A size of config.json, at least `least`.

    Raises:
        CheckpointError: the field is missing and has no default, or is not a whole number.
    """
    value = config.get(field)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST_SIZE:
        raise CheckpointError(
            f"config.json has no usable {field}",
            where="config.json",
            found=repr(value),
            fix="use the config.json of the original release",
        )
    return value


def number_of(config: Config, field: str, *, default: float) -> float:
    """A number of config.json.

    Raises:
        CheckpointError: the field exists and is not a number.
    """
    value = config.get(field)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(
            f"config.json has no usable {field}",
            where="config.json",
            found=repr(value),
            fix="use the config.json of the original release",
        )
    return float(value)
