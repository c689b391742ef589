"""What the source checkpoint is made of: every tensor claimed, checked against its config, FP8 scales paired."""

from collections.abc import Mapping
from dataclasses import dataclass

from quantlab.architectures.architecture import Architecture, Claim, Dimensions
from quantlab.architectures.config import size_of
from quantlab.checkpoint.header import TensorEntry
from quantlab.checkpoint.index import FP8_SCALE_SUFFIX, Checkpoint
from quantlab.errors import CheckpointError

FLOATING = {"F64", "F32", "F16", "BF16", "F8_E4M3"}
_READABLE_METHODS = {None, "fp8"}


@dataclass(frozen=True)
class SourceWeight:
    """One tensor of the source with its claim, and its FP8 scale."""

    claim: Claim
    entry: TensorEntry
    scale: TensorEntry | None


def survey(checkpoint: Checkpoint, architecture: Architecture) -> tuple[SourceWeight, ...]:
    """Claim every tensor, in the order of blocks and of the bytes within a block.

    Raises:
        CheckpointError: the checkpoint is quantized already, a tensor is missing or of the wrong shape, an FP8 weight has
            no scale or a scale no weight.
    """
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if method not in _READABLE_METHODS:
        raise CheckpointError(
            "the source is quantized already",
            where=str(checkpoint.directory / "config.json"),
            found=f"quant_method {method}",
            fix="start from the original BF16, FP16 or FP8 checkpoint",
        )
    layers = size_of(checkpoint.config, "num_hidden_layers")
    claims = {
        name: architecture.claim(name, hidden_layers=layers)
        for name in checkpoint.tensors
        if not name.endswith(FP8_SCALE_SUFFIX)
    }
    _check_complete(checkpoint, architecture, has_mtp=any(claim.role == "mtp" for claim in claims.values()))
    scales = _pair_scales(checkpoint)
    for name, claim in claims.items():
        _check_place(checkpoint.tensors[name], claim, architecture.dimensions(checkpoint.config))
    weights = [SourceWeight(claim, checkpoint.tensors[name], scales.get(name)) for name, claim in claims.items()]
    weights.sort(key=lambda weight: (_block_order(weight.claim), weight.entry.file.name, weight.entry.offset))
    return tuple(weights)


def _block_order(claim: Claim) -> tuple[int, int]:
    if claim.layer is not None:
        return 1, claim.layer
    return (0, 0) if claim.role == "embeddings" else (2, 0)


def _check_complete(checkpoint: Checkpoint, architecture: Architecture, *, has_mtp: bool) -> None:
    """Compare names and shapes with what the config says the model has."""
    for name, shape in architecture.expected(checkpoint.config, with_mtp=has_mtp):
        entry = checkpoint.tensors.get(name)
        if entry is None:
            raise CheckpointError(
                "a tensor is missing",
                where=str(checkpoint.directory),
                found=f"no {name}",
                fix="download the complete checkpoint, or the config.json that belongs to it",
            )
        if entry.shape != shape:
            raise CheckpointError(
                "a tensor has the wrong shape",
                where=f"{entry.file}, {name}",
                found=f"{list(entry.shape)}, config.json says {list(shape)}",
                fix="use the config.json and the weights of one release",
            )


def _check_place(entry: TensorEntry, claim: Claim, sizes: Dimensions) -> None:
    """Refuse what the model has no place for, and numbers no algorithm here reads."""
    layers, experts = sizes["layers"] + sizes.get("mtp_layers", 0), sizes["experts"]
    beyond = (claim.layer is not None and claim.layer >= layers) or (
        claim.expert is not None and claim.expert >= experts
    )
    if claim.rule is not None and beyond:
        raise CheckpointError(
            "config.json has no place for a tensor",
            where=f"{entry.file}, {entry.name}",
            found=f"{layers} layers with {experts} experts",
            fix="use the config.json and the weights of one release",
        )
    if claim.rule is not None and entry.dtype not in FLOATING:
        raise CheckpointError(
            "a weight has a dtype quantlab does not read",
            where=f"{entry.file}, {entry.name}",
            found=entry.dtype,
            fix="readable: " + ", ".join(sorted(FLOATING)),
        )


def _pair_scales(checkpoint: Checkpoint) -> Mapping[str, TensorEntry]:
    """FP8 weight -> its scale; both directions are checked."""
    tensors = checkpoint.tensors
    scales = {
        name.removesuffix(FP8_SCALE_SUFFIX): entry for name, entry in tensors.items() if name.endswith(FP8_SCALE_SUFFIX)
    }
    fp8 = {name for name, entry in tensors.items() if entry.dtype == "F8_E4M3"}
    for name in sorted(fp8 - set(scales)):
        raise CheckpointError(
            "an FP8 weight has no scale",
            where=str(tensors[name].file),
            found=f"no {name}{FP8_SCALE_SUFFIX}",
            fix="download the complete checkpoint",
        )
    for name in sorted(set(scales) - fp8):
        raise CheckpointError(
            "a scale belongs to no FP8 weight",
            where=str(scales[name].file),
            found=scales[name].name,
            fix="download the index and the shards of one release",
        )
    for name in fp8:
        _check_grid(tensors[name], scales[name], checkpoint.fp8_block)
    return scales


def _check_grid(weight: TensorEntry, scale: TensorEntry, block: tuple[int, int] | None) -> None:
    grid = tuple(-(-size // step) for size, step in zip(weight.shape, block or (), strict=False))
    if scale.shape != grid:
        raise CheckpointError(
            "a scale does not fit its weight",
            where=f"{scale.file}, {scale.name}",
            found=f"{list(scale.shape)} for a weight of {list(weight.shape)} in blocks of {block}",
            fix="download the shard again, and the config.json of the same release",
        )
