"""The schema of a recipe, as frozen pydantic models."""

import re
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from quantlab.architectures.architecture import DEFAULT_TARGETS, QUANTIZABLE_ROLES, QuantizableRole, Role
from quantlab.documents import nearest
from quantlab.recipe.algorithms import (
    EXPERT_REMOVALS,
    Clip,
    ExpertRemoval,
    Magnitude,
    PruneAlgorithm,
    QuantizeAlgorithm,
    Rtn,
    SmoothQuant,
    Strict,
)
from quantlab.recipe.schemes import SCHEMES, FloatDtype, FormatName, SchemeName
from quantlab.recipe.texts import MixedSource, TextChoices, TextSource, check_text, sources_of

EngineName = Literal["transformers", "vllm", "llama.cpp", "gptqmodel", "onnxruntime", "sglang"]
"""Programs that load artifacts and can judge them."""
VariantName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]


def _targets(value: object) -> object:
    """Check roles; a role that exists but cannot be a target gets its own error."""
    for role in value if isinstance(value, list | tuple) else ():
        if role in get_args(Role) and role not in QUANTIZABLE_ROLES:
            raise ValueError(
                f"`{role}` is never quantized or pruned: serving engines expect it unchanged; use some of: {', '.join(QUANTIZABLE_ROLES)}"
            )
        if role not in QUANTIZABLE_ROLES:
            raise ValueError(f"unknown role `{role}`; {nearest(str(role), QUANTIZABLE_ROLES)}")
    return value


class _Targeted(Strict):
    targets: tuple[QuantizableRole, ...] = Field(default=DEFAULT_TARGETS, min_length=1)
    """The roles whose linears the pass changes."""

    ignore: tuple[str, ...] = ()
    """Linears that the pass leaves unchanged: globs on their names, for example `model.layers.0.mlp.down_proj`."""

    check_targets = field_validator("targets", mode="before")(_targets)


class Cast(Strict):
    """Store the floating-point tensors in another dtype."""

    cast: FloatDtype
    """`float16` or `bfloat16`."""

    calibrated: ClassVar[bool] = False


class NOfM(Strict):
    """n of every m consecutive weights of a row are removed; written "n:m"."""

    removed: int
    of: int

    def __str__(self) -> str:
        return f"{self.removed}:{self.of}"


def _sparsity(value: object) -> object:
    """Parse a fraction or an n:m pattern."""
    if isinstance(value, NOfM):
        return value
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+):(\d+)", value)):
        removed, of = int(match[1]), int(match[2])
        if not 0 < removed < of:
            raise ValueError(f"{value} removes {removed} of {of}; n must be between 1 and m - 1")
        return NOfM(removed=removed, of=of)
    if isinstance(value, float) and 0 < value < 1:
        return value
    raise ValueError('not a fraction between 0 and 1; write for example 0.08, or "2:4"')


Sparsity = Annotated[float | NOfM, BeforeValidator(_sparsity)]


class Quantize(_Targeted):
    """Store linears in a quantized number format."""

    quantize: SchemeName
    """The scheme, for example `int4_g128`."""
    algorithm: QuantizeAlgorithm = Field(default=Rtn(name="rtn"), validate_default=True)
    """How the numbers are chosen."""

    @field_validator("algorithm")
    @classmethod
    def _clip_of_scheme(cls, algorithm: QuantizeAlgorithm, known: ValidationInfo) -> QuantizeAlgorithm:
        """Replace a missing `clip` by the scheme's, so that the recipe's key and the artifact have the search that was used."""
        scheme = known.data.get("quantize")
        if isinstance(algorithm, Rtn) and algorithm.clip is None and scheme is not None:
            return algorithm.model_copy(update={"clip": SCHEMES[scheme].clip})
        return algorithm

    @property
    def calibrated(self) -> bool:
        """Whether its algorithm needs activations."""
        return self.algorithm.calibrated

    @property
    def clip(self) -> Clip:
        """The search for the scales."""
        return "none" if isinstance(self.algorithm, SmoothQuant) else self.algorithm.clip or "none"

    @model_validator(mode="after")
    def _check_algorithm(self) -> "Quantize":
        number = SCHEMES[self.quantize].format
        if not number.is_integer and self.algorithm != Rtn(name="rtn", clip="none"):
            raise ValueError(
                f"{self.algorithm.name} chooses integers, and {self.quantize} has none; use {{name: rtn}} without options"
            )
        if self.algorithm.grid is not None and not number.symmetric:
            raise ValueError(
                f"grid {self.algorithm.grid} is for symmetric integers, and {self.quantize} has zero points; leave `grid` out"
            )
        if isinstance(self.algorithm, SmoothQuant) and number.activations is None:
            raise ValueError(
                f"smoothquant needs quantized activations, and {self.quantize} has none; use int8, or awq with {self.quantize}"
            )
        return self


class Prune(_Targeted):
    """Set weights to zero, or remove whole experts."""

    prune: Sparsity
    """Fraction of each matrix's weights to remove, for example 0.08, or n of every m in a row, for example "2:4"; with
    the algorithm `reap`, fraction of the routed experts."""
    algorithm: PruneAlgorithm = Magnitude(name="magnitude")
    """How the weights to remove are chosen."""

    @property
    def calibrated(self) -> bool:
        """Whether its algorithm needs activations."""
        return self.algorithm.calibrated

    @property
    def ratio(self) -> float:
        """Fraction of weights (or experts) to remove."""
        return self.prune if isinstance(self.prune, float) else self.prune.removed / self.prune.of

    @property
    def pattern(self) -> "NOfM | None":
        """The n:m pattern, None if a fraction is given."""
        return self.prune if isinstance(self.prune, NOfM) else None

    @model_validator(mode="before")
    @classmethod
    def _default_targets(cls, value: object) -> object:
        algorithm = value.get("algorithm") if isinstance(value, dict) else None
        name = algorithm.get("name") if isinstance(algorithm, dict) else getattr(algorithm, "name", None)
        return (
            {"targets": ["routed_experts"], **value} if isinstance(value, dict) and name in EXPERT_REMOVALS else value
        )

    @model_validator(mode="after")
    def _check_expert_removal(self) -> "Prune":
        if isinstance(self.algorithm, ExpertRemoval):
            name = self.algorithm.name
            if self.targets != ("routed_experts",):
                raise ValueError(f"{name} removes routed experts; write targets: [routed_experts], or leave them out")
            if self.pattern is not None:
                raise ValueError(f"{name} removes a fraction of the experts; write a number such as 0.25")
            if self.ignore:
                raise ValueError(f"{name} removes the same number of experts in every layer; leave `ignore` out")
        return self


def _pass_kind(value: object) -> str | None:
    """The union member of a pass, named by the verb among its keys."""
    if isinstance(value, BaseModel):
        return type(value).__name__
    verbs = [verb for verb in ("cast", "quantize", "prune") if isinstance(value, dict) and verb in value]
    return verbs[0].capitalize() if len(verbs) == 1 else None


Pass = Annotated[
    Annotated[Cast, Tag("Cast")] | Annotated[Quantize, Tag("Quantize")] | Annotated[Prune, Tag("Prune")],
    Discriminator(
        _pass_kind,
        custom_error_type="pass_verb",
        custom_error_message="a pass has exactly one verb; write one of {cast: …}, {quantize: …}, {prune: …}",
    ),
]


def _check_order(passes: tuple[Cast | Quantize | Prune, ...]) -> tuple[Cast | Quantize | Prune, ...]:
    if not passes:
        raise ValueError("a variant has no passes; give at least one, for example [{cast: float16}]")
    kinds = [type(step) for step in passes]
    if Cast in kinds[1:]:
        raise ValueError("a cast is not the first pass; put one cast first")
    if Quantize in kinds and Prune in kinds[kinds.index(Quantize) :]:
        raise ValueError("a variant prunes after quantizing; put prune before quantize: the zeros stay zeros")
    return passes


Passes = Annotated[tuple[Pass, ...], AfterValidator(_check_order)]


def _formats(value: object) -> object:
    """Parse one word or a list of words."""
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list | tuple):
        return value
    known = get_args(FormatName)
    for word in words:
        if word not in known:
            raise ValueError(f"unknown format `{word}`; {nearest(str(word), known)}")
        if words.count(word) > 1:
            raise ValueError(f"`{word}` is listed twice; name every format once")
    return tuple(words)


class Variant(Strict):
    """What is done with the model, and the formats of other programs that the artifact is also written in."""

    passes: Passes
    """In order of application."""
    format: tuple[FormatName, ...] = ()
    """One word or a list: exports beside the artifact, from the same numbers. `compressed-tensors` is the artifact itself, which is
    always written; for `fp8_block`, whose artifact has DeepSeek's own layout, it is an export."""

    check_formats = field_validator("format", mode="before")(_formats)

    @model_validator(mode="before")
    @classmethod
    def _of_passes(cls, value: object) -> object:
        if isinstance(value, list | tuple):
            return {"passes": value}
        if not isinstance(value, dict | BaseModel) or _pass_kind(value) in {"Cast", "Quantize", "Prune"}:
            raise ValueError(
                "a variant is neither a list of passes nor a mapping; write [{cast: float16}] or {passes: [{cast: float16}], format: gguf}"
            )
        return value


LONGEST = 1 << 18
"""Tokens of the longest calibration sample, for a model whose config.json does not state its context."""


class Calibration(TextChoices):
    """The text whose activations calibrated algorithms use."""

    corpus: str | None = None
    """JSON lines with a `text` field; path relative to the recipe."""
    dataset: str | None = Field(default=None, min_length=1)
    """In place of `corpus`: a preset, a Hugging Face id, or a file or folder relative to the recipe."""
    mix: tuple[MixedSource, ...] = ()
    """In place of `corpus`: several datasets, each with its share of the samples."""
    samples: int = Field(default=128, gt=0, strict=True)
    """Number of samples."""
    length: int = Field(default=512, gt=0, le=LONGEST, strict=True)
    """Tokens per sample, at most the model's context."""
    seed: int = Field(default=0, ge=0, strict=True)
    """Seed of the choice of samples."""
    coverage: int | None = Field(default=None, gt=0, strict=True)
    """Tokens that every routed expert is to have: samples of the datasets are added until it has them, up to eight times `samples`."""
    propagate: Literal["quantized", "original"] = "quantized"
    """Inputs of the next block: the outputs of the changed blocks, or those of the unchanged model."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of weights and activations during calibration; by default float32 on a CPU and bfloat16 on a GPU."""
    memory: str = Field(default="4 GB", pattern=r"^\d+(\.\d+)? ?[KMGT]?B$")
    """Memory for hidden states, for example `4 GB`; beyond it they are kept in files of the output directory. Does not
    change any number."""

    @model_validator(mode="after")
    def _check_text(self) -> "Calibration":
        check_text(
            corpus=self.corpus, dataset=self.dataset, mix=self.mix, chosen=self.chosen, example="corpus: FILE.jsonl"
        )
        if self.coverage is not None and self.corpus is not None:
            raise ValueError("`coverage` adds samples of datasets; name the corpus by `dataset` in place of `corpus`")
        return self

    @property
    def sources(self) -> tuple[TextSource, ...]:
        """The datasets; none for a corpus."""
        return sources_of(self, self.dataset, self.mix)

    @property
    def memory_bytes(self) -> int:
        """`memory` in bytes."""
        number, unit = re.fullmatch(r"([\d.]+) ?([KMGT]?)B", self.memory).groups()  # type: ignore[union-attr]  # the pattern holds
        return int(float(number) * 1000 ** " KMGT".index(unit or " "))


def unused_text_fields(calibration: Calibration) -> set[str]:
    """The ways to name text that a calibration does not use: nothing is to be said of them."""
    ways = {"corpus": {"corpus"}, "dataset": {"dataset", *TextChoices.model_fields}, "mix": {"mix"}}
    return {name for way, names in ways.items() if not getattr(calibration, way) for name in names}


class Evaluate(Strict):
    """How each artifact is measured."""

    suite: str
    """The name of a suite (`quantlab recipes` lists them), or a path relative to the recipe."""
    baseline: str = "source"
    """Reference of all losses: `source`, the checkpoint at its native precision, or a variant."""
    claims: str | None = None
    """Claims to check against the matrix: a name, or a path relative to the recipe."""
    verify: tuple[EngineName, ...] = ()
    """Engines that load each artifact and must compute what quantlab's runtime computes; see `quantlab engines`."""


class Recipe(Strict):
    """One source model, several variants, one evaluation."""

    model: str
    """A directory with config.json and safetensors, relative to the recipe, a Hugging Face id with @revision, or the name of a
    model that comes with quantlab."""
    keep_source: bool = Field(default=True, strict=True)
    """For a model of the Hugging Face hub: keep its shards in the hub's cache. With false a run deletes them after their use, and
    `quantlab run --disk SIZE` bounds the space that they take at a time."""
    calibration: Calibration | None = None
    """Required by calibrated algorithms only."""
    variants: dict[VariantName, Variant] = Field(min_length=1)
    """Name -> passes in order of application, or `{passes: […], format: …}`."""
    peers: dict[VariantName, str] = Field(default_factory=dict)
    """Name -> directory of the same model as another tool wrote it, relative to the recipe. It is measured like a variant, as a row
    of its own, and not made."""
    evaluate: Evaluate | None = None
    """Without it, `run` makes the artifacts and measures nothing."""

    @field_validator("variants", mode="after")
    @classmethod
    def _check_names(cls, variants: dict[str, Any]) -> dict[str, Any]:
        if "source" in variants:
            raise ValueError(
                "a variant cannot be called `source`, the name of the unchanged checkpoint; choose another name"
            )
        return variants

    @model_validator(mode="after")
    def _check_peers(self) -> "Recipe":
        for name in self.peers:
            if name == "source" or name in self.variants:
                raise ValueError(f"the peer {name} has the name of another row; choose another name")
        if self.peers and self.evaluate is None:
            raise ValueError("peers are only measured; add `evaluate: {suite: FILE.yaml}`, or remove `peers`")
        return self

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of all rows of the matrix, in order."""
        return ("source", *self.variants, *self.peers)

    @property
    def calibrated(self) -> bool:
        """Whether an algorithm of some variant needs activations."""
        return any(step.calibrated for variant in self.variants.values() for step in variant.passes)

    @model_validator(mode="after")
    def _check_source(self) -> "Recipe":
        if not self.keep_source and self.evaluate is not None:
            raise ValueError(
                "`evaluate` measures the source too, and `keep_source: false` deletes it; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_calibration(self) -> "Recipe":
        if self.calibration is None:
            for name, variant in self.variants.items():
                for step in variant.passes:
                    if step.calibrated:
                        raise ValueError(
                            f"variant {name} needs calibration, but the recipe has no calibration text; add `calibration: {{corpus: FILE.jsonl}}`"
                        )
        return self
