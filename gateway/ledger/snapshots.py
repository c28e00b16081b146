"""What would be billed if this process died now? The exchanges under way, written down now and then.

One that ends soon is never written: `_FIRST_S` after its beginning it is for the first time, and then every `_AGAIN_S`,
where what it tells has changed; less often where there are so many that it would be more than `_MOST_A_SECOND`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from gateway.ledger.rows import Bill, OpenRow

_log = logging.getLogger("tierway.ledger")

_FIRST_S = 0.05
_AGAIN_S = 0.25
_MOST_A_SECOND = 400
# A bill takes some 30 us to make and encode. No more at once, so that the event loop goes on; who is left is next.
_MOST_AT_ONCE = 100

_encode = msgspec.json.Encoder().encode


class _Open:
    __slots__ = ("ended", "exchange_id", "said", "so_far", "stamp_ms", "turn_s", "written")

    def __init__(self, exchange_id: str, so_far: Callable[[], Bill], turn_s: float) -> None:
        self.exchange_id = exchange_id
        self.so_far = so_far
        self.turn_s = turn_s
        self.stamp_ms = 0
        self.said = 0
        self.written = False
        self.ended = False


class Snapshots:
    """The exchanges under way of one process."""

    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._open: dict[str, _Open] = {}
        # Each in the order of its turns.
        self._new: deque[_Open] = deque()
        self._known: deque[_Open] = deque()

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, exchange_id: str, so_far: Callable[[], Bill], now_s: float) -> None:
        """Note that an exchange is under way. `now_s` is monotonic."""
        one = self._open[exchange_id] = _Open(exchange_id, so_far, now_s + _FIRST_S)
        self._new.append(one)

    def end(self, exchange_id: str) -> None:
        """No more of it is told."""
        one = self._open.get(exchange_id)
        if one is not None:
            one.ended = True

    def written(self, exchange_id: str) -> bool:
        """Whether there may be a row of it."""
        one = self._open.get(exchange_id)
        return one is not None and one.written

    def forget(self, exchange_id: str) -> bool:
        """Let go of it, for it is over. Return whether there may be a row of it."""
        one = self._open.pop(exchange_id, None)
        if one is None:
            return False
        one.ended = True
        return one.written

    def rows(self, now_s: float, now_ms: int) -> list[OpenRow]:
        """Return what has come to be told since it was asked for last: of those whose turn it is."""
        return [row for one in self._turns(now_s) if (row := self._row(one, now_ms)) is not None]

    def say_again(self) -> None:
        """Tell all of it anew: what was told may not have been heard."""
        for one in self._open.values():
            one.said = 0

    def left(self) -> Iterator[tuple[str, Bill | None]]:
        """Yield the bills of all that have not ended; None for one that makes none."""
        for exchange_id, one in list(self._open.items()):
            if not one.ended:
                yield exchange_id, self._ask(one)

    def _turns(self, now_s: float) -> Iterator[_Open]:
        due = 0
        for line in (self._new, self._known):
            while line and line[0].turn_s <= now_s and due < _MOST_AT_ONCE:
                one = line.popleft()
                if one.ended:
                    continue
                due += 1
                yield one
                one.turn_s = now_s + max(_AGAIN_S, len(self._open) / _MOST_A_SECOND)
                self._known.append(one)

    def _row(self, one: _Open, now_ms: int) -> OpenRow | None:
        bill = self._ask(one)
        if bill is None:
            return None
        text = _encode(bill)
        said = hash(text)
        if said == one.said:
            return None
        one.said, one.written = said, True
        # By its stamp the latest is known, even where the clock goes backwards.
        one.stamp_ms = max(one.stamp_ms + 1, now_ms)
        return OpenRow(exchange_id=one.exchange_id, instance=self._instance, seen_ms=one.stamp_ms, bill=text.decode())

    def _ask(self, one: _Open) -> Bill | None:
        try:
            return one.so_far()
        except Exception:  # noqa: BLE001 - the fault of one exchange is not to keep the others from being written
            _log.exception("What exchange %s has cost so far cannot be told.", one.exchange_id)
            return None
