"""Files of the format `gguf` in llama.cpp: the same log-probabilities as quantlab's runtime, and the same tokens of a text.

Needs an environment of `quantlab/evaluation/engines/requirements/llama_cpp.txt`; QUANTLAB_LLAMA_CPP_PYTHON names its Python.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from safetensors.torch import save_file

from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.exports.writers.gguf import write
from quantlab.formats.read_contents import contents_of
from quantlab.formats.stored import StoredWeights
from quantlab.runtime.load import load
from tests.checkpoints import CONFIGS

PYTHON = os.environ.get("QUANTLAB_LLAMA_CPP_PYTHON", "")
ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "eval" / "reference" / "deepseek-v3-mini"
SCRIPT = ROOT / "quantlab" / "evaluation" / "engines" / "scripts" / "llama_cpp.py"
pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="QUANTLAB_LLAMA_CPP_PYTHON names no environment with llama.cpp"),
]

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {**_YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in CONFIGS),
    ("deepseek_v3", {"rope_interleave": False}),
    ("deepseek_v3", {"rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    ("deepseek_v2", {"rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}),
    ("qwen3", {"rope_scaling": {**_YARN, "attn_factor": 0.8782488562869419}}),
    ("llama", {"rope_scaling": _LLAMA3}),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
]


@pytest.mark.parametrize(("family", "fields"), VARIANTS, ids=lambda value: str(value)[:40])
def test_float32_files_have_the_log_probabilities_of_the_runtime(
    family: str, fields: dict[str, Any], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = _as_float32(checkpoints[family], tmp_path / "source", fields)
    generator = torch.Generator().manual_seed(0)
    documents = torch.randint(2, 384, (4, 96), generator=generator).tolist()
    ours, theirs = _ours(source, documents), _theirs(source, documents, tmp_path)
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 1e-5  # nats; 7e-7 seen


def test_the_reference_model_has_the_log_probabilities_of_the_runtime(tmp_path: Path) -> None:
    source = _as_float32(REFERENCE, tmp_path / "source", {})
    generator = torch.Generator().manual_seed(0)
    documents = torch.randint(3, 8192, (3, 128), generator=generator).tolist()
    ours, theirs = _ours(source, documents), _theirs(source, documents, tmp_path)
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 1e-4  # nats; 2e-6 seen on text


def test_llama_cpp_cuts_text_into_the_tokens_of_the_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    stored = StoredWeights(Reader(open_checkpoint(REFERENCE)))
    write(stored, contents_of(stored.reader.checkpoint), tmp_path, lambda _: None)
    lines = (ROOT / "eval" / "corpora" / "calibration.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    texts = [json.loads(line)["text"][:600] for line in lines]
    texts += ["1234567 a's  b\n\n\tc — naïve 北京 ‘x’ {}[]()<>!?", "\r\n  \r\n 3.14…", "🚀🚀 e\u0301"]
    found = _call(_TOKENIZE, str(tmp_path / "model.gguf"), json.dumps(texts))
    tokenizer = Tokenizer.from_file(str(REFERENCE / "tokenizer.json"))
    assert json.loads(found) == [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


_TOKENIZE = """
import ctypes, json, sys
import llama_cpp
from llama_cpp import _ggml
if hasattr(_ggml.libggml, "ggml_backend_load_all_from_path"):  # kernels in libraries of their own
    _ggml.libggml.ggml_backend_load_all_from_path(ctypes.c_char_p(str(_ggml.libggml_base_path).encode()))
model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
texts = json.loads(sys.argv[2])
print(json.dumps([model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]))
"""


def _call(code: str, *arguments: str) -> str:
    result = subprocess.run([PYTHON, "-P", "-c", code, *arguments], capture_output=True, text=True, check=True)
    return result.stdout.strip().splitlines()[-1]


def _as_float32(checkpoint: Path, directory: Path, fields: dict[str, Any]) -> Path:
    """A copy of a checkpoint in float32 without multi-token-prediction layers: llama.cpp rounds no inputs of float32 matrices."""
    directory.mkdir()
    stored = StoredWeights(Reader(open_checkpoint(checkpoint)))
    contents = contents_of(stored.reader.checkpoint)
    names = [weight.name for weight in contents.weights if weight.role != "mtp"]
    tensors = {name: stored.read_dense(name, torch.float32).contiguous() for name in names}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {**contents.config, "torch_dtype": "float32", **fields}
    if "num_nextn_predict_layers" in config:
        config["num_nextn_predict_layers"] = 0
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _ours(checkpoint: Path, documents: list[list[int]]) -> NDArray[np.float64]:
    model, found = load(checkpoint, dtype=torch.float32), []
    with torch.inference_mode():
        for document in documents:
            ids = torch.tensor([document])
            logs = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            found.append(-logs.gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(found).numpy()


def _theirs(checkpoint: Path, documents: list[list[int]], directory: Path) -> NDArray[np.float64]:
    (directory / "gguf").mkdir()
    stored = StoredWeights(Reader(open_checkpoint(checkpoint)))
    write(stored, contents_of(stored.reader.checkpoint), directory / "gguf", lambda _: None)
    request = {
        "model": str(directory / "gguf"),
        "dtype": "float32",
        "threads": 2,
        "documents": documents,
        "greedy": {"prompts": [documents[0][:8]], "tokens": 4},
        "speed": {"prefill": 16, "decode": 4},
        "probes": None,
        "options": {},
    }
    (directory / "request.json").write_text(json.dumps(request))
    subprocess.run([PYTHON, "-P", str(SCRIPT), str(directory / "request.json"), str(directory)], check=True)
    report = json.loads((directory / "result.json").read_text())
    assert report["missing"] == report["unexpected"] == []
    assert report["decode_tokens_per_second"] > 0
    found = load_file(directory / "result.safetensors")
    assert found["greedy"].shape == (1, 4)
    return found["nll"].astype(np.float64)
