"""Results of the unchanged model on the calibration text, shared by the variants of a run.

Hidden states after a layer are used by every variant with `propagate: original` and by every variant that compensates
for errors of earlier layers; statistics of input sites by all variants with `propagate: original` that need the same
ones. The first variant computes them; the others read them from files under a key of everything they depend on. The
files are a cache: a missing result is computed again, with the same bits.
"""

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.calibration.hidden import HiddenStates, load_streams, save_streams, saved_streams
from quantlab.calibration.layer import EMBEDDINGS, Layer, Skeleton
from quantlab.files import write_error
from quantlab.numerics.statistics import Need, SiteStatistics
from quantlab.run.directory import make_directory

ReadName = Callable[[str], Tensor]
_STREAM = "original"


class SharedStages:
    """A cache of results of the unchanged model, in files.

    Args:
        directory: directory of the files, created when the first is written.
        budget: largest total size in bytes. The last hidden states are always kept, for interrupted runs.
        device: device of the tensors that are read.
    """

    def __init__(self, directory: Path, *, budget: int, device: torch.device | None = None) -> None:
        self._directory, self._budget, self._device = directory, budget, str(device or "cpu")
        self._used = sum(path.stat().st_size for path in directory.glob("*"))

    def layers(self) -> list[int]:
        """The layers after which hidden states are saved, ascending."""
        return sorted(int(block.removeprefix("layer ")) for block in saved_streams(self._directory))

    def load(self, layer: int, hidden: HiddenStates) -> None:
        """Load the stream saved after a layer.

        Raises:
            CheckpointError: the file is damaged.
            ArtifactError: its stream has another shape.
        """
        load_streams(self._directory, f"layer {layer}", {_STREAM: hidden})

    def save(self, layer: int, hidden: HiddenStates) -> None:
        """Save the stream after a layer.

        Raises:
            ArtifactError: the file cannot be written.
        """
        make_directory(self._directory)
        save_streams(self._directory, f"layer {layer}", {_STREAM: hidden})
        self._used += hidden.tokens * hidden.shape[2] * hidden.dtype.itemsize

    def tidy(self) -> None:
        """Remove the hidden states of earlier layers while the files exceed the budget."""
        for layer in self.layers()[:-1]:
            if self._used > self._budget:
                path = saved_streams(self._directory)[f"layer {layer}"]
                self._used -= path.stat().st_size
                path.unlink()

    def statistics(self, name: str, needs: Collection[Need], compute: Callable[[], SiteStatistics]) -> SiteStatistics:
        """Statistics by name, computed if there is no file.

        Args:
            name: layer, input site and expert.
            needs: the statistics; other needs of the same site have another file, because the last bits may differ.
            compute: computes them.

        Raises:
            ArtifactError: the file cannot be written.
        """

        def tensors() -> dict[str, Tensor]:
            computed = vars(compute()).items()
            return {key: torch.as_tensor(value) for key, value in computed if value is not None}

        found = self.tensors(" ".join([name, *sorted(needs)]), tensors)
        return SiteStatistics(count=int(found.pop("count")), **found)

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors by name, computed if there is no file.

        Raises:
            ArtifactError: the file cannot be written.
        """
        path = self._directory / f"{name.replace(' ', '-')}.safetensors"
        if path.is_file():
            found: dict[str, Tensor] = load_file(path, device=self._device)
            return found
        result = compute()
        nbytes = sum(tensor.nbytes for tensor in result.values())
        if self._used + nbytes <= self._budget:
            self._write(path, {key: tensor.cpu().contiguous() for key, tensor in result.items()})
            self._used += nbytes
        return result

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        temporary = path.with_suffix(".tmp")
        try:
            make_directory(path.parent)
            save_file(tensors, temporary)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise write_error(path, error if isinstance(error, OSError) else OSError(0, str(error))) from error


class Unchanged:
    """The unchanged model, with the calibration text at the input of one of its layers.

    Args:
        skeleton: allocates its layers.
        tokens: [samples, length] int64.
        read: reads a source weight by name, of any floating dtype.
        hidden: a stream with undefined values.
        stages: cache of hidden states.
    """

    def __init__(
        self, skeleton: Skeleton, tokens: Tensor, read: ReadName, hidden: HiddenStates, stages: SharedStages
    ) -> None:
        self._skeleton, self._tokens, self._read, self._hidden, self.stages = skeleton, tokens, read, hidden, stages
        self._enters: int | None = None

    def enter(self, layer: int) -> HiddenStates:
        """The hidden states that enter a layer, computed from the last saved ones.

        The caller may advance them in place. It calls `finish_layer` if it advanced them through the unchanged layer.
        """
        if self._enters != layer:
            start = max((number + 1 for number in self.stages.layers() if number < layer), default=0)
            if start:
                self.stages.load(start - 1, self._hidden)
            else:
                self._embed()
            for number in range(start, layer):
                self._forward(number)
                self.stages.save(number, self._hidden)
        self._enters = None
        return self._hidden

    def has_saved(self, layer: int) -> bool:
        """Whether the hidden states after a layer are saved."""
        return layer in self.stages.layers()

    def run_ahead(self, number: int, layer: Layer) -> None:
        """Compute and save the hidden states after a layer before its weights are edited, to avoid reading them again.

        Args:
            number: index of the layer.
            layer: the layer with the weights of the source.
        """
        if number + 1 == self._skeleton.layers or self.has_saved(number):
            return
        self.enter(number)
        self._pass_through(layer)
        self.stages.save(number, self._hidden)

    def finish_layer(self, layer: int) -> None:
        """Declare that the hidden states are now those after this layer, and save them."""
        self._enters = layer + 1
        if not self.has_saved(layer):
            self.stages.save(layer, self._hidden)

    def _embed(self) -> None:
        weight = self._read(EMBEDDINGS)
        for which, _ in self._hidden.batches():
            self._hidden.write(which, self._skeleton.embed(self._tokens[which], weight))

    def _forward(self, number: int) -> None:
        layer = self._skeleton.layer(number)
        layer.fill(self._read)
        self._pass_through(layer)

    def _pass_through(self, layer: Layer) -> None:
        for which, hidden in self._hidden.batches():
            self._hidden.write(which, layer.forward(hidden))
