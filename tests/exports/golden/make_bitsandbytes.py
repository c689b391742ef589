"""Makes `bitsandbytes.safetensors`: what bitsandbytes stores for the weights of `weights.py`. Run in an environment with bitsandbytes.

Double quantization is made by its portable kernels: its library for CPUs looks levels up in a table and is sometimes one
level off.
"""

import ctypes
from pathlib import Path

import torch
from safetensors.torch import save_file

_load = ctypes.cdll.LoadLibrary


def _without_library(name, *arguments):
    if "bitsandbytes" in str(name):
        raise OSError("portable kernels")
    return _load(name, *arguments)


ctypes.cdll.LoadLibrary = _without_library
import bitsandbytes  # noqa: E402
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit  # noqa: E402
from weights import weight  # noqa: E402


def nf4(matrix: torch.Tensor, *, double: bool) -> dict[str, torch.Tensor]:
    linear = Linear4bit(matrix.shape[1], matrix.shape[0], bias=False, quant_type="nf4", compress_statistics=double)
    linear.weight = Params4bit(matrix, requires_grad=False, quant_type="nf4", compress_statistics=double).to("cpu")
    return linear.state_dict()


def int8(matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    linear = Linear8bitLt(matrix.shape[1], matrix.shape[0], bias=False, has_fp16_weights=False)
    linear.weight = Int8Params(matrix, requires_grad=False, has_fp16_weights=False).to("cpu")
    return linear.state_dict()


def main() -> None:
    small, large = weight(25, 40), weight(136, 128)
    small[1, 0] = 0.5  # no row of zeros: bitsandbytes divides zero by zero there
    parts = {
        "int8": int8(small),
        "nf4": nf4(small, double=False),
        "nf4-double": nf4(large, double=True),
    }
    tensors = {f"{name}.{part}": tensor.contiguous() for name, of in parts.items() for part, tensor in of.items()}
    metadata = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__}
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()},
        Path(__file__).with_name("bitsandbytes.safetensors"),
        metadata=metadata,
    )


main()
