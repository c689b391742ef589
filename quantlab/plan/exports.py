"""The exports of a variant: what formats of other programs cannot express is refused before any work."""

from collections.abc import Sequence

from quantlab.errors import PlanError
from quantlab.exports import compressed_tensors
from quantlab.exports.targets import TARGETS
from quantlab.formats.contents import DENSE, Contents
from quantlab.recipe.schemes import FormatName


def formats_beside(wanted: Sequence[FormatName], contents: Contents) -> tuple[FormatName, ...]:
    """The formats that are written beside an artifact: all that are wanted but its own, which is always written."""
    own = contents.method in {DENSE, compressed_tensors.TARGET.name}
    return tuple(name for name in wanted if not (own and name == compressed_tensors.TARGET.name))


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
