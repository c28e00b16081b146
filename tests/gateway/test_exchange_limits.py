"""What do limits do to one request? The exchange over memory books and scripted backends."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from backends.backend import Broken, Unreachable
from backends.scripted import Pause, ScriptedBackend
from gateway.allowance import Allowance, Asking
from gateway.body import read_body
from gateway.driver import Full
from gateway.exchange import Gateway
from gateway.wire import TokenUsage
from policies.access import Caller
from policies.accounts import Budget, Concurrency, Rate, Rule
from policies.limits import Amounts, Dimension, Facts, Limit, Measure, Meter, Use
from routing.plan import PlannedAttempt
from tests.gateway.plays import HELLO, UNSURE, Client, ask, changed, decided, fails, gateway_over, says

both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
HOUR_MS = 3_600_000
NUSD = 10**9


def limit(measure: Measure, amount: int, *scope: tuple[Dimension, str], **settings: Any) -> Limit:
    rules: dict[str, Rule] = {"concurrent": Concurrency(amount), "spend": Budget(amount)}
    rule = rules.get(measure, Rate(amount, HOUR_MS, amount))
    name = settings.pop("name", measure)
    return Limit(name=name, scope=scope or (("key", "each"),), meters=(Meter(measure=measure, rule=rule),), **settings)


def queue(tier: str, seats: int, **settings: Any) -> Limit:
    return limit("concurrent", seats, ("tier", tier), name=f"queue of {tier}", **{"max_wait_s": 60.0, **settings})


async def standings(gateway: Gateway, tier: str | None = None) -> dict[str, tuple[int, int]]:
    facts = Facts(key="tester", route="auto", model="auto", tier=tier)
    return {
        account.limit.name: (standing.used, standing.reserved)
        for account, standing in await gateway.admission.standings([facts])
    }


def error(client: Client) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(client.body)["error"]
    return shown


def held(words: ScriptedBackend) -> tuple[ScriptedBackend, asyncio.Event]:
    """The same words, but the last ones only when the event is set."""
    event = asyncio.Event()
    return changed(words, lambda script: [*script[:-3], Pause(event=event), *script[-3:]]), event


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0)


def play(coroutine: Any) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 10))


@both
def test_what_is_counted_is_what_the_client_was_shown(stream: bool) -> None:
    async def main() -> None:
        gateway = gateway_over(limit("tokens", 100_000), limit("requests", 10), small=says())
        client = await ask(gateway, stream=stream)
        usage = decided(gateway, client).usage
        assert usage.completion_tokens == 5
        assert await standings(gateway) == {
            "tokens": (usage.prompt_tokens + usage.completion_tokens, 0),
            "requests": (1, 0),
        }
        assert client.headers["x-ratelimit-limit-requests"] == "10"
        assert client.headers["x-ratelimit-remaining-requests"] == "9"
        assert client.headers["x-tierway-queue-ms"] == "0"

    play(main())


@both
def test_a_doubted_attempt_costs_money_but_none_of_the_callers_tokens(stream: bool) -> None:
    async def main() -> None:
        gateway = gateway_over(
            limit("tokens", 100_000),
            limit("output_tokens", 100_000, name="all", all_attempts=True),
            limit("spend", NUSD),
            small=says("Wrong", " wrong", " wrong", sure=UNSURE),
            large=says("Right"),
        )
        decision = decided(gateway, await ask(gateway, stream=stream))
        doubted, accepted = (one.usage for one in decision.attempts)
        assert doubted.completion_tokens > 0
        assert await standings(gateway) == {
            "tokens": (accepted.prompt_tokens + accepted.completion_tokens, 0),
            "all": (doubted.completion_tokens + accepted.completion_tokens, 0),
            "spend": (decision.cost_nusd, 0),
        }

    play(main())


@both
def test_one_that_fails_gives_everything_back(stream: bool) -> None:
    async def main() -> None:
        gateway = gateway_over(
            limit("tokens", 100_000), limit("concurrent", 1), limit("spend", NUSD), small=fails(Unreachable("gone"))
        )
        assert (await ask(gateway, stream=stream)).status == 502
        assert await standings(gateway) == {"tokens": (0, 0), "concurrent": (0, 0), "spend": (0, 0)}

    play(main())


def test_a_limit_that_is_used_up_answers_429_before_any_backend_hears_of_it() -> None:
    async def main() -> None:
        small = says()
        gateway = gateway_over(limit("requests", 1), small=small)
        await ask(gateway, stream=False)
        client = await ask(gateway, stream=True)
        assert (client.status, error(client)["code"]) == (429, "rate_limit_exceeded")
        assert "requests" in error(client)["message"]
        assert int(client.headers["retry-after"]) in (3599, 3600)
        assert client.headers["x-ratelimit-remaining-requests"] == "0"
        assert "x-request-id" in client.headers
        assert len(small.calls) == 1

    play(main())


def test_an_open_stream_holds_its_reservation_and_an_aborted_one_settles_what_came() -> None:
    async def main() -> None:
        small, _ = held(says())
        gateway = gateway_over(limit("concurrent", 1), limit("output_tokens", 1000), small=small)
        leaves = asyncio.Event()
        asking = asyncio.create_task(ask(gateway, stream=True, leaves=leaves, max_tokens=700))
        await until(lambda: small.open_calls)
        assert (await standings(gateway))["concurrent"] == (0, 1)
        assert (await standings(gateway))["output_tokens"][1] > 0
        leaves.set()
        await asking
        (decision,) = gateway.store._kept.values()
        assert decision.ending == "abandoned"
        assert await standings(gateway) == {
            "concurrent": (0, 0),
            "output_tokens": (decision.usage.completion_tokens, 0),
        }

    play(main())


def test_a_second_request_waits_for_the_first_and_says_how_long() -> None:
    async def main() -> None:
        small, go_on = held(says())
        gateway = gateway_over(limit("concurrent", 1, max_wait_s=60.0), small=small)
        first = asyncio.create_task(ask(gateway, stream=True))
        await until(lambda: small.open_calls)
        second = asyncio.create_task(ask(gateway, stream=False))
        await until(lambda: gateway.admission.waiting)
        await asyncio.sleep(0.01)
        go_on.set()
        assert (await first).status == (await second).status == 200
        assert int((await second).headers["x-tierway-queue-ms"]) >= 10
        assert decided(gateway, await second).queued_s >= 0.01

    play(main())


def test_who_leaves_while_waiting_is_let_go_and_asked_of_nobody() -> None:
    async def main() -> None:
        small, go_on = held(says())
        gateway = gateway_over(limit("concurrent", 1, max_wait_s=60.0), small=small)
        first = asyncio.create_task(ask(gateway, stream=True))
        await until(lambda: small.open_calls)
        leaves = asyncio.Event()
        second = asyncio.create_task(ask(gateway, stream=True, leaves=leaves))
        await until(lambda: gateway.admission.waiting)
        leaves.set()
        await second
        assert gateway.admission.waiting == 0
        go_on.set()
        await first
        assert len(small.calls) == 1
        assert gateway.metrics.snapshot().counters["tierway_refusals_total"] == {("client_closed_request",): 1}

    play(main())


def test_who_leaves_in_the_turn_in_which_its_wait_ends_holds_nothing() -> None:
    async def main() -> None:
        small, go_on = held(says())
        gateway = gateway_over(limit("concurrent", 1, max_wait_s=60.0), small=small)
        first = asyncio.create_task(ask(gateway, stream=True))
        await until(lambda: small.open_calls)
        leaves = asyncio.Event()
        second = asyncio.create_task(ask(gateway, stream=True, leaves=leaves))
        await until(lambda: gateway.admission.waiting)
        go_on.set()
        await until(lambda: not gateway.admission.waiting)
        leaves.set()
        await first
        await second
        assert await standings(gateway) == {"concurrent": (0, 0)}

    play(main())


@both
def test_a_full_tier_is_passed_over(stream: bool) -> None:
    async def main() -> None:
        small, go_on = held(says())
        gateway = gateway_over(queue("small", 1, most_waiting=0), small=small, large=says("Here"))
        first = asyncio.create_task(ask(gateway, stream=True))
        await until(lambda: small.open_calls)
        client = await ask(gateway, stream=stream)
        assert (client.text, client.headers["x-tierway-tier"]) == ("Here", "large")
        assert client.headers["x-tierway-attempts"] == "1"
        assert [one.outcome for one in decided(gateway, client).attempts] == ["full", "accepted"]
        go_on.set()
        assert (await first).text == "The sea is wide."
        assert await standings(gateway, "small") == {"queue of small": (0, 0)}

    play(main())


def test_where_every_tier_is_full_the_client_is_told_to_come_back() -> None:
    async def main() -> None:
        small, go_on = held(says())
        gateway = gateway_over(queue("small", 1, most_waiting=0), limit("concurrent", 9), small=small)
        first = asyncio.create_task(ask(gateway, stream=True))
        await until(lambda: small.open_calls)
        client = await ask(gateway, stream=False)
        assert (client.status, error(client)["code"]) == (503, "overloaded")
        assert int(client.headers["retry-after"]) >= 1
        go_on.set()
        await first
        assert await standings(gateway) == {"concurrent": (0, 0)}

    play(main())


def test_a_tier_serves_those_who_wait_in_turn() -> None:
    async def main() -> None:
        small, go_on = held(says())
        gateway = gateway_over(queue("small", 1), small=small)
        asking = [asyncio.create_task(ask(gateway, stream=True)) for _ in range(4)]
        await until(lambda: gateway.admission.waiting == 3)
        assert small.open_calls == 1
        go_on.set()
        clients = [await one for one in asking]
        assert [client.text for client in clients] == ["The sea is wide."] * 4
        assert await standings(gateway, "small") == {"queue of small": (0, 0)}

    play(main())


def test_a_doubted_answer_is_served_where_the_next_tier_is_full() -> None:
    async def main() -> None:
        large, go_on = held(says("Better", " than", " that"))
        gateway = gateway_over(queue("large", 1, most_waiting=0), small=says(sure=UNSURE), large=large)
        first = asyncio.create_task(ask(gateway, stream=True))
        await until(lambda: large.open_calls)
        client = await ask(gateway, stream=True)
        assert (client.text, client.headers["x-tierway-degraded"]) == ("The sea is wide.", "true")
        go_on.set()
        await first

    play(main())


def test_an_attempt_that_breaks_leaves_its_tier() -> None:
    async def main() -> None:
        small = changed(says(), lambda script: [*script[:-3], Broken("the engine died")])
        gateway = gateway_over(queue("small", 1), limit("output_tokens", 100, ("tier", "each")), small=small)
        await ask(gateway, stream=True)
        assert (await standings(gateway, "small"))["queue of small"] == (0, 0)
        used, reserved = (await standings(gateway, "small"))["output_tokens"]
        assert used > 0
        assert reserved == 0

    play(main())


def test_strict_reserves_what_the_client_may_ask_for_at_most() -> None:
    async def main() -> None:
        small, go_on = held(says())
        gateway = gateway_over(limit("output_tokens", 5000, strict=True), small=small)
        asking = asyncio.create_task(ask(gateway, stream=True, max_tokens=321, n=1))
        await until(lambda: small.open_calls)
        assert await standings(gateway) == {"output_tokens": (0, 321)}
        go_on.set()
        await asking
        assert await standings(gateway) == {"output_tokens": (5, 0)}

    play(main())


def test_n_multiplies_the_reservation() -> None:
    async def main() -> None:
        gateway = gateway_over(limit("output_tokens", 1000, strict=True), small=says())
        client = await ask(gateway, stream=False, max_tokens=321, n=4)
        assert (client.status, error(client)["code"]) == (400, "request_exceeds_limit")

    play(main())


def test_a_strict_budget_counts_what_a_broken_attempt_cost() -> None:
    async def main() -> None:
        small = changed(says(sure=UNSURE), lambda script: [*script[:-3], Broken("the engine died")])
        gateway = gateway_over(limit("spend", NUSD, strict=True), small=small)
        decision = decided(gateway, await ask(gateway, stream=True, max_tokens=5))
        assert decision.cost_nusd > 0
        assert (await standings(gateway))["spend"] == (decision.cost_nusd, 0)

    play(main())


def test_an_attempt_for_which_a_strict_limit_leaves_nothing_finds_its_tier_full() -> None:
    async def main() -> None:
        gateway = gateway_over(limit("spend", NUSD, strict=True), small=says())
        body = read_body("chat/completions", json.dumps({**HELLO, "max_tokens": 5}).encode())
        route = gateway.ladder.find("auto")
        assert route is not None
        spent = 0
        asking = Asking(
            exchange_id="x",
            caller=Caller(key="tester"),
            facts=Facts(key="tester", route="auto", model="auto"),
            route=route,
            body=body,
            prices=gateway.pricing.at(0),
        )
        allowance = Allowance(gateway.admission, gateway.sizes, asking, lambda: Use(of_all=Amounts(spend_nusd=spent)))

        async def here(waiting: Any) -> Any:
            return await waiting

        await allowance.ask(here)
        attempt = PlannedAttempt(rung=0, tier="small", backend="small", model="model-small")
        first, second = allowance.door(1, attempt), allowance.door(2, attempt)
        assert first is not None
        assert second is not None
        await first.enter(TokenUsage)
        spent = 1
        with pytest.raises(Full, match="leaves nothing for another attempt"):
            await second.enter(TokenUsage)

    play(main())


def test_a_budget_that_ran_out_is_402() -> None:
    async def main() -> None:
        gateway = gateway_over(limit("spend", 1_000_000, strict=True), small=says())
        statuses = []
        while (client := await ask(gateway, stream=False, max_tokens=5)).status == 200:
            statuses.append(client.status)
        assert statuses
        assert (client.status, error(client)["code"]) == (402, "insufficient_quota")
        assert error(client)["type"] == "insufficient_quota"
        assert client.headers["x-should-retry"] == "false"
        used, reserved = (await standings(gateway))["spend"]
        assert used <= 1_000_000
        assert reserved == 0
        await gateway.sizes.close()

    play(main())


def test_users_are_counted_apart_by_what_they_are_called() -> None:
    async def main() -> None:
        gateway = gateway_over(limit("requests", 1, ("user", "each")), small=says())
        statuses = [(await ask(gateway, stream=False, user=user)).status for user in ("a", "b" * 10_000, "a", "\n")]
        assert statuses == [200, 200, 429, 200]
        assert [(await ask(gateway, stream=False)).status for _ in range(2)] == [200, 429]

    play(main())


class Counting(ScriptedBackend):
    """A server that knows how many tokens a prompt has: fewer than its bytes allow."""

    async def count_tokens(self, _call: Any) -> int | None:
        return 30


def test_a_prompt_that_was_counted_fits_where_its_bytes_would_not() -> None:
    async def main() -> None:
        counting, strict = Counting(says()._play), limit("input_tokens", 100, strict=True)
        counted = gateway_over(strict, small=counting)
        assert (await ask(counted, stream=False)).status == 200
        # Where nobody can count for a tier its bytes stand for it, and they are too many.
        guessed = gateway_over(strict, small=counting, large=says())
        assert (await ask(guessed, stream=False)).status == 400
        await counted.sizes.close()
        await guessed.sizes.close()

    play(main())
