"""Of what has somebody to hear? Of budgets that pass a part of themselves, hours unlike others, a ledger that fails.

Whatever is found gets an id that says what it was: its process claims it in the ledger (`alert_book.py`), so that of
all workers and replicas one tells, and what was not told before a restart is told after it. While the ledger cannot be
asked everyone tells: receivers drop what they have by its id.

Never a word of a prompt or an answer, and never a secret.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from typing import TypeVar

import msgspec

from gateway.alert_book import KINDS, Alert, AlertBook, Kind
from gateway.config import model as noun
from gateway.config.load import Loaded
from gateway.config.problem import ConfigError
from gateway.config.secrets import Secret
from gateway.ledger.contract import LedgerDown, Store
from gateway.ledger.hourly import HOUR_MS, HourlySpend, Series
from gateway.metrics import Labels
from gateway.webhooks import AFTER_S, Ending, Message, Webhook, signing_key
from policies.anomaly import QUIET_HOURS, Past, Verdict, begins, judge
from policies.cost import usd
from policies.limits import Account, capacity
from policies.thresholds import next_amount, passed, window_of

_VERSION = 1
_MOST_FOUND = 1000
_MOST_MARKS = 50_000
_MOST_SHOWN = 100
_LONGEST_WHY = 500
_NEVER = 2**63
_LEAST_NUSD = 1_000_000_000
"""An hour is no anomaly by less than a dollar."""
_EVERY_S = 300.0
_SETTLES_MS = 120_000
"""So long after its end an hour is taken for complete."""
_log = logging.getLogger("tierway.alerts")

_T = TypeVar("_T")


class Ways(msgspec.Struct, frozen=True, kw_only=True):
    """What is told. `budgets` are parts of `spend` limits; `anomalies` where spending by the hour is watched."""

    budgets: tuple[float, ...] = (0.5, 0.8, 1.0)
    anomalies: bool = True


def alerts_of(
    loaded: Loaded,
    secrets: Mapping[noun.SecretRef, Secret],
    *,
    instance: str,
    store: Store | None,
    watches: bool,
) -> Alerts:
    """Return the alerts of a configuration; see `Alerts`. Raises `ConfigError` where a secret is no signing secret."""
    settings = loaded.config.ledger.alerts
    webhooks = []
    for number, hook in enumerate(settings.webhooks):
        try:
            key = signing_key(secrets[hook.secret].reveal())
        except ValueError as fault:
            place = ("ledger", "alerts", "webhooks", number, "secret")
            raise ConfigError((loaded.problem(place, str(fault)),)) from None
        webhooks.append(Webhook(hook.url, key))
    return Alerts(
        Ways(budgets=settings.budgets, anomalies=settings.anomalies),
        instance=instance,
        store=store,
        webhooks=webhooks,
        watches=watches,
        lease_s=loaded.config.ledger.lease,
    )


class _Mark(msgspec.Struct):
    """How an account stands, and the amount at which something is to be told next."""

    limit: str
    most: int
    used: int
    due: int
    until_ms: int


class Alerts:
    """The alerts of a process. `watching` is what admission tells of budgets.

    `store` is one of its own: its rows are written by another thread than those of requests. Without one nothing is
    claimed, nothing survives a restart, and there are no anomalies. `watches` says that it is this process, of all
    workers of its replica, that looks for anomalies and for alerts that nobody tells.
    """

    def __init__(
        self,
        ways: Ways,
        *,
        instance: str,
        store: Store | None = None,
        webhooks: Sequence[Webhook] = (),
        watches: bool = True,
        lease_s: float = 30.0,
        every_s: float = _EVERY_S,
        most_found: int = _MOST_FOUND,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._ways = ways
        self._instance = instance
        self._webhooks = tuple(webhooks)
        self._watches = watches
        self._every_s = every_s
        self._now_s = now_s
        self._book = None if store is None else AlertBook(store, instance=instance, lease_s=lease_s)
        self._spend = HourlySpend(store) if store is not None and ways.anomalies else None
        self._found: asyncio.Queue[Alert] = asyncio.Queue(most_found)
        self._marks: dict[str, _Mark] = {}
        self._counts: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self._shown: Mapping[Labels, float] = {}
        self._judged: int | None = None
        self._down_since_ms: int | None = None
        self._noting: set[tuple[str, str]] = set()
        self._writer = ThreadPoolExecutor(1, "tierway-alerts")
        self._reader = ThreadPoolExecutor(1, "tierway-anomalies")
        self._closing = threading.Event()
        self._loops: list[asyncio.Task[None]] = []
        self._notes: set[asyncio.Task[None]] = set()

    # -- what is found ------------------------------------------------------------------------------------------------

    def watching(self, account: Account, used_nusd: int, now_ms: int) -> None:
        """Note how a `spend` account stands; half a microsecond where nothing is passed. Never waits."""
        mark = self._marks.get(account.name)
        if mark is not None and now_ms < mark.until_ms:
            mark.used = used_nusd
            if used_nusd < mark.due:
                return
        self._pass(account, used_nusd, now_ms)

    def _pass(self, account: Account, used: int, now_ms: int) -> None:
        window = window_of(account.rule(now_ms), now_ms)
        parts, most = self._ways.budgets, capacity(account.meter.rule)
        due = next_amount(parts, most, used)
        until_ms = _NEVER if window.end_ms is None else window.end_ms
        mark = _Mark(account.limit.name, most, used, _NEVER if due is None else due, until_ms)
        part = passed(parts, most, used)
        if part is not None:
            data = {
                "limit": account.limit.name,
                "scope": account.scope,
                "part": part,
                "used_usd": usd(used),
                "limit_usd": usd(most),
                "window": {"start": _moment(window.start_ms), "end": _moment(window.end_ms)},
                "shadow": account.limit.shadow,
            }
            what = (account.name, most, window.start_ms, part)
            if not self._find("budget.threshold", what, data):
                mark.due = 0  # there is no room for it now: the next request says it again
        self._marks[account.name] = mark
        while len(self._marks) > _MOST_MARKS:
            del self._marks[next(iter(self._marks))]

    def unwritable(self, since_ms: int, why: str) -> None:
        """Say that the ledger has not been writable since then. Told once; `why` is for the operator. Never waits."""
        if since_ms == self._down_since_ms:
            return
        self._down_since_ms = since_ms
        data = {"instance": self._instance, "since": _moment(since_ms), "reason": why[:_LONGEST_WHY]}
        self._find("ledger.unwritable", (self._instance, since_ms), data)

    def _find(self, kind: Kind, what: tuple[object, ...], data: Mapping[str, object]) -> bool:
        """Have an alert told unless it has been; whether there is room for it. The id is that of what happened."""
        id_ = f"{kind.partition('.')[0]}-{sha256(msgspec.json.encode((kind, *what))).hexdigest()[:32]}"
        at_ms = self._now_ms()
        body = {"id": id_, "type": kind, "version": _VERSION, "timestamp": _moment(at_ms), "data": data}
        try:
            self._found.put_nowait(Alert(id=id_, at_ms=at_ms, kind=kind, payload=msgspec.json.encode(body).decode()))
        except asyncio.QueueFull:
            return False
        return True

    # -- who is told --------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Begin. Waits for nothing."""
        for webhook in self._webhooks:
            webhook.open(partial(self._ended, webhook.digest))
        self._loops.append(asyncio.create_task(self._keep_telling()))
        if self._book is not None and self._watches:
            self._loops.append(asyncio.create_task(self._keep_watching(self._book)))

    async def close(self) -> None:
        """Stop. What was claimed and not taken is told by the next process that has this ledger."""
        self._closing.set()
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        for webhook in self._webhooks:
            await webhook.close()
        await asyncio.gather(*self._notes, return_exceptions=True)
        if self._book is not None:
            await self._in(self._writer, self._book.close)
        for thread in (self._writer, self._reader):
            await asyncio.to_thread(thread.shutdown)

    async def _keep_telling(self) -> None:
        while True:
            alert = await self._found.get()
            if await self._claimed(alert):
                self._counts[alert.kind] += 1
                _log.warning("%s", alert.payload)
                self._tell(alert, frozenset())

    async def _claimed(self, alert: Alert) -> bool:
        if self._book is None:
            return True
        try:
            return await self._in(self._writer, partial(self._book.claim, alert, self._now_ms()))
        except Exception as fault:  # noqa: BLE001 - whatever is wrong with the ledger, somebody has to hear
            _log.warning("alert %s is told without the ledger, and may be told twice: %s", alert.id, fault)
            return True

    def _tell(self, alert: Alert, told: frozenset[str]) -> None:
        age_s = max(0.0, (self._now_ms() - alert.at_ms) / 1000)
        message = Message(alert.id, alert.payload.encode(), age_s)
        for webhook in self._webhooks:
            if webhook.digest not in told and (alert.id, webhook.digest) not in self._noting:
                webhook.send(message)

    def _ended(self, webhook: str, id_: str, ending: Ending) -> None:
        if self._book is not None:
            self._noting.add((id_, webhook))
            note = asyncio.create_task(self._note(self._book, id_, webhook, ending))
            self._notes.add(note)
            note.add_done_callback(self._notes.discard)

    async def _note(self, book: AlertBook, id_: str, webhook: str, ending: Ending) -> None:
        try:
            await self._in(self._writer, partial(book.end, id_, webhook, ending, self._now_ms()))
        except LedgerDown as fault:
            _log.warning("that alert %s was told is not noted, and it may be told twice: %s", id_, fault)
        finally:
            self._noting.discard((id_, webhook))

    # -- what is looked for -------------------------------------------------------------------------------------------

    async def _keep_watching(self, book: AlertBook) -> None:
        while True:
            try:
                await self._take_over(book)
                if self._spend is not None:
                    await self._look_for_anomalies(self._spend)
            except LedgerDown as fault:
                _log.warning("the ledger cannot be asked for anomalies and for what is not told yet: %s", fault)
            except Exception:  # noqa: BLE001 - the outermost boundary: what is wrong now may be right in five minutes
                _log.exception("looking for anomalies failed")
            await asyncio.sleep(self._every_s)

    async def _take_over(self, book: AlertBook) -> None:
        """Tell what was found here before a restart, and by processes that are dead."""
        digests = [webhook.digest for webhook in self._webhooks]
        now_ms = self._now_ms()
        since_ms = now_ms - round(sum(AFTER_S) * 1000)
        for one in await self._in(self._writer, partial(book.unfinished, digests, since_ms, now_ms)):
            self._tell(one.alert, one.told)

    async def _look_for_anomalies(self, spend: HourlySpend) -> None:
        now_ms = self._now_ms()
        complete = (now_ms - _SETTLES_MS) // HOUR_MS - 1
        judged = complete - QUIET_HOURS if self._judged is None else max(self._judged, complete - QUIET_HOURS)
        new = range(judged + 1, complete + 1)
        found, shown = await self._in(self._reader, partial(_anomalies, spend, now_ms, new, self._closing.is_set))
        if shown is not None:
            self._judged, self._shown = complete, shown
        for series, hour, verdict in found:
            data = {
                "of": series.of,
                "name": series.name,
                "hour": _moment(hour * HOUR_MS),
                "complete": hour <= complete,
                "what": verdict.word,
                "observed_usd": usd(verdict.observed_nusd),
                "expected_usd": usd(verdict.expected_nusd),
                "score": round(verdict.score, 2),
                "reason": verdict.reason,
            }
            self._find("spend.anomaly", (series.of, series.name, hour, verdict.word), data)

    def _now_ms(self) -> int:
        return round(self._now_s() * 1000)

    @staticmethod
    async def _in(thread: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(thread, work)

    # -- metrics ------------------------------------------------------------------------------------------------------

    def numbers(self) -> Mapping[str, Mapping[Labels, float]]:
        """Return what metrics show. Of several processes the greatest ratio of a limit counts, all else adds up."""
        now_ms = self._now_ms()
        ratios: dict[Labels, float] = {}
        for mark in self._marks.values():
            if now_ms < mark.until_ms and mark.most:
                ratios[(mark.limit,)] = max(ratios.get((mark.limit,), 0.0), mark.used / mark.most)
        attempts: dict[Labels, float] = {}
        for webhook in self._webhooks:
            for outcome, times in webhook.attempts.items():
                attempts[(outcome,)] = attempts.get((outcome,), 0.0) + times
        return {
            "tierway_alerts_total": {(kind,): float(times) for kind, times in self._counts.items()},
            "tierway_alerts_undelivered": {(): float(sum(webhook.waiting for webhook in self._webhooks))},
            "tierway_alert_attempts_total": attempts,
            "tierway_budget_used_ratio": ratios,
            "tierway_spend_anomaly": self._shown,
        }


_Found = list[tuple[Series, int, Verdict]]


def _anomalies(
    spend: HourlySpend, now_ms: int, new: range, stop: Callable[[], bool]
) -> tuple[_Found, Mapping[Labels, float] | None]:
    """Judge the hours in `new`, which are over, and the running one; return what begins there, and what to show.

    The running hour is judged by what it has come to so far: more can follow, so a spike is one already, and nothing
    else is known of it. What is shown is None where it was stopped, or no hour is new.
    """
    running = spend.read(now_ms, stop)
    found: _Found = []
    scores: list[tuple[int, Labels, float]] = []
    for series, past in spend.all():
        if stop():
            return [], None
        last = len(past.nusd) - 1
        for hour in (*new, running):
            at = last - (running - hour)
            verdict = judge(past, at, least_nusd=_LEAST_NUSD)
            wanted = ("spike",) if hour == running else ("spike", "drop")
            if verdict.word in wanted and begins(past, at, least_nusd=_LEAST_NUSD):
                found.append((series, hour, verdict))
            if hour == new.stop - 1 and verdict.word != "unknown":
                scores.append(_shown(series, past, verdict))
    dearest = sorted(scores, reverse=True)[:_MOST_SHOWN]
    return found, {labels: score for _, labels, score in dearest} if new else None


def _shown(series: Series, past: Past, verdict: Verdict) -> tuple[int, Labels, float]:
    odd = verdict.word in ("spike", "drop")
    return sum(past.nusd), (series.of, series.name or ""), round(verdict.score, 2) if odd else 0.0


def _moment(at_ms: int | None) -> str | None:
    return None if at_ms is None else datetime.fromtimestamp(at_ms / 1000, UTC).isoformat().replace("+00:00", "Z")
