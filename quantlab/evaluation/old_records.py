"""Conversion of records of earlier versions: facts that they state only in text become the fields that later versions write.

Runs once, when a record is read; all other code reads the fields.
"""

import re
from typing import Any

_PASS = re.compile(r"(?P<prune>prune )?(?P<setting>\S+)(?: \((?P<algorithm>\w+)[^)]*\))?")
_TIMED_WITH = ", timed once with "


def with_later_fields(record: Any) -> Any:  # noqa: ANN401 - JSON that is not validated yet
    """The JSON of a record, with the fields added that its version did not write.

    Args:
        record: as read from a file; returned unchanged if it is not a JSON object.
    """
    if not isinstance(record, dict):
        return record
    if "passes" not in record and isinstance(record.get("description"), str):
        is_source = record.get("variant") == "source"
        record = record | {"passes": [] if is_source else passes_of(record["description"])}
    if isinstance(record.get("speed"), dict) and "timed_with" not in record["speed"]:
        record = record | {"speed": _with_timed(record["speed"])}
    if isinstance(record.get("quality"), dict) and isinstance(record["quality"].get("documents"), dict):
        record = record | {"quality": _with_counted(record["quality"])}
    return record


def passes_of(description: str) -> list[dict[str, str]]:
    """Parse the passes from a description: "prune 0.08 (sparsegpt) → int4_g128 (gptq) of routed_experts"."""
    found = []
    for words in description.split(" → "):
        match = _PASS.match(words)
        if match is None:
            continue
        algorithm = match["algorithm"] or ""
        operation = "quantize" if algorithm else "cast"
        if match["prune"]:
            operation = "remove experts" if algorithm == "reap" else "prune"
        found.append({"operation": operation, "setting": match["setting"], "algorithm": algorithm})
    return found


def _with_timed(speed: dict[str, Any]) -> dict[str, Any]:
    layout, _, sharing = str(speed.get("layout", "")).partition(_TIMED_WITH)
    return speed | {"layout": layout, "timed_with": sharing.split(", ") if sharing else []}


def _with_counted(quality: dict[str, Any]) -> dict[str, Any]:
    """Add the number of tokens that the KL is summed over, if that is all of them."""
    documents = quality["documents"]
    sample = (quality.get("divergence") or {}).get("kl_sample", "")
    if "kl_tokens" in documents or not documents.get("kl") or sample.startswith("one in "):
        return quality
    return quality | {"documents": documents | {"kl_tokens": documents.get("tokens", [])}}
