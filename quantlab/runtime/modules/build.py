"""Build a model from a config: instantiate transformers' model on the meta device, then fill or replace its modules.

Weights come from a small protocol, so the same code builds a model from files and a twin with random weights:
measurements of the twin hold for the loaded model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from quantlab.architectures.detect import ARCHITECTURES, of_model_type
from quantlab.architectures.layer import GATED_MLP, LatentAttention
from quantlab.errors import ArtifactError, CheckpointError
from quantlab.numerics.number_format import INT4, NumberFormat, group
from quantlab.runtime.banks.choice import Matrices, QuantizedMatrices, quantized_matrices
from quantlab.runtime.banks.dense import DenseMatrices
from quantlab.runtime.inventory import mark_unpacked
from quantlab.runtime.modules.attention import LATENT_SDPA, pass_latents_through, register
from quantlab.runtime.modules.experts import Experts
from quantlab.runtime.modules.linear import (
    DenseLinear,
    EmptyMLP,
    GatedMLP,
    Norm,
    PackedLinear,
    StackedLinear,
    StackedLinearPart,
    dense_linear,
)

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


CONFIG_ERRORS: Final = (
    StrictDataclassError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Exceptions that transformers raises for an invalid config."""
FUSED_EXPERTS: Final = "gate_up_proj"
"""Parameter [E, 2I, H] in which transformers, for every family, holds gate and up of all experts of a layer."""
_INT4_GROUPS: Final = (128, 64, 32)


class WeightSource(Protocol):
    """Source of a model's weights, by their names in the checkpoint (``….weight``)."""

    def format_of(self, name: str) -> NumberFormat | None:
        """The number format of the weight `name`, None if it is not quantized."""

    def scale_dtype_of(self, name: str) -> torch.dtype:
        """The dtype of the scales of the quantized weight `name`."""

    @property
    def device(self) -> torch.device:
        """Device of the returned weights, and therefore of the model."""

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A floating-point tensor."""

    def fill(self, matrices: Matrices, index: int, names: Sequence[str], rows: Sequence[int] | None = None) -> None:
        """Set matrix `index` of a bank to the weights `names`, stacked row-wise.

        `rows` are the numbers of rows of the weights; None if all have the same number.
        """


def config_of(fields: Mapping[str, Any], *, where: str) -> PreTrainedConfig:
    """The transformers config for the fields of a config.json, without its quantization and its dtype.

    Raises:
        ArtifactError: the runtime does not support the model type, or the fields are invalid.
    """
    model_type = fields.get("model_type")
    architecture = of_model_type(model_type)
    if architecture is None:
        raise ArtifactError(
            "the runtime does not support this model",
            where=f"{where}, model_type",
            found=repr(model_type),
            fix="supported: " + ", ".join(known.name for known in ARCHITECTURES),
        )
    try:
        return CONFIG_MAPPING[architecture.name].from_dict(architecture.model_fields(fields))
    except (CheckpointError, *CONFIG_ERRORS) as error:
        raise invalid_config(error, where=where) from error


def build(
    config: PreTrainedConfig, weights: WeightSource, *, dtype: torch.dtype, attention: str = LATENT_SDPA
) -> PreTrainedModel:
    """A model of `config` in evaluation mode on the device of the weights; takes every parameter from `weights` once.

    Args:
        config: without quantization.
        weights: source of the parameters.
        dtype: dtype of activations and unquantized weights.
        attention: attention implementation, one of `IMPLEMENTATIONS` of the runtime's attention module.

    Raises:
        ArtifactError: the config is invalid.
        DeviceError: the attention implementation is not available.
    """
    register(attention)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except CONFIG_ERRORS as error:
        raise invalid_config(error, where=f"the config of a {config.model_type}") from error
    tied = bool(config.tie_word_embeddings)
    architecture = of_model_type(config.model_type)
    assert architecture is not None, "a config of `config_of`"
    same_input = architecture.same_input("attention", config.to_dict())
    with torch.no_grad():
        _materialize(model, "", weights, dtype=dtype, skip={"lm_head"} if tied else set(), same_input=same_input)
        if tied:
            model.lm_head = DenseLinear(model.model.embed_tokens.weight, None)
    if isinstance(architecture.attention, LatentAttention):
        for layer in model.model.layers:
            pass_latents_through(layer.get_submodule(architecture.halves[0].module))
    left = [name for name, tensor in _tensors(model) if tensor.is_meta]
    assert not left, f"never filled: {left}"
    return model.eval().requires_grad_(False)


def invalid_config(error: Exception, *, where: str) -> ArtifactError:
    return ArtifactError(
        "transformers cannot build a model from the config",
        where=where,
        found=" ".join(f"{type(error).__name__}: {error}".split())[:200],
        fix="use the config.json the weights were released with",
    )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _materialize(
    module: nn.Module,
    path: str,
    weights: WeightSource,
    *,
    dtype: torch.dtype,
    skip: set[str],
    same_input: Sequence[str],
) -> None:
    """Fill the tensors of a module, then replace or fill its children.

    Args:
        module: a module of transformers.
        path: name of the module in the model.
        weights: source of the tensors.
        dtype: dtype of activations and unquantized weights.
        skip: paths of modules that stay unchanged.
        same_input: names of the linears in an attention module that read its input.
    """
    prefix = f"{path}." if path else ""
    for name, parameter in list(module.named_parameters(recurse=False)):
        filled = weights.tensor(prefix + name, parameter.shape, dtype)
        setattr(module, name, nn.Parameter(filled, requires_grad=False))
    for name, buffer in list(module.named_buffers(recurse=False)):
        # the only stored buffer is the router's e_score_correction_bias, which engines add in float32
        module.register_buffer(name, weights.tensor(prefix + name, buffer.shape, torch.float32))
    for name, part in _stacked_linears(module, path, weights, dtype=dtype, names=same_input).items():
        setattr(module, name, part)
    for name, child in list(module.named_children()):
        if prefix + name not in skip and not isinstance(child, StackedLinearPart):
            replacement = _replacement(child, prefix + name, weights, dtype=dtype)
            if replacement is None:
                _materialize(child, prefix + name, weights, dtype=dtype, skip=skip, same_input=same_input)
            else:
                setattr(module, name, replacement)
    for name, child in list(module.named_children()):
        if type(child).__name__.endswith("RMSNorm"):
            setattr(module, name, Norm(child))


def _replacement(module: nn.Module, path: str, weights: WeightSource, *, dtype: torch.dtype) -> nn.Module | None:
    """The module that replaces a transformers module; None if it is kept."""
    if isinstance(getattr(module, FUSED_EXPERTS, None), nn.Parameter):
        return _experts(module, path, weights, dtype=dtype)
    if all(_plain_linear(module, name) for name in (GATED_MLP.gate, GATED_MLP.up, GATED_MLP.down)):
        if not module.get_parameter(f"{GATED_MLP.gate}.weight").numel():
            return EmptyMLP()
        if _fit_one_bank([f"{path}.{GATED_MLP.gate}.weight", f"{path}.{GATED_MLP.up}.weight"], weights):
            return _gated_mlp(module, path, weights, dtype=dtype)
        return None
    if isinstance(module, nn.Linear):
        return _linear(module, path, weights, dtype=dtype)
    if any(buffer.is_meta for buffer in module.buffers(recurse=False)) and hasattr(module, "rope_type"):
        return type(module)(config=module.config).to(weights.device)  # rotary frequencies are computed, never stored
    return None


def _stacked_linears(
    module: nn.Module, path: str, weights: WeightSource, *, dtype: torch.dtype, names: Sequence[str]
) -> dict[str, StackedLinearPart]:
    """The linears `names` of an attention module, which read the same input, stacked into one matrix.

    Empty if they are not stacked. They are stacked only on CUDA, to save kernel launches.
    """
    linears = [linear for name in names if isinstance(linear := getattr(module, name, None), nn.Linear)]
    of_names = [f"{path}.{name}.weight" for name in names]
    if (
        weights.device.type != "cuda"
        or len(linears) != len(names)
        or len({linear.bias is None for linear in linears}) != 1
        or _packed_format(of_names[0], weights) is None
        or not _fit_one_bank(of_names, weights)
    ):
        return {}
    sizes = [linear.out_features for linear in linears]
    bank = _bank(of_names[0], (1, sum(sizes), linears[0].in_features), weights, dtype=dtype)
    weights.fill(bank, 0, of_names, rows=sizes)
    biases = [
        weights.tensor(f"{path}.{name}.bias", linear.bias.shape, dtype)
        for name, linear in zip(names, linears, strict=True)
        if linear.bias is not None
    ]
    assert isinstance(bank, QuantizedMatrices), "the weights are integers"
    stack = StackedLinear(PackedLinear(bank, torch.cat(biases) if biases else None), sizes)
    return {name: StackedLinearPart(stack, index) for index, name in enumerate(names)}


def _plain_linear(module: nn.Module, name: str) -> bool:
    child = getattr(module, name, None)
    return isinstance(child, nn.Linear) and child.bias is None


def _fit_one_bank(names: Sequence[str], weights: WeightSource) -> bool:
    """Whether one bank can hold the weights: one integer format and one dtype of scales, or all floating point."""
    formats = {_packed_format(name, weights) for name in names}
    return formats == {None} or (len(formats) == 1 and len({weights.scale_dtype_of(name) for name in names}) == 1)


def _packed_format(name: str, weights: WeightSource) -> NumberFormat | None:
    """The format of a weight that the model holds as integers; None if it holds the weight in floating point."""
    number = weights.format_of(name)
    return number if number is not None and number.is_integer else None


def _bank(name: str, shape: tuple[int, int, int], weights: WeightSource, *, dtype: torch.dtype) -> Matrices:
    """An uninitialized bank [E, N, K] for the weight `name`."""
    number = _packed_format(name, weights)
    if number is None:
        with weights.device:
            return _with_reasons(DenseMatrices(*shape, dtype=dtype), name, weights)
    held = held_format(number, shape[2])
    return quantized_matrices(held, *shape, scale_dtype=weights.scale_dtype_of(name), device=weights.device)


M = TypeVar("M", bound=nn.Module)


def _with_reasons(module: M, name: str, weights: WeightSource) -> M:
    """Return a module that holds a weight in floating point; if the weight is quantized, record the reasons on it."""
    number = weights.format_of(name)
    if number is not None:
        mark_unpacked(module, number, weights.device.type)
    return module


def held_format(number: NumberFormat, columns: int) -> NumberFormat:
    """The format that the model holds a matrix in.

    int4 with one scale per row is held as int4 with groups of columns that repeat this scale, because kernels require
    groups. The values are the same; groups of 128 add 3 % to the bytes. Other formats are unchanged.
    """
    if number.element != INT4 or not number.by_row or number.group_size is not None:
        return number
    size = next((size for size in _INT4_GROUPS if columns % size == 0), None)
    return number if size is None else replace(number, granularity=group(size))


def _linear(module: nn.Linear, path: str, weights: WeightSource, *, dtype: torch.dtype) -> nn.Module:
    shape = (module.out_features, module.in_features)
    bias = None if module.bias is None else weights.tensor(f"{path}.bias", module.bias.shape, dtype)
    name = f"{path}.weight"
    matrices = None if _packed_format(name, weights) is None else _bank(name, (1, *shape), weights, dtype=dtype)
    if not isinstance(matrices, QuantizedMatrices):
        weight = weights.tensor(name, shape, dtype)
        # attention multiplies by slices of this matrix, which therefore stays row-major
        linear = (
            DenseLinear(nn.Parameter(weight, requires_grad=False), bias)
            if path.endswith(LatentAttention.LATENT_UP)
            else dense_linear(weight, bias)
        )
        return _with_reasons(linear, name, weights)
    weights.fill(matrices, 0, [name])
    return PackedLinear(matrices, bias)


def _gated_mlp(module: nn.Module, path: str, weights: WeightSource, *, dtype: torch.dtype) -> GatedMLP:
    hidden, width = module.get_parameter(f"{GATED_MLP.down}.weight").shape
    gate, up, down = (f"{path}.{name}.weight" for name in (GATED_MLP.gate, GATED_MLP.up, GATED_MLP.down))
    gate_up_bank = _bank(gate, (1, 2 * width, hidden), weights, dtype=dtype)
    down_bank = _bank(down, (1, hidden, width), weights, dtype=dtype)
    weights.fill(gate_up_bank, 0, [gate, up])
    weights.fill(down_bank, 0, [down])
    return GatedMLP(gate_up_bank, down_bank, module.get_submodule(GATED_MLP.activation))


def _experts(module: nn.Module, path: str, weights: WeightSource, *, dtype: torch.dtype) -> Experts:
    count, double_width, hidden = module.get_parameter(FUSED_EXPERTS).shape
    linears = {"gate": GATED_MLP.gate, "up": GATED_MLP.up, "down": GATED_MLP.down}
    names = {kind: [f"{path}.{index}.{name}.weight" for index in range(count)] for kind, name in linears.items()}
    if not (_fit_one_bank(names["gate"] + names["up"], weights) and _fit_one_bank(names["down"], weights)):
        raise ArtifactError(
            "the experts of a layer have different number formats",
            where=path,
            found=", ".join(
                sorted(
                    {str(getattr(weights.format_of(name), "name", None)) for kind in names.values() for name in kind}
                )
            ),
            fix="use one scheme for all experts of a layer, as serving engines require",
        )
    gate_up_bank = _bank(names["gate"][0], (count, double_width, hidden), weights, dtype=dtype)
    down_bank = _bank(names["down"][0], (count, hidden, double_width // 2), weights, dtype=dtype)
    for index, (gate, up, down) in enumerate(zip(names["gate"], names["up"], names["down"], strict=True)):
        weights.fill(gate_up_bank, index, [gate, up])
        weights.fill(down_bank, index, [down])
    return Experts(gate_up_bank, down_bank, module.get_submodule(GATED_MLP.activation))
