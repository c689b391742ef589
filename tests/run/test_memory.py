"""Peak memory of a run: bounded by its largest weight, not the checkpoint's size, and by the plan's estimate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE = 1024, 16384


def make_checkpoint(directory: Path, layers: int) -> Path:
    directory.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 1000,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    weight_map = {}

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        save_file({name: torch.rand(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, directory / file)
        weight_map.update(dict.fromkeys(shapes, file))

    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes: dict[str, tuple[int, ...]] = {
            prefix + f"self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"
        }
        shapes |= {prefix + f"mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        shapes |= {prefix + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE)}
        shapes |= {prefix + f"{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        write(f"layer-{layer}.safetensors", shapes)
    write(
        "ends.safetensors",
        {"model.embed_tokens.weight": (1000, HIDDEN), "lm_head.weight": (1000, HIDDEN), "model.norm.weight": (HIDDEN,)},
    )
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


DRIVER = """
import sys
from quantlab.cli import app
try:
    app()
except SystemExit as end:
    assert not end.code
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_of(recipe: Path, out: Path) -> int:
    """Largest resident bytes of `quantlab run`, measured in its own process: the parent's accounting of a child
    includes the parent's pages. glibc is configured to return freed memory at once; otherwise it keeps a varying number
    of megabytes."""
    command = [sys.executable, "-c", DRIVER, "run", str(recipe), "--out", str(out), "--quiet"]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout) * 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    "passes", ["[{cast: float16}]", "[{quantize: int4_g128, algorithm: {name: rtn, clip: mse}}]", "[{prune: 0.08}]"]
)
def test_the_peak_does_not_grow_with_the_checkpoint_and_the_plan_bounds_it(passes: str, tmp_path: Path) -> None:
    peaks = []
    for layers in (1, 4):
        make_checkpoint(tmp_path / f"model-{layers}", layers)
        recipe = tmp_path / f"{layers}.yaml"
        recipe.write_text(f"model: model-{layers}\nvariants:\n  v: {passes}\n")
        peaks.append(peak_of(recipe, tmp_path / f"out-{layers}"))
    plan = subprocess.run(
        [sys.executable, "-m", "quantlab", "plan", str(recipe), "--json"], capture_output=True, check=True
    )
    assert peaks[1] < peaks[0] + 40_000_000, "326 MB more of checkpoint"
    assert max(peaks) <= json.loads(plan.stdout)["variants"][0]["peak_memory_bytes"]
