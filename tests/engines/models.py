"""Small random models that serving engines can run, and artifacts of them.

Engines have kernels for the head sizes of released models alone: MLA for a latent of 512 and 64 rotary dimensions. These models have
DeepSeek's true sizes and scaled rotary frequencies there, few layers, few heads and small matrices elsewhere. They are stored in
bfloat16, because an engine without FP8 must compute the source too: it is the reference for what the engine does to artifacts.
"""

from pathlib import Path

from quantlab.checkpoint.index import open_checkpoint
from quantlab.plan.compile import compile_plan
from quantlab.recipe.load import load_recipe
from quantlab.run.directory import RunDirectory
from quantlab.run.execute import make_artifacts
from tests.checkpoints import CONFIGS, make_checkpoint

FAMILIES = tuple(CONFIGS)
SIZES: dict[str, object] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
}
_MLA: dict[str, object] = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 256,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 128,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
_OWN: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "deepseek_v2": _MLA,
    "deepseek_v3": {**_MLA, "q_lora_rank": 256},
}

VARIANTS: dict[str, str] = {
    "fp16": "[{cast: float16}]",
    "int4_g128": "[{quantize: int4_g128}]",
    "int4_g128_asym": "[{quantize: int4_g128_asym}]",
    "int8_weight": "[{quantize: int8_weight}]",
    "int8": "[{quantize: int8}]",
    "fp8_block": "[{quantize: fp8_block}]",
    "pruned": "[{cast: float16}, {prune: 0.5}]",
    "w4a16-experts": "[{quantize: int4_g128, targets: [routed_experts]}]",
}
"""Passes of a recipe by the name of the variant; the last needs routed experts."""


def variants_of(family: str) -> tuple[str, ...]:
    """The variants that a family can have."""
    routed = "n_routed_experts" in CONFIGS[family]
    return tuple(name for name, passes in VARIANTS.items() if routed or "routed_experts" not in passes)


def make_model(directory: Path, family: str) -> Path:
    """Write the model of a family, in bfloat16, and return its directory."""
    return make_checkpoint(directory, family, sizes={**SIZES, **_OWN[family]}, fp8=False)


def make_variants(model: Path, out: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """Make artifacts of a model with quantlab.

    Args:
        model: directory of the source.
        out: directory of the run, created here.
        names: keys of `VARIANTS`.

    Returns:
        The directory of each artifact.
    """
    out.mkdir(parents=True)
    recipe = out / "recipe.yaml"
    lines = "".join(f"  {name}: {VARIANTS[name]}\n" for name in names)
    recipe.write_text(f"model: {model}\nvariants:\n{lines}")
    loaded = load_recipe(recipe)
    plan = compile_plan(loaded.recipe, open_checkpoint(model))
    directory = RunDirectory(out / "run")
    make_artifacts(plan, loaded, directory, lambda _: lambda _: None)
    return {name: directory.artifact(name) for name in names}
