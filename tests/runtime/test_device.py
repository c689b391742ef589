"""Missing devices, models that do not fit into memory, and peak memory of loading."""

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from quantlab.errors import DeviceError
from quantlab.recipe.schemes import SchemeName
from quantlab.runtime import device
from quantlab.runtime.banks.choice import Matrices
from quantlab.runtime.inventory import weight_bytes
from quantlab.runtime.load import load
from quantlab.runtime.modules import build
from quantlab.runtime.twin import random_twin
from tests.runtime.foreign import compressed_description
from tests.runtime.tiny import FAMILIES, Artifact

Maker = Callable[[str, SchemeName], Artifact]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch.cuda patched to report two GPUs."""
    told = SimpleNamespace(capability=(9, 0), free=10**9, reserved=10**6, allocated=10**5)
    for name, answer in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 1,
        "get_device_capability": lambda _: told.capability,
        "get_device_name": lambda _: "Tesla T4",
        "mem_get_info": lambda _: (told.free, 2 * 10**9),
        "memory_reserved": lambda _: told.reserved,
        "memory_allocated": lambda _: told.allocated,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return told


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_on_a_machine_without_cuda(artifacts: Maker) -> None:
    directory = artifacts("llama", "int4_g128").directory
    with pytest.raises(DeviceError, match=r"no such device[^$]*device cuda[^$]*(without CUDA|no usable GPU)"):
        load(directory, device="cuda")
    with pytest.raises(DeviceError, match="no such device"):
        random_twin({"model_type": "llama", **FAMILIES["llama"]}, None, dtype=torch.float32, seed=0, device="cuda:0")


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", "cpu:x"])
def test_other_devices(name: str) -> None:
    with pytest.raises(DeviceError, match=rf"no such device[^$]*device {name}"):
        device.find_device(name)


def test_devices_of_a_machine_with_gpus(cuda: SimpleNamespace) -> None:
    assert device.find_device("cpu") == torch.device("cpu")
    assert device.find_device("cuda") == torch.device("cuda", 1)
    assert device.find_device(torch.device("cuda", 0)) == torch.device("cuda", 0)
    with pytest.raises(DeviceError, match=r"device cuda:2[^$]*2 CUDA devices"):
        device.find_device("cuda:2")
    cuda.capability = (7, 5)
    with pytest.raises(
        DeviceError, match=r"does not support this GPU[^$]*Tesla T4[^$]*capability 7\.5[^$]*8\.0 or newer"
    ):
        device.find_device("cuda")


def test_free_memory_of_a_gpu_includes_unused_reserved_memory(cuda: SimpleNamespace) -> None:
    assert device.free_bytes(torch.device("cuda", 0)) == 10**9 + 10**6 - 10**5
    device.check_free_memory(10**9, torch.device("cuda", 0), where="here")
    with pytest.raises(DeviceError, match=r"2,000,000,000 bytes needed, 1,000,900,000 bytes free on cuda:0"):
        device.check_free_memory(2 * 10**9, torch.device("cuda", 0), where="here")


def test_free_memory_of_this_machine() -> None:
    free = device.free_bytes(torch.device("cpu"))
    assert free is None or 10**7 < free < 10**14


@pytest.mark.parametrize(
    ("family", "scheme"), [("llama", "int4_g128"), ("deepseek_v2", "int8"), ("deepseek_v3", "int4_g32")]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_that_does_not_fit(
    family: str, scheme: SchemeName, dtype: torch.dtype, artifacts: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = artifacts(family, scheme).directory
    held = weight_bytes(load(directory, dtype=dtype)).total
    monkeypatch.setattr(device, "free_bytes", lambda _: held - 1)
    monkeypatch.setattr("quantlab.runtime.load.build", None)
    with pytest.raises(DeviceError, match=r"does not fit into memory[^$]*bytes needed") as caught:
        load(directory, dtype=dtype)
    assert str(directory) in str(caught.value)
    needed = int(str(caught.value).split(" bytes needed")[0].rpartition(" ")[2].replace(",", ""))
    assert held <= needed <= 1.05 * held + 8 * 96 * 1024, "what is held, and the work on the largest matrix"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_running_out_of_memory_while_loading_frees_the_loaded_tensors(
    error: Exception, artifacts: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Matrices]] = []
    whole = build._bank

    def bank(*arguments: object, **options: object) -> Matrices:
        if len(made) == 6:
            raise error
        found = whole(*arguments, **options)  # type: ignore[arg-type]
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(build, "_bank", bank)
    with pytest.raises(DeviceError, match=r"does not fit[^$]*needed[^$]*free") as caught:
        load(artifacts("deepseek_v2", "int4_g128").directory)
    assert caught.value.__context__ is None
    error.__traceback__ = None
    assert len(made) == 6
    assert not any(reference() for reference in made), "the weights are gone while the error is still at hand"


def test_other_errors_of_torch_are_not_reported_as_out_of_memory(
    artifacts: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(build, "_bank", broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        load(artifacts("llama", "int4_g128").directory)


@pytest.mark.slow
def test_peak_memory_of_loading_is_the_model_plus_one_matrix(tmp_path: Path) -> None:
    hidden, width, layers = 1024, 4096, 8
    config = FAMILIES["llama"] | {"hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers}
    shapes = {"mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width)}
    shapes |= {f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
    shapes |= {f"self_attn.{name}_proj": (hidden // 2, hidden) for name in "kv"}
    tensors = {name: torch.ones(96, hidden).bfloat16() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors["model.norm.weight"] = torch.ones(hidden).bfloat16()
    for layer in (f"model.layers.{index}." for index in range(layers)):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{name}.weight"] = torch.ones(hidden).bfloat16()
        for name, (rows, columns) in shapes.items():
            tensors[f"{layer}{name}.weight_packed"] = torch.randint(2**31, (rows, columns // 8), dtype=torch.int32)
            tensors[f"{layer}{name}.weight_scale"] = torch.full((rows, columns // 128), 0.01).bfloat16()
    save_file(tensors, tmp_path / "model.safetensors")
    description = compressed_description(4, 128, "pack-quantized", ignore=["lm_head"], tokens=False)
    fields = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": description, **config}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    code = (
        "import resource, sys, torch; from pathlib import Path; from quantlab.runtime.load import load; "
        "from quantlab.runtime.inventory import weight_bytes; torch.set_num_threads(1); "
        "from transformers import LlamaForCausalLM; from quantlab.runtime.native.library import library; library(); "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024; before = peak(); "
        "model = load(Path(sys.argv[1])); print(peak() - before, weight_bytes(model).total)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, held = map(int, done.stdout.split())
    in_16_bits = 2 * layers * sum(rows * columns for rows, columns in shapes.values())
    assert held < 0.27 * in_16_bits
    assert grown <= held + 12 * width * hidden + 16_000_000
    assert grown < 0.6 * in_16_bits, "no expanded copy of the model at any time"
