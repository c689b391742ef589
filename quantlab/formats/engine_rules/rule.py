"""A rule of an engine: what its loader refuses or misreads in a checkpoint, and where that was read.

A rule says what the code of one version does with one kind of checkpoint. It was read, or seen once with small
checkpoints (`seen`): only a run of the engine on the artifact itself can say that it computes rightly. So the absence
of objections is no promise, and every text names version and file.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from quantlab.architectures.architecture import ModelTensor, Role
from quantlab.formats.layouts import method_of_layout
from quantlab.numerics.number_format import NumberFormat
from quantlab.recipe.schemes import LayoutName

EngineName = Literal[
    "transformers", "vllm", "vllm-cpu", "sglang", "tensorrt-llm", "ktransformers", "gptqmodel", "llama.cpp"
]
Kind = Literal["refuses", "misreads", "needs", "slower", "note"]
"""`refuses`: loading fails; `misreads`: it loads and computes something else; `needs`: it loads with a flag or an argument,
without which it fails or misreads; `slower`: it loads and takes a slower path; `note`: the choice it makes."""
PREVENTS: frozenset[Kind] = frozenset({"refuses", "misreads"})
"""Kinds of rules after which the engine cannot be used."""
DENSE = "dense"
"""Stands for the method of a checkpoint without quantized weights."""


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
class HeldWeight:
    """One weight of a checkpoint.

    Attributes:
        tensor: its name, role and rule.
        shape: its shape; [N, K] of a linear, N outputs.
        number: its format, None if it is not quantized.
        layout: how it is stored.
    """

    tensor: ModelTensor
    shape: tuple[int, ...]
    number: NumberFormat | None
    layout: LayoutName

    @property
    def scheme(self) -> str:
        """Its format in text."""
        return self.number.name if self.number is not None else "no scheme"


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
class HeldModel:
    """What rules know of a checkpoint.

    Attributes:
        class_name: its entry of `architectures` in config.json.
        method: its `quant_method`, "dense" if it has none.
        weights: the weights it stores.
    """

    class_name: str
    method: str
    weights: tuple[HeldWeight, ...]

    @cached_property
    def kinds(self) -> tuple[HeldWeight, ...]:
        """The first of all linears that have role, rule, shape and format in common; without multi-token-prediction layers."""
        first: dict[object, HeldWeight] = {}
        for weight in self.weights:
            rule = weight.tensor.rule
            if rule is not None and rule.linear and weight.tensor.role != "mtp":
                first.setdefault((weight.tensor.role, rule.pattern, weight.shape, weight.number, weight.layout), weight)
        return tuple(first.values())

    def of_role(self, role: Role) -> Iterator[HeldWeight]:
        """The kinds of linears of a role."""
        return (weight for weight in self.kinds if weight.tensor.role == role)

    def schemes(self, role: Role) -> set[str]:
        """The formats of the linears of a role."""
        return {weight.scheme for weight in self.of_role(role)}

    @cached_property
    def experts(self) -> int:
        """Routed experts of a layer, 0 in a dense model."""
        return 1 + max(
            (weight.tensor.expert for weight in self.weights if weight.tensor.expert is not None), default=-1
        )

    @cached_property
    def divided_fusion(self) -> Finding | None:
        """Weights that engines fuse into one matrix and that differ in format, None if there are none."""
        return self._divided(lambda weight: weight.tensor.fusion_group)

    @cached_property
    def divided_layer(self) -> Finding | None:
        """Routed experts of one layer that differ in format, None if there are none."""
        return self._divided(
            lambda weight: (
                weight.tensor.block
                if weight.tensor.role == "routed_experts" and weight.tensor.expert is not None
                else None
            )
        )

    def _divided(self, group_of: Callable[[HeldWeight], str | None]) -> Finding | None:
        groups: dict[str, list[HeldWeight]] = defaultdict(list)
        for weight in self.weights:
            if (group := group_of(weight)) is not None:
                groups[group].append(weight)
        for group, (first, *others) in groups.items():
            for other in others:
                if first.number != other.number:
                    return Finding(
                        group, "; ".join(f"{weight.tensor.name}: {weight.scheme}" for weight in (first, other))
                    )
        return None


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
    finds: Callable[[HeldModel], Finding | None]
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


def method_of(weights: Sequence[HeldWeight]) -> str:
    """The `quant_method` of a checkpoint that stores these weights."""
    quantized = (weight for weight in weights if weight.number is not None)
    return next((method_of_layout(weight.layout).word for weight in quantized), DENSE)
