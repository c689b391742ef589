"""auto-round: `opt-rtn` is iters=0 with its optimised rounding forced on, which it would turn off for models with
experts; `tuned` is its own method, SignRound, with the given number of iterations."""

from auto_round import AutoRound
from measured import parse_task, report
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

ITERATIONS = {"opt-rtn": 0, "tuned": 200}


def main() -> None:
    task = parse_task(tuple(ITERATIONS))
    samples = [{"input_ids": row} for row in task.tokens]
    iterations = ITERATIONS[task.variant]
    extra = {"disable_opt_rtn": False} if iterations == 0 else {}
    rounder = AutoRound(
        AutoModelForCausalLM.from_pretrained(task.model),
        AutoTokenizer.from_pretrained(task.model),
        scheme="W4A16",
        dataset=DataLoader(samples, batch_size=8),
        iters=iterations,
        seqlen=task.tokens.shape[1],
        nsamples=len(samples),
        ignore_layers="kv_b_proj",
        device_map="cpu",
        **extra,
    )
    report(task, rounder.quantize, lambda: rounder.save_quantized(str(task.out), format="llm_compressor"))


if __name__ == "__main__":
    main()
