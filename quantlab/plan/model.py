"""A plan: the one outcome of every tensor of the checkpoint in every variant, known before any weight is read."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from quantlab.architectures.architecture import Architecture, ModelTensor
from quantlab.checkpoint.header import TensorEntry
from quantlab.checkpoint.index import Checkpoint
from quantlab.formats.engine_rules.rule import Verdict
from quantlab.formats.layout import StoredTensor, stored_bytes
from quantlab.recipe.algorithms import ExpertRemoval, Gptq
from quantlab.recipe.schema import Calibration, Prune, Quantize
from quantlab.recipe.schemes import SCHEMES, FormatName, LayoutName, Scheme

Outcome = Literal["cast", "quantized", "pruned", "folded", "kept", "dropped"]


@dataclass(frozen=True)
class LedgerEntry:
    """One source tensor with its one outcome.

    Attributes:
        tensor: its name in the source.
        role: what it is for.
        outcome: what is done with it.
        reason: why, or by which pass.
        stored_as: names of the artifact's tensors that store it.
    """

    tensor: str
    role: str
    outcome: Outcome
    reason: str
    stored_as: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One weight (with its FP8 scale, if any): what is read, how it is changed, what is written.

    Attributes:
        tensor: its name, role, layer and expert.
        source: location in the source.
        scale: location of its FP8 scale, None unless it is an FP8 weight.
        passes: the passes that change its values, in order.
        dtype: dtype word of the stored weight, or of its scales if it is quantized.
        outcome: its outcome in the ledger.
        reason: its reason in the ledger.
        outputs: the tensors that store it.
    """

    tensor: ModelTensor
    source: TensorEntry
    scale: TensorEntry | None
    passes: tuple[Prune | Quantize, ...]
    dtype: str
    outcome: Outcome
    reason: str
    outputs: tuple[StoredTensor, ...]

    @property
    def quantize(self) -> Quantize | None:
        """The pass that quantizes it, if any."""
        return next((step for step in self.passes if isinstance(step, Quantize)), None)

    @property
    def scheme(self) -> Scheme | None:
        """The scheme it is quantized to, None if it is not quantized."""
        return SCHEMES[self.quantize.quantize] if self.quantize else None

    @property
    def layout(self) -> LayoutName:
        """The layout of its outputs."""
        return self.scheme.layout if self.scheme else "dense"

    @property
    def corrects(self) -> bool:
        """Whether its algorithm compares with the unchanged model to compensate for the errors of earlier layers."""
        algorithm = self.quantize.algorithm if self.quantize else None
        return isinstance(algorithm, Gptq) and bool(algorithm.correction)

    @property
    def source_bytes(self) -> int:
        return self.source.nbytes + (self.scale.nbytes if self.scale else 0)

    @property
    def output_bytes(self) -> int:
        return sum(map(stored_bytes, self.outputs))

    def ledger(self) -> Iterator[LedgerEntry]:
        """The ledger entries of the weight and of its FP8 scale."""
        name, role = self.tensor.name, self.tensor.role
        yield LedgerEntry(name, role, self.outcome, self.reason, tuple(output[0] for output in self.outputs))
        if self.scale is not None:
            yield LedgerEntry(self.scale.name, role, "dropped", f"multiplied into {name}", ())


@dataclass(frozen=True)
class Shard:
    """One file of an artifact: the steps whose outputs it holds, in order."""

    file: str
    steps: tuple[Step, ...]

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return tuple(output for step in self.steps for output in step.outputs)


@dataclass(frozen=True)
class Block:
    """One decoder layer, the embeddings or the head: the unit of streaming and of resuming."""

    name: str
    shards: tuple[Shard, ...]

    @property
    def source_bytes(self) -> int:
        """Bytes of all source tensors."""
        return sum(step.source_bytes for shard in self.shards for step in shard.steps)


@dataclass(frozen=True)
class VariantPlan:
    """The plan of one variant.

    Attributes:
        name: the variant's name.
        description: its passes in one line.
        dtype: the 16-bit dtype of its floating-point tensors, as config.json spells it.
        blocks: its blocks, in the order of processing.
        calibration: settings of the calibration text; None if no algorithm is calibrated.
        removal: the algorithm that chooses the routed experts to remove, None if all stay.
        experts: number of routed experts that every MoE layer keeps, None if all stay.
        algorithms: names of the algorithms that change its weights.
        recipe_key: hash of the recipe's passes, source, calibration text and settings. `quantlab.run.identity` adds the
            rest that the artifact depends on: code, libraries and device.
        peak_memory_bytes: estimate of the largest resident size while it is made.
        tensor_parallel: tensor-parallel sizes at which engines can split every quantized linear.
        engines: what the rules of every engine say about the artifact.
        notes: remarks for the plan's reader and the model card.
        exports: formats of other programs that the artifact is also written in; no part of its identity.
    """

    name: str
    description: str
    dtype: str
    blocks: tuple[Block, ...] = field(repr=False)
    calibration: Calibration | None
    removal: ExpertRemoval | None
    experts: int | None
    algorithms: tuple[str, ...]
    recipe_key: str
    peak_memory_bytes: int
    tensor_parallel: tuple[int, ...]
    engines: tuple[Verdict, ...]
    notes: tuple[str, ...]
    exports: tuple[FormatName, ...] = ()

    @property
    def steps(self) -> Iterator[Step]:
        return (step for block in self.blocks for shard in block.shards for step in shard.steps)

    @property
    def uses_unchanged_model(self) -> bool:
        """Whether the text passes through the unchanged model, alone or beside the changed one for comparison."""
        return self.calibration is not None and (
            self.calibration.propagate == "original" or any(step.corrects for step in self.steps)
        )

    @property
    def layouts(self) -> tuple[LayoutName, ...]:
        """The layouts of its quantized weights, sorted."""
        return tuple(sorted({step.layout for step in self.steps if step.scheme is not None and step.outputs}))

    @property
    def artifact_bytes(self) -> int:
        """Bytes of all tensors of the artifact."""
        return sum(step.output_bytes for step in self.steps)


@dataclass(frozen=True)
class Peer:
    """A directory with the same model that another tool wrote; it is measured, not made.

    Attributes:
        name: of its row.
        checkpoint: its config and headers.
        description: its formats and its producer in one line.
        method: its `quant_method`, "dense" if it has none.
        producer: the program, with its version, that its files name; empty if they name none.
    """

    name: str
    checkpoint: Checkpoint = field(repr=False)
    description: str
    method: str
    producer: str


@dataclass(frozen=True)
class Plan:
    """A recipe compiled against a checkpoint."""

    checkpoint: Checkpoint
    architecture: Architecture
    variants: tuple[VariantPlan, ...]
    peers: tuple[Peer, ...] = ()

    @property
    def source_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.checkpoint.tensors.values())
