"""A record: everything measured of one artifact, as the file that tables are built from.

A record stands alone: what was measured, on what, with which versions and how uncertain each number is. `report` reads
records and nothing else. Later versions may add fields; they do not rename these.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from quantlab.errors import ArtifactError


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Measured(_Frozen):
    """A number with its 95 % interval and the count it rests on."""

    value: float
    low: float
    high: float
    n: int


class Domain(_Frozen):
    """Held-out text of one kind."""

    perplexity: Measured
    bits_per_byte: Measured


class Quality(_Frozen):
    """How well the artifact predicts held-out text, and how far it is from the baseline on the same tokens."""

    compute_dtype: str
    """Dtype of the activations while this was measured."""
    perplexity: Measured
    bits_per_byte: Measured
    next_token_accuracy: Measured
    """Share of tokens whose most likely prediction was right."""
    domains: dict[str, Domain]
    perplexity_change_percent: Measured | None
    """Relative to the baseline; None for the baseline itself and where the baseline failed, as are the next three."""
    accuracy_loss_percent: Measured | None
    """Next-token accuracy lost, in percent of the baseline's; also None where the baseline is never right."""
    kl_to_baseline: Measured | None
    """Mean KL(baseline || artifact) per token, in nats."""
    top1_agreement: Measured | None
    """Share of tokens on which both predict the same."""


class Memory(_Frozen):
    """Bytes."""

    weights_bytes: int
    """What the runtime holds for weights, scales included."""
    fp16_weights_bytes: int
    """The same weights at two bytes each."""
    quantized_weights_percent_of_fp16: float | None
    """Of the tensors that were quantized only, scales included; None where none was."""
    artifact_bytes: int
    """Size on disk of the artifact's shards, configuration and tokenizer."""
    peak_memory_bytes: int
    """Largest resident size of a process that loaded the artifact at its own dtype and read one window of text."""
    load_seconds: Measured


class Speed(_Frozen):
    """Tokens per second of a random-weight twin, interleaved with the FP16 twin. Keys are batch sizes."""

    twin: str
    """What was timed: width, layers and context of the twin."""
    layout: str
    """In which layout: "int4_g128 on 95 % of the weights, the rest bfloat16"."""
    decode_tokens_per_second: dict[str, Measured]
    prefill_tokens_per_second: dict[str, Measured]
    decode_over_fp16: dict[str, Measured]
    prefill_over_fp16: dict[str, Measured]


class Failure(_Frozen):
    """A measurement that could not be made."""

    cell: Literal["quality", "memory", "speed"]
    reason: str


class Record(_Frozen):
    """One evaluation of one artifact."""

    schema_version: Literal[1] = 1
    recipe: str
    recipe_sha256: str
    variant: str
    description: str
    """The passes in one line, for people: "int4_g128 (rtn)"."""
    artifact: str
    """Directory of the artifact, relative to the run's directory; the checkpoint's own for `source`."""
    artifact_sha256: str
    """Hash of the artifact's manifest; of the checkpoint's headers for `source`."""
    baseline: str
    """The variant that losses are relative to."""
    baseline_sha256: str = ""
    """Its `artifact_sha256`."""
    suite: str
    """Name and version of the suite."""
    suite_sha256: str
    """Hash of the suite and of the text it names."""
    hardware: str
    versions: dict[str, str]
    quality: Quality | None
    memory: Memory | None
    speed: Speed | None
    failures: tuple[Failure, ...]
    tokens_per_expert: dict[str, tuple[int, ...]] = {}
    """Calibration tokens of every routed expert by block, as the artifact's manifest has them; empty where none was watched."""


def read_record(path: Path) -> Record:
    """Read one record.

    Raises:
        ArtifactError: the file cannot be read or is no record of this version.
    """
    try:
        return Record.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ArtifactError(
            "a record cannot be read", where=str(path), found=error.strerror, fix="run `quantlab eval` again"
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ArtifactError(
            "a file is no record of this version",
            where=f"{path}, {'.'.join(map(str, first['loc']))}",
            found=first["msg"],
            fix="run `quantlab eval` again",
        ) from error
