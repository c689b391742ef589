"""Writes the format `onnx`: optimum-onnx records the graph in an environment of its own, then the integers are put into it.

The graph is recorded from a plain checkpoint; each product with a quantized matrix then becomes onnxruntime's `MatMulNBits`, which
forms ``(q - z) * scale`` in float32.
"""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from quantlab.errors import ArtifactError
from quantlab.exports.onnx import block_of
from quantlab.exports.scripts import onnx_graph
from quantlab.exports.target import Contents, Progress
from quantlab.exports.writers import dense
from quantlab.exports.writers.writer import Written
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.integer import QuantizedMatrix

VARIABLE: Final = "QUANTLAB_ONNXRUNTIME_PYTHON"
"""The environment variable that names a Python with optimum-onnx."""


@dataclass(frozen=True)
class NBits:
    """A matrix for `MatMulNBits`.

    Attributes:
        bits: width of an integer, 4 or 8.
        block: columns that share a scale.
        q: [N, K / block, block · bits / 8] uint8; integers are unsigned, of two in a byte the first in the low bits.
        scale: [N · K / block] float32.
        zero: [N · ceil(K / block · bits / 8)] uint8 zero points, packed like q row by row; None where they are 2^(bits - 1).
    """

    bits: int
    block: int
    q: Tensor
    scale: Tensor
    zero: Tensor | None


def write(artifact: StoredWeights, contents: Contents, directory: Path, progress: Progress) -> Written:
    """See `Write`; the tokenizer lies beside the graph.

    Raises:
        ArtifactError: no environment with optimum-onnx is named, or it could not record the graph.
    """
    python = os.environ.get(VARIABLE)
    if not python:
        raise ArtifactError(
            "the format onnx is written in an environment of its own",
            where=VARIABLE,
            found="not set",
            fix="install quantlab/evaluation/engines/requirements/onnxruntime.txt there and set the variable to its Python",
        )
    plain, integers = directory / "plain", directory / "integers.safetensors"
    plain.mkdir()
    dense.write(artifact, contents, plain, progress)
    tensors, layouts = _integers(artifact, contents)
    save_file(tensors, integers, metadata=layouts)
    done = subprocess.run(
        [python, onnx_graph.__file__, str(plain), str(integers), str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ArtifactError(
            "optimum-onnx cannot record the graph",
            where=python,
            found=(done.stderr.strip().splitlines() or ["no message"])[-1],
            fix="use the versions of quantlab/evaluation/engines/requirements/onnxruntime.txt",
        )
    told = json.loads(done.stdout.strip().splitlines()[-1])
    shutil.rmtree(plain)
    integers.unlink()
    return Written(_notes(contents), {}, told["versions"])


def n_bits(matrix: QuantizedMatrix, *, block: int) -> NBits:
    """The same integers and scales; scales are repeated where a block is smaller than the columns that share one."""
    rows, columns = matrix.q.shape
    repeated = columns // block // matrix.scale.shape[1]
    middle = 1 << (matrix.bits - 1)
    q = _packed((matrix.q.to(torch.int16) + middle).to(torch.uint8), bits=matrix.bits)
    scale = matrix.scale.to(torch.float32).repeat_interleave(repeated, dim=1)
    zero = None
    if matrix.zero is not None:
        unsigned = (matrix.zero.to(torch.int16) + middle).to(torch.uint8).repeat_interleave(repeated, dim=1)
        odd = unsigned.shape[1] % 2 if matrix.bits == 4 else 0
        zero = _packed(functional.pad(unsigned, (0, odd)), bits=matrix.bits).flatten()
    return NBits(matrix.bits, block, q.view(rows, columns // block, -1), scale.flatten(), zero)


def _packed(unsigned: Tensor, *, bits: int) -> Tensor:
    """[N, K] uint8 -> [N, K · bits / 8], the first of two nibbles in the low bits."""
    return unsigned if bits == 8 else unsigned[:, ::2] | unsigned[:, 1::2] << 4


def _integers(artifact: StoredWeights, contents: Contents) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of the file that `onnx_graph` reads."""
    tensors: dict[str, Tensor] = {}
    layouts: dict[str, str] = {}
    for weight in contents.quantized:
        matrix = artifact.read(weight.name)
        assert isinstance(matrix, QuantizedMatrix), "the target takes integers only"
        part = n_bits(matrix, block=block_of(weight))
        named = {"q": part.q, "scale": part.scale, "zero": part.zero}
        tensors |= {
            f"{weight.module}.{name}": tensor.contiguous() for name, tensor in named.items() if tensor is not None
        }
        layouts[weight.module] = f"{part.bits} {part.block} {weight.shape[1]} {weight.shape[0]}"
    return tensors, layouts


def _notes(contents: Contents) -> tuple[str, ...]:
    notes = ["the graph computes in float32 and forms (q - z) * scale there, without rounding it to 16 bits"]
    rounded = sum(weight.number is not None and weight.number.activations is not None for weight in contents.quantized)
    if rounded:
        notes.append(f"the inputs of {rounded} linears are quantized in the artifact and stay floating point here")
    return tuple(notes)
