"""Errors of single layers: errors that are not finite are reported as failures, not stored."""

from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from quantlab.evaluation.measured import Measured
from quantlab.evaluation.quality.layers import LayerErrors
from quantlab.evaluation.quality.measure import with_layers
from quantlab.evaluation.quality.metrics import Divergence, Domain, Quality
from quantlab.evaluation.quality.windows import HeldOut, Window

NOTHING: Mapping[str, NDArray[np.bool_]] = {}


def quality() -> Quality:
    one = Measured(value=0.5, low=0.4, high=0.6, n=10)
    divergence = Divergence(
        kl_mean=one, kl_median=one, kl_p99=one, top1_agreement=one, flips_to_wrong=one, flips_to_right=one
    )
    return Quality(
        compute_dtype="float32",
        perplexity=one,
        bits_per_byte=one,
        next_token_accuracy=one,
        domains={"prose": Domain(perplexity=one, bits_per_byte=one)},
        perplexity_change_percent=one,
        accuracy_loss_percent=one,
        kl_to_baseline=one,
        top1_agreement=one,
        divergence=divergence,
    )


def held_out(documents: int) -> HeldOut:
    windows = tuple(Window(index, np.arange(5), 1, 9) for index in range(documents))
    return HeldOut(("prose",), np.zeros(documents, dtype=np.int64), windows, "")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_layer_whose_error_is_no_number_says_why_and_costs_no_other(bad: float) -> None:
    difference, added = np.full((8, 4), 4.0), np.full((8, 4), 16.0)
    difference[3, 1] = bad
    added[2, 2] = bad
    added[:, 3] = 0
    errors = LayerErrors(
        ("layer 0", "layer 1", "layer 2", "layer 3"), difference, added, documents=np.arange(8), tokens=32
    )
    found = with_layers(quality(), held_out(8), NOTHING, errors)
    assert found.divergence is not None
    assert {name: error.value for name, error in found.divergence.layer_errors.items()} == {"layer 0": 0.5}
    assert Quality.model_validate_json(found.model_dump_json()) == found
    faults = errors.faults()
    assert set(faults) == {"layer 1", "layer 2", "layer 3"}
    assert "not finite" in faults["layer 1"]
    assert "not finite" in faults["layer 2"]
    assert "adds nothing" in faults["layer 3"]


def test_the_errors_of_layers_are_drawn_by_document() -> None:
    """Windows of one document are correlated: cutting it into more windows must not narrow the interval."""
    generator = np.random.default_rng(0)
    difference, added = generator.uniform(1, 4, (12, 1)), np.full((12, 1), 16.0)
    found = []
    for pieces in (1, 5):
        documents = np.repeat(np.arange(12), pieces)
        errors = LayerErrors(
            ("layer 0",), difference[documents] / pieces, added[documents] / pieces, documents=documents, tokens=60
        )
        divergence = with_layers(quality(), held_out(12), NOTHING, errors).divergence
        assert divergence is not None
        found.append(divergence.layer_errors["layer 0"])
    whole, cut = found
    assert (cut.value, cut.low, cut.high) == pytest.approx((whole.value, whole.low, whole.high))
    assert whole.interval == "95 %"
    assert whole.low < whole.value < whole.high
