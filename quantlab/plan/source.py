"""The tensors of the source: classified by role, checked against config.json, FP8 weights paired with scales."""

from dataclasses import dataclass

from quantlab.architectures.architecture import Architecture, Dimensions, ModelTensor
from quantlab.architectures.config import Config
from quantlab.architectures.fields import contradiction
from quantlab.checkpoint.header import TensorEntry
from quantlab.checkpoint.index import Checkpoint
from quantlab.errors import CheckpointError
from quantlab.formats.fp8_blocks import Fp8Blocks, scales_of
from quantlab.formats.layouts import METHODS, description_of

FLOATING = {"F64", "F32", "F16", "BF16", "F8_E4M3"}


@dataclass(frozen=True)
class SourceWeight:
    """One tensor of the source: its role, its location, and the location of its FP8 scale (None without)."""

    tensor: ModelTensor
    entry: TensorEntry
    scale: TensorEntry | None

    @property
    def dtype(self) -> str:
        """Dtype word of its values after reading: FP8 is expanded to bfloat16."""
        return "BF16" if self.scale else self.entry.dtype


def survey(checkpoint: Checkpoint, architecture: Architecture) -> tuple[SourceWeight, ...]:
    """Classify every tensor, in the order of blocks and of the bytes within a block.

    Raises:
        CheckpointError: config.json cannot be right, the checkpoint is already quantized, a tensor is missing or has the wrong shape, an FP8 weight
            has no scale, or a scale has no weight.
    """
    config = architecture.read(checkpoint.config)
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method not in {None, *(known.word for known in METHODS if known.is_source)}:
        raise CheckpointError(
            "the source is already quantized",
            where=str(checkpoint.directory / "config.json"),
            found=f"quant_method {method}",
            fix="start from the original BF16, FP16 or FP8 checkpoint",
        )
    description = description_of(checkpoint)
    assert description is None or isinstance(description, Fp8Blocks), (
        "the only quantized layout a recipe may start from"
    )
    scales = scales_of(checkpoint.tensors, description)
    paired = {scale.name for scale in scales.values()}
    layers = config["num_hidden_layers"]
    classified = {
        name: architecture.classify(name, hidden_layers=layers) for name in checkpoint.tensors if name not in paired
    }
    _check_complete(checkpoint, architecture, has_mtp=any(tensor.role == "mtp" for tensor in classified.values()))
    _check_groups_of_experts(architecture, config)
    sizes = architecture.dimensions(config)
    for name, tensor in classified.items():
        _check_layer_and_dtype(checkpoint.tensors[name], tensor, sizes)
    weights = [SourceWeight(tensor, checkpoint.tensors[name], scales.get(name)) for name, tensor in classified.items()]
    weights.sort(key=lambda weight: (_block_order(weight.tensor), weight.entry.file.name, weight.entry.offset))
    return tuple(weights)


def _block_order(tensor: ModelTensor) -> tuple[int, int]:
    if tensor.layer is not None:
        return 1, tensor.layer
    return (0, 0) if tensor.role == "embeddings" else (2, 0)


def _check_complete(checkpoint: Checkpoint, architecture: Architecture, *, has_mtp: bool) -> None:
    """Compare names and shapes with those expected from the config."""
    for name, shape in architecture.expected(checkpoint.config, with_mtp=has_mtp):
        entry = checkpoint.tensors.get(name)
        if entry is None:
            rule = architecture.classify(name, hidden_layers=0).rule
            if rule is not None and rule.optional:
                continue
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


def _check_groups_of_experts(architecture: Architecture, config: Config) -> None:
    """Refuse routing groups with fewer experts than their score is computed from.

    The shapes are compared before: they say which of the two numbers is wrong.
    """
    if architecture.mixture is None:
        return
    routing = architecture.mixture.routing(config)
    if routing.experts // routing.groups < routing.group_score:
        counted = architecture.mixture.count_field
        raise contradiction(
            "a routing group has too few experts",
            {counted: routing.experts, "n_group": routing.groups},
            fix=f"the score of a group is computed from its {routing.group_score} best experts",
        )


def _check_layer_and_dtype(entry: TensorEntry, tensor: ModelTensor, sizes: Dimensions) -> None:
    """Refuse tensors of layers or experts beyond those of config.json, and dtypes quantlab does not read."""
    layers, experts = sizes["layers"] + sizes.get("mtp_layers", 0), sizes["experts"]
    beyond = (tensor.layer is not None and tensor.layer >= layers) or (
        tensor.expert is not None and tensor.expert >= experts
    )
    if tensor.rule is not None and beyond:
        raise CheckpointError(
            "a tensor belongs to a layer or expert that config.json does not have",
            where=f"{entry.file}, {entry.name}",
            found=f"{layers} layers with {experts} experts",
            fix="use the config.json and the weights of one release",
        )
    if tensor.rule is not None and tensor.rule.linear and entry.elements and not tensor.rule.exists(sizes):
        raise CheckpointError(
            "a tensor belongs to a part that the model of config.json does not have",
            where=f"{entry.file}, {entry.name}",
            found=f"{list(entry.shape)}, config.json says that {tensor.rule.needs.lstrip('!')} is "
            f"{sizes[tensor.rule.needs.lstrip('!')]}",
            fix="use the config.json and the weights of one release",
        )
    if tensor.rule is not None and entry.dtype not in FLOATING:
        raise CheckpointError(
            "a weight has a dtype quantlab does not read",
            where=f"{entry.file}, {entry.name}",
            found=entry.dtype,
            fix="readable: " + ", ".join(sorted(FLOATING)),
        )
