"""The algorithms a recipe may name, with their options.

This file has the name, range and default of every option; its numerical meaning is documented with the algorithm in
`quantlab/algorithms/`, one file per paper.
"""

from typing import Annotated, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

Grid = Literal["absmax", "half", "signed"]
Clip = Literal["none", "mse", "activations"]


class Strict(BaseModel):
    """A part of a recipe: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Rtn(Strict):
    """Round to nearest."""

    name: Literal["rtn"]
    grid: Grid | None = None
    """Convention for the scale of a group; by default `signed` for int4 and `absmax` for int8. Formats with zero points
    have a convention of their own."""
    clip: Clip | None = None
    """By default `mse` for int4 and `none` for int8. `mse`: search the scale of each group for the least squared error; `activations`: the same with each error
    weighted by the mean square of its input, which needs calibration."""

    @property
    def calibrated(self) -> bool:
        """Whether it needs activations."""
        return self.clip == "activations"


class Gptq(Strict):
    """Second-order rounding: the columns that follow compensate for each column's rounding error."""

    name: Literal["gptq"]
    grid: Grid | None = None
    """As for `rtn`."""
    clip: Clip = "activations"
    """Search of the scales before the columns are rounded."""
    order: Literal["activations", "columns"] = "activations"
    """`activations`: columns with the largest inputs first, on scales fixed before (no index per column is stored)."""
    damping: float = Field(default=0.01, gt=0, lt=1)
    """Value added to the Hessian's diagonal, as a fraction of its mean."""
    shrinkage: float = Field(default=1.0, ge=0)
    """Weight of the prior in an expert's Hessian, in tokens per input channel; matters for experts with few tokens."""
    correction: float = Field(default=1.0, ge=0, le=1)
    """Fraction of the error of earlier layers that is compensated, 0 to 1; above 0 the unchanged model runs too."""
    refine: int = Field(default=1, ge=0, le=20)
    """Rounds of refinement of integers and scales after the last column."""

    calibrated: ClassVar[bool] = True


class Awq(Strict):
    """Activation-aware scaling: columns with large inputs are scaled up before rounding, their producers down."""

    name: Literal["awq"]
    grid: Grid | None = None
    """As for `rtn`."""
    clip: Clip = "activations"
    """Search of the scales after the channels were scaled."""
    steps: int = Field(default=20, ge=1, le=100)
    """Number of exponents tried between 0 and 1."""

    calibrated: ClassVar[bool] = True


class SmoothQuant(Strict):
    """Moves the range of activations into the weights, channel by channel. For `int8`."""

    name: Literal["smoothquant"]
    grid: Grid | None = None
    """As for `rtn`."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """Fraction of the range that moves into the weights: 0 nothing, 1 all of it."""

    calibrated: ClassVar[bool] = True


class Magnitude(Strict):
    """Remove the weights of smallest magnitude in each matrix."""

    name: Literal["magnitude"]

    calibrated: ClassVar[bool] = False


class Wanda(Strict):
    """Remove the weights with the smallest saliency in each row: magnitude times the norm of the input."""

    name: Literal["wanda"]

    calibrated: ClassVar[bool] = True


class SparseGpt(Strict):
    """Remove weights column by column; the remaining weights compensate for the error."""

    name: Literal["sparsegpt"]
    damping: float = Field(default=0.01, gt=0, lt=1)
    """Value added to the Hessian's diagonal, as a fraction of its mean."""

    calibrated: ClassVar[bool] = True


class Reap(Strict):
    """Remove the routed experts with the smallest routed outputs, the same number in every layer and routing group."""

    name: Literal["reap"]

    calibrated: ClassVar[bool] = True


QuantizeAlgorithm = Annotated[Rtn | Gptq | Awq | SmoothQuant, Field(discriminator="name")]
ExpertRemoval = Reap
"""The algorithms that remove whole routed experts; a second one is added with `|`."""
EXPERT_REMOVALS: Final = ("reap",)
"""Their names."""
PruneAlgorithm = Annotated[Magnitude | Wanda | SparseGpt | Reap, Field(discriminator="name")]
