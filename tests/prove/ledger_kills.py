"""Is every bill there after `kill -9`, and after a power cut? Under load, at any moment, again and again.

In cycles a gateway is killed, or the PostgreSQL behind it, or both at once, and started again. In the end every answer
that a client has must be in the ledger once.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from time import monotonic, sleep
from typing import Literal

import msgspec

from tests.prove.ledger_check import Interruption, compare, figures_of
from tests.prove.ledger_site import KEYS, Site, StoreKind, go_to, running_site
from tests.prove.ledger_users import Crowd
from tests.prove.proof import Figures, Size
from tests.running import folder_for_a_test, wait_until
from tests.servers.process import ServerMissingError
from tests.servers.unsynced import library

Victim = Literal["gateway", "postgres", "both", "worker"]

_NAMES: dict[StoreKind, str] = {"sqlite": "SQLite", "postgres": "PostgreSQL"}
_VICTIMS: dict[StoreKind, tuple[Victim, ...]] = {
    "sqlite": ("gateway", "worker", "gateway"),
    "postgres": ("both", "postgres", "gateway", "worker", "gateway"),
}
_YOUNG_S = 2.0
"""What is open is noted first a twentieth of a second after it began, at a look every tenth; the rest is for a busy
machine."""
_ANSWERS = 12
"""So many in each cycle, so that there is something to lose."""
_SECOND_CROWD = 1_000_000


class _Kills(msgspec.Struct, kw_only=True):
    of: Counter[Victim] = msgspec.field(default_factory=Counter)
    interruptions: list[Interruption] = []
    sectors: int = 0


def kills(seed: int, size: Size) -> Figures:
    """Kill processes: what they wrote the kernel has."""
    return _on_both(seed, size, cuts=False)


def power_cuts(seed: int, size: Size) -> Figures:
    """Kill processes, and drop what they wrote and did not sync. At test size only where that can be done."""
    try:
        with folder_for_a_test() as folder:
            library(folder)
    except ServerMissingError as missing:
        if size == "test":
            return {"not shown": str(missing)}
        raise
    return _on_both(seed, size, cuts=True)


def _on_both(seed: int, size: Size, *, cuts: bool) -> Figures:
    figures: Figures = {}
    for kind, name in _NAMES.items():
        if size == "full":
            found = play(kind, seed, cycles=50, users=12, workers=2, cuts=cuts)
        else:
            found = play(kind, seed, cycles=1, users=8, workers=1, cuts=cuts)
        figures |= {f"{name}: {figure}": value for figure, value in found.items()}
    return figures


def play(kind: StoreKind, seed: int, *, cycles: int, users: int, workers: int, cuts: bool) -> Figures:
    """Play so many cycles on a store of one kind."""
    random = Random(seed)
    crowd = Crowd(random, users, KEYS)
    slow = Crowd(random, users // 4, KEYS, kind="slow", first_number=_SECOND_CROWD)
    done = _Kills()
    victims = [one for one in _VICTIMS[kind] if workers > 1 or one != "worker"]
    with running_site(kind, crowd, slow, cuts=cuts, workers=workers, tells=seed % 2 == 1) as site:
        for cycle in range(cycles):
            _some_answers(crowd)
            sleep(random.random() * 0.4)
            _kill(site, [crowd, slow], victims[cycle % len(victims)], random, done)
        _some_answers(crowd)
        crowd.stop()
        slow.stop()
        assert site.at_rest(), site.gateway.process.said()[-3000:]
        site.stop_gateway()
        site.in_order()
        rows = site.rows()
        found = compare([*crowd.asked, *slow.asked], site.upstream, rows, done.interruptions, young_s=_YOUNG_S)
    figures: Figures = {f"kills of {victim}": times for victim, times in sorted(done.of.items())}
    if cuts:
        figures["unsynced sectors dropped"] = done.sectors
    return figures | figures_of(found)


def _some_answers(crowd: Crowd) -> None:
    since_s = monotonic()
    assert wait_until(lambda: crowd.answered(since_s) >= _ANSWERS, 30), "nobody is answered any more"


def _kill(site: Site, crowds: list[Crowd], victim: Victim, random: Random, done: _Kills) -> None:
    done.of[victim] += 1
    if victim == "worker":
        # Another one takes its place by itself; what it wrote, synced or not, is there.
        began_s = monotonic()
        site.kill_worker(random)
        done.interruptions.append(Interruption(began_s, monotonic()))
        return
    ends = [one for one, spared in ((_end_gateway, "postgres"), (_end_postgres, "gateway")) if victim != spared]
    random.shuffle(ends)
    for end in ends:
        end(site, crowds, done)
    lost = site.cut(random, kept=victim != "postgres", data=victim != "gateway")
    done.sectors += sum(one.sectors for one in lost)
    if victim == "postgres":
        sleep(random.random() * 0.5)
    if victim != "gateway":
        site.postgres.start()
    if victim != "postgres":
        go_to(site.start_gateway().port, crowds)


def _end_gateway(site: Site, crowds: list[Crowd], done: _Kills) -> None:
    began_s = monotonic()
    site.kill_gateway()
    go_to(None, crowds)
    done.interruptions.append(Interruption(began_s, monotonic()))


def _end_postgres(site: Site, _crowds: list[Crowd], _done: _Kills) -> None:
    site.postgres.kill()
