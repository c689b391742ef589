"""Counts the tokens that the unchanged model routes to every expert, without collecting anything else."""

from collections.abc import Callable

import torch
from torch import Tensor

from quantlab.calibration.hidden import HiddenStates
from quantlab.calibration.layer import EMBEDDINGS, Skeleton


def tokens_per_expert(
    skeleton: Skeleton, tokens: Tensor, read: Callable[[str], Tensor], hidden: HiddenStates
) -> dict[str, Tensor]:
    """Tokens routed to each routed expert by every layer that has some; reads every weight of the decoder once.

    Args:
        skeleton: allocates the layers.
        tokens: [samples, length] int64.
        read: reads a source weight by name, of any floating dtype.
        hidden: a stream [samples, length, H] with undefined values; afterwards the hidden states after the last layer.

    Returns:
        Block ("layer 3") -> [E] int64.
    """
    embeddings = read(EMBEDDINGS)
    for which, _ in hidden.batches():
        hidden.write(which, skeleton.embed(tokens[which], embeddings))
    found: dict[str, Tensor] = {}
    for index in range(skeleton.layers):
        layer = skeleton.layer(index)
        layer.fill(read)
        experts = layer.mlp.experts
        counts = torch.zeros(0 if experts is None else len(experts.down_proj), dtype=torch.int64)

        def count(_: Tensor, chosen: Tensor, __: Tensor, counts: Tensor = counts) -> None:
            counts += torch.bincount(chosen.flatten(), minlength=len(counts)).cpu()

        if experts is not None:
            experts.recorder = count
            found[layer.block] = counts
        for which, states in hidden.batches():
            hidden.write(which, layer.forward(states))
    return found
