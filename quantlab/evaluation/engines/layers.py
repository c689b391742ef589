"""Single linears of an artifact, given the same inputs in an engine and in plain torch.

Where activations are rounded, no two programs agree token by token: one value that rounds the other way is a whole step, and some
layers later all of them differ. Means hide a wrong rule then. One linear has no such excuse: from equal inputs its outputs are equal
to float rounding, but for rows in which a value lies on the edge of a step, which the median over rows leaves out.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.activations import ACT2FN

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
EXPERTS: Final = ".mlp.experts"
"""End of the name of the routed experts of a layer, which engines hold as one module."""
_ROUNDING: Final[Mapping[str, float]] = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Bound on the relative difference by the dtype of the outputs: some roundings of one output."""
_MERGED: Final[Mapping[str, tuple[str, ...]]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Linears that engines merge into one."""
NOT_ROUNDED: Final = "activations not rounded"
ABSMAX_127: Final = "activations rounded by absmax / 127"
ABSMAX_127_5: Final = "activations rounded by absmax / 127.5"


def stored_weights(artifact: Path) -> StoredWeights:
    """The weights of an artifact, read one at a time."""
    return StoredWeights(Reader(open_checkpoint(artifact)))


def probe_inputs(artifact: Path, *, experts: bool = False) -> dict[str, NDArray[np.float32]]:
    """Inputs of some quantized linears by name: the first and the last of each kind that engines do not merge.

    The inputs are normally distributed, channels with different sizes, and exact in every dtype of 16 bits.

    Args:
        artifact: the artifact.
        experts: inputs of the experts of layers too, if their activations are not rounded.
    """
    stored = stored_weights(artifact)
    layers = size_of(stored.reader.checkpoint.config, "num_hidden_layers")
    inside = {f"model.layers.{layer}{kind}": kind for layer in range(layers) for kind in _KINDS}
    held = {name: one.shape[1] for name in inside if (one := stored.stored(f"{name}.weight")) is not None}
    if experts:
        names = [f"model.layers.{layer}{EXPERTS}" for layer in range(layers)]
        inside |= dict.fromkeys(names, EXPERTS)
        held |= {name: columns for name in names if (columns := _expert_columns(stored, name))}
    chosen: list[str] = []
    for kind in (*_KINDS, EXPERTS):
        names = [name for name in held if inside[name] == kind]
        chosen += dict.fromkeys(names[:1] + names[-1:])
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in chosen:
        columns = held[name]
        sizes = torch.empty(columns).log_normal_(0, 0.5, generator=generator)
        inputs = torch.randn(_ROWS, columns, generator=generator) * sizes
        found[name] = inputs.to(torch.bfloat16).float().numpy()
    return found


def compare_layers(
    artifact: Path,
    inputs: Mapping[str, NDArray[np.float32]],
    outputs: Mapping[str, NDArray[np.float64]],
    dtype: Callable[[str], str],
) -> tuple[SingleLayer, ...]:
    """Compare the outputs of single linears with plain torch, and name the rule that explains them.

    Args:
        artifact: the artifact.
        inputs: from `probe_inputs`.
        outputs: of the engine, by name; may lack some.
        dtype: the dtype of a module in the engine.
    """
    stored = stored_weights(artifact)
    found = []
    for name, given in inputs.items():
        if name not in outputs:
            continue
        x, output, most = torch.from_numpy(given), torch.from_numpy(outputs[name]), bound(dtype(name))
        if name.endswith(EXPERTS):
            difference = min(_difference(output, one, quantile=1.0) for one in _outputs_of_experts(stored, name, x))
            found.append(_single(name, difference, NOT_ROUNDED if difference <= most else ""))
            continue
        number = stored.format_of(f"{name}.weight")
        rounds = number is not None and number.activations is not None and number.activations.element == INT8
        rules = _outputs_by_rule(stored, name, x)
        own = ABSMAX_127 if rounds else NOT_ROUNDED
        differences = {rule: min(_difference(output, one) for one in expected) for rule, expected in rules.items()}
        nearest = min(differences, key=lambda rule: differences[rule])
        rule = own if differences[own] <= most else nearest if differences[nearest] <= most else ""
        found.append(_single(name, differences[own], rule))
    return tuple(found)


def _single(name: str, difference: float, rule: str) -> SingleLayer:
    return SingleLayer(module=name, difference=min(difference, 1e9), rule=rule)


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


def _expert_columns(stored: StoredWeights, name: str) -> int:
    """Columns of a layer's experts; 0 if there are none, they are not quantized, or their activations are rounded."""
    held = stored.stored(f"{name}.0.gate_proj.weight")
    return 0 if held is None or held.number.activations is not None else held.shape[1]


def _outputs_of_experts(stored: StoredWeights, name: str, x: Tensor) -> list[Tensor]:
    """The outputs of a layer's experts in float64, row t by expert t modulo their number; weights as in `_outputs_by_rule`."""
    config = stored.reader.checkpoint.config
    act, count = ACT2FN[str(config["hidden_act"])], size_of(config, "n_routed_experts")
    found = []
    for exact in (False, True):
        rows = []
        for token, row in enumerate(x.double()):
            prefix = f"{name}.{token % count}"
            gate, up, down = (
                expanded(stored, f"{prefix}.{part}_proj.weight", exact=exact).double()
                for part in ("gate", "up", "down")
            )
            rows.append(down @ (act(gate @ row) * (up @ row)))
        found.append(torch.stack(rows))
    return found


def _difference(output: Tensor, expected: Tensor, *, quantile: float = 0.5) -> float:
    """Norm of the difference over the norm of the expected output [T, N], quantile over rows; infinite for other shapes or NaN."""
    if output.shape != expected.shape:
        return float("inf")
    found = float(((output - expected).norm(dim=1) / expected.norm(dim=1)).quantile(quantile, interpolation="lower"))
    return float("inf") if math.isnan(found) else found


def left_unquantized(artifact: Path, names: Iterable[str]) -> tuple[str, ...]:
    """Those of an engine's unquantized linears that the artifact holds quantized."""
    stored = stored_weights(artifact)
    planned = {name.removesuffix(".weight") for name in stored.names() if stored.format_of(name) is not None}
    found = []
    for name in names:
        prefix, _, last = name.rpartition(".")
        parts = {f"{prefix}.{part}" for part in _MERGED.get(last, (last,))}
        if parts & planned or any(one.startswith(f"{name}.") for one in planned if last == "experts"):
            found.append(name)
    return tuple(found)
