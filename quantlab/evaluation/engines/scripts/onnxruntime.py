"""Judges a model with onnxruntime; run in onnxruntime's environment: `python SCRIPT REQUEST.json RESULT_DIR`.

The model is a directory with `model.onnx`, a decoder with a cache, as optimum writes it. The CPU provider computes; it decides per
node which kernel does. Single linears are not probed: they are no modules of a graph. Imports nothing of quantlab.
"""

import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_PACKAGES = ("onnxruntime", "numpy")
_SPEED_REPEATS = 3
_FLOATS = {"tensor(float)": "float32", "tensor(float16)": "float16"}


class Cache(NamedTuple):
    """Keys and values of the tokens so far, by the names of the graph's inputs."""

    tensors: Mapping[str, Any]
    tokens: int


def main() -> None:
    """Read the request, compute, write the result."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if str(Path(path).resolve()) != here]  # this file has the engine's name
    import numpy as np
    import onnxruntime

    request, out = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    options.optimized_model_filepath = str(out / "optimized.onnx")  # the graph that runs
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
    started = time.monotonic()
    file = Path(request["model"]) / "model.onnx"
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    seconds = time.monotonic() - started
    tensors = score(session, request["documents"])
    if request.get("greedy"):
        tensors["greedy"] = greedy(session, request["greedy"]["prompts"], request["greedy"]["tokens"])
    prefill, decode = speed(session, request["documents"], request.get("speed"))
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, out / "result.safetensors")
    report = {
        "version": importlib.metadata.version("onnxruntime"),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "dtype": dtype_of(session),
        "load_seconds": seconds,
        "modules": kernels(out / "optimized.onnx"),
        "missing": [],
        "unexpected": [],
        "replaced": [],
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "notes": [f"computes in {dtype_of(session)}, the dtype of the graph"],
    }
    for left in out.glob("optimized.*"):
        left.unlink()
    (out / "result.json").write_text(json.dumps(report), encoding="utf-8")


def dtype_of(session: Any) -> str:
    """The dtype of the cache, in which the graph computes."""
    return next(_FLOATS[entry.type] for entry in session.get_inputs() if entry.name.startswith("past_key_values"))


def empty_cache(session: Any) -> Cache:
    """A cache without tokens: the graph's names are past_key_values.LAYER.key and .value, [1, heads, 0, width]."""
    import numpy as np

    past = [entry for entry in session.get_inputs() if entry.name.startswith("past_key_values")]
    dtype = dtype_of(session)
    return Cache({entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), dtype) for entry in past}, 0)


def step(session: Any, tokens: Sequence[int], cache: Cache) -> tuple[Any, Cache]:
    """Logits [T, V] of tokens after a cache, and the longer cache."""
    import numpy as np

    total = cache.tokens + len(tokens)
    feed = {
        "input_ids": np.asarray([tokens], np.int64),
        "attention_mask": np.ones((1, total), np.int64),
        "position_ids": np.arange(cache.tokens, total, dtype=np.int64)[None],
        **cache.tensors,
    }
    known = {entry.name for entry in session.get_inputs()}
    names = [entry.name for entry in session.get_outputs()]
    answers = dict(zip(names, session.run(names, {key: feed[key] for key in feed if key in known}), strict=True))
    longer = {name: answers[name.replace("past_key_values", "present")] for name in cache.tensors}
    return answers["logits"][0].astype(np.float32), Cache(longer, total)


def score(session: Any, documents: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Negative log-likelihood of every given token but the first, and the most likely one in its place."""
    import numpy as np

    losses, best = [], []
    for tokens in documents:
        logits, _ = step(session, tokens, empty_cache(session))
        wide = logits[:-1].astype(np.float64)
        wide -= wide.max(axis=1, keepdims=True)
        normaliser = np.log(np.exp(wide).sum(axis=1))
        losses.append(normaliser - wide[np.arange(len(tokens) - 1), tokens[1:]])
        best.append(logits[:-1].argmax(axis=1))
    return {"nll": np.concatenate(losses).astype(np.float32), "top": np.concatenate(best).astype(np.int64)}


def greedy(session: Any, prompts: Sequence[Sequence[int]], count: int) -> Any:
    """The most likely continuation of every prompt [prompts, count]; none ends early."""
    import numpy as np

    rows = []
    for prompt in prompts:
        logits, cache = step(session, prompt, empty_cache(session))
        row = [int(logits[-1].argmax())]
        while len(row) < count:
            logits, cache = step(session, row[-1:], cache)
            row.append(int(logits[-1].argmax()))
        rows.append(row)
    return np.asarray(rows, np.int64)


def speed(
    session: Any,
    documents: Sequence[Sequence[int]],
    wanted: Mapping[str, int] | None,
) -> tuple[float | None, float | None]:
    """Tokens per second of prefill and decode, the best of some repeats."""
    if not wanted:
        return None, None
    text = [token for tokens in documents for token in tokens]
    prompt = (text * (wanted["prefill"] // len(text) + 1))[: wanted["prefill"]]
    prefill, decode = [], []
    for _ in range(_SPEED_REPEATS):
        started = time.monotonic()
        _, cache = step(session, prompt, empty_cache(session))
        prefill.append(time.monotonic() - started)
        started = time.monotonic()
        for token in prompt[: wanted["decode"]]:
            _, cache = step(session, [token], cache)
        decode.append(time.monotonic() - started)
    return wanted["prefill"] / min(prefill), min(wanted["decode"], len(prompt)) / min(decode)


def kernels(file: Path) -> list[dict[str, Any]]:
    """The products of the optimized graph by operator and format."""
    try:
        import onnx
    except ImportError:
        return []
    groups: dict[tuple[str, str | None], list[str]] = {}
    for node in onnx.load(str(file), load_external_data=False).graph.node:
        if "MatMul" in node.op_type or node.op_type == "Gemm":
            attributes = {entry.name: entry.i for entry in node.attribute}
            bits, size = attributes.get("bits"), attributes.get("block_size")
            groups.setdefault((node.op_type, f"int{bits} per {size}" if bits else None), []).append(node.name)
    return [
        {"module": kind, "scheme": scheme, "kernel": kind, "count": len(names), "example": names[0]}
        for (kind, scheme), names in groups.items()
    ]


if __name__ == "__main__":
    main()
