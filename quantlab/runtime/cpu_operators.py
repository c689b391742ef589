"""Descriptions of the operators that compute on this processor, for records."""

from quantlab.runtime.banks.exact_int8 import operator_is_exact
from quantlab.runtime.modules.onednn_layout import has_pair_layout, supports_blocked_bfloat16
from quantlab.runtime.native.library import library, status


def native_kernels() -> str:
    """Description of the native kernels in use, or the reason why there are none."""
    return status()


def cpu_operators() -> tuple[str, ...]:
    """One phrase for the native kernels, and one for every operator that a slower one replaces on this CPU."""
    phrases = [native_kernels()]
    if not operator_is_exact():
        phrases.append("int8 products in float32 (torch's int8 operator saturates on this processor)")
    if library() is not None and supports_blocked_bfloat16() and not has_pair_layout(64, 64):
        phrases.append(
            "bfloat16 products by oneDNN alone (the native kernel does not read its layout on this processor)"
        )
    return tuple(phrases)
