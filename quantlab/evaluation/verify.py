"""Verification of an artifact: file hashes, ledger, finite values, and equal logits in transformers and in our runtime.

The reference is the artifact's own weights dequantized to 16 bits, written as a plain checkpoint (the export `dense`) and loaded by transformers,
without any code of the packed path. Two loads are compared with it: the artifact through transformers' compressed-tensors
loader, and the artifact through our runtime, which keeps the weights packed.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from quantlab.checkpoint.index import Checkpoint, open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.errors import ArtifactError
from quantlab.evaluation.engines.judged import EXPORT_NAME
from quantlab.evaluation.engines.verdict import VERDICTS_NAME
from quantlab.exports.writers.dense import write_expanded
from quantlab.files import read_json
from quantlab.formats.engine_rules.rule import PREVENTS
from quantlab.formats.engine_rules.table import verdict_of
from quantlab.formats.read_contents import contents_of
from quantlab.formats.stored import StoredWeights
from quantlab.numerics.integer import QuantizedMatrix
from quantlab.numerics.number_format import INT8
from quantlab.runtime.load import load

_TOKENS = (2, 48)
_FLOAT32 = 1e-4
"""Bound on the relative difference of logits caused by the order of float32 sums (measured: 6e-7)."""
_INT8_ACTIVATIONS = 0.15
"""The same bound if activations are rounded to int8 (measured: 0.04 on the reference model, 0.07 on random models)."""


@dataclass(frozen=True)
class Check:
    """One checked property of an artifact.

    Attributes:
        name: the property.
        verdict: "ok", "failed", or "not applicable" if it cannot be checked.
        detail: numbers, or the problem.
    """

    name: str
    verdict: Literal["ok", "failed", "not applicable"]
    detail: str


def verify(artifact: Path) -> Iterator[Check]:
    """Check an artifact; yields the results one by one, cheap checks first. Of an export only the hashes: its engine judges it.

    Raises:
        ArtifactError: the directory is not a quantlab artifact, or its manifest is damaged.
        CheckpointError: its files cannot be read at all.
    """
    if (artifact / EXPORT_NAME).is_file():
        yield _check_hashes(artifact, read_json(artifact / EXPORT_NAME), EXPORT_NAME)
        return
    manifest_path = artifact / "manifest.json"
    if not manifest_path.is_file():
        raise ArtifactError(
            "the directory is not a quantlab artifact",
            where=str(artifact),
            found="no manifest.json",
            fix="give a directory under runs/NAME/artifacts",
        )
    manifest = read_json(manifest_path)
    if not {"files", "ledger", "key"} <= set(manifest):
        raise ArtifactError(
            "the manifest is damaged",
            where=str(manifest_path),
            found=", ".join(manifest) or "nothing",
            fix="make the artifact again: `quantlab run` with --overwrite",
        )
    hashes = _check_hashes(artifact, manifest)
    yield hashes
    if hashes.verdict == "failed":
        return
    checkpoint = open_checkpoint(artifact)
    yield _check_ledger(checkpoint, manifest)
    stored = StoredWeights(Reader(checkpoint))
    yield _check_finite(stored)
    with tempfile.TemporaryDirectory(prefix="quantlab-verify-") as directory:
        reference = Path(directory)
        write_expanded(stored, reference)
        expected = _logits_of_transformers(reference, checkpoint, dtype=_dtype_of(stored))
        yield _check_transformers(stored, checkpoint, expected)
        yield _check_runtime(artifact, reference, checkpoint, stored)


def _check_hashes(artifact: Path, manifest: dict[str, Any], manifest_name: str = "manifest.json") -> Check:
    problems, total = [], 0
    for name, record in manifest["files"].items():
        path = artifact / name
        if not path.is_file():
            problems.append(f"{name} is missing")
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != record["sha256"]:
            problems.append(f"{name} was changed")
        total += record["bytes"]
    known = {*manifest["files"], manifest_name, VERDICTS_NAME, "README.md"}  # every report rewrites the model card
    stored = {path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if not path.is_dir()}
    extra = sorted(stored - known)
    problems += [
        f"{name} is not in {'the manifest' if manifest_name == 'manifest.json' else manifest_name}" for name in extra
    ]
    if problems:
        return Check("sha256 of every file", "failed", "; ".join(problems[:5]))
    return Check("sha256 of every file", "ok", f"{len(manifest['files'])} files, {total:,} bytes")


def _check_ledger(checkpoint: Checkpoint, manifest: dict[str, Any]) -> Check:
    """Every stored tensor belongs to exactly one ledger entry, and every tensor that the ledger lists is stored."""
    name = "ledger accounts for every tensor"
    stored_as = [tensor for entry in manifest["ledger"] for tensor in entry["stored_as"]]
    twice = len(stored_as) - len(set(stored_as))
    unknown = sorted(set(checkpoint.tensors) - set(stored_as))
    missing = sorted(set(stored_as) - set(checkpoint.tensors))
    if twice or unknown or missing:
        return Check(
            name, "failed", f"{twice} listed twice; not in the ledger: {unknown[:3]}; not stored: {missing[:3]}"
        )
    return Check(name, "ok", f"{len(manifest['ledger'])} source tensors, {len(stored_as)} stored")


def _check_finite(stored: StoredWeights) -> Check:
    broken, count = [], 0
    for tensor_name in stored.names():
        weight = stored.read(tensor_name)
        values = weight.scale if isinstance(weight, QuantizedMatrix) else weight
        count += 1
        expands = not isinstance(weight, QuantizedMatrix) or weight.expands_within_range()
        if not expands or (values.is_floating_point() and not bool(values.isfinite().all())):
            broken.append(tensor_name)
    if broken:
        return Check("every value is finite", "failed", f"NaN or infinity in {', '.join(broken[:3])}")
    return Check("every value is finite", "ok", f"{count} weights")


def _tokens(checkpoint: Checkpoint) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, checkpoint.config["vocab_size"], _TOKENS, generator=generator)


def _logits_of_transformers(
    directory: Path, checkpoint: Checkpoint, *, dequantize: str | None = None, dtype: str | torch.dtype = "auto"
) -> Tensor:
    """Logits of transformers' model [B, T, V]; `dequantize` names the quantization method whose weights are expanded at load."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # without `dequantize` the keyword is omitted: None would override the artifact's own quantization_config
    classes = {"compressed-tensors": CompressedTensorsConfig, "fp8": FineGrainedFP8Config}
    options = {"quantization_config": classes[dequantize](dequantize=True)} if dequantize else {}
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True, **options)
    tensors = model.state_dict()
    missing = sorted(key for key in info["missing_keys"] if key not in tensors or tensors[key].numel())
    if missing:
        raise RuntimeError(f"transformers found no weights for {missing[:3]}")
    with torch.inference_mode():
        logits: Tensor = model(_tokens(checkpoint)).logits.float()
    return logits


def _dtype_of(stored: StoredWeights) -> torch.dtype | Literal["auto"]:
    """The dtype passed to transformers: bfloat16 for floating-point blocks, which are expanded to it, else that of the checkpoint."""
    formats = stored.description.formats if stored.description is not None else ()
    return "auto" if all(number.is_integer for number in formats) else torch.bfloat16


def _check_transformers(stored: StoredWeights, checkpoint: Checkpoint, expected: Tensor) -> Check:
    name = "transformers loads it, logits equal to the dequantized reference"
    judged = verdict_of("transformers", contents_of(stored.reader.checkpoint))
    if judged.prevented:
        reasons = "; ".join(one.rule.text for one in judged.objections if one.rule.kind in PREVENTS)
        return Check(name, "not applicable", f"transformers {reasons}")
    formats = stored.description.formats if stored.description is not None else ()
    expand = any(number.activations or not number.symmetric for number in formats)
    try:
        logits = _logits_of_transformers(
            checkpoint.directory,
            checkpoint,
            dequantize=stored.method if expand else None,
            dtype=_dtype_of(stored),
        )
    except (RuntimeError, ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        return Check(name, "failed", next(iter(str(error).splitlines()), type(error).__name__))
    difference = (logits - expected).abs().max().item()
    verdict: Literal["ok", "failed"] = "ok" if difference == 0 else "failed"
    return Check(name, verdict, f"largest logit difference {difference:.3g}")


def _with_int8_activations(stored: StoredWeights) -> list[str]:
    """Names of the weights whose input activations are rounded to int8."""
    formats = ((name, stored.format_of(name)) for name in stored.names())
    return [name for name, number in formats if number and number.activations and number.activations.element == INT8]


def _check_runtime(artifact: Path, reference: Path, checkpoint: Checkpoint, stored: StoredWeights) -> Check:
    """Compare in float32, where only the order of sums differs; int8 activations are rounded, so their bound is wider."""
    name = "quantlab's runtime agrees with the dequantized reference (float32)"
    expected = _logits_of_transformers(reference, checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        logits = load(artifact, dtype=torch.float32)(_tokens(checkpoint)).logits
    relative = ((logits - expected).norm() / expected.norm()).item()
    largest = (logits - expected).abs().max().item()
    detail = f"largest logit difference {largest:.3g}, relative {relative:.2g}"
    if _with_int8_activations(stored):
        bound, detail = (
            _INT8_ACTIVATIONS,
            detail + f" (its activations are int8, the reference's are not; bound {_INT8_ACTIVATIONS:g})",
        )
    else:
        bound = _FLOAT32
    return Check(name, "ok" if relative <= bound else "failed", detail)  # NaN compares as failed
