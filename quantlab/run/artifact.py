"""What an artifact holds besides its weights: config, index, tokenizer, manifest and model card."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quantlab.checkpoint.index import INDEX_NAME
from quantlab.errors import ArtifactError
from quantlab.files import read_json, write_atomically
from quantlab.formats.layout import Description, Linear
from quantlab.formats.layouts import method_of_layout
from quantlab.hardware import processor, version_of
from quantlab.plan.model import LedgerEntry, Plan, Step, VariantPlan
from quantlab.recipe.load import LoadedRecipe
from quantlab.run.identity import Identity
from quantlab.run.journal import FileRecord, FinishedBlock
from quantlab.run.model_card import CARD_NAME, model_card
from quantlab.version import VERSION

MANIFEST_NAME = "manifest.json"
_COMPANION_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"}
_OWN_FILES = {"config.json", INDEX_NAME, MANIFEST_NAME}


@dataclass(frozen=True)
class Making:
    """An artifact in the making.

    Attributes:
        plan: the compiled recipe.
        variant: the plan of this artifact.
        recipe: the recipe as it was written.
        identity: everything the artifact depends on.
    """

    plan: Plan
    variant: VariantPlan
    recipe: LoadedRecipe
    identity: Identity


def finish_artifact(making: Making, directory: Path, blocks: Sequence[FinishedBlock]) -> None:
    """Write everything but the shards. Each file depends on the identity and the weights alone, not on when it was made."""
    plan, variant = making.plan, making.variant
    reports = {name: report for block in blocks for name, report in block.reports.items()}
    files = {file.name: file for block in blocks for file in block.files}
    for path in directory.iterdir():
        if path.name not in files:
            path.unlink()  # left by a run that was killed while it wrote the small files
    _write_json(directory / "config.json", patched_config(plan, variant))
    _write_json(directory / INDEX_NAME, _index(variant))
    for path in companions(plan.checkpoint.directory):
        write_atomically(directory / path.name, path.read_bytes())
    coverage = {block.name: block.tokens_per_expert for block in blocks if block.tokens_per_expert}
    card = model_card(plan, variant, making.recipe, reports, coverage, calibrated_on=calibrated_on(making.identity))
    write_atomically(directory / CARD_NAME, card.encode())
    for path in sorted(directory.iterdir()):
        if path.name not in files and path.name != CARD_NAME:  # the card gets its measured numbers later
            data = path.read_bytes()
            files[path.name] = FileRecord(path.name, hashlib.sha256(data).hexdigest(), len(data))
    write_atomically(directory / MANIFEST_NAME, _manifest(making, files, blocks))
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def calibrated_on(identity: Identity) -> str:
    """Where calibration computed, for people; empty where nothing was calibrated."""
    if identity.calibration is None:
        return ""
    return f"{identity.calibration.gpu or processor()}, in {identity.calibration.dtype}"


def manifest_identity(artifact: Path) -> dict[str, Any]:
    """The identity of an artifact as its manifest holds it; of one made before manifests held it, only its key.

    Raises:
        ArtifactError: the directory is no artifact of quantlab.
    """
    path = artifact / MANIFEST_NAME
    if not path.is_file():
        raise ArtifactError(
            "the output directory holds something quantlab did not make",
            where=str(artifact),
            found=f"no {MANIFEST_NAME}",
            fix="choose another --out",
        )
    manifest = read_json(path)
    found: dict[str, Any] = manifest.get("identity") or {"key": manifest.get("key")}
    return found


def manifest_is_whole(artifact: Path) -> bool:
    """Whether every file of an artifact's manifest is there with its size."""
    files = read_json(artifact / MANIFEST_NAME).get("files", {})
    return all(
        (artifact / name).is_file() and (artifact / name).stat().st_size == file["bytes"]
        for name, file in files.items()
    )


def patched_config(plan: Plan, variant: VariantPlan) -> dict[str, Any]:
    """The source's config.json with only dtype and quantization_config changed.

    Re-serialising it through a config class would lose what that class does not know: `topk_method`, `scoring_func`.
    """
    config = dict(plan.checkpoint.config)
    config.pop("quantization_config", None)
    for field in [field for field in ("torch_dtype", "dtype") if field in config] or ["torch_dtype"]:
        config[field] = variant.dtype
    if variant.experts is not None:
        config = plan.architecture.with_experts(config, variant.experts)
    quantization = quantization_config(variant)
    if quantization is not None:
        config["quantization_config"] = quantization.to_json()
    return config


def quantization_config(variant: VariantPlan) -> Description | None:
    """How engines are told what is quantized; None if nothing is."""
    linears = [
        Linear(
            step.claim.name.removesuffix(".weight"),
            step.claim.role,
            step.claim.layer or 0,
            step.scheme.format if step.scheme else None,
            step.layout,
        )
        for step in variant.steps
        if step.outputs
        and step.claim.name.endswith(".weight")
        and step.claim.rule is not None
        and (step.claim.rule.linear or step.claim.role == "router")
    ]
    if not variant.layouts:
        return None
    method = method_of_layout(variant.layouts[0])
    assert method.describe is not None, f"{method.word} is only read"
    return method.describe(linears)


def _index(variant: VariantPlan) -> dict[str, Any]:
    weight_map = {
        name: shard.file for block in variant.blocks for shard in block.shards for name, _, _ in shard.tensors
    }
    return {"metadata": {"total_size": variant.artifact_bytes}, "weight_map": weight_map}


def companions(source: Path) -> list[Path]:
    """Tokenizer, generation config, chat template, remote code and licence of the source."""
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and path.name not in _OWN_FILES
        and (path.suffix in _COMPANION_SUFFIXES or path.name.upper().startswith("LICENSE"))
    ]


def _manifest(making: Making, files: Mapping[str, FileRecord], blocks: Sequence[FinishedBlock]) -> bytes:
    plan, variant, recipe = making.plan, making.variant, making.recipe
    reports = {name: report for block in blocks for name, report in block.reports.items()}
    head: dict[str, Any] = {
        "schema": 1,
        "variant": variant.name,
        "description": variant.description,
        "key": making.identity.key,
        "identity": making.identity.written(),
        "source": {"model": recipe.recipe.model, "fingerprint": plan.checkpoint.fingerprint()},
        "recipe": {"name": recipe.name, "sha256": recipe.sha256, "text": recipe.content.decode()},
        "versions": {
            "quantlab": VERSION,
            **version_of("torch"),
            **version_of("transformers"),
            **version_of("compressed-tensors"),
        },
        "files": {name: {"sha256": file.sha256, "bytes": file.nbytes} for name, file in sorted(files.items())},
    }
    if variant.calibration is not None:
        head["calibration"] = variant.calibration.model_dump() | {"corpus_sha256": recipe.corpus_sha256()}
        head["tokens_per_expert"] = {
            block.name: list(block.tokens_per_expert) for block in blocks if block.tokens_per_expert
        }
    if variant.experts is not None:
        head["kept_experts"] = {block.name: list(block.kept_experts) for block in blocks if block.kept_experts}
    experts = {block.name: _numbering(block, plan) for block in blocks if block.kept_experts}
    ledger = []
    for step in variant.steps:
        for entry in step.ledger():
            report = reports.get(entry.tensor)
            line = asdict(_renamed(entry, step, experts))
            ledger.append(line | (report.known() if report is not None else {}))
    # one line per tensor: a ledger of 90,000 entries stays readable with ordinary text tools
    lines = ",\n".join("  " + json.dumps(entry) for entry in ledger)
    return f'{json.dumps(head, indent=1)[:-2]},\n "ledger": [\n{lines}\n ]\n}}\n'.encode()


def _numbering(block: FinishedBlock, plan: Plan) -> tuple[int, ...]:
    """The expert of the source for every slot: those that stay, then those that go."""
    experts = plan.architecture.dimensions(plan.checkpoint.config)["experts"]
    gone = set(range(experts)) - set(block.kept_experts)
    return (*block.kept_experts, *sorted(gone))


def _renamed(entry: LedgerEntry, step: Step, experts: Mapping[str, Sequence[int]]) -> LedgerEntry:
    """A ledger entry under the name its tensor has in the source: the plan spoke of slots."""
    slot = step.claim.expert
    if slot is None or step.claim.block not in experts:
        return entry
    old, new = step.claim.name, step.claim.in_expert(experts[step.claim.block][slot])
    return replace(entry, tensor=entry.tensor.replace(old, new), reason=entry.reason.replace(old, new))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
