"""Has a budget passed a part of itself that somebody wants to hear of? Amounts in, a part out."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from policies.accounts import Budget, Rolling, Rule

_MILLION = 1_000_000


class Window(msgspec.Struct, frozen=True):
    """The time in which a part is passed once. In ms since the epoch; a budget that never begins anew has no end."""

    start_ms: int
    end_ms: int | None


def window_of(rule: Rule, now_ms: int) -> Window:
    """Return the window around a moment.

    A rolling sum has none of its own: it counts as one window for as long as its period, from a multiple of that, so
    a part that stays passed is told once a period.
    """
    if isinstance(rule, Budget):
        begun = [start for start in rule.starts_ms if start <= now_ms]
        coming = [start for start in rule.starts_ms if start > now_ms]
        return Window(begun[-1] if begun else 0, coming[0] if coming else None)
    if isinstance(rule, Rolling):
        start_ms = now_ms - now_ms % rule.period_ms
        return Window(start_ms, start_ms + rule.period_ms)
    return Window(0, None)


def amount_at(part: float, limit: int) -> int:
    """Return the least amount that is this part of a limit, by millionths of it. Of a limit of 0 that is 1."""
    return max(1, -(-limit * round(part * _MILLION) // _MILLION))


def passed(parts: Iterable[float], limit: int, used: int) -> float | None:
    """Return the largest part that has been passed; None of none. Who hears of 80 % need not hear of 50 %."""
    return max((part for part in parts if used >= amount_at(part, limit)), default=None)


def next_amount(parts: Iterable[float], limit: int, used: int) -> int | None:
    """Return the amount at which the next part is passed; None where there is no other."""
    return min((amount for part in parts if (amount := amount_at(part, limit)) > used), default=None)
