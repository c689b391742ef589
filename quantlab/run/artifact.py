"""The files of an artifact besides its weights: config, index, tokenizer, manifest and model card."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from quantlab.checkpoint.index import INDEX_NAME
from quantlab.errors import ArtifactError
from quantlab.files import read_json, write_atomically
from quantlab.formats.contents import described_linears
from quantlab.formats.layouts import method_of_layout
from quantlab.hardware import processor, version_of
from quantlab.plan.contents import contents_of_variant
from quantlab.plan.model import LedgerEntry, Plan, Step, VariantPlan
from quantlab.recipe.load import LoadedRecipe
from quantlab.recipe.schema import unused_text_fields
from quantlab.run.companions import companions
from quantlab.run.identity import Identity
from quantlab.run.journal import FileRecord, FinishedBlock
from quantlab.run.model_card import CARD_NAME, model_card
from quantlab.version import VERSION

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Making:
    """An unfinished artifact.

    Attributes:
        plan: the compiled recipe.
        variant: the plan of this artifact.
        recipe: the recipe file.
        identity: everything the artifact depends on.
        text: what the calibration drew from datasets, for manifest and card; empty for a corpus.
    """

    plan: Plan
    variant: VariantPlan
    recipe: LoadedRecipe
    identity: Identity
    text: Mapping[str, Any] = field(default_factory=dict)


def finish_artifact(making: Making, directory: Path, blocks: Sequence[FinishedBlock]) -> None:
    """Write all files except the shards. Their contents depend only on the identity and the weights, not on time."""
    plan, variant = making.plan, making.variant
    reports = {name: report for block in blocks for name, report in block.reports.items()}
    files = {file.name: file for block in blocks for file in block.files}
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in files:
            path.unlink()  # left by a run that was killed while writing the small files
    _write_json(directory / "config.json", patched_config(plan, variant))
    _write_json(directory / INDEX_NAME, _index(variant))
    beside = companions(plan.checkpoint.directory, [path.name for path in plan.checkpoint.files])
    for name in beside.carried:
        (directory / name).parent.mkdir(exist_ok=True)
        write_atomically(directory / name, (plan.checkpoint.directory / name).read_bytes())
    coverage = {block.name: block.tokens_per_expert for block in blocks if block.tokens_per_expert}
    card = model_card(
        plan,
        variant,
        making.recipe,
        reports,
        coverage,
        calibrated_on=calibrated_on(making.identity),
        text=making.text,
    )
    write_atomically(directory / CARD_NAME, card.encode())
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in files and name != CARD_NAME:  # measured numbers are added to the card later
            data = path.read_bytes()
            files[name] = FileRecord(name, hashlib.sha256(data).hexdigest(), len(data))
    write_atomically(directory / MANIFEST_NAME, _manifest(making, files, beside.left_out, blocks))
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def calibrated_on(identity: Identity) -> str:
    """Device and dtype of the calibration as text; empty without calibration."""
    if identity.calibration is None:
        return ""
    return f"{identity.calibration.gpu or processor()}, in {identity.calibration.dtype}"


def manifest_identity(artifact: Path) -> dict[str, Any]:
    """The identity of an artifact from its manifest; only the key if the manifest has no identity.

    Raises:
        ArtifactError: the directory is not an artifact of quantlab.
    """
    path = artifact / MANIFEST_NAME
    if not path.is_file():
        raise ArtifactError(
            "the output directory contains something that quantlab did not make",
            where=str(artifact),
            found=f"no {MANIFEST_NAME}",
            fix="choose another --out",
        )
    manifest = read_json(path)
    found: dict[str, Any] = manifest.get("identity") or {"key": manifest.get("key")}
    return found


def manifest_is_whole(artifact: Path) -> bool:
    """Whether every file of an artifact's manifest exists with the recorded size."""
    files = read_json(artifact / MANIFEST_NAME).get("files", {})
    return all(
        (artifact / name).is_file() and (artifact / name).stat().st_size == file["bytes"]
        for name, file in files.items()
    )


def patched_config(plan: Plan, variant: VariantPlan) -> dict[str, Any]:
    """The config.json of an artifact, with the description of its quantized weights."""
    contents = contents_of_variant(plan, variant)
    config = dict(contents.config)
    if contents.quantized:
        method = method_of_layout(contents.quantized[0].layout)
        assert method.describe is not None, f"{method.word} is only read"
        linears = described_linears(contents.weights, lambda weight: weight.layout)
        config["quantization_config"] = method.describe(linears).to_json()
    return config


def _index(variant: VariantPlan) -> dict[str, Any]:
    weight_map = {
        name: shard.file for block in variant.blocks for shard in block.shards for name, _, _ in shard.tensors
    }
    return {"metadata": {"total_size": variant.artifact_bytes}, "weight_map": weight_map}


def _manifest(
    making: Making, files: Mapping[str, FileRecord], left_out: Mapping[str, str], blocks: Sequence[FinishedBlock]
) -> bytes:
    plan, variant, recipe = making.plan, making.variant, making.recipe
    reports = {name: report for block in blocks for name, report in block.reports.items()}
    head: dict[str, Any] = {
        "schema": 1,
        "variant": variant.name,
        "description": variant.description,
        "key": making.identity.key,
        "identity": making.identity.written(),
        "source": _source(plan, recipe),
        "recipe": {"name": recipe.name, "sha256": recipe.sha256, "text": recipe.content.decode()},
        "versions": {
            "quantlab": VERSION,
            **version_of("torch"),
            **version_of("transformers"),
            **version_of("compressed-tensors"),
        },
        "files": {name: {"sha256": file.sha256, "bytes": file.nbytes} for name, file in sorted(files.items())},
        "left_out": dict(left_out),
    }
    if variant.calibration is not None:
        known = variant.calibration.model_dump(exclude=unused_text_fields(variant.calibration))
        head["calibration"] = known | {"corpus_sha256": recipe.corpus_sha256()} | dict(making.text)
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
    # one line per tensor keeps a ledger of 90,000 entries readable with text tools
    lines = ",\n".join("  " + json.dumps(entry) for entry in ledger)
    return f'{json.dumps(head, indent=1)[:-2]},\n "ledger": [\n{lines}\n ]\n}}\n'.encode()


def _source(plan: Plan, recipe: LoadedRecipe) -> dict[str, str]:
    """The source as the recipe names it, its fingerprint, and its commit if it is of a hub."""
    commit = plan.checkpoint.shards.commit
    return {"model": recipe.recipe.model, "fingerprint": plan.checkpoint.fingerprint()} | (
        {} if commit is None else {"commit": commit}
    )


def _numbering(block: FinishedBlock, plan: Plan) -> tuple[int, ...]:
    """The source's expert for every slot: those that stay, then those that are removed."""
    experts = plan.architecture.dimensions(plan.checkpoint.config)["experts"]
    gone = set(range(experts)) - set(block.kept_experts)
    return (*block.kept_experts, *sorted(gone))


def _renamed(entry: LedgerEntry, step: Step, experts: Mapping[str, Sequence[int]]) -> LedgerEntry:
    """A ledger entry with the tensor's name in the source instead of the plan's slot."""
    slot = step.tensor.expert
    if slot is None or step.tensor.block not in experts:
        return entry
    old, new = step.tensor.name, step.tensor.in_expert(experts[step.tensor.block][slot])
    return replace(entry, tensor=entry.tensor.replace(old, new), reason=entry.reason.replace(old, new))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
