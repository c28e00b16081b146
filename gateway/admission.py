"""May this request be answered now? One reservation of what it can come to, in every limit that counts it.

Admitted, refused, or told to wait its turn: a request that would fit if others gave back what they hold waits for that,
one that used amounts alone keep out is refused at once. Attempts on a tier that has limits or a queue of its own go
the same way when they start; there a refusal means that the tier is full, and the cascade goes on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from time import monotonic, time
from typing import Any, Literal, Protocol, TypeVar

import msgspec

from gateway.decision import Header
from gateway.errors import Refusal
from gateway.limiter import Closed, Item, Limiter, Order
from gateway.metrics import Metrics
from gateway.refusing import rate_headers, refusal_of, why_closed
from gateway.waiting import StillFull, Ticket, WaitingRoom
from policies.access import Caller
from policies.accounts import Short, Standing
from policies.books import Granted, Refused
from policies.limits import Account, Dimension, Facts, Limit, Need, Use, accounts_of, capacity

PartitionBy = Literal["deployment", "team", "key"]

_ALL = "deployment"
_WITHIN: dict[PartitionBy, frozenset[Dimension]] = {"team": frozenset(("key", "team")), "key": frozenset(("key",))}
"""What a limit has to count apart so that it does not cross partitions."""
_KEPT_FACTS = 10_000
_KEPT_STANDINGS = 10_000
_TIGHT = 0.8
_LOOSEST = 16
"""An upper bound on tokens is never further from the truth than that."""

_UNKNOWN = Short(0, "reserved", -1)
"""Why an order was refused, where nobody can say."""

_T = TypeVar("_T")


class WhileHere(Protocol):
    """Awaits something unless the client leaves. Raises `Refusal` if it does."""

    def __call__(self, waiting: Coroutine[Any, Any, _T]) -> Awaitable[_T]: ...


class Watching(Protocol):
    """Hears of every account of spending that is seen, how much of it is used, and when."""

    def __call__(self, account: Account, used_nusd: int, now_ms: int, /) -> None: ...


class Reservation:
    """What an exchange, or one attempt, holds. It is settled or cancelled once; more often does no harm.

    `waited_s` is how long it took to get a turn. Without any account it is nothing, and costs nothing. `settled` hears
    what was counted.
    """

    def __init__(
        self,
        limiter: Limiter | None = None,
        order: Order | None = None,
        accounts: Sequence[Account] = (),
        standings: Sequence[Standing] = (),
        settled: Callable[[tuple[int, ...]], None] | None = None,
    ) -> None:
        self._limiter = limiter
        self._order = order
        self._accounts = accounts
        self._standings = standings
        self._settled = settled
        self.waited_s = 0.0

    @property
    def held(self) -> bool:
        """Whether there is anything to settle."""
        return self._order is not None

    def settle(self, use: Use, at_ms: int = 0) -> None:
        """Count what was used and give back the rest; never waits. `at_ms`: when its bill was made, 0: now."""
        limiter, order = self._taken()
        if limiter is not None and order is not None:
            counted = _counted(self._accounts, use)
            limiter.settle(order, counted, at_ms)
            if self._settled is not None:
                self._settled(counted)

    def cancel(self) -> None:
        """Undo it: nothing was asked of anybody."""
        limiter, order = self._taken()
        if limiter is not None and order is not None:
            limiter.cancel(order)

    def _taken(self) -> tuple[Limiter | None, Order | None]:
        taken = self._limiter, self._order
        self._limiter = self._order = None
        return taken

    def headers(self) -> list[Header]:
        """Return OpenAI's `x-ratelimit-*`."""
        return rate_headers(self._accounts, self._standings)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Who wants what. `so_far` says at any time what has been used."""

    id: str
    caller: Caller
    facts: Facts
    need: Need
    so_far: Callable[[], Use]


class Admission:
    """The way in. `limits` are those of the configuration, with one for the queue of each tier."""

    def __init__(
        self,
        limiter: Limiter,
        limits: Sequence[Limit],
        *,
        partition: PartitionBy = "deployment",
        metrics: Metrics,
        most_waiting: int = 10_000,
        watching: Watching | None = None,
    ) -> None:
        self.limits = tuple(limits)
        self._limiter = limiter
        self._of_requests = tuple(limit for limit in limits if not limit.of_attempts)
        self._of_attempts = tuple(limit for limit in limits if limit.of_attempts)
        self._partition = partition
        self._metrics = metrics
        self._watching = watching
        self._room: WaitingRoom[Reservation] = WaitingRoom(size=most_waiting, undo=Reservation.cancel)
        self._known: OrderedDict[Facts, tuple[Account, ...]] = OrderedDict()
        self._seen: OrderedDict[str, int] = OrderedDict()
        self._ahead_ms = time() * 1000 - monotonic() * 1000
        limiter.subscribe(self._room.freed)

    @property
    def waiting(self) -> int:
        """How many wait now."""
        return self._room.waiting

    def now_ms(self) -> int:
        """Return the time by the clock that counts, which is not always this machine's."""
        return int(monotonic() * 1000 + self._ahead_ms)

    def accounts(self, facts: Facts) -> tuple[Account, ...]:
        """Return what counts a request, or an attempt where the facts name a tier."""
        known = self._known.get(facts)
        if known is None:
            limits = self._of_requests if facts.tier is None else self._of_attempts
            known = self._known[facts] = accounts_of(limits, facts) if limits else ()
            if len(self._known) > _KEPT_FACTS:
                self._known.popitem(last=False)
        return known

    def tight(self, facts: Facts, need: Need) -> bool:
        """Whether a request comes so near to a limit that its size should be known better. By what was seen last.

        Not where it would not fit however well it is known: a flood is not worth counting.
        """
        for account in self.accounts(facts):
            amount = need.of(account.limit, account.meter)
            if amount:
                left = capacity(account.meter.rule) - self._seen.get(account.name, 0)
                if _TIGHT * left < amount < _LOOSEST * left:
                    return True
        return False

    async def admit(self, request: Request, while_here: WhileHere | None = None) -> Reservation:
        """Reserve, and wait for a turn if there is one to come. Raises `Refusal`.

        `while_here` is what to await a wait with; None where whoever waits is cancelled from outside.
        """
        accounts = self.accounts(request.facts)
        if not accounts:
            return Reservation()
        order = self._order(request, accounts)
        busy = next((one.name for one in accounts if _waits(one.limit) and self._room.busy(one.name)), None)
        if busy is None:
            got = await self._reserve(request, accounts, order)
            if isinstance(got, Reservation):
                return got
            busy = got.account
        waiting = self._wait(busy, request, accounts, order)
        return await (waiting if while_here is None else while_here(waiting))

    async def _wait(self, account: str, request: Request, accounts: tuple[Account, ...], order: Order) -> Reservation:
        began_s = monotonic()
        limit = next(one.limit for one in accounts if one.name == account)
        ticket = Ticket(
            priority=request.caller.priority,
            team=request.caller.team or "",
            until_s=began_s + (limit.max_wait_s or 0.0),
            most_waiting=limit.most_waiting,
        )
        got = await self._room.wait(account, ticket, partial(self._reserve, request, accounts, order))
        if got is None:
            expected_s = self._room.expected_s(account, ticket.priority)
            raise await self._too_long(accounts, order, expected_s)
        got.waited_s = monotonic() - began_s
        return got

    async def _reserve(self, request: Request, accounts: tuple[Account, ...], order: Order) -> Reservation | StillFull:
        """Ask once. Raises `Refusal` where waiting is no use."""
        reply = await self._limiter.reserve(order, lambda: _counted(accounts, request.so_far()))
        if isinstance(reply, Closed):
            raise why_closed([accounts[index] for index in reply.indices])
        self._look(reply, accounts)
        if isinstance(reply, Granted):
            settled = None if self._watching is None else partial(self._settled, self._watching, accounts, reply)
            return Reservation(self._limiter, order, accounts, reply.standings, settled)
        short = [one for one in reply.short if not accounts[one.index].limit.shadow]
        if short and all(one.why == "reserved" and _waits(accounts[one.index].limit) for one in short):
            return StillFull(accounts[short[0].index].name)
        # The store gives no reason where it has cancelled this id before.
        raise self._refusal(accounts, order, reply.standings, short or [_UNKNOWN])

    async def _too_long(self, accounts: tuple[Account, ...], order: Order, expected_s: float) -> Refusal:
        """Say how things stand now that the wait has ended."""
        standings = await self._limiter.look(order.partition, order.items)
        short = [
            Short(number, "reserved", round(expected_s * 1000))
            for number, (account, standing) in enumerate(zip(accounts, standings, strict=True))
            if _waits(account.limit) and self._room.busy(account.name) and standing.reserved
        ]
        return self._refusal(accounts, order, standings, short or [_UNKNOWN])

    def _refusal(
        self, accounts: Sequence[Account], order: Order, standings: Sequence[Standing], short: Sequence[Short]
    ) -> Refusal:
        for one in short:
            account = accounts[one.index]
            self._metrics.limited(account.limit.name, account.meter.measure, shadow=False)
        return refusal_of(accounts, [item.entry for item in order.items], standings, short)

    def _look(self, reply: Granted | Refused, accounts: Sequence[Account]) -> None:
        """Learn from a reply: the time, and how full the accounts are."""
        self._ahead_ms = reply.now_ms - monotonic() * 1000
        for account, standing in zip(accounts, reply.standings, strict=True):
            self._seen[account.name] = standing.used + standing.reserved
            if self._watching is not None and account.meter.measure == "spend":
                self._watching(account, standing.used, reply.now_ms)
        while len(self._seen) > _KEPT_STANDINGS:
            self._seen.popitem(last=False)
        for one in reply.short:
            if accounts[one.index].limit.shadow:
                self._metrics.limited(accounts[one.index].limit.name, accounts[one.index].meter.measure, shadow=True)

    def _settled(
        self, watching: Watching, accounts: Sequence[Account], granted: Granted, counted: tuple[int, ...]
    ) -> None:
        """Tell how much of a budget is used after a settlement: at least what was when it was granted, and this.

        The store says it exactly, but not before the next request. What was used in a window that has ended since does
        not count.
        """
        now_ms = self.now_ms()
        for account, standing, amount in zip(accounts, granted.standings, counted, strict=True):
            same_window = standing.reset_ms < 0 or now_ms < granted.now_ms + standing.reset_ms
            if amount and same_window and account.meter.measure == "spend":
                watching(account, standing.used + amount, now_ms)

    def _order(self, request: Request, accounts: Sequence[Account]) -> Order:
        now_ms = self.now_ms()
        items = tuple(Item(account.entry(request.need, now_ms), account.limit.when_down) for account in accounts)
        return Order(request.id, self.partition_of(request.facts, accounts), items)

    def partition_of(self, facts: Facts, accounts: Sequence[Account]) -> str:
        """Return where these accounts are counted. The configuration was checked: they are all of one partition."""
        if self._partition == "deployment":
            return _ALL
        if not any(one.limit.counts_by(_WITHIN[self._partition]) for one in accounts):
            return f"tier={facts.tier}"
        return f"key={facts.key}" if self._partition == "key" else f"team={facts.team or ''}"

    async def standings(self, all_facts: Sequence[Facts]) -> list[tuple[Account, Standing]]:
        """Return how every account that counts any of these stands, each once."""
        found: dict[str, dict[str, Account]] = {}
        for facts in all_facts:
            accounts = self.accounts(facts)
            if accounts:
                found.setdefault(self.partition_of(facts, accounts), {}).update((one.name, one) for one in accounts)
        now_ms, nothing = self.now_ms(), Need.nothing()
        shown: list[tuple[Account, Standing]] = []
        for partition, by_name in found.items():
            items = tuple(Item(one.entry(nothing, now_ms), one.limit.when_down) for one in by_name.values())
            shown += zip(by_name.values(), await self._limiter.look(partition, items), strict=True)
        return shown

    def close(self) -> None:
        """Let nobody in any more."""
        self._room.close()


def _waits(limit: Limit) -> bool:
    return limit.max_wait_s is not None and not limit.shadow


def _counted(accounts: Sequence[Account], use: Use) -> tuple[int, ...]:
    return tuple(account.used(use) for account in accounts)
