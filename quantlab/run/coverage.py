"""Calibration text that reaches every expert: samples are added until each has as many tokens as the recipe asks for.

Which tokens reach an expert is known only after the model has run. So the unchanged model reads the samples before calibration begins, layer by
layer; while an expert has too few tokens, the number of samples is doubled and the model reads the new ones. Every round reads all
weights once, and calibration then reads all samples. The number found is kept in the run's directory.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from quantlab.calibration.corpus import tokens_sha256
from quantlab.calibration.drawn import DrawnText
from quantlab.checkpoint.index import Checkpoint
from quantlab.files import read_json
from quantlab.fingerprint import code_fingerprint
from quantlab.recipe.schema import Calibration
from quantlab.run.identity import computing_of
from quantlab.texts.locate import TEXTS, keep

MOST: Final = 8
"""Samples are added up to this many times those of the recipe."""

Draw = Callable[[int], DrawnText]
"""Draws at most this many samples."""


@dataclass(frozen=True)
class Covered:
    """How far the experts are covered.

    Attributes:
        wanted: tokens that every expert was to have.
        samples: number of samples that were asked for in the end.
        ended: why no more were added: "covered", "the text ended" or "the limit".
        uncovered: block -> expert -> its tokens, of the experts with fewer than `wanted`.
    """

    wanted: int
    samples: int
    ended: str
    uncovered: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Covering:
    """What covering needs.

    Attributes:
        checkpoint: the source.
        calibration: of the recipe; `coverage` is set.
        device: device of the layers.
        read: reads a source weight by name.
        work: directory for hidden states that do not fit into memory.
        run: the run's directory.
    """

    checkpoint: Checkpoint
    calibration: Calibration
    device: torch.device
    read: Callable[[str], Tensor]
    work: Path
    run: Path

    def cover(self, first: DrawnText, draw: Draw) -> tuple[DrawnText, Covered]:
        """Add samples until every expert has enough tokens, the text ends, or there are `MOST` times as many.

        Args:
            first: the samples of the recipe.
            draw: draws more; the samples of a source begin with those of a smaller number.

        Raises:
            CalibrationError: see `draw_text`.
            CheckpointError: a weight cannot be read.
            ArtifactError: a file cannot be written.
        """
        path = self.run / TEXTS / f"coverage-{self._key(first)}.json"
        if path.is_file():
            known = Covered(**read_json(path))
            return draw(known.samples), known
        text, found = self._cover(first, draw)
        keep(path, (json.dumps(asdict(found), indent=1) + "\n").encode())
        return text, found

    def _cover(self, first: DrawnText, draw: Draw) -> tuple[DrawnText, Covered]:
        wanted = self.calibration.coverage
        assert wanted is not None
        samples, text = self.calibration.samples, first
        counts = self._route(text.tokens)
        ended = "covered"
        while any(int(one.min()) < wanted for one in counts.values()):
            if samples >= MOST * self.calibration.samples:
                ended = "the limit"
                break
            more = draw(2 * samples)
            new = _added(text, more)
            if not len(new):
                ended = "the text ended"
                break
            samples, text = 2 * samples, more
            counts = {block: counts[block] + one for block, one in self._route(new).items()}
        uncovered = {
            block: {str(expert): count for expert, count in enumerate(one.tolist()) if count < wanted}
            for block, one in counts.items()
            if int(one.min()) < wanted
        }
        return text, Covered(wanted, samples, ended, uncovered)

    def _route(self, tokens: Tensor) -> dict[str, Tensor]:
        from quantlab.calibration.coverage import tokens_per_expert
        from quantlab.calibration.hidden import Workspace
        from quantlab.calibration.layer import Skeleton  # imports transformers

        dtype = computing_of(self.calibration, self.device).torch_dtype
        skeleton = Skeleton(self.checkpoint.config, dtype=dtype, device=self.device)
        workspace = Workspace(self.work, memory_bytes=self.calibration.memory_bytes, device=self.device)
        samples, length = tokens.shape
        hidden = workspace.stream(samples, length, skeleton.width, dtype=dtype)
        return tokens_per_expert(skeleton, tokens, self.read, hidden)

    def _key(self, first: DrawnText) -> str:
        computing = computing_of(self.calibration, self.device)
        code = code_fingerprint(("quantlab.run.coverage",))
        parts: Any = (
            self.checkpoint.fingerprint(),
            tokens_sha256(first.tokens),
            self.calibration.coverage,
            str(computing),
            code,
        )
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _added(before: DrawnText, after: DrawnText) -> Tensor:
    """The samples [n, length] of every source beyond those that it had before."""
    parts, start = [], 0
    for old, new in zip(before.samples, after.samples, strict=True):
        parts.append(after.tokens[start + min(old, new) : start + new])
        start += new
    return torch.cat(parts)
