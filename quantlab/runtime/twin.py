"""Twins: models with random weights and the shapes of a given model, for measuring speed.

The time of a step depends on the shapes and formats of the weights and on the number of experts that a batch of tokens
is routed to. Speed is therefore measured on a few layers of the width of the target model, generated in memory.
Integers are random bits. Floating-point weights have a random sign and mantissa and a fixed exponent, chosen so that
activations keep their magnitude from layer to layer and stay finite in float16, except for the logits of a tied head.
The values of a tensor depend on the seed and its name only, and embeddings are much larger than the outputs of the
layers, so 16-bit twins in all formats route almost all tokens to the same experts.
"""

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantlab.formats.compressed_tensors import QuantizationConfig
from quantlab.numerics.number_format import NumberFormat
from quantlab.runtime.banks.choice import Matrices
from quantlab.runtime.banks.dense import DenseMatrices
from quantlab.runtime.device import find_device
from quantlab.runtime.modules.attention import LATENT_SDPA
from quantlab.runtime.modules.build import build, config_of


def random_twin(
    config: Mapping[str, Any],
    quantization: QuantizationConfig | None,
    *,
    dtype: torch.dtype,
    seed: int,
    device: str | torch.device = "cpu",
    attention: str = LATENT_SDPA,
    layers: Sequence[int] = (),
) -> PreTrainedModel:
    """A model of `config` with random weights, held as `runtime.load` would hold them.

    Args:
        config: fields of config.json; its `quantization_config` is ignored.
        quantization: the quantized linears and their formats; None if nothing is quantized.
        dtype: dtype of activations and unquantized weights.
        seed: seed of the weights; CPU and CUDA generate different values from it.
        device: device on which the weights are generated and kept.
        attention: attention implementation, one of `IMPLEMENTATIONS` of the runtime's attention module.
        layers: for each layer of the twin, the index of the layer of `quantization` whose formats it uses; its own if
            empty.

    Raises:
        DeviceError: the device or attention implementation is not available.
    """
    found = find_device(device)
    weights = _RandomWeights(quantization, torch.Generator(found), seed, layers)
    return build(config_of(config, where="the config of the twin"), weights, dtype=dtype, attention=attention)


_DRAWN_BYTES: Final = 8 * ((1 << 17) - 1)
"""Random bytes generated per tensor and then repeated: 8 times a prime, so that no two rows of a matrix start alike."""
_LAYER: Final = re.compile(r"\blayers\.(\d+)\.")
_EMBEDDING: Final = 256.0
"""Magnitude of the embeddings; the layers add values of about 1."""


_ROOT_MEAN_SQUARES: Final = {4: 4.6, 8: 74.0}
"""Root mean square of all signed integers of a number of bits."""


class _Float(NamedTuple):
    """Bit layout of a floating-point dtype: integer dtype of its size, mantissa bits, exponent bias."""

    integer: torch.dtype
    mantissa: int
    bias: int


_FLOATS: Final = {
    torch.float16: _Float(torch.int16, 10, 15),
    torch.bfloat16: _Float(torch.int16, 7, 127),
    torch.float32: _Float(torch.int32, 23, 127),
}


class _RandomWeights:
    def __init__(
        self, quantization: QuantizationConfig | None, generator: torch.Generator, seed: int, layers: Sequence[int]
    ) -> None:
        self.device = generator.device
        self._quantization = quantization
        self._generator = generator
        self._seed = seed
        self._layers = layers

    def format_of(self, name: str) -> NumberFormat | None:
        if self._quantization is None:
            return None
        known = _LAYER.sub(lambda found: f"layers.{self._layers[int(found[1])]}.", name) if self._layers else name
        return self._quantization.format_of(known.removesuffix(".weight"))

    def scale_dtype_of(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if len(shape) == 1:  # norms are ones, biases zeros
            made = torch.ones if name.endswith("weight") else torch.zeros
            return made(*shape, dtype=dtype, device=self.device)
        tensor = torch.empty(*shape, dtype=dtype, device=self.device)
        self._seed_for(name)
        self._randomize(tensor, size=_EMBEDDING if "embed" in name else shape[-1] ** -0.5)
        return tensor

    def fill(self, matrices: Matrices, index: int, names: Sequence[str], rows: Sequence[int] | None = None) -> None:
        columns = matrices.shape[2]
        self._seed_for(names[0])
        if isinstance(matrices, DenseMatrices):
            self._randomize(matrices.weight[index], size=columns**-0.5)
            return
        self._random_bits(matrices.integers(index))
        matrices.set_scales(index, columns**-0.5 / _ROOT_MEAN_SQUARES[matrices.number.bits])

    def _seed_for(self, name: str) -> None:
        """Seed the generator for the tensor `name`."""
        self._generator.manual_seed(self._seed + zlib.crc32(name.encode()))

    def _random_bits(self, tensor: Tensor) -> None:
        """Fill a contiguous tensor with random bytes; in a large tensor they repeat, because copying is faster."""
        self._draw(tensor)
        _repeat(tensor)

    def _draw(self, tensor: Tensor) -> None:
        flat = tensor.view(-1).view(torch.uint8)
        drawn = flat[:_DRAWN_BYTES]
        whole = drawn.numel() // 8 * 8
        if whole and flat.storage_offset() % 8 == 0:  # eight at a time
            drawn[:whole].view(torch.int64).random_(-(1 << 63), None, generator=self._generator)
        else:
            whole = 0
        drawn[whole:].random_(0, 256, generator=self._generator)

    def _randomize(self, tensor: Tensor, *, size: float) -> None:
        """Fill with values of random sign and magnitude in [s, 2s), where 1.5 s is about `size`.

        The highest random bits become the mantissa, so bfloat16 values are the float16 values rounded towards zero.
        """
        self._draw(tensor)
        layout = _FLOATS[tensor.dtype]
        width = 8 * tensor.element_size()
        bits = tensor.view(-1).view(layout.integer)[: _DRAWN_BYTES * 8 // width]
        exponent = round(math.log2(size / 1.5)) + layout.bias
        sign_and_mantissa = -(1 << (width - 1)) | ((1 << layout.mantissa) - 1)
        bits.bitwise_right_shift_(width - 1 - layout.mantissa).bitwise_and_(sign_and_mantissa)
        bits.bitwise_or_(exponent << layout.mantissa)
        _repeat(tensor)


def _repeat(tensor: Tensor) -> None:
    """Repeat the first `_DRAWN_BYTES` bytes over the rest of a tensor."""
    flat = tensor.view(-1).view(torch.uint8)
    repeats = flat.numel() // _DRAWN_BYTES
    if repeats:
        flat[_DRAWN_BYTES : repeats * _DRAWN_BYTES].view(-1, _DRAWN_BYTES).copy_(flat[:_DRAWN_BYTES])
        flat[repeats * _DRAWN_BYTES :].copy_(flat[: flat.numel() % _DRAWN_BYTES])
