"""Binds passes that remove parts of a layer to their algorithms: which parts stay, and the tensors that remain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from quantlab.algorithms.reap import saliency, select_experts
from quantlab.architectures.architecture import ModelTensor
from quantlab.architectures.layer import Routing
from quantlab.recipe.algorithms import ExpertRemoval


@dataclass(frozen=True)
class ExpertOutputs:
    """Statistics of the outputs of the routed experts of a layer.

    Attributes:
        tokens: [E] int64, tokens routed to each expert.
        gated_norms: [E] float32, for each expert the sum over its tokens of its gate value times the norm of its output.
    """

    tokens: Tensor
    gated_norms: Tensor


def experts_that_stay(
    algorithm: ExpertRemoval, outputs: ExpertOutputs, *, kept: int, routing: Routing
) -> tuple[int, ...]:
    """Numbers of the routed experts of a layer that stay, ascending.

    Args:
        algorithm: chooses them.
        outputs: statistics of all experts.
        kept: number of experts that stay.
        routing: how the router picks experts.

    Raises:
        CalibrationError: a norm is not finite.
    """
    match algorithm.name:
        case "reap":
            scores = saliency(outputs.gated_norms, outputs.tokens)
    chosen = select_experts(
        scores, kept=kept, groups=routing.groups, picked=routing.top_k, open_groups=routing.top_groups
    )
    return tuple(chosen.tolist())


def without_experts(
    tensors: Mapping[str, Tensor], described: Mapping[str, ModelTensor], kept: Sequence[int]
) -> dict[str, Tensor]:
    """The tensors of a layer with only the experts `kept`, numbered 0, 1, … in that order.

    Args:
        tensors: tensors of the layer by name; those of the router have one row per expert.
        described: roles and experts of the same tensors, by name.
        kept: numbers of the experts that stay.
    """
    numbers = {expert: number for number, expert in enumerate(kept)}
    result = {}
    for name, tensor in tensors.items():
        about = described[name]
        if about.role == "router":
            result[name] = tensor[list(kept)]
        elif about.expert is None:
            result[name] = tensor
        elif about.expert in numbers:
            result[about.in_expert(numbers[about.expert])] = tensor
    return result
