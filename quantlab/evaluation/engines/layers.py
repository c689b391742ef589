"""Single linears of an artifact, given the same inputs in an engine and in plain torch.

Where activations are rounded, no two programs agree token by token: one value that rounds the other way is a whole step, and some
layers later all of them differ. Means hide a wrong rule then. One linear has no such excuse: from equal inputs its outputs are equal
to float rounding, but for rows in which a value lies on the edge of a step, which the median over rows leaves out.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantlab.architectures.config import size_of
from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.evaluation.engines.own import rounded
from quantlab.evaluation.engines.verdict import SingleLayer
from quantlab.exports.writers.dense import expanded
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.number_format import INT8

_ROWS: Final = 16
_KINDS: Final = (".self_attn.o_proj", ".mlp.down_proj", ".mlp.shared_experts.down_proj")
"""Linears that engines do not merge with others."""
_ROUNDING: Final[Mapping[str, float]] = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Bound on the relative difference by the dtype of the outputs: some roundings of one output."""
NOT_ROUNDED: Final = "activations not rounded"
ABSMAX_127: Final = "activations rounded by absmax / 127"
ABSMAX_127_5: Final = "activations rounded by absmax / 127.5"


def stored_weights(artifact: Path) -> StoredWeights:
    """The weights of an artifact, read one at a time."""
    return StoredWeights(Reader(open_checkpoint(artifact)))


def probe_inputs(artifact: Path) -> dict[str, NDArray[np.float32]]:
    """Inputs of some quantized linears by name: the first and the last of each kind that engines do not merge.

    The inputs are normally distributed, channels with different sizes, and exact in every dtype of 16 bits.
    """
    stored = stored_weights(artifact)
    layers = size_of(stored.reader.checkpoint.config, "num_hidden_layers")
    inside = {f"model.layers.{layer}{kind}": kind for layer in range(layers) for kind in _KINDS}
    held = {name: one for name in inside if (one := stored.stored(f"{name}.weight")) is not None}
    chosen: list[str] = []
    for kind in _KINDS:
        names = [name for name in held if inside[name] == kind]
        chosen += dict.fromkeys(names[:1] + names[-1:])
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in chosen:
        columns = held[name].shape[1]
        sizes = torch.empty(columns).log_normal_(0, 0.5, generator=generator)
        inputs = torch.randn(_ROWS, columns, generator=generator) * sizes
        found[name] = inputs.to(torch.bfloat16).float().numpy()
    return found


def compare_layers(
    artifact: Path,
    inputs: Mapping[str, NDArray[np.float32]],
    outputs: Mapping[str, NDArray[np.float64]],
    dtype: str,
) -> tuple[SingleLayer, ...]:
    """Compare the outputs of single linears with plain torch, and name the rule that explains them.

    Args:
        artifact: the artifact.
        inputs: from `probe_inputs`.
        outputs: of the engine, by name; may lack some.
        dtype: the engine's.
    """
    stored = stored_weights(artifact)
    found = []
    for name, given in inputs.items():
        if name not in outputs:
            continue
        number = stored.format_of(f"{name}.weight")
        rounds = number is not None and number.activations is not None and number.activations.element == INT8
        rules = _outputs_by_rule(stored, name, torch.from_numpy(given))
        output = torch.from_numpy(outputs[name])
        own = ABSMAX_127 if rounds else NOT_ROUNDED
        differences = {rule: min(_difference(output, one) for one in expected) for rule, expected in rules.items()}
        nearest = min(differences, key=lambda rule: differences[rule])
        rule = own if differences[own] <= bound(dtype) else nearest if differences[nearest] <= bound(dtype) else ""
        found.append(SingleLayer(module=name, difference=min(differences[own], 1e9), rule=rule))
    return tuple(found)


def bound(dtype: str) -> float:
    """Bound on the relative difference of outputs that only rounding to a dtype explains."""
    return _ROUNDING.get(dtype, _ROUNDING["bfloat16"])


def _outputs_by_rule(stored: StoredWeights, name: str, x: Tensor) -> dict[str, list[Tensor]]:
    """The outputs of a linear by plain torch in float64, for each rule of rounding its inputs [T, N].

    Each rule has two: with weights multiplied out in the dtype of their scales, and in float32.
    """
    weights = [expanded(stored, f"{name}.weight", exact=exact).double() for exact in (False, True)]
    bias = stored.read_dense(f"{name}.bias", torch.float32).double() if f"{name}.bias" in set(stored.names()) else None
    rules = {NOT_ROUNDED: x, ABSMAX_127: rounded(x, 127.0), ABSMAX_127_5: rounded(x, 127.5)}
    return {
        rule: [torch.nn.functional.linear(one.double(), weight, bias) for weight in weights]
        for rule, one in rules.items()
    }


def _difference(output: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected output [T, N], median over rows; infinite for other shapes or NaN."""
    if output.shape != expected.shape:
        return float("inf")
    found = float(((output - expected).norm(dim=1) / expected.norm(dim=1)).median())
    return float("inf") if math.isnan(found) else found
