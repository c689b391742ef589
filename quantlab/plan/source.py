"""The tensors of the source checkpoint: each claimed by a role, checked against config.json, FP8 weights paired with scales."""

from dataclasses import dataclass

from quantlab.architectures.architecture import Architecture, Claim, Dimensions
from quantlab.architectures.config import size_of
from quantlab.checkpoint.header import TensorEntry
from quantlab.checkpoint.index import Checkpoint
from quantlab.errors import CheckpointError
from quantlab.formats.fp8_blocks import Fp8Blocks, scales_of
from quantlab.formats.layouts import METHODS, description_of

FLOATING = {"F64", "F32", "F16", "BF16", "F8_E4M3"}


@dataclass(frozen=True)
class SourceWeight:
    """One tensor of the source with its claim, and its FP8 scale."""

    claim: Claim
    entry: TensorEntry
    scale: TensorEntry | None

    @property
    def dtype(self) -> str:
        """Dtype word of its values as they are read: FP8 is expanded to bfloat16."""
        return "BF16" if self.scale else self.entry.dtype


def survey(checkpoint: Checkpoint, architecture: Architecture) -> tuple[SourceWeight, ...]:
    """Claim every tensor, in the order of blocks and of the bytes within a block.

    Raises:
        CheckpointError: the checkpoint is quantized already, a tensor is missing or of the wrong shape, an FP8 weight has
            no scale or a scale no weight.
    """
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if method not in {None, *(known.word for known in METHODS if known.is_source)}:
        raise CheckpointError(
            "the source is quantized already",
            where=str(checkpoint.directory / "config.json"),
            found=f"quant_method {method}",
            fix="start from the original BF16, FP16 or FP8 checkpoint",
        )
    description = description_of(checkpoint)
    assert description is None or isinstance(description, Fp8Blocks), "the one layout a recipe may start from"
    scales = scales_of(checkpoint.tensors, description)
    paired = {scale.name for scale in scales.values()}
    layers = size_of(checkpoint.config, "num_hidden_layers")
    claims = {name: architecture.claim(name, hidden_layers=layers) for name in checkpoint.tensors if name not in paired}
    _check_complete(checkpoint, architecture, has_mtp=any(claim.role == "mtp" for claim in claims.values()))
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
