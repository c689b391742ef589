"""The identity of an artifact: everything its bytes depend on, as one key and as parts that explain a difference.

    recipe        passes, source checkpoint, calibration text and settings
    code          fingerprint of the code that makes it; of the algorithms only those it uses
    versions      versions of the libraries that determine numbers
    calibration   device class, GPU and dtype of calibration. The CPU's name is recorded but not part of the key:
                  another CPU changes only the order of summation

Artifacts, journals and shared statistics are reused only under an equal key. If code or libraries differ, the artifact
is made again; if the recipe or the device of calibration differs, the user decides.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from quantlab.fingerprint import code_fingerprint
from quantlab.hardware import processor, version_of
from quantlab.plan.model import VariantPlan
from quantlab.recipe.schema import Calibration

Difference = Literal["none", "code", "calibration", "recipe"]

_SHARED = ("quantlab.run.shared", "quantlab.calibration.inputs")


@dataclass(frozen=True)
class Computing:
    """Device and precision of calibration.

    Attributes:
        device: "cpu" or "cuda".
        gpu: name of the GPU, empty on a CPU.
        dtype: dtype of weights and activations during calibration: "float32" or "bfloat16".
    """

    device: str
    gpu: str
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def computing_of(calibration: Calibration, device: torch.device) -> Computing:
    """Device and precision of a calibration; the default dtype is float32 on a CPU and bfloat16 on a GPU."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    dtype = calibration.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    return Computing(device.type, gpu, dtype)


@dataclass(frozen=True)
class Identity:
    """The identity of one artifact; see the module's docstring for its parts."""

    recipe: str
    code: str
    versions: Mapping[str, str]
    calibration: Computing | None

    @property
    def key(self) -> str:
        """The sha256 of all parts."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def written(self) -> dict[str, Any]:
        """The identity as stored in manifests and journals, with the name of the CPU that calibrated."""
        calibration = None if self.calibration is None else asdict(self.calibration) | {"cpu": processor()}
        return {"key": self.key, **asdict(self), "calibration": calibration}

    def difference(self, written: Mapping[str, Any]) -> Difference:
        """The first part in which a stored identity differs from this one: recipe, then calibration, then code."""
        if written.get("key") == self.key:
            return "none"
        if written.get("recipe") != self.recipe:
            return "recipe"
        return "code" if _written_computing(written) == self.calibration else "calibration"

    def explain(self, written: Mapping[str, Any]) -> str:
        """The difference of a stored identity in recipe or calibration, as text."""
        if written.get("recipe") != self.recipe:
            return f"recipe {str(written.get('recipe') or written.get('key'))[:12]}, this one is {self.recipe[:12]}"
        return f"calibrated on {_described(_written_computing(written))}, this run would calibrate on {_described(self.calibration)}"


def identify(variant: VariantPlan, device: torch.device) -> Identity:
    """The identity of a variant's artifact made by the current code with calibration on a device."""
    return _identity(variant, None if variant.calibration is None else computing_of(variant.calibration, device))


def is_current(variant: VariantPlan, written: Mapping[str, Any]) -> bool:
    """Whether the current code, on the device that made an artifact, would give it the same identity."""
    return bool(_identity(variant, _written_computing(written)).key == written.get("key"))


def _identity(variant: VariantPlan, calibration: Computing | None) -> Identity:
    packages: tuple[str, ...] = ("torch",) if calibration is None else ("torch", "transformers")
    if variant.calibration is not None and variant.calibration.sources:
        packages += ("datasets",)  # it determines the order of the rows
    return Identity(variant.recipe_key, _making_code(variant, calibration), _versions(packages), calibration)


def _written_computing(written: Mapping[str, Any]) -> Computing | None:
    found = written.get("calibration")
    return None if found is None else Computing(found["device"], found["gpu"], found["dtype"])


def _described(computing: Computing | None) -> str:
    return "nothing" if computing is None else f"{computing.gpu or computing.device} in {computing.dtype}"


def shared_identity(computing: Computing) -> str:
    """Dependencies of the unchanged model's statistics besides model and text: code, libraries, device and dtype."""
    code = code_fingerprint(_SHARED, without=_other_devices(computing))
    return f"{code} {_versions(('torch', 'transformers'))} {computing}"


def _making_code(variant: VariantPlan, calibration: Computing | None) -> str:
    """Fingerprint of the code that makes a variant: the run's code, and the algorithms that the variant uses."""
    unused: tuple[str, ...] = (
        "quantlab.algorithms",
        "quantlab.formats.engine_rules",
    )  # rules of engines change no byte of the weights
    if calibration is None:
        unused += ("quantlab.calibration", "quantlab.run.calibrated")
    algorithms = tuple(f"quantlab.algorithms.{name}" for name in variant.algorithms)
    way = code_fingerprint(("quantlab.run.execute",), without=unused)
    used = code_fingerprint(algorithms, without=_other_devices(calibration))
    return hashlib.sha256(f"{way} {used}".encode()).hexdigest()


def _other_devices(computing: Computing | None) -> tuple[str, ...]:
    """Packages with kernels for devices that are not used."""
    return () if computing is not None and computing.device == "cuda" else ("quantlab.algorithms.cuda",)


def _versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions without the local part ("+cpu"), because the device already identifies the build."""
    return {name: found.partition("+")[0] for package in packages for name, found in version_of(package).items()}
