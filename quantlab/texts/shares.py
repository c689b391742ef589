"""Divides a number of samples or documents among the sources of a mixture."""

from collections.abc import Sequence

from quantlab.errors import QuantlabError


def allotted(
    shares: Sequence[float], count: int, *, what: str, where: str, error: type[QuantlabError]
) -> tuple[int, ...]:
    """The part of every source: its share rounded down, the rest by largest remainder.

    Args:
        shares: positive numbers that add up to 1.
        count: the number to divide.
        what: what is divided, for messages: "sample".
        where: the section, for messages.
        error: type of the error raised.

    Raises:
        QuantlabError: of type `error`: a source would give none.
    """
    exact = [share * count for share in shares]
    counts = [int(value + 1e-9) for value in exact]
    for index in sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])[: count - sum(counts)]:
        counts[index] += 1
    if 0 in counts:
        raise error(
            f"a share of the mixture gives no {what}",
            where=f"{where}[{counts.index(0)}].share",
            found=f"{shares[counts.index(0)]:g} of {count} {what}s",
            fix=f"use more `{what}s` or a larger share",
        )
    return tuple(counts)
