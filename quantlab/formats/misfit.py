"""Errors of all layouts for weights that cannot be read."""

from collections.abc import Collection

from quantlab.checkpoint.header import TensorEntry
from quantlab.errors import ArtifactError, CheckpointError

FLOAT_SCALES = ("F64", "F32", "F16", "BF16")
"""Dtype words of scales that every layout can have."""


def check_scale_dtype(scale: TensorEntry, readable: Collection[str] = FLOAT_SCALES) -> None:
    """Refuse scales that are not numbers of a known meaning, from the header.

    Args:
        scale: the tensor of scales.
        readable: dtype words that its layout may have.

    Raises:
        CheckpointError: its dtype is none of them.
    """
    if scale.dtype not in readable:
        raise CheckpointError(
            "the scales of a weight have a dtype quantlab does not read",
            where=f"{scale.file}, {scale.name}",
            found=scale.dtype,
            fix="readable: "
            + ", ".join(readable)
            + ("; U8, as exponents, where config.json says `scale_fmt: ue8m0`" if "F8_E8M0" in readable else ""),
        )


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
