"""Is every bad request refused at once, and by nobody but the gateway? The whole table, timed."""

from __future__ import annotations

from random import Random
from statistics import median

from tests.e2e.malformed import cases, check, send
from tests.prove.proof import Figures, Size
from tests.running import running_stack

_SOON_S = 0.1
_TRIES = 3


def run(seed: int, size: Size) -> Figures:
    """Send the table in random order; a case counts with the best of a few tries, so that a busy machine is no fault."""
    table = cases()
    Random(seed).shuffle(table)
    with running_stack() as stack:
        gateway = stack.gateway
        pid = gateway.pid
        best_s: dict[str, float] = {}
        for _ in range(_TRIES):
            for case in table:
                outcome = send(gateway.port, case)
                check(case, outcome)
                best_s[case.name] = min(outcome.took_s, best_s.get(case.name, outcome.took_s))
        slowest = max(best_s, key=lambda name: best_s[name])
        assert best_s[slowest] < _SOON_S, f"{slowest}: {1000 * best_s[slowest]:.0f} ms"
        assert sum(upstream.seen for upstream in stack.upstreams) == 0
        assert gateway.process.running
        assert gateway.pid == pid
        assert gateway.get("/healthz").status == 200
        assert gateway.chat().status == 200
        assert "Traceback" not in gateway.process.said()
    return {
        "requests": float(len(table)),
        "seen by a backend": 0.0,
        "median, ms": round(1000 * median(best_s.values()), 2),
        "slowest, ms": round(1000 * best_s[slowest], 1),
        "slowest case": slowest,
    }
