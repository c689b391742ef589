"""The verdict of an engine on an artifact, as records, model cards and `verdicts.json` hold it."""

import hashlib
from pathlib import Path
from typing import Final, Literal

from pydantic import ConfigDict, ValidationError

from quantlab.errors import ArtifactError
from quantlab.evaluation.measured import Frozen, Measured
from quantlab.files import write_atomically

VERDICTS_NAME: Final = "verdicts.json"
"""File beside manifest.json. The manifest is the artifact's identity and is never changed; verdicts may be added later."""

Outcome = Literal["agrees", "differs", "refuses", "not here"]
"""agrees: the engine computes what quantlab's runtime computes, within the criterion. differs: it computes something else, or left
weights unfilled. refuses: it does not load the artifact, or fails while it computes. not here: this machine cannot tell."""


class _Finite(Frozen):
    model_config = ConfigDict(allow_inf_nan=False)


class EngineModules(_Finite):
    """Modules that an engine treats in the same way."""

    module: str
    """Class of the modules in the engine."""
    scheme: str | None = None
    """Scheme that the engine chose for them; None if it does not quantize them."""
    kernel: str | None = None
    """Kernel or backend that computes their products, if the engine says."""
    dtype: str | None = None
    """Dtype in which stacked experts are held and multiplied, if it is another than the engine was asked for."""
    count: int
    example: str = ""
    """Name of one of them."""


class SingleLayer(_Finite):
    """One linear, or the routed experts of a layer, computed by the engine and by plain torch from the same inputs."""

    module: str
    """Its name in the model."""
    difference: float
    """Norm of the difference over the norm of the output; median over 16 tokens, of experts the largest."""
    rule: str = ""
    """The rule for rounding its inputs under which plain torch computes the same; empty if there is none."""


class EngineVerdict(_Finite):
    """What one engine did with one artifact or export."""

    engine: str
    """ "transformers", "vllm" …"""
    version: str = ""
    """Version of the engine; empty if it was not started."""
    format: str
    """Format of the judged files: "compressed-tensors", "gguf", "dense" …"""
    verdict: Outcome
    reason: str = ""
    """Why; the engine's own error line if it refuses."""
    criterion: str = ""
    """The criterion of `agrees` in words, with its numbers; empty if nothing was computed."""
    dtype: str = ""
    """Dtype that the engine computed in."""
    weights: str = ""
    """How the engine multiplies integers and scales, where that shows: "multiplied out in float32", "routed experts in bfloat16"."""
    text: str = ""
    """The tokens: "24 documents of held-out text"."""
    tokens: int = 0
    """Log-probabilities that were compared."""
    nll_difference: Measured | None = None
    """Mean of the engine's negative log-likelihood minus that of quantlab's runtime in float32, nats per token, over documents."""
    nll_rms: float | None = None
    """Root mean square of the same difference, nats."""
    nll_median: float | None = None
    """Median of its absolute values, nats."""
    top1_agreement: float | None = None
    """Share of tokens with the same most likely token."""
    greedy_agreement: float | None = None
    """Share of greedily decoded tokens before the first that differs; mean over prompts."""
    source_nll_rms: float | None = None
    """Root mean square of the difference for the source model in the same engine and dtype, nats."""
    source_nll_difference: float | None = None
    """Its mean."""
    source_note: str = ""
    """Why the source model was not computed, or how it was prepared."""
    activation_rms: float | None = None
    """Root mean square of what rounding activations changes in quantlab's runtime, nats; None if nothing rounds them."""
    layers: tuple[SingleLayer, ...] = ()
    modules: tuple[EngineModules, ...] = ()
    left_unquantized: tuple[str, ...] | None = None
    """Weights that the manifest lists as quantized and the engine holds unquantized; None if the engine does not say."""
    missing: tuple[str, ...] = ()
    """Parameters of the engine's model for which the files have no tensor."""
    unexpected: tuple[str, ...] = ()
    """Tensors of the files that the engine does not use."""
    replaced: tuple[str, ...] = ()
    """Products of the engine that plain torch computed in its place."""
    rounded: tuple[str, ...] = ()
    """Tensors that are not quantized and that the engine holds in fewer digits than the files."""
    load_seconds: float | None = None
    peak_memory_bytes: int | None = None
    """Of the engine's process."""
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    versions: dict[str, str] = {}
    """Packages of the engine's environment."""
    notes: tuple[str, ...] = ()
    """The engine's remarks."""
    hardware: str = ""
    export_sha256: str = ""
    """Hash of export.json if an export was judged."""
    key: str = ""
    """Hash of everything the verdict depends on."""

    @property
    def fails(self) -> bool:
        """Whether the verdict is an error of the artifact."""
        return self.verdict in ("differs", "refuses")


class Verdicts(Frozen):
    """The contents of verdicts.json."""

    schema_version: Literal[1] = 1
    artifact_sha256: str
    """Hash of the artifact's manifest, for which they hold."""
    verdicts: tuple[EngineVerdict, ...]


def manifest_sha256(artifact: Path) -> str:
    """Hash of an artifact's manifest."""
    return hashlib.sha256((artifact / "manifest.json").read_bytes()).hexdigest()


def read_verdicts(artifact: Path) -> tuple[EngineVerdict, ...]:
    """The verdicts on an artifact; none if its manifest is another one than they were given on.

    Raises:
        ArtifactError: verdicts.json is damaged.
    """
    path = artifact / VERDICTS_NAME
    if not path.is_file() or not (artifact / "manifest.json").is_file():
        return ()
    try:
        found = Verdicts.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ArtifactError(
            "the verdicts of engines cannot be read",
            where=str(path),
            found=f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            fix="remove the file, and run `quantlab verify` with --engine again",
        ) from error
    return found.verdicts if found.artifact_sha256 == manifest_sha256(artifact) else ()


def write_verdict(artifact: Path, verdict: EngineVerdict) -> tuple[EngineVerdict, ...]:
    """Add a verdict to an artifact's verdicts.json, in place of an earlier one of the same engine on the same format.

    Returns:
        All verdicts on the artifact, by engine and format.
    """
    kept = [one for one in read_verdicts(artifact) if (one.engine, one.format) != (verdict.engine, verdict.format)]
    found = tuple(sorted([*kept, verdict], key=lambda one: (one.engine, one.format)))
    content = Verdicts(artifact_sha256=manifest_sha256(artifact), verdicts=found)
    write_atomically(artifact / VERDICTS_NAME, content.model_dump_json(indent=1).encode() + b"\n")
    return found
