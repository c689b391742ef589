"""Runs in an environment with transformers and bitsandbytes, without quantlab: `PYTHON peer_bitsandbytes.py VERB MODEL OUT [FORMAT]`.

`save` quantizes a 16-bit checkpoint with bitsandbytes itself and saves it before its first forward pass; `load` loads a
model in float32 and writes its logits for the tokens 0 … 95, what is missing, and the classes of its linears.
"""

import ctypes
import json
import sys
from pathlib import Path

_load = ctypes.cdll.LoadLibrary


def _without_library(name, *arguments):
    if "bitsandbytes" in str(name):
        raise OSError("portable kernels, whose double quantization is exact")
    return _load(name, *arguments)


if sys.argv[1] == "save":
    ctypes.cdll.LoadLibrary = _without_library

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402


def save(model: str, out: Path, kind: str) -> None:
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "bnb-int8"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=kind == "bnb-nf4-double",
        )
    )
    AutoModelForCausalLM.from_pretrained(model, quantization_config=config).save_pretrained(out)


def load(model: str, out: Path) -> None:
    loaded, info = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    loaded.eval()
    for parameter in loaded.parameters():  # transformers leaves those of quantized checkpoints in their own dtype
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in loaded.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    with torch.no_grad():
        logits = loaded(torch.arange(96)[None]).logits[0]
    kinds = {
        name: type(module).__name__ for name, module in loaded.named_modules() if "Linear" in type(module).__name__
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file({"logits": logits.float().contiguous()}, out / "logits.safetensors")
    told = {"missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]), "linears": kinds}
    (out / "told.json").write_text(json.dumps(told))


if sys.argv[1] == "save":
    save(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
else:
    load(sys.argv[2], Path(sys.argv[3]))
