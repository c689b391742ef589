"""Conditions of engine rules: a checkpoint in, the first place where a rule applies out.

All are about linears [N, K]: N rows are outputs, K columns are inputs.
"""

from collections.abc import Callable, Container, Iterable, Iterator
from math import lcm
from typing import Final

from quantlab.architectures.architecture import Role
from quantlab.formats.contents import Contents, Divided, Weight
from quantlab.formats.engine_rules.rule import Finding
from quantlab.numerics.number_format import INT4

_COMPRESSED: Final = "compressed-tensors"
_FUSED_BY_SGLANG: Final[frozenset[str | None]] = frozenset({"q+k+v", "gate+up"})
"""Fused matrices for which SGLang's model classes do not tell compressed-tensors the names of their parts."""
_FUSED_A: Final = "q_a+kv_a"
_V3_FUSED_A: Final = (2112, 7168)
"""Rows and columns of q_a_proj and kv_a_proj_with_mqa of DeepSeek-V3 in one matrix."""


def divided_fusion(model: Contents) -> Finding | None:
    """Matrices that engines fuse have different formats."""
    return _differing(model.divided_fusion)


def divided_layer(model: Contents) -> Finding | None:
    """Routed experts of a layer have different formats."""
    return _differing(model.divided_layer)


def packed_experts(model: Contents) -> Finding | None:
    """Routed experts are packed integers."""
    return _first(_experts(model), _is_packed)


def packed_int4_experts(model: Contents) -> Finding | None:
    """Routed experts are packed int4."""
    return _first(_experts(model), _is_packed_int4)


def integer_experts(model: Contents) -> Finding | None:
    """Routed experts are packed int4, or int8 with quantized activations."""
    return packed_int4_experts(model) or experts_with_int8_activations(model)


def packed_int8_experts(model: Contents) -> Finding | None:
    """Routed experts are packed int8, without quantized activations."""
    return _first(_experts(model), lambda weight: _is_packed(weight) and not _is_packed_int4(weight))


def experts_with_zero_points(model: Contents) -> Finding | None:
    """Routed experts have zero points."""
    return _first(_experts(model), _has_zero_points)


def experts_with_int8_activations(model: Contents) -> Finding | None:
    """The inputs of routed experts are rounded to int8."""
    return _first(_experts(model), _rounds_to_int8)


def unquantized_experts(model: Contents) -> Finding | None:
    """Routed experts are not quantized, other linears are, by compressed-tensors."""
    if model.method != _COMPRESSED:
        return None
    return _first(_experts(model), lambda weight: weight.number is None)


def experts_of_several_formats(model: Contents) -> Finding | None:
    """Routed experts of different layers have different formats, all quantized."""
    schemes = sorted({weight.scheme for weight in _experts(model) if weight.number is not None})
    return _at(next(_experts(model)), ", ".join(schemes)) if len(schemes) > 1 else None


def zero_points_of_one_format(model: Contents) -> Finding | None:
    """Linears outside the experts have zero points, and all of them one format."""
    return _first(_outside(model), _has_zero_points) if len(_formats_outside(model)) == 1 else None


def zero_points_beside_others(model: Contents) -> Finding | None:
    """Linears outside the experts have zero points, others another format."""
    return _first(_outside(model), _has_zero_points) if len(_formats_outside(model)) > 1 else None


def packed(model: Contents) -> Finding | None:
    """Some linears are packed integers."""
    return _first(model.kinds, _is_packed)


def integers(model: Contents) -> Finding | None:
    """Some linears are integers of compressed-tensors."""
    integer = (weight for weight in model.kinds if weight.number is not None and weight.number.is_integer)
    return _first(integer, lambda _: model.method == _COMPRESSED)


def int8_activations(model: Contents) -> Finding | None:
    """The inputs of some linears are rounded to int8."""
    return _first(model.kinds, _rounds_to_int8)


def packed_int8_outside_experts(model: Contents) -> Finding | None:
    """Linears outside the experts are packed int8."""
    return _first(_outside(model), lambda weight: _is_packed(weight) and not _is_packed_int4(weight))


def packed_kv_b(model: Contents) -> Finding | None:
    """kv_b_proj is packed integers."""
    return _first(model.of_role("kv_b"), _is_packed)


def packed_fused_a(model: Contents) -> Finding | None:
    """q_a_proj and kv_a_proj_with_mqa, which engines fuse, are packed integers."""
    parts = _fused_a(model)
    return _first(parts, _is_packed) if len(parts) > 1 else None


def quantized_fused_a_of_v3(model: Contents) -> Finding | None:
    """q_a_proj and kv_a_proj_with_mqa have DeepSeek-V3's sizes and are quantized."""
    parts = _fused_a(model)
    if not parts or (sum(weight.shape[0] for weight in parts), parts[0].shape[1]) != _V3_FUSED_A:
        return None
    return _first(parts, lambda weight: weight.number is not None)


def packed_experts_of_mixed_layouts(model: Contents) -> Finding | None:
    """Routed experts are packed integers, other linears are quantized and stored in another layout."""
    layouts = {weight.layout for weight in model.kinds if weight.number is not None}
    return packed_experts(model) if len(layouts) > 1 else None


def fused_by_name(model: Contents) -> Finding | None:
    """A fused matrix can be described by the names of its parts alone, because others of its role differ.

    config.json names a role by one pattern if all its linears are alike. If they are not, it names the linears that are
    left alone, and those of every format if the checkpoint has several.
    """
    several = len({weight.number for weight in model.kinds if weight.number is not None}) > 1
    for role in ("attention", "dense_mlp", "shared_experts"):
        if model.method == _COMPRESSED and len(model.schemes(role)) > 1:
            named = (weight for weight in _fused(model, _FUSED_BY_SGLANG) if weight.role == role)
            found = _first(named, lambda weight: several or weight.number is None)
            if found is not None:
                return found
    return None


def shared_unlike_routed_of_v3(model: Contents) -> Finding | None:
    """A DeepSeek-V3 of 256 experts and one shared expert, whose shared expert has another format than the routed ones."""
    shared, routed = list(model.of_role("shared_experts")), list(_experts(model))
    if model.architecture.class_name != "DeepseekV3ForCausalLM" or model.experts != 256 or not shared or not routed:
        return None
    one = {weight.shape for weight in shared} == {weight.shape for weight in routed}
    differ = model.schemes("shared_experts") != model.schemes("routed_experts")
    return _at(shared[0], f"{shared[0].scheme}, routed experts {routed[0].scheme}") if one and differ else None


def ragged_fp8_refused(model: Contents) -> Finding | None:
    """An FP8 matrix does not divide into as many equal blocks as it has scales."""
    return _first(_fp8(model), lambda weight: any(size % count for size, count in _grid(weight)))


def ragged_fp8_misread(model: Contents) -> Finding | None:
    """An FP8 matrix with ragged blocks divides into as many equal, but smaller, blocks."""

    def divides(weight: Weight) -> bool:
        assert weight.number is not None, "an FP8 weight has a format"
        sizes = zip(weight.shape, weight.number.shard, strict=True)
        ragged = any(size > whole and size % whole for size, whole in sizes)
        return ragged and all(size % count == 0 for size, count in _grid(weight))

    return _first(_fp8(model), divides)


def ragged_fp8_gate(model: Contents) -> Finding | None:
    """An FP8 matrix that is fused with another below it has a ragged last block of rows."""
    return _first(_fused_fp8(model, {"gate+up"}), _has_ragged_rows)


def ragged_fp8_keys(model: Contents) -> Finding | None:
    """An FP8 query or key matrix has a ragged last block of rows."""
    return _first(
        (weight for weight in _fused_fp8(model, {"q+k+v"}) if not weight.name.endswith("v_proj.weight")),
        _has_ragged_rows,
    )


def ragged_fp8_values(model: Contents) -> Finding | None:
    """An FP8 query, key or value matrix has a ragged last block of rows."""
    return _first(_fused_fp8(model, {"q+k+v"}), _has_ragged_rows)


def fp8_block_experts(model: Contents) -> Finding | None:
    """Routed experts of compressed-tensors are FP8 in several blocks of several rows or columns."""

    def in_blocks(weight: Weight) -> bool:
        grid = weight.layout == "float-quantized" and weight.number is not None
        return grid and any(1 < count < size for size, count in _grid(weight))

    return _first(_experts(model), in_blocks)


def padded_by_marlin(model: Contents) -> Finding | None:
    """Packed linears whose sizes Marlin pads: neither (64 rows, 128 columns) nor (128, 64) divide them; experts: 64 rows."""
    for weight in model.kinds:
        if _is_packed(weight):
            (rows, columns), size = weight.shape, weight.number.group_size if weight.number else None
            experts = weight.role == "routed_experts"
            wide, tall = lcm(64, size or 1), lcm(128, size or 1)
            fits = (rows % 64 == 0 and columns % tall == 0) or (rows % 128 == 0 and columns % wide == 0)
            if (rows % 64 or columns % 64) if experts else not fits:
                return _at(weight, _shape(weight))
    return None


def outside_machete(model: Contents) -> Finding | None:
    """Packed linears outside the experts whose fused sizes or groups Machete does not take: K % 64, N % 128, groups of 32 or 64."""
    rows: dict[str, int] = {}
    for weight in _outside(model):
        rule = weight.tensor.rule
        if rule is not None and _is_packed(weight):
            key = rule.fused or rule.pattern
            rows[key] = rows.get(key, 0) + weight.shape[0]
    for weight in _outside(model):
        rule = weight.tensor.rule
        if rule is not None and _is_packed(weight) and weight.number is not None:
            fused = rows[rule.fused or rule.pattern]
            if weight.shape[1] % 64 or fused % 128 or weight.number.group_size not in {None, 64, 128}:
                return _at(weight, f"{fused} x {weight.shape[1]} in groups of {weight.number.group_size}")
    return None


def uneven_on_a_cpu(model: Contents) -> Finding | None:
    """Packed linears outside the experts whose sizes are no multiples of 32."""
    return _first(_outside(model), lambda weight: _is_packed(weight) and any(size % 32 for size in weight.shape))


def gptq(model: Contents) -> Finding | None:
    """The checkpoint is in a layout of GPTQ."""
    return _first(model.kinds, lambda weight: model.method == "gptq" and weight.number is not None)


def gptq_with_zero_points(model: Contents) -> Finding | None:
    """The checkpoint is in a layout of GPTQ and asymmetric."""
    return _first(model.kinds, lambda weight: model.method == "gptq" and _has_zero_points(weight))


def _differing(divided: Divided | None) -> Finding | None:
    if divided is None:
        return None
    return Finding(divided.group, "; ".join(f"{one.name}: {one.scheme}" for one in (divided.one, divided.other)))


def _experts(model: Contents) -> Iterator[Weight]:
    return model.of_role("routed_experts")


def _outside(model: Contents) -> Iterator[Weight]:
    roles: frozenset[Role] = frozenset({"shared_experts", "dense_mlp", "attention", "kv_b"})
    return (weight for weight in model.kinds if weight.role in roles)


def _formats_outside(model: Contents) -> set[object]:
    return {weight.number for weight in _outside(model) if weight.number is not None}


def _fused(model: Contents, names: Container[str | None]) -> Iterator[Weight]:
    for weight in _outside(model):
        if weight.tensor.rule is not None and weight.tensor.rule.fused in names:
            yield weight


def _fused_a(model: Contents) -> tuple[Weight, ...]:
    """One q_a_proj, if there is one, and one kv_a_proj_with_mqa: of a layer that quantizes them, if any does."""
    parts = sorted(_fused(model, {_FUSED_A}), key=lambda weight: weight.number is None)
    return tuple({weight.tensor.rule: weight for weight in reversed(parts)}.values())


def _fp8(model: Contents) -> Iterator[Weight]:
    return (weight for weight in model.kinds if weight.layout == "fp8-blocks" and weight.number is not None)


def _fused_fp8(model: Contents, names: Container[str | None]) -> Iterator[Weight]:
    for weight in model.kinds:
        number = weight.number
        blocks = number is not None and not number.is_integer and not number.by_row and number.granularity.rows
        if blocks and weight.tensor.rule is not None and weight.tensor.rule.fused in names:
            yield weight


def _grid(weight: Weight) -> Iterator[tuple[int, int]]:
    """Rows and scales of a column of blocks, then columns and scales of a row of blocks."""
    assert weight.number is not None, "only quantized weights have scales"
    rows, columns = weight.shape
    return zip((rows, columns), weight.number.scale_shape((rows, columns)), strict=True)


def _has_ragged_rows(weight: Weight) -> bool:
    return weight.number is not None and bool(weight.shape[0] % (weight.number.granularity.rows or 1))


def _is_packed(weight: Weight) -> bool:
    return weight.layout == "pack-quantized" and weight.number is not None


def _is_packed_int4(weight: Weight) -> bool:
    return _is_packed(weight) and weight.number is not None and weight.number.element == INT4


def _has_zero_points(weight: Weight) -> bool:
    return weight.number is not None and not weight.number.symmetric


def _rounds_to_int8(weight: Weight) -> bool:
    activations = weight.number.activations if weight.number is not None else None
    return activations is not None and activations.element.kind == "int"


def _first(weights: Iterable[Weight], applies: Callable[[Weight], bool]) -> Finding | None:
    return next((_at(weight, _shape(weight)) for weight in weights if applies(weight)), None)


def _at(weight: Weight, found: str) -> Finding:
    return Finding(weight.name, found)


def _shape(weight: Weight) -> str:
    return f"{weight.scheme} [{', '.join(map(str, weight.shape))}]"
