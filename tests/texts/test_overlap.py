"""Overlap of two texts by runs of 13 words, and the parts of a mixture."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlab.errors import CalibrationError
from quantlab.texts.overlap import overlap_of
from quantlab.texts.shares import allotted

HELD_OUT = [" ".join(f"h{n}" for n in range(20)), " ".join(f"g{n}" for n in range(20)), "short"]


def test_no_overlap() -> None:
    found = overlap_of([" ".join(f"c{n}" for n in range(50))], HELD_OUT)
    assert (found.documents, found.shared_documents, found.runs, found.shared_runs) == (3, 0, 16, 0)
    assert "share no 13 words in a row (16 compared)" in found.text


def test_thirteen_words_count_and_twelve_do_not() -> None:
    twelve, thirteen = (" ".join(f"g{n}" for n in range(4, 4 + count)) for count in (12, 13))
    assert overlap_of([twelve], HELD_OUT).shared_runs == 0
    found = overlap_of([thirteen.upper().replace(" ", ", ")], HELD_OUT)  # case and punctuation do not matter
    assert (found.shared_documents, found.shared_runs) == (1, 1)
    assert found.example == thirteen
    assert found.text.startswith("1 of 3 held-out documents share 13 words in a row")
    assert overlap_of(HELD_OUT, HELD_OUT).shared_runs == 16


@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=6), st.integers(1, 500))
def test_parts_add_up_and_are_within_one_of_their_share(weights: list[float], count: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    try:
        parts = allotted(shares, count, what="sample", where="mix", error=CalibrationError)
    except CalibrationError:
        assert min(shares) * count < 1
        return
    assert sum(parts) == count
    assert all(abs(part - share * count) < 1 + 1e-6 for part, share in zip(parts, shares, strict=True))


def test_remainders_go_to_the_largest() -> None:
    def parts(*shares: float, count: int) -> tuple[int, ...]:
        return allotted(shares, count, what="sample", where="mix", error=CalibrationError)

    assert parts(0.5, 0.3, 0.2, count=10) == (5, 3, 2)
    assert parts(0.7, 0.2, 0.1, count=7) == (5, 1, 1)
    with pytest.raises(CalibrationError, match="gives no sample"):
        parts(0.99, 0.01, count=10)
