"""Records made by hand: a whole recipe with plausible numbers, and a factory for constructed cases."""

from collections.abc import Callable

import pytest

from quantlab.evaluation.record import Domain, Failure, Measured, Memory, Quality, Record, Speed

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
        make_record("pruned-8", description="prune 8 % (wanda)", quality=quality(0.31, 0.24, 0.48, 0.14, kl=0.0061, agreement=0.9633), memory=make_memory(100.0), speed=make_speed(1.0, half=0.02, at_8=1.0)),
        make_record("pruned-8-w4a16", description="prune 8 % (sparsegpt), int4_g128 (gptq)", quality=quality(1.33, 0.34, 2.61, 0.26, kl=0.0254, agreement=0.9218), memory=make_memory(34.9, quantized=25.8), speed=make_speed(2.58, at_8=1.57)),
    ]  # fmt: skip


@pytest.fixture
def recipe() -> list[Record]:
    return make_recipe()


@pytest.fixture
def damaged(recipe: list[Record]) -> list[Record]:
    """The same recipe with an evaluation that failed, one that was not made, and an artifact that could not be loaded."""
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
    ) -> Record:
        return make_record(
            variant,
            quality=make_quality(loss=measured(*loss), rise=measured(*rise)),
            memory=None if memory is None else make_memory(memory),
            speed=None if speed is None else make_speed(speed[0], half=speed[1]),
        )

    return make
