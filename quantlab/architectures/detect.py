"""All supported families, and detection of the family of a config.json."""

from quantlab.architectures.architecture import Architecture
from quantlab.architectures.config import Config
from quantlab.architectures.families.deepseek_v2 import DEEPSEEK_V2
from quantlab.architectures.families.deepseek_v3 import DEEPSEEK_V3
from quantlab.architectures.families.llama import LLAMA
from quantlab.architectures.families.qwen2 import QWEN2
from quantlab.architectures.families.qwen3 import QWEN3
from quantlab.errors import CheckpointError

ARCHITECTURES: tuple[Architecture, ...] = (DEEPSEEK_V2, DEEPSEEK_V3, LLAMA, QWEN2, QWEN3)


def detect(config: Config) -> Architecture:
    """The family of a config.json.

    Raises:
        CheckpointError: the architecture is not supported.
    """
    classes = config.get("architectures") or []
    if not isinstance(classes, list):
        classes = [classes]
    for architecture in ARCHITECTURES:
        if architecture.class_name in classes or (not classes and config.get("model_type") == architecture.name):
            return architecture
    raise CheckpointError(
        "the architecture is not supported",
        where="config.json, architectures",
        found=", ".join(map(str, classes)) or repr(config.get("model_type")),
        fix="supported: " + ", ".join(architecture.class_name for architecture in ARCHITECTURES),
    )


def of_model_type(model_type: object) -> Architecture | None:
    """The family whose configs have this `model_type`, None if there is none."""
    return next((architecture for architecture in ARCHITECTURES if architecture.name == model_type), None)
