"""What a model card tells programs: measured results as the hub's `model-index`, and how to start the engines that agree."""

from typing import Any, Final

import yaml

from quantlab.evaluation.record import Record

_DIGITS: Final = 6
_USES: Final = {
    "transformers": (
        "python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("DIR")',
    ),
    "vllm": ("bash", "vllm serve DIR"),
    "sglang": ("bash", "python -m sglang.launch_server --model-path DIR"),
}
"""Language and text of the code that loads an artifact, for engines that load it as it is; DIR is its directory or its id."""


def usage(record: Record) -> list[str]:
    """Markdown with the code for every engine that computed what quantlab's runtime computes; empty if there is none."""
    agreeing = {one.engine: one for one in record.engines if one.verdict == "agrees" and one.engine in _USES}
    own = [one for one in agreeing.values() if not one.export_sha256]
    lines = []
    for one in own:
        language, code = _USES[one.engine]
        version = f" {one.version}" if one.version else ""
        lines += ["", f"With {one.engine}{version}, which computes the same:", "", f"```{language}", code, "```"]
    return lines


def with_results(head: str, record: Record) -> str:
    """The part of a card before its marked section, with the measured results in the YAML that opens it.

    A card without such YAML is left as it is.
    """
    opening, first, rest = head.partition("---\n")
    block, last, after = rest.partition("\n---\n")
    if opening or not first or not last:
        return head
    metadata = yaml.safe_load(block)
    if not isinstance(metadata, dict):
        return head
    metadata.pop("model-index", None)
    results = _results(record)
    if results:
        from huggingface_hub.repocard_data import eval_results_to_model_index

        metadata["model-index"] = eval_results_to_model_index(record.variant, results)
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n{after}"


def _results(record: Record) -> list[Any]:
    """The measured quality and tasks as `EvalResult` of huggingface_hub."""
    from huggingface_hub import EvalResult

    found = []
    if record.quality is not None:
        suite = record.suite_name or record.suite
        numbers = (
            ("perplexity", "perplexity", record.quality.perplexity),
            ("bits_per_byte", "bits per byte", record.quality.bits_per_byte),
            ("accuracy", "next-token accuracy", record.quality.next_token_accuracy),
        )
        found += [
            EvalResult(
                task_type="text-generation",
                dataset_type=f"quantlab-{suite}",
                dataset_name=f"held-out text of {record.suite}",
                metric_type=word,
                metric_name=name,
                metric_value=round(measured.value, _DIGITS),
            )
            for word, name, measured in numbers
        ]
    found += [
        EvalResult(
            task_type="text-generation",
            dataset_type=task.name,
            dataset_name=f"{task.name} {task.version} ({task.source})",
            metric_type=task.metric,
            metric_name=task.metric.replace("_", " "),
            metric_value=round(task.score.value, _DIGITS),
        )
        for task in record.tasks
    ]
    return found
