"""The target `gguf`: what is written for an artifact, or why nothing can be."""

from collections.abc import Sequence
from dataclasses import dataclass

from quantlab.errors import QuantlabError
from quantlab.exports.gguf.metadata import Entry, model_entries, rotary_of, vocabulary_entries
from quantlab.exports.gguf.refusal import RefusalError
from quantlab.exports.gguf.tensors import ARCHITECTURES, GgufTensor, plan_tensors
from quantlab.exports.gguf.tokenizer import Vocabulary, read_vocabulary
from quantlab.formats.contents import Contents
from quantlab.recipe.schemes import FormatName


@dataclass(frozen=True)
class GgufPlan:
    """Everything in a GGUF file but the weights.

    Attributes:
        architecture: llama.cpp's name of it.
        entries: keys and values.
        tensors: those made of weights, in order.
        divisors: of the frequencies of a rotary embedding of type llama3; empty for the others.
        notes: what a user must know.
    """

    architecture: str
    entries: tuple[Entry, ...]
    tensors: tuple[GgufTensor, ...]
    divisors: tuple[float, ...]
    notes: tuple[str, ...]


def plan_file(contents: Contents) -> GgufPlan:
    """The plan of the file of an artifact; reads no weights.

    Raises:
        RefusalError: llama.cpp could not load it, or would compute another model.
        CheckpointError: config.json or the tokenizer is not usable.
    """
    planned = plan_tensors(contents)
    vocabulary = read_vocabulary(contents.directory, contents.config)
    entries = (
        *model_entries(contents, name=contents.directory.name, tensors=planned.tensors),
        *vocabulary_entries(vocabulary),
    )
    return GgufPlan(
        ARCHITECTURES[contents.architecture.name],
        entries,
        planned.tensors,
        rotary_of(contents).divisors,
        (*planned.notes, *_vocabulary_notes(vocabulary)),
    )


def _vocabulary_notes(vocabulary: Vocabulary | None) -> Sequence[str]:
    if vocabulary is None:
        return ("the artifact has no tokenizer: llama.cpp runs the file on token numbers alone",)
    if vocabulary.spaces is not None and vocabulary.spaces.at_the_start_alone:
        return ("llama.cpp puts a space after special tokens within a text, too; the tokenizer only at the start",)
    if vocabulary.normalised:
        return ("the tokenizer normalises text to NFC, llama.cpp does not: give it normalised text",)
    return ()


@dataclass(frozen=True)
class Gguf:
    """See the module's docstring."""

    name: FormatName = "gguf"
    description: str = (
        "one file for llama.cpp with the artifact's integers as Q4_0, Q4_1 and Q8_0, tokenizer and chat template"
    )

    def refuses(self, contents: Contents) -> str | None:
        """See `Target`."""
        try:
            plan_file(contents)
        except RefusalError as error:
            return error.reason
        except QuantlabError as error:
            return error.what + (f": {error.found}" if error.found else "")
        return None


TARGET = Gguf()
