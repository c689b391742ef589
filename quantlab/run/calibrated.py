"""Calibrated variants: text flows through the model block by block, and each block is changed while it is watched.

Inside a block the order is the forward pass's: the linears of one stage are changed, then what enters the next stage is
measured with the changed ones in place. The next block reads what this one has become (`propagate: quantized`), or what it
was (`propagate: original`). Where an algorithm makes good for the errors of earlier layers, the unchanged model runs beside.
"""

from pathlib import Path

import torch
from torch import Tensor

from quantlab.calibration.hidden import HiddenStates, Workspace, discard_streams, load_streams, save_streams
from quantlab.calibration.layer import EMBEDDINGS, Skeleton
from quantlab.checkpoint.reader import TORCH_DTYPES
from quantlab.passes.apply import needs_of
from quantlab.plan.model import Block, Plan, VariantPlan
from quantlab.run.block import BlockTask, BlockWork, Read, Skeletons


class CalibratedRun:
    """The decoder layers of one calibrated variant, changed in order.

    Args:
        plan: the compiled recipe.
        variant: a variant with `calibration`.
        tokens: [samples, length] int64.
        read: the source weight of a step, finite.
        directory: where hidden states lie.
        device: where the layers compute.
    """

    def __init__(
        self, plan: Plan, variant: VariantPlan, tokens: Tensor, read: Read, directory: Path, *, device: torch.device
    ) -> None:
        assert variant.calibration is not None
        self._variant, self._tokens, self._read, self._directory = variant, tokens, read, directory
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self._architecture, self._config = plan.architecture, plan.checkpoint.config
        whole = self._skeleton = Skeleton(self._config, dtype=dtype, device=device)
        fewer = {**self._config, "n_routed_experts": variant.experts}
        reduced = whole if variant.experts is None else Skeleton(fewer, dtype=dtype, device=device)
        self._skeletons = Skeletons(whole, reduced)
        names = ["original"]
        if variant.calibration.propagate == "quantized":
            names = ["changed", *(names if any("cross" in needs_of(step.passes) for step in variant.steps) else [])]
        self._workspace = Workspace(directory, memory_bytes=variant.calibration.memory_bytes, device=device)
        samples, length = tokens.shape
        width = self._skeleton.width
        self._streams = {name: self._workspace.stream(samples, length, width, dtype=dtype) for name in names}
        self._after: str | None = None

    def has(self, block: Block) -> bool:
        """Whether a block is a decoder layer that text flows through."""
        layer = _layer_of(block)
        return layer is not None and layer < self._skeleton.layers

    def change(self, block: Block) -> BlockWork:
        """Change every weight of a decoder layer; the hidden states are those after the block then."""
        index = _layer_of(block)
        assert index is not None
        if index == 0:
            self._embed()
        elif self._after is None:
            load_streams(self._directory, f"layer {index - 1}", self._streams)
        steps = {step.claim.name: step for shard in block.shards for step in shard.steps}
        task = BlockTask(index, steps, self._architecture, self._config, self._variant.experts)
        work = BlockWork(task, self._skeletons, self._read, self._streams, self._workspace)
        work.run()
        self._after = block.name
        save_streams(self._directory, block.name, self._streams)
        return work

    def committed(self) -> None:
        """Forget the hidden states of earlier blocks, now that the journal names the last one."""
        discard_streams(self._directory, keep=self._after)

    def _embed(self) -> None:
        step = next(step for step in self._variant.steps if step.claim.name == EMBEDDINGS)
        weight = self._read(step)
        for name, stream in self._streams.items():
            embeddings = weight.to(TORCH_DTYPES[step.dtype]) if name == "changed" else weight
            _fill(stream, self._skeleton, self._tokens, embeddings)


def _layer_of(block: Block) -> int | None:
    return block.shards[0].steps[0].claim.layer


def _fill(stream: HiddenStates, skeleton: Skeleton, tokens: Tensor, embeddings: Tensor) -> None:
    for which, _ in stream.batches():
        stream.write(which, skeleton.embed(tokens[which], embeddings))
