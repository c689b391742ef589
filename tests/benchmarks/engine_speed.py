"""Speed of one model in quantlab's runtime, llama.cpp and vLLM's CPU build, side by side on one machine.

A random llama is quantized by quantlab without calibration, exported to GGUF where llama.cpp has the format, and timed in each
engine: tokens per second of decoding one sequence and of reading a prompt, seconds to load, peak memory. Every run is a process of
its own, and all of them take turns in every round, so that other load on the machine affects them equally. Cells are medians over the
rounds; a ratio is the median over the rounds of quantlab's rate divided by the engine's.

Random weights are as fast as trained ones. The head is in 16 bits everywhere. Models, artifacts and exports stay in WORK.

    python tests/benchmarks/engine_speed.py --work WORK --engine-python llama.cpp=ENV/bin/python --engine-python vllm=ENV/bin/python
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from quantlab.engine_pythons import Environment
from quantlab.evaluation.engines.engine import ENGINES, Engine
from quantlab.evaluation.engines.process import EngineFailure, EngineReport, Wanted, run_engine
from quantlab.hardware import processor

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "eval" / "reference" / "deepseek-v3-mini"
SIZES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
}
"""Widths of TinyLlama-1.1B, and of a model that tries the script."""
VARIANTS = {
    "16 bits": ("bf16", "[{cast: bfloat16}]", "gguf"),
    "int8_weight": ("int8-weight", "[{quantize: int8_weight}]", "gguf"),
    "int8": ("int8", "[{quantize: int8}]", None),
    "int4": ("int4", "[{quantize: int4_g32, algorithm: {name: rtn, clip: none}}]", "gguf"),
}
"""Column -> variant, its passes, and the format that llama.cpp reads."""
OURS = replace(
    ENGINES["transformers"],
    stem="engine_quantlab",
    folder=Path(__file__).parent,
    environment={"PYTHONPATH": str(ROOT)},
)
"""quantlab's runtime, run like an engine."""


@dataclass(frozen=True)
class Run:
    """One model in one engine.

    Attributes:
        column: number format of the table.
        name: of the engine.
        engine, environment, model: as for `run_engine`.
    """

    column: str
    name: str
    engine: Engine
    environment: Environment
    model: Path


def make_model(directory: Path, size: str) -> None:
    """Write a random llama in bfloat16, with the tokenizer of the reference model."""
    vocabulary = json.loads((TOKENIZER / "config.json").read_text())["vocab_size"]
    heads = SIZES[size]["num_attention_heads"]
    config = LlamaConfig(
        **SIZES[size],
        num_key_value_heads=max(heads // 8, 1),
        vocab_size=max(vocabulary, 32000 if size == "1b" else 0),
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    directory.mkdir(parents=True)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, directory / "model.safetensors", {"format": "pt"}
    )
    config.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((TOKENIZER / name).read_bytes())


def make_artifacts(work: Path, size: str) -> dict[str, tuple[Path, Path | None]]:
    """The artifact of each column and its export, made where they are not there."""
    model = work / size
    if not model.is_dir():
        make_model(model, size)
    variants = "".join(
        f"  {name}: {{passes: {passes}{f', format: {form}' if form else ''}}}\n"
        for name, passes, form in VARIANTS.values()
    )
    recipe = work / f"{size}.yaml"
    recipe.write_text(f"model: {model}\nvariants:\n{variants}")
    out = work / f"{size}-run"
    command = [sys.executable, "-m", "quantlab", "run", str(recipe), "--out", str(out), "--device", "cpu"]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    found = {}
    for column, (name, _, form) in VARIANTS.items():
        files = sorted((out / "exports" / f"{name}.{form}").glob("*.gguf"))
        found[column] = (out / "artifacts" / name, files[0] if files else None)
    return found


def runs_of(made: dict[str, tuple[Path, Path | None]], pythons: dict[str, Path]) -> Iterator[Run]:
    """Every model in every engine that is there and has the format."""
    for column, (artifact, export) in made.items():
        yield Run(column, "quantlab", OURS, Environment(Path(sys.executable), "this Python"), artifact)
        for name, python in pythons.items():
            model = export if name == "llama.cpp" else artifact
            if model is not None:
                yield Run(column, name, ENGINES[name], Environment(python, "--engine-python"), model)


def measure(run: Run, threads: int, speed: tuple[int, int]) -> EngineReport | EngineFailure:
    """Time one model once."""
    documents = (tuple(range(5, 5 + 16)),)
    wanted = Wanted(run.model, "bfloat16", threads, documents, speed=speed)
    found = run_engine(run.engine, run.environment, wanted, seconds=1800)
    return found if isinstance(found, EngineFailure) else found.report


def cells(report: EngineReport) -> dict[str, float | None]:
    """The numbers of one run, by the name of their table."""
    memory = report.peak_memory_bytes
    return {
        "decode, tokens/s": report.decode_tokens_per_second,
        "prefill, tokens/s": report.prefill_tokens_per_second,
        "load, s": report.load_seconds,
        "peak memory, GB": None if memory is None else memory / 1e9,
    }


def table(
    title: str, found: dict[tuple[str, str], list[float | None]], failures: dict[tuple[str, str], str]
) -> list[str]:
    """One quantity of every engine and format, with quantlab's ratio to each engine."""
    names = list(dict.fromkeys(name for _, name in (*found, *failures)))
    lines = [f"## {title}", "", "| | " + " | ".join(VARIANTS) + " |", "|---" * (len(VARIANTS) + 1) + "|"]
    for name in names:
        row = []
        for column in VARIANTS:
            values = [value for value in found.get((column, name), []) if value is not None]
            ours = [value for value in found.get((column, "quantlab"), []) if value is not None]
            if not values:
                row.append("fails" if (column, name) in failures else "–")
                continue
            text = f"{statistics.median(values):.3g}"
            if name != "quantlab" and len(ours) == len(values):
                text += f" ({statistics.median(a / b for a, b in zip(ours, values, strict=True)):.2f}x)"
            row.append(text)
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return [*lines, ""]


def page(
    reports: dict[tuple[str, str], list[EngineReport]],
    failures: dict[tuple[str, str], str],
    options: argparse.Namespace,
) -> str:
    """The tables, their conditions, and what failed."""
    versions = sorted({f"{name} {report.version}" for (_, name), each in reports.items() for report in each})
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    lines = [
        "# Engines side by side on the CPU",
        "",
        f"Written by `tests/benchmarks/engine_speed.py`; {processor()}, {options.threads} threads, load average {load} at the end; "
        f"{', '.join(versions)}. Random llama of size {options.size}, activations in bfloat16, prompt of {options.prefill} tokens, "
        f"{options.decode} decoded tokens, one sequence, medians of {options.rounds} rounds. In parentheses: quantlab's number divided "
        "by the engine's.",
        "",
    ]
    for title in cells(EngineReport(version="", dtype="bfloat16")):
        found = {key: [cells(report)[title] for report in each] for key, each in reports.items()}
        lines += table(title, found, failures)
    lines += [f"- {name}, {column}: {reason}" for (column, name), reason in failures.items()]
    return "\n".join(lines).rstrip() + "\n"


def options_of_command() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory of models, artifacts and exports")
    parser.add_argument("--engine-python", action="append", default=[], metavar="ENGINE=PATH", help="llama.cpp or vllm")
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prefill", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=32, help="tokens that are decoded")
    parser.add_argument("--out", type=Path, help="also write a page of Markdown, and the runs as JSON beside it")
    return parser.parse_args()


def main() -> None:
    """Make the models, time every engine in turn, print the tables."""
    options = options_of_command()
    pythons = {name: Path(path) for name, _, path in (text.partition("=") for text in options.engine_python)}
    options.work.mkdir(parents=True, exist_ok=True)
    runs = list(runs_of(make_artifacts(options.work.absolute(), options.size), pythons))
    reports: dict[tuple[str, str], list[EngineReport]] = defaultdict(list)
    failures: dict[tuple[str, str], str] = {}
    for turn in range(options.rounds):
        for run in runs[turn % len(runs) :] + runs[: turn % len(runs)]:
            key = (run.column, run.name)
            if key in failures:
                continue
            found = measure(run, options.threads, (options.prefill, options.decode))
            if isinstance(found, EngineFailure):
                failures[key] = found.reason
            else:
                reports[key].append(found)
            print(turn, *key, found.reason if isinstance(found, EngineFailure) else cells(found), file=sys.stderr)
    text = page(reports, failures, options)
    print(text)
    if options.out is not None:
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")
        kept: list[dict[str, Any]] = [
            {"format": column, "engine": name, **cells(report)}
            for (column, name), each in reports.items()
            for report in each
        ]
        options.out.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
