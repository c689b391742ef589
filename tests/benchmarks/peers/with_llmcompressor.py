"""llm-compressor: GPTQ with its three weight observers, and AWQ, all W4A16 in groups of 128.

The defaults of 0.14 are its recommendations: activation order `static`, damping 0.01, every expert sees every calibration
token (`moe_calibrate_all_experts`). `mse` and `imatrix_mse` replace the observer that sets the scales.

Two things fail in its AWQ and are put right here. It pins memory for an accelerator also where there is none; that is left
out. Its mappings of DeepSeek-V3 have the router among the layers behind the norm, so they match no model that begins with
dense layers, as all released ones do; they are given once for the dense layers, without router, and once for the others.
With all samples its search runs every layer of experts twenty times over every token, for hours; it gets the first 16.
"""

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from measured import parse_task, report
from transformers import AutoModelForCausalLM, AutoTokenizer

OBSERVERS = {"gptq": None, "gptq-mse": "memoryless_mse", "gptq-imatrix": "imatrix_mse", "rtn-imatrix": "imatrix_mse"}
ALL_MAPPINGS = (  # of llm-compressor's own DeepSeek-V3 mappings those that every layer has
    AWQMapping("re:.*input_layernorm$", ["re:.*(q|q_a)_proj$", "re:.*kv_a_proj_with_mqa$"]),
    AWQMapping("re:.*q_a_layernorm$", ["re:.*q_b_proj$"]),
    AWQMapping("re:.*kv_a_layernorm$", ["re:.*kv_b_proj$"]),
    AWQMapping("re:.*up_proj$", ["re:.*down_proj$"]),
)
AWQ_SAMPLES = 16
IGNORE = ["lm_head", "re:.*mlp\\.gate$", "re:.*kv_b_proj$"]


def main() -> None:
    task = parse_task((*OBSERVERS, "awq"))
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None
    model = AutoModelForCausalLM.from_pretrained(task.model)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    rows = task.tokens.tolist()[: AWQ_SAMPLES if task.variant == "awq" else None]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})

    def quantize() -> None:
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=data,
            recipe=recipe(task.variant, dense_layers=model.config.first_k_dense_replace),
            max_seq_length=task.tokens.shape[1],
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
        )

    report(task, quantize, lambda: model.save_pretrained(task.out, save_compressed=True))


def recipe(variant: str, *, dense_layers: int) -> list[object]:
    """The modifiers of a variant, for a model whose first `dense_layers` layers have no experts."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    observer = OBSERVERS.get(variant)
    if observer is not None:
        weights["observer"] = observer
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))}
    if variant == "awq":  # AWQ scales the channels, the quantization modifier rounds
        return [AWQModifier(mappings=mappings(dense_layers)), QuantizationModifier(config_groups=groups, ignore=IGNORE)]
    if variant.startswith("rtn"):
        return [QuantizationModifier(config_groups=groups, ignore=IGNORE)]
    return [GPTQModifier(config_groups=groups, ignore=IGNORE)]


def mappings(dense_layers: int) -> list[AWQMapping]:
    """Which norms and linears AWQ scales against which linears."""
    numbers = "(" + "|".join(str(layer) for layer in range(dense_layers)) + ")"
    dense, sparse = f"re:.*layers\\.{numbers}\\.", f"re:.*layers\\.(?!{numbers}\\.)\\d+\\."
    norm, gate, up = "post_attention_layernorm$", ".*gate_proj$", ".*up_proj$"
    return [
        *ALL_MAPPINGS,
        AWQMapping(dense + norm, [dense + gate, dense + up]),
        AWQMapping(sparse + norm, [sparse + "mlp\\.gate$", sparse + gate, sparse + up]),
    ]


if __name__ == "__main__":
    main()
