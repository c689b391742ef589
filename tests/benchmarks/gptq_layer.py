"""Seconds that GPTQ takes for one decoder layer of a released model on one GPU, from random weights at true shapes.

    python -m tests.benchmarks.gptq_layer --model v3 --device cuda --out record.json

The released model's config, one MoE layer, every routed expert (or all linears), hidden states of `samples` x `length` random
tokens. Reading the weights from disk is not part of it: the conversion benchmark measures that. The record is one JSON.
"""

import argparse
import json
import platform
import tempfile
import time
import zlib
from pathlib import Path

import torch

from quantlab.calibration.hidden import Workspace
from quantlab.calibration.layer import Skeleton
from quantlab.checkpoint.index import open_checkpoint
from quantlab.plan.compile import compile_plan
from quantlab.plan.model import Plan
from quantlab.recipe.load import load_recipe
from quantlab.run.block import edit_layer
from quantlab.run.flow import EditedFlow
from quantlab.run.layer import EditedLayer, Model, Skeletons
from quantlab.run.shared import SharedStages, Unchanged
from quantlab.run.weights import BlockWeights
from tests.true_shapes import V2_LITE, V3, write_headers

MODELS = {
    "v3": V3
    | {"n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "v2-lite": V2_LITE | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 6, "topk_method": "greedy"},
}
TARGETS = {"experts": ", targets: [routed_experts]", "all": ""}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=MODELS, default="v3")
    parser.add_argument("--targets", choices=TARGETS, default="experts")
    parser.add_argument("--correction", type=float, default=None, help="of gptq; by default the recipe's default")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        record = measure(arguments, Path(directory))
    print(json.dumps(record, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, object]:
    """One layer, once."""
    config = MODELS[arguments.model]
    layer = config["first_k_dense_replace"]
    config = config | {"num_hidden_layers": layer + 1, "num_nextn_predict_layers": 0}
    plan, device = plan_of(config, arguments, directory), torch.device(arguments.device)
    block = next(block for block in plan.variants[0].blocks if block.name == f"layer {layer}")
    steps = {step.tensor.name: step for shard in block.shards for step in shard.steps}
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    whole = Skeleton(plan.checkpoint.config, dtype=dtype, device=device)
    room = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 0
    workspace = Workspace(directory, memory_bytes=32 << 30, device=device, device_bytes=room)
    generator = torch.Generator(device=device).manual_seed(0)

    def read(step):  # the same weight whenever it is read
        generator.manual_seed(zlib.crc32(step.tensor.name.encode()))
        weight = torch.randn(step.source.shape, dtype=torch.float32, device=device, generator=generator)
        return weight.mul_(0.5).add_(1) if weight.dim() == 1 else weight.mul_(0.02).to(torch.bfloat16)

    samples, length = arguments.samples, arguments.length
    changed, before = (workspace.stream(samples, length, whole.width, dtype=dtype) for _ in range(2))
    for sample in range(samples):
        hidden = torch.randn(1, length, whole.width, device=device, generator=generator)
        before.write(slice(sample, sample + 1), hidden.to(dtype))
        noise = torch.randn(hidden.shape, device=device, generator=generator).mul_(0.05)
        changed.write(slice(sample, sample + 1), (hidden + noise).to(dtype))
    corrects = plan.variants[0].uses_unchanged_model
    stages = SharedStages(directory / "shared", budget=0)
    if corrects:
        stages.save(layer - 1, before)
    tokens = torch.zeros(samples, length, dtype=torch.int64)
    unchanged = Unchanged(whole, tokens, lambda name: read(steps[name]), before, stages) if corrects else None
    model = Model(
        plan.architecture,
        plan.checkpoint.config,
        Skeletons(whole, whole),
        follows=True,
        compares=corrects,
        tokens=samples * length,
    )
    weights = BlockWeights(block, read)
    start = time.perf_counter()
    edited = EditedLayer(model, layer, weights)
    flow = EditedFlow(edited, changed, unchanged, workspace)
    filled = time.perf_counter()
    profiler = torch.profiler.profile() if arguments.profile else None
    if profiler is not None:
        profiler.start()
    edit_layer(plan.variants[0], edited, flow)
    if device.type == "cuda":
        torch.cuda.synchronize()
    done = time.perf_counter()
    if profiler is not None:
        profiler.stop()
        print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))
    found = [weights.pop(name)[1] for name in steps]
    reports = [report for report in found if report is not None and report.output_error is not None]
    return {
        "model": arguments.model,
        "targets": arguments.targets,
        "recipe": plan.variants[0].description,
        "corrects": corrects,
        "calibration_tokens": samples * length,
        "matrices": len(reports),
        "seconds": round(done - filled, 2),
        "fill_seconds": round(filled - start, 2),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "output_error": sum(report.output_error for report in reports) / len(reports),
        "rtn_output_error": sum(report.rtn_output_error for report in reports) / len(reports),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def plan_of(config: dict[str, object], arguments: argparse.Namespace, directory: Path) -> Plan:
    """The plan of a recipe with one variant over headers at true shapes."""
    model = write_headers(directory / "model", config, shards=1)
    (directory / "text.jsonl").write_text(json.dumps({"text": "text"}) + "\n")
    correction = "" if arguments.correction is None else f", correction: {arguments.correction}"
    recipe = directory / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\n"
        f"calibration: {{corpus: text.jsonl, samples: {arguments.samples}, length: {arguments.length}}}\n"
        f"variants:\n  w4a16: [{{quantize: int4_g{arguments.group}{TARGETS[arguments.targets]}, "
        f"algorithm: {{name: gptq{correction}}}}}]\n"
    )
    loaded = load_recipe(recipe)
    return compile_plan(loaded.recipe, open_checkpoint(model), corpus_sha256=loaded.corpus_sha256())


if __name__ == "__main__":
    main()
