"""Everything beside the weights of a source is in the artifact, or named in its manifest as left out."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

from quantlab.checkpoint import hub
from quantlab.evaluation.verify import verify
from quantlab.run.directory import RunDirectory
from tests.run.test_pipeline import run

CARRIED = (
    "LICENSE", "LICENSE-MODEL", "LICENSE.txt", "NOTICE", "NOTICE.txt", "USE_POLICY.md", "USE_POLICY",
    "additional_chat_templates/tools.jinja", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "configuration_deepseek.py", "generation_config.json", "merges.txt", "modeling_deepseek.py",
    "preprocessor_config.json", "processor_config.json", "special_tokens_map.json", "spiece.model",
    "tokenizer.model", "tokenizer_config.json", "tokenizer.tiktoken", "vocab.json", "vocab.txt", "recipe.yaml",
)  # fmt: skip
LEFT_OUT = (
    "README.md", ".gitattributes", ".git", "adapter_config.json", "consolidated.safetensors", "gone.txt",
    "hf_quant_config.json", "manifest.json", "optimizer.pt", "original", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "quantize_config.json", "weights.gguf",
)  # fmt: skip


def with_companions(source: Path, copy: Path) -> Path:
    shutil.copytree(source, copy)
    for name in (*CARRIED, *LEFT_OUT):
        path = copy / name
        if name in {"original", ".git"}:
            path.mkdir()
            (path / "config").write_text("{}")
        elif name == "gone.txt":
            path.symlink_to(copy / "blobs" / "0123")
        elif not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"file": name}))
    return copy


def test_every_file_is_carried_or_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = with_companions(checkpoints["llama"], tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {source}\nvariants:\n  w4a16: [{{quantize: int4_g128}}]\n")
    artifact = run(recipe, tmp_path / "out").artifact("w4a16")
    manifest = json.loads((artifact / "manifest.json").read_text())
    for name in CARRIED:
        assert (artifact / name).read_bytes() == (source / name).read_bytes()
        assert name in manifest["files"]
    assert set(manifest["left_out"]) == set(LEFT_OUT)
    assert all(manifest["left_out"].values())
    for name in set(LEFT_OUT) - {"README.md", "manifest.json"}:
        assert not (artifact / name).exists()
    assert "w4a16" in (artifact / "README.md").read_text()
    checks = list(verify(artifact))
    assert [check for check in checks if check.verdict == "failed"] == []
    (artifact / "additional_chat_templates" / "more.jinja").write_text("")
    assert next(verify(artifact)).detail == "additional_chat_templates/more.jinja is not in the manifest"


def test_small_files_of_a_killed_run_are_replaced(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = with_companions(checkpoints["llama"], tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {source}\nvariants:\n  w4a16: [{{quantize: int4_g128}}]\n")
    templates = RunDirectory(tmp_path / "out").shards("w4a16") / "additional_chat_templates"
    templates.mkdir(parents=True)
    (templates / "old.jinja").write_text("")
    artifact = run(recipe, tmp_path / "out").artifact("w4a16")
    assert [path.name for path in (artifact / "additional_chat_templates").iterdir()] == ["tools.jinja"]


def test_the_hub_is_asked_for_all_of_them() -> None:
    assert [name for name in CARRIED if not any(fnmatch(name, pattern) for pattern in hub._SMALL)] == []
