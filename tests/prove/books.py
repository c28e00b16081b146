"""Does the script in Redis answer as `Books` does, and is every wait the shortest that helps?

Random sequences of operations on a few accounts go to both, at times that stand still, pass, jump over windows and
sometimes go back: every reply must be the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import msgspec
import redis

from gateway.limits_script import Answer, Command, Open, Opened, decode, encode, key, script
from policies.accounts import Account, Budget, Concurrency, Entry, Rate, Rolling, Rule, hold, room, take
from policies.books import (
    Announce,
    Books,
    Cancel,
    Charge,
    Done,
    Granted,
    Look,
    Operation,
    Refused,
    Renew,
    Reply,
    Reserve,
    Seed,
    Settle,
    Tell,
)
from tests.prove.proof import Figures, Size
from tests.servers.redis import running_redis

CLOCK = "cmsgpack.unpack(ARGV[1])[2]"
"""The clock of a simulated time: it stands in the header beside the epoch."""

_HOUR_MS = 3_600_000
_DAY_MS = 24 * _HOUR_MS
_START_MS = 1_800_000_000_000
_FURTHEST_BACK_MS = 60_000
_LOOKS_AT_THE_END = 3
_REMEMBERED_MS = (2 * 60_000, 10 * 60_000, _HOUR_MS, _DAY_MS)

# An account may find itself under another kind of rule. Not under the same with other windows or a lower limit: what
# was empty by the old ones may have been forgotten.
_OTHER_KINDS = {
    "rate": ("dayc", "winc", "rollc", "concc"),
    "day": ("ratec", "sumc", "rollc", "concc"),
    "sum": ("ratec", "dayc", "rollc", "concc"),
    "win": ("ratec", "dayc", "rollc", "concc"),
    "roll": ("ratec", "dayc", "winc", "concc"),
    "conc": ("ratec", "dayc", "sumc", "rollc"),
}


def run(seed: int, size: Size) -> Figures:
    """Compare sequences: 10,000 in all the seeds of the full size."""
    return compare(seed, 1000 if size == "full" else 100)


def compare(seed: int, sequences: int) -> Figures:
    """Send random sequences to `Books` and to a real Redis. Raises AssertionError where they differ."""
    rng = random.Random(seed)
    counts = {"granted": 0, "refused": 0, "operations": 0}
    with running_redis() as server, redis.Redis.from_url(server.url) as client:
        store = Simulated(client)
        for number in range(sequences):
            _Pair(store, f"s{number}", random.Random(rng.random())).play(counts)
            client.flushall()
    assert counts["granted"]
    assert counts["refused"]
    return {"sequences": sequences, **counts, "replies that differed": 0}


class Simulated:
    """The script in a real Redis, at times that the caller says."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._sha = client.script_load(script(CLOCK))

    def call(self, partition: str, epoch: str, now_ms: int, commands: Sequence[Command]) -> list[Answer]:
        """Do `commands` at `now_ms`."""
        _, *rest = encode(epoch, commands)
        header = msgspec.msgpack.encode((epoch, now_ms))
        return decode(self._client.evalsha(self._sha, 1, key("t", partition), header, *rest))


class _Pair:
    """Books and a partition of the store that live through the same."""

    def __init__(self, store: Simulated, partition: str, rng: random.Random) -> None:
        self._store = store
        self._partition = partition
        self._rng = rng
        self._books = Books()
        self._now_ms = self._latest_ms = _START_MS + rng.randrange(40 * _DAY_MS)
        self._runs = 0
        self._epoch = ""
        self._epoch = self._open("").epoch
        self._script = _Script(rng)
        # When something ends, by what was answered or what is documented: to the millisecond, and just before.
        self._moments: list[int] = []

    def _open(self, known: str) -> Opened:
        self._runs += 1
        # Far later than anything that was stored: an old copy.
        command = Open(f"run{self._runs}", known, self._latest_ms + _DAY_MS if known else 0)
        (answer,) = self._store.call(self._partition, "", self._now_ms, [command])
        assert isinstance(answer, Opened)
        assert answer.lost == (known != "")
        return answer

    def play(self, counts: dict[str, int]) -> None:
        for _ in range(self._rng.randrange(1, 40)):
            self._pass_time()
            if self._rng.random() < 0.02:
                opened = self._open(self._epoch)
                self._books.lose(opened.cut_ms)
                self._epoch = opened.epoch
            for answer in self._both(
                [self._script.operation(self._now_ms) for _ in range(self._rng.choice((1, 1, 1, 2, 8)))]
            ):
                counts["operations"] += 1
                counts["granted"] += isinstance(answer, Granted)
                counts["refused"] += isinstance(answer, Refused)
        self._end()

    def _both(self, operations: list[Operation]) -> list[Answer]:
        expected = [self._books.apply(operation, self._now_ms) for operation in operations]
        found = self._store.call(self._partition, self._epoch, self._now_ms, operations)
        for operation, mine, its in zip(operations, expected, found, strict=True):
            assert mine == its, f"at {self._now_ms}, {operation}\nbooks: {mine}\nredis: {its}"
        self._note(expected)
        return found

    def _note(self, replies: Sequence[Reply]) -> None:
        lasting_ms = [*_REMEMBERED_MS, 1000, self._script.longest_lease_ms]
        for reply in replies:
            if isinstance(reply, Granted | Refused):
                lasting_ms += [short.wait_ms for short in reply.short]
                lasting_ms += [standing.reset_ms for standing in reply.standings]
        self._moments = self._moments[-30:] + [self._now_ms + self._rng.choice(lasting_ms) for _ in range(3)]

    def _pass_time(self) -> None:
        rng = self._rng
        moments = [moment for moment in self._moments if moment > self._now_ms]
        if moments and rng.random() < 0.3:
            self._now_ms = rng.choice(moments) - rng.choice((0, 0, 1))
        elif rng.random() < 0.1:
            self._now_ms = max(self._now_ms - rng.randrange(1, 3000), self._latest_ms - _FURTHEST_BACK_MS)
        else:
            self._now_ms += rng.choice(
                (0, 1, rng.randrange(100), rng.randrange(3000), rng.randrange(90_000), rng.randrange(2 * _HOUR_MS))
            )
            if rng.random() < 0.03:
                self._now_ms += rng.randrange(35 * _DAY_MS)
        self._latest_ms = max(self._latest_ms, self._now_ms)

    def _end(self) -> None:
        """After the last lease nothing is reserved, and everything stands the same."""
        self._now_ms = self._latest_ms + self._script.longest_lease_ms
        for _ in range(_LOOKS_AT_THE_END):
            look = Look(tuple(Entry(name, rule) for name, rule in self._script.rules(self._now_ms)))
            for answer in self._both([look]):
                assert isinstance(answer, Done)
                assert not any(standing.reserved for standing in answer.standings), answer
            self._now_ms += self._rng.randrange(_DAY_MS)


class _Script:
    """What happens: random operations on few ids and few accounts."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._ids = [f"id{number}" for number in range(rng.choice((2, 6, 20)))]
        self._names = [f"{kind}{number}" for kind in ("rate", "day", "sum", "win", "roll", "conc") for number in "ab"]
        self._names = rng.sample(self._names, rng.randrange(1, 8))
        self._most = rng.choice((3, 20, 1000, 1_000_000_000))
        self._period_ms = rng.choice((1000, 60_000, _HOUR_MS))
        self.longest_lease_ms = 100_000

    def rules(self, now_ms: int) -> Iterator[tuple[str, Rule]]:
        """Yield every account with a rule of its kind; limits change from one time to the next."""
        for name in self._names:
            yield name, self._rule(name, now_ms)

    def operation(self, now_ms: int) -> Operation:
        rng = self._rng
        id_ = rng.choice(self._ids)
        lease_ms = rng.choice((1, 1000, rng.randrange(1, 3000), self.longest_lease_ms))
        entries = self._entries(now_ms)
        match rng.choices(range(9), (40, 20, 12, 8, 5, 4, 4, 2, 6))[0]:
            case 0:
                return Reserve(id_, entries, lease_ms)
            case 1:
                told = entries if rng.random() < 0.2 else ()
                if rng.random() < 0.5:
                    return Settle(id_, self._amounts(), told)
                return Settle(id_, self._amounts(), told, self._moment(now_ms), f"{id_}#" if rng.random() < 0.8 else "")
            case 2:
                return Renew(id_, self._amounts(), lease_ms)
            case 3:
                return Cancel(id_)
            case 4:
                return Announce(id_, entries, self._amounts(), lease_ms)
            case 5:
                return Charge(id_, entries, tuple(self._moment(now_ms) for _ in range(rng.randrange(3))))
            case 6:
                return Look(entries)
            case 7:
                return Seed(entries)
            case _:
                return self._bill(id_, entries, now_ms)

    def _bill(self, id_: str, entries: tuple[Entry, ...], now_ms: int) -> Tell:
        rng = self._rng
        signed = tuple(
            msgspec.structs.replace(entry, taken=entry.taken * rng.choice((1, 1, -1)), held=0) for entry in entries
        )
        times = tuple(self._moment(now_ms) for _ in range(rng.choice((0, 0, 1, 4))))
        of = (id_, rng.choice(self._ids)) if rng.random() < 0.6 else ()
        return Tell(f"{id_}#", signed, self._moment(now_ms), times, of, rng.random() < 0.7)

    def _moment(self, now_ms: int) -> int:
        """A time of which something is told: mostly not long ago."""
        rng = self._rng
        return now_ms - rng.choice((0, 1, rng.randrange(-2000, 3000), rng.randrange(_HOUR_MS), rng.randrange(_DAY_MS)))

    def _amounts(self) -> tuple[int, ...]:
        return tuple(self._amount() for _ in range(self._rng.choice((0, 1, 2, 5, 5, 5))))

    def _amount(self) -> int:
        return self._rng.choice((0, 1, self._rng.randrange(self._most), self._rng.randrange(2 * self._most)))

    def _entries(self, now_ms: int) -> tuple[Entry, ...]:
        rng = self._rng
        return tuple(
            Entry(
                name,
                self._rule(name if rng.random() < 0.97 else rng.choice(_OTHER_KINDS[name[:-1]]), now_ms),
                taken=self._amount() // 3 if rng.random() < 0.3 else 0,
                held=self._amount() // 2,
                shadow=rng.random() < 0.15,
            )
            for name in rng.choices(self._names, k=rng.choice((0, 1, 2, 2, 4)))
        )

    def _rule(self, name: str, now_ms: int) -> Rule:
        rng = self._rng
        limit = rng.randrange(1, self._most) if rng.random() < 0.2 else self._most
        # A bucket that was empty by a higher limit may have been forgotten, so only bursts change.
        rate_limit = 1 + self._most // (4 if name[-1] == "a" else 1)
        match name[:-1]:
            case "rate":
                return Rate(rate_limit, self._period_ms, rng.choice((limit, max(1, limit // 2), 2 * limit)))
            case "day":
                return Rate(rate_limit, _DAY_MS, limit)
            case "sum":
                return Budget(limit)
            case "win":
                length_ms = 10 * self._period_ms
                before = rng.choice((0, 1, 1, 2))
                first, count = now_ms // length_ms + 1 - before, before + rng.choice((0, 1, 2)) if before else 2
                return Budget(limit, tuple((first + number) * length_ms for number in range(count)))
            case "roll":
                return Rolling(limit, 60 * self._period_ms if rng.random() < 0.98 else 7777)
            case _:
                return Concurrency(limit)


def waits(seed: int, size: Size) -> Figures:
    """Fill accounts at random; a refused amount must not fit a millisecond before its wait is over, and fit then."""
    rng = random.Random(seed)
    wanted = 1000 if size == "full" else 200
    figures: Figures = {}
    for name in ("Rate", "Budget", "Rolling"):
        found = tried = 0
        while found < wanted:
            tried += 1
            found += _wait_is_the_shortest(name, rng)
        figures[f"waits of a {name}"] = found
    return figures


def _wait_is_the_shortest(name: str, rng: random.Random) -> bool:
    """Return whether there was a wait at all. Raises AssertionError where it was wrong."""
    now_ms = _START_MS + rng.randrange(_DAY_MS)
    rule = _random_rule(name, rng, now_ms)
    most = rule.burst if isinstance(rule, Rate) else rule.limit
    account = Account()
    for _ in range(rng.randrange(1, 30)):
        units = rng.randrange(1, most + 1)
        if rng.random() < 0.2 or room(account, rule, units, now_ms, 0) is None:
            account = take(account, rule, units, now_ms)
        now_ms += rng.randrange(1, 1 + (rule.period_ms if isinstance(rule, Rate | Rolling) else _HOUR_MS) // 10)
    # What is reserved is in the way of windows as well; for a `Rate` the promise is about its being used now.
    if rng.random() < 0.3 and not isinstance(rule, Rate):
        account = hold(account, rng.randrange(most))
    units = rng.randrange(1, most + 1)
    short = room(account, rule, units, now_ms, 0)
    if short is None or short.wait_ms < 0:
        return False
    assert short.wait_ms > 0
    assert room(account, rule, units, now_ms + short.wait_ms - 1, 0) is not None, (rule, account, units, now_ms)
    assert room(account, rule, units, now_ms + short.wait_ms, 0) is None, (rule, account, units, now_ms)
    return True


def _random_rule(name: str, rng: random.Random, now_ms: int) -> Rate | Budget | Rolling:
    limit = rng.choice((1, 7, 1000, 1_000_000, 1_000_000_000))
    period_ms = rng.choice((1000, 60_000, _HOUR_MS, _DAY_MS))
    if name == "Rate":
        return Rate(limit, period_ms, rng.choice((limit, max(1, limit // 3), min(10**9, 3 * limit))))
    if name == "Budget":
        return Budget(limit, tuple((now_ms // _HOUR_MS + number) * _HOUR_MS for number in range(-1, 6)))
    return Rolling(limit, max(period_ms, 60_000))
