"""The algorithms as words of the recipe: how integers, zeros and folds are chosen, with what a user may set of each.

What every option means numerically is said where the algorithm is (`quantlab/algorithms/`, one paper one file); here are
its name, its range and its default.
"""

from typing import Annotated, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

Grid = Literal["absmax", "half", "signed"]
Clip = Literal["none", "mse", "activations"]


class Strict(BaseModel):
    """A part of a recipe: frozen, and nothing may be said that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Rtn(Strict):
    """Round to nearest."""

    name: Literal["rtn"]
    grid: Grid | None = None
    """How the scale of a group follows from its weights; by default `signed` for int4 and `absmax` for int8. Formats with zero points
    have a convention of their own."""
    clip: Clip = "none"
    """`mse`: search, per group, the shrunken scale with the least squared error; `activations`: the same with each error
    weighted by the mean square of its input, which needs calibration."""

    @property
    def calibrated(self) -> bool:
        """Whether it needs activations."""
        return self.clip == "activations"


class Gptq(Strict):
    """Second-order rounding: each column's error is made good by the columns after it."""

    name: Literal["gptq"]
    grid: Grid | None = None
    """As for `rtn`."""
    clip: Clip = "activations"
    """How the scales are searched before the columns are rounded."""
    order: Literal["activations", "columns"] = "activations"
    """`activations`: columns with the largest inputs first, on scales that are fixed before (no index per column is stored)."""
    damping: float = Field(default=0.01, gt=0, lt=1)
    """What is added to the Hessian's diagonal, as a share of its mean."""
    shrinkage: float = Field(default=1.0, ge=0)
    """Weight of the prior in an expert's Hessian, in tokens per input channel: an expert that saw few tokens leans on it."""
    correction: float = Field(default=1.0, ge=0, le=1)
    """How much of the error that earlier layers passed on is made good, 0 to 1; costs a second pass of the unchanged model."""
    refine: int = Field(default=1, ge=0, le=20)
    """Rounds of improving integers and scales after the columns are done."""

    calibrated: ClassVar[bool] = True


class Awq(Strict):
    """Activation-aware scaling: channels with large inputs are scaled up before rounding, and down where they come from."""

    name: Literal["awq"]
    grid: Grid | None = None
    """As for `rtn`."""
    clip: Clip = "activations"
    """How scales are searched after the channels were scaled."""
    steps: int = Field(default=20, ge=1, le=100)
    """Exponents tried between 0 and 1."""

    calibrated: ClassVar[bool] = True


class SmoothQuant(Strict):
    """Moves the difficulty of quantizing activations into the weights, channel by channel. For `int8`."""

    name: Literal["smoothquant"]
    grid: Grid | None = None
    """As for `rtn`."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """How much of it is moved: 0 nothing, 1 all of it."""

    calibrated: ClassVar[bool] = True


class Magnitude(Strict):
    """Remove the weights of smallest magnitude, matrix by matrix."""

    name: Literal["magnitude"]

    calibrated: ClassVar[bool] = False


class Wanda(Strict):
    """Remove the weights that matter least, row by row: magnitude times the norm of their input."""

    name: Literal["wanda"]

    calibrated: ClassVar[bool] = True


class SparseGpt(Strict):
    """Remove weights column by column and let the ones that stay make good for them."""

    name: Literal["sparsegpt"]
    damping: float = Field(default=0.01, gt=0, lt=1)
    """What is added to the Hessian's diagonal, as a share of its mean."""

    calibrated: ClassVar[bool] = True


class Reap(Strict):
    """Remove whole routed experts: those whose routed outputs are smallest. The same number in every layer and routing group."""

    name: Literal["reap"]

    calibrated: ClassVar[bool] = True


QuantizeAlgorithm = Annotated[Rtn | Gptq | Awq | SmoothQuant, Field(discriminator="name")]
ExpertRemoval = Reap
"""The algorithms that remove whole routed experts; a second one is added with `|`."""
EXPERT_REMOVALS: Final = ("reap",)
"""Their names."""
PruneAlgorithm = Annotated[Magnitude | Wanda | SparseGpt | Reap, Field(discriminator="name")]
