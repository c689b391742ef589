"""The exports of a variant: what formats of other programs cannot express is refused before any work."""

from collections.abc import Sequence

from quantlab.errors import PlanError
from quantlab.exports.targets import TARGETS
from quantlab.formats.contents import Contents
from quantlab.recipe.schemes import FormatName


def check_exports(formats: Sequence[FormatName], contents: Contents, *, variant: str) -> None:
    """Check that every format can express the artifact that is to be written in it.

    Args:
        formats: of the variant.
        contents: what its artifact will contain.
        variant: its name.

    Raises:
        PlanError: one cannot.
    """
    for name in formats:
        reason = TARGETS[name].refuses(contents)
        if reason is not None:
            able = [other for other, target in TARGETS.items() if target.refuses(contents) is None]
            raise PlanError(
                f"the format {name} cannot express the variant",
                where=f"variant {variant}, format",
                found=reason,
                fix=f"leave {name} out; formats that can: {', '.join(able)}",
            )
