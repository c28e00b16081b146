"""Does PostgreSQL lose a bill, or count one twice, that was away for a minute? Under load, and then it is back.

By seed it is shut down or frozen, and meanwhile the gateway stays, is asked to stop and started again, or is killed.
"""

from __future__ import annotations

from contextlib import ExitStack
from random import Random
from time import monotonic, sleep

from tests.prove.ledger_check import Interruption, compare, figures_of
from tests.prove.ledger_site import KEYS, Site, running_site
from tests.prove.ledger_users import Crowd
from tests.prove.proof import Figures, Size
from tests.running import wait_until
from tests.servers.postgres import frozen

_AWAY_S = {"full": 60.0, "test": 2.5}
_YOUNG_S = 2.0
_WAYS = (
    "frozen, gateway restarted",
    "stopped, gateway killed",
    "frozen, gateway killed",
    "stopped, gateway restarted",
    "frozen, gateway stays",
    "stopped, gateway stays",
)


def run(seed: int, size: Size) -> Figures:
    """Take PostgreSQL away and bring it back."""
    random = Random(seed)
    way = _WAYS[seed % len(_WAYS)]
    crowd = Crowd(random, 12 if size == "full" else 8, KEYS)
    interruptions: list[Interruption] = []
    with running_site("postgres", crowd, tells=seed % 2 == 1) as site:
        since_s = monotonic()
        assert wait_until(lambda: crowd.answered(since_s) >= 30, 30)
        with ExitStack() as away:
            if way.startswith("frozen"):
                away.enter_context(frozen(site.postgres.server))
            else:
                site.postgres.stop()
                away.callback(site.postgres.start)
            gone_s = monotonic()
            sleep(_AWAY_S[size] * (0.3 + 0.4 * random.random()))
            if way.endswith("restarted"):
                crowd.port = None
                site.stop_gateway()
                crowd.port = site.start_gateway().port
            elif way.endswith("killed"):
                _kill(site, crowd, interruptions)
            sleep(max(0.0, gone_s + _AWAY_S[size] - monotonic()))
            assert wait_until(lambda: crowd.answered(gone_s) >= 30, 30), "nobody is answered while it is away"
            meanwhile, waited = crowd.answered(gone_s), site.waiting()
        back_s = monotonic()
        assert waited > 0, "nothing was in the spool"
        assert wait_until(lambda: crowd.answered(back_s) >= 30, 30)
        crowd.stop()
        assert site.at_rest(60), site.gateway.process.said()[-3000:]
        drained_s = monotonic() - back_s
        site.stop_gateway()
        site.in_order()
        found = compare(crowd.asked, site.upstream, site.rows(), interruptions, young_s=_YOUNG_S)
    return {
        "way": way,
        "away, s": round(back_s - gone_s, 1),
        "answers meanwhile": meanwhile,
        "rows in the spool": waited,
        "all drained after, s": round(drained_s, 2),
        **figures_of(found),
    }


def _kill(site: Site, crowd: Crowd, interruptions: list[Interruption]) -> None:
    began_s = monotonic()
    site.kill_gateway()
    crowd.port = None
    interruptions.append(Interruption(began_s, monotonic()))
    crowd.port = site.start_gateway().port
