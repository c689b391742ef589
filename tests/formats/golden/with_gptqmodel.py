"""Writes gptqmodel.safetensors: linears packed by GPTQModel 7.6.0 itself. Run it in GPTQModel's environment:

    GPTQMODEL_CPU_WORKERS=2 python tests/formats/golden/with_gptqmodel.py

Every case has the known integers `q` [N, K], scales `scale` [N, G] and unsigned zero points `zero` [N, G], and the tensors that
GPTQModel's packer makes of their product; symmetric cases are converted to the first layout by its own function, as its writer does.
"""

from pathlib import Path

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

ROWS, COLUMNS = 32, 64
CASES = {"int4_g32": (4, 32, True), "int8_row": (8, COLUMNS, True), "int4_g32_asym": (4, 32, False)}


def case(bits: int, group: int, symmetric: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(bits + group)
    groups = COLUMNS // group
    q = torch.randint(0, 1 << bits, (ROWS, COLUMNS), generator=generator)
    scale = torch.rand(ROWS, groups, generator=generator).mul(0.05).add(0.01).half().float()
    middle = torch.full((ROWS, groups), 1 << (bits - 1))
    zero = middle if symmetric else torch.randint(0, 1 << bits, (ROWS, groups), generator=generator)
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    steps = q - zero.repeat_interleave(group, dim=1)
    linear.weight.data = steps * scale.repeat_interleave(group, dim=1)
    module = TorchLinear(
        bits=bits, group_size=group, sym=symmetric, desc_act=False, in_features=COLUMNS, out_features=ROWS, bias=False
    )
    module.pack_original(linear, scale, zero, torch.arange(COLUMNS, dtype=torch.int32) // group)
    if symmetric:
        convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits, group_size=group))
    packed = {name: getattr(module, name) for name in ("qweight", "scales", "qzeros", "g_idx")}
    return packed | {"q": q.to(torch.uint8), "scale": scale, "zero": zero.to(torch.uint8)}


def main() -> None:
    tensors = {
        f"{name}.{part}": tensor.clone().contiguous()
        for name, (bits, group, symmetric) in CASES.items()
        for part, tensor in case(bits, group, symmetric).items()
    }
    save_file(tensors, Path(__file__).parent / "gptqmodel.safetensors", metadata={"written_by": "gptqmodel 7.6.0"})


if __name__ == "__main__":
    main()
