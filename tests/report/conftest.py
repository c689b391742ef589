"""Synthetic records: a whole recipe with plausible numbers, and a factory for special cases."""

from collections.abc import Callable

import pytest

from quantlab.evaluation.measured import Measured, Significance, verdict
from quantlab.evaluation.memory.metrics import Memory
from quantlab.evaluation.old_records import passes_of
from quantlab.evaluation.quality.metrics import Divergence, Domain, Quality
from quantlab.evaluation.record import Failure, MatrixErrors, Pass, Record, TaskResult
from quantlab.evaluation.speed.metrics import Speed

FP16_BYTES = 31_457_280
TOKENS = 65_536


def measured(value: float, half: float = 0.0, n: int = TOKENS) -> Measured:
    return Measured(value=value, low=value - half, high=value + half, n=n)


def make_quality(*, loss: Measured | None, rise: Measured | None, kl: float = 0.0, agreement: float = 1.0) -> Quality:
    """`rise` is the perplexity change in percent; None with `loss` for the baseline."""
    perplexity = 21.3 * (1 + (rise.value if rise else 0) / 100)
    return Quality(
        compute_dtype="bfloat16",
        perplexity=measured(perplexity, 0.31),
        bits_per_byte=measured(1.104, 0.008),
        next_token_accuracy=measured(0.412 * (1 - (loss.value if loss else 0) / 100), 0.004),
        domains={
            "prose": Domain(
                perplexity=measured(perplexity * 1.2, 0.5, 30_000), bits_per_byte=measured(1.2, 0.01, 30_000)
            ),
            "code": Domain(
                perplexity=measured(perplexity * 0.6, 0.2, 30_000), bits_per_byte=measured(0.8, 0.01, 30_000)
            ),
        },
        perplexity_change_percent=rise,
        accuracy_loss_percent=loss,
        kl_to_baseline=measured(kl, kl * 0.04) if loss else None,
        top1_agreement=measured(agreement, 0.001) if loss else None,
    )


def make_memory(percent: float, *, quantized: float | None = None, artifact: int | None = None) -> Memory:
    weights = round(FP16_BYTES * percent / 100)
    return Memory(
        weights_bytes=weights,
        fp16_weights_bytes=FP16_BYTES,
        quantized_weights_percent_of_fp16=quantized,
        artifact_bytes=weights + 2_100_000 if artifact is None else artifact,
        peak_memory_bytes=612_000_000 + weights,
        load_seconds=measured(0.2 + 0.2 * percent / 100, 0.03, 5),
    )


def make_speed(ratio: float, *, half: float = 0.06, at_8: float | None = None) -> Speed:
    at_8 = ratio * 0.7 if at_8 is None else at_8
    return Speed(
        twin="hidden 7168, 2 layers of deepseek-v3, 8 experts",
        layout="int4_g128 on 95 % of the weights, the rest bfloat16",
        decode_tokens_per_second={"1": measured(9.4 * ratio, 0.3, 9), "8": measured(41 * at_8, 1.2, 9)},
        prefill_tokens_per_second={"1": measured(310 * (0.5 + ratio / 2), 9, 9)},
        decode_over_fp16={"1": measured(ratio, half, 9), "8": measured(at_8, 0.05, 9)},
        prefill_over_fp16={"1": measured(0.5 + ratio / 2, 0.03, 9)},
    )


def make_record(
    variant: str,
    *,
    quality: Quality | None = None,
    memory: Memory | None = None,
    speed: Speed | None = None,
    description: str = "",
    failures: tuple[Failure, ...] = (),
) -> Record:
    return Record(
        recipe="quickstart",
        recipe_sha256="5f0c2b7f7c1d49a1f0a9e1d2c3b4a5968778695a4b3c2d1e0f9a8b7c6d5e4f30",
        variant=variant,
        description=description or variant,
        passes=tuple(Pass.model_validate(found) for found in passes_of(description or variant)),
        artifact=f"artifacts/{variant}",
        artifact_sha256="ab" * 32,
        baseline="source",
        suite="quick 1",
        suite_sha256="cd" * 32,
        hardware="AMD EPYC 9354P, 2 cores, 8 GB",
        versions={"quantlab": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"},
        quality=quality,
        memory=memory,
        speed=speed,
        failures=failures,
    )


def make_recipe() -> list[Record]:
    """The rows of the quickstart recipe, complete."""

    def quality(
        loss: float, loss_half: float, rise: float, rise_half: float, *, kl: float, agreement: float
    ) -> Quality:
        return make_quality(loss=measured(loss, loss_half), rise=measured(rise, rise_half), kl=kl, agreement=agreement)

    return [
        make_record("source", description="native precision (bfloat16)", quality=make_quality(loss=None, rise=None), memory=make_memory(100.0, artifact=18_900_000), speed=make_speed(1.0, half=0.01, at_8=1.0)),
        make_record("fp16", description="cast float16", quality=quality(0.01, 0.06, 0.002, 0.011, kl=0.00003, agreement=0.9982), memory=make_memory(100.0), speed=make_speed(1.0, half=0.02, at_8=1.0)),
        make_record("int8", description="int8 (rtn)", quality=quality(0.08, 0.17, 0.06, 0.09, kl=0.0021, agreement=0.9812), memory=make_memory(56.2, quantized=50.2), speed=make_speed(1.74, at_8=1.62)),
        make_record("int8_weight", description="int8_weight (rtn)", quality=quality(0.05, 0.14, 0.03, 0.06, kl=0.0011, agreement=0.9861), memory=make_memory(56.3, quantized=50.3), speed=make_speed(1.62, at_8=1.31)),
        make_record("w4a16", description="int4_g128 (gptq)", quality=quality(0.92, 0.31, 1.83, 0.22, kl=0.0187, agreement=0.9331), memory=make_memory(34.9, quantized=25.8), speed=make_speed(2.61, at_8=1.58)),
        make_record("w4a16-experts", description="int4_g128 of routed_experts (gptq)", quality=quality(0.64, 0.29, 1.21, 0.19, kl=0.0122, agreement=0.9449), memory=make_memory(44.1, quantized=25.8), speed=make_speed(1.93, at_8=1.33)),
        make_record("pruned-8", description="prune 0.08 (wanda)", quality=quality(0.31, 0.24, 0.48, 0.14, kl=0.0061, agreement=0.9633), memory=make_memory(100.0), speed=make_speed(1.0, half=0.02, at_8=1.0)),
        make_record("pruned-8-w4a16", description="prune 0.08 (sparsegpt) → int4_g128 (gptq)", quality=quality(1.33, 0.34, 2.61, 0.26, kl=0.0254, agreement=0.9218), memory=make_memory(34.9, quantized=25.8), speed=make_speed(2.58, at_8=1.57)),
    ]  # fmt: skip


def make_divergence(kl: float, *, layers: int = 8, at_fault: int | None = None) -> Divergence:
    """Errors of a few percent in every layer; twenty times as much in the layer at fault."""
    error = kl**0.5 * 0.3

    def of(layer: int) -> float:
        return error * (20 if layer == at_fault else 1 + 0.05 * layer)

    return Divergence(
        kl_mean=measured(kl, 0.04 * kl),
        kl_median=measured(0.4 * kl, 0.03 * kl),
        kl_p99=measured(9 * kl, kl),
        top1_agreement=measured(0.95, 0.004),
        flips_to_wrong=measured(0.021, 0.002),
        flips_to_right=measured(0.018, 0.002),
        router_agreement={f"layer {layer}": measured(1 - of(layer), 0.002) for layer in range(1, layers)},
        layer_errors={f"layer {layer}": measured(of(layer), 0.02 * error, 512) for layer in range(layers)},
        layer_error_tokens=512,
    )


def make_task(
    name: str, score: float, loss: float | None, *, p: float = 0.4, chance: float | None = 0.25
) -> TaskResult:
    found = None if loss is None else measured(loss, 0.012, 600)
    holm_p = min(1.0, 4 * p)
    return TaskResult(
        name=name,
        version="1",
        metric="accuracy",
        score=measured(score, 0.02, 600),
        n=600,
        random_baseline=chance,
        baseline_score=score + (loss or 0.0),
        loss=found,
        significance=None if found is None else Significance(p=p, holm_p=holm_p, verdict=verdict(found, holm_p)),
        by_group={f"{length} tokens": measured(score, 0.04, 150) for length in (512, 1024, 2048)}
        if name == "retrieval"
        else {},
    )


def enrich(record: Record) -> Record:
    """The same record with all optional fields filled."""
    quality, memory, speed = record.quality, record.memory, record.speed
    assert quality is not None
    assert memory is not None
    assert speed is not None
    is_baseline = record.variant == record.baseline
    rise, loss = quality.perplexity_change_percent, quality.accuracy_loss_percent
    kl = quality.kl_to_baseline.value if quality.kl_to_baseline else 0.0
    if rise is not None and loss is not None:
        significance = {
            name: Significance(p=p, holm_p=min(1.0, 3 * p), verdict="no measurable loss" if found.low <= 0 else "loss")
            for name, found in (("perplexity_change_percent", rise), ("accuracy_loss_percent", loss))
            for p in (0.5 if found.low <= 0 else 0.001,)
        }
        quality = quality.model_copy(update={"divergence": make_divergence(kl), "significance": significance})
    lost = 0.0 if loss is None else loss.value / 30
    tasks = tuple(
        make_task(name, score - lost, None if is_baseline else lost, p=0.001 if lost > 0.012 else 0.4)
        for name, score in (("continuation", 0.71), ("last-word", 0.32), ("retrieval", 0.88))
    )
    at_1 = speed.decode_tokens_per_second["1"].value
    speed = speed.model_copy(
        update={
            "decode_over_fp16": speed.decode_over_fp16
            | {"32": measured(speed.decode_over_fp16["8"].value * 0.8, 0.04, 9)},
            "decode_tokens_per_second": speed.decode_tokens_per_second | {"32": measured(4 * at_1, 2, 9)},
            "time_to_first_token_seconds": {"1": measured(0.9 / at_1, 0.004, 9)},
            "noise": {"decode_tokens_per_second.8": "other processes took 0.9 of 2 cores"}
            if record.variant == "int8"
            else {},
        }
    )
    errors = tuple(
        MatrixErrors(layer=f"layer {layer}", kind=kind, count=96, relative_error=0.11, relative_error_max=0.14, output_error=0.008 * (1 + layer), output_error_max=0.012 * (1 + layer), worst=f"model.layers.{layer}.{kind}.3")
        for layer in range(8)
        for kind in ("mlp.experts.gate_proj", "mlp.experts.down_proj")
    )  # fmt: skip
    return record.model_copy(
        update={
            "quality": quality,
            "memory": memory.model_copy(update={"kv_cache_bytes_per_token": 2560, "kv_cache": "latent of 128 + 32"}),
            "speed": speed,
            "tasks": tasks,
            "matrix_errors": errors if "int" in record.description else (),
            "tokens_per_expert": {f"layer {layer}": tuple(range(40, 72)) for layer in range(1, 8)}
            if "gptq" in record.description
            else {},
            "suite_name": "quick",
            "suite_version": 1,
            "seeds": {"bootstrap": 0},
            "command": "quantlab run recipes/quickstart.yaml",
        }
    )


def make_faulty(record: Record) -> Record:
    """The record with the errors of an artifact in which one expert of layer 3 is damaged."""
    quality = record.quality
    assert quality is not None
    return record.model_copy(
        update={
            "variant": "faulty",
            "quality": quality.model_copy(
                update={
                    "divergence": make_divergence(0.0187, at_fault=3),
                    "kl_to_baseline": measured(0.041, 0.002),
                    "accuracy_loss_percent": measured(3.1, 0.4),
                    "perplexity_change_percent": measured(6.2, 0.5),
                }
            ),
        }
    )


@pytest.fixture
def recipe() -> list[Record]:
    return make_recipe()


@pytest.fixture
def rich() -> list[Record]:
    """The recipe with every field filled, and a variant with a damaged layer."""
    records = [enrich(record) for record in make_recipe()]
    return [*records, make_faulty(records[4])]


@pytest.fixture
def damaged(recipe: list[Record]) -> list[Record]:
    """The same recipe with a failed evaluation, a missing one, and an artifact that could not be loaded."""
    by_name = {record.variant: record for record in recipe}
    reason = "no kernel for int8 | activations of 4 dimensions: `o_proj` <layer 3>"
    by_name["int8"] = by_name["int8"].model_copy(
        update={"quality": None, "failures": (Failure(cell="quality", reason=reason),)}
    )
    by_name["w4a16"] = by_name["w4a16"].model_copy(update={"speed": None})
    by_name["pruned-8"] = by_name["pruned-8"].model_copy(
        update={
            "quality": None,
            "memory": None,
            "speed": None,
            "failures": (
                Failure(cell="quality", reason="killed: out of memory"),
                Failure(cell="speed", reason="timed out after 600 s"),
            ),
        }
    )
    return list(by_name.values())


@pytest.fixture
def constructed() -> Callable[..., Record]:
    """A row from (loss, half), (rise, half), memory in percent, (speed, half)."""

    def make(
        variant: str,
        *,
        loss: tuple[float, float],
        rise: tuple[float, float],
        memory: float | None = 50.0,
        speed: tuple[float, float] | None = (1.5, 0.1),
        kl: float = 0.0,
    ) -> Record:
        return make_record(
            variant,
            quality=make_quality(loss=measured(*loss), rise=measured(*rise), kl=kl),
            memory=None if memory is None else make_memory(memory),
            speed=None if speed is None else make_speed(speed[0], half=speed[1]),
        )

    return make
