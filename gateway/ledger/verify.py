"""Is the ledger in order? Every row accounted for, every sum that of its parts, every cost what its price makes of it.

The databases look through their own rows, a table after the other; only what is wrong is kept here, and of that a few
examples, so a ledger of any size is looked through in little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import msgspec

from gateway.ledger.contract import Reading, Value
from policies.cost import Cost, Price, cost_of

_EXAMPLES = 10
_HOUR_MS = 3_600_000
_WRITTEN_WITHIN_MS = 10 * 60_000

_TOKENS = ("prompt_tokens", "cached_prompt_tokens", "completion_tokens", "reasoning_tokens")
_MONEY = ("input_nusd", "cached_input_nusd", "output_nusd", "gpu_nusd")
_SUMMED = _TOKENS + _MONEY


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at: how many rows, how many of them are wrong, and some of those."""

    check: str
    looked_at: int
    wrong: int
    examples: tuple[str, ...] = ()
    note: str = ""


def verify(reading: Reading, *, now_ms: int, lease_ms: int) -> Iterator[Finding]:
    """Look through a ledger, one finding for each check, good or bad. Raises `LedgerDown` where it cannot be read."""
    checks: Mapping[str, Callable[[], Iterator[str | None]]] = {
        "every attempt belongs to an exchange": lambda: _without_exchange(reading, "attempts", "number"),
        "every exchange has its attempts, and is their sum": lambda: _sums(reading),
        "every cost is that of its tokens at their price": lambda: _ratings(reading),
        "no exchange of a dead process is left open": lambda: _left_open(reading, now_ms, lease_ms),
        "every closed hour is shared out to the nano-dollar": lambda: _hours(reading),
        "what a closed hour changed is all there": lambda: _changes(reading, now_ms),
        "every adjustment belongs to an attempt and a closed hour": lambda: _adjustments(reading),
        "every delivery belongs to an exchange": lambda: _without_exchange(reading, "deliveries", "delivered"),
        "every input of a decision belongs to an exchange": lambda: _without_exchange(
            reading, "decision_inputs", "feature_version"
        ),
    }
    for name, check in checks.items():
        yield found(name, check())


def found(name: str, results: Iterator[str | None]) -> Finding:
    """Count what was looked at (None: it is right), and keep a few of what is wrong."""
    looked_at = wrong = 0
    examples: list[str] = []
    for result in results:
        looked_at += 1
        if result is not None:
            wrong += 1
            if len(examples) < _EXAMPLES:
                examples.append(result)
    return Finding(check=name, looked_at=looked_at, wrong=wrong, examples=tuple(examples))


def _without_exchange(reading: Reading, table: str, column: str) -> Iterator[str | None]:
    query = (
        f"SELECT t.exchange_id, t.{column}, e.exchange_id FROM {table} t "  # noqa: S608 - names of ours
        "LEFT JOIN exchanges e ON e.exchange_id = t.exchange_id"
    )
    for id_, value, exchange in reading.rows(query):
        yield f"{id_!s}: {column} {value!s} in {table}, and no exchange" if exchange is None else None


def _sums(reading: Reading) -> Iterator[str | None]:
    """Compare every exchange with its attempts, as both databases can do it: grouped by the key of the exchange."""
    cost = "a.input_nusd + a.cached_input_nusd + a.output_nusd + a.gpu_nusd"
    sums = ", ".join(f"CAST(COALESCE(SUM(a.{one}), 0) AS BIGINT)" for one in _SUMMED)
    query = (
        f"SELECT e.exchange_id, e.calls, e.served, e.wasted_nusd, {', '.join(f'e.{one}' for one in _SUMMED)}, "  # noqa: S608
        "COUNT(a.number), MIN(a.number), MAX(a.number), "
        "CAST(COALESCE(SUM(CASE WHEN a.outcome <> 'full' THEN 1 ELSE 0 END), 0) AS BIGINT), "
        f"CAST(COALESCE(SUM(CASE WHEN a.number = e.served THEN 0 ELSE {cost} END), 0) AS BIGINT), {sums} "
        "FROM exchanges e LEFT JOIN attempts a ON a.exchange_id = e.exchange_id "
        "GROUP BY e.exchange_id"
    )
    of_exchange, of_attempts = 4 + len(_SUMMED), 9 + len(_SUMMED)
    for row in reading.rows(query):
        id_, calls, served, wasted = row[:4]
        count, first, last, made, not_shown = row[of_exchange:of_attempts]
        # A call that found its tier full has a number too; in an exchange without any call there may be nothing else.
        if count and (first != 1 or last != count):
            yield f"{id_!s}: {count!s} attempts, numbered {first!s} to {last!s}"
        elif made != calls:
            # Its attempts were not written with it, or it was not written with all of them.
            yield f"{id_!s}: {calls!s} calls, and attempts of {made!s}"
        elif row[4:of_exchange] != row[of_attempts:]:
            yield f"{id_!s}: {_differences(row[4:of_exchange], row[of_attempts:])}"
        elif not_shown != wasted:
            yield f"{id_!s}: wasted_nusd is {wasted!s}, all attempts but {served!s} cost {not_shown!s}"
        else:
            yield None


def _differences(exchange: tuple[Value, ...], attempts: tuple[Value, ...]) -> str:
    unequal = (
        f"{name} is {mine!s}, that of its attempts {its!s}"
        for name, mine, its in zip(_SUMMED, exchange, attempts, strict=True)
        if mine != its
    )
    return "; ".join(unequal)


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int


def _ratings(reading: Reading) -> Iterator[str | None]:
    prices = dict(_prices(reading))
    query = (
        f"SELECT exchange_id, number, price_version, prompt_tokens, cached_prompt_tokens, completion_tokens, "  # noqa: S608
        f"{', '.join(_MONEY)} FROM attempts"
    )
    for id_, number, version, prompt, cached, completion, *money in reading.rows(query):
        price = prices.get(str(version))
        if price is None:
            # What never reached a server has no price.
            yield None if not any(money) else f"{id_!s}/{number!s}: its price {version!s} is not known"
            continue
        usage = _Usage(_int(prompt), _int(cached), _int(completion))
        cost = cost_of(price, usage)
        if list(_parts(cost)) != money:
            said = ", ".join(f"{name} {value!s}" for name, value in zip(_MONEY, money, strict=True))
            due = ", ".join(f"{name} {value}" for name, value in zip(_MONEY, _parts(cost), strict=True))
            yield f"{id_!s}/{number!s}: {said}; at {version!s} its tokens cost {due}"
        else:
            yield None


def _parts(cost: Cost) -> tuple[int, int, int, int]:
    return cost.input_nusd, cost.cached_input_nusd, cost.output_nusd, cost.gpu_nusd


def _prices(reading: Reading) -> Iterator[tuple[str, Price]]:
    query = "SELECT version, input_nusd, cached_input_nusd, output_nusd, kind FROM prices"
    for version, input_nusd, cached_input_nusd, output_nusd, kind in reading.rows(query):
        yield (
            str(version),
            Price(
                input_nusd=_int(input_nusd),
                cached_input_nusd=_int(cached_input_nusd),
                output_nusd=_int(output_nusd),
                version=str(version),
                gpu=kind == "gpu",
            ),
        )


def _left_open(reading: Reading, now_ms: int, lease_ms: int) -> Iterator[str | None]:
    # Whoever lives looks for what the dead left open twice a lease.
    dead_ms = now_ms - 3 * lease_ms
    query = (
        "SELECT o.exchange_id, o.instance, o.seen_ms, i.heard_ms FROM open_exchanges o "
        "LEFT JOIN instances i ON i.instance = o.instance"
    )
    for id_, instance, seen_ms, heard_ms in reading.rows(query):
        last_ms = max(_int(seen_ms), 0 if heard_ms is None else _int(heard_ms))
        yield f"{id_!s}: of {instance!s}, last heard of {_ago(now_ms - last_ms)} ago" if last_ms < dead_ms else None


def _hours(reading: Reading) -> Iterator[str | None]:
    query = "SELECT backend, hour, revision, hour_nusd, shares_nusd, idle_nusd, outside_nusd FROM closings"
    for backend, hour, revision, whole, *parts in reading.rows(query):
        total = sum(map(_int, parts))
        wrong = total != whole or min(map(_int, parts)) < 0
        yield f"{backend!s}, hour {hour!s}, revision {revision!s}: {total} of {whole!s}" if wrong else None


def _changes(reading: Reading, now_ms: int) -> Iterator[str | None]:
    """Compare the changes of every closed hour with what its last revision says, unless they are being written."""
    query = (
        "SELECT c.backend, c.hour, c.at_ms, c.shares_nusd - c.provisional_nusd, (SELECT "
        "CAST(COALESCE(SUM(j.change_nusd), 0) AS BIGINT) FROM adjustments j WHERE j.backend = c.backend "
        "AND j.hour = c.hour) FROM closings c WHERE c.revision = (SELECT MAX(l.revision) FROM closings l "
        "WHERE l.backend = c.backend AND l.hour = c.hour)"
    )
    for backend, hour, at_ms, due, told in reading.rows(query):
        late = now_ms - _int(at_ms) > _WRITTEN_WITHIN_MS
        yield f"{backend!s}, hour {hour!s}: changes of {told!s}, {due!s} are due" if told != due and late else None


def _adjustments(reading: Reading) -> Iterator[str | None]:
    query = (
        "SELECT j.exchange_id, j.number, j.backend, j.hour, j.revision, a.number, c.revision FROM adjustments j "
        "LEFT JOIN attempts a ON a.exchange_id = j.exchange_id AND a.number = j.number "
        "LEFT JOIN closings c ON c.backend = j.backend AND c.hour = j.hour AND c.revision = j.revision"
    )
    for id_, number, backend, hour, revision, attempt, closing in reading.rows(query):
        if attempt is None:
            yield f"{id_!s}/{number!s}: an adjustment of {backend!s}, hour {hour!s}, and no attempt"
        elif closing is None:
            yield f"{id_!s}/{number!s}: an adjustment of {backend!s}, hour {hour!s}, and no closing {revision!s}"
        else:
            yield None


def _ago(passed_ms: int) -> str:
    hours, rest = divmod(passed_ms, _HOUR_MS)
    return f"{hours} h {rest // 60_000} min" if hours else f"{passed_ms // 1000} s"


def _int(value: Value) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number")
    return value
