"""What do clients notice of a store that is frozen, slow, gone, empty or out of date? By HTTP, of two workers.

For each fault there are three keys, one of each `when_down`, whose clients ask all the time: before it, in it, and after
it. Beside them clients ask whom nothing limits: they feel the machine, and not the store. Nobody may wait longer because
of the store than the time that it is given; each mode must hold; and in the end what is counted must be what was let
through.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any, Literal

import msgspec
import uvloop

from tests.prove.clients import Answer, ask
from tests.prove.limits_site import SMALL, Site, ask_for, config_of, cost_nusd, redis_state
from tests.prove.limits_upstream import Metered, Plan, Served, metered
from tests.prove.proof import Figures, Size
from tests.running import Gateway, Process, folder_for_a_test, wait_until
from tests.servers.redis import kill, running_redis, say
from tests.servers.relay import Relay, relay_to

Fault = Literal["frozen", "slow", "gone", "empty", "old"]
Mode = Literal["open", "closed", "share"]

_FAULTS: tuple[Fault, ...] = ("frozen", "slow", "gone", "empty", "old")
_LOSES: frozenset[Fault] = frozenset(("empty", "old"))
_MODES: tuple[Mode, ...] = ("open", "closed", "share")
_BOUND_MS = 50.0
_NOISE_MS = 40.0
"""By so much two requests of the same moment differ on two busy cores."""
_FREE = "free"
_NEAR = "near"
"""Whose requests come near a limit, so that they are counted."""
_FREE_CLIENTS = 3
_LIMIT = 40
_TOKENS, _PROMPT_TOKENS = 8, 37
_EACH_NUSD = cost_nusd(Served(tag="", number=0, model=SMALL, prompt_tokens=_PROMPT_TOKENS, tokens=_TOKENS, began_s=0.0))
_SURE = 12
"""So many requests in a row have been answered by both workers."""
_FORGETS_S = 2.0
"""Less than this lost at the end of a snapshot is not taken for a loss."""


class _Seen(msgspec.Struct):
    """One request: when it was sent, how long it took and what came."""

    at_s: float
    took_s: float
    status: int
    code: str | None
    worker: str


class _Store:
    """A Redis that can be broken in every way, at an address that stays the same."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self.server = self._stack.enter_context(running_redis(folder=folder))
        self.relay: Relay = self._stack.enter_context(relay_to(self.server.port))

    def begin(self, fault: Fault) -> None:
        if fault == "frozen":
            os.kill(self.server.pid, signal.SIGSTOP)
        elif fault == "slow":
            self.relay.delay_s = 2.0
        else:
            if fault == "gone":
                self.save()
            kill(self.server)

    def end(self, fault: Fault) -> None:
        if fault == "frozen":
            os.kill(self.server.pid, signal.SIGCONT)
        elif fault == "slow":
            self.relay.delay_s = 0.0
        else:
            if fault == "empty":
                self._folder.joinpath("dump.rdb").unlink(missing_ok=True)
            before = self.server
            again = running_redis(before.port, password=before.password, folder=self._folder)
            self.server = self._stack.enter_context(again)

    def save(self) -> None:
        assert "+OK" in say(self.server, "SAVE")

    def close(self) -> None:
        self._stack.close()


def run(seed: int, size: Size) -> Figures:
    """Play the faults one after the other, each on keys of its own."""
    random = Random(seed)
    faults: list[Fault] = list(_FAULTS) if size == "full" else ["frozen", "empty"]
    random.shuffle(faults)
    lasts_s = 3.0 if size == "full" else 0.8
    figures: Figures = {}
    with _running(faults) as (site, store):
        # Whoever is the first to be counted waits for that to be made ready.
        uvloop.run(_count(site))
        for fault in faults:
            figures |= uvloop.run(_play(site, store, fault, lasts_s))
        site.sound()
    return dict(sorted(figures.items()))


@contextmanager
def _running(faults: Sequence[Fault]) -> Iterator[tuple[Site, _Store]]:
    with ExitStack() as stack:
        folder = stack.enter_context(folder_for_a_test())
        data = folder / "redis"
        data.mkdir()
        store = _Store(data)
        stack.callback(store.close)
        upstream: Metered = stack.enter_context(metered(SMALL, "big-7b"))
        keys = [_FREE, _NEAR, *(f"{fault}-{mode}" for fault in faults for mode in _MODES)]
        limits = [_limit(fault, mode) for fault in faults for mode in _MODES]
        limits.append({"name": _NEAR, "scope": {"key": _NEAR}, "tokens": {"limit": 100, "per": "day"}})
        state = redis_state(folder, store.server, store.relay.port)
        gateway = Gateway(config_of(upstream.port, keys, limits, state), folder, "--workers", "2")
        stack.callback(gateway.process.stop)
        assert gateway.all_up()
        yield Site(gateway, upstream, store.server, folder), store


async def _count(site: Site) -> None:
    await asyncio.gather(*(_once(site, _NEAR, []) for _ in range(20)))
    await asyncio.sleep(0.3)


def _limit(fault: Fault, mode: Mode) -> dict[str, Any]:
    key = f"{fault}-{mode}"
    noun: dict[str, Any] = {"name": f"of-{key}", "scope": {"key": key}, "when_down": mode, "max_wait": "0s"}
    if fault in _LOSES:
        # What a request reserves is more than it uses, so the last ones may not fit.
        return noun | {"spend": {"usd": f"{_LIMIT * _EACH_NUSD / 1e9:.9f}"}}
    return noun | {"requests": {"limit": _LIMIT, "per": "day"}}


async def _play(site: Site, store: _Store, fault: Fault, lasts_s: float) -> Figures:
    seen: dict[Mode, list[_Seen]] = {mode: [] for mode in _MODES}
    unlimited: list[_Seen] = []
    if fault == "old":
        # One request of each key is known to the snapshot, the others are not.
        await asyncio.gather(*(_once(site, f"{fault}-{mode}", seen[mode]) for mode in _MODES))
        assert site.at_rest([f"{fault}-{mode}" for mode in _MODES])
        store.save()
        await asyncio.sleep(_FORGETS_S + 0.5)
    for _ in range(8):
        await asyncio.gather(*(_once(site, f"{fault}-{mode}", seen[mode]) for mode in _MODES))
    if fault in _LOSES:
        # What is in flight at that moment would be known to whoever tells the totals, or not.
        assert site.at_rest([f"{fault}-{mode}" for mode in _MODES])
    over = asyncio.Event()
    asking = [_ask_until(over, site, f"{fault}-{mode}", seen[mode]) for mode in _MODES]
    asking += [_ask_until(over, site, _FREE, unlimited) for _ in range(_FREE_CLIENTS)]
    if fault in _LOSES:
        store.begin(fault)
        began_s = monotonic()
        tasks = [asyncio.create_task(one) for one in asking]
    else:
        tasks = [asyncio.create_task(one) for one in asking]
        await asyncio.sleep(0.05)
        store.begin(fault)
        began_s = monotonic()
    await asyncio.sleep(lasts_s)
    ended_s = monotonic()
    over.set()
    await asyncio.gather(*tasks)
    # In this thread, whose end the process is bound to.
    store.end(fault)
    assert await asyncio.to_thread(wait_until, lambda: _together(site), 10), "some worker counts by itself"
    back_s = monotonic() - ended_s
    figures = _check_modes(fault, seen, began_s, ended_s) | _check_waits(fault, seen, unlimited, began_s)
    await _check_after(site, fault, seen, began_s)
    return figures | {f"{fault}: counted together again after, s": round(back_s, 2)}


async def _ask_until(over: asyncio.Event, site: Site, key: str, seen: list[_Seen]) -> None:
    while not over.is_set():
        await _once(site, key, seen)
        await asyncio.sleep(0.01)


async def _once(site: Site, key: str, seen: list[_Seen]) -> None:
    plan = Plan(tag=key, number=len(seen), tokens=_TOKENS, prompt_tokens=_PROMPT_TOKENS)
    began_s = monotonic()
    answer = await ask(site.gateway.port, ask_for(key, plan, max_tokens=_TOKENS))
    worker = answer.headers["x-tierway-exchange-id"].partition("-")[0]
    seen.append(_Seen(began_s, monotonic() - began_s, answer.status, _code(answer), worker))


def _code(answer: Answer) -> str | None:
    if answer.status == 200:
        return None
    code: str = msgspec.json.decode(answer.body)["error"]["code"]
    return code


def _together(site: Site) -> bool:
    return b"\ntierway_limits_apart 0\n" in site.gateway.get("/metrics").body


# -- the checks ------------------------------------------------------------------------------------------------------


def _check_waits(fault: Fault, seen: dict[Mode, list[_Seen]], unlimited: Sequence[_Seen], began_s: float) -> Figures:
    assert {one.status for one in unlimited} == {200}
    within = [one for mine in seen.values() for one in mine if one.at_s + one.took_s >= began_s]
    assert len(within) > 3 * len(_MODES), "too few requests for this to show anything"
    added_ms = sorted(1000 * (one.took_s - _noise_s(one, unlimited)) for one in within)
    usual_ms = 1000 * statistics.median(one.took_s for one in unlimited)
    assert added_ms[-1] < _BOUND_MS + _NOISE_MS, f"{fault}: {added_ms[-1]:.0f} ms more than others at the time"
    return {
        f"{fault}: usual, p50 ms": round(usual_ms, 1),
        f"{fault}: p50 in it, ms": round(1000 * statistics.median(one.took_s for one in within), 1),
        f"{fault}: most that it added, ms": round(max(0.0, added_ms[-1]), 1),
    }


def _noise_s(one: _Seen, unlimited: Sequence[_Seen]) -> float:
    """Return how long those took that were open at the same time and wait for no store."""
    end_s = one.at_s + one.took_s
    beside = [other.took_s for other in unlimited if other.at_s < end_s and other.at_s + other.took_s > one.at_s]
    return max(beside, default=0.0)


def _check_modes(fault: Fault, seen: dict[Mode, list[_Seen]], began_s: float, ended_s: float) -> Figures:
    # Once a worker has seen the fault; it may take each of them as long as its store is given.
    known_s = began_s + 0.25
    told = {mode: [one for one in seen[mode] if known_s <= one.at_s <= ended_s] for mode in _MODES}
    assert {one.code for one in seen["open"]} <= {None, "rate_limit_exceeded", "insufficient_quota"}
    assert all(one.status == 200 for one in told["open"]), f"{fault}: open, and {_codes(told['open'])}"
    assert told["closed"]
    assert {one.code for one in told["closed"]} == {"limits_unavailable"}, f"{fault}: closed, {_codes(told['closed'])}"
    assert {one.status for one in told["closed"]} == {503}
    passed = sum(one.status == 200 for one in seen["share"])
    allowed = _LIMIT + _unseen([one for one in seen["share"] if one.at_s + one.took_s < began_s])
    assert passed <= allowed, f"{fault}: {passed} passed of {_LIMIT}"
    assert {one.code for one in seen["share"]} <= {None, "rate_limit_exceeded", "insufficient_quota"}
    assert any(one.status == 200 for one in told["share"]), f"{fault}: share, and {_codes(told['share'])}"
    return {f"{fault}: passed by share, of {_LIMIT}": float(passed)}


def _unseen(before: Sequence[_Seen]) -> int:
    """Return how many were let in by one worker that the other could not know of when it was left alone."""
    last = before[-1].worker
    return next((number for number, one in enumerate(reversed(before)) if one.worker != last), len(before))


def _codes(seen: list[_Seen]) -> list[tuple[int, str | None]]:
    return sorted({(one.status, one.code) for one in seen}, key=str)


async def _check_after(site: Site, fault: Fault, seen: dict[Mode, list[_Seen]], began_s: float) -> None:
    """See that everything is counted that was let through, or that the mode still holds where it cannot be."""
    assert site.at_rest([f"{fault}-{mode}" for mode in _MODES])
    for mode in _MODES:
        passed = sum(one.status == 200 for one in seen[mode])
        (shown,) = site.limits(f"{fault}-{mode}")
        if fault not in _LOSES:
            # A day's limit drains by one in half an hour.
            assert passed - 1 <= shown.used <= passed, f"{fault}-{mode}: {shown}, but {passed} were let through"
            continue
        await _once(site, f"{fault}-{mode}", seen[mode])
        last = seen[mode][-1]
        expected = {"open": {200}, "closed": {503}, "share": {200, 402}}[mode]
        assert last.status in expected, f"{fault}-{mode}: {last} while nobody has told what had been spent"
    if fault in _LOSES:
        await _seed(site, fault, seen, began_s)


async def _seed(site: Site, fault: Fault, seen: dict[Mode, list[_Seen]], began_s: float) -> None:
    """Tell what had been spent, twice at the same time; then everything must be known that ever was let through."""
    totals = []
    for mode in _MODES:
        spent = _EACH_NUSD * sum(one.status == 200 for one in seen[mode] if one.at_s < began_s)
        key = f"{fault}-{mode}"
        totals.append({"limit": f"of-{key}", "scope": {"key": key}, "usd": f"{spent / 1e9:.9f}"})
    (config,) = site.folder.glob("gateway-*.yaml")
    file = site.folder / f"{fault}.json"
    file.write_bytes(msgspec.json.encode({"totals": totals}))
    argv = ["-m", "gateway.cli", "limits", "seed", str(file), "--config", str(config)]
    racing = [Process(argv, site.folder / f"{fault}-{number}.log") for number in range(2)]
    for one in racing:
        assert await asyncio.to_thread(one.wait) == 0, one.said()
    assert sum("had its totals already" not in one.said() for one in racing) == 1, [one.said() for one in racing]
    until_s = monotonic() + 5
    streak = 0
    while streak < _SURE:
        await _once(site, f"{fault}-closed", seen["closed"])
        streak = 0 if seen["closed"][-1].code == "limits_unavailable" else streak + 1
        assert monotonic() < until_s, f"{fault}: some worker has not heard of the totals: {seen['closed'][-1]}"
    assert site.at_rest([f"{fault}-{mode}" for mode in _MODES])
    for mode in _MODES:
        passed = sum(one.status == 200 for one in seen[mode])
        (shown,) = site.limits(f"{fault}-{mode}")
        assert shown.used == passed * _EACH_NUSD, f"{fault}-{mode}: {shown}, but {passed} passed at {_EACH_NUSD}"
