"""Descriptions of the operators that compute on this processor, for records."""

from quantlab.runtime.blocks import has_pair_layout, supports_blocked_bfloat16
from quantlab.runtime.integer_products import operator_is_exact
from quantlab.runtime.native.library import library, status


def cpu_operators() -> tuple[str, ...]:
    """One phrase for the native kernels, and one for every operator that a slower one replaces on this CPU."""
    phrases = [status()]
    if not operator_is_exact():
        phrases.append("int8 products in float32 (torch's int8 operator saturates on this processor)")
    if library() is not None and supports_blocked_bfloat16() and not has_pair_layout(64, 64):
        phrases.append(
            "bfloat16 products by oneDNN alone (the native kernel does not read its layout on this processor)"
        )
    return tuple(phrases)
