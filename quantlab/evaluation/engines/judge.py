"""Judges an artifact by engines: the same tokens in quantlab's runtime and in each engine, and a verdict by a stated criterion.

The source model comes first in every engine. It shows what the engine's dtype rounds away, and whether the engine computes this kind
of model at all on this machine: if not, no verdict on an artifact is possible here.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from quantlab import hardware
from quantlab.checkpoint.index import open_checkpoint
from quantlab.engine_pythons import Environment
from quantlab.evaluation.engines.criteria import (
    FLOAT32_RMS,
    SOURCE_FACTOR,
    Ground,
    criterion,
    differences,
    greedy_agreement,
    median,
    outcome,
    rms,
)
from quantlab.evaluation.engines.engine import BY_RULES, ENGINES, Engine, model_of
from quantlab.evaluation.engines.environments import find_environment, version_in
from quantlab.evaluation.engines.judged import Judged
from quantlab.evaluation.engines.layers import compare_layers, left_unquantized, probe_inputs, stored_weights
from quantlab.evaluation.engines.own import (
    Computed,
    Rounded,
    compute,
    in_16_bits,
    multiplied_in_float32,
    without_rounded_activations,
)
from quantlab.evaluation.engines.process import EngineFailure, EngineResult, Wanted, run_engine
from quantlab.evaluation.engines.text import TOKENS, JudgedText, judged_text
from quantlab.evaluation.engines.verdict import EngineVerdict, manifest_sha256, read_verdicts
from quantlab.fingerprint import code_fingerprint
from quantlab.formats.contents import DENSE
from quantlab.formats.dtype import dtype_of
from quantlab.formats.engine_rules.table import verdicts
from quantlab.formats.layouts import METHODS
from quantlab.formats.read_contents import contents_of
from quantlab.numerics.number_format import INT8
from quantlab.recipe.schema import EngineName

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROMPTS: Final = 4
_PREFILL, _DECODE = 128, 32


@dataclass(frozen=True)
class Judging:
    """Settings of the judgement.

    Attributes:
        dtype: dtype that engines are asked to compute in.
        tokens: tokens that are compared.
        greedy_tokens: tokens of a greedy continuation.
        seconds: seconds an engine may take for one model; None for the engine's own limit.
        pythons: Pythons of engines, from the command line.
        source: the source model; None if it is not known.
        corpus: the held-out text; None for the repository's.
        reuse: keep verdicts that nothing has changed for.
        tell: called with what is being done.
    """

    dtype: str = "float32"
    tokens: int = TOKENS
    greedy_tokens: int = 64
    seconds: float | None = None
    pythons: Mapping[str, Path] = field(default_factory=dict)
    source: Path | None = None
    corpus: Path | None = None
    reuse: bool = False
    tell: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class SourceFound:
    """What an engine did with the source model.

    Attributes:
        rms: of the differences, nats; None if it was not computed.
        mean: of the differences.
        note: why it was not computed, or how it was prepared.
        wrong: why no verdict is possible; None if the engine computes it as quantlab's runtime.
    """

    rms: float | None = None
    mean: float | None = None
    note: str = ""
    wrong: str | None = None


class Sources:
    """What is known of source models, shared by the artifacts of a run: each is computed once."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, ...], SourceFound] = {}
        self.own: dict[tuple[str, ...], Computed] = {}

    def computed(self, directory: Path, text: JudgedText, dtype: str) -> Computed:
        """The results of quantlab's runtime on a source model."""
        key = (str(directory.absolute()), text.sha256, dtype)
        if key not in self.own:
            self.own[key] = compute(directory, text, dtype=_DTYPES[dtype])
        return self.own[key]


class Judge:
    """Judges one artifact and its exports. What quantlab's runtime computes is computed once, for all engines.

    Args:
        judged: the files that engines load, and the artifact that is their reference.
        how: settings.
        sources: shared by several judges.
    """

    def __init__(self, judged: Judged, how: Judging, sources: Sources | None = None) -> None:
        self._judged, self._how, self._sources = judged, how, sources or Sources()
        self._artifact = judged.artifact
        self._in_experts: dict[str, Computed] = {}

    def verdict(self, name: EngineName) -> EngineVerdict:
        """The verdict of one engine.

        Raises:
            EvaluationError: the text or a named Python cannot be used.
            QuantlabError: quantlab's runtime cannot load the artifact or the source.
        """
        engine = ENGINES[name]
        about: dict[str, Any] = {
            "engine": engine.name,
            "format": self._judged.format,
            "hardware": hardware.describe(""),
            "export_sha256": self._judged.export_sha256,
        }
        if not engine.runs:
            return EngineVerdict(**about, verdict="not here", reason=f"{BY_RULES}: {self._by_rules(name)}")
        environment = find_environment(engine, self._how.pythons)
        impossible = self._impossible(engine, environment)
        if impossible is not None or environment is None:
            return EngineVerdict(**about, verdict="not here", reason=impossible or "")
        version = version_in(environment, engine)
        if version is None:
            reason = f"{environment.python} ({environment.origin}) has no {engine.package}"
            return EngineVerdict(**about, verdict="not here", reason=reason)
        about |= {"version": version, "key": self._key(engine, version)}
        kept = next((one for one in read_verdicts(self._artifact) if one.key == about["key"]), None)
        if self._how.reuse and kept is not None:
            return kept
        return self._run(engine, environment, about)

    def _by_rules(self, name: EngineName) -> str:
        """What the rules of an engine say about the files, with the version that was read."""
        if self._judged.format in {DENSE, *(method.word for method in METHODS)}:
            model = contents_of(open_checkpoint(self._judged.directory))
        else:
            model = replace(contents_of(open_checkpoint(self._artifact)), method=self._judged.format)
        found = next(one for one in verdicts(model) if one.engine.name == name)
        return f"{found.engine.label}: {found.text}"

    def _impossible(self, engine: Engine, environment: Environment | None) -> str | None:
        """Why an engine cannot be asked; None if it can."""
        if self._judged.format not in engine.formats:
            reads = ", ".join(engine.formats)
            return f"{engine.name} reads {reads}, and this is {self._judged.format}: write it with `quantlab export --format`"
        if environment is None:
            return f"there is no environment: `quantlab engines install {engine.name}`, --engine-python, or {engine.variable}"
        return None

    def _key(self, engine: Engine, version: str) -> str:
        """Hash of everything a verdict depends on."""
        source = "" if self._how.source is None else open_checkpoint(self._how.source).fingerprint()
        parts = (
            manifest_sha256(self._artifact),
            self._judged.export_sha256,
            version,
            *(path.read_text(encoding="utf-8") for path in (engine.script, *engine.parts)),
            code_fingerprint(("quantlab.evaluation.engines.judge",)),
            self._text.sha256,
            f"{self._how.dtype} {self._how.greedy_tokens}",
            source,
            hardware.describe(""),
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _run(self, engine: Engine, environment: Environment, about: dict[str, Any]) -> EngineVerdict:
        """Run an engine on the source and on the artifact, and compare."""
        source = self._source(engine, environment)
        about |= {"source_nll_rms": source.rms, "source_nll_difference": source.mean, "source_note": source.note}
        if source.wrong is not None:
            return EngineVerdict(**about, verdict="not here", reason=source.wrong)
        self._how.tell(f"{engine.name}: {self._judged.directory.name}")
        inputs = probe_inputs(self._artifact, experts=engine.probes_experts) if engine.probes else {}
        wanted = Wanted(
            model=model_of(engine, self._judged.directory),
            dtype=self._how.dtype,
            threads=hardware.threads(),
            documents=self._text.documents,
            prompts=self._prompts,
            greedy_tokens=self._how.greedy_tokens,
            speed=(_PREFILL, _DECODE),
            probes=inputs,
        )
        result = run_engine(engine, environment, wanted, seconds=self._how.seconds or engine.seconds)
        if isinstance(result, EngineFailure):
            return EngineVerdict(**about, verdict=result.outcome, reason=result.reason)
        about |= self._described(result)
        not_finite = int((~np.isfinite(result.nll)).sum())
        if not_finite:
            reason = f"{not_finite:,} of {len(result.nll):,} log-probabilities are not finite"
            return EngineVerdict(**about, verdict="differs", reason=reason)
        ground = self._ground(engine, result, source)
        layers = compare_layers(self._artifact, inputs, result.probes, ground.dtype_of)
        return self._compared(ground, result, about | {"layers": layers})

    def _described(self, result: EngineResult) -> dict[str, Any]:
        """The fields of a verdict that an engine reports itself."""
        report = result.report
        found = report.model_dump(exclude={"unquantized", "modules"})
        return found | {
            "modules": report.modules,
            "text": self._text.description,
            "tokens": len(result.nll),
            "left_unquantized": None
            if report.unquantized is None
            else left_unquantized(self._artifact, report.unquantized),
        }

    def _compared(self, ground: Ground, result: EngineResult, about: dict[str, Any]) -> EngineVerdict:
        """The verdict on finite results."""
        own, weights = self._own, ""
        if ground.experts_rms is not None:
            own, weights = (
                self._with_experts_in(ground.experts_dtype),
                f"routed experts in {ground.experts_dtype}, other linears in float32",
            )
        found = differences(result, own.nll, own.top, self._text)
        if found.rms > FLOAT32_RMS and self._formats and ground.is_exact:
            exact = differences(result, self._exact.nll, self._exact.top, self._text)
            if exact.rms < found.rms:
                own, found, weights = self._exact, exact, "multiplied out in float32, quantlab's in 16 bits"
        greedy = None
        if result.greedy is not None and own.greedy is not None:
            greedy = greedy_agreement(result.greedy, own.greedy)
        decided, reason = outcome(ground, found, about["layers"])
        if decided == "differs" and result.report.rounded:
            names = result.report.rounded
            reason += f"; it rounds {len(names)} tensors that are not quantized, the first is {names[0]}"
        if decided == "differs" and self._rounds_to_float:
            decided = "not here"
            reason = f"quantlab's runtime does not round activations to FP8, as the engine may: {reason}"
        if result.report.missing:
            names = result.report.missing
            reason = "; ".join(
                [f"{len(names)} parameters have no tensor, the first is {names[0]}", *([reason] * bool(reason))]
            )
            decided = "differs"
        return EngineVerdict(
            **about,
            verdict=decided,
            reason=reason,
            criterion=criterion(ground)[1],
            weights=weights,
            nll_difference=found.mean,
            nll_rms=found.rms,
            nll_median=found.median,
            top1_agreement=found.top1,
            greedy_agreement=greedy,
            activation_rms=ground.activation_rms,
        )

    def _ground(self, engine: Engine, result: EngineResult, source: SourceFound) -> Ground:
        """What the criterion rests on."""
        dtype, rounding, rounding_of = result.report.dtype, None, ""
        if dtype != "float32":
            rounding, rounding_of = source.rms, f"the source model in {engine.name}"
            if rounding is None:
                own = compute(self._artifact, self._text, dtype=_DTYPES[dtype])
                rounding, rounding_of = rms(own.nll - self._own.nll), "quantlab's runtime on the same artifact"
        activation = self._activation_rms(engine)
        wanted = activation is not None and engine.probes and bool(probe_inputs(self._artifact))
        if engine.rounds_inputs and dtype == "float32" and not self._formats and self._dtype != "float32":
            cast = compute(self._artifact, self._text, where=Rounded(inputs=_DTYPES[self._dtype]))
            return Ground(dtype, inputs_dtype=self._dtype, inputs_median=median(cast.nll - self._own.nll))
        experts = next((one.dtype for one in result.report.modules if one.dtype not in (None, dtype)), None)
        if experts is None or dtype != "float32":
            return Ground(dtype, rounding, rounding_of, activation, wanted)
        changed = rms(self._with_experts_in(experts).nll - self._exact.nll)
        if activation is not None:
            return Ground(dtype, changed, f"routed experts in {experts}", activation, wanted, experts)
        return Ground(dtype, experts_dtype=experts, experts_rms=changed)

    def _source(self, engine: Engine, environment: Environment) -> SourceFound:
        """What the engine does with the source model."""
        source = self._how.source
        if source is None:
            return SourceFound(note="the source model is not known: give it with --source")
        if "dense" not in engine.formats:
            return SourceFound(note=f"{engine.name} does not read the source model")
        key = (engine.name, str(environment.python), str(source.absolute()), self._how.dtype, self._text.sha256)
        if key not in self._sources.found:
            self._how.tell(f"{engine.name}: the source model")
            self._sources.found[key] = self._source_in(engine, environment, source)
        return self._sources.found[key]

    def _source_in(self, engine: Engine, environment: Environment, source: Path) -> SourceFound:
        with in_16_bits(source) as (directory, note):
            wanted = Wanted(directory, self._how.dtype, hardware.threads(), self._text.documents)
            result = run_engine(engine, environment, wanted, seconds=self._how.seconds or engine.seconds)
        if isinstance(result, EngineFailure):
            told = f"the source model was not computed: {result.reason}"
            return SourceFound(note=told, wrong=told if result.outcome == "not here" else None)
        wrong = f"{engine.name} computes the source model itself wrongly on this machine"
        if result.report.missing:
            return SourceFound(note=note, wrong=f"{wrong}: no tensor for {result.report.missing[0]}")
        if not np.isfinite(result.nll).all():
            return SourceFound(note=note, wrong=f"{wrong}: log-probabilities are not finite")
        own = self._sources.computed(source, self._text, "float32")
        difference = result.nll - own.nll
        found, most = rms(difference), FLOAT32_RMS
        if result.report.dtype != "float32":
            rounded = self._sources.computed(source, self._text, result.report.dtype)
            most = max(most, SOURCE_FACTOR * rms(rounded.nll - own.nll))
        told = f"{wrong}: mean nll {result.nll.mean():.3f} instead of {own.nll.mean():.3f}, rms {found:.2g} nats of {most:.2g}"
        return SourceFound(found, float(difference.mean()), note, None if found <= most else told)

    @cached_property
    def _text(self) -> JudgedText:
        return judged_text(self._artifact, tokens=self._how.tokens, corpus=self._how.corpus)

    @property
    def _prompts(self) -> tuple[tuple[int, ...], ...]:
        return self._text.prompts(_PROMPTS) if self._how.greedy_tokens else ()

    @cached_property
    def _own(self) -> Computed:
        """Results of quantlab's runtime on the artifact in float32."""
        self._how.tell(f"quantlab's runtime: {self._artifact.name}")
        return compute(self._artifact, self._text, prompts=self._prompts, greedy_tokens=self._how.greedy_tokens)

    @cached_property
    def _exact(self) -> Computed:
        """The same with integers and scales multiplied in float32."""
        with multiplied_in_float32(self._artifact) as same:
            return compute(same, self._text, prompts=self._prompts, greedy_tokens=self._how.greedy_tokens)

    def _with_experts_in(self, dtype: str) -> Computed:
        """The same with routed experts computed in another dtype."""
        if dtype not in self._in_experts:
            with multiplied_in_float32(self._artifact) as same:
                self._in_experts[dtype] = compute(
                    same,
                    self._text,
                    prompts=self._prompts,
                    greedy_tokens=self._how.greedy_tokens,
                    where=Rounded(experts=_DTYPES[dtype]),
                )
        return self._in_experts[dtype]

    def _activation_rms(self, engine: Engine) -> float | None:
        """What rounding activations changes, nats; None if nothing rounds them."""
        if self._rounds_to_int8:
            with without_rounded_activations(self._artifact) as same:
                return rms(self._own.nll - compute(same, self._text).nll)
        if engine.activation_group is not None and self._formats:
            rounded = compute(self._artifact, self._text, where=Rounded(group=engine.activation_group))
            return rms(rounded.nll - self._own.nll)
        return None

    @cached_property
    def _formats(self) -> frozenset[Any]:
        """The number formats of the quantized weights."""
        stored = stored_weights(self._artifact)
        return frozenset(one for name in stored.names() if (one := stored.format_of(name)) is not None)

    @property
    def _dtype(self) -> str:
        """The dtype of the artifact's weights that are not quantized."""
        return dtype_of(open_checkpoint(self._artifact))

    @property
    def _rounds_to_int8(self) -> bool:
        return any(one.activations is not None and one.activations.element == INT8 for one in self._formats)

    @property
    def _rounds_to_float(self) -> bool:
        return any(one.activations is not None and one.activations.element != INT8 for one in self._formats)
