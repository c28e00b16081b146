"""Does the comparison of a ledger with what happened find what is wrong with it?"""

from __future__ import annotations

from typing import Any

import pytest

from tests.prove.clients import Answer
from tests.prove.ledger_check import Interruption, compare
from tests.prove.ledger_site import Rows
from tests.prove.ledger_upstream import LARGE, SMALL, Order, rate
from tests.prove.ledger_users import Asked
from tests.prove.limits_upstream import Metered, Plan, Served

_DIED = (Interruption(11.0, 11.2),)


def asked(*, complete: bool = True) -> Asked:
    answer = Answer(status=200, headers={"x-tierway-exchange-id": "tw00-1", "x-tierway-tier": "large"}, whole=complete)
    return Asked(
        number=7,
        key="ann",
        order=Order(plan=Plan(tag="asked", number=7), cached_tokens=3),
        model="auto",
        stream=False,
        choices=1,
        leaves="never",
        after=0.0,
        reset=False,
        began_s=10.0,
        ended_s=11.0,
        answer=answer,
    )


def upstream() -> Metered:
    """The small model was doubted, the large one has answered."""
    found = Metered([SMALL, LARGE], tells=False)
    for model in (SMALL, LARGE):
        call = Served(tag="asked", number=7, model=model, prompt_tokens=37, began_s=10.1, tokens=9, whole=True)
        call.ended_s = 10.9
        found.served.append(call)
    return found


def attempt(number: int, model: str, outcome: str, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"number": number, "model": model, "outcome": outcome, "counted": 0, "gpu_nusd": 0}
    row |= {"prompt_tokens": 37, "cached_prompt_tokens": 3, "completion_tokens": 9, "reasoning_tokens": 0}
    cost = rate(model, prompt_tokens=37, cached_tokens=3, completion_tokens=9)
    return row | cost._asdict() | changes


def ledger(attempts: list[dict[str, Any]] | None = None, **changes: Any) -> Rows:
    """A ledger that is right, but for the changes."""
    if attempts is None:
        attempts = [attempt(1, SMALL, "doubted"), attempt(2, LARGE, "accepted")]
    row: dict[str, Any] = {
        "exchange_id": "tw00-1",
        "request_id": "7",
        "key_name": "ann",
        "streamed": 0,
        "asked": "auto",
    }
    row |= {"outcome": "answered", "estimated": 0, "degraded": 0, "tier": "large", "baseline_tier": "large"}
    for name in ("prompt_tokens", "cached_prompt_tokens", "completion_tokens", "reasoning_tokens"):
        row[name] = sum(one[name] for one in attempts)
    for name in ("input_nusd", "cached_input_nusd", "output_nusd", "gpu_nusd"):
        row[name] = sum(one[name] for one in attempts)
    row["wasted_nusd"] = sum(rate(SMALL, prompt_tokens=37, cached_tokens=3, completion_tokens=9))
    row["baseline_nusd"] = sum(rate(LARGE, prompt_tokens=37, cached_tokens=3, completion_tokens=9))
    row |= changes
    return Rows(exchanges=[row], attempts={"tw00-1": attempts}, delivered={"tw00-1": 1}, open=0, waiting=0)


def test_a_ledger_that_is_right_is_found_right() -> None:
    found = compare([asked()], upstream(), ledger())
    assert (found.complete, found.rows, found.attempts, found.cascades) == (1, 1, 2, 1)


def test_parts_of_a_cost_are_rounded_half_to_even() -> None:
    assert rate(SMALL, prompt_tokens=1, cached_tokens=0, completion_tokens=1) == (72, 0, 310)
    assert rate(SMALL, prompt_tokens=3, cached_tokens=0, completion_tokens=3) == (218, 0, 932)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (Rows(exchanges=[], attempts={}, delivered={}, open=0, waiting=0), "does not know it"),
        (ledger(output_nusd=1), "not the sum"),
        (ledger(tier="small"), "'tier': 'small'"),
        (ledger(key_name="ben"), "'key_name': 'ben'"),
        (ledger(baseline_nusd=1), "'baseline_nusd': 1"),
        (ledger(wasted_nusd=1), "'wasted_nusd': 1"),
        (ledger(request_id="8"), "does not know it"),
        (ledger(outcome="lost", estimated=1), "is called lost"),
        (ledger([attempt(1, LARGE, "accepted")]), "is not billed"),
        (ledger([attempt(1, SMALL, "doubted"), attempt(3, LARGE, "accepted")]), "'number': 3"),
        (ledger([attempt(1, SMALL, "doubted", input_nusd=1), attempt(2, LARGE, "accepted")]), "in place of"),
        (
            ledger([attempt(1, SMALL, "doubted"), attempt(2, LARGE, "accepted", counted=1)]),
            "what was reported was counted",
        ),
        (
            ledger(
                [
                    attempt(1, SMALL, "doubted"),
                    attempt(2, LARGE, "accepted", completion_tokens=8)
                    | rate(LARGE, prompt_tokens=37, cached_tokens=3, completion_tokens=8)._asdict(),
                ]
            ),
            "in place of",
        ),
    ],
)
def test_what_is_wrong_is_found(wrong: Rows, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        compare([asked()], upstream(), wrong)


def test_two_rows_of_one_request_are_found() -> None:
    twice = ledger()
    twice.exchanges.append(twice.exchanges[0] | {"exchange_id": "tw00-2"})
    with pytest.raises(AssertionError, match="has 2 rows"):
        compare([asked()], upstream(), twice)


def test_attempts_without_an_exchange_are_found() -> None:
    orphan = ledger()
    orphan.attempts["tw00-9"] = [attempt(1, SMALL, "accepted")]
    with pytest.raises(AssertionError, match="have attempts and no row"):
        compare([asked()], upstream(), orphan)


def test_what_nobody_has_in_hand_may_be_missing_where_its_process_died_with_it() -> None:
    nothing = Rows(exchanges=[], attempts={}, delivered={}, open=0, waiting=0)
    assert compare([asked(complete=False)], upstream(), nothing, _DIED, young_s=2).unknown == 1
    with pytest.raises(AssertionError, match="nothing died"):
        compare([asked(complete=False)], upstream(), nothing)
    with pytest.raises(AssertionError, match="s old when its process died"):
        compare([asked(complete=False)], upstream(), nothing, _DIED, young_s=1)


def test_what_nobody_has_in_hand_may_be_estimated_where_its_process_died_with_it() -> None:
    estimated = ledger(outcome="lost", estimated=1)
    assert compare([asked(complete=False)], upstream(), estimated, _DIED).lost == 1
    with pytest.raises(AssertionError, match="nothing died"):
        compare([asked(complete=False)], upstream(), estimated)
