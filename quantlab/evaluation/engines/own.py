"""What quantlab's runtime computes on the tokens that engines compute: the reference of every verdict."""

import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.errors import QuantlabError
from quantlab.evaluation.engines.text import JudgedText
from quantlab.evaluation.statistics import Floats
from quantlab.exports.writers.dense import write_expanded
from quantlab.files import read_json
from quantlab.formats.stored import StoredWeights
from quantlab.runtime.banks.choice import QuantizedMatrices
from quantlab.runtime.banks.dense import DenseMatrices
from quantlab.runtime.banks.groups import RowGroups
from quantlab.runtime.cache_arguments import cache_arguments
from quantlab.runtime.load import load
from quantlab.runtime.modules.experts import Experts
from quantlab.runtime.modules.linear import Activation


@dataclass(frozen=True)
class Computed:
    """Results on some texts.

    Attributes:
        nll: negative log-likelihood of every token but the first of each text, nats [N].
        top: most likely tokens [N].
        greedy: greedy continuations [P, G]; None if none were asked for.
    """

    nll: Floats
    top: NDArray[np.int64]
    greedy: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Rounded:
    """Where an engine rounds and quantlab's runtime does not.

    Attributes:
        group: channels that share a scale where the inputs of every quantized matrix are rounded to int8; None for no rounding.
        experts: of a checkpoint that is not quantized, dtype of the weights, inputs, products and gates of the routed experts.
        inputs: of a checkpoint that is not quantized, dtype of the inputs of all its matrices.
    """

    group: int | None = None
    experts: torch.dtype | None = None
    inputs: torch.dtype | None = None


@torch.inference_mode()
def compute(
    directory: Path,
    text: JudgedText,
    *,
    dtype: torch.dtype = torch.float32,
    prompts: tuple[tuple[int, ...], ...] = (),
    greedy_tokens: int = 0,
    where: Rounded | None = None,
) -> Computed:
    """Load a checkpoint with quantlab's runtime and compute the texts.

    Args:
        directory: an artifact or a source model.
        text: the tokens.
        dtype: dtype of the activations.
        prompts: token ids to continue greedily.
        greedy_tokens: tokens of each continuation.
        where: rounds where an engine does; None computes what the artifact says.

    Raises:
        QuantlabError: the checkpoint cannot be loaded.
    """
    model = load(directory, dtype=dtype)
    if where is not None:
        _round(model, where)
    nll, top = [], []
    for document in text.documents:
        ids = torch.tensor([document])
        logs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        nll.append(-logs.gather(1, ids[0, 1:, None])[:, 0].double().numpy())
        top.append(logs.argmax(-1).numpy())
    greedy = np.array([_continued(model, prompt, greedy_tokens) for prompt in prompts]) if prompts else None
    del model  # one model in memory at a time
    gc.collect()
    return Computed(np.concatenate(nll), np.concatenate(top), greedy)


def _continued(model: PreTrainedModel, prompt: tuple[int, ...], count: int) -> list[int]:
    """The greedy continuation of one prompt, not ended by an end token."""
    ids, cache, found = torch.tensor([prompt]), DynamicCache(config=model.config), []
    for _ in range(count):
        ids = model(input_ids=ids, **cache_arguments(cache)).logits[:, -1].argmax(-1, keepdim=True)
        found.append(int(ids))
    return found


@contextmanager
def without_rounded_activations(artifact: Path) -> Iterator[Path]:
    """The same weights under a config.json that does not round activations, as links in a temporary directory."""
    config = read_json(artifact / "config.json")
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = None
    with tempfile.TemporaryDirectory(prefix="quantlab-engine-") as temporary:
        directory = Path(temporary)
        for path in artifact.iterdir():
            if path.name != "config.json":
                (directory / path.name).symlink_to(path.absolute())
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield directory


@contextmanager
def multiplied_in_float32(artifact: Path) -> Iterator[Path]:
    """The same weights with integers and scales multiplied in float32, as a plain checkpoint in a temporary directory.

    quantlab's runtime multiplies them in the dtype of the scales, as engines do that serve in 16 bits. An engine that computes in
    float32 may multiply there, which keeps digits that 16 bits round away.
    """
    with tempfile.TemporaryDirectory(prefix="quantlab-engine-") as temporary:
        write_expanded(StoredWeights(Reader(open_checkpoint(artifact))), Path(temporary), exact=True)
        yield Path(temporary)


@contextmanager
def in_16_bits(source: Path) -> Iterator[tuple[Path, str]]:
    """A source model as engines read it: its own directory, or its weights expanded to 16 bits if they are quantized."""
    stored = StoredWeights(Reader(open_checkpoint(source)))
    if stored.description is None:
        yield source, ""
        return
    with tempfile.TemporaryDirectory(prefix="quantlab-engine-") as temporary:
        directory = Path(temporary)
        try:
            write_expanded(stored, directory)
        except OSError as error:
            raise QuantlabError(
                "the source model cannot be expanded to 16 bits",
                where=temporary,
                found=error.strerror,
                fix="free space, or set TMPDIR to a larger disk",
            ) from error
        for path in source.iterdir():
            if path.suffix in (".json", ".model", ".jinja", ".txt") and not (directory / path.name).exists():
                (directory / path.name).symlink_to(path.absolute())
        yield directory, f"the source model's {stored.method} weights were expanded to 16 bits"


def _round(model: PreTrainedModel, where: Rounded) -> None:
    if where.group is not None:
        _round_inputs(model, where.group)
    if where.experts is not None:
        _round_experts(model, where.experts)
    if where.inputs is not None:
        _round_to(model, where.inputs)


def _round_inputs(model: PreTrainedModel, group: int) -> None:
    """Let every bank of quantized matrices of a model read rounded inputs."""
    for module in model.modules():
        if isinstance(module, QuantizedMatrices):
            module.products = partial(_products_of_rounded, module.products, group)  # type: ignore[method-assign]


def _products_of_rounded(
    products: Callable[[Tensor, RowGroups], Tensor], group: int, x: Tensor, groups: RowGroups
) -> Tensor:
    return products(rounded(x, 127.0, group=group), groups)


def _round_to(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let every linear and bank of a float32 model read inputs rounded to a dtype."""
    for module in model.modules():
        if isinstance(module, DenseMatrices):
            module.products = partial(_products_of_cast, module.products, dtype)  # type: ignore[method-assign]
        elif isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (_in_steps_of(dtype, inputs[0]),))


def _products_of_cast(
    products: Callable[[Tensor, RowGroups], Tensor], dtype: torch.dtype, x: Tensor, groups: RowGroups
) -> Tensor:
    return products(_in_steps_of(dtype, x), groups)


class _Rounding(nn.Module):
    """Applies a function and rounds its result to a dtype, in the dtype of its input."""

    def __init__(self, function: Activation, dtype: torch.dtype) -> None:
        super().__init__()
        self._function, self._dtype = function, dtype

    def forward(self, x: Tensor) -> Tensor:
        return _in_steps_of(self._dtype, self._function(x))


def _round_experts(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let the routed experts of a float32 model compute as experts of another dtype: every operation rounds its result."""
    for module in model.modules():
        if not isinstance(module, Experts):
            continue
        for bank in (module.gate_up, module.down):
            assert isinstance(bank, DenseMatrices), "the checkpoint is not quantized"
            bank.weight.copy_(_in_steps_of(dtype, bank.weight))
            bank.products = partial(_rounded_products, bank.products, dtype)  # type: ignore[method-assign]
        module.act_fn = _Rounding(module.act_fn, dtype)


def _rounded_products(
    products: Callable[[Tensor, RowGroups], Tensor], dtype: torch.dtype, x: Tensor, groups: RowGroups
) -> Tensor:
    return _in_steps_of(dtype, products(_in_steps_of(dtype, x), groups))


def _in_steps_of(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x.to(dtype).to(x.dtype)


def rounded(x: Tensor, steps: float, *, group: int | None = None) -> Tensor:
    """Inputs [..., K] rounded to int8 and back: x is a multiple of absmax / steps, from -128 to 127.

    Args:
        x: float32.
        steps: 127 by the rule of quantlab and vLLM, 127.5 by that of transformers.
        group: channels that share a scale; None for all of a token.
    """
    parts = x.view(*x.shape[:-1], -1, group or x.shape[-1])
    scale = (parts.abs().amax(-1, keepdim=True) / steps).clamp_min(torch.finfo(torch.float32).tiny)
    return ((parts / scale).round().clamp(-128, 127) * scale).flatten(-2)
