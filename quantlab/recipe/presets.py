"""Datasets that are usual for calibration and evaluation, by short names.

Each is pinned to a commit of the hub, so that a name means the same rows everywhere; `revision` in a recipe reads another commit.
"""

from dataclasses import dataclass
from typing import Final

from quantlab.recipe.texts import TextColumn, TextSource


@dataclass(frozen=True)
class Preset:
    """A dataset of the hub.

    Attributes:
        dataset: its id.
        revision: the commit.
        about: what it holds, in a few words.
        config: its configuration.
        split: the split that is read.
        column: column of text or messages, or columns of prompt and completion; None if found by its name.
    """

    dataset: str
    revision: str
    about: str
    config: str | None = None
    split: str = "train"
    column: TextColumn | None = None


PRESETS: Final[dict[str, Preset]] = {
    "ultrachat": Preset(
        "HuggingFaceH4/ultrachat_200k",
        "8049631c405ae6576f93f445c6b8166f76f5505a",
        "dialogues with an assistant, English",
        split="train_sft",
        column="messages",
    ),
    "wikitext": Preset(
        "Salesforce/wikitext",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        "Wikipedia, English",
        config="wikitext-2-raw-v1",
        column="text",
    ),
    "c4": Preset(
        "allenai/c4", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2", "web pages, English", config="en", column="text"
    ),
    "pile-10k": Preset(
        "NeelNanda/pile-10k", "127bfedcd5047750df5ccf3a12979a47bfa0bafa", "10,000 documents of the Pile", column="text"
    ),
    "openr1": Preset(
        "open-r1/OpenR1-Math-220k",
        "e4e141ec9dea9f8326f4d347be56105859b2bd68",
        "reasoning traces of DeepSeek-R1 on mathematics",
        config="default",
        column="messages",
    ),
    "numina": Preset(
        "AI-MO/NuminaMath-CoT",
        "9d8d210c9f6a36c8f3cd84045668c9b7800ef517",
        "mathematics with worked solutions",
        column="messages",
    ),
    "code": Preset(
        "ise-uiuc/Magicoder-Evol-Instruct-110K",
        "b0079beaa0361d82412520b873715bee59cc7dd4",
        "programming questions and answers",
        column=("instruction", "response"),
    ),
    "multilingual": Preset(
        "CohereLabs/aya_dataset",
        "f9ea04583f02a8f86404ff6c58bf75fe637df8a2",
        "questions and answers in 65 languages",
        config="default",
        column=("inputs", "targets"),
    ),
}


def with_preset(source: TextSource) -> TextSource:
    """A source with the fields of the preset it names, except those it sets itself; without a preset the source as it is.

    A source that sets `revision` reads that commit, one that sets `config` or `split` another part of the same dataset.
    """
    preset = PRESETS.get(source.dataset)
    if preset is None:
        return source
    known = {
        "config": preset.config,
        "revision": preset.revision,
        "split": preset.split,
        "column": preset.column,
    }
    return source.model_copy(
        update={"dataset": preset.dataset}
        | {name: value for name, value in known.items() if getattr(source, name) is None}
    )
