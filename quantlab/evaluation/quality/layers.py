"""Differences between artifact and baseline by layer: the routers' choices of experts, and the error of each single layer.

**Routers** are recorded while the held-out text is scored. Their inputs include the errors of all previous layers, as in use.

**Layers** are measured separately. The baseline's hidden states between its layers are stored for a few short windows. The
artifact reads the same windows, but the input of each layer is replaced by the baseline's hidden states. The output of a layer
then differs only by the layer's own error, so a single damaged layer stands out.

Legend: T tokens, L layers, H hidden size, k experts per token.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlab.evaluation.quality.windows import HeldOut, Window
from quantlab.evaluation.statistics import Floats
from quantlab.runtime.modules.experts import Experts

LAYER_WINDOW = 64
"""Tokens of a window for the errors of layers."""
_FEWEST_WINDOWS = 5
_MOST_BYTES = 1 << 30
_STATES = "layers.npy"
_ROUTES = "routes.npz"


class RouteRecorder:
    """Records the experts that every token is routed to, during forward passes inside a `with` block.

    Args:
        model: from `runtime.load`.
        kept_experts: layer ("layer 3") -> source index of each expert, for layers whose experts were pruned.
    """

    def __init__(self, model: PreTrainedModel, kept_experts: Mapping[str, Sequence[int]]) -> None:
        self._experts = {
            f"layer {index}": module
            for index, layer in enumerate(model.base_model.layers)
            for module in layer.modules()
            if isinstance(module, Experts)
        }
        self._numbers = {name: torch.tensor(numbers) for name, numbers in kept_experts.items()}
        self._last: dict[str, Tensor] = {}
        self._parts: dict[str, list[NDArray[np.int16]]] = {name: [] for name in self._experts}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name, module in self._experts.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:  # noqa: ANN401 - torch's hooks are untyped
        def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            self._last[name] = args[1] if len(args) > 1 else kwargs["top_k_index"]

        return keep

    def record(self, positions: Tensor) -> None:
        """Record the experts of the tokens at `positions` [t] of the last batch, indices into its flattened rows."""
        for name, index in self._last.items():
            chosen = index[positions].cpu()
            if name in self._numbers:
                chosen = self._numbers[name][chosen]
            self._parts[name].append(chosen.sort(dim=-1).values.to(torch.int16).numpy())

    def by_layer(self) -> dict[str, NDArray[np.int16]]:
        """Layer -> expert indices of each token, sorted [T, k]."""
        return {name: np.concatenate(parts) for name, parts in self._parts.items() if parts}


def save_routes(directory: Path, routes: Mapping[str, NDArray[np.int16]]) -> None:
    """Store the baseline's experts of each token by layer."""
    with (directory / _ROUTES).open("wb") as file:
        np.savez(file, **dict(routes))  # type: ignore[arg-type]  # numpy takes arrays of any name


def same_experts(directory: Path, routes: Mapping[str, NDArray[np.int16]]) -> dict[str, NDArray[np.bool_]]:
    """Layer -> whether each token is routed to the same set of experts as in the baseline [T]; layers with equal k only."""
    with np.load(directory / _ROUTES) as kept:
        return {
            name: (kept[name] == chosen).all(axis=1)
            for name, chosen in routes.items()
            if name in kept and kept[name].shape == chosen.shape
        }


@dataclass(frozen=True)
class LayerErrors:
    """Squared errors of every layer, summed over each of W windows.

    Attributes:
        layers: names of the layers.
        difference: squared norm of the difference of the outputs [W, L].
        added: squared norm of what the baseline's layer adds to the residual stream [W, L].
        documents: document of each window [W].
        tokens: number of tokens of all windows.
    """

    layers: tuple[str, ...]
    difference: Floats
    added: Floats
    documents: NDArray[np.int64]
    tokens: int

    def faults(self) -> dict[str, str]:
        """Layer -> the reason why it has no finite error; empty if all have one."""
        found = {}
        for name, difference, added in zip(self.layers, self.difference.T, self.added.T, strict=True):
            if not np.isfinite(difference + added).all():
                found[name] = "its output on the baseline's hidden states is not finite"
            elif not added.all():
                found[name] = "in the baseline it adds nothing to its input, so its relative error is undefined"
        return found


def sample(held_out: HeldOut, model: PreTrainedModel, tokens: int) -> tuple[Window, ...]:
    """Beginnings of windows spread over the text, about `tokens` tokens, limited to 1 GiB of hidden states.

    Empty if there would be too few windows to represent the text.
    """
    config = model.config
    width = min(LAYER_WINDOW, len(held_out.windows[0].tokens))
    affordable = _MOST_BYTES // (4 * config.hidden_size * (config.num_hidden_layers + 1))
    count = min(tokens, affordable) // width
    long_enough = [window for window in held_out.windows if len(window.tokens) >= width]
    if min(count, len(long_enough)) < _FEWEST_WINDOWS:
        return ()
    chosen = long_enough[:: max(len(long_enough) // count, 1)][:count]
    return tuple(Window(window.document, window.tokens[:width], window.first, 0) for window in chosen)


@torch.inference_mode()
def save_states(directory: Path, model: PreTrainedModel, windows: Sequence[Window]) -> None:
    """Store the baseline's hidden states before each layer and after the last one [L + 1, W, t, H]."""
    if not windows:
        return
    layers = list(model.base_model.layers)
    states: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        states.append((args[0] if args else kwargs["hidden_states"]).float().cpu())

    def after(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        states.append(_tensor(output).float().cpu())

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(after))
    with _removed(handles):
        model.base_model(input_ids=_ids(windows).to(model.device), use_cache=False)
    np.save(directory / _STATES, torch.stack(states).numpy())


@torch.inference_mode()
def layer_errors(directory: Path, model: PreTrainedModel, windows: Sequence[Window]) -> LayerErrors | None:
    """The error of each layer on the baseline's hidden states; None if no states were stored or the models' shapes differ."""
    if not windows or not (directory / _STATES).is_file():
        return None
    states = np.load(directory / _STATES, mmap_mode="r")
    layers = list(model.base_model.layers)
    if states.shape != (len(layers) + 1, *_ids(windows).shape, model.config.hidden_size):
        return None
    difference = np.zeros((len(windows), len(layers)))
    added = np.zeros_like(difference)
    handles: list[Any] = []
    for index, layer in enumerate(layers):

        def before(
            _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], index: int = index
        ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
            given = args[0] if args else kwargs["hidden_states"]
            forced = torch.from_numpy(states[index].copy()).to(given)
            return ((forced, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": forced})

        def after(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...], index: int = index) -> None:
            expected, entered = (torch.from_numpy(states[at].copy()).double() for at in (index + 1, index))
            found = _tensor(output).cpu().double()
            difference[:, index] = (found - expected).square().sum(dim=(1, 2)).numpy()
            added[:, index] = (expected - entered).square().sum(dim=(1, 2)).numpy()

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after))
    with _removed(handles):
        model.base_model(input_ids=_ids(windows).to(model.device), use_cache=False)
    names = tuple(f"layer {index}" for index in range(len(layers)))
    documents = np.array([window.document for window in windows])
    return LayerErrors(names, difference, added, documents, _ids(windows).numel())


@contextmanager
def _removed(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _ids(windows: Sequence[Window]) -> Tensor:
    return torch.from_numpy(np.stack([window.tokens for window in windows]))


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
