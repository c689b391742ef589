"""The formats of bitsandbytes, as transformers loads them: `bnb-int8`, `bnb-nf4`, `bnb-nf4-double`. Does not import torch.

Each is a word of its own, as the numbers differ and not only the container. `bnb-int8` is LLM.int8(): the integers of a
scheme with int8 rows as they are, or 16-bit weights rounded as bitsandbytes rounds them. NF4 is no scheme of quantlab, so
that its numbers can only be made from 16-bit weights; `-double` rounds the scales of blocks as well. The head stays
16 bits, as in what bitsandbytes makes by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from quantlab.architectures.architecture import QUANTIZABLE_ROLES
from quantlab.formats.contents import Contents, Weight
from quantlab.formats.layout import StoredTensor
from quantlab.numerics.number_format import ROW
from quantlab.recipe.schemes import FormatName

BLOCK = 64
"""Weights of NF4 that share a magnitude."""
NESTED_BLOCK = 256
"""Magnitudes that share a magnitude in double quantization."""
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Bitsandbytes:
    """A format of bitsandbytes.

    Attributes:
        name: see `Target`.
        description: see `Target`.
        bits: 8 for LLM.int8(), 4 for NF4.
        double: whether the magnitudes of blocks are quantized, too.
    """

    name: FormatName
    description: str
    bits: int
    double: bool = False

    def refuses(self, contents: Contents) -> str | None:
        """See `Target`."""
        if contents.architecture.mixture is not None:
            return (
                "routed experts: transformers 5 reads bitsandbytes' weights into linears only, and its experts are "
                "parameters of three dimensions, for which it expects 16-bit weights"
            )
        for weight in contents.quantized:
            reason = self._refuses(weight)
            if reason is not None:
                return f"{weight.name}: {reason}"
        return None if self.converted(contents) else "no linear is there to be written with 8 or 4 bits"

    def _refuses(self, weight: Weight) -> str | None:
        number = weight.number
        assert number is not None
        if self.bits == 4:
            return f"NF4 is made from 16-bit weights; from {number.name} they would be rounded twice"
        if not number.is_integer or number.bits != 8:
            return f"LLM.int8() stores int8; {number.name} would be rounded once more"
        if number.granularity != ROW or not number.symmetric:
            return f"LLM.int8() has one scale per row and no zero points; {number.name} has others"
        return None

    def converted(self, contents: Contents) -> tuple[Weight, ...]:
        """The weights written with 8 or 4 bits: the quantized ones; in an artifact without any, the linears but the head."""
        return contents.quantized or tuple(
            weight for weight in contents.weights if weight.role in QUANTIZABLE_ROLES and len(weight.shape) == 2
        )

    def description_in_config(self, contents: Contents) -> dict[str, object]:
        """The `quantization_config` of config.json.

        The integers of a scheme with quantized activations are multiplied with activations rounded by the same rule
        (threshold 0); in the others LLM.int8() leaves channels beyond 6 in float16.
        """
        converted = self.converted(contents)
        kept = {"lm_head"} | {
            weight.module
            for weight in contents.weights
            if weight.role in QUANTIZABLE_ROLES and len(weight.shape) == 2 and weight not in converted
        }
        return {
            "_load_in_4bit": self.bits == 4,
            "_load_in_8bit": self.bits == 8,
            "bnb_4bit_compute_dtype": compute_dtype(converted) if self.bits == 4 else "float32",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "nf4" if self.bits == 4 else "fp4",
            "bnb_4bit_use_double_quant": self.double,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": sorted(kept),
            "llm_int8_threshold": 0.0 if self.rounds_all_activations(contents) else 6.0,
            "load_in_4bit": self.bits == 4,
            "load_in_8bit": self.bits == 8,
            "quant_method": "bitsandbytes",
        }

    def rounds_all_activations(self, contents: Contents) -> bool:
        """Whether the artifact's scheme quantizes the inputs of every converted linear."""
        return all(
            weight.number is not None and weight.number.activations is not None for weight in self.converted(contents)
        )

    def stored_tensors(self, weight: Weight) -> tuple[StoredTensor, ...]:
        """The tensors of a converted weight, in the order they are written."""
        rows, columns = weight.shape
        if self.bits == 8:
            module = weight.module
            return (
                (weight.name, "I8", (rows, columns)),
                (f"{module}.SCB", "F32", (rows,)),
                (f"{module}.weight_format", "U8", ()),
            )
        blocks = -(-rows * columns // BLOCK)
        magnitudes: tuple[StoredTensor, ...] = ((f"{weight.name}.absmax", "F32", (blocks,)),)
        if self.double:
            magnitudes = (
                (f"{weight.name}.absmax", "U8", (blocks,)),
                (f"{weight.name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),)),
                (f"{weight.name}.nested_quant_map", "F32", (256,)),
            )
        state = quant_state(weight, mean=0.0 if self.double else None)
        return (
            (weight.name, "U8", (-(-rows * columns // 2), 1)),
            *magnitudes,
            (f"{weight.name}.quant_map", "F32", (16,)),
            (f"{weight.name}.quant_state.bitsandbytes__nf4", "U8", (len(state),)),
        )


def compute_dtype(converted: Sequence[Weight]) -> str:
    """The dtype of products with NF4: that of the weights (scales of integers are of the artifact's dtype, too)."""
    return _DTYPES[converted[0].dtype]


def quant_state(weight: Weight, *, mean: float | None) -> bytes:
    """The JSON by which bitsandbytes reads an NF4 weight.

    Args:
        weight: the weight.
        mean: the mean that double quantization subtracts from the magnitudes, positive; None without double quantization.
            It takes the same number of characters whatever its value: sizes are known before any weight is read.
    """
    fields = [
        '"quant_type": "nf4"',
        f'"blocksize": {BLOCK}',
        f'"dtype": "{_DTYPES[weight.dtype]}"',
        f'"shape": [{weight.shape[0]}, {weight.shape[1]}]',
    ]
    if mean is not None:
        fields += [f'"nested_blocksize": {NESTED_BLOCK}', '"nested_dtype": "float32"', f'"nested_offset": {mean:.17e}']
    return ("{" + ", ".join(fields) + "}").encode()


INT8 = Bitsandbytes("bnb-int8", "int8 rows of LLM.int8(), for transformers with bitsandbytes", 8)
NF4 = Bitsandbytes("bnb-nf4", "blocks of 64 in NF4, for transformers with bitsandbytes", 4)
NF4_DOUBLE = Bitsandbytes(
    "bnb-nf4-double", "NF4 whose scales are quantized, too: 4.13 bits per weight instead of 4.5", 4, True
)
