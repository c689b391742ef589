"""The format `compressed-tensors` of an artifact in DeepSeek's own FP8 layout. Does not import torch.

The same FP8 values and float32 scales, called `weight_scale`, and described as the preset FP8_BLOCK of compressed-tensors 0.20.1
(`quantization/quant_scheme.py`), which llm-compressor writes: format `float-quantized`, weights of strategy `block` with
block_structure [128, 128], activations rounded at run time in groups of 128 channels. vLLM reads it in
`CompressedTensorsW8A8Fp8` (at 00cb05c) and, for experts, `CompressedTensorsW8A8Fp8MoEMethod` (at d938d56), whose scales are float32
parameters of ceil(N / 128) x ceil(K / 128); experts must have whole blocks.

Artifacts of the other schemes are in compressed-tensors themselves.
"""

from dataclasses import dataclass

from quantlab.formats.compressed_layouts import FLOAT
from quantlab.formats.compressed_tensors import QuantizationConfig, describe
from quantlab.formats.contents import DENSE, Contents, described_linears
from quantlab.recipe.schemes import FormatName


@dataclass(frozen=True)
class CompressedTensors:
    """See the module's docstring."""

    name: FormatName = "compressed-tensors"
    description: str = (
        "FP8 blocks as compressed-tensors stores them (float-quantized); artifacts of other schemes are in it already"
    )

    def refuses(self, contents: Contents) -> str | None:
        """See `Target`."""
        if contents.method in {DENSE, self.name}:
            return "the artifact is in it already: " + (
                "nothing is quantized" if contents.method == DENSE else self.name
            )
        reasons = ((weight, FLOAT.can_express(weight.number)) for weight in contents.quantized if weight.number)
        return next((f"{reason} ({weight.name})" for weight, reason in reasons if reason is not None), None)


TARGET = CompressedTensors()


def description(contents: Contents) -> QuantizationConfig:
    """The description of an artifact in this format, which does not refuse it."""
    return describe(described_linears(contents.weights, lambda _: FLOAT.name))
