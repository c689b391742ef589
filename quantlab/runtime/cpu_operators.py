"""Descriptions of the operators that compute on this processor, for records."""

from quantlab.runtime.banks.exact_int8 import operator_is_exact
from quantlab.runtime.modules.onednn_layout import has_pair_layout, supports_blocked_bfloat16
from quantlab.runtime.native.library import library, status
from quantlab.runtime.processor import MATRIX_UNIT_ROWS, has_matrix_units, multiplies_bfloat16, multiplies_int8


def native_kernels() -> str:
    """Description of the native kernels in use, or the reason why there are none."""
    return status()


def cpu_operators() -> tuple[str, ...]:
    """One phrase for the native kernels, and one for every operator that a slower one replaces on this CPU."""
    phrases = [native_kernels()]
    if not operator_is_exact():
        phrases.append("int8 products in float32 (torch's int8 operator saturates on this processor)")
    elif not multiplies_int8():
        phrases.append(
            "int8 products of many rows in float32 (torch's int8 operator is a scalar loop on this processor)"
        )
    if has_matrix_units():
        phrases.append(
            f"products of more than {MATRIX_UNIT_ROWS} rows by oneDNN (this processor has matrix units, AMX)"
        )
    elif not multiplies_bfloat16():
        phrases.append("16-bit products of many rows in float32 (this processor has no bfloat16 products)")
    if library() is not None and supports_blocked_bfloat16() and not has_pair_layout(64, 64):
        phrases.append(
            "bfloat16 products by oneDNN alone (the native kernel does not read its layout on this processor)"
        )
    return tuple(phrases)
