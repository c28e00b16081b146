"""How does a ledger of a million requests come about? Rows of a made-up month: seeded, so that every run has the same.

`python -m tests.gateway.ledger.many_rows FILE N` writes them into a new file of SQLite, for the benchmark of reports.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from gateway.ledger.contract import Store
from gateway.ledger.rows import AdjustmentRow, AnyRow, AttemptRow, ClosingRow, ExchangeRow, PriceRow, RefusalRow
from gateway.ledger.sqlite import SqliteStore
from policies.cost import Cost, Price, cost_of

BEGIN_MS = 1_761_955_200_000
"""2025-11-01, midnight UTC."""
DAYS = 30
HOUR_MS = 3_600_000
_PRICES = {
    "small": Price(
        input_nusd=50_000_000, cached_input_nusd=25_000_000, output_nusd=150_000_000, gpu=True, version="s1"
    ),
    "medium": Price(input_nusd=400_000_000, cached_input_nusd=400_000_000, output_nusd=900_000_000, version="m1"),
    "large": Price(input_nusd=2_500_000_000, cached_input_nusd=1_250_000_000, output_nusd=9_999_999_999, version="l1"),
}
_TIERS = tuple(_PRICES)
_BACKENDS = {"small": ("gpu-1", "gpu-2"), "medium": ("medium-1",), "large": ("hosted",)}
_ROUTES = {"auto": ("small", "medium", "large"), "fast": ("small", "medium"), "deep": ("large",)}


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int


class _Key(msgspec.Struct, frozen=True):
    name: str
    team: str | None
    tags: str
    users: tuple[str, ...]


class ManyRows:
    """`n` exchanges over a month: days busier than nights, few keys that ask much, a cascade that doubts a fifth."""

    def __init__(self, n: int, *, seed: int = 4, keys: int = 120, days: int = DAYS) -> None:
        self._random = random.Random(seed)
        self._n = n
        self._hours = days * 24
        self._keys = tuple(self._key(number) for number in range(keys))

    def _key(self, number: int) -> _Key:
        tags = self._random.sample(("batch", "chat", "eval", "search"), number % 3)
        return _Key(
            name=f"key-{number:03d}",
            team=None if number % 20 == 19 else f"team-{number % 17:02d}",
            tags=msgspec.json.encode(tags).decode(),
            users=tuple(f"user-{number}-{one}" for one in range(number % 4 * 25)),
        )

    def exchanges(self) -> Iterator[tuple[ExchangeRow, tuple[AttemptRow, ...]]]:
        """Yield every exchange with its attempts, in order of time."""
        rng = self._random
        weights = [
            (1.2 + math.sin((hour % 24 - 8) / 24 * 2 * math.pi)) * (0.4 if hour // 24 % 7 in (0, 1) else 1.0)
            for hour in range(self._hours)
        ]
        busy = [1 / (rank + 3) for rank in range(len(self._keys))]
        hours = rng.choices(range(self._hours), weights, k=self._n)
        moments = sorted(BEGIN_MS + hour * HOUR_MS + rng.randrange(HOUR_MS) for hour in hours)
        for at_ms, key in zip(moments, rng.choices(self._keys, busy, k=self._n), strict=True):
            yield self._exchange(at_ms, key)

    def _exchange(self, at_ms: int, key: _Key) -> tuple[ExchangeRow, tuple[AttemptRow, ...]]:
        rng = self._random
        exchange_id = f"tw{rng.randrange(4):02d}-{at_ms:012x}{rng.getrandbits(80):020x}"
        route = rng.choices(("auto", "fast", "deep"), (8, 2, 1))[0]
        prompt = min(int(rng.lognormvariate(6, 1)), 30_000)
        luck = rng.random()
        outcome = "answered" if luck < 0.97 else "abandoned" if luck < 0.99 else "exhausted" if luck < 0.999 else "lost"
        attempts: list[AttemptRow] = []
        started_ms = at_ms + rng.randrange(5)
        for number, tier in enumerate(_ROUTES[route], 1):
            top = tier == _ROUTES[route][-1]
            doubted = not top and rng.random() < 0.2
            ended = "doubted" if doubted else {"answered": "accepted", "exhausted": "failed"}.get(outcome, "cancelled")
            attempts.append(
                self._attempt(
                    exchange_id, number, tier, started_ms, prompt=prompt, outcome=ended, lost=outcome == "lost"
                )
            )
            started_ms = attempts[-1].ended_ms
            if not doubted:
                break
        return self._sum(exchange_id, at_ms, key, route=route, outcome=outcome, attempts=attempts), tuple(attempts)

    def _attempt(
        self, exchange_id: str, number: int, tier: str, started_ms: int, *, prompt: int, outcome: str, lost: bool
    ) -> AttemptRow:
        rng = self._random
        completion = 16 if outcome == "doubted" else 0 if outcome == "failed" else int(rng.lognormvariate(5, 1))
        usage = _Usage(prompt, rng.choice((0, 0, prompt // 2)), completion)
        price = _PRICES[tier]
        cost = cost_of(price, usage)
        return AttemptRow(
            exchange_id=exchange_id,
            number=number,
            role="answer",
            tier=tier,
            backend=rng.choice(_BACKENDS[tier]),
            model=f"{tier}-instruct",
            model_version=None,
            outcome=outcome,
            fault="broken" if outcome == "failed" else None,
            estimated=int(lost),
            prompt_tokens=prompt,
            cached_prompt_tokens=usage.cached_prompt_tokens,
            completion_tokens=completion,
            reasoning_tokens=completion // 3 if tier == "large" else 0,
            counted=int(lost),
            price_version=price.version,
            input_nusd=cost.input_nusd,
            cached_input_nusd=cost.cached_input_nusd,
            output_nusd=cost.output_nusd,
            gpu_nusd=cost.gpu_nusd,
            started_ms=started_ms,
            waited_us=0,
            first_token_us=None if outcome == "failed" else 30_000 + rng.randrange(90_000),
            ended_ms=started_ms + 40 + completion * 8,
            confidence=0.3 if outcome == "doubted" else 0.9,
            doubt_below=0.5,
        )

    def _sum(
        self, exchange_id: str, at_ms: int, key: _Key, *, route: str, outcome: str, attempts: list[AttemptRow]
    ) -> ExchangeRow:
        shown = attempts[-1] if outcome in ("answered", "abandoned", "lost") else None
        baseline = _PRICES[_ROUTES[route][-1]]
        user = self._random.choice(key.users) if key.users else None
        return ExchangeRow(
            exchange_id=exchange_id,
            at_ms=at_ms,
            settled_ms=attempts[-1].ended_ms,
            key_name=key.name,
            team=key.team,
            user_name=user,
            user_digest=None if user is None else f"{hash_of(user):032x}",
            tags=key.tags,
            metadata='{"cost-centre":"4711"}',
            asked=route,
            route=route,
            endpoint="chat/completions",
            streamed=1,
            tier=None if shown is None else shown.tier,
            backend=None if shown is None else shown.backend,
            model=None if shown is None else shown.model,
            model_version=None,
            outcome=outcome,  # type: ignore[arg-type]  # one of the words
            error="upstream_error" if outcome == "exhausted" else None,
            degraded=0,
            calls=len(attempts),
            served=None if shown is None else shown.number,
            estimated=int(outcome == "lost"),
            prompt_tokens=sum(one.prompt_tokens for one in attempts),
            cached_prompt_tokens=sum(one.cached_prompt_tokens for one in attempts),
            completion_tokens=sum(one.completion_tokens for one in attempts),
            reasoning_tokens=sum(one.reasoning_tokens for one in attempts),
            counted=int(any(one.counted for one in attempts)),
            input_nusd=sum(one.input_nusd for one in attempts),
            cached_input_nusd=sum(one.cached_input_nusd for one in attempts),
            output_nusd=sum(one.output_nusd for one in attempts),
            gpu_nusd=sum(one.gpu_nusd for one in attempts),
            wasted_nusd=sum(paid(one) for one in attempts if one is not shown),
            baseline_nusd=0 if shown is None else cost_of(baseline, shown).total_nusd,
            baseline_tier=None if shown is None else _ROUTES[route][-1],
            queued_us=0,
            first_token_us=None if shown is None else shown.first_token_us,
            decided_us=(attempts[-1].ended_ms - at_ms) * 1000,
            confidence=attempts[-1].confidence,
            confidence_kind="raw",
            config="c0ffee000000",
            request_id=exchange_id,
            instance="bench-1",
        )

    def rows(self) -> Iterator[AnyRow]:
        """Yield the rows of all tables; the hours of GPU servers are closed but for the last two."""
        work: dict[tuple[str, int], list[tuple[ExchangeRow, AttemptRow]]] = {}
        open_from = BEGIN_MS // HOUR_MS + self._hours - 2
        yield from (_price(tier, price) for tier, price in _PRICES.items())
        for exchange, attempts in self.exchanges():
            yield exchange
            yield from attempts
            for one in attempts:
                hour = one.ended_ms // HOUR_MS
                if one.gpu_nusd and hour < open_from:
                    work.setdefault((one.backend, hour), []).append((exchange, one))
        for (backend, hour), shares in sorted(work.items()):
            yield from _closed(backend, hour, shares)
        for hour in range(self._hours):
            yield RefusalRow(
                hour=BEGIN_MS // HOUR_MS + hour,
                instance="bench-1",
                key_name=self._random.choice(self._keys).name,
                code="rate_limit_exceeded",
                requests=1 + hour % 7,
            )


def _closed(backend: str, hour: int, pairs: list[tuple[ExchangeRow, AttemptRow]]) -> Iterator[AnyRow]:
    """Close an hour: everybody pays nine tenths of the provisional price, and a third of the hour is idle."""
    provisional_nusd = sum(one.gpu_nusd for _, one in pairs)
    shares_nusd = provisional_nusd - sum(one.gpu_nusd // 10 for _, one in pairs)
    yield ClosingRow(
        backend=backend,
        hour=hour,
        revision=1,
        tier="small",
        at_ms=(hour + 1) * HOUR_MS + 60_000,
        hour_nusd=shares_nusd + shares_nusd // 2 + 1000,
        shares_nusd=shares_nusd,
        idle_nusd=shares_nusd // 2,
        outside_nusd=1000,
        busy_ms=2_400_000,
        attempts=len(pairs),
        price_version="s1",
        instance="bench-1",
        provisional_nusd=provisional_nusd,
        decode_weight=8,
        made_from="tokens",
    )
    for exchange, one in pairs:
        change_nusd = -(one.gpu_nusd // 10)
        yield AdjustmentRow(
            exchange_id=one.exchange_id,
            number=one.number,
            hour=hour,
            revision=1,
            backend=backend,
            share_nusd=one.gpu_nusd + change_nusd,
            change_nusd=change_nusd,
            at_ms=exchange.at_ms,
            key_name=exchange.key_name,
            team=exchange.team,
            route=exchange.route,
            tier=one.tier,
            shown=int(one.number == exchange.served),
        )


def _price(tier: str, price: Price) -> PriceRow:
    return PriceRow(
        version=price.version,
        at_ms=BEGIN_MS,
        tier=tier,
        backend=_BACKENDS[tier][0],
        kind="gpu" if price.gpu else "tokens",
        input_nusd=price.input_nusd,
        cached_input_nusd=price.cached_input_nusd,
        output_nusd=price.output_nusd,
        hour_nusd=2_990_000_000 if price.gpu else None,
    )


def paid(row: AttemptRow | ExchangeRow) -> int:
    """What a row comes to, provisionally where it is of a GPU."""
    return Cost(
        input_nusd=row.input_nusd,
        cached_input_nusd=row.cached_input_nusd,
        output_nusd=row.output_nusd,
        gpu_nusd=row.gpu_nusd,
    ).total_nusd


def hash_of(text: str) -> int:
    """A number of a text that is the same in every run."""
    return int.from_bytes(text.encode()[:16].ljust(16, b"\0"), "big")


def fill(store: Store, n: int, *, seed: int = 4, keys: int = 120, days: int = DAYS) -> None:
    """Write `n` exchanges and what belongs to them into a store."""
    rows = ManyRows(n, seed=seed, keys=keys, days=days).rows()
    while batch := tuple(itertools.islice(rows, 20_000)):
        store.write(batch)


if __name__ == "__main__":
    new = SqliteStore(Path(sys.argv[1]))
    new.open()
    fill(new, int(sys.argv[2]))
    new.close()
