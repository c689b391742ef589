"""What a format of other programs is. Does not import torch.

A format has two parts. The part in this folder needs no torch: its name and what it cannot express; the plan uses it, so that
nothing is refused after the work. The writer in `quantlab.exports.writers` reads the artifact and writes the files.
`quantlab.exports.targets` and `quantlab.exports.writers.table` list all formats.
"""

from collections.abc import Callable
from typing import Protocol

from quantlab.formats.contents import Contents
from quantlab.recipe.schemes import FormatName

Progress = Callable[[int], None]
"""Called after each weight with its number of elements."""


class Target(Protocol):
    """A format of other programs."""

    @property
    def name(self) -> FormatName:
        """Its word in recipes and on the command line."""

    @property
    def description(self) -> str:
        """What is written and who reads it, in one line."""

    def refuses(self, contents: Contents) -> str | None:
        """Why the format cannot express an artifact, None if it can. Reads no weights."""
