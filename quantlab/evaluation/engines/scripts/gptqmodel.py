"""Judges a model with GPTQModel; run in GPTQModel's environment: `python SCRIPT REQUEST.json RESULT_DIR`.

The model is loaded as a user loads it, by `GPTQModel.load` on the CPU, in a 16-bit dtype, because no kernel of GPTQModel takes
float32. What it computes then depends on the dtype of the request:

- 16 bits: whatever kernel GPTQModel chooses.
- float32: its kernel in plain torch, which expands the weights in the loaded dtype and multiplies in that of the inputs. All other
  parameters are widened to float32 after loading, so differences come from loading and expanding alone.

On a machine with fewer than two workers its loader refuses: the variable GPTQMODEL_CPU_WORKERS is set to at least 2. Imports nothing
of quantlab.
"""

import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PACKAGES = ("gptqmodel", "torch", "transformers", "accelerate", "defuser", "safetensors", "tokenizers")
_SPEED_REPEATS = 3


def main() -> None:
    """Read the request, compute, write the result."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if str(Path(path).resolve()) != here]  # this file has the engine's name
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # it compiles the expansion of every matrix, for minutes
    import torch

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    directory = Path(sys.argv[2])
    torch.set_num_threads(request["threads"])
    started = time.monotonic()
    model, notes = load(Path(request["model"]), request["dtype"])
    seconds = time.monotonic() - started
    missing, unexpected, rounded = compared(model, Path(request["model"]))
    with torch.inference_mode():
        tensors = probe(model, request.get("probes"))
        tensors |= score(model, request["documents"])
        if request.get("greedy"):
            tensors["greedy"] = greedy(model, request["greedy"]["prompts"], request["greedy"]["tokens"])
        prefill, decode = speed(model, request["documents"], request.get("speed"))
    from safetensors.torch import save_file

    save_file(tensors, directory / "result.safetensors")
    modules, unquantized = kernels(model)
    report = {
        "version": importlib.metadata.version("gptqmodel"),
        "versions": versions(),
        "dtype": request["dtype"],
        "load_seconds": seconds,
        "modules": modules,
        "unquantized": unquantized,
        "missing": missing,
        "unexpected": unexpected,
        "replaced": [],
        "rounded": rounded,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "notes": notes,
    }
    (directory / "result.json").write_text(json.dumps(report), encoding="utf-8")


def load(path: Path, dtype: str) -> tuple[Any, list[str]]:
    """The model of transformers inside GPTQModel's, and notes on the precision."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    if dtype != "float32":
        return GPTQModel.load(str(path), device="cpu", dtype=getattr(torch, dtype)).model.eval(), []
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    narrow = torch.float16 if stored == "float16" else torch.bfloat16
    model = GPTQModel.load(str(path), device="cpu", dtype=narrow, backend=BACKEND.GPTQ_TORCH).model.eval()
    widen(model)
    return model, [f"weights are expanded in {str(narrow).removeprefix('torch.')}, products are float32"]


def widen(model: Any) -> None:
    """Make every parameter and buffer float32 but those of quantized linears."""
    import torch

    for module in model.modules():
        if hasattr(module, "qweight"):
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.float() if parameter.is_floating_point() else parameter.data
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.float())
    model.config.dtype = torch.float32


def compared(model: Any, path: Path) -> tuple[list[str], list[str], list[str]]:
    """Names of the model's parameters and buffers that the checkpoint lacks, of its tensors that the model lacks, and of those that the
    model holds with other values: its loader rounds float32 to the dtype of the others, and reports none of this.
    """
    state = model.state_dict()
    wide = float32_tensors(path)
    rounded = sorted(name for name, tensor in wide.items() if name in state and not (state[name] == tensor).all())
    stored = stored_names(path)
    held = {name for name, tensor in state.items() if tensor.numel()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    if not model.config.tie_word_embeddings:
        tied = set()
    return sorted(held - stored - tied), sorted(stored - held), rounded


def stored_names(path: Path) -> set[str]:
    """The names of a checkpoint's tensors."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    return names


def float32_tensors(path: Path) -> dict[str, Any]:
    """A checkpoint's float32 tensors by name."""
    import torch
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        found |= {name: tensor for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    return found


def kernels(model: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Linears by class and number format, and the names of those that are not quantized."""
    import torch

    groups: dict[tuple[str, str | None], list[str]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            symmetric = "" if module.sym else " asymmetric"
            scheme = f"int{module.bits} per group of {module.group_size}{symmetric}"
            groups.setdefault((type(module).__name__, scheme), []).append(name)
        elif isinstance(module, torch.nn.Linear):
            groups.setdefault((type(module).__name__, None), []).append(name)
    found = [
        {"module": kind, "scheme": scheme, "kernel": kind if scheme else None, "count": len(names), "example": names[0]}
        for (kind, scheme), names in groups.items()
    ]
    return found, sorted(name for (_, scheme), names in groups.items() if scheme is None for name in names)


def probe(model: Any, path: str | None) -> dict[str, Any]:
    """The outputs of single linears for given inputs, float32."""
    if path is None:
        return {}
    from safetensors.torch import load_file

    dtype = next(model.parameters()).dtype
    return {
        f"probe.{name}": model.get_submodule(name)(inputs.to(dtype)[None])[0].float().contiguous()
        for name, inputs in load_file(path).items()
    }


def score(model: Any, documents: list[list[int]]) -> dict[str, Any]:
    """Negative log-likelihood of every given token, and the most likely one in its place."""
    import torch

    nll, top = [], []
    for document in documents:
        ids = torch.tensor([document])
        logs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        nll.append(-logs.gather(1, ids[0, 1:, None])[:, 0])
        top.append(logs.argmax(-1))
    return {"nll": torch.cat(nll), "top": torch.cat(top)}


def greedy(model: Any, prompts: list[list[int]], count: int) -> Any:
    """Greedy continuations [prompts, count], not ended by an end token."""
    import torch

    return torch.tensor([continued(model, prompt, count) for prompt in prompts])


def continued(model: Any, prompt: list[int], count: int) -> list[int]:
    """The greedy continuation of one prompt."""
    import torch

    ids, cache, found = torch.tensor([prompt]), None, []
    for _ in range(count):
        result = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, ids = result.past_key_values, result.logits[:, -1].argmax(-1, keepdim=True)
        found.append(int(ids))
    return found


def speed(
    model: Any,
    documents: list[list[int]],
    wanted: dict[str, int] | None,
) -> tuple[float | None, float | None]:
    """Tokens per second of prefill and of decoding one sequence; the best of some repeats."""
    if wanted is None:
        return None, None
    import torch

    flat = [token for document in documents for token in document]
    prompt = (flat * (wanted["prefill"] // len(flat) + 1))[: wanted["prefill"]]
    ids = torch.tensor([prompt])
    prefill = best(lambda: model(input_ids=ids, use_cache=False))
    decode = best(lambda: continued(model, prompt[:8], wanted["decode"]))
    return wanted["prefill"] / prefill, wanted["decode"] / decode


def best(call: Callable[[], Any]) -> float:
    """The shortest seconds of some calls."""
    found = []
    for _ in range(_SPEED_REPEATS):
        started = time.monotonic()
        call()
        found.append(time.monotonic() - started)
    return min(found)


def versions() -> dict[str, str]:
    """Versions of the packages that matter, where they are installed."""
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
