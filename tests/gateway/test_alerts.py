"""Does somebody hear of what happens, once, and after a restart too? A real ledger and a real receiver."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.alerts import Alerts, Ways, alerts_of
from gateway.config.load import load
from gateway.config.problem import ConfigError
from gateway.config.secrets import resolve_all
from gateway.ledger.contract import LedgerDown, Reading, Store
from gateway.ledger.hourly import HOUR_MS
from gateway.ledger.rows import AnyRow
from gateway.ledger.sqlite import SqliteStore
from gateway.webhooks import Webhook
from policies.accounts import Budget, Rolling, Rule
from policies.calendar import window_starts
from policies.limits import Account, Limit, Meter
from tests.gateway.ledger.bills import bill_of
from tests.gateway.receiver import Answer, Receiver, receiving

ROOT = Path(__file__).parents[2]
NUSD = 1_000_000_000
DAY_MS = 24 * HOUR_MS
MIDNIGHT_MS = 20_800 * DAY_MS
NOW_MS = MIDNIGHT_MS + 10 * HOUR_MS + 180_000
QUIET = Ways(anomalies=False)


def account(whom: str = "key=alice", rule: Rule | None = None, *, shadow: bool = False) -> Account:
    meter = Meter(
        measure="spend", rule=rule or Budget(100 * NUSD, tuple(MIDNIGHT_MS + n * DAY_MS for n in range(-1, 3)))
    )
    return Account(Limit(name="daily", meters=(meter,), shadow=shadow), meter, whom, f"daily/spend:day/{whom}")


class Broken:
    """A ledger that is down."""

    def write(self, rows: Sequence[AnyRow], closed: Sequence[str] = ()) -> None:
        raise LedgerDown("no room on the disk")

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        raise LedgerDown("no room on the disk")
        yield

    def close(self) -> None:
        pass


class World:
    """A ledger, a receiver and a clock; processes come and go."""

    def __init__(self, receiver: Receiver, path: Path) -> None:
        self.receiver = receiver
        self.now_ms = NOW_MS
        self._path = path
        with contextlib.closing(SqliteStore(path)) as store:
            store.open()

    def store(self) -> SqliteStore:
        return SqliteStore(self._path)

    @asynccontextmanager
    async def process(
        self, name: str = "one", *, ways: Ways = QUIET, store: Store | None = None, **settings: Any
    ) -> AsyncIterator[Alerts]:
        alerts = Alerts(
            ways,
            instance=name,
            store=store or self.store(),
            webhooks=settings.pop("webhooks", None) or [Webhook(self.receiver.url, b"key", after_s=(0.02, 3600.0))],
            now_s=lambda: self.now_ms / 1000,
            **{"every_s": 3600.0, **settings},
        )
        await alerts.open()
        try:
            yield alerts
        finally:
            await alerts.close()

    def told(self) -> list[tuple[str, float]]:
        return [(body["data"]["limit"], body["data"]["part"]) for body in self.receiver.bodies()]


def play(tmp_path: Path, act: Callable[[World], Awaitable[None]], *answers: Answer) -> None:
    async def run() -> None:
        async with receiving(*answers) as receiver, asyncio.timeout(60):
            await act(World(receiver, tmp_path / "ledger.db"))

    asyncio.run(run())


async def settled(alerts: Alerts) -> None:
    """Return when everything that was found has been told."""
    while alerts._found.qsize() or alerts.numbers()["tierway_alerts_undelivered"][()] or alerts._notes:
        await asyncio.sleep(0.001)
    # What was taken from the queue last may still be claimed.
    await asyncio.get_running_loop().run_in_executor(alerts._writer, lambda: None)
    while alerts.numbers()["tierway_alerts_undelivered"][()] or alerts._notes:
        await asyncio.sleep(0.001)


# -- budgets ------------------------------------------------------------------------------------------------------------


def test_each_part_of_a_budget_is_told_once_with_what_it_is(tmp_path: Path) -> None:
    async def act(world: World) -> None:
        async with world.process() as alerts:
            for used in (0, 10, 49.99, 50, 51, 79, 85, 86, 99, 100, 130):
                alerts.watching(account(), round(used * NUSD), world.now_ms)
            await world.receiver.until_came(3)
            await settled(alerts)
            assert world.told() == [("daily", 0.5), ("daily", 0.8), ("daily", 1.0)]
            first = world.receiver.bodies()[0]
            assert first["type"] == "budget.threshold"
            assert first["version"] == 1
            assert first["id"] == world.receiver.ids()[0]
            assert first["timestamp"] == "2026-12-13T10:03:00Z"
            assert first["data"] == {
                "limit": "daily",
                "scope": {"key": "alice"},
                "part": 0.5,
                "used_usd": "50",
                "limit_usd": "100",
                "window": {"start": "2026-12-13T00:00:00Z", "end": "2026-12-14T00:00:00Z"},
                "shadow": False,
            }
            assert alerts.numbers()["tierway_alerts_total"][("budget.threshold",)] == 3
            assert alerts.numbers()["tierway_alert_attempts_total"][("taken",)] == 3

    play(tmp_path, act)


def test_a_new_window_and_another_account_and_another_limit_are_told_again(tmp_path: Path) -> None:
    async def act(world: World) -> None:
        async with world.process() as alerts:
            alerts.watching(account(), 60 * NUSD, world.now_ms)
            alerts.watching(account(), 0, world.now_ms + DAY_MS)
            alerts.watching(account(), 60 * NUSD, world.now_ms + DAY_MS)
            alerts.watching(account("key=bob"), 60 * NUSD, world.now_ms)
            alerts.watching(account("key=carol", Rolling(10 * NUSD, HOUR_MS)), 9 * NUSD, world.now_ms)
            alerts.watching(account("key=carol", Rolling(10 * NUSD, HOUR_MS)), 9 * NUSD, world.now_ms + HOUR_MS)
            alerts.watching(account("key=carol", Rolling(12 * NUSD, HOUR_MS)), 10 * NUSD, world.now_ms + 2 * HOUR_MS)
            alerts.watching(account("key=dora", Budget(10 * NUSD)), 9 * NUSD, world.now_ms)
            alerts.watching(account("key=dora", Budget(10 * NUSD)), 9 * NUSD, world.now_ms + 1000 * DAY_MS)
            await world.receiver.until_came(7)
            await settled(alerts)
            assert len(set(world.receiver.ids())) == len(world.receiver.ids()) == 7

    play(tmp_path, act)


def test_of_several_processes_one_tells(tmp_path: Path) -> None:
    async def act(world: World) -> None:
        async with world.process("one") as one, world.process("two") as two, world.process("three") as three:
            for alerts in (one, two, three):
                for used in (50, 80):
                    alerts.watching(account(), used * NUSD, world.now_ms)
            await world.receiver.until_came(2)
            for alerts in (one, two, three):
                await settled(alerts)
            assert sorted(world.told()) == [("daily", 0.5), ("daily", 0.8)]
            totals = [alerts.numbers()["tierway_alerts_total"][("budget.threshold",)] for alerts in (one, two, three)]
            assert sum(totals) == 2

    play(tmp_path, act)


def test_after_a_restart_nothing_is_told_again_and_what_was_not_told_is(tmp_path: Path) -> None:
    async def act(world: World) -> None:
        async with world.process() as alerts:
            alerts.watching(account(), 55 * NUSD, world.now_ms)
            await settled(alerts)
            world.receiver.answers = [500, 500]
            alerts.watching(account(), 85 * NUSD, world.now_ms)
            await world.receiver.until_came(3)
        assert [part for _, part in world.told()] == [0.5, 0.8, 0.8]
        # It starts again, sees the same standing, and remembers nothing.
        async with world.process() as alerts:
            alerts.watching(account(), 85 * NUSD, world.now_ms)
            await world.receiver.until_came(4)
            await settled(alerts)
        assert [part for _, part in world.told()] == [0.5, 0.8, 0.8, 0.8]
        async with world.process() as alerts:
            alerts.watching(account(), 86 * NUSD, world.now_ms)
            await settled(alerts)
        assert len(world.told()) == 4
        assert len(set(world.receiver.ids())) == 2

    play(tmp_path, act)


def test_what_a_killed_process_had_to_tell_another_one_tells_after_its_lease(tmp_path: Path) -> None:
    async def act(world: World) -> None:
        # A receiver that never answers, and a process that ends before it does: as if it was killed.
        world.receiver.answers = ["hang"]
        async with world.process("killed") as alerts:
            alerts.watching(account(), 55 * NUSD, world.now_ms)
            await world.receiver.until_came(1)
        world.now_ms += 31_000
        async with world.process("other", watches=False) as alerts:
            await settled(alerts)
            assert len(world.told()) == 1, "this is not the worker that looks for it"
        async with world.process("other") as alerts:
            await world.receiver.until_came(2)
            await settled(alerts)
        assert len(set(world.receiver.ids())) == 1

    play(tmp_path, act)


def test_every_webhook_is_told_and_after_a_restart_only_the_one_that_was_not(tmp_path: Path) -> None:
    async def act(world: World) -> None:
        def hooks() -> list[Webhook]:
            return [Webhook(f"{world.receiver.url}/{name}", b"key", after_s=(3600.0,)) for name in "ab"]

        world.receiver.answers = [204, 500]
        async with world.process(webhooks=hooks()) as alerts:
            alerts.watching(account(), 55 * NUSD, world.now_ms)
            await world.receiver.until_came(2)
            while alerts._notes or alerts.numbers()["tierway_alerts_undelivered"][()] != 1:
                await asyncio.sleep(0.001)
        failed = world.receiver.paths[1]
        async with world.process(webhooks=hooks()) as alerts:
            await world.receiver.until_came(3)
            await settled(alerts)
        assert world.receiver.paths[2:] == [failed]

    play(tmp_path, act)


def test_while_the_ledger_is_down_everybody_tells_under_the_same_id(tmp_path: Path) -> None:
    async def act(world: World) -> None:
        async with world.process("one", store=Broken()) as one, world.process("two", store=Broken()) as two:
            for alerts in (one, two):
                alerts.watching(account(), 55 * NUSD, world.now_ms)
            for _ in range(3):
                one.unwritable(world.now_ms, "no room on the disk")
            await world.receiver.until_came(3)
            await settled(one)
            await settled(two)
        bodies = {body["type"]: body for body in world.receiver.bodies()}
        assert sorted(body["type"] for body in world.receiver.bodies()) == [
            "budget.threshold",
            "budget.threshold",
            "ledger.unwritable",
        ]
        assert len(set(world.receiver.ids())) == 2
        assert bodies["ledger.unwritable"]["data"] == {
            "instance": "one",
            "since": "2026-12-13T10:03:00Z",
            "reason": "no room on the disk",
        }

    play(tmp_path, act)


def test_without_webhooks_and_without_a_ledger_it_is_counted_all_the_same(tmp_path: Path) -> None:
    async def run() -> None:
        alerts = Alerts(QUIET, instance="one", now_s=lambda: NOW_MS / 1000)
        await alerts.open()
        for used in (50, 60, 85):
            alerts.watching(account(), used * NUSD, NOW_MS)
        while alerts.numbers()["tierway_alerts_total"][("budget.threshold",)] < 2:
            await asyncio.sleep(0)
        await alerts.close()

    asyncio.run(asyncio.wait_for(run(), 20))


def test_where_more_is_found_than_there_is_room_for_it_is_told_with_a_later_request(tmp_path: Path) -> None:
    async def act(world: World) -> None:
        async with world.process(most_found=3) as alerts:
            for number in range(4):
                alerts.watching(account(f"key=k{number}"), 55 * NUSD, world.now_ms)
            await settled(alerts)
            assert len(set(world.receiver.ids())) == 3
            for number in range(4):
                alerts.watching(account(f"key=k{number}"), 56 * NUSD, world.now_ms)
            await settled(alerts)
            assert len(world.receiver.ids()) == len(set(world.receiver.ids())) == 4

    play(tmp_path, act)


def test_without_parts_nothing_is_told_and_the_ratio_is_shown_still(tmp_path: Path) -> None:
    async def act(world: World) -> None:
        async with world.process(ways=Ways(budgets=(), anomalies=False)) as alerts:
            alerts.watching(account(), 99 * NUSD, world.now_ms)
            assert alerts._found.qsize() == 0
            assert alerts.numbers()["tierway_budget_used_ratio"] == {("daily",): 0.99}

    play(tmp_path, act)


def test_the_ratio_is_that_of_the_fullest_account_and_gone_with_its_window(tmp_path: Path) -> None:
    async def act(world: World) -> None:
        async with world.process() as alerts:
            alerts.watching(account("key=a"), 10 * NUSD, world.now_ms)
            alerts.watching(account("key=b"), 30 * NUSD, world.now_ms)
            alerts.watching(account("key=b"), 40 * NUSD, world.now_ms)
            assert alerts.numbers()["tierway_budget_used_ratio"] == {("daily",): 0.4}
            world.now_ms += DAY_MS
            assert alerts.numbers()["tierway_budget_used_ratio"] == {}

    play(tmp_path, act)


KILLED = """
import asyncio, sys
from pathlib import Path
from gateway.alerts import Alerts
from gateway.ledger.sqlite import SqliteStore
from gateway.webhooks import Webhook
from tests.gateway.test_alerts import NOW_MS, NUSD, QUIET, account

async def main(path, url):
    alerts = Alerts(QUIET, instance="killed", store=SqliteStore(Path(path)), webhooks=[Webhook(url, b"key")],
                    now_s=lambda: NOW_MS / 1000)
    await alerts.open()
    alerts.watching(account(), 55 * NUSD, NOW_MS)
    await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("name", ["killed", "another"])
def test_what_a_process_had_to_tell_when_it_was_killed_is_told(tmp_path: Path, name: str) -> None:
    async def act(world: World) -> None:
        world.receiver.answers = ["hang"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", KILLED, str(tmp_path / "ledger.db"), world.receiver.url, cwd=ROOT
        )
        try:
            await world.receiver.until_came(1)
        finally:
            process.kill()
            await process.wait()
        world.now_ms += 31_000
        async with world.process(name) as alerts:
            alerts.watching(account(), 55 * NUSD, world.now_ms)
            await world.receiver.until_came(2)
            await settled(alerts)
        assert world.told() == [("daily", 0.5)] * 2
        assert len(set(world.receiver.ids())) == 1

    play(tmp_path, act)


# -- how it is put together --------------------------------------------------------------------------------------------

CONFIG = """
backends: {one: {kind: scripted, model: m, tokens: ["a"]}}
tiers: [{name: small, backends: [one], price: {input: $0, output: $0}}]
keys: [{name: me, sha256: KEY}]
ledger:
  lease: 7s
  alerts:
    webhooks: [{url: "URL", secret: {from: env, name: HOOK}}]
    budgets: [0.9]
    anomalies: false
"""


def configured(tmp_path: Path, url: str, secret: str) -> Alerts:
    path = tmp_path / "gateway.yaml"
    path.write_text(CONFIG.replace("URL", url).replace("KEY", "ab" * 32))
    loaded = load(path)
    secrets = resolve_all(loaded, {"HOOK": secret})
    return alerts_of(loaded, secrets, instance="one", store=None, watches=True)


def test_what_is_configured_is_told_and_the_page_shows_how_to_verify_it(tmp_path: Path) -> None:
    secret = "whsec_" + b64encode(b"a secret of thirty-two bytes ...").decode()
    page = (ROOT / "docs" / "alerts.md").read_text()
    example: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], example)

    async def run() -> None:
        async with receiving() as receiver, asyncio.timeout(20):
            alerts = configured(tmp_path, receiver.url, secret)
            await alerts.open()
            for used in (50, 89, 90, 100):
                alerts.watching(account(), used * NUSD, NOW_MS)
            await receiver.until_came(1)
            await alerts.close()
            ((headers, body),) = receiver.came
            assert receiver.bodies()[0]["data"]["part"] == 0.9
            assert example["verified"](secret, headers, body)
            assert not example["verified"](secret, headers, body + b" ")
            assert not example["verified"]("whsec_" + b64encode(b"another").decode(), headers, body)
            old = {**headers, "webhook-timestamp": str(int(headers["webhook-timestamp"]) - 400)}
            assert not example["verified"](secret, old, body)

    asyncio.run(run())


def test_a_secret_that_cannot_sign_is_named_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ledger\.alerts\.webhooks\[0\]\.secret: .*Base64") as raised:
        configured(tmp_path, "http://localhost", "whsec_T0K3N!")
    assert "T0K3N" not in str(raised.value)


# -- anomalies ----------------------------------------------------------------------------------------------------------


def spent(
    usd: Callable[[int], float], *, until: int, weeks: int = 3, requests: int = 5, team: str = "red"
) -> list[AnyRow]:
    """Return rows of so many dollars an hour, up to hour `until` of the epoch."""
    rows: list[AnyRow] = []
    for hour in range(until - weeks * 168, until + 1):
        cost = round(usd(hour) * NUSD) // requests
        for number in range(requests if cost else 0):
            rows.append(  # noqa: PERF401 - two loops read better
                msgspec.structs.replace(
                    bill_of(0).exchange,
                    exchange_id=f"{team}-{hour}-{number}",
                    team=team,
                    route="auto",
                    settled_ms=hour * HOUR_MS + number,
                    output_nusd=cost,
                    estimated=0,
                )
            )
    return rows


NOW_HOUR = NOW_MS // HOUR_MS


def anomalies(world: World) -> list[tuple[str, str | None, str, str, bool]]:
    return sorted(
        (data["of"], data["name"], data["hour"], data["what"], data["complete"])
        for body in world.receiver.bodies()
        if body["type"] == "spend.anomaly"
        for data in (body["data"],)
    )


async def looked(alerts: Alerts) -> None:
    while alerts._judged is None:
        await asyncio.sleep(0.001)
    await settled(alerts)


def test_an_hour_that_is_over_and_unlike_the_others_is_told_once_by_team_and_route(tmp_path: Path) -> None:
    async def act(world: World) -> None:
        world.store().write(spent(lambda hour: 200.0 if hour == NOW_HOUR - 1 else 10 + hour % 3, until=NOW_HOUR - 1))
        for _ in range(2):
            async with world.process(ways=Ways()) as alerts, world.process("another", ways=Ways()) as another:
                await looked(alerts)
                await looked(another)
                shown = alerts.numbers()["tierway_spend_anomaly"]
                assert set(shown) == {("team", "red"), ("route", "auto")}
                assert shown[("team", "red")] > 3
        hour = "2026-12-13T09:00:00Z"
        assert anomalies(world) == [("route", "auto", hour, "spike", True), ("team", "red", hour, "spike", True)]
        data = world.receiver.bodies()[0]["data"]
        assert data["observed_usd"] == "200"
        assert 9 < float(data["expected_usd"]) < 14
        assert "$200.00 where $" in data["reason"]

    play(tmp_path, act)


def test_an_hour_that_is_not_over_is_told_as_soon_as_it_is_a_spike_and_not_again_when_it_is(tmp_path: Path) -> None:
    async def act(world: World) -> None:
        world.store().write(spent(lambda hour: 500.0 if hour == NOW_HOUR else 10 + hour % 3, until=NOW_HOUR))
        async with world.process(ways=Ways()) as alerts:
            await looked(alerts)
            hour = "2026-12-13T10:00:00Z"
            assert anomalies(world) == [("route", "auto", hour, "spike", False), ("team", "red", hour, "spike", False)]
            assert alerts.numbers()["tierway_spend_anomaly"][("team", "red")] == 0
        world.now_ms += HOUR_MS
        async with world.process(ways=Ways()) as alerts:
            await looked(alerts)
        assert len(anomalies(world)) == 2

    play(tmp_path, act)


@pytest.mark.parametrize(
    "usd", [lambda hour: 10 + hour % 3, lambda hour: 0.0 if hour == NOW_HOUR else 40.0, lambda hour: 0.02 * (hour % 2)]
)
def test_usual_hours_are_not_told_and_an_empty_one_not_before_it_is_over(
    tmp_path: Path, usd: Callable[[int], float]
) -> None:
    async def act(world: World) -> None:
        world.store().write(spent(usd, until=NOW_HOUR, weeks=5, requests=20))
        async with world.process(ways=Ways()) as alerts:
            await looked(alerts)
            assert all(score == 0 for score in alerts.numbers()["tierway_spend_anomaly"].values())
        assert anomalies(world) == []

    play(tmp_path, act)


def test_an_hour_without_anything_where_much_is_usual_is_told_as_a_drop(tmp_path: Path) -> None:
    async def act(world: World) -> None:
        rows = spent(lambda hour: 0.0 if hour >= NOW_HOUR - 1 else 40.0, until=NOW_HOUR, weeks=5, requests=20)
        world.store().write(rows)
        async with world.process(ways=Ways()) as alerts:
            await looked(alerts)
            assert alerts.numbers()["tierway_spend_anomaly"][("team", "red")] < -3
        assert [what for _, _, _, what, _ in anomalies(world)] == ["drop", "drop"]

    play(tmp_path, act)


def test_the_first_weeks_are_silent(tmp_path: Path) -> None:
    async def act(world: World) -> None:
        world.store().write(spent(lambda hour: 900.0 if hour == NOW_HOUR - 1 else 10.0, until=NOW_HOUR - 1, weeks=0))
        async with world.process(ways=Ways()) as alerts:
            await looked(alerts)
            assert alerts.numbers()["tierway_spend_anomaly"] == {}
        assert anomalies(world) == []

    play(tmp_path, act)


def test_a_ledger_that_cannot_be_read_is_asked_again(tmp_path: Path) -> None:
    async def act(world: World) -> None:
        class Once(SqliteStore):
            down = True

            @contextmanager
            def reading(self) -> Iterator[Reading]:
                if self.down:
                    self.down = False
                    raise LedgerDown("being restarted")
                with super().reading() as reading:
                    yield reading

        world.store().write(spent(lambda hour: 200.0 if hour == NOW_HOUR - 1 else 10.0, until=NOW_HOUR - 1))
        async with world.process(ways=Ways(), store=Once(tmp_path / "ledger.db"), every_s=0.01) as alerts:
            await looked(alerts)
        assert len(anomalies(world)) == 2

    play(tmp_path, act)


def test_the_calendar_of_the_test_is_that_of_limits() -> None:
    assert MIDNIGHT_MS in window_starts(NOW_MS, "day", UTC)
