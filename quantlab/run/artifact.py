"""What an artifact holds besides its weights: config, index, tokenizer, manifest and model card."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantlab.architectures.architecture import Role
from quantlab.architectures.families import MODULE_PATTERNS
from quantlab.checkpoint.index import INDEX_NAME, read_json
from quantlab.checkpoint.files import write_atomically
from quantlab.errors import ArtifactError
from quantlab.formats.compressed_tensors import QuantizationConfig
from quantlab.passes.apply import WeightReport
from quantlab.plan.model import Plan, Step, VariantPlan
from quantlab.recipe.load import LoadedRecipe
from quantlab.recipe.schemes import SCHEMES
from quantlab.run.journal import FileRecord, FinishedBlock
from quantlab.run.model_card import model_card

MANIFEST_NAME = "manifest.json"
_COMPANION_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken"}
_OWN_FILES = {"config.json", INDEX_NAME, MANIFEST_NAME}


def finish_artifact(
    plan: Plan, variant: VariantPlan, recipe: LoadedRecipe, directory: Path, blocks: Sequence[FinishedBlock]
) -> None:
    """Write everything but the shards. Each file depends on the plan and the weights alone, not on when it was made."""
    reports = {name: report for block in blocks for name, report in block.reports.items()}
    _write_json(directory / "config.json", patched_config(plan, variant))
    _write_json(directory / INDEX_NAME, _index(variant))
    _copy_companions(plan.checkpoint.directory, directory)
    write_atomically(directory / "README.md", model_card(plan, variant, recipe, reports).encode())
    files = {file.name: file for block in blocks for file in block.files}
    for path in sorted(directory.iterdir()):
        if path.name not in files and path.name != MANIFEST_NAME:
            data = path.read_bytes()
            files[path.name] = FileRecord(path.name, hashlib.sha256(data).hexdigest(), len(data))
    write_atomically(directory / MANIFEST_NAME, _manifest(plan, variant, recipe, files, reports))
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def manifest_key(artifact: Path) -> str:
    """The key of the plan that made an artifact.

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
    return str(read_json(path).get("key"))


def patched_config(plan: Plan, variant: VariantPlan) -> dict[str, Any]:
    """The source's config.json with only dtype and quantization_config changed.

    Re-serialising it through a config class would lose what that class does not know: `topk_method`, `scoring_func`.
    """
    config = dict(plan.checkpoint.config)
    config.pop("quantization_config", None)
    for field in [field for field in ("torch_dtype", "dtype") if field in config] or ["torch_dtype"]:
        config[field] = variant.dtype
    quantization = quantization_config(variant)
    if quantization is not None:
        config["quantization_config"] = quantization.to_json()
    return config


def quantization_config(variant: VariantPlan) -> QuantizationConfig | None:
    """How engines are told what is quantized; None if nothing is.

    With one scheme, every Linear is a target and the rest is ignored; with several, each scheme names its roles. Linears
    that were left alone one by one are ignored by name.
    """
    linears = [
        step
        for step in variant.steps
        if step.claim.rule is not None and (step.claim.rule.linear or step.claim.role == "router")
    ]
    roles_of: dict[str, list[Role]] = {}
    for step in linears:
        if step.quantize is not None and step.claim.role not in roles_of.setdefault(step.quantize.quantize, []):
            roles_of[step.quantize.quantize].append(step.claim.role)
    if not roles_of:
        return None
    quantized_roles = {role for roles in roles_of.values() for role in roles}
    present = {step.claim.role for step in linears} | {"lm_head"}
    ignore = [pattern for role, pattern in MODULE_PATTERNS.items() if role in present and role not in quantized_roles]
    ignore += [
        rf"re:model\.layers\.{layer}\..*"
        for layer in sorted({_layer(step) for step in linears if step.claim.role == "mtp"})
    ]
    ignore += [
        step.claim.name.removesuffix(".weight")
        for step in linears
        if step.claim.role in quantized_roles and step.quantize is None
    ]
    groups = []
    for scheme in SCHEMES.values():
        if scheme.name in roles_of:
            targets = (
                ("Linear",) if len(roles_of) == 1 else tuple(MODULE_PATTERNS[role] for role in roles_of[scheme.name])
            )
            groups.append((targets, scheme))
    return QuantizationConfig(tuple(groups), tuple(ignore))


def _layer(step: Step) -> int:
    assert step.claim.layer is not None, "multi-token prediction happens in layers"
    return step.claim.layer


def _index(variant: VariantPlan) -> dict[str, Any]:
    weight_map = {
        name: shard.file for block in variant.blocks for shard in block.shards for name, _, _ in shard.tensors
    }
    return {"metadata": {"total_size": variant.artifact_bytes}, "weight_map": weight_map}


def _copy_companions(source: Path, directory: Path) -> None:
    """Tokenizer, generation config, chat template, remote code and licence of the source."""
    for path in sorted(source.iterdir()):
        wanted = path.suffix in _COMPANION_SUFFIXES or path.name.upper().startswith("LICENSE")
        if path.is_file() and wanted and path.name not in _OWN_FILES:
            try:
                shutil.copyfile(path, directory / path.name)
            except OSError as error:
                raise ArtifactError(
                    "a file cannot be copied",
                    where=str(path),
                    found=error.strerror,
                    fix="free space, then run the same command again",
                ) from error


def _manifest(
    plan: Plan,
    variant: VariantPlan,
    recipe: LoadedRecipe,
    files: Mapping[str, FileRecord],
    reports: Mapping[str, WeightReport],
) -> bytes:
    head = {
        "schema": 1,
        "variant": variant.name,
        "description": variant.description,
        "key": variant.key,
        "source": {"model": recipe.recipe.model, "fingerprint": plan.checkpoint.fingerprint()},
        "recipe": {"name": recipe.name, "sha256": recipe.sha256, "text": recipe.content.decode()},
        "versions": {name: version(name) for name in ("quantlab", "torch", "compressed-tensors")},
        "files": {name: {"sha256": file.sha256, "bytes": file.nbytes} for name, file in sorted(files.items())},
    }
    ledger = []
    for step in variant.steps:
        for entry in step.ledger():
            report = reports.get(entry.tensor)
            ledger.append(asdict(entry) | (asdict(report) if report is not None else {}))
    # one line per tensor: a ledger of 90,000 entries stays readable with ordinary text tools
    lines = ",\n".join("  " + json.dumps(entry) for entry in ledger)
    return f'{json.dumps(head, indent=1)[:-2]},\n "ledger": [\n{lines}\n ]\n}}\n'.encode()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
