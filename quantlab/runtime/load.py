"""Load an artifact or checkpoint as a transformers model that computes on packed weights.

transformers expands a compressed-tensors artifact to 16 bits, misreads FP8 blocks at ragged edges, and does not read
INT8 experts at all. This module keeps transformers' model code (attention, cache, generate) and replaces linears, MLPs
and experts by modules that hold the stored integers. Tensors are read one at a time, so peak memory is the model plus
the weights of one matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from quantlab.architectures.detect import of_model_type
from quantlab.checkpoint.index import Checkpoint, open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.checkpoint.tied import check_tied_head
from quantlab.errors import ArtifactError, CheckpointError
from quantlab.formats.dtype import dtype_of
from quantlab.formats.stored import StoredWeights
from quantlab.formats.understood import understood
from quantlab.numerics.integer import QuantizedMatrix, concatenated
from quantlab.numerics.number_format import NumberFormat
from quantlab.runtime.banks.choice import Matrices
from quantlab.runtime.banks.dense import DenseMatrices
from quantlab.runtime.device import check_free_memory, find_device, free_bytes, is_out_of_memory, out_of_memory
from quantlab.runtime.modules.attention import LATENT_SDPA
from quantlab.runtime.modules.build import DTYPES, WeightSource, build, config_of

Progress = Callable[[int, int], None]

_WORK_BYTES: Final = 8
"""Bytes of temporary memory per weight of a matrix while it is unpacked and laid out."""


def load(
    artifact: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attention: str = LATENT_SDPA,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Load an artifact of quantlab, another tool's compressed-tensors or GPTQ checkpoint, or a plain or FP8 checkpoint.

    Args:
        artifact: directory of the artifact.
        dtype: dtype of activations and unquantized weights; None for the artifact's own, which config.json names, else
            that of most of its weights (FP8 counts as bfloat16).
            With float32, results are those of the dequantized weights; with 16 bits, packed products round activations
            to bfloat16.
        device: "cpu", "cuda" or "cuda:1"; tensors are copied there as stored and unpacked there.
        attention: attention implementation, one of `IMPLEMENTATIONS` of the runtime's attention module.
        progress: called after each weight with the number of weights read and their total; if None, a progress bar is
            shown if standard error is a terminal.

    Returns:
        The transformers model in evaluation mode, without gradients and without multi-token-prediction layers.

    Raises:
        ArtifactError: a tensor is missing, left over or of the wrong shape, or the model type or dtype is unknown.
        CheckpointError: the files are damaged, or hold a head that differs from the embeddings config.json ties it to.
        DeviceError: the device or attention implementation is not available, or the model does not fit into memory.
    """
    found = find_device(device)
    with _progress_bar(f"loading {artifact.name}") if progress is None else nullcontext(progress) as called:
        config, weights = _artifact(artifact, found, called)
        check_tied_head(weights.checkpoint)
        chosen = weights.dtype if dtype is None else dtype
        needed = weights.needed_bytes(chosen)
        check_free_memory(needed, found, where=str(artifact))
        model = _build_or_none(config, weights, dtype=chosen, attention=attention)
    if model is None:
        raise out_of_memory(needed, free_bytes(found), found, where=str(artifact))
    weights.check_all_taken()
    model.generation_config = read_generation_config(artifact) or model.generation_config
    # generate() compiles a model that has a static cache, and torch.compile cannot trace the kernels
    model.generation_config.disable_compile = True
    return model


def _artifact(artifact: Path, device: torch.device, progress: Progress) -> tuple[PreTrainedConfig, "_ArtifactWeights"]:
    """The config and the weights of an artifact; only headers are read so far."""
    checkpoint = understood(open_checkpoint(artifact))
    config = config_of(checkpoint.config, where=str(artifact / "config.json"))
    return config, _ArtifactWeights(StoredWeights(Reader(checkpoint), device=device), config, progress)


def read_generation_config(directory: Path) -> GenerationConfig | None:
    """The generation settings of a checkpoint; None if it has no generation_config.json.

    Raises:
        CheckpointError: transformers cannot read the file.
    """
    path = directory / "generation_config.json"
    if not path.is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(directory)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "the generation settings cannot be read",
            where=str(path),
            found=next(iter(str(error).splitlines()), type(error).__name__)[:200],
            fix="write a JSON object there, or remove the file",
        ) from error


def needed_bytes(artifact: Path, dtype: torch.dtype) -> int:
    """Bytes of device memory that `load` needs for an artifact, computed from its headers.

    They are the weights plus the temporary memory for unpacking the largest matrix.

    Args:
        artifact: directory of the artifact.
        dtype: dtype of activations and unquantized weights.

    Raises:
        ArtifactError: the model type is unknown.
        CheckpointError: the files are damaged.
    """
    return _artifact(artifact, torch.device("cpu"), lambda *_: None)[1].needed_bytes(dtype)


@contextmanager
def _progress_bar(what: str) -> Iterator[Progress]:
    """A progress bar of the weights read."""
    console = Console(stderr=True)
    with Bar(*Bar.get_default_columns(), console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _build_or_none(
    config: PreTrainedConfig, weights: WeightSource, *, dtype: torch.dtype, attention: str
) -> PreTrainedModel | None:
    """The model; None if memory ran out.

    The exception is not passed on, because its traceback would keep the loaded tensors alive.
    """
    try:
        return build(config, weights, dtype=dtype, attention=attention)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


class _ArtifactWeights:
    """The weights of a checkpoint directory; each can be taken once."""

    def __init__(self, stored: StoredWeights, config: PreTrainedConfig, progress: Progress) -> None:
        self._stored = stored
        self._progress = progress
        self._where = str(stored.reader.checkpoint.directory)
        architecture = of_model_type(config.model_type)
        assert architecture is not None, "a config of `config_of`"
        fields = architecture.read(config.to_dict())
        self._left = dict.fromkeys(
            name
            for name in stored.names()
            # older llama checkpoints store the frequencies of the rotary embedding
            if not name.endswith(".rotary_emb.inv_freq")
            and not architecture.outside_the_model(name, fields)
            and stored.elements(name)
        )
        self._total = len(self._left)

    @property
    def checkpoint(self) -> Checkpoint:
        return self._stored.reader.checkpoint

    @property
    def device(self) -> torch.device:
        return self._stored.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the artifact: that of config.json, else that of its weights."""
        return DTYPES[dtype_of(self.checkpoint)]

    def needed_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the weights as the model holds them, plus the temporary memory for unpacking the largest matrix."""
        sizes = [self._stored.held_bytes(name, dtype) for name in self._left]
        return sum(size for size, _ in sizes) + _WORK_BYTES * max((elements for _, elements in sizes), default=0)

    def format_of(self, name: str) -> NumberFormat | None:
        return self._stored.format_of(name)

    def scale_dtype_of(self, name: str) -> torch.dtype:
        return self._stored.scale_dtype_of(name)

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = self._take(name)
        if isinstance(tensor, QuantizedMatrix):
            raise ArtifactError(
                "the artifact quantizes a weight that the runtime supports only in floating point",
                where=f"{self._where}, {name}",
                found=f"{tensor.bits}-bit integers",
                fix="exclude it from quantization: only linears and experts may be quantized",
            )
        self._check_shape(name, tensor.shape, shape)
        return tensor.to(dtype)

    def fill(self, matrices: Matrices, index: int, names: Sequence[str], rows: Sequence[int] | None = None) -> None:
        columns = matrices.shape[2]
        sizes = rows or [matrices.shape[1] // len(names)] * len(names)
        if isinstance(matrices, DenseMatrices):
            for part, name in zip(torch.split(matrices.weight[index], list(sizes)), names, strict=True):
                part.copy_(self.tensor(name, part.shape, part.dtype))
            return
        parts = []
        for name, size in zip(names, sizes, strict=True):
            matrix = self._take(name)
            assert isinstance(matrix, QuantizedMatrix), f"{name} is quantized"
            self._check_shape(name, matrix.q.shape, (size, columns))
            parts.append(matrix)
        matrix = concatenated(parts)
        copies = matrices.number.groups(columns) // matrix.scale.shape[1]
        zero = None if matrix.zero is None else matrix.zero.repeat_interleave(copies, dim=1)
        scale = matrix.scale.repeat_interleave(copies, dim=1)
        matrices.fill(index, QuantizedMatrix(matrix.q, scale, matrix.bits, zero))

    def _take(self, name: str) -> Tensor | QuantizedMatrix:
        if name not in self._left:
            raise ArtifactError(
                "a tensor of the model is missing",
                where=self._where,
                found=f"no {name}",
                fix="create or download the artifact again",
            )
        del self._left[name]
        weight = self._stored.read(name)
        self._progress(self._total - len(self._left), self._total)
        return weight

    def _check_shape(self, name: str, found: Sequence[int], expected: Sequence[int]) -> None:
        if tuple(found) != tuple(expected):
            raise ArtifactError(
                "the shape of a tensor does not match the config",
                where=f"{self._where}, {name}",
                found=f"{list(found)}, the config requires {list(expected)}",
                fix="use the config.json the weights were released with",
            )

    def check_all_taken(self) -> None:
        """Raise ArtifactError if the checkpoint holds a tensor that the model does not use.

        Biases that are all zeros are accepted: older tools store one for every quantized linear.
        """
        names = [
            name
            for name in self._left
            if not name.endswith(".bias") or self._stored.read_dense(name, torch.float32).any()
        ]
        if names:
            raise ArtifactError(
                "the artifact contains tensors that the model does not use",
                where=self._where,
                found=", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
                fix="use the config.json the weights were released with",
            )
