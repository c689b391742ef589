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
        raise unusable(field, repr(value), write="a whole number in a plausible range")
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
        raise unusable(field, repr(value), write="a number")
    return float(value)


def unusable(field: str, found: str, *, write: str) -> CheckpointError:
    """The error for a field of config.json that is missing or has no usable value.

    Args:
        field: its name.
        found: what stands there.
        write: what should stand there.
    """
    return CheckpointError(
        f"config.json has no usable {field}",
        where=f"config.json, {field}",
        found=found,
        fix=f"write {write}, or use the config.json of the original release",
    )
