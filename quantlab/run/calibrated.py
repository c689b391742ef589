"""Calibrated variants: the calibration text passes through the model block by block, and each block is edited on the
way.

The next block reads the outputs of the edited block (`propagate: quantized`) or of the unchanged one (`propagate:
original`). If an algorithm compensates for the errors of earlier layers, the unchanged model runs too. Results of the
unchanged model are kept for other variants.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantlab.calibration.corpus import tokens_sha256
from quantlab.calibration.hidden import HiddenStates, Workspace, discard_streams, load_streams, save_streams
from quantlab.calibration.layer import EMBEDDINGS, Skeleton
from quantlab.checkpoint.reader import TORCH_DTYPES
from quantlab.plan.folds import folds_of
from quantlab.plan.model import Block, Plan, VariantPlan
from quantlab.run.block import edit_layer
from quantlab.run.flow import EditedFlow, Flow, UnchangedFlow
from quantlab.run.identity import computing_of, shared_identity
from quantlab.run.layer import EditedLayer, Model, Skeletons
from quantlab.run.shared import SharedStages, Unchanged
from quantlab.run.weights import BlockWeights, Read

_CHANGED = "changed"
_DEVICE_SHARE = 4
"""Hidden states take at most 1 / 4 of the free GPU memory."""


@dataclass(frozen=True)
class Resources:
    """Directories, disk budget and device of a calibrated variant.

    Attributes:
        work: directory of this variant's hidden states.
        shared: directory of the results that variants share.
        budget: disk space for the shared results, in bytes.
        device: device of the layers.
    """

    work: Path
    shared: Path
    budget: int
    device: torch.device


class CalibratedRun:
    """The decoder layers of one calibrated variant, edited in order.

    Args:
        plan: the compiled recipe.
        variant: a variant with `calibration`.
        tokens: [samples, length] int64.
        read: reads the source weight of a step.
        resources: directories, disk budget and device.
    """

    def __init__(self, plan: Plan, variant: VariantPlan, tokens: Tensor, read: Read, resources: Resources) -> None:
        assert variant.calibration is not None
        self._variant, self._tokens, self._read, self._directory = variant, tokens, read, resources.work
        device, config = resources.device, plan.checkpoint.config
        self._computing = computing_of(variant.calibration, device)
        dtype = self._computing.torch_dtype
        whole = self._skeleton = Skeleton(config, dtype=dtype, device=device)
        reduced = whole
        if variant.experts is not None:
            fewer = plan.architecture.with_experts(config, variant.experts)
            reduced = Skeleton(fewer, dtype=dtype, device=device)
        follows = variant.calibration.propagate == "quantized"
        device_bytes = torch.cuda.mem_get_info(device)[0] // _DEVICE_SHARE if device.type == "cuda" else 0
        cap = variant.calibration.memory_bytes
        self._workspace = Workspace(resources.work, memory_bytes=cap, device=device, device_bytes=device_bytes)
        shape = (*tokens.shape, whole.width)
        self._unchanged: Unchanged | None = None
        if variant.uses_unchanged_model:
            steps = {step.tensor.name: step for step in variant.steps}
            stages = SharedStages(resources.shared / self._shared_key(plan), budget=resources.budget, device=device)
            hidden = self._workspace.stream(*shape, dtype=dtype)
            self._unchanged = Unchanged(whole, tokens, lambda name: read(steps[name]), hidden, stages)
        self._changed = self._workspace.stream(*shape, dtype=dtype) if follows else None
        self._model = Model(
            plan.architecture,
            config,
            Skeletons(whole, reduced),
            follows=follows,
            compares=follows and self._unchanged is not None,
            tokens=tokens.numel(),
        )
        self._after: str | None = None

    def has(self, block: Block) -> bool:
        """Whether a block is a decoder layer that text passes through."""
        layer = _layer_of(block)
        return layer is not None and layer < self._skeleton.layers

    def edit(self, block: Block, weights: BlockWeights) -> EditedLayer:
        """Edit the weights of a decoder layer, and advance the hidden states past it.

        Args:
            block: the block after the one edited last.
            weights: weights of the block.

        Raises:
            CheckpointError: a weight cannot be read, or weights, activations or results are not finite.
            ArtifactError: the hidden states cannot be written.
        """
        index, changed = _layer_of(block), self._changed
        assert index is not None
        if changed is not None and index == 0:
            self._embed(changed)
        elif changed is not None and self._after is None:
            load_streams(self._directory, f"layer {index - 1}", {_CHANGED: changed})
        layer = EditedLayer(self._model, index, weights)
        edit_layer(self._variant, layer, self._flow(layer))
        self._after = block.name
        if changed is not None:
            save_streams(self._directory, block.name, {_CHANGED: changed})
        return layer

    def committed(self) -> None:
        """Remove the hidden states of earlier blocks; call it when the last block is in the journal."""
        discard_streams(self._directory, keep=self._after)
        if self._unchanged is not None:
            self._unchanged.stages.tidy()

    def _flow(self, layer: EditedLayer) -> Flow:
        structural = self._variant.removal is not None or folds_of(layer.steps)
        if self._changed is None and not structural:
            assert self._unchanged is not None, "text enters one of the two models"
            return UnchangedFlow(layer, self._unchanged)
        return EditedFlow(layer, self._changed, self._unchanged, self._workspace)

    def _embed(self, stream: HiddenStates) -> None:
        step = next(step for step in self._variant.steps if step.tensor.name == EMBEDDINGS)
        embeddings = self._read(step).to(TORCH_DTYPES[step.dtype])
        for which, _ in stream.batches():
            stream.write(which, self._skeleton.embed(self._tokens[which], embeddings))

    def _shared_key(self, plan: Plan) -> str:
        """Hash of everything the hidden states of the unchanged model depend on."""
        parts = (plan.checkpoint.fingerprint(), tokens_sha256(self._tokens), shared_identity(self._computing))
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _layer_of(block: Block) -> int | None:
    return block.shards[0].steps[0].tensor.layer
