"""Errors of all layouts for weights that cannot be read."""

from quantlab.errors import ArtifactError


def misfit(name: str, found: str) -> ArtifactError:
    """The error for a weight whose parts contradict each other or config.json."""
    return ArtifactError(
        "the tensors of a quantized weight contradict each other or config.json",
        where=name,
        found=found,
        fix="use the config.json and the shards of one release",
    )


def unreadable(where: str, found: str, readable: str) -> ArtifactError:
    """The error for a number format that quantlab does not read."""
    return ArtifactError(
        "the checkpoint has a number format that quantlab does not read",
        where=where,
        found=found,
        fix=f"readable: {readable}",
    )
