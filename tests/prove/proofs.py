"""Which proofs are there? These, in the order in which they run. This tuple is the only registry."""

from __future__ import annotations

from tests.prove import bodies, departures, killed_tier, malformed
from tests.prove.proof import Proof

PROOFS: tuple[Proof, ...] = (
    Proof(
        name="disconnects",
        sentence="200 clients that leave at random moments leave no request open at a backend one second later.",
        run=departures.run,
        full_seeds=4,
    ),
    Proof(
        name="killed-tier",
        sentence="Of a server that is killed no client sees an error that a higher tier could have answered, nor a silent cut.",
        run=killed_tier.run,
        full_seeds=3,
    ),
    Proof(
        name="malformed",
        sentence="Every bad request is refused with a 4xx in OpenAI's shape within 100 ms, unseen by any backend.",
        run=malformed.run,
        full_seeds=2,
    ),
    Proof(
        name="bodies",
        sentence="Bodies of 1 and 16 MB hold up nobody else's stream: the largest gap between events 5 ms apart.",
        run=bodies.run,
        full_seeds=1,
    ),
)
