"""Writes the format `onnx`: optimum-onnx records the graph in an environment of its own, then the integers are put into it.

The graph is recorded from a plain checkpoint; each product with a quantized matrix then becomes onnxruntime's `MatMulNBits`, which
forms ``(q - z) * scale`` in float32.
"""

import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from quantlab.engine_pythons import clean_environment, find_python, variable_of
from quantlab.errors import ArtifactError
from quantlab.exports.onnx import block_of
from quantlab.exports.scripts import onnx_graph
from quantlab.exports.target import Progress
from quantlab.exports.writers.checkpoint import carry_companions
from quantlab.exports.writers.dense import write_expanded
from quantlab.exports.writers.writer import Written
from quantlab.formats.contents import Contents
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.integer import QuantizedMatrix

ENGINE: Final = "onnxruntime"
"""The engine in whose environment optimum-onnx is."""
_DATA: Final = "model.onnx_data"


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
    """See `Write`; the tokenizer lies beside the graph. The whole model is in memory in float32: the graph is recorded from it.

    Raises:
        ArtifactError: as `Write`, or there is no environment with optimum-onnx, or it could not record the graph.
    """
    python = engine_python()
    with tempfile.TemporaryDirectory(dir=directory, prefix=".") as temporary:
        plain, integers = Path(temporary) / "plain", Path(temporary) / "integers.safetensors"
        plain.mkdir()
        write_expanded(artifact, plain)
        _write_integers(artifact, contents, integers, progress)
        versions = _record(python, plain, integers, directory)
    (directory / _DATA).chmod((directory / "model.onnx").stat().st_mode)  # onnx makes it readable by its owner alone
    carry_companions(contents.directory, directory)
    return Written(_notes(contents), versions=versions)


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


def engine_python() -> Path:
    """The Python with optimum-onnx.

    Raises:
        ArtifactError: there is none.
    """
    found = find_python(ENGINE, ENGINE, ENGINE)
    if found is not None and found.is_executable:
        return found.python
    raise ArtifactError(
        "the format onnx is written in an environment of its own, which is not there",
        where=variable_of(ENGINE),
        found=f"not set, and {ENGINE} is not installed"
        if found is None
        else f"{found.python} is not an executable file",
        fix=f"`quantlab engines install {ENGINE}`, or set the variable to a Python with optimum-onnx and onnxruntime",
    )


def _write_integers(artifact: StoredWeights, contents: Contents, path: Path, progress: Progress) -> None:
    """Write the file of integers that the script reads.

    Raises:
        ArtifactError, CheckpointError: it cannot be written, or a weight cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    layouts: dict[str, str] = {}
    for weight in contents.weights:
        if weight.number is not None:
            matrix = artifact.read(weight.name)
            assert isinstance(matrix, QuantizedMatrix), "the target takes integers only"
            part = n_bits(matrix, block=block_of(weight))
            named = {"q": part.q, "scale": part.scale, "zero": part.zero}
            tensors |= {f"{weight.module}.{name}": one.contiguous() for name, one in named.items() if one is not None}
            layouts[weight.module] = f"{part.bits} {part.block} {weight.shape[1]} {weight.shape[0]}"
        progress(weight.elements)
    try:
        save_file(tensors, path, metadata=layouts or None)  # an empty mapping makes a file that cannot be read
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            "a file of the export cannot be written", where=str(path), found=str(error), fix="free space on the disk"
        ) from error


def _record(python: Path, plain: Path, integers: Path, directory: Path) -> dict[str, str]:
    """Record the graph of a plain checkpoint with the integers in it; the versions of what did.

    Raises:
        ArtifactError: it failed.
    """
    command = [str(python), onnx_graph.__file__, str(plain), str(integers), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean_environment())
    if done.returncode:
        raise ArtifactError(
            "optimum-onnx cannot record the graph",
            where=str(python),
            found=(done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1],
            fix=f"use the versions that `quantlab engines install {ENGINE}` installs",
        )
    versions: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return versions


def _notes(contents: Contents) -> tuple[str, ...]:
    notes = ["the graph computes in float32 and forms (q - z) * scale there, without rounding it to 16 bits"]
    rounded = sum(weight.number is not None and weight.number.activations is not None for weight in contents.quantized)
    if rounded:
        notes.append(f"the inputs of {rounded} linears are quantized in the artifact and stay floating point here")
    return tuple(notes)
