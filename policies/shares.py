"""How much of a limit may one replica give out by itself? Shares that together are never more than the whole.

A share follows from how many replicas there are and which of them this one is, its rank. Where it does not know its
rank it takes the smallest share. The sum of the shares of all ranks is the whole, or less.
"""

from __future__ import annotations

from policies.accounts import Budget, Concurrency, Rate, Rolling, Rule

_FINE = 1000
_HOUR_MS = 3_600_000


def share_of(rule: Rule, *, count: int, rank: int | None = None, used: int = 0) -> Rule | None:
    """Return the share of replica `rank` (0 to `count` - 1; None: unknown) of `rule`; None where nothing passes.

    `used` is what all replicas together had used of a `Budget` or `Rolling` when that was last seen: what is shared is
    what was left. Of the other rules nothing is ever used up.
    """
    match rule:
        case Concurrency(limit):
            part = _part(limit, count, rank)
            return Concurrency(part) if part else None
        case Budget(limit, starts_ms):
            part = _part(limit - used, count, rank)
            return Budget(part, starts_ms) if part else None
        case Rolling(limit, period_ms):
            part = _part(limit - used, count, rank)
            return Rolling(part, period_ms) if part else None
        case Rate():
            return _rate(rule, count, rank)


def still_used(rule: Rule, used: int, at_ms: int, now_ms: int) -> int:
    """Return how much of what was `used` at `at_ms` counts now, at most, if nothing was used since."""
    match rule:
        case Rate(limit, period_ms):
            return max(0, used - limit * max(0, now_ms - at_ms) // period_ms)
        case Budget(_, starts_ms):
            return 0 if any(at_ms < start_ms <= now_ms for start_ms in starts_ms) else used
        case Rolling():
            return 0 if now_ms - at_ms > rule.period_ms + rule.slot_ms else used
        case Concurrency():
            return 0


def begun_with(rule: Rule, used: int, *, count: int) -> int:
    """Return how much of its share a replica has to take for used up already: of a `Rate`, which is shared whole."""
    return -(-used // count) if isinstance(rule, Rate) else 0


def _rate(rule: Rate, count: int, rank: int | None) -> Rate | None:
    """Split how much passes at once, and slow down by `count` how fast that fills up again."""
    if count == 1:
        return rule
    burst = _part(rule.burst, count, rank)
    if not burst:
        return None
    if rule.limit >= _FINE * count:
        # Its units are fine enough; a longer period would leave the integers that doubles can hold.
        return Rate(_part(rule.limit, count, rank), rule.period_ms, burst)
    period_ms = rule.period_ms * count
    if period_ms > _HOUR_MS:
        # Such periods are counted in whole seconds.
        period_ms = -(-period_ms // 1000) * 1000
    return Rate(rule.limit, period_ms, burst)


def _part(whole: int, count: int, rank: int | None) -> int:
    """Return one of `count` parts of `whole` that differ by one at most; the larger ones come first."""
    floor, rest = divmod(max(0, whole), count)
    return floor + (rank is not None and rank < rest)
