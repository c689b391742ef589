"""Errors caused by user input or the environment. Each states the problem, its location, the value found and a fix.

The command line prints them without a traceback. Any other exception that reaches the user is a bug in quantlab.
"""

from typing import TypeVar

Text = TypeVar("Text", str, str | None)


class QuantlabError(Exception):
    """A problem the user can act on.

    Args:
        what: one sentence that names the problem.
        where: file, line, path inside a document, or tensor.
        found: the value found there.
        fix: how to correct it.
    """

    def __init__(
        self, what: str, *, where: str | None = None, found: str | None = None, fix: str | None = None
    ) -> None:
        what, where, found, fix = _printable(what), _printable(where), _printable(found), _printable(fix)
        self.what, self.where, self.found, self.fix = what, where, found, fix
        details = (("where", where), ("found", found), ("fix", fix))
        super().__init__("\n".join([what, *(f"  {label}: {text}" for label, text in details if text)]))


def _printable(text: Text) -> Text:
    """The text with lone surrogates, which JSON and YAML may contain and no terminal can print, as escapes."""
    return text if text is None else text.encode("utf-8", "backslashreplace").decode("utf-8")


class RecipeError(QuantlabError):
    """A recipe or suite that cannot be understood."""


class CheckpointError(QuantlabError):
    """A source checkpoint that is missing, damaged or not supported."""


class PlanError(QuantlabError):
    """A recipe that does not fit its checkpoint, or whose artifact no engine could serve."""


class ArtifactError(QuantlabError):
    """An output directory or artifact that is damaged, incomplete or belongs to something else."""


class EvaluationError(QuantlabError):
    """An evaluation that cannot be run as the suite specifies."""


class CalibrationError(QuantlabError):
    """Calibration text or activation statistics that cannot be used."""


class DeviceError(QuantlabError):
    """A device that is not available, does not support an operation, or has too little memory."""


class CacheError(QuantlabError):
    """More sequences or tokens than a cache of fixed size can hold."""
