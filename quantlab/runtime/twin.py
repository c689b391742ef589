"""A model of the right shape with random weights, for measuring speed.

The time of a step depends on the shapes and formats of the weights and on how many experts a batch of tokens hits, so speed
is measured at the width of the target model on a few layers that never existed on disk. Integers are random bits;
floating-point weights have a random sign and mantissa and one exponent, chosen so that activations keep their size from layer
to layer and stay finite in float16, but for the logits of a tied head. A tensor's numbers depend on the seed and its name
alone, and embeddings outweigh whatever the layers add to them: so in 16-bit twins of every format the same tokens go to the same
experts, almost all of them.
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
from quantlab.runtime.attention import LATENT_SDPA
from quantlab.runtime.device import find_device
from quantlab.runtime.matrices import DenseMatrices, Matrices
from quantlab.runtime.skeleton import build, config_of


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
    """A model of `config` with random weights, in the form `runtime.load` would hold them.

    Args:
        config: as in config.json; its own `quantization_config` is ignored.
        quantization: which linears are quantized, and how; None for none.
        dtype: of activations and unquantized weights.
        seed: of the weights; another kind of device makes other numbers of it.
        device: where they are made and stay.
        attention: its implementation, one of `quantlab.runtime.attention.IMPLEMENTATIONS`.
        layers: for each layer the number by which `quantization` knows it; its own if empty.

    Raises:
        DeviceError: there is no such device or attention here.
    """
    found = find_device(device)
    weights = _RandomWeights(quantization, torch.Generator(found), seed, layers)
    return build(config_of(config, where="the config of the twin"), weights, dtype=dtype, attention=attention)


_DRAWN: Final = 8 * ((1 << 17) - 1)
"""Bytes that are drawn for a tensor, about a megabyte: eight times a prime, so that no two rows of a matrix begin alike."""
_LAYER: Final = re.compile(r"\blayers\.(\d+)\.")
_EMBEDDING: Final = 256.0
"""Size of the embeddings, where layers add numbers of about 1."""


_ROOT_MEAN_SQUARES: Final = {4: 4.6, 8: 74.0}
"""Of all integers of so many bits."""


class _Float(NamedTuple):
    """Bits of a floating-point format."""

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
        self._begin(name)
        self._randomize(tensor, size=_EMBEDDING if "embed" in name else shape[-1] ** -0.5)
        return tensor

    def fill(self, matrices: Matrices, index: int, names: Sequence[str], rows: Sequence[int] | None = None) -> None:
        columns = matrices.shape[2]
        self._begin(names[0])
        if isinstance(matrices, DenseMatrices):
            self._randomize(matrices.weight[index], size=columns**-0.5)
            return
        self._random_bits(matrices.integers(index))
        matrices.set_scales(index, columns**-0.5 / _ROOT_MEAN_SQUARES[matrices.number.bits])

    def _begin(self, name: str) -> None:
        """Draw for this tensor from here on."""
        self._generator.manual_seed(self._seed + zlib.crc32(name.encode()))

    def _random_bits(self, tensor: Tensor) -> None:
        """Fill a contiguous tensor with random bytes; those of a large one repeat, since drawing is slower than copying."""
        self._draw(tensor)
        _repeat(tensor)

    def _draw(self, tensor: Tensor) -> None:
        flat = tensor.view(-1).view(torch.uint8)
        drawn = flat[:_DRAWN]
        whole = drawn.numel() // 8 * 8
        if whole and flat.storage_offset() % 8 == 0:  # eight at a time
            drawn[:whole].view(torch.int64).random_(-(1 << 63), None, generator=self._generator)
        else:
            whole = 0
        drawn[whole:].random_(0, 256, generator=self._generator)

    def _randomize(self, tensor: Tensor, *, size: float) -> None:
        """Fill with numbers of random sign and magnitude in [s, 2s), where 1.5 s is about `size`.

        The highest bits that are drawn become the mantissa: bfloat16 numbers are the float16 ones, rounded towards zero.
        """
        self._draw(tensor)
        layout = _FLOATS[tensor.dtype]
        width = 8 * tensor.element_size()
        bits = tensor.view(-1).view(layout.integer)[: _DRAWN * 8 // width]
        exponent = round(math.log2(size / 1.5)) + layout.bias
        sign_and_mantissa = -(1 << (width - 1)) | ((1 << layout.mantissa) - 1)
        bits.bitwise_right_shift_(width - 1 - layout.mantissa).bitwise_and_(sign_and_mantissa)
        bits.bitwise_or_(exponent << layout.mantissa)
        _repeat(tensor)


def _repeat(tensor: Tensor) -> None:
    """Copy what was drawn for a tensor over the rest of it."""
    flat = tensor.view(-1).view(torch.uint8)
    repeats = flat.numel() // _DRAWN
    if repeats:
        flat[_DRAWN : repeats * _DRAWN].view(-1, _DRAWN).copy_(flat[:_DRAWN])
        flat[repeats * _DRAWN :].copy_(flat[: flat.numel() % _DRAWN])
