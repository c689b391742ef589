"""Judges a GGUF file with llama.cpp; run in the environment of llama-cpp-python: `python SCRIPT REQUEST.json RESULT_DIR`.

The file is loaded as llama.cpp's own programs load it. With the dtype float32 the cache is float32 and attention is computed
without the flash kernel, which rounds queries to float16; with another dtype both are llama.cpp's defaults (a float16 cache).
Products with matrices that are not float32 round their inputs in every case: to int8 in blocks of 32 for quantized matrices, to
float16 or bfloat16 for those of these dtypes. Imports nothing of quantlab.
"""

import ctypes
import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PACKAGES = ("llama-cpp-python", "gguf", "numpy", "safetensors")
_SPEED_REPEATS = 3
_UBATCH = 512
"""Tokens computed at once, llama.cpp's default."""
_KEPT = (3, 4)
"""Levels of warnings and errors in llama.cpp's log; above them are the dots of its progress."""
_FLOAT32, _NO_FLASH = 0, 0
"""Numbers of GGML_TYPE_F32 and of LLAMA_FLASH_ATTN_TYPE_DISABLED."""


class Log:
    """llama.cpp's log: warnings and errors are kept, the rest is dropped."""

    def __init__(self, library: Any) -> None:
        self.lines: list[str] = []
        self._callback = library.llama_log_callback(self._keep)  # must live as long as the library
        library.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _keep(self, level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level in _KEPT and line:
            self.lines.append(line)

    def last(self) -> str:
        """The last line, for errors."""
        return self.lines[-1] if self.lines else "no message"


class Model:
    """A loaded model with a context for one sequence.

    Args:
        path: the file.
        library: the module llama_cpp.
        log: its log.
        dtype: of the request.
        threads: threads of the processor.
        length: longest sequence in tokens.
    """

    def __init__(self, path: Path, library: Any, log: Log, *, dtype: str, threads: int, length: int) -> None:
        self.library = library
        self.model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        if not self.model:
            raise RuntimeError(log.last())
        settings = library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = max(length, _UBATCH)
        settings.n_ubatch = _UBATCH
        settings.n_threads = settings.n_threads_batch = threads
        if dtype == "float32":
            settings.type_k = settings.type_v = _FLOAT32
            settings.flash_attn_type = _NO_FLASH
        self.context = library.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError(log.last())
        self.vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.model))

    def forget(self) -> None:
        """Empty the cache."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)

    def run(self, tokens: list[int], position: int, *, every: bool) -> Any:
        """Compute tokens after those in the cache.

        Returns:
            Logits float32 [tokens, vocabulary], or [1, vocabulary] of the last token alone.
        """
        import numpy

        batch = self.library.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, position + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = every or index == len(tokens) - 1
        status = self.library.llama_decode(self.context, batch)
        self.library.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        rows = len(tokens) if every else 1
        pointer = self.library.llama_get_logits(self.context)
        return numpy.ctypeslib.as_array(pointer, shape=(rows, self.vocabulary)).copy()


def main() -> None:
    """Read the request, compute, write the result."""
    import llama_cpp
    import numpy
    from safetensors.numpy import save_file

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    log = Log(llama_cpp)
    load_backends()
    llama_cpp.llama_backend_init()
    path = file_of(Path(request["model"]))
    started = time.monotonic()
    model = Model(path, llama_cpp, log, dtype=request["dtype"], threads=request["threads"], length=longest(request))
    seconds = time.monotonic() - started
    tensors = score(model, request["documents"])
    if request.get("greedy"):
        wanted = request["greedy"]
        found = [continued(model, prompt, wanted["tokens"]) for prompt in wanted["prompts"]]
        tensors["greedy"] = numpy.asarray(found, numpy.int64)
    prefill, decode = speed(model, request["documents"], request.get("speed"))
    save_file(tensors, str(Path(sys.argv[2]) / "result.safetensors"))
    modules, unquantized = types(path, llama_cpp.llama_print_system_info().decode())
    notes = ["llama.cpp computes no single matrices: the probes were not computed"] if request.get("probes") else []
    report = {
        "version": importlib.metadata.version("llama-cpp-python"),
        "versions": versions(),
        "dtype": request["dtype"],
        "load_seconds": seconds,
        "modules": modules,
        "unquantized": unquantized,
        "missing": [],
        "unexpected": [],
        "replaced": [],
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "notes": [*notes, *dict.fromkeys(log.lines)],
    }
    (Path(sys.argv[2]) / "result.json").write_text(json.dumps(report), encoding="utf-8")


def load_backends() -> None:
    """Load the processor's kernels where the build has them in libraries of their own."""
    from llama_cpp import _ggml

    load = getattr(_ggml.libggml, "ggml_backend_load_all_from_path", None)
    if load is not None:
        load.argtypes = [ctypes.c_char_p]
        load(str(_ggml.libggml_base_path).encode())


def file_of(model: Path) -> Path:
    """The GGUF file of a request."""
    if model.is_file():
        return model
    found = sorted(model.glob("*.gguf"))
    if len(found) != 1:
        raise FileNotFoundError(f"{model} has {len(found)} files *.gguf, one is expected")
    return found[0]


def longest(request: dict[str, Any]) -> int:
    """The most tokens of a sequence of the request."""
    lengths = [len(document) for document in request["documents"]]
    if request.get("greedy"):
        lengths += [len(prompt) + request["greedy"]["tokens"] for prompt in request["greedy"]["prompts"]]
    if request.get("speed"):
        lengths += [request["speed"]["prefill"] + request["speed"]["decode"]]
    return max(lengths)


def score(model: Model, documents: list[list[int]]) -> dict[str, Any]:
    """Negative log-likelihood of every given token, and the most likely one in its place."""
    import numpy

    nll, top = [], []
    for document in documents:
        model.forget()
        logits = model.run(document, 0, every=True)[:-1].astype(numpy.float64)
        logits -= logits.max(1, keepdims=True)
        given = logits[numpy.arange(len(document) - 1), document[1:]]
        nll.append(numpy.log(numpy.exp(logits).sum(1)) - given)
        top.append(logits.argmax(1))
    return {"nll": numpy.concatenate(nll).astype(numpy.float32), "top": numpy.concatenate(top).astype(numpy.int64)}


def continued(model: Model, prompt: list[int], count: int) -> list[int]:
    """The greedy continuation of one prompt, not ended by an end token."""
    model.forget()
    tokens, position, found = prompt, 0, []
    for _ in range(count):
        token = int(model.run(tokens, position, every=False)[0].argmax())
        position += len(tokens)
        tokens = [token]
        found.append(token)
    return found


def speed(model: Model, documents: list[list[int]], wanted: dict[str, int] | None) -> tuple[float | None, float | None]:
    """Tokens per second of prefill and of decoding one sequence; the best of some repeats."""
    if wanted is None:
        return None, None
    flat = [token for document in documents for token in document]
    prompt = (flat * (wanted["prefill"] // len(flat) + 1))[: wanted["prefill"]]

    def prefill() -> None:
        model.forget()
        model.run(prompt, 0, every=False)

    def decode() -> None:
        for step, token in enumerate(steps):
            model.run([token], len(prompt) + step, every=False)

    steps = (flat * wanted["decode"])[: wanted["decode"]]
    return wanted["prefill"] / best(prefill), wanted["decode"] / best(decode, before=prefill)


def best(call: Callable[[], None], *, before: Callable[[], None] | None = None) -> float:
    """The shortest seconds of some calls; `before` is not timed."""
    found = []
    for _ in range(_SPEED_REPEATS):
        if before is not None:
            before()
        started = time.monotonic()
        call()
        found.append(time.monotonic() - started)
    return min(found)


def types(path: Path, system: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Matrices of the layers by type; and the names of those that are not quantized.

    llama.cpp's kernel follows from the type and from the instructions of the processor, which `system` lists.
    """
    import gguf

    groups: dict[tuple[str, str], list[str]] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) > 1:
            kind = "experts" if len(tensor.shape) == 3 and "_exps" in tensor.name else "matrix"
            groups.setdefault((kind, tensor.tensor_type.name), []).append(tensor.name)
    modules = [
        {"module": kind, "scheme": scheme, "kernel": system.strip(" |"), "count": len(names), "example": names[0]}
        for (kind, scheme), names in groups.items()
    ]
    plain = {"F32", "F16", "BF16"}
    return modules, sorted(name for (_, scheme), names in groups.items() if scheme in plain for name in names)


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
