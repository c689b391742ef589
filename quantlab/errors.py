"""The errors a user can meet. Each says what is wrong, where, what was found there and how to fix it.

The command line prints them without a traceback; anything else that escapes is a bug of quantlab.
"""


class QuantlabError(Exception):
    """A problem the user can act on.

    Args:
        what: one sentence that names the problem.
        where: file, line, path inside a document, or tensor.
        found: what stood there.
        fix: what to do about it.
    """

    def __init__(
        self, what: str, *, where: str | None = None, found: str | None = None, fix: str | None = None
    ) -> None:
        self.what, self.where, self.found, self.fix = what, where, found, fix
        details = (("where", where), ("found", found), ("fix", fix))
        super().__init__("\n".join([what, *(f"  {label}: {text}" for label, text in details if text)]))


class RecipeError(QuantlabError):
    """A recipe or suite that cannot be understood."""


class CheckpointError(QuantlabError):
    """A source checkpoint that is missing, damaged or not supported."""


class PlanError(QuantlabError):
    """A recipe that does not fit its checkpoint, or an artifact no engine would serve."""


class ArtifactError(QuantlabError):
    """An output directory or artifact that is damaged, incomplete or belongs to something else."""


class EvaluationError(QuantlabError):
    """An evaluation that cannot be made as the suite asks."""


class CalibrationError(QuantlabError):
    """A calibration text, or statistics of activations, that cannot be worked with."""


class DeviceError(QuantlabError):
    """A device that is not there, cannot compute what is asked of it, or has too little memory."""


class CacheError(QuantlabError):
    """More sequences or tokens than a cache of fixed size has room for."""
