"""What can be asked of the books, and what do they answer? Operations and replies, the same for every store.

They travel to a shared store as msgpack arrays whose first element is the tag (`gateway/limits_script.py`). Amounts
stand in the order of the entries; those left out at the end are 0. A lease lasts at least a millisecond.
"""

from __future__ import annotations

import msgspec

from policies.accounts import Entry, Short, Standing

# -- operations -------------------------------------------------------------------------------------------------------


class Reserve(msgspec.Struct, frozen=True, array_like=True, tag="reserve"):
    """Reserve all entries or none, until settled or `lease_ms` have passed without a renewal.

    Twice with the same id: the second is granted again and counts nothing, even when the first has been settled or has
    expired. After a `Cancel` of the id: refused. Entries of the same account must fit together.
    """

    id: str
    entries: tuple[Entry, ...]
    lease_ms: int


class Settle(msgspec.Struct, frozen=True, array_like=True, tag="settle"):
    """Give back what is still held and count `actual` as used, one amount an entry in the order they were reserved.

    What renewals counted already is deducted. A reservation whose lease has expired is put right by the difference,
    for an hour after that; one that is not known is left alone: it was settled before. With `entries`, one that is not
    known, or was cancelled, is counted (it was lost with the store's data), once: the id is remembered for a day, that
    of any other settled reservation for two minutes. More than was held is counted like everything else.

    Windows count it at `at_ms`, when its bill was made (0: now), and count the bill named `bill` once, whoever tells
    it: see `Tell`.
    """

    id: str
    actual: tuple[int, ...]
    entries: tuple[Entry, ...] = ()
    at_ms: int = 0
    bill: str = ""


class Renew(msgspec.Struct, frozen=True, array_like=True, tag="renew"):
    """Extend the lease and count what was used so far: it moves from reserved to used (not of `Concurrency`).

    Windows count it when the reservation ends, all at one time as a bill does; until then it is reserved. One that had
    expired within the last hour is open again. `so_far` never falls; a smaller one counts as the last.
    """

    id: str
    so_far: tuple[int, ...]
    lease_ms: int


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag="cancel"):
    """Undo a reservation, `taken` amounts too (of a `Rate` only what cannot have drained since).

    Remembered for ten minutes, so that a `Reserve` that arrives after its own cancellation is refused. What has been
    settled stays settled.
    """

    id: str


class Announce(msgspec.Struct, frozen=True, array_like=True, tag="announce"):
    """Enter a reservation that was granted elsewhere, whatever the limits say. One that is known is only renewed.

    Of one that has been settled or cancelled nothing is entered.
    """

    id: str
    entries: tuple[Entry, ...]
    so_far: tuple[int, ...]
    lease_ms: int


class Charge(msgspec.Struct, frozen=True, array_like=True, tag="charge"):
    """Count `taken` amounts that were used elsewhere, whatever the limits say, once: the id is remembered for a day.

    An id that a reservation has or had counts nothing. Windows count each at its time in `times_ms` (left out: now).
    """

    id: str
    entries: tuple[Entry, ...]
    times_ms: tuple[int, ...] = ()


class Tell(msgspec.Struct, frozen=True, array_like=True, tag="tell"):
    """Count what an exchange came to (`taken` of windows) once, whoever tells it: its replica, or the ledger.

    It counts at `at_ms`, when it was made, or each amount at its time in `times_ms`; a negative amount is taken back
    from that time, as far as it is still there. `of` are the ids under which it may be reserved: what such a
    reservation has counted in windows gives way to it, and what it holds there is given back. Where none of them is
    known, it counts only if it may be `missing`. A bill made before the `cut` of a loss is among its totals, and counts
    nothing; else its id is remembered for a day.
    """

    id: str
    entries: tuple[Entry, ...]
    at_ms: int
    times_ms: tuple[int, ...] = ()
    of: tuple[str, ...] = ()
    missing: bool = True


class Look(msgspec.Struct, frozen=True, array_like=True, tag="look"):
    """Tell how accounts stand; changes nothing but what time has changed (expired leases are settled)."""

    entries: tuple[Entry, ...]


class Seed(msgspec.Struct, frozen=True, array_like=True, tag="seed"):
    """Add totals known from elsewhere (`taken`) to `Budget` and `Rolling` accounts after the store lost its data.

    Only the first one after each loss counts, however many replicas race, so it must have all the totals that no
    `Charge` has told before. Of what an account held before the loss nothing remains, whether it is among them or not;
    what was counted since does.
    """

    entries: tuple[Entry, ...]


Operation = Reserve | Settle | Renew | Cancel | Announce | Charge | Tell | Look | Seed

# -- replies ----------------------------------------------------------------------------------------------------------


class Granted(msgspec.Struct, frozen=True, array_like=True, tag="granted"):
    """Reserved. `standings` are those after it, one an entry; `short` are the shadow entries that did not fit."""

    now_ms: int
    standings: tuple[Standing, ...]
    short: tuple[Short, ...] = ()


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """Not reserved, and nothing has changed. `short` are all entries that did not fit, none where it was cancelled."""

    now_ms: int
    standings: tuple[Standing, ...]
    short: tuple[Short, ...]


class Done(msgspec.Struct, frozen=True, array_like=True, tag="done"):
    """The operation is done. `standings` answer a `Look`.

    `known`: there was a reservation to settle, renew or cancel; of an `Announce`: the id was known, in any state; of a
    `Charge`, `Tell` or `Seed`: it counted.
    """

    now_ms: int
    known: bool
    standings: tuple[Standing, ...] = ()


class Stale(msgspec.Struct, frozen=True, array_like=True, tag="stale"):
    """The store has lost or replaced its data since the caller last looked; nothing was done. Of shared stores only."""

    now_ms: int
    epoch: str


Reply = Granted | Refused | Done | Stale
