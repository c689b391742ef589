"""What the variants of a run share: whatever depends on the unchanged model and the calibration text alone.

Hidden states after a layer of the unchanged model are wanted by every variant that watches it (`propagate: original`) or
makes good for errors of earlier layers; statistics of its input sites by all variants that watch it with the same needs. The
first variant computes them, the others read them from files under a key of what they depend on. Nothing depends on a
file being there: what is missing is computed again, with the same bits.
"""

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.calibration.hidden import HiddenStates, load_streams, save_streams, saved_streams
from quantlab.calibration.layer import EMBEDDINGS, Skeleton
from quantlab.calibration.statistics import Need, SiteStatistics
from quantlab.checkpoint.files import write_error
from quantlab.run.directory import make_directory

ReadName = Callable[[str], Tensor]
_STREAM = "original"


class SharedStages:
    """Files of what has been computed of the unchanged model.

    Args:
        directory: where they lie; made when the first is written.
        budget: bytes they may take together. Of hidden states the last are always kept, for a run that is interrupted.
    """

    def __init__(self, directory: Path, *, budget: int) -> None:
        self._directory, self._budget = directory, budget
        self._used = sum(path.stat().st_size for path in directory.glob("*"))

    def layers(self) -> list[int]:
        """The layers whose hidden states after them are there, ascending."""
        return sorted(int(block.removeprefix("layer ")) for block in saved_streams(self._directory))

    def load(self, layer: int, hidden: HiddenStates) -> None:
        """Set the stream to what it was after a layer.

        Raises:
            CheckpointError: the file is damaged.
            ArtifactError: it holds a stream of another shape.
        """
        load_streams(self._directory, f"layer {layer}", {_STREAM: hidden})

    def save(self, layer: int, hidden: HiddenStates) -> None:
        """Keep the stream as it stands after a layer.

        Raises:
            ArtifactError: the disk does not take it.
        """
        make_directory(self._directory)
        save_streams(self._directory, f"layer {layer}", {_STREAM: hidden})
        self._used += hidden.tokens * hidden.shape[2] * hidden.dtype.itemsize

    def tidy(self) -> None:
        """Remove the hidden states of earlier layers where the budget does not hold them."""
        for layer in self.layers()[:-1]:
            if self._used > self._budget:
                path = saved_streams(self._directory)[f"layer {layer}"]
                self._used -= path.stat().st_size
                path.unlink()

    def statistics(self, name: str, needs: Collection[Need], compute: Callable[[], SiteStatistics]) -> SiteStatistics:
        """Statistics under a name, computed where they are not there.

        Args:
            name: layer and input site, and whose.
            needs: what of them is wanted; the same with other needs is another file, since sums in another order have
                other bits.
            compute: makes them.

        Raises:
            ArtifactError: the disk does not take them.
        """

        def tensors() -> dict[str, Tensor]:
            computed = vars(compute()).items()
            return {key: torch.as_tensor(value) for key, value in computed if value is not None}

        found = self.tensors(" ".join([name, *sorted(needs)]), tensors)
        return SiteStatistics(count=int(found.pop("count")), **found)

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors under a name, computed where they are not there; from a file they come to the CPU.

        Raises:
            ArtifactError: the disk does not take them.
        """
        path = self._directory / f"{name.replace(' ', '-')}.safetensors"
        if path.is_file():
            found: dict[str, Tensor] = load_file(path)
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
    """The unchanged model, as far as the calibration text has flowed through it.

    Args:
        skeleton: makes its layers.
        tokens: [samples, length] int64.
        read: the source weight of a name, of any floating dtype.
        hidden: the stream, of undefined values.
        stages: where it is looked up and kept.
    """

    def __init__(
        self, skeleton: Skeleton, tokens: Tensor, read: ReadName, hidden: HiddenStates, stages: SharedStages
    ) -> None:
        self._skeleton, self._tokens, self._read, self._hidden, self.stages = skeleton, tokens, read, hidden, stages
        self._enters: int | None = None

    def enter(self, layer: int) -> HiddenStates:
        """The hidden states that enter a layer, computed from the last ones that are known.

        They belong to the caller until `leave`; a caller that never leaves may advance them through other weights.
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

    def knows(self, layer: int) -> bool:
        """Whether the hidden states after a layer are there without anybody advancing the stream."""
        return layer in self.stages.layers()

    def leave(self, layer: int) -> None:
        """Say that the hidden states are those after this layer now."""
        self._enters = layer + 1
        if not self.knows(layer):
            self.stages.save(layer, self._hidden)

    def _embed(self) -> None:
        weight = self._read(EMBEDDINGS)
        for which, _ in self._hidden.batches():
            self._hidden.write(which, self._skeleton.embed(self._tokens[which], weight))

    def _forward(self, number: int) -> None:
        layer = self._skeleton.layer(number)
        layer.fill(self._read)
        for which, hidden in self._hidden.batches():
            self._hidden.write(which, layer.forward(hidden))
