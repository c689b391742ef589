"""A checkpoint by its Hugging Face id: downloaded once into the hub's own cache."""

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
    "LICENSE*",
]


def download(model: str, *, revision: str | None) -> Path:
    """The local directory of a model of the hub.

    Raises:
        CheckpointError: the model cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            "the model is neither a directory nor to be had from the Hugging Face hub",
            where=model + (f"@{revision}" if revision else ""),
            found=str(error).splitlines()[0][:200],
            fix="correct the path (it is relative to the recipe), or the id; log in for gated models",
        ) from error
