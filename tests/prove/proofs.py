"""Which proofs are there? These, in the order in which they run. This tuple is the only registry."""

from __future__ import annotations

from tests.prove import (
    bodies,
    books,
    counting,
    departures,
    keys,
    killed_tier,
    ledger_faults,
    ledger_kills,
    ledger_outage,
    ledger_reseed,
    limits_burst,
    limits_honest,
    limits_killed_worker,
    limits_retry_after,
    limits_round_trips,
    limits_store_faults,
    limits_users,
    malformed,
    store_ceiling,
    store_faults,
)
from tests.prove.proof import Proof

_LIMITS = "limits.md"
_LEDGER = "ledger.md"

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
    Proof(
        name="limits-burst",
        sentence="Of hundreds that ask 8 processes at once none is let in above a limit, and what was used is counted.",
        run=limits_burst.run,
        full_seeds=50,
        figures_in=_LIMITS,
    ),
    Proof(
        name="limits-killed-worker",
        sentence="What a worker held that is killed is given back within the lease, and what it used stays counted.",
        run=limits_killed_worker.run,
        full_seeds=5,
        figures_in=_LIMITS,
    ),
    Proof(
        name="limits-store-faults",
        sentence="A Redis that is frozen, slow, gone, empty or out of date delays nobody by more than its 50 ms, and each "
        "`when_down` holds.",
        run=limits_store_faults.run,
        full_seeds=3,
        figures_in=_LIMITS,
    ),
    Proof(
        name="limits-store-waits",
        sentence="The same of two replicas in one process, where every wait can be measured around the question itself.",
        run=store_faults.run,
        full_seeds=3,
        figures_in=_LIMITS,
    ),
    Proof(
        name="limits-honest",
        sentence="Who keeps to 95 % of a limit is never refused; a strict budget refuses nobody before 97 % of it is "
        "spent, and is never passed.",
        run=limits_honest.run,
        full_seeds=1,
        figures_in=_LIMITS,
    ),
    Proof(
        name="limits-retry-after",
        sentence="Of 20 that were refused all are let in after exactly the wait that they were told.",
        run=limits_retry_after.run,
        full_seeds=3,
        figures_in=_LIMITS,
    ),
    Proof(
        name="limits-waits",
        sentence="No wait that the rules tell is a millisecond too short or too long.",
        run=books.waits,
        full_seeds=3,
        figures_in=_LIMITS,
    ),
    Proof(
        name="limits-script",
        sentence="The script in Redis answers random sequences of operations as the rules in Python do.",
        run=books.run,
        full_seeds=10,
        figures_in=_LIMITS,
    ),
    Proof(
        name="limits-round-trips",
        sentence="A request goes to Redis once before and once after, and once more for a climb into a tier with limits.",
        run=limits_round_trips.run,
        full_seeds=1,
        figures_in=_LIMITS,
    ),
    Proof(
        name="limits-ceiling",
        sentence="So many requests pass one slot of Redis, whose one core is then busy.",
        run=store_ceiling.run,
        full_seeds=1,
        figures_in=_LIMITS,
    ),
    Proof(
        name="limits-users",
        sentence="A million users cost the same each as few do, in time and in memory, and are forgotten by themselves.",
        run=limits_users.run,
        full_seeds=1,
        figures_in=_LIMITS,
    ),
    Proof(
        name="keys",
        sentence="100,000 keys of the store cost a process the same each as few do.",
        run=keys.run,
        full_seeds=1,
        figures_in=_LIMITS,
    ),
    Proof(
        name="counting",
        sentence="Counting tokens holds up nobody, and the bound on a prompt is above what a server makes of it.",
        run=counting.run,
        full_seeds=1,
        figures_in=_LIMITS,
    ),
    Proof(
        name="ledger-kills",
        sentence="After 50 times `kill -9` under load every answer that a client has is billed once, to the token and the "
        "nano-dollar.",
        run=ledger_kills.kills,
        full_seeds=1,
        figures_in=_LEDGER,
    ),
    Proof(
        name="ledger-power-cuts",
        sentence="The same where each kill takes with it what was written and not synced, of the ledger and of "
        "PostgreSQL.",
        run=ledger_kills.power_cuts,
        full_seeds=1,
        figures_in=_LEDGER,
    ),
    Proof(
        name="ledger-outage",
        sentence="Of a PostgreSQL that is away for a minute, shut down or frozen, no bill is lost and none counted twice, "
        "also where the gateway is restarted or killed meanwhile.",
        run=ledger_outage.run,
        full_seeds=6,
        figures_in=_LEDGER,
    ),
    Proof(
        name="ledger-reseed",
        sentence="Redis has lost what was spent, all or the last of it: eight processes tell it again from the ledger, and "
        "every budget is exact.",
        run=ledger_reseed.run,
        full_seeds=3,
        figures_in=_LEDGER,
    ),
    Proof(
        name="ledger-faults",
        sentence="While bills cannot be written nothing is answered for free: all is refused, or all is served and billed "
        "afterwards, as the operator says.",
        run=ledger_faults.run,
        full_seeds=2,
        figures_in=_LEDGER,
    ),
)
