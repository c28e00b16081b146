"""What becomes of rows while their database is away? A file of ours holds them, and they are brought there afterwards.

Batches go to the database first. When one is not taken, it and all that follow go to the file, in the order they came,
until a thread of its own has brought the last of them over: then they go straight again. So the database gets the
batches of a process in their order. A batch leaves the file only after the database has committed it; what that does
twice changes nothing.

Rows that the database will never take stand in the file until somebody looks at them, and hold nothing else up.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from time import monotonic

from gateway.ledger.contract import BadRows, LedgerDown, Reading, Store
from gateway.ledger.rows import AnyRow, InstanceRow
from gateway.ledger.spool_file import Batch, claim_any, claim_left, parts_of

_log = logging.getLogger("tierway.ledger")

_MOST_ROWS = 2000
_FEW_ROWS = 200
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0
_LOOK_AROUND_S = 30.0
_LEAVE_S = 5.0


class SpooledStore:
    """A `Store` that is `primary` while it takes rows, and a file at `path` while it does not.

    Of several processes with the same `path` each has a file of its own (`-1`, `-2`, … in its name), and files that
    were left behind are brought over too, looked for every `look_around_s`. `most_bytes` is how large a file may get.
    To be made in the process that writes. Raises `LedgerDown` where there is no file to be had.
    """

    def __init__(self, primary: Store, path: Path, *, most_bytes: int, look_around_s: float = _LOOK_AROUND_S) -> None:
        self._primary = primary
        self._path = path
        self._most_bytes = most_bytes
        self._look_around_s = look_around_s
        self._file = claim_any(path, most_bytes)
        self._left_rows = 0
        self._sign: InstanceRow | None = None
        self._up = True
        # While batches go straight the primary belongs to who has `_way`; else to the thread that brings them over.
        self._straight = not self._file.batches
        self._way = threading.Lock()
        self._woken = threading.Event()
        self._closing = threading.Event()
        self._most_rows = _MOST_ROWS
        self._thread = threading.Thread(target=self._tend, name="ledger-spool", daemon=True)
        self._thread.start()

    @property
    def spooled_rows(self) -> int:
        """How many rows wait for the primary."""
        return self._file.rows + self._left_rows

    @property
    def set_aside_rows(self) -> int:
        """How many rows the primary will never take; they are in the file, with the reason."""
        return self._file.set_aside_rows

    @property
    def primary_up(self) -> bool:
        """Whether the primary took what it was asked to take last."""
        return self._up

    def write(self, rows: Sequence[AnyRow], closed: Sequence[str] = ()) -> None:
        with self._way:
            if self._straight:
                try:
                    self._hand_over(rows, closed)
                except LedgerDown as fault:
                    _log.warning("the ledger goes to the spool %s: %s", self._file.path, fault)
                    self._straight = False
                else:
                    return
            try:
                self._file.put(rows, closed)
            finally:
                self._woken.set()
            self._sign = next((row for row in reversed(rows) if isinstance(row, InstanceRow)), self._sign)

    def reading(self) -> AbstractContextManager[Reading]:
        return self._primary.reading()

    def close(self) -> None:
        """Bring over what can be in a few seconds. The rest stays for the next start."""
        self._closing.set()
        self._woken.set()
        self._thread.join()
        self._primary.close()
        self._file.close()

    def _hand_over(self, rows: Sequence[AnyRow], closed: Sequence[str]) -> None:
        """Have the primary take these, and set aside what it will never take. Raises `LedgerDown`."""
        try:
            try:
                self._primary.write(rows, closed)
            except BadRows as refused:
                self._divide(parts_of(rows), str(refused))
                self._primary.write((), closed)
        except LedgerDown:
            self._up = False
            raise
        self._up = True

    def _divide(self, parts: Sequence[list[AnyRow]], why: str) -> None:
        """Halve what was refused, until one part is left that is refused by itself."""
        if len(parts) == 1:
            self._file.set_aside(parts[0], why)
            return
        for half in (parts[: len(parts) // 2], parts[len(parts) // 2 :]):
            try:
                self._primary.write([row for part in half for row in part])
            except BadRows as refused:
                self._divide(half, str(refused))

    # -- the thread that brings over ----------------------------------------------------------------------------------

    def _tend(self) -> None:
        pause_s = _FIRST_PAUSE_S
        leave_s: float | None = None
        while True:
            moved = self._step()
            if self._closing.is_set():
                leave_s = leave_s or monotonic() + _LEAVE_S
                if not moved or self._straight or monotonic() > leave_s:
                    return
            elif self._straight:
                pause_s = _FIRST_PAUSE_S
                self._woken.wait(self._look_around_s)
                self._woken.clear()
            elif moved:
                pause_s = _FIRST_PAUSE_S
            else:
                self._closing.wait(pause_s)
                pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)

    def _step(self) -> bool:
        """Bring some over; return whether it was taken."""
        try:
            if self._straight:
                self._adopt()
            else:
                self._drain()
        except LedgerDown as fault:
            _log.debug("the spool %s stays as it is: %s", self._file.path, fault)
        except Exception:  # noqa: BLE001 - the outermost boundary of a thread; what it met may be over next time
            _log.exception("the spool %s cannot be brought over", self._file.path)
        else:
            return True
        return False

    def _drain(self) -> None:
        """Bring over what came first. When nothing waits, and the primary is there, batches go straight."""
        if not self._up:
            # First the last sign of life: by it others see that what we hold open is not theirs to bill.
            self._hand_over(() if self._sign is None else (self._sign,), ())
        batches = self._file.oldest(self._most_rows)
        try:
            self._bring(batches, self._most_rows)
        except LedgerDown:
            self._most_rows = max(1, self._most_rows // 4)  # it is there, so that was too much for its time
            raise
        self._file.forget(batches)
        self._most_rows = min(_MOST_ROWS, 2 * self._most_rows)
        if not batches:
            with self._way:
                self._straight = not self._file.batches
            if self._straight:
                _log.warning("the ledger's database is back, and has all that was in the spool %s", self._file.path)

    def _adopt(self) -> None:
        """Bring over what processes that are no more have left, a little at a time: others want to write meanwhile."""
        for file in claim_left(self._path, self._most_bytes):
            try:
                while file.batches and not self._closing.is_set():
                    self._left_rows = file.rows
                    batches = file.oldest(_FEW_ROWS)
                    with self._way:
                        if not self._straight:
                            return
                        self._bring(batches, _FEW_ROWS)
                    file.forget(batches)
            finally:
                self._left_rows = 0
                file.close()

    def _bring(self, batches: Sequence[Batch], most_rows: int) -> None:
        """Have the primary take all of these, not too many rows at once."""
        pieces = list(_pieces(_latest(batches), most_rows))
        for piece in pieces[:-1]:
            self._hand_over(piece, ())
        # Exchanges are closed with the last, when all that is known of them is there.
        self._hand_over(pieces[-1], [one for batch in batches for one in batch.closed])


def _latest(batches: Sequence[Batch]) -> list[AnyRow]:
    """Return the rows of the batches; of those that replace each other only the last."""
    rows: dict[object, AnyRow] = {}
    for row in (row for batch in batches for row in batch.rows):
        replaced = row.WHEN_THERE == "replace"
        key = (row.TABLE, *(getattr(row, name) for name in row.KEY)) if replaced else len(rows)
        rows[key] = row
    return list(rows.values())


def _pieces(rows: Sequence[AnyRow], most_rows: int) -> Iterator[list[AnyRow]]:
    """Yield all rows, so many at once or a few more: those of one exchange stay together. The last may be empty."""
    piece: list[AnyRow] = []
    for part in parts_of(rows):
        piece += part
        if len(piece) >= most_rows:
            yield piece
            piece = []
    yield piece
