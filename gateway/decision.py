"""What was done for one request, and what did it cost? The one record afterwards.

A `Decision` is built once, at the end, from what the exchange knows. Log line, response headers, the answer of
`GET /v1/requests/{exchange_id}`, metrics and span are renderings of it; none of them computes anything of its own.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from gateway.wire import TokenUsage
from policies.cost import Cost, usd

Role = Literal["answer"]
AttemptOutcome = Literal["accepted", "doubted", "failed", "rejected", "full", "cancelled", "lost"]
"""`full`: its tier had no room, so it was never made. `lost`: the process died in the middle of it."""
EndingKind = Literal["answered", "broken", "abandoned", "exhausted", "lost"]
"""How the cascade ended. `lost`: it did not, its process died."""


class Payer(msgspec.Struct, frozen=True, kw_only=True):
    """Whose bill it is.

    `user` is the end user as named by the key, a header or the body, `user_digest` what limits know it by. `tags` and
    `metadata` are those of the key.
    """

    key: str
    team: str | None = None
    user: str | None = None
    user_digest: str | None = None
    tags: tuple[str, ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()


class Baseline(msgspec.Struct, frozen=True, kw_only=True):
    """What the dearest tier of the route alone would have cost: the tokens of the answer shown, at its price.

    That model might have said more, or less: nobody knows, so nothing is added for it.
    """

    tier: str
    cost_nusd: int


class AttemptRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One call to one backend. Times are seconds since the exchange began; None where it did not get so far.

    `waited_s` is how long it waited for room in the tier before it was started; one that found it full was never made.

    `fault` is the kind of what went wrong. `fault_detail` may name addresses and is for the operator alone.
    `model_version` is what the server said of itself with its answer; `price_version` names the price in the ledger.
    """

    number: int
    role: Role
    tier: str
    backend: str
    model: str
    outcome: AttemptOutcome
    fault: str | None
    fault_detail: str | None
    confidence: float | None
    doubt_below: float | None
    usage: TokenUsage
    cost: Cost
    started_s: float
    first_token_s: float | None
    ended_s: float
    waited_s: float = 0.0
    model_version: str | None = None
    price_version: str = ""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about one exchange, and never a word of prompt or answer.

    `ending` is that of the cascade; `served` the number of the attempt that the client was shown; `queued_s` is all the
    time spent waiting for a turn. A request that no backend was asked about has no Decision.
    """

    exchange_id: str
    request_id: str
    payer: Payer
    endpoint: str
    asked: str
    route: str
    streamed: bool
    ending: EndingKind
    error: str | None
    degraded: bool
    served: int | None
    confidence: float | None
    confidence_kind: Literal["raw"]
    attempts: tuple[AttemptRecord, ...]
    created_at: float
    queued_s: float = 0.0
    first_byte_s: float | None
    total_s: float
    config: str
    baseline: Baseline | None = None

    @property
    def key(self) -> str:
        """The name of the key that asked."""
        return self.payer.key

    @property
    def shown(self) -> AttemptRecord | None:
        """The attempt whose answer the client was shown."""
        return None if self.served is None else self.attempts[self.served - 1]

    @property
    def tier(self) -> str | None:
        """The tier that answered."""
        return None if self.shown is None else self.shown.tier

    @property
    def model(self) -> str | None:
        """The model that answered."""
        return None if self.shown is None else self.shown.model

    @property
    def cost_nusd(self) -> int:
        """What all attempts came to, in nano-dollars."""
        return sum(attempt.cost.total_nusd for attempt in self.attempts)

    @property
    def calls(self) -> int:
        """How many attempts were made: those that found their tier full were not."""
        return sum(attempt.outcome != "full" for attempt in self.attempts)

    @property
    def usage(self) -> TokenUsage:
        """Tokens of all attempts together."""
        if len(self.attempts) == 1:
            return self.attempts[0].usage
        return TokenUsage(
            prompt_tokens=sum(one.usage.prompt_tokens for one in self.attempts),
            cached_prompt_tokens=sum(one.usage.cached_prompt_tokens for one in self.attempts),
            completion_tokens=sum(one.usage.completion_tokens for one in self.attempts),
            reasoning_tokens=sum(one.usage.reasoning_tokens for one in self.attempts),
            counted=any(one.usage.counted for one in self.attempts),
        )


def as_json(decision: Decision) -> bytes:
    """Render for `GET /v1/requests/{exchange_id}`."""
    shown: dict[str, Any] = msgspec.to_builtins(decision)
    payer = shown.pop("payer")
    baseline = shown.pop("baseline")
    for attempt in shown["attempts"]:
        attempt["cost_usd"] = usd(sum(attempt.pop("cost").values()))
        del attempt["fault_detail"]
    return msgspec.json.encode(
        {
            "object": "tierway.decision",
            **shown,
            "key": decision.payer.key,
            "team": decision.payer.team,
            "user": decision.payer.user,
            "tags": payer["tags"],
            "metadata": dict(decision.payer.metadata),
            "tier": decision.tier,
            "model": decision.model,
            "usage": decision.usage,
            "cost_usd": usd(decision.cost_nusd),
            "baseline": baseline and {"tier": baseline["tier"], "cost_usd": usd(baseline["cost_nusd"])},
        }
    )


def summary(decision: Decision) -> bytes:
    """Render what a client that opted in is told at the end of a stream."""
    return msgspec.json.encode(
        {
            "exchange_id": decision.exchange_id,
            "tier": decision.tier,
            "model": decision.model,
            "attempts": decision.calls,
            "confidence": decision.confidence,
            "confidence_kind": decision.confidence_kind,
            "degraded": decision.degraded,
            "cost_usd": usd(decision.cost_nusd),
        }
    )


Header = tuple[bytes, bytes]


def answer_headers(
    *,
    tier: str | None,
    model: str | None,
    attempts: int,
    confidence: float | None,
    degraded: bool,
    cost_nusd: int,
    queued_s: float,
) -> list[Header]:
    """Render what a client is told in the head of an answer, or of an error after attempts."""
    headers = [
        (b"x-tierway-attempts", b"%d" % attempts),
        (b"x-tierway-cost-usd", usd(cost_nusd).encode()),
        (b"x-tierway-queue-ms", b"%d" % round(queued_s * 1000)),
    ]
    if tier is not None and model is not None:
        headers.append((b"x-tierway-tier", tier.encode()))
        headers.append((b"x-tierway-model", _header_value(model)))
    if confidence is not None:
        headers.append((b"x-tierway-confidence", b"%.4f" % confidence))
        headers.append((b"x-tierway-confidence-kind", b"raw"))
    if degraded:
        headers.append((b"x-tierway-degraded", b"true"))
    return headers


def _header_value(text: str) -> bytes:
    return text.encode("ascii", "replace").replace(b"\r", b"?").replace(b"\n", b"?")


class DecisionStore:
    """The last `size` Decisions of this process, for the keys that made them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: dict[str, Decision] = {}

    def put(self, decision: Decision) -> None:
        """Keep a Decision; the oldest goes when there are too many."""
        if self._size == 0:
            return
        self._kept[decision.exchange_id] = decision
        if len(self._kept) > self._size:
            del self._kept[next(iter(self._kept))]

    def get(self, exchange_id: str) -> Decision | None:
        """Return a Decision that is still kept."""
        return self._kept.get(exchange_id)
