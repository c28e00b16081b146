"""Does the ledger say what happened? Its rows held against what clients have in hand and what models have served.

What a client has in hand must be there exactly once, to the token and the nano-dollar. Of what nobody has in hand there
may be less only where a process died with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from tests.prove.ledger_site import Rows
from tests.prove.ledger_upstream import TIERS, Books, rate
from tests.prove.ledger_users import Asked
from tests.prove.limits_upstream import Metered, Served

_LARGEST_PROMPT = 1000
"""Without a report a prompt is taken for what prompts of that length were before, or for its bytes."""
_TOKENS = ("prompt_tokens", "cached_prompt_tokens", "completion_tokens", "reasoning_tokens")
_MONEY = ("input_nusd", "cached_input_nusd", "output_nusd", "gpu_nusd")


class Interruption(msgspec.Struct, frozen=True):
    """A time in which processes died: what was open then may be estimated, or not be there where it was young."""

    began_s: float
    ended_s: float


class Compared(msgspec.Struct, kw_only=True):
    """What was compared. `lost` are exchanges estimated after a death, `unknown` those that nothing is known of."""

    asked: int = 0
    complete: int = 0
    rows: int = 0
    attempts: int = 0
    cascades: int = 0
    lost: int = 0
    unknown: int = 0
    unknown_oldest_s: float = 0.0
    left: int = 0
    nusd: int = 0
    lost_tokens: int = 0
    lost_billed_tokens: int = 0
    endings: Counter[str] = msgspec.field(default_factory=Counter)


def compare(
    asked: Sequence[Asked],
    upstream: Metered,
    rows: Rows,
    interruptions: Sequence[Interruption] = (),
    *,
    young_s: float = 0.0,
) -> Compared:
    """Raise AssertionError where the ledger is wrong. `young_s` is how old an exchange may be of which nothing is known."""
    books = Books(list(upstream.served))
    by_request: dict[str, list[dict[str, Any]]] = {}
    for row in rows.exchanges:
        by_request.setdefault(row["request_id"], []).append(row)
    found = Compared(asked=len(asked), rows=len(rows.exchanges))
    assert rows.waiting == 0, f"{rows.waiting} rows are still in the spool"
    assert len({row["exchange_id"] for row in rows.exchanges}) == len(rows.exchanges)
    orphans = set(rows.attempts) - {row["exchange_id"] for row in rows.exchanges}
    assert not orphans, f"{len(orphans)} exchanges have attempts and no row, the first: {min(orphans)}"
    for one in asked:
        mine = by_request.pop(str(one.number), [])
        assert len(mine) <= 1, f"request {one.number} has {len(mine)} rows: {mine}"
        served = books.of(one.number)
        if not mine:
            _check_missing(one, served, interruptions, young_s, found)
            continue
        (row,) = mine
        attempts = rows.attempts.get(row["exchange_id"], [])
        _check_row(one, row, attempts, served, interruptions=interruptions, found=found)
        if one.complete and one.leaves == "never" and not interruptions:
            # This is written after the answer has left, so a death may take it along.
            assert rows.delivered.get(row["exchange_id"]) == 1, f"{row} was delivered, and the ledger does not say so"
    assert not by_request, f"rows of requests that nobody made: {list(by_request)[:5]}"
    return found


def figures_of(found: Compared) -> dict[str, float | str]:
    """Return what a proof tells of it."""
    return {
        "requests": found.asked,
        "answers received completely": found.complete,
        "of these without a row, or with two": 0,
        "of these with other tokens or another cost than the models'": 0,
        "exchanges in the ledger": found.rows,
        "attempts": found.attempts,
        "exchanges with several attempts": found.cascades,
        "clients that left": found.left,
        "estimated, as their process died": found.lost,
        "of these: tokens that the models had made": found.lost_tokens,
        "of these tokens billed": found.lost_billed_tokens,
        "not known, as they were young when it died": found.unknown,
        "age of the oldest of these, s": round(found.unknown_oldest_s, 2),
    }


def _check_missing(
    one: Asked, served: dict[str, Served], interruptions: Sequence[Interruption], young_s: float, found: Compared
) -> None:
    """See that there is a reason why the ledger knows nothing of a request."""
    ended_s = one.began_s if one.ended_s is None else one.ended_s
    what = (
        f"request {one.number} ({one.answer.status}, {one.answer.ending}, {one.leaves}, {ended_s - one.began_s:.2f} s)"
    )
    assert not one.complete, f"{what} was answered completely, and the ledger does not know it: {one.answer.headers}"
    if not served:
        return  # refused, or nobody was there: no model was asked
    cut = _cut_by(one, served, interruptions)
    near = sorted(interruptions, key=lambda died: abs(died.began_s - one.began_s))[:2]
    assert cut is not None, (
        f"{what} was served by {served}, nothing died, and the ledger does not know it: began {one.began_s}, deaths {near}"
    )
    age_s = max(0.0, cut.ended_s - min(call.began_s for call in served.values()))
    found.unknown += 1
    found.unknown_oldest_s = max(found.unknown_oldest_s, age_s)
    assert age_s <= young_s, f"{what} was {age_s:.2f} s old when its process died, and the ledger does not know it"


def _cut_by(one: Asked, served: dict[str, Served], interruptions: Sequence[Interruption]) -> Interruption | None:
    """Return what interrupted a request that nobody has the answer of: it was open, or had just been left.

    It began when its client says so: a busy model may note a call after its caller has died.
    """
    ended_s = max(one.ended_s or 0.0, *(call.ended_s or 0.0 for call in served.values()), one.began_s) + 1.0
    return next((cut for cut in interruptions if cut.ended_s >= one.began_s and cut.began_s <= ended_s), None)


def _check_row(
    one: Asked,
    row: dict[str, Any],
    attempts: list[dict[str, Any]],
    served: dict[str, Served],
    *,
    interruptions: Sequence[Interruption],
    found: Compared,
) -> None:
    what = f"request {one.number}: {row}\n{attempts}\n{served}\n{one.order} {one.answer.status} {one.leaves}"
    named = one.answer.headers.get("x-tierway-exchange-id")
    assert named in (None, row["exchange_id"]), what
    assert row["key_name"] == one.key, what
    assert row["streamed"] == one.stream, what
    assert row["asked"] == one.model, what
    # The sum of the attempts, each rated by the rule.
    for name in (*_TOKENS, *_MONEY):
        assert row[name] == sum(attempt[name] for attempt in attempts), f"{name} is not the sum of the attempts: {what}"
    assert [attempt["number"] for attempt in attempts] == list(range(1, len(attempts) + 1)), what
    for attempt in attempts:
        _check_money(attempt, what)
    calls = [attempt for attempt in attempts if attempt["outcome"] != "full"]
    found.attempts += len(calls)
    found.cascades += len(calls) > 1
    found.nusd += sum(row[name] for name in _MONEY)
    found.endings[row["outcome"]] += 1
    found.left += row["outcome"] == "abandoned"
    if row["outcome"] == "lost":
        assert row["estimated"] == 1, what
        assert not one.complete, f"a complete answer is called lost: {what}"
        assert _cut_by(one, served, interruptions) is not None, f"nothing died: {what}"
        found.lost += 1
        found.lost_tokens += sum(call.tokens for call in served.values())
        found.lost_billed_tokens += row["completion_tokens"]
    else:
        assert row["estimated"] == 0, what
        missed = set(served) - {attempt["model"] for attempt in calls}
        assert not missed, f"what {missed} served is not billed: {what}"
    for attempt in calls:
        _check_tokens(one, row, attempt, served.get(attempt["model"]), what)
    if one.complete:
        found.complete += 1
        _check_complete(one, row, calls, served, what)


def _check_money(attempt: dict[str, Any], what: str) -> None:
    cost = rate(
        attempt["model"],
        prompt_tokens=attempt["prompt_tokens"],
        cached_tokens=attempt["cached_prompt_tokens"],
        completion_tokens=attempt["completion_tokens"],
    )
    rated = (attempt["input_nusd"], attempt["cached_input_nusd"], attempt["output_nusd"])
    assert rated == cost, f"{rated} in place of {cost}: {what}"
    assert attempt["gpu_nusd"] == 0, what


def _check_tokens(one: Asked, row: dict[str, Any], attempt: dict[str, Any], call: Served | None, what: str) -> None:
    """See that no attempt is billed for more than was served, and one that came to its end for exactly that."""
    if call is None:
        # It never reached the model, as far as that knows: a client left at once, or a connection broke.
        assert attempt["completion_tokens"] == 0, f"nobody made these tokens: {what}"
        return
    assert attempt["completion_tokens"] <= call.tokens + one.choices, f"more than was generated: {what}"
    assert attempt["prompt_tokens"] <= max(call.prompt_tokens, _LARGEST_PROMPT), what
    if call.whole and row["outcome"] != "lost" and attempt["outcome"] == "doubted" and not one.stream:
        # A whole answer can be doubted only when it is there.
        _check_exact(one, attempt, call, what)


def _check_exact(one: Asked, attempt: dict[str, Any], call: Served, what: str) -> None:
    billed = attempt["prompt_tokens"], attempt["cached_prompt_tokens"], attempt["completion_tokens"]
    reported = call.prompt_tokens, one.order.cached_tokens, call.tokens
    assert billed == reported, f"{billed} in place of {reported}: {what}"
    assert attempt["counted"] == 0, f"what was reported was counted: {what}"


def _check_complete(
    one: Asked, row: dict[str, Any], calls: list[dict[str, Any]], served: dict[str, Served], what: str
) -> None:
    """See that the bill of an answer that a client has is that of the models, and every attempt is on it."""
    assert row["outcome"] in ("answered", "abandoned"), what
    assert one.leaves != "never" or row["outcome"] == "answered", what
    assert {attempt["model"] for attempt in calls} == set(served), f"the attempts are not the calls: {what}"
    tier = one.answer.headers["x-tierway-tier"]
    assert row["tier"] == tier, what
    (shown,) = (attempt for attempt in calls if attempt["model"] == TIERS[tier])
    call = served[shown["model"]]
    assert call.whole, f"no model gave that answer: {what}"
    _check_exact(one, shown, call, what)
    assert shown["outcome"] == "accepted" or row["degraded"], what
    others = sum(attempt[name] for attempt in calls if attempt is not shown for name in _MONEY)
    assert row["wasted_nusd"] == others, what
    if row["baseline_tier"] is not None:
        baseline = rate(
            TIERS[row["baseline_tier"]],
            prompt_tokens=shown["prompt_tokens"],
            cached_tokens=shown["cached_prompt_tokens"],
            completion_tokens=shown["completion_tokens"],
        )
        assert row["baseline_nusd"] == sum(baseline), what
