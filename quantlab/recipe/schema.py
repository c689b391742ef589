"""The recipe as frozen models: the words a user may write, and nothing else."""

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

from quantlab.architectures.architecture import DEFAULT_TARGETS, QUANTIZABLE_ROLES, QuantizableRole, Role
from quantlab.documents import nearest
from quantlab.recipe.schemes import FloatDtype, SchemeName

VariantName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Rtn(_Strict):
    """Round to nearest."""

    name: Literal["rtn"] = "rtn"
    grid: Literal["absmax", "half", "signed"] | None = None
    """How the scale of a group follows from its weights; by default `signed` for int4 and `absmax` for int8."""
    clip: Literal["none", "mse"] = "none"
    """`mse`: search, per group, the shrunken scale with the least squared error."""


class Magnitude(_Strict):
    """Remove the weights of smallest magnitude, matrix by matrix."""

    name: Literal["magnitude"] = "magnitude"


def _targets(value: object) -> object:
    """Explain why a role that exists cannot be a target before the list of allowed ones is shown."""
    for role in value if isinstance(value, list | tuple) else ():
        if role in get_args(Role) and role not in QUANTIZABLE_ROLES:
            raise ValueError(
                f"`{role}` is never quantized or pruned: serving engines expect it unchanged; use some of: {', '.join(QUANTIZABLE_ROLES)}"
            )
        if role not in QUANTIZABLE_ROLES:
            raise ValueError(f"unknown role `{role}`; {nearest(str(role), QUANTIZABLE_ROLES)}")
    return value


class _Targeted(_Strict):
    targets: tuple[QuantizableRole, ...] = Field(default=DEFAULT_TARGETS, min_length=1)
    """The roles whose linears the pass changes."""

    ignore: tuple[str, ...] = ()
    """Linears to leave alone all the same: globs on their names, for example `model.layers.0.mlp.down_proj`."""

    check_targets = field_validator("targets", mode="before")(_targets)


class Cast(_Strict):
    """Store the floating-point tensors in another dtype."""

    cast: FloatDtype
    """`float16` or `bfloat16`."""


class Quantize(_Targeted):
    """Put linears on an integer grid."""

    quantize: SchemeName
    """The scheme, for example `int4_g128`."""
    algorithm: Rtn = Rtn()
    """How the integers are chosen."""


class Prune(_Targeted):
    """Set weights to zero."""

    prune: float = Field(gt=0, lt=1, strict=True)
    """Share of each matrix's weights to remove, for example 0.08."""
    algorithm: Magnitude = Magnitude()
    """How the weights to remove are chosen."""


def _pass_kind(value: object) -> str | None:
    """The member of the union a pass belongs to: the verb among its keys."""
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
        raise ValueError("a variant casts late or twice; put one cast first")
    if Quantize in kinds and Prune in kinds[kinds.index(Quantize) :]:
        raise ValueError("a variant prunes after quantizing; put prune before quantize: the zeros stay zeros")
    return passes


Passes = Annotated[tuple[Pass, ...], AfterValidator(_check_order)]


class Calibration(_Strict):
    """The text that calibrated algorithms watch the model read."""

    corpus: str
    """JSON lines with a `text` field; path relative to the recipe."""
    samples: int = Field(default=128, gt=0, strict=True)
    """How many samples."""
    length: int = Field(default=512, gt=0, strict=True)
    """Tokens per sample."""
    seed: int = Field(default=0, ge=0, strict=True)
    """Seed of the choice of samples."""


class Evaluate(_Strict):
    """What is measured of each artifact."""

    suite: str
    """A file of eval/suites; path relative to the recipe."""
    baseline: str = "source"
    """What losses are relative to: `source`, the checkpoint at its native precision, or a variant."""


class Recipe(_Strict):
    """One source model, several variants, one evaluation."""

    model: str
    """A directory with config.json and safetensors, relative to the recipe, or a Hugging Face id with @revision."""
    calibration: Calibration | None = None
    """Needed by calibrated algorithms only."""
    variants: dict[VariantName, Passes] = Field(min_length=1)
    """Name -> passes, in the order they are applied."""
    evaluate: Evaluate | None = None
    """Left out, `run` makes the artifacts and measures nothing."""

    @field_validator("variants", mode="after")
    @classmethod
    def _check_names(cls, variants: dict[str, Any]) -> dict[str, Any]:
        if "source" in variants:
            raise ValueError(
                "a variant cannot be called `source`, the name of the unchanged checkpoint; choose another name"
            )
        return variants
