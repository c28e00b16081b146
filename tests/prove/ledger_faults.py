"""What does a gateway do that cannot write its ledger any more? What its operator has chosen, and never a free answer.

The disk is full: no file of the gateway may grow beyond what it has. Or PostgreSQL is away, and the spool is full.
"""

from __future__ import annotations

import json
import resource
from collections import Counter
from random import Random
from time import monotonic, sleep
from typing import Any, Literal

from tests.prove.ledger_check import compare
from tests.prove.ledger_site import KEYS, Site, StoreKind, running_site
from tests.prove.ledger_users import Asked, Crowd
from tests.prove.proof import Figures, Size
from tests.running import wait_until

Choice = Literal["refuse", "serve"]

_FULL_BYTES = 64 * 1024
"""Less than the ledger has by then, and more than the log."""
_SPOOL = "300KiB"
_SECOND_CROWD = 1_000_000
_ALARM = "The ledger cannot be written"
_UNWRITABLE = b"\ntierway_ledger_unwritable 1\n"
_ALL_CLEAR = "The ledger is written again"


def run(seed: int, size: Size) -> Figures:
    """Let the ledger be unwritable for a while, once for each choice and kind of store."""
    plays: list[tuple[StoreKind, Choice]] = [("sqlite", "refuse")]
    if size == "full":
        plays += [("sqlite", "serve"), ("postgres", "refuse"), ("postgres", "serve")]
    figures: Figures = {}
    for kind, choice in plays:
        found = _play(kind, choice, Random(seed), lasts_s=6.0 if size == "full" else 1.2)
        figures |= {f"{kind}, {choice}: {name}": value for name, value in found.items()}
    return figures


def _play(kind: StoreKind, choice: Choice, random: Random, *, lasts_s: float) -> Figures:
    crowd = Crowd(random, 8, KEYS, kind="calm")
    slow = Crowd(random, 6, KEYS, kind="slow", first_number=_SECOND_CROWD)

    def change(config: dict[str, Any]) -> None:
        config["ledger"]["when_unwritable"] = choice
        if kind == "postgres":
            config["ledger"]["store"]["spool_size"] = _SPOOL

    with running_site(kind, crowd, slow, change=change) as site:
        since_s = monotonic()
        assert wait_until(lambda: crowd.answered(since_s) >= 60, 30)
        _begin(site)
        began_s = monotonic()
        assert wait_until(lambda: _ALARM in site.gateway.process.said(), 30), site.gateway.process.said()[-3000:]
        raised_s = monotonic() - began_s
        assert _UNWRITABLE in site.gateway.get("/metrics").body
        known_s = monotonic()
        sleep(lasts_s)
        over_s = monotonic()
        assert _UNWRITABLE in site.gateway.get("/metrics").body
        _end(site)
        assert wait_until(lambda: _ALL_CLEAR in site.gateway.process.said(), 30), site.gateway.process.said()[-3000:]
        again_s = monotonic()
        assert wait_until(lambda: crowd.answered(again_s) >= 20, 30), "nobody is answered again"
        crowd.stop()
        slow.stop()
        assert site.at_rest(), site.gateway.process.said()[-3000:]
        site.stop_gateway()
        site.in_order()
        everyone = [*crowd.asked, *slow.asked]
        found = compare(everyone, site.upstream, site.rows())
    meanwhile = [one for one in everyone if one.began_s > known_s and one.ended_s and one.ended_s < over_s]
    through = [one for one in slow.asked if one.began_s < known_s and one.ended_s and known_s < one.ended_s < over_s]
    through = [one for one in through if one.answer.status == 200]
    figures: Figures = {
        "alarm after, s": round(raised_s, 2),
        "requests meanwhile": len(meanwhile),
        "streams that were open": len(through),
        "well again after, s": round(again_s - over_s, 2),
        "answers in all": found.complete,
        "of these without a bill": 0,
    }
    return figures | (_refused(meanwhile, through) if choice == "refuse" else _served(meanwhile, through))


def _begin(site: Site) -> None:
    """Let nothing be written any more."""
    if site.kind == "postgres":
        site.postgres.stop()
    else:
        _limit(site, _FULL_BYTES)


def _end(site: Site) -> None:
    if site.kind == "postgres":
        site.postgres.start()
    else:
        _limit(site, resource.RLIM_INFINITY)


def _limit(site: Site, most_bytes: int) -> None:
    _, hard = resource.prlimit(site.gateway.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(site.gateway.pid, resource.RLIMIT_FSIZE, (most_bytes, hard))


def _refused(meanwhile: list[Asked], through: list[Asked]) -> Figures:
    """See that all were told so, and none was served for nothing."""
    statuses = Counter(one.answer.status for one in meanwhile)
    codes = Counter(json.loads(one.answer.body)["error"]["code"] for one in meanwhile if one.answer.status != 200)
    assert set(statuses) == {503}, statuses
    assert set(codes) == {"ledger_unavailable"}, codes
    assert through, "no stream was open that this could show anything of"
    for one in through:
        assert one.answer.ending == "error", one.answer
        assert b"ledger_unavailable" in one.answer.body[-500:], one.answer.body[-500:]
    return {"of these refused with 503": statuses[503], "of these ended with an error event": len(through)}


def _served(meanwhile: list[Asked], through: list[Asked]) -> Figures:
    """See that nobody noticed anything."""
    odd = [one.answer for one in (*meanwhile, *through) if not one.complete]
    assert not odd, odd[0]
    assert meanwhile, "nobody asked"
    return {"of all these not served": 0}
