"""llm-compressor: GPTQ with its three weight observers, and AWQ, all W4A16 in groups of 128.

The defaults of 0.14 are its recommendations: activation order `static`, damping 0.01, every expert sees every calibration
token (`moe_calibrate_all_experts`). `mse` and `imatrix_mse` replace the observer that sets the scales.
"""

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from measured import parse_task, report
from transformers import AutoModelForCausalLM, AutoTokenizer

OBSERVERS = {"gptq": None, "gptq-mse": "memoryless_mse", "gptq-imatrix": "imatrix_mse", "rtn-imatrix": "imatrix_mse"}
IGNORE = ["lm_head", "re:.*mlp\\.gate$", "re:.*kv_b_proj$"]


def main() -> None:
    task = parse_task((*OBSERVERS, "awq"))
    model = AutoModelForCausalLM.from_pretrained(task.model)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    rows = task.tokens.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})

    def quantize() -> None:
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=data,
            recipe=recipe(task.variant),
            max_seq_length=task.tokens.shape[1],
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
        )

    report(task, quantize, lambda: model.save_pretrained(task.out, save_compressed=True))


def recipe(variant: str) -> list[object]:
    """The modifiers of a variant."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    observer = OBSERVERS.get(variant)
    if observer is not None:
        weights["observer"] = observer
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))}
    if variant == "awq":  # AWQ scales the channels, the quantization modifier rounds
        return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=IGNORE)]
    if variant.startswith("rtn"):
        return [QuantizationModifier(config_groups=groups, ignore=IGNORE)]
    return [GPTQModifier(config_groups=groups, ignore=IGNORE)]


if __name__ == "__main__":
    main()
