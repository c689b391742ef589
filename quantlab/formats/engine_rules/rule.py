"""A rule of an engine: what its loader refuses or misreads in a checkpoint, and where that was read.

A rule says what the code of one version does with one kind of checkpoint. It was read, or seen once with small
checkpoints (`seen`): only a run of the engine on the artifact itself can say that it computes rightly. So the absence
of objections is no promise, and every text names version and file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from quantlab.formats.contents import Contents

EngineName = Literal[
    "transformers", "vllm", "vllm-cpu", "sglang", "tensorrt-llm", "ktransformers", "gptqmodel", "llama.cpp"
]
Kind = Literal["refuses", "misreads", "needs", "slower", "note"]
"""`refuses`: loading fails; `misreads`: it loads and computes something else; `needs`: it loads with a flag or an argument,
without which it fails or misreads; `slower`: it loads and takes a slower path; `note`: the choice it makes."""
PREVENTS: frozenset[Kind] = frozenset({"refuses", "misreads"})
"""Kinds of rules after which the engine cannot be used."""


@dataclass(frozen=True)
class Engine:
    """An engine, and the version whose loaders were read.

    Attributes:
        name: its name in data.
        title: its name in text.
        version: the version that was read.
        repository: of its sources on GitHub.
        methods: the `quant_method` of every checkpoint it can load; "dense" for one without.
        experts_only: whether it is only used for models with routed experts.
    """

    name: EngineName
    title: str
    version: str
    repository: str
    methods: frozenset[str]
    experts_only: bool = False

    @property
    def label(self) -> str:
        """Name and version in text."""
        return f"{self.title} {self.version}"


@dataclass(frozen=True)
class Finding:
    """Where a rule applies.

    Attributes:
        subject: a weight, or the matrix that an engine fuses weights into.
        found: what was found there.
    """

    subject: str
    found: str


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        engine: whose it is.
        name: its name, unique.
        kind: what the engine does.
        says: what it does that with, or why, in text.
        finds: where the rule applies in a checkpoint, None if it does not.
        file: the source file that was read.
        version: commit of the file if it is not of the engine's version.
        seen: whether the engine was seen doing it, with a small checkpoint.
        blocks: the sentence with which a plan is refused, `{subject}` stands for the finding's; empty if plans pass.
    """

    engine: EngineName
    name: str
    kind: Kind
    says: str
    finds: Callable[[Contents], Finding | None]
    file: str
    version: str = ""
    seen: bool = False
    blocks: str = ""

    @property
    def text(self) -> str:
        """What the engine does, in text."""
        return f"{self.kind}{':' if self.kind in {'slower', 'note'} else ''} {self.says}"


@dataclass(frozen=True)
class Objection:
    """A rule that applies to a checkpoint, and where."""

    rule: Rule
    finding: Finding


@dataclass(frozen=True)
class Verdict:
    """What the rules of one engine say about a checkpoint.

    Attributes:
        engine: the engine.
        method: the checkpoint's `quant_method`.
        objections: the rules that apply.
    """

    engine: Engine
    method: str
    objections: tuple[Objection, ...]

    @property
    def reads_method(self) -> bool:
        """Whether the engine has a loader for the checkpoint's method at all."""
        return self.method in self.engine.methods

    @property
    def prevented(self) -> bool:
        """Whether the engine cannot be used: no loader, or a rule that refuses or misreads."""
        return not self.reads_method or any(one.rule.kind in PREVENTS for one in self.objections)

    @property
    def text(self) -> str:
        """All of it in one line."""
        if not self.reads_method:
            return f"reads no {self.method} safetensors"
        return "; ".join(one.rule.text for one in self.objections) or "no rule objects"
