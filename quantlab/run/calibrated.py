"""Calibrated variants: text flows through the model block by block, and each block is changed while it is watched.

Inside a block the order is the forward pass's: the linears of one stage are changed, then what enters the next stage is
measured with the changed ones in place. The next block reads what this one has become (`propagate: quantized`), or what it
was (`propagate: original`). Where an algorithm makes good for the errors of earlier layers, the unchanged model runs beside.
What is computed of the unchanged model is kept for other variants.
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
from quantlab.plan.model import Block, Plan, VariantPlan
from quantlab.run.block import BlockTask, BlockWork, Read, Skeletons, Streams
from quantlab.run.identity import computing_of, shared_identity
from quantlab.run.shared import SharedStages, Unchanged

_CHANGED = "changed"
_DEVICE_SHARE = 4
"""Hidden states take at most this part of what is free on a device with memory of its own."""


@dataclass(frozen=True)
class Places:
    """Where a calibrated variant computes and keeps things.

    Attributes:
        work: directory of this variant's hidden states.
        shared: directory of what variants share.
        budget: bytes that what they share may take.
        device: where the layers compute.
    """

    work: Path
    shared: Path
    budget: int
    device: torch.device


class CalibratedRun:
    """The decoder layers of one calibrated variant, changed in order.

    Args:
        plan: the compiled recipe.
        variant: a variant with `calibration`.
        tokens: [samples, length] int64.
        read: the source weight of a step, finite.
        places: where it computes and keeps things.
    """

    def __init__(self, plan: Plan, variant: VariantPlan, tokens: Tensor, read: Read, places: Places) -> None:
        assert variant.calibration is not None
        self._variant, self._tokens, self._read, self._directory = variant, tokens, read, places.work
        device = places.device
        self._computing = computing_of(variant.calibration, device)
        dtype = self._computing.torch_dtype
        self._architecture, self._config = plan.architecture, plan.checkpoint.config
        whole = self._skeleton = Skeleton(self._config, dtype=dtype, device=device)
        reduced = whole
        if variant.experts is not None:
            fewer = self._architecture.with_experts(self._config, variant.experts)
            reduced = Skeleton(fewer, dtype=dtype, device=device)
        self._skeletons = Skeletons(whole, reduced)
        device_bytes = torch.cuda.mem_get_info(device)[0] // _DEVICE_SHARE if device.type == "cuda" else 0
        cap = variant.calibration.memory_bytes
        self._workspace = Workspace(places.work, memory_bytes=cap, device=device, device_bytes=device_bytes)
        shape = (*tokens.shape, whole.width)
        follows = variant.calibration.propagate == "quantized"
        unchanged = None
        if variant.watches_unchanged:
            steps = {step.claim.name: step for step in variant.steps}
            stages = SharedStages(places.shared / self._shared_key(plan), budget=places.budget)
            hidden = self._workspace.stream(*shape, dtype=dtype)
            unchanged = Unchanged(whole, tokens, lambda name: read(steps[name]), hidden, stages)
        changed = self._workspace.stream(*shape, dtype=dtype) if follows else None
        self._streams = Streams(changed, unchanged)
        self._after: str | None = None

    def has(self, block: Block) -> bool:
        """Whether a block is a decoder layer that text flows through."""
        layer = _layer_of(block)
        return layer is not None and layer < self._skeleton.layers

    def change(self, block: Block) -> BlockWork:
        """Change every weight of a decoder layer; the hidden states are those after the block then."""
        index, changed = _layer_of(block), self._streams.changed
        assert index is not None
        if changed is not None and index == 0:
            self._embed(changed)
        elif changed is not None and self._after is None:
            load_streams(self._directory, f"layer {index - 1}", {_CHANGED: changed})
        steps = {step.claim.name: step for shard in block.shards for step in shard.steps}
        task = BlockTask(index, steps, self._architecture, self._config, self._variant.experts)
        work = BlockWork(task, self._skeletons, self._read, self._streams, self._workspace)
        work.run()
        self._after = block.name
        if changed is not None:
            save_streams(self._directory, block.name, {_CHANGED: changed})
        return work

    def committed(self) -> None:
        """Forget the hidden states of earlier blocks, now that the journal names the last one."""
        discard_streams(self._directory, keep=self._after)
        if self._streams.unchanged is not None:
            self._streams.unchanged.stages.tidy()

    def _embed(self, stream: HiddenStates) -> None:
        step = next(step for step in self._variant.steps if step.claim.name == EMBEDDINGS)
        embeddings = self._read(step).to(TORCH_DTYPES[step.dtype])
        for which, _ in stream.batches():
            stream.write(which, self._skeleton.embed(self._tokens[which], embeddings))

    def _shared_key(self, plan: Plan) -> str:
        """Names all that the unchanged model's hidden states depend on."""
        parts = (plan.checkpoint.fingerprint(), tokens_sha256(self._tokens), shared_identity(self._computing))
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _layer_of(block: Block) -> int | None:
    return block.shards[0].steps[0].claim.layer
