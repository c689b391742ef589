"""The errors that every layout raises for weights it cannot read."""

from quantlab.errors import ArtifactError


def misfit(name: str, found: str) -> ArtifactError:
    """The error of a weight whose parts contradict each other or config.json."""
    return ArtifactError(
        "the parts of a quantized weight disagree with each other or with config.json",
        where=name,
        found=found,
        fix="use the config.json and the shards of one release",
    )


def unreadable(where: str, found: str, readable: str) -> ArtifactError:
    """The error of a description of numbers quantlab does not read."""
    return ArtifactError(
        "the checkpoint's numbers are of a kind quantlab does not read",
        where=where,
        found=found,
        fix=f"readable: {readable}",
    )
