"""Download of a checkpoint from the Hugging Face hub, into the hub's own cache."""

from pathlib import Path

from quantlab.errors import CheckpointError

_WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "*.tiktoken",
    "*.md",
    "*.yaml",
    "LICENSE*",
    "NOTICE*",
    "*POLICY*",
]


def download(model: str, *, revision: str | None) -> Path:
    """Download a model from the hub, unless it is cached, and return its local directory.

    Raises:
        CheckpointError: the download failed.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            "the model is not a local directory and cannot be downloaded from the Hugging Face hub",
            where=model + (f"@{revision}" if revision else ""),
            found=str(error).splitlines()[0][:200],
            fix="correct the path (it is relative to the recipe), or the id; log in for gated models",
        ) from error
