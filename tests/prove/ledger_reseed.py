"""Are budgets exact again after Redis has lost them? It comes back empty, or as it was before, and the ledger tells it.

Gateways of several workers stand on one PostgreSQL and one Redis, and users ask all the time. In between PostgreSQL is
away for longer than a process may be silent, and nobody is taken for dead because of that. In the end what Redis has
counted is what the ledger has, for every key, for the team and in all, to the nano-dollar.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from time import monotonic, sleep, time
from typing import Any, Literal

import msgspec

from tests.prove.ledger_check import compare, figures_of
from tests.prove.ledger_site import KEYS, LEASE_S, Rows, Site, go_to
from tests.prove.ledger_users import Crowd, secret
from tests.prove.limits_site import Shown, redis_state, shown
from tests.prove.proof import Figures, Size
from tests.running import Gateway, wait_until
from tests.servers.redis import RedisServer, kill, running_redis, say

Loss = Literal["empty", "old", "away"]

_TEAM = "team-red"
_IN_TEAM = KEYS[:2]
_FORGETS_S = 2.0
"""Less than this lost at the end of a snapshot is not taken for a loss."""
_BUDGETS: list[dict[str, Any]] = [
    {"name": "of-keys", "scope": {"key": "each"}, "spend": {"usd": 1000, "per": "day"}},
    {"name": "of-teams", "scope": {"team": "each"}, "spend": {"usd": 1000, "per": "day"}},
    {"name": "of-all", "spend": {"usd": 1000}},
]
_DAY_MS = 86_400_000
_AWAY_S = 2.5 * LEASE_S
_EXACT_WITHIN_S = 20
_SLOW_CROWDS = 10_000_000


class _Store:
    """A Redis that loses what it knows, at an address that stays the same."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self.server: RedisServer = stack.enter_context(running_redis(folder=folder))

    def save(self) -> None:
        assert "+OK" in say(self.server, "SAVE")

    def lose(self, loss: Loss) -> None:
        """End it at once and start it again, with the last snapshot or with none."""
        kill(self.server)
        if loss == "empty":
            self._folder.joinpath("dump.rdb").unlink(missing_ok=True)
        again = running_redis(self.server.port, password=self.server.password, folder=self._folder)
        self.server = self._stack.enter_context(again)


def run(seed: int, size: Size) -> Figures:
    """Lose it, once or a few times, and compare."""
    random = Random(seed)
    _far_from_midnight()
    losses: list[Loss] = ["empty"] if size == "test" else ["empty", "old", "away", "empty", "old"]
    workers = 4 if size == "full" else 1
    slowest_s = 0.0
    with _running(random, workers, users=8 if size == "full" else 4) as (site, store, gateways, crowds):
        sleep(0.5)
        for loss in losses:
            if loss == "old":
                store.save()
                sleep(_FORGETS_S + 0.5)
            _some_answers(crowds)
            if loss == "away":
                site.postgres.stop()
                sleep(_AWAY_S)
                site.postgres.start()
            else:
                store.lose(loss)
            lost_s = monotonic()
            _some_answers(crowds)
            assert wait_until(lambda: all(map(_together, gateways)), 20), "some gateway counts by itself"
            slowest_s = max(slowest_s, monotonic() - lost_s)
            sleep(random.random())
        for crowd in crowds:
            crowd.stop()
        asked = [one for crowd in crowds for one in crowd.asked]
        rows, told_s = _exact(site, gateways)
        for gateway in gateways:
            gateway.process.stop()
            assert "Traceback" not in gateway.process.said(), gateway.process.said()[-3000:]
        site.in_order()
        found = compare(asked, site.upstream, site.rows())
        assert found.rows == len(rows.exchanges)
    return {
        "processes": workers * len(gateways),
        "times that Redis lost its data": sum(loss != "away" for loss in losses),
        "times that PostgreSQL was away": sum(loss == "away" for loss in losses),
        "counted together again after, s": round(slowest_s, 2),
        "exact after all is in the ledger, s": round(told_s, 2),
        "budgets compared": 2 + len(KEYS),
        "nano-dollars that Redis and the ledger differ by": 0,
        "spent, nano-dollars": found.nusd,
        **figures_of(found),
    }


@contextmanager
def _running(random: Random, workers: int, *, users: int) -> Iterator[tuple[Site, _Store, list[Gateway], list[Crowd]]]:
    with ExitStack() as stack:
        site = Site(stack, "postgres")
        folder = site.folder / "redis"
        folder.mkdir()
        store = _Store(stack, folder)
        gateways: list[Gateway] = []
        for number in range(2):
            config = msgspec.json.decode(msgspec.json.encode(site.config))
            config["state"] = redis_state(site.folder, store.server, lease="3s")
            config["limits"] = _BUDGETS
            config["ledger"]["store"]["spool"] = str(site.kept / f"spool-of-{number}.db")
            for key in config["keys"]:
                if key["name"] in _IN_TEAM:
                    key["team"] = _TEAM
            options = ["--workers", str(workers)] if workers > 1 else []
            environment = {"LEDGER_DSN": site.postgres.server.url}
            gateway = Gateway(config, site.folder, *options, environment=environment)
            stack.callback(gateway.process.stop)
            gateways.append(gateway)
        crowds: list[Crowd] = []
        for number, gateway in enumerate(gateways):
            assert gateway.all_up(20), gateway.states()
            first = number * 1_000_000
            mine = [
                Crowd(random, users, KEYS, first_number=first),
                Crowd(random, users // 2, KEYS, kind="slow", first_number=_SLOW_CROWDS + first),
            ]
            go_to(gateway.port, mine)
            crowds += [stack.enter_context(crowd) for crowd in mine]
        yield site, store, gateways, crowds


def _some_answers(crowds: list[Crowd]) -> None:
    since_s = monotonic()
    for crowd in crowds:
        assert wait_until(lambda crowd=crowd: crowd.answered(since_s) >= 3, 30), "nobody is answered"  # type: ignore[misc]


def _together(gateway: Gateway) -> bool:
    """Whether every worker counts in Redis."""
    return b"\ntierway_limits_apart 0\n" in gateway.get("/metrics").body


def _exact(site: Site, gateways: list[Gateway]) -> tuple[Rows, float]:
    """Wait until Redis has counted what the ledger has, and return that, and how long it took."""
    assert site.at_rest(), gateways[0].process.said()[-3000:]
    rows, began_s = site.rows(), monotonic()
    wanted = _spent(rows)
    found: dict[str, int] = {}

    def is_exact() -> bool:
        found.clear()
        for gateway in gateways:
            found.update(_counted(gateway))
        return found == wanted

    assert wait_until(is_exact, _EXACT_WITHIN_S, 0.2), f"Redis has {found}, the ledger {wanted}"
    return rows, monotonic() - began_s


def _counted(gateway: Gateway) -> dict[str, int]:
    """Return what Redis says was spent, by the name of the limit and whom it is for."""
    found: dict[str, int] = {}
    for key in KEYS:
        reply = gateway.get("/v1/limits", secret(key))
        assert reply.status == 200, reply
        for one in shown(reply.body):
            assert one.measure == "spend", one
            found[_name(one)] = one.used
            if one.reserved:
                found["reserved"] = one.reserved
    return found


def _name(one: Shown) -> str:
    return " ".join([one.name, *one.scope.values()])


def _spent(rows: Rows) -> dict[str, int]:
    """Add up the ledger: by key and team what was billed today, in all whenever it was."""
    midnight_ms = int(time() * 1000) // _DAY_MS * _DAY_MS
    found: dict[str, int] = {"of-all": 0, f"of-teams {_TEAM}": 0} | {f"of-keys {key}": 0 for key in KEYS}
    for row in rows.exchanges:
        nusd = row["input_nusd"] + row["cached_input_nusd"] + row["output_nusd"] + row["gpu_nusd"]
        found["of-all"] += nusd
        if row["settled_ms"] >= midnight_ms:
            found[f"of-keys {row['key_name']}"] += nusd
            if row["team"] is not None:
                found[f"of-teams {row['team']}"] += nusd
    return found


def _far_from_midnight() -> None:
    """Budgets of a day begin anew then, and nothing that is shown here would be the same before and after."""
    left_s = _DAY_MS / 1000 - time() % (_DAY_MS / 1000)
    if left_s < 120:
        sleep(left_s + 1)
