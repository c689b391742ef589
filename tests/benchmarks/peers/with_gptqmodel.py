"""GPTQModel: its default GPTQ (group-aware activation order), W4A16 symmetric in groups of 128, and the same with its
scale search (`mse`).

On two cores its loader asks for more threads than it allows itself: set GPTQMODEL_CPU_WORKERS=2 in the environment.
"""

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from measured import parse_task, report

SKIP_KV_B = {"-:.*kv_b_proj.*": {}}
VARIANTS = {"gptq": 0.0, "gptq-mse": 2.4}  # exponent of the error its search minimises; 0 is no search


def main() -> None:
    task = parse_task(tuple(VARIANTS))
    config = QuantizeConfig(bits=4, group_size=128, sym=True, mse=VARIANTS[task.variant], dynamic=SKIP_KV_B)
    model = GPTQModel.load(str(task.model), config, device="cpu", torch_dtype=torch.bfloat16)
    calibration = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in task.tokens]
    report(task, lambda: model.quantize(calibration, batch_size=8), lambda: model.save(str(task.out)))


if __name__ == "__main__":
    main()
