"""Rotary embeddings in llama.cpp's terms: positions of rotated pairs, and the scaling of frequencies.

llama.cpp computes with the angles of YaRN (arXiv 2309.00071) like transformers, but with a factor m = 0.1 ln(factor) + 1 of its
own on cos and sin; `attn_factor` multiplies it. Under latent attention it divides cos and sin by that factor again and scales
the logits of attention instead, which equals DeepSeek's rule where `mscale` and `mscale_all_dim` are equal, as in all releases.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from quantlab.architectures.config import Config, number_of, size_of
from quantlab.exports.gguf.refusal import RefusalError

_THETA: Final = 10_000.0
"""transformers' default, and llama.cpp's."""
_BETAS: Final = {"beta_fast": 32.0, "beta_slow": 1.0}
"""llama.cpp does not read them for these families."""
_SAME: Final = 1e-6


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding.

    Attributes:
        theta: base of the frequencies.
        kind: "none", "linear", "yarn" or "llama3".
        factor: by which positions are stretched; 1 without scaling.
        original_context: context length before the stretching, in tokens; 0 if it does not matter.
        attention: factor of cos and sin, relative to 0.1 ln(factor) + 1.
        log_multiplier: of YaRN's factor of the logits under latent attention, DeepSeek's `mscale_all_dim`; 0 without.
        divisors: llama3: by which each frequency is divided, one per pair; empty for the others.
    """

    theta: float
    kind: str = "none"
    factor: float = 1.0
    original_context: int = 0
    attention: float = 1.0
    log_multiplier: float = 0.0
    divisors: tuple[float, ...] = ()


def read_rotary(config: Config, *, width: int, latent: bool) -> Rotary:
    """The rotary embedding of a config.json.

    Args:
        config: config.json.
        width: rotated numbers of a head.
        latent: whether attention is latent.

    Raises:
        RefusalError: llama.cpp does not compute it.
        CheckpointError: a parameter is not a number.
    """
    section = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = number_of(section, "rope_theta", default=number_of(config, "rope_theta", default=_THETA))
    kind = section.get("rope_type", section.get("type", "default"))
    if number_of(section, "partial_rotary_factor", default=1.0) != 1.0:
        raise RefusalError("a part of each head is rotated (partial_rotary_factor), which is not written")
    if kind == "default":
        return Rotary(theta)
    factor = number_of(section, "factor", default=1.0)
    if kind == "linear":
        return Rotary(theta, "linear", factor)
    original = size_of(
        section, "original_max_position_embeddings", default=size_of(config, "max_position_embeddings", default=0)
    )
    if kind == "llama3" and not latent:
        return Rotary(theta, "llama3", divisors=_llama3_divisors(theta, section, original, width=width))
    if kind != "yarn":
        raise RefusalError(f"llama.cpp does not compute rotary embeddings of type {kind} in this family")
    _check_yarn(section)
    own, found = _mscale(factor, 1.0), _attention_factor(section, factor)
    if not latent:
        return Rotary(theta, "yarn", factor, original, attention=found / own)
    everywhere = number_of(section, "mscale_all_dim", default=0.0)
    if abs(found - 1) > _SAME or everywhere == 0:
        raise RefusalError(
            "llama.cpp computes YaRN under latent attention only if mscale and mscale_all_dim are equal, found "
            f"{section.get('mscale')} and {section.get('mscale_all_dim')}"
        )
    return Rotary(theta, "yarn", factor, original, log_multiplier=everywhere)


def interleaved(width: int) -> tuple[int, ...]:
    """Positions in a head whose halves rotate together, in the order that puts every pair side by side."""
    return tuple(first + half for first in range(width // 2) for half in (0, width // 2))


def _check_yarn(section: Mapping[str, Any]) -> None:
    for name, value in _BETAS.items():
        if number_of(section, name, default=value) != value:
            raise RefusalError(f"llama.cpp computes YaRN with {name} {value:g} in this family, found {section[name]}")
    if section.get("truncate") is False:
        raise RefusalError(
            "llama.cpp rounds YaRN's range of frequencies to whole numbers, this model does not (truncate)"
        )


def _attention_factor(section: Mapping[str, Any], factor: float) -> float:
    """The factor of cos and sin, as transformers reads it."""
    if section.get("attention_factor") is not None:
        return number_of(section, "attention_factor", default=1.0)
    own, everywhere = number_of(section, "mscale", default=0.0), number_of(section, "mscale_all_dim", default=0.0)
    return _mscale(factor, own) / _mscale(factor, everywhere) if own and everywhere else _mscale(factor, 1.0)


def _mscale(factor: float, multiplier: float) -> float:
    return 0.1 * multiplier * math.log(factor) + 1 if factor > 1 else 1.0


def _llama3_divisors(theta: float, section: Mapping[str, Any], original: int, *, width: int) -> tuple[float, ...]:
    """By which each frequency is divided: long wavelengths by the factor, short ones by 1, those between by a mixture."""
    factor, low, high = (
        number_of(section, name, default=value)
        for name, value in (("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0))
    )
    divisors = []
    for pair in range(width // 2):
        rotations = original / (2 * math.pi * theta ** (2 * pair / width))
        kept = min(max((rotations - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - kept) / factor + kept))
    return tuple(divisors)
