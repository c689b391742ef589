"""Plans: every tensor has one outcome, sizes, serving rules; from headers alone and without torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quantlab.checkpoint.index import open_checkpoint
from quantlab.errors import PlanError
from quantlab.formats.layout import stored_bytes
from quantlab.plan import compile as compiler
from quantlab.plan.compile import compile_plan
from quantlab.plan.model import Plan
from quantlab.recipe.load import load_recipe

WriteRecipe = Callable[..., Path]
ALL = """\
  fp16: [{cast: float16}]
  int8: [{quantize: int8}]
  int8_weight: [{quantize: int8_weight}]
  w4a16: [{quantize: int4_g128}]
  with-kv_b: [{quantize: int4_g64, targets: [attention, kv_b]}]
  pruned: [{cast: float16}, {prune: 0.08}]
  pruned-w4a16: [{prune: 0.08}, {quantize: int4_g128}]
"""


def make_plan(recipe: Path) -> Plan:
    loaded = load_recipe(recipe)
    return compile_plan(loaded.recipe, open_checkpoint(loaded.model))


@pytest.fixture(params=["llama", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3"])
def plan(request: pytest.FixtureRequest, checkpoints: dict[str, Path], write_recipe: WriteRecipe) -> Plan:
    variants = ALL if request.param.startswith("deepseek") else ALL.replace(", kv_b]", "]")
    return make_plan(write_recipe(checkpoints[request.param], variants))


def test_every_source_tensor_has_exactly_one_outcome(plan: Plan) -> None:
    for variant in plan.variants:
        entries = [entry.tensor for step in variant.steps for entry in step.ledger()]
        assert sorted(entries) == sorted(plan.checkpoint.tensors)
        stored = [name for step in variant.steps for name, _, _ in step.outputs]
        assert len(set(stored)) == len(stored)


def test_shards_hold_every_output_once_and_block_after_block(plan: Plan) -> None:
    for variant in plan.variants:
        names = [block.name for block in variant.blocks]
        assert len(set(names)) == len(names)
        assert names[0] == "embeddings"
        assert names[-1] == "head"
        files = [shard.file for block in variant.blocks for shard in block.shards]
        assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]


def test_large_blocks_are_cut_into_shards(
    checkpoints: dict[str, Path], write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "LARGEST_SHARD", 200_000)
    plan = make_plan(write_recipe(checkpoints["deepseek_v2"], ALL))
    for variant in plan.variants:
        sizes = [sum(map(stored_bytes, shard.tensors)) for block in variant.blocks for shard in block.shards]
        assert max(sizes) <= 200_000
        assert sum(sizes) == variant.artifact_bytes
    assert any(len(block.shards) > 1 for block in plan.variants[0].blocks)


def test_default_targets_leave_what_engines_expect_unchanged(
    checkpoints: dict[str, Path], write_recipe: WriteRecipe
) -> None:
    plan = make_plan(write_recipe(checkpoints["deepseek_v3"], "  w4a16: [{quantize: int4_g128}]\n"))
    quantized = {step.tensor.role for step in plan.variants[0].steps if step.quantize}
    assert quantized == {"routed_experts", "shared_experts", "dense_mlp", "attention"}
    outcomes = {entry.tensor: entry for step in plan.variants[0].steps for entry in step.ledger()}
    assert outcomes["model.layers.1.mlp.gate.e_score_correction_bias"].outcome == "kept"
    assert outcomes["model.layers.1.self_attn.kv_b_proj.weight"].outcome == "cast"
    assert outcomes["model.layers.1.self_attn.kv_b_proj.weight_scale_inv"].outcome == "dropped"
    assert outcomes["model.layers.3.mlp.experts.0.up_proj.weight"].role == "mtp"


def test_correction_bias_keeps_float32_under_a_cast(checkpoints: dict[str, Path], write_recipe: WriteRecipe) -> None:
    plan = make_plan(write_recipe(checkpoints["deepseek_v3"], "  fp16: [{cast: float16}]\n"))
    dtypes = {step.tensor.name.rsplit(".", 1)[-1]: step.outputs[0][1] for step in plan.variants[0].steps}
    assert dtypes == {"weight": "F16", "e_score_correction_bias": "F32"}


REFUSED = [
    ("deepseek_v3", "[{quantize: int4_g128, ignore: ['*q_a_proj']}]", "engines fuse these matrices into one (layer 0 q_a+kv_a)", "target or ignore all"),
    ("deepseek_v3", "[{quantize: int4_g128, ignore: ['*experts.3.*']}]", "engines use one kernel for all experts of a layer (layer 1)", "target or ignore all"),
    ("deepseek_v3", "[{quantize: int4_g128, ignore: ['*.mlp.gate_proj']}]", "engines fuse these matrices into one (layer 0 gate+up)", "target or ignore all"),
    ("llama", "[{quantize: int8, ignore: ['*k_proj']}]", "engines fuse these matrices into one (layer 0 q+k+v)", "target or ignore all"),
    ("llama", "[{quantize: int8, targets: [routed_experts]}]", "a target matches nothing", "attention, dense_mlp"),
    ("llama", "[{prune: 0.1, targets: [attention, kv_b]}]", "a target matches nothing", "attention, dense_mlp"),
    ("llama", "[{quantize: int8, ignore: ['*nothing*']}]", "an ignore pattern matches nothing", "model.layers.0"),
    ("llama", "[{quantize: int8, targets: [attention]}, {quantize: int4_g64, targets: [attention, dense_mlp]}]", "two passes of one kind target the same weight", "disjoint"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "variant", "what", "fix"), REFUSED, ids=range(len(REFUSED)))
def test_variants_that_no_engine_supports_are_refused(
    family: str, variant: str, what: str, fix: str, checkpoints: dict[str, Path], write_recipe: WriteRecipe
) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(write_recipe(checkpoints[family], f"  bad: {variant}\n"))
    assert caught.value.what.startswith(what)
    assert fix in (caught.value.fix or "")
    assert "variant bad" in (caught.value.where or "")


def test_a_group_that_does_not_divide(tmp_path: Path, checkpoints: dict[str, Path], write_recipe: WriteRecipe) -> None:
    from safetensors.torch import load_file, save_file

    narrow = tmp_path / "narrow"
    narrow.mkdir()
    config = json.loads((checkpoints["llama"] / "config.json").read_text()) | {"intermediate_size": 192}
    (narrow / "config.json").write_text(json.dumps(config))
    tensors = load_file(checkpoints["llama"] / "model.safetensors")
    for name in tensors:
        if "down_proj" in name:
            tensors[name] = tensors[name][:, :192].contiguous()
        elif "gate_proj" in name or "up_proj" in name:
            tensors[name] = tensors[name][:192].contiguous()
    save_file(tensors, narrow / "model.safetensors")
    with pytest.raises(PlanError) as caught:
        make_plan(write_recipe(narrow, "  bad: [{quantize: int4_g128}]\n"))
    assert caught.value.what == "the group does not divide a matrix"
    assert caught.value.found == "192 columns in groups of 128 (int4_g128)"
    assert "use int4_g64" in (caught.value.fix or "")
    plan = make_plan(
        write_recipe(
            narrow,
            "  ok: [{quantize: int4_g64, ignore: []}]\n  left: [{quantize: int4_g128, ignore: ['*.down_proj']}]\n",
        )
    )
    assert plan.variants[0].tensor_parallel == (1,)


def test_tensor_parallel_sizes(checkpoints: dict[str, Path], write_recipe: WriteRecipe) -> None:
    plan = make_plan(
        write_recipe(checkpoints["llama"], "  g32: [{quantize: int4_g32}]\n  g128: [{quantize: int4_g128}]\n")
    )
    assert [variant.tensor_parallel for variant in plan.variants] == [(1, 2, 4), (1,)]


def test_the_key_names_what_determines_the_bytes(checkpoints: dict[str, Path], write_recipe: WriteRecipe) -> None:
    def keys(variants: str, family: str = "llama") -> list[str]:
        return [variant.recipe_key for variant in make_plan(write_recipe(checkpoints[family], variants)).variants]

    first = keys("  a: [{quantize: int8}]\n")
    assert (
        keys("  # a comment\n  b: [{quantize: int8, algorithm: {name: rtn}}]\n  c: [{cast: float16}]\n")[0] == first[0]
    )
    assert keys("  a: [{quantize: int8_weight}]\n") != first
    assert keys("  a: [{quantize: int8}]\n", family="qwen2") != first


def test_planning_imports_no_torch(checkpoints: dict[str, Path], write_recipe: WriteRecipe) -> None:
    recipe = write_recipe(checkpoints["deepseek_v3"], ALL)
    code = (
        "import sys; sys.argv = ['quantlab', 'plan', sys.argv[1], '--json']\n"
        "from quantlab.cli import app\n"
        "try: app()\n"
        "finally: print([m for m in ('torch', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(recipe)], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"
    printed = json.loads(done.stdout)
    assert [row["variant"] for row in printed["variants"]] == [variant.name for variant in make_plan(recipe).variants]


@pytest.mark.parametrize(
    "module",
    ["quantlab.recipe.load", "quantlab.architectures.detect", "quantlab.plan.compile", "quantlab.evaluation.record"],
)
def test_layers_without_torch_import_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
