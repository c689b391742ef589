"""Judges a model with transformers; run in transformers' environment: `python SCRIPT REQUEST.json RESULT_DIR`.

The model is loaded as a user loads it, by `AutoModelForCausalLM.from_pretrained`. transformers only warns about parameters without
a tensor, so they are reported. Imports nothing of quantlab.
"""

import importlib.metadata
import inspect
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PACKAGES = ("transformers", "torch", "compressed-tensors", "bitsandbytes", "safetensors", "tokenizers", "accelerate")
_SPEED_REPEATS = 3


def main() -> None:
    """Read the request, compute, write the result."""
    import torch

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    directory = Path(sys.argv[2])
    torch.set_num_threads(request["threads"])
    started = time.monotonic()
    model, missing, unexpected = load(request["model"], getattr(torch, request["dtype"]))
    seconds = time.monotonic() - started
    with torch.inference_mode():
        modules, unquantized = schemes(model)  # before a forward pass, which expands packed weights
        tensors = score(model, request["documents"])
        tensors |= probe(model, request.get("probes"))
        if request.get("greedy"):
            tensors["greedy"] = greedy(model, request["greedy"]["prompts"], request["greedy"]["tokens"])
        prefill, decode = speed(model, request["documents"], request.get("speed"))
    from safetensors.torch import save_file

    save_file(tensors, directory / "result.safetensors")
    report = {
        "version": importlib.metadata.version("transformers"),
        "versions": versions(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "load_seconds": seconds,
        "modules": modules,
        "unquantized": unquantized,
        "missing": missing,
        "unexpected": unexpected,
        "replaced": [],
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "notes": [],
    }
    (directory / "result.json").write_text(json.dumps(report), encoding="utf-8")


def load(model: str, dtype: Any) -> tuple[Any, list[str], list[str]]:
    """The model, the names of its parameters without a tensor, and of tensors that it does not use."""
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(
        model, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    loaded.eval()
    tensors = loaded.state_dict()
    # linears of zero shared experts have no elements and need no tensor
    missing = sorted(name for name in info["missing_keys"] if name not in tensors or tensors[name].numel())
    missing += sorted(str(one[0] if isinstance(one, tuple) else one) for one in info.get("mismatched_keys", ()))
    return loaded, missing, sorted(info["unexpected_keys"])


def schemes(model: Any) -> tuple[list[dict[str, Any]], list[str] | None]:
    """Linears and experts by class and scheme; and the linears without one, None if the method does not say."""
    import torch

    groups: dict[tuple[str, str | None], list[str]] = {}
    for name, module in model.named_modules():
        stacked = any(one.ndim == 3 for one in module.parameters(recurse=False))
        if isinstance(module, torch.nn.Linear) or hasattr(module, "quantization_scheme") or stacked:
            groups.setdefault((type(module).__name__, scheme_of(module)), []).append(name)
    found = [
        {
            "module": kind,
            "scheme": scheme,
            "kernel": None,
            "dtype": stacked_dtype(model, names[0]),
            "count": len(names),
            "example": names[0],
        }
        for (kind, scheme), names in groups.items()
    ]
    method = getattr(model.config, "quantization_config", None)
    method = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", None)
    if str(getattr(method, "value", method)) != "compressed-tensors":
        return found, None
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return found, sorted(
        name for (_, scheme), names in groups.items() if scheme is None for name in names if name in linears
    )


def stacked_dtype(model: Any, name: str) -> str | None:
    """The dtype of stacked experts if it is not the model's: packed ones are expanded in the dtype of their scales."""
    module = model.get_submodule(name)
    dtypes = {one.dtype for one in module.parameters(recurse=False) if one.ndim == 3} - {model.dtype}
    return str(dtypes.pop()).removeprefix("torch.") if dtypes else None


def scheme_of(module: Any) -> str | None:
    """The scheme of a linear of compressed-tensors in words: "weights int4 in groups of 128"."""
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None:
        return None
    words = []
    for what, one in (("weights", scheme.weights), ("activations", scheme.input_activations)):
        if one is not None:
            strategy = getattr(one.strategy, "value", one.strategy)
            size = f" of {one.group_size}" if one.group_size and one.group_size > 0 else ""
            kind = getattr(one.type, "value", one.type)
            words.append(f"{what} {kind}{one.num_bits} per {strategy}{size}" + ("" if one.symmetric else " asymmetric"))
    return ", ".join(words)


def probe(model: Any, path: str | None) -> dict[str, Any]:
    """The outputs of single linears and experts for given inputs, float32."""
    if path is None:
        return {}
    from safetensors.torch import load_file

    found = {}
    for name, inputs in load_file(path).items():
        module, x = model.get_submodule(name), inputs.to(model.dtype)
        output = experts(module, x) if hasattr(module, "num_experts") else module(x[None])[0]
        found[f"probe.{name}"] = output.float().contiguous()
    return found


def experts(module: Any, x: Any) -> Any:
    """The outputs of routed experts: row t by expert t modulo their number."""
    import torch

    index = torch.arange(len(x))[:, None] % module.num_experts
    return module(x, index, torch.ones(len(x), 1))


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
    from transformers import DynamicCache

    # renamed in transformers 5.24
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    ids, cache, found = torch.tensor([prompt]), {name: DynamicCache(config=model.config), "use_cache": True}, []
    for _ in range(count):
        ids = model(input_ids=ids, **cache).logits[:, -1].argmax(-1, keepdim=True)
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
